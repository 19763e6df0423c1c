r"""MONAI bundles of exported networks: metadata.json, inference.json, and checks of both. Used by
tools/export.py.

A bundle is a folder that MONAI alone can run: models/model.ts (TorchScript), configs/inference.json
(MONAI's transforms for the preprocessing, its sliding window, saving on the grid of the file) and
configs/metadata.json. From inside it:

    python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS \
        --output_dir LABELS
    python -m monai.bundle verify_metadata --meta_file configs/metadata.json \
        --filepath docs/metadata_schema.json

verify_metadata validates against the JSON schema at --filepath and downloads the official one if
there is no such file. tools/monai_metadata_schema.json, which bundles carry, has the fields of the
bundle specification in MONAI's documentation (the official file is not shipped with MONAI), so that
the check needs no network.
"""

import argparse
import contextlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import nn

from dataloaders import la
from dataloaders.volumes import to_native
from tools.deployed import Sample
from utils.config import ConfigError
from utils.exported import optional

SCHEMA = Path(__file__).with_name("monai_metadata_schema.json")
OFFICIAL_SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
AXES = [["L", "R"], ["P", "A"], ["I", "S"]]  # what axis codes stand for


def check_supported(described: dict[str, Any]) -> None:
    """ConfigError where no bundle can be made."""
    if described["kind"] == "2d-semi":
        raise ConfigError(
            f"--format monai_bundle: bundles are for 3D networks, this one takes slices of "
            f"{described['config']['patch_size']}; choose onnx, openvino, torchscript or "
            "torch_export"
        )
    if described["dataset"].get("intensity") == "nnunet":
        raise ConfigError(
            "--format monai_bundle: MONAI has no transforms that prepare a scan as nnU-Net does "
            "(intensity: nnunet); choose onnx, openvino, torchscript or torch_export"
        )
    optional("jsonschema", "--format monai_bundle")


def write(
    folder: Path, described: dict[str, Any], dataset, network: nn.Module, args: argparse.Namespace
) -> None:
    """Write configs/ and docs/metadata_schema.json; models/model.ts and docs/README.md are there
    already.
    """
    for name, content in (
        ("metadata", metadata(described, dataset, args)),
        ("inference", inference(described, dataset)),
    ):
        path = folder / "configs" / f"{name}.json"
        path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(SCHEMA, folder / "docs" / "metadata_schema.json")


def metadata(described: dict[str, Any], dataset, args: argparse.Namespace) -> dict[str, Any]:
    """The content of configs/metadata.json."""
    config, network = described["config"], described["network"]
    names = list(described["class_names"])
    window = dataset.window if getattr(dataset, "intensity", "") == "window" else None
    modality = (
        "MR" if described["dataset"]["format"] in ("brats", "la") else "CT" if window else "unknown"
    )
    return {
        "schema": OFFICIAL_SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported from the training run"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "nibabel": version("nibabel"),
            "fire": version_or("fire", "0.7.1"),
        },
        "supported_apps": {},
        "name": f"{config['dataset']} segmentation, {network['name']}",
        "task": f"segmentation of {', '.join(names if dataset.multilabel else names[1:])}",
        "description": f"{network['name']} trained by the method {config['method']} on "
        f"{config['dataset']}",
        "authors": "those who trained it; see docs/README.md",
        "copyright": args.licence or "not stated; see docs/README.md",
        "data_source": config["dataset"],
        "data_type": "nibabel",
        "image_classes": f"{network['in_channels']} channel(s), preprocessed as "
        "configs/inference.json does",
        "label_classes": ", ".join(f"{index} {name}" for index, name in enumerate(names)),
        "pred_classes": ", ".join(f"{index} {name}" for index, name in enumerate(names)),
        "eval_metrics": {},
        "intended_use": args.intended_use or "research; see docs/README.md",
        "references": [],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if window else "magnitude",
                    "modality": modality,
                    "num_channels": network["in_channels"],
                    "spatial_shape": list(config["patch_size"]),
                    "dtype": "float32",
                    "value_range": [0.0, 1.0] if window else [],
                    "is_patch_data": True,
                    "channel_def": {
                        str(index): f"image {index}" for index in range(network["in_channels"])
                    },
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": network["num_classes"],
                    "spatial_shape": list(config["patch_size"]),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(index): name for index, name in enumerate(names)},
                }
            },
        },
    }


def version_or(name: str, default: str) -> str:
    """Version of an installed package; `default` where it is not installed."""
    try:
        return version(name)
    except ModuleNotFoundError:  # importlib.metadata.PackageNotFoundError is one
        return default


def inference(described: dict[str, Any], dataset) -> dict[str, Any]:
    """The content of configs/inference.json: what the run's test script does, in MONAI's words."""
    config, semi = described["config"], described["kind"] == "3d-semi"
    if folder_per_case(described):
        # Names of channels must sort in the order of training, as -t1c -t1n -t2f -t2w and _0000
        # _0001 do.
        images = (
            "$[sorted(f for f in glob.glob(os.path.join(d, '*.nii.gz')) if not "
            "f.endswith('-seg.nii.gz')) "
            "for d in sorted(glob.glob(os.path.join(@dataset_dir, '*', '')))]"
        )
    else:
        images = "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))"
    # int() rounds the product of a window's side and 1 - overlap down: half a voxel keeps it on the
    # wanted side.
    overlap = (
        [1 - (step + 0.5) / side for step, side in zip(config["stride"], config["patch_size"])]
        if semi
        else config["overlap"]
    )
    forward = "@network_def"
    if semi:  # softmax of each window is averaged, not its logits
        forward = "lambda windows: torch.softmax(@network_def(windows), 1)"
    return {
        "imports": [
            "$import glob",
            "$import os",
            "$import torch",
            "$import numpy as np",
            "$import monai",
        ],
        "bundle_root": ".",
        "dataset_dir": "$os.path.join(@bundle_root, 'input')",
        "output_dir": "$os.path.join(@bundle_root, 'output')",
        "images": images,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": "$torch.jit.load(os.path.join(@bundle_root, 'models', 'model.ts'), "
        "map_location=@device).eval()",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing(described, dataset)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': image} for image in @images]",
            "transform": "@preprocessing",
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(config["patch_size"]),
            "sw_batch_size": config["window_batch"],
            "overlap": overlap,
            "mode": "constant",
            "padding_mode": "constant",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                *labelling(dataset),
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "",
                    "output_ext": ".nii.gz",
                    "output_dtype": "$np.uint8",
                    "resample": True,  # to the grid of the file, whatever the preprocessing did
                    "mode": "nearest",
                    "padding_mode": "zeros",
                    "separate_folder": False,
                    "print_log": False,
                },
            ],
        },
        "predict": (
            f"$torch.inference_mode()(lambda image: "
            f"@inferer(image[None].to(@device), {f'({forward})' if semi else forward})[0].cpu())"
        ),
        "segment": (
            "$lambda item: @postprocessing({'pred': monai.data.MetaTensor("
            "@predict(item['image'].as_tensor()), meta=item['image'].meta)})"
        ),
        "run": ["$[@segment(item) for item in @dataset]"],
    }


def preprocessing(described: dict[str, Any], dataset) -> list[dict[str, Any]]:
    """The deterministic transforms of the data set, for the image alone."""
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    ]
    if described["dataset"]["format"] == "brats":
        steps.append(
            {
                "_target_": "NormalizeIntensityd",
                "keys": "image",
                "nonzero": True,
                "channel_wise": True,
            }
        )
    else:
        semi = described["dataset"]["format"] == "la"
        axes, spacing = (
            (la.ORIENTATION, [la.SPACING] * 3)
            if semi
            else (dataset.orientation, list(dataset.spacing))
        )
        intensity = "zscore" if semi else dataset.intensity
        if axes:
            steps.append(
                {"_target_": "Orientationd", "keys": "image", "axcodes": axes, "labels": AXES}
            )
        if spacing:
            steps.append(
                {"_target_": "Spacingd", "keys": "image", "pixdim": spacing, "mode": "bilinear"}
            )
        if intensity == "window":
            low, high = dataset.window
            steps.append(
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "image",
                    "a_min": low,
                    "a_max": high,
                    "b_min": 0.0,
                    "b_max": 1.0,
                    "clip": True,
                }
            )
        elif intensity == "zscore":
            steps.append({"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True})
        if not semi and dataset.crop_foreground:
            steps.append(
                {
                    "_target_": "CropForegroundd",
                    "keys": "image",
                    "source_key": "image",
                    "select_fn": "$lambda image: image > 0",
                    "allow_smaller": True,
                }
            )
    return [*steps, {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"}]


def labelling(dataset) -> list[dict[str, Any]]:
    """From averaged logits to ids as label files hold them."""
    if not dataset.multilabel:
        return [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}]
    # Region k is bit k of a number, and a table has the id for each number: whatever is painted
    # over what.
    count = dataset.num_classes
    bits = (np.arange(2**count) >> np.arange(count)[:, None]) & 1
    table = dataset.decode_prediction(bits[:, :, None, None].astype(np.uint8)).ravel().tolist()
    number = "sum((region >= 0).long() << k for k, region in enumerate(logits))"
    ids = f"$lambda logits: torch.tensor({table})[{number}][None]"
    return [{"_target_": "Lambdad", "keys": "pred", "func": ids}]


def folder_per_case(described: dict[str, Any]) -> bool:
    """Whether a case is a folder of channel files, not one file."""
    form = described["dataset"]["format"]
    return form == "brats" or (form == "nnunet" and described["network"]["in_channels"] > 1)


def verify_metadata(folder: Path) -> None:
    """MONAI's own check of metadata.json, against the schema in the bundle."""
    from monai.bundle import verify_metadata as check

    with quiet():
        check(
            meta_file=str(folder / "configs/metadata.json"),
            filepath=str(folder / "docs/metadata_schema.json"),
        )


def agreement(
    folder: Path,
    described: dict[str, Any],
    dataset,
    files: Sequence[Path],
    sample: Sample,
    expected: np.ndarray,
    scratch: Path,
) -> float:
    """Share of voxels of the file's grid that the bundle, run by MONAI, labels as `expected`,
    labels on the preprocessed grid, do once they are brought there.
    """
    from monai.bundle import run

    given, made = scratch / "bundle_input", scratch / "bundle_output"
    inner = given / "case" if folder_per_case(described) else given
    inner.mkdir(parents=True)
    for file in files:
        shutil.copy(file, inner / file.name)
    with quiet():
        run(
            config_file=str(folder / "configs/inference.json"),
            meta_file=str(folder / "configs/metadata.json"),
            bundle_root=str(folder),
            dataset_dir=str(given),
            output_dir=str(made),
        )
    (path,) = made.glob("*.nii.gz")
    found = np.asarray(nib.load(path).dataobj)
    if "native_affine" in sample.volume:
        parts = expected if dataset.multilabel else expected[None]
        grid = (
            sample.volume["affine"],
            sample.volume["native_affine"],
            sample.volume["native_shape"],
        )
        parts = [to_native(part, *(np.asarray(value) for value in grid)) for part in parts]
        expected = dataset.decode_prediction(np.stack(parts) if dataset.multilabel else parts[0])
    return float(np.mean(found == expected))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MONAI prints its arguments and where it saves; standard output stays ours."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
