r"""A picture of tested runs: image, ground truth and each run's prediction side by side, on one
slice of one case.

    python tools/figure.py runs/btcv/supervised/unet/seed0 runs/btcv/acf_bckd/resunet-unet/seed0 \
        --out comparison.png
    python tools/figure.py runs/acdc/supervised/unet2d-3/seed0 runs/acdc/crkd/unet2d-3/seed0 \
        --out few_labels.png

Reads the predictions that test_3d.py or test_2d.py wrote, on the grid of the original files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.patches
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from PIL import Image

from dataloaders import DataError, Dataset, build_dataset
from dataloaders.cases import read_image
from dataloaders.volumes import read_volume
from metrics import class_dice
from tools.tables import read_summary, run_title
from utils import figures
from utils.checkpoint import describing, load_checkpoint, tool_arguments, write_whole
from utils.config import ConfigError, plain_name
from utils.scripts import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders tested with best.pt")
    parser.add_argument("--case", help="name of the case; default: the first one")
    parser.add_argument(
        "--slice",
        type=int,
        help="index along the last axis, NIfTI from below; default: the one with the most classes",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    summaries = [read_summary(run / "summary.json") for run in args.runs]
    path = args.runs[0] / "best.pt"
    checkpoint = load_checkpoint(path)
    with describing(path):
        case = args.case or checkpoint["cases"][summaries[0]["split"].split("+")[0]][0]
    views = views_of(checkpoint, [run / "predictions" for run in args.runs], case, args.slice)
    scores = [f"{run_title(s)}\nDice {100 * d:.1f} %" for s, d in zip(summaries, views.dice)]
    save(
        views.pictures,
        ["image", "ground truth", *scores],
        f"{case}{views.place}",
        views.present,
        views.names,
        args.out,
    )
    print(f"picture of {case}{views.place}: {args.out}")
    return 0


class Views(NamedTuple):
    """One slice of a case: the image, the ground truth and predictions."""

    pictures: list[np.ndarray]  # in this order, (h, w, 3) uint8, enlarged and of square pixels
    dice: list[float]  # of each prediction, mean over classes of the case
    present: list[int]  # ids that occur
    names: list[str]  # of the classes 1, 2, ...
    place: str  # ', slice 12'


def views_of(checkpoint: dict, folders: Sequence[Path], name: str, z: int | None = None) -> Views:
    """The case `name` as the folders of predictions have it, on the grid of the original files; z:
    None for the slice with the most classes. DataError or OSError for what is not there.
    """
    if not plain_name(name):
        raise DataError(f"{name!r} is no name of a case")
    with describing("the checkpoint"):
        dataset = build_dataset(**tool_arguments(checkpoint, "the checkpoint"))
    if dataset.distance_unit != "mm":
        return _without_geometry(dataset, folders, name, z)
    names = list(dataset.class_names if dataset.multilabel else dataset.class_names[1:])
    case = dataset.find([name])[0]
    image, affine = read_image(case, dataset.in_channels)
    label, _ = dataset.native_label(case)
    volumes = [label]
    for folder in folders:
        stored, _ = read_volume(folder / f"{name}.nii.gz")
        volumes.append(dataset.encode_label(stored[None]) if dataset.multilabel else stored)
    kind = dataset.num_classes, dataset.multilabel, dataset.annotated(case)
    scores = [class_dice(volume, label, *kind) for volume in volumes[1:]]
    shown = [figures.regions_to_ids(v) if v.ndim == 4 else v for v in volumes]
    shown = [np.where(ids <= len(names), ids, 0) for ids in shown]
    grey, spacing = figures.as_ras(figures.shown_range(image[0], dataset), affine)
    shown = [figures.as_ras(volume, affine)[0] for volume in shown]
    z = figures.fullest_slice(shown[0]) if z is None else z
    ids = [volume[..., z] for volume in shown]
    look = {"side": figures.SIDE, "aspect": float(spacing[1] / spacing[0])}
    pictures = [
        figures.overlay(grey[..., z], label, len(names) + 1, **look)
        for label in (np.zeros_like(ids[0]), *ids)
    ]
    return Views(pictures, _means(scores), _present(ids), names, f", slice {z}")


def _without_geometry(dataset: Dataset, folders: Sequence[Path], name: str, z: int | None) -> Views:
    """The same of volumes whose files know no voxel size, and of photographs."""
    case = dataset.find([name])[0]
    volume, annotated = dataset.read(case), dataset.annotated(case)
    image, label, classes = volume["image"], volume["label"][0], dataset.num_classes
    ids = [label]
    for folder in folders:
        if label.ndim == 3:
            ids.append(np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj))
        else:
            mask = Image.open(folder / f"{name}.png", formats=("PNG",))
            ids.append(np.asarray(mask) // 255)
    scores = [class_dice(volume, label, classes, annotated=annotated) for volume in ids[1:]]
    ids[0] = np.where(label < classes, label, 0)
    place = ""
    if label.ndim == 3:
        z = figures.fullest_slice(label) if z is None else z
        image, ids, place = image[..., z], [volume[..., z] for volume in ids], f", slice {z}"
    pictures = [figures.view(image, shown, classes, figures.SIDE) for shown in (None, *ids)]
    return Views(pictures, _means(scores), _present(ids), list(dataset.class_names[1:]), place)


def _means(scores: list[list[float]]) -> list[float]:
    """Of each case over the classes that are defined; NaN without any."""
    return [float(np.nanmean(row)) if not np.isnan(row).all() else float("nan") for row in scores]


def _present(ids: list[np.ndarray]) -> list[int]:
    return sorted({int(k) for each in ids for k in np.unique(each)} - {0})


def save(
    pictures: list[np.ndarray],
    titles: list[str],
    heading: str,
    present: list[int],
    names: list[str],
    out: Path,
) -> None:
    """Write pictures (H, W, 3) in a row under their titles and one heading, with a legend of the
    classes `present`.
    """
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    count = len(pictures)
    # inches; the rest is titles and legend
    height = 3.2 * pictures[0].shape[0] / pictures[0].shape[1] + 1.35
    fig, axes = plt.subplots(1, count, figsize=(3.2 * count, height), layout="constrained")
    for ax, picture, text in zip(np.atleast_1d(axes), pictures, titles):
        ax.imshow(picture)
        ax.set_title(text, fontsize=9)
        ax.set_axis_off()
    fig.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
    colours = figures.palette(len(names) + 1)
    handles = [matplotlib.patches.Patch(color=colours[k], label=names[k - 1]) for k in present]
    columns = max(1, min(len(handles), 7))
    fig.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    form = out.suffix.removeprefix(".") or "png"
    if form not in fig.canvas.get_supported_filetypes():
        known = ", ".join(sorted(fig.canvas.get_supported_filetypes()))
        raise ConfigError(f"--out {out}: no kind of picture; take one of {known}")
    write_whole(out, lambda file: fig.savefig(file, dpi=130, format=form))
    plt.close(fig)


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
