"""What the soft boundary term (SBD) of ACF-BCKD sees in trained students, class by class.

    python tools/soft_boundary.py --teacher runs/btcv/supervised/resunet/seed0/best.pt \\
        runs/btcv/supervised/unet/seed0/last.pt runs/btcv/acf_bckd/resunet-unet/seed0/last.pt

SBD weighs an error by its squared distances from two boundaries: of the teacher's region, and of
where the student is above a half. Inside a thin structure these are small, far from it large, and a
class that is above a half nowhere has no boundary of its own. So a class that is left out can cost
less than one in the wrong place. One that was given up has a highest probability below a half and a
Dice of 0.

Means over the cases, whole volumes on the preprocessed grid of the first student (training has
augmented patches).
Dice: with the ground truth, in percent. AUC: the share of pairs, a voxel of the class and one of
another structure in the teacher's prediction, in which the former has the higher probability of the
class; 0.5 is chance. inside, outside: the parts of H from the voxels in the teacher's region of the
class and from all others. SBD: of every case log(1 + H), H the mean of the two parts' sum over
classes.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from dataloaders import DataError, build_dataset
from inference import predict_logits
from losses.distance import boundary_distance_squared
from metrics import class_dice
from tools.deployed import load_network, read
from utils.checkpoint import CheckpointError, dataset_arguments, load_checkpoint
from utils.config import ConfigError, add_plugin_flags
from utils.run import plain, resolve_device
from utils.scripts import run_tool

# of the data set's arguments, those that a case depends on as it is read
PREPROCESSING = (
    *("format", "class_names", "in_channels", "regions", "orientation", "spacing", "intensity"),
    *("window", "crop_foreground"),
)


class Seen(NamedTuple):
    """Of one class in one case. dice: NaN where it is neither there nor predicted. auc: NaN where
    the teacher sees the class, or any other structure, nowhere.
    """

    dice: float
    highest: float
    auc: float
    inside: float
    outside: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "students", nargs="+", type=Path, help="best.pt or last.pt of runs of train_3d_distill.py"
    )
    parser.add_argument(
        "--teacher", required=True, type=Path, help="checkpoint whose prediction SBD compares with"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument("--cases", type=int, help="the first so many of the split; default: all")
    parser.add_argument(
        "--data-root", help="folder of the data set, if it is not where the students found it"
    )
    parser.add_argument("--cache-dir", help="folder of preprocessed cases")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="read and cache where the checkpoint says, wherever that is",
    )
    parser.add_argument("--device", default="auto")
    add_plugin_flags(parser)
    args = parser.parse_args()
    if args.cases is not None and args.cases < 1:
        parser.error(f"--cases {args.cases}: expected 1 or more")
    device = resolve_device(args.device)
    paths = [args.teacher, *args.students]
    check_plugins(args.plugin, paths)
    (of_teacher, teacher), *students = [load(path, args, device) for path in paths]
    first = students[0][0]
    for path, (checkpoint, _) in zip(args.students[1:], students[1:]):
        check_alike(path, checkpoint, args.students[0], first, args.split)
    check_teacher(args.teacher, of_teacher, args.students[0], first)
    dataset = build_dataset(
        **dataset_arguments(
            first, args.students[0], args.data_root, args.cache_dir, args.allow_outside
        )
    )
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    cases = dataset.find(names_of(first, args.split))[: args.cases]
    if not cases:
        raise CheckpointError(f"{args.students[0]}: its run had no {args.split} list")
    dataset.prepare({args.split: cases})

    found: list[list[list[Seen]]] = [[] for _ in students]  # of each student, case and class
    for case in tqdm(cases, desc=f"predicting {args.split}", unit="case"):
        sample = read(dataset, "3d", case)
        image = sample.image.to(device)
        target = logits_of(teacher, image, of_teacher["config"])
        for of_student, (checkpoint, student) in zip(found, students):
            logits = logits_of(student, image, checkpoint["config"])
            kind = dataset.multilabel, dataset.annotated(case)
            of_student.append(seen(logits, target, sample.label, *kind))
    for line in table(args.students, names, found):
        print(line)
    print(f"{len(cases)} {args.split} cases, teacher {args.teacher}")
    return 0


def check_plugins(references: Sequence[str], paths: Sequence[Path]) -> None:
    """ConfigError if no checkpoint was trained with the class of a --plugin."""
    used = {name for path in paths for name in load_checkpoint(path).get("plugins", {})}
    for reference in references:
        if reference.rpartition(":")[2] not in used:
            raise ConfigError(
                f"--plugin {reference}: nothing that these checkpoints need; leave it out"
            )


def load(path: Path, args: argparse.Namespace, device: torch.device) -> tuple[dict, nn.Module]:
    own = load_checkpoint(path).get("plugins", {})
    references = [reference for reference in args.plugin if reference.rpartition(":")[2] in own]
    checkpoint, network = load_network(path, references, args.allow_changed_plugin)
    if checkpoint["kind"] != "3d":
        raise CheckpointError(
            f"{path}: a run of few labels; expected one of train_3d_distill.py, which has SBD"
        )
    return checkpoint, network.to(device)


def check_alike(path: Path, checkpoint: dict, first_path: Path, first: dict, split: str) -> None:
    """CheckpointError unless two students have the same cases, classes and preprocessing."""
    own, other = checkpoint["dataset"], first["dataset"]
    wrong = [
        f"{key} {own.get(key)} instead of {other.get(key)}"
        for key in PREPROCESSING
        if plain(own.get(key) or None) != plain(other.get(key) or None)
    ]
    if names_of(checkpoint, split) != names_of(first, split):
        wrong.append(f"another {split} list")
    if wrong:
        raise CheckpointError(
            f"{path}: not comparable with {first_path} ({'; '.join(wrong)}); give the two to a run "
            "of this tool each"
        )


def names_of(checkpoint: dict, split: str) -> list[str]:
    """The cases of a list of the run."""
    cases = checkpoint.get("cases", {})
    if split == "train" and "labelled" in cases:  # what it is called since labels may be missing
        split = "labelled"
    return cases.get(split, [])


def check_teacher(path: Path, teacher: dict, of_student: Path, student: dict) -> None:
    """CheckpointError if the teacher has other classes or channels."""
    classes = [", ".join(checkpoint["class_names"]) for checkpoint in (teacher, student)]
    channels = [checkpoint["network"]["in_channels"] for checkpoint in (teacher, student)]
    wrong = [
        f"{what} {mine} instead of {theirs}"
        for what, (mine, theirs) in (("classes", classes), ("in_channels", channels))
        if mine != theirs
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: this teacher does not fit {of_student} ({'; '.join(wrong)})"
        )


def logits_of(network: nn.Module, image: Tensor, config: dict) -> Tensor:
    return predict_logits(
        network,
        image,
        patch_size=config["patch_size"],
        overlap=config["overlap"],
        window_batch=config["window_batch"],
    ).cpu()


def seen(
    logits: Tensor,
    target: Tensor,
    label: np.ndarray,
    multilabel: bool,
    annotated: np.ndarray | None = None,
) -> list[Seen]:
    """What SBD sees of every class (without background) or region of one case.

    logits, target: (K, H, W, D), of student and teacher. label: (H, W, D) ids, or (K, H, W, D) of
    regions. annotated: as in `metrics.class_dice`.
    """
    if multilabel:
        chances, regions = logits.sigmoid(), target >= 0
        predicted = (logits >= 0).numpy()
    else:
        chances, predicted = logits.softmax(0)[1:], logits.argmax(0).numpy()
        regions = torch.stack([target.argmax(0) == c for c in range(1, len(target))])
    dice = class_dice(predicted, label, len(logits), multilabel, annotated)
    weighted = (chances - regions.float()).square() * boundary_distance_squared(
        chances > 0.5, regions
    )
    structures = regions.any(0)
    rows = []
    for c, region in enumerate(regions):
        own, other = (chances[c][mask].numpy() for mask in (region, structures & ~region))
        parts = (float(weighted[c][mask].sum()) / region.numel() for mask in (region, ~region))
        auc = float("nan")
        if own.size and other.size:  # Mann and Whitney's U over the number of pairs
            ranks = rankdata(np.concatenate([own, other]))[: own.size].sum()
            auc = float(ranks - own.size * (own.size + 1) / 2) / (own.size * other.size)
        rows.append(Seen(dice[c], float(chances[c].max()), auc, *parts))
    return rows


def soft_boundary(rows: Sequence[Seen]) -> float:
    """SBD of one case from its classes."""
    return float(np.log1p(statistics.fmean(row.inside + row.outside for row in rows)))


def table(
    students: Sequence[Path], names: Sequence[str], found: Sequence[Sequence[Sequence[Seen]]]
) -> list[str]:
    """Lines of Markdown: a row per student and class, means over the cases in which a value is
    defined.
    """
    header = ["student", "SBD", "class", "Dice", "highest probability", "AUC", "inside", "outside"]
    lines = [header, ["---"] * len(header)]
    for path, cases in zip(students, found):
        term = f"{statistics.fmean(map(soft_boundary, cases)):.3f}"
        for c, name in enumerate(names):
            columns = np.array([rows[c] for rows in cases]).T
            dice, highest, auc, inside, outside = (
                float(column[~np.isnan(column)].mean()) if not np.isnan(column).all() else None
                for column in columns
            )
            shown = ["-" if value is None else f"{value:.3f}" for value in (auc, inside, outside)]
            share = "-" if dice is None else f"{100 * dice:.1f}"
            lines.append([f"`{path}`", term, name, share, f"{highest:.2f}", *shown])
    return [f"| {' | '.join(cells)} |" for cells in lines]


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
