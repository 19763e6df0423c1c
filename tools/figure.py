"""A picture of tested runs: image, ground truth and each run's prediction side by side, on one slice of one case.

    python tools/figure.py runs/btcv/supervised/unet/seed0 runs/btcv/acf_bckd/resunet-unet/seed0 --out comparison.png
    python tools/figure.py runs/acdc/supervised/unet2d-3/seed0 runs/acdc/crkd/unet2d-3/seed0 --out few_labels.png

Reads the predictions that test_3d.py or test_2d.py wrote, on the grid of the original files.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.patches
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from PIL import Image

from dataloaders import DataError, build_dataset, build_semi_dataset
from dataloaders.cases import read_image, read_volume
from metrics import class_dice
from tools.results_table import title
from utils import figures
from utils.checkpoint import CheckpointError, load_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders tested with best.pt")
    parser.add_argument("--case", help="name of the case; default: the first one")
    parser.add_argument(
        "--slice", type=int, help="index along the last axis, NIfTI from below; default: the one with the most classes"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in args.runs]
    checkpoint = load_checkpoint(args.runs[0] / "best.pt")
    if checkpoint["kind"].endswith("-semi"):
        return few_labels(args, checkpoint, summaries)
    dataset = build_dataset(**checkpoint["dataset"])
    if dataset.multilabel:
        names = list(dataset.class_names)
    else:
        names = list(dataset.class_names[1:])
    case = dataset.find([args.case or checkpoint["cases"][summaries[0]["split"]][0]])[0]

    image, affine = read_image(case, dataset.in_channels)
    label, _ = dataset.native_label(case)
    volumes = [label]
    for run in args.runs:
        stored, _ = read_volume(run / "predictions" / f"{case.name}.nii.gz")
        volumes.append(dataset.encode_label(stored[None]) if dataset.multilabel else stored)
    scores = [
        np.nanmean(class_dice(volume, label, dataset.num_classes, dataset.multilabel)) for volume in volumes[1:]
    ]
    shown = [figures.regions_to_ids(v) if v.ndim == 4 else v for v in volumes]
    grey, *shown = (_to_ras(volume, affine) for volume in (image[0], *shown))
    z = args.slice if args.slice is not None else figures.fullest_slice(shown[0])
    if dataset.intensity == "window":
        grey = np.clip(grey, *dataset.window)
    titles = ["image", "ground truth", *(f"{title(s)}\nDice {100 * d:.1f} %" for s, d in zip(summaries, scores))]
    draw(grey[..., z], [None, *(volume[..., z] for volume in shown)], titles, names, _aspect(affine), args.out)
    print(f"picture of {case.name}, slice {z}: {args.out}")
    return 0


def few_labels(args: argparse.Namespace, checkpoint: dict, summaries: list[dict]) -> int:
    """The picture for runs of train_2d_crkd.py and train_3d_crkd.py: volumes without geometry, or photographs."""
    dataset = build_semi_dataset(**checkpoint["dataset"])
    case = dataset.find([args.case or checkpoint["cases"][summaries[0]["split"].split("+")[0]][0]])[0]
    volume = dataset.read_volume(case)
    label, classes = volume["label"][0], dataset.num_classes
    shown = [label]
    for run in args.runs:
        stored = run / "predictions" / f"{case.name}"
        if label.ndim == 3:
            shown.append(np.asarray(nib.load(f"{stored}.nii.gz").dataobj))
        else:
            shown.append(np.asarray(Image.open(f"{stored}.png")) // 255)
    scores = [np.nanmean(class_dice(prediction, label, classes)) for prediction in shown[1:]]
    image = volume["image"]
    if label.ndim == 3:
        z = args.slice if args.slice is not None else figures.fullest_slice(label)
        image, shown = image[..., z], [ids[..., z] for ids in shown]
    pictures = [figures.views([(image, ids)], classes) for ids in (None, *shown)]
    titles = ["image", "ground truth", *(f"{title(s)}\nDice {100 * d:.1f} %" for s, d in zip(summaries, scores))]
    present = sorted({int(k) for ids in shown for k in np.unique(ids)} - {0})
    save(pictures, titles, 1.0, present, list(dataset.class_names[1:]), args.out)
    print(f"picture of {case.name}: {args.out}")
    return 0


def draw(
    grey: np.ndarray, labels: list, titles: list[str], names: list[str], aspect: float, out: Path
) -> None:
    """Write a row of overlays with a legend of the classes that occur."""
    present = sorted({int(k) for label in labels if label is not None for k in np.unique(label)} - {0})
    ids = [np.zeros(grey.shape, np.uint8) if label is None else label for label in labels]
    pictures = [figures.overlay(grey, label, len(names) + 1) for label in ids]
    save(pictures, titles, aspect, present, names, out)


def save(
    pictures: list[np.ndarray], titles: list[str], aspect: float, present: list[int], names: list[str], out: Path
) -> None:
    """Write pictures (H, W, 3) in a row under their titles, with a legend of the classes `present`."""
    plt.rcParams.update({"font.size": 9, "font.family": "DejaVu Sans"})
    count = len(pictures)
    height = 3.2 * aspect * pictures[0].shape[0] / pictures[0].shape[1] + 1.1  # inches; the rest is titles and legend
    fig, axes = plt.subplots(1, count, figsize=(3.2 * count, height), layout="constrained")
    for ax, picture, text in zip(np.atleast_1d(axes), pictures, titles):
        ax.imshow(picture, aspect=aspect)
        ax.set_title(text, fontsize=9)
        ax.set_axis_off()
    colours = figures.palette(len(names) + 1)
    handles = [matplotlib.patches.Patch(color=colours[k], label=names[k - 1]) for k in present]
    columns = max(1, min(len(handles), 7))
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=130)
    plt.close(fig)


def _to_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.as_closest_canonical(nib.Nifti1Image(volume.astype(np.float32), affine)).get_fdata().astype(
        volume.dtype
    )


def _aspect(affine: np.ndarray) -> float:
    """Height over width of a voxel of an axial RAS slice."""
    canonical = nib.as_closest_canonical(nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine)).affine
    sizes = np.linalg.norm(canonical[:3, :3], axis=0)
    return float(sizes[1] / sizes[0])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DataError, CheckpointError) as problem:
        sys.exit(f"error: {problem}")
