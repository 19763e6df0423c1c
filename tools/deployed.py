"""What tools/export.py and benchmarks/deployment.py share: the network of a checkpoint, cases for
it, predictions.

A `sample` is a case as the network takes it. `model` is a network or an exported one in its place.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dataloaders import DATASETS, Case, DataError, Dataset, build_dataset
from dataloaders.la import SPACING as LA_SPACING
from dataloaders.volumes import stem
from inference import predict_labels, predict_logits, predict_slices
from metrics import class_dice, mean_dice
from networks import NETWORKS, described_network
from tools.phantoms.few_labels import acdc_phantom, isic_phantom, la_phantom
from tools.phantoms.scans import BRATS_MODALITIES, brats_phantom, btcv_phantom
from utils import plugins
from utils.checkpoint import CheckpointError, load_checkpoint, tool_arguments

KINDS = ("3d", "3d-semi", "2d-semi")
# What prediction needs. Neither tensors nor the lists of cases: names of patients are nobody's
# business who deploys.
DESCRIBED = (
    "kind",
    "network",
    "class_names",
    "config",
    "dataset",
    "code",
    "step",
    "selected_on",
    "imported",
)
# axes L, P, S: what the left-atrium files are on
HDF5_GRID = np.diag([-LA_SPACING, -LA_SPACING, LA_SPACING, 1.0])
BODY = (358, 269, 224)  # mm that the generated abdomen is made for


class Sample(NamedTuple):
    """A case: image (C, H, W, D), of 2D networks slices (N, C, h, w); label as it is scored; what
    the data set read.
    """

    name: str
    image: Tensor
    label: np.ndarray | None
    volume: dict


def load_network(
    path: Path, references: Sequence[str] = (), allow_changed: bool = False
) -> tuple[dict[str, Any], nn.Module]:
    """A run's checkpoint and its network in evaluation mode: the student, or the network that few
    labels trained.

    references, allow_changed: the values of --plugin and --allow-changed-plugin.
    """
    checkpoint = load_checkpoint(path)
    if (
        checkpoint.get("kind") not in KINDS
        or not {"weights", "dataset", "network"} <= checkpoint.keys()
    ):
        raise CheckpointError(
            f"{path}: not a checkpoint of the training scripts or of tools/import_checkpoint.py"
        )
    contracts = (plugins.network(NETWORKS), plugins.data_format(DATASETS, Dataset))
    plugins.plug_in_for(checkpoint, path, references, contracts, allow_changed)
    built = described_network(checkpoint["network"], checkpoint["weights"], str(path))
    return checkpoint, built.eval().requires_grad_(False)


def network_of(
    path: Path, references: Sequence[str] = (), allow_changed: bool = False
) -> nn.Module:
    """The network alone."""
    return load_network(path, references, allow_changed)[1]


def description(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint that goes beside an exported model."""
    # Of classes of the user's own, the network is in the model now; a data format is still needed.
    formats = {
        name: one for name, one in checkpoint.get("plugins", {}).items() if "format" in one["roles"]
    }
    return {key: checkpoint[key] for key in DESCRIBED if key in checkpoint} | (
        {"plugins": formats} if formats else {}
    )


TEXTS = ("patient_pattern", "class_names", "tag")  # no paths, whatever they look like


def without_folders(value: Any) -> Any:
    """Plain values with every path that leads out of the working folder cut to its last part: how
    the disks of the training machine are laid out is nobody's business who deploys. Of an argument
    `--flag=PATH` the path is cut.
    """
    if isinstance(value, dict):
        return {key: part if key in TEXTS else without_folders(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.rpartition("=") if value.startswith("--") else ("", "", value)
    outside = path.startswith(("/", "\\\\", "~", "..")) or PureWindowsPath(path).drive
    return f"{flag}{equals}{PureWindowsPath(path).name}" if outside else value


def open_dataset(
    described: dict[str, Any],
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
):
    """The data set of a checkpoint or description; the arguments win over what the run had."""
    if "cache_dir" not in described["dataset"]:
        cache_dir = None
    root, cache = (None if path is None else str(path) for path in (data_root, cache_dir))
    return build_dataset(**tool_arguments(described, "the checkpoint", root, cache))


def listed(checkpoint: dict[str, Any], dataset, splits: Sequence[str]) -> tuple[str, list[Case]]:
    """The first of `splits` that names cases, and those; DataError if their files are not there."""
    for split in splits:
        names = checkpoint.get("cases", {}).get(split)
        if names:
            return split, dataset.find(names)
    raise DataError(f"the checkpoint has no {' or '.join(splits)} list")


def read(dataset, kind: str, case: Case) -> Sample:
    """A case of the data set."""
    sample = dataset.read(case)
    image = dataset.slices(sample) if kind == "2d-semi" else sample["image"]
    label = np.array(sample["label"] if dataset.multilabel else sample["label"][0])
    return Sample(case.name, torch.from_numpy(np.array(image, np.float32)), label, sample)


def read_files(described: dict[str, Any], files: Sequence[Path]) -> Sample:
    """One case from image files without a label, preprocessed as predict_3d.py and predict_2d.py
    do.
    """
    dataset, case = open_dataset(described), Case(stem(files[0]), tuple(files))
    volume = dataset.read_file(case)
    image = dataset.slices(volume) if described["kind"] == "2d-semi" else volume["image"]
    return Sample(
        case.name, torch.from_numpy(np.ascontiguousarray(image, np.float32)), None, volume
    )


def image_files(kind: str, case: Case, sample: Sample, folder: Path) -> list[Path]:
    """Image files of a case of the data set; of arrays in HDF5, written as NIfTI to `folder`."""
    if case.images[0].suffix != ".h5":
        return list(case.images)
    path = folder / f"{case.name}.nii.gz"
    nib.save(nib.Nifti1Image(sample.volume["image"][0], HDF5_GRID), path)
    return [path]


def phantom_files(described: dict[str, Any], folder: Path, seed: int = 0) -> list[Path]:
    """Write a generated case of about one and a half windows a side, in the checkpoint's kind of
    image.
    """
    patch, form = described["config"]["patch_size"], described["dataset"]["format"]
    shape = tuple(math.ceil(1.5 * side) for side in patch)
    if form == "images2d":
        path = folder / "phantom.png"
        Image.fromarray(isic_phantom(seed, shape)[0]).save(path)
        return [path]
    affine = np.diag([*(described["dataset"].get("spacing") or (1.0, 1.0, 1.0)), 1.0])
    in_channels = described["network"]["in_channels"]
    if form == "brats":
        images, _ = brats_phantom(seed, shape)
        images = {f"phantom-{name}": images[name] for name in BRATS_MODALITIES}
    elif form == "acdc":
        image, _ = acdc_phantom(seed, (8, *shape))["frame01"]
        images, affine = {"phantom": image.T}, np.diag([1.5, 1.5, 8.0, 1.0])
    elif form == "la":
        images, affine = {"phantom": la_phantom(seed, shape)[0]}, HDF5_GRID
    else:
        spacing = tuple(extent / n for extent, n in zip(BODY, shape))
        channels = [btcv_phantom(seed + k, shape, spacing)[0] for k in range(in_channels)]
        if form == "nnunet":
            images = {f"phantom_{k:04d}": channel for k, channel in enumerate(channels)}
        else:
            images = {"phantom": channels[0] if in_channels == 1 else np.stack(channels, -1)}
    paths = []
    for name, image in images.items():
        paths.append(folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(image, np.float32), affine), paths[-1])
    return paths


def _windows(described: dict[str, Any]) -> dict[str, Any]:
    """Sliding-window arguments of the run, as the test script has them."""
    config = described["config"]
    common = {"patch_size": config["patch_size"], "window_batch": config["window_batch"]}
    if described["kind"] == "3d":
        return common | {"overlap": config["overlap"]}
    return common | {"stride": config["stride"], "probabilities": True}


def predict_scores(model: nn.Module, image: Tensor, described: dict[str, Any]) -> Tensor:
    """What labels are taken from: averaged logits (K, H, W, D), with few labels averaged
    probabilities; of slices, logits (N, K, h, w).
    """
    if described["kind"] != "2d-semi":
        return predict_logits(model, image, **_windows(described))
    with torch.inference_mode():
        return torch.cat([model(part) for part in image.split(described["config"]["eval_batch"])])


def predict(
    model: nn.Module, image: Tensor, described: dict[str, Any], multilabel: bool = False
) -> np.ndarray:
    """Labels of a sample's image, as the test scripts make them: ids, or regions if
    `multilabel`.
    """
    if described["kind"] == "2d-semi":
        return predict_slices(model, image, batch=described["config"]["eval_batch"]).numpy()
    return predict_labels(model, image, multilabel=multilabel, **_windows(described)).numpy()


def mean_dice_of(
    model: nn.Module, dataset, described: dict[str, Any], cases: Iterable[Case]
) -> float:
    """Mean Dice over cases, on the grid where the network predicts; of slices, on that of the
    files.
    """
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    scores = []
    for case in cases:
        sample = read(dataset, described["kind"], case)
        labels = predict(model, sample.image, described, dataset.multilabel)
        if described["kind"] == "2d-semi":
            labels = dataset.unslice(labels, sample.volume)
        kind = dataset.num_classes, dataset.multilabel, dataset.annotated(case)
        scores.append(class_dice(labels, sample.label, *kind))
    return mean_dice(scores, names)["dice"]


def real_windows(sample: Sample, described: dict[str, Any], count: int, seed: int = 0) -> Tensor:
    """`count` windows (count, C, *patch_size) of a sample: in 3D the middle and random places, in
    2D slices.
    """
    if described["kind"] == "2d-semi":
        order = itertools.islice(itertools.cycle(range(len(sample.image))), count)
        return sample.image[list(order)]
    patch = described["config"]["patch_size"]
    missing = [max(side - have, 0) for side, have in zip(patch, sample.image.shape[1:])]
    padding = [part for m in reversed(missing) for part in (m // 2, m - m // 2)]
    image = torch.nn.functional.pad(sample.image, padding)
    rng = np.random.default_rng(seed)
    windows = []
    for k in range(count):
        room = [have - side for have, side in zip(image.shape[1:], patch)]
        start = [int(rng.integers(r + 1)) if k else r // 2 for r in room]
        windows.append(image[(slice(None), *(slice(s, s + side) for s, side in zip(start, patch)))])
    return torch.stack(windows)
