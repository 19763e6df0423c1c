"""Score a trained 3D network: per-case, per-class Dice, Jaccard, HD95, ASD and NSD, predictions,
overlays.

Needs nothing but the checkpoint and the data. Scores of distillation runs are given on the
preprocessed grid (the papers' protocol) and on the grid of the original files; those of runs of
train_3d_crkd.py on the files' grid, in mm where they carry a voxel size, with windows at the stride
of the published protocol.
Definitions and the policy for empty masks: metrics.py, reporting.py.

    python test_3d.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/best.pt
    python test_3d.py --ckpt runs/btcv/acf_bckd/resunet-unet/seed0/last.pt --overlays --tta
    python test_3d.py --ckpt best.pt --data-root /data/btcv --split val --hd95 directed --published
    python test_3d.py --ckpt runs/la/crkd/vnet-4/seed0/best.pt --protocol published
"""

import argparse
import functools
import sys
import time

from metrics import EMPTY_POLICIES, HD95_DEFINITIONS, case_metrics, diagonal, summarise
from utils.config import testing_flags

FLAGS = testing_flags(
    __doc__,
    splits=("test", "val"),
    split_help="default: test, or val where there is no test list",
    protocol_help=(
        "published: semi-supervised runs are scored as in published tables; distillation runs "
        "as with --published"
    ),
    hd95=HD95_DEFINITIONS,
    empty=EMPTY_POLICIES,
)
FLAGS.add_argument("--cache-dir", help="folder of preprocessed cases")
FLAGS.add_argument(
    "--fast", action="store_true", help="predict by a bfloat16 copy, if the processor can"
)
FLAGS.add_argument("--tta", action="store_true", help="average over the eight mirrored copies")
FLAGS.add_argument(
    "--published", action="store_true", help="add the ACF-BCKD code's own figures (HD95 in voxels)"
)
FLAGS.add_argument(
    "--stride", type=int, nargs=3, help="semi-supervised runs: voxels between windows"
)
FLAGS.add_argument(
    "--largest-component",
    action="store_true",
    help="semi-supervised runs: keep the largest component alone",
)
if __name__ == "__main__":
    FLAGS.parse_args()  # before torch is imported: --help and a mistyped flag answer at once

import numpy as np
import torch

import reporting
from dataloaders import DataError
from inference import largest_component, predict_labels
from utils import figures
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.config import ConfigError
from utils.distributed import World, join_world
from utils.run import resolve_device
from utils.scripts import run_tool

SPACES = ("resampled", "native")


def parse_args() -> argparse.Namespace:
    args = FLAGS.parse_args()
    if args.published:
        args.protocol = "published"
    return args


def main() -> int:
    args = parse_args()
    world, name = join_world(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    score = score_few_labels if checkpoint.get("kind") == "3d-semi" else score_distilled
    score(args, checkpoint, world, resolve_device(name))
    world.leave()
    return 0


def predict(scoring: reporting.Scoring, image: np.ndarray, **options) -> tuple[np.ndarray, float]:
    """Ids (H, W, D) or regions (K, H, W, D) of an image (C, H, W, D), and the seconds it took."""
    image = torch.from_numpy(image).to(scoring.device)
    begin = time.perf_counter()
    ids = predict_labels(
        scoring.predictor,
        image,
        patch_size=scoring.config["patch_size"],
        window_batch=scoring.config["window_batch"],
        amp=scoring.args.amp,
        tta=scoring.args.tta,
        **options,
    )
    ids = ids.cpu().numpy()
    return ids, time.perf_counter() - begin


def score_distilled(
    args: argparse.Namespace, checkpoint: dict, world: World, device: torch.device
) -> None:
    """Score a run of train_3d_distill.py, on both grids."""
    if args.stride or args.largest_component:
        raise ConfigError("--stride and --largest-component are for runs of train_3d_crkd.py")
    if checkpoint.get("kind") != "3d" or "dataset" not in checkpoint:
        raise CheckpointError(
            f"{args.ckpt}: not a checkpoint of train_3d_distill.py or tools/import_checkpoint.py"
        )
    scoring = reporting.Scoring(args, args.ckpt, checkpoint, world, device)
    dataset, published = scoring.dataset, args.protocol == "published"
    hd95, empty = args.hd95 or "pooled", args.empty or "nan"
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    tolerances = list(scoring.tolerances.values())
    kind = {"num_classes": dataset.num_classes, "multilabel": dataset.multilabel}

    def score_case(case) -> tuple[list[dict], dict | None, float]:
        sample = dataset.read(case)
        image, label = np.array(sample["image"]), np.array(sample["label"])
        options = {"overlap": scoring.config["overlap"], "multilabel": dataset.multilabel}
        prediction, seconds = predict(scoring, image, **options)
        native_label, native_affine = dataset.native_label(case)
        native = dataset.native(prediction, sample)
        label = label if dataset.multilabel else label[0]
        native_spacing = np.linalg.norm(native_affine[:3, :3], axis=0)
        told = dataset.annotated(case)
        told = told if dataset.multilabel else told[1:]
        rows = []
        for space, ids, truth, spacing in (
            ("resampled", prediction, label, sample["spacing"]),
            ("native", native, native_label, native_spacing),
        ):
            how = {"spacing": spacing, "hd95": hd95, "empty": empty, "tolerance": tolerances}
            scores = case_metrics(ids, truth, **kind, **how)
            shared = {"case": case.name, "diagonal": diagonal(truth.shape[-3:], spacing)}
            rows += [
                {"space": space, "class": name, **shared, **row, "tolerance": tolerance}
                for name, row, tolerance, has in zip(names, scores, tolerances, told)
                if has
            ]
        ids = dataset.decode_prediction(native).astype(np.uint8)
        dice = [row["dice"] for row in rows if row["space"] == "resampled"]
        drawn = (image, label, prediction, names, case.name, dice, figures.SIDE)
        scoring.save(case.name, ids, native_affine, lambda: figures.panel(*drawn))
        also = reporting.published_case(prediction, label, **kind, told=told) if published else None
        return rows, also, seconds

    results = scoring.results(score_case)
    if not world.main:
        return
    rows = [row for rows_of_case, _, _ in results for row in rows_of_case]
    # grid by grid, as the file has them
    rows.sort(key=lambda row: SPACES.index(row["space"]))
    values = {
        "unit": scoring.unit,
        "hd95_definition": hd95,
        "empty_policy": empty,
        "nsd_tolerance": scoring.tolerances,
        "tta": args.tta,
        "amp": args.amp,
        "fast": args.fast,
    }
    for space in SPACES:
        values[space] = summarise([row for row in rows if row["space"] == space])
    if published:
        means = reporting.published_means([also for _, also, _ in results])
        values["published_protocol"] = means
    seconds = [value for _, _, value in results]
    print_table = functools.partial(reporting.report_spaces, spaces=SPACES)
    scoring.write(rows, seconds, ("", hd95, scoring.unit), values, print_table)


def score_few_labels(
    args: argparse.Namespace, checkpoint: dict, world: World, device: torch.device
) -> None:
    """Score a run of train_3d_crkd.py, with windows at the stride of the published protocol."""
    if args.cache_dir and "cache_dir" not in checkpoint["dataset"]:
        form = checkpoint["dataset"]["format"]
        raise ConfigError(f"--cache-dir: the data format '{form}' keeps no cache; leave it out")
    config = checkpoint["config"]
    stride = args.stride or config["stride"]
    if any(not 0 < step <= side for step, side in zip(stride, config["patch_size"])):
        raise ConfigError(
            f"--stride {list(stride)}: each must lie in 1 .. the window {config['patch_size']}"
        )

    def predict_volume(scoring: reporting.Scoring, volume: dict) -> tuple[np.ndarray, float]:
        options = {"stride": stride, "probabilities": True}
        ids, seconds = predict(scoring, np.array(volume["image"]), **options)
        return largest_component(ids) if args.largest_component else ids, seconds

    settings = {
        "tta": args.tta,
        "amp": args.amp,
        "fast": args.fast,
        "stride": list(stride),
        "largest_component": args.largest_component,
    }
    reporting.score_few_labels(args, checkpoint, world, device, predict_volume, settings)


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
