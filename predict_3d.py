r"""Segment new 3D scans with a trained network; no labels are needed.

    python predict_3d.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/best.pt \
        --input scan.nii.gz --output segmented
    python predict_3d.py --ckpt best.pt --input scans/ --output segmented --tta --amp bf16 \
        --threads 8
    # exported by tools/export.py
    python predict_3d.py --model deploy/model.onnx --input scans/ --output segmented
    python predict_3d.py --ckpt runs/la/crkd/vnet-4/seed0/best.pt --input dicom/ \
        --output segmented --overwrite

--input: a NIfTI, NRRD or MetaImage file (.nii.gz .nii .nrrd .nhdr .mha .mhd), a DICOM series (its
folder, or one of its files if the folder holds several series), or a folder of any of these. The
channels of a network that takes several are one 4D file, or files named CASE_0000.nii.gz,
CASE_0001.nii.gz, ... in the order of training; BraTS scans may keep their own names
(CASE-t1c.nii.gz, ...), in folders by case or all in one.

Preprocessing is that of the training data, stored in the checkpoint. For runs of train_3d_crkd.py,
whose HDF5 files say nothing about axes and voxels, scans are turned to the axes LPS, resampled to
0.625 mm and z-scored over the whole scan, as their training scans were before they were cropped
around the atrium: give whole scans, and look for false finds far from it (dataloaders/la.py).

Of each scan --output gets CASE.nii.gz, label ids on the scan's own grid (shape and affine), and
CASE.json, which names the ids and structures and says how they were made; volumes.csv has the
volume of each structure of every scan in ml; of a DICOM series both have its SeriesInstanceUID, and
--dicom-seg writes CASE.dcm beside them, a DICOM segmentation that refers to it (highdicom,
requirements-export.txt). --overlays draws each scan with its segmentation in three planes,
overlays/CASE.png. A structure of overlapping regions (BraTS, nnU-Net's
region-based labels) is a set of ids. Scans whose result is there already are skipped, unless
--overwrite is given. A scan that cannot be segmented does not stop the others: faults are listed at
the end, and the exit status is 1. What training would warn of (an odd header, a scan that is not in
Hounsfield units) is printed too.

Large scans need memory for the image as float32 on its own grid and on that of the network, a copy
of either for resampling, and the logits of one slab as thick as a window. --window-batch 1 takes
least, and --fast (bfloat16) is for processors that have instructions for it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dataloaders import DATASETS, Case, DataError, Dataset, Report, build_dataset
from dataloaders.cases import read_image
from dataloaders.dicom import series_frames
from dataloaders.lists import find_scans
from dataloaders.volumes import is_series, read_volume
from inference import AMP_MODES, fast_copy, fast_dtype, predict_labels
from networks import NETWORKS, described_network
from utils import figures, plugins
from utils.checkpoint import CheckpointError, DiskError, describing, digest, load_checkpoint
from utils.config import ConfigError, Flags, add_plugin_flags, escaped, run_checkpoint
from utils.exported import TRUST_HELP, ExportedModel, optional
from utils.predictions import (
    SEGMENTATION,
    SERIES,
    SizeTable,
    failure,
    millilitres,
    save_mask,
    save_result,
    save_segmentation,
    save_volume,
    settings_of,
    structure_sizes,
)
from utils.run import resolve_device
from utils.scripts import run_tool

Predictor = nn.Module | Callable[[torch.Tensor], torch.Tensor]


def parse_args() -> argparse.Namespace:
    parser = Flags(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--ckpt", type=run_checkpoint, help="best.pt or last.pt of a run, or its folder"
    )
    which.add_argument(
        "--model",
        type=Path,
        help="exported model (.onnx .xml .ts .pt2) of tools/export.py, on the CPU",
    )
    parser.add_argument("--trust-model", action="store_true", help=TRUST_HELP)
    parser.add_argument(
        "--input", required=True, type=Path, help="a scan, a DICOM series, or a folder of them"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="folder for label maps, JSON files and volumes.csv",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="segment scans again whose result is there already"
    )
    parser.add_argument(
        "--dicom-seg",
        action="store_true",
        help="of DICOM series write CASE.dcm too, a DICOM segmentation",
    )
    parser.add_argument("--overlays", action="store_true", help="also write overlays/CASE.png")
    parser.add_argument("--tta", action="store_true", help="average over the eight mirrored copies")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", choices=tuple(AMP_MODES), default="off", help="mixed precision")
    parser.add_argument(
        "--fast", action="store_true", help="predict by a bfloat16 copy, if the processor can"
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads; default: as many as PyTorch takes"
    )
    parser.add_argument(
        "--window-batch", type=int, help="windows at a time; default: that of the run"
    )
    add_plugin_flags(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    for flag in ("threads", "window_batch"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ConfigError(
                f"--{flag.replace('_', '-')}: must be at least 1, got {getattr(args, flag)}"
            )
    if args.threads:
        torch.set_num_threads(args.threads)
    predictor, description = load_predictor(args)
    with describing(args.model or args.ckpt):
        dataset = build_dataset(**description["dataset"])
    cases, problems = find_scans(args.input, description["in_channels"], dataset.channel_of)
    if args.output.resolve() in {path.parent.resolve() for case in cases for path in case.images}:
        raise ConfigError(
            f"--output {args.output}: holds scans of the input, results could replace them; name "
            "another"
        )
    if args.dicom_seg:
        optional("highdicom", SEGMENTATION)
        other = next((c.images[0] for c in cases if not is_series(c.images[0])), None)
        if other:
            raise ConfigError(f"{SEGMENTATION}: {other} is no DICOM series; leave the flag out")
    for folder in [args.output] + [args.output / "overlays"] * args.overlays:
        folder.mkdir(parents=True, exist_ok=True)
    structures, volumes = (
        dataset.structures(),
        SizeTable(args.output / "volumes.csv", "voxels", "volume_ml"),
    )
    settings = {
        "model": (args.model or args.ckpt).name,
        "weights": description["weights"],
        "tta": args.tta,
        "amp": args.amp,
        "fast": args.fast,
    }
    done, kept, differing, notes = 0, 0, [], Report()
    try:
        for case in tqdm(
            cases, desc=f"segmenting with {description['network']['name']}", unit="scan"
        ):
            target = args.output / f"{case.name}.nii.gz"
            encoded = args.output / f"{case.name}.dcm"
            try:
                series, files = {}, []
                if is_series(case.images[0]):
                    series[SERIES], frames = series_frames(case.images[0])
                    files = [file for file, _ in frames]
                    volumes.series[case.name] = series[SERIES]
                if args.dicom_seg and len(set(files)) < len(files):
                    raise DataError(
                        f"{files[0]}: several slices in one file; {SEGMENTATION} takes a file for "
                        "each slice"
                    )
                other = target.exists() and settings_of(target) != settings
                there = target.exists() and (other or encoded.exists() or not args.dicom_seg)
                if there and not args.overwrite:
                    kept += 1
                    if other:
                        differing.append(target.name)
                    if not volumes.has(case.name, structures):
                        ids, affine = read_volume(target)
                        volumes[case.name] = structure_sizes(ids, structures, millilitres(affine))
                    drawn = args.output / "overlays" / f"{case.name}.png"
                    if args.overlays and not drawn.exists():
                        save_overlay(drawn, dataset, case, *read_volume(target))
                    continue
                ids, affine = segment(predictor, dataset, description, case, args, notes)
                sizes = structure_sizes(ids, structures, millilitres(affine))
                about = {
                    "labels": {str(k): name for k, name in dataset.id_names().items()},
                    "structures": {name: list(which) for name, which in structures.items()},
                    "volumes_ml": {name: ml for name, (_, ml) in sizes.items()},
                    "input": [path.name for path in case.images],
                    **series,
                    "settings": settings,
                }
                if args.overlays:
                    drawn = args.output / "overlays" / f"{case.name}.png"
                    save_overlay(drawn, dataset, case, ids, affine)
                save_result(target, about, functools.partial(save_volume, ids=ids, affine=affine))
                volumes[case.name] = sizes
                if args.dicom_seg:
                    told = settings["model"], settings["weights"]
                    save_segmentation(encoded, ids, structures, files, *told)
                done += 1
            except DiskError:  # nor would the others be written
                raise
            except Exception as error:  # whatever is wrong with one scan must not lose the others
                problems.append(
                    str(error) if isinstance(error, DataError) else failure(case.images[0], error)
                )
    finally:
        volumes.write()
    print(
        f"segmented {done}, there already {kept}, failed {len(problems)}; results in "
        f"{args.output}: volumes.csv"
    )
    if differing:
        print(
            f"warning: {len(differing)} results that were there come from other weights or "
            "settings, for example "
            f"{differing[0]}; --overwrite replaces them",
            file=sys.stderr,
        )
    for warning in notes.spoken_warnings(of_training=False):
        print(warning, file=sys.stderr)
    for problem in problems:
        print(escaped(f"error: {problem}"), file=sys.stderr)
    return int(bool(problems))


def load_predictor(args: argparse.Namespace) -> tuple[Predictor, dict]:
    """What maps windows (B, C, *patch_size) to logits (B, K, *patch_size), and what `describe` says
    of it.
    """
    path = args.model or args.ckpt
    if args.model and (args.fast or args.amp != "off"):
        raise ConfigError(
            f"--fast, --amp: {path.name} has the precision of its export; leave them out"
        )
    model = None
    if args.model:
        model = ExportedModel(path, args.threads or 0, trusted=args.trust_model)
    checkpoint = model.description if args.model else load_checkpoint(path)
    with describing(path):
        description = describe(checkpoint, path)
    contracts = (plugins.network(NETWORKS), plugins.data_format(DATASETS, Dataset))
    plugins.plug_in_for(checkpoint, path, args.plugin, contracts, args.allow_changed_plugin)
    if args.model:
        return model, description
    model = described_network(description["network"], checkpoint["weights"], str(path))
    device = resolve_device(args.device)
    model = model.to(device).eval()
    return fast_copy(model, fast_dtype(device)) if args.fast else model, description


def describe(checkpoint: dict, path: Path) -> dict:
    """All that prediction needs to know beside the network itself, in plain values that JSON
    holds.
    """
    kind = checkpoint.get("kind")
    if kind == "2d-semi":
        raise CheckpointError(f"{path}: a 2D network; use predict_2d.py")
    if kind not in ("3d", "3d-semi") or "dataset" not in checkpoint:
        raise CheckpointError(
            f"{path}: not a checkpoint of train_3d_distill.py, train_3d_crkd.py or "
            "import_checkpoint"
        )
    config, network = checkpoint["config"], checkpoint["network"]
    # Distillation runs average logits of windows that overlap by a share, semi-supervised ones
    # probabilities.
    windows = (
        {"overlap": config["overlap"]}
        if kind == "3d"
        else {"stride": list(config["stride"]), "probabilities": True}
    )
    weights = (
        digest(checkpoint["weights"])
        if "weights" in checkpoint
        else checkpoint["exported"]["weights"]
    )
    plain = json.loads(json.dumps({"dataset": checkpoint["dataset"], "network": network}))
    return {
        "kind": kind,
        **plain,
        "in_channels": network["in_channels"],
        "num_classes": network["num_classes"],
        "class_names": list(checkpoint["class_names"]),
        "patch_size": list(config["patch_size"]),
        "windows": windows,
        "window_batch": config["window_batch"],
        "weights": weights,
        "run": {key: config[key] for key in ("dataset", "method", "preset", "seed")}
        | {"step": checkpoint["step"]},
    }


def segment(
    predictor: Predictor,
    dataset,
    description: dict,
    case: Case,
    args: argparse.Namespace,
    notes: Report | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Label ids (H, W, D) uint8 of a scan on its own grid, and its affine; warnings about the scan,
    those that training gives too, go to `notes`.
    """
    sample = dataset.read_file(case)
    findings = sample.pop("findings", ())
    if notes is not None:
        notes.take(findings)
    image = torch.from_numpy(sample.pop("image"))
    with tqdm(desc=case.name, unit="window", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def predict(image: torch.Tensor) -> np.ndarray:
            return (
                predict_labels(
                    predictor,
                    image,
                    patch_size=description["patch_size"],
                    amp=args.amp,
                    tta=args.tta,
                    window_batch=args.window_batch or description["window_batch"],
                    multilabel=dataset.multilabel,
                    progress=progress,
                    **description["windows"],
                )
                .cpu()
                .numpy()
            )

        weight = next(predictor.parameters(), None) if isinstance(predictor, nn.Module) else None
        try:
            prediction = predict(image if weight is None else image.to(weight.device))
        # the scan and its logits stay in main memory then, the network does not
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            prediction = predict(image)
    del image
    native = dataset.native(prediction, sample)
    return dataset.decode_prediction(native), sample["native_affine"]


def save_overlay(
    path: Path, dataset: Dataset, case: Case, ids: np.ndarray, affine: np.ndarray
) -> None:
    """Draw the first channel of a scan with its segmentation, on the scan's own grid."""
    image, _ = read_image(case, dataset.in_channels)
    grey, spacing = figures.as_ras(figures.shown_range(image[0], dataset), affine)
    ids, _ = figures.as_ras(ids, affine)
    save_mask(path, figures.planes(grey, ids, spacing, dataset.id_names(), case.name))


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
