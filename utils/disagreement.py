"""Unlabelled cases of which the folds of an nnU-Net say different things: which they are, and their
removal from the training. The labels that a teacher gives them are the least to be trusted.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from dataloaders import Case, Dataset
from metrics import class_dice
from networks.nnunet import NnUNetTeacher
from utils.checkpoint import TableError, read_table, write_table
from utils.run import Run

FILE = "disagreement.csv"  # in the run folder
SHOWN = 10  # cases


def fold_disagreement(labels: Sequence[np.ndarray], num_classes: int, multilabel: bool) -> float:
    """1 - the mean over all pairs of `labels` of their Dice, from 0 (the same) to 1.

    labels: of one case, from each fold: ids (H, W, D) or, if `multilabel`, regions (K, H, W, D).
    The Dice of a pair is the mean over the foreground classes (regions) that at least one of the
    two has; 1 where neither has any.
    """
    agreements = []
    for first, second in itertools.combinations(labels, 2):
        scores = class_dice(first, second, num_classes, multilabel)
        found = [score for score in scores if not math.isnan(score)]
        agreements.append(sum(found) / len(found) if found else 1.0)
    return 1.0 - sum(agreements) / len(agreements)


def without_disagreeing(
    cfg: Any,
    teacher: nn.Module | None,
    dataset: Dataset,
    splits: dict[str, list[Case]],
    run: Run,
    predict: Callable,
) -> dict[str, list[Case]]:
    """The lists without the `drop_disagreeing` share of the unlabelled cases on which the folds of
    the teacher disagree most, rounded to the nearest whole number, but never all.

    Cases and disagreements are printed and written to the run folder, from where a resumed run
    takes them. The lists as they are where `drop_disagreeing` is null, the teacher has one fold or
    labels nothing. predict: (network, sample, dataset, run) -> ids or regions of a whole case.
    """
    cases, folds = splits["unlabelled"], getattr(teacher, "folds", ())
    if cfg.drop_disagreeing is None or len(folds) < 2 or not cases:
        return splits
    path = run.folder / FILE
    # what the first process reads, since others may not see its folder
    found = run.world.gathered(_stored(path, cases) if run.resumes else None)[0]
    if found is None:
        found = _measured(teacher, dataset, cases, run, predict)
        if run.world.main:
            rows = sorted(zip((case.name for case in cases), found), key=lambda row: -row[1])
            write_table(path, [("case", "disagreement"), *((n, repr(v)) for n, v in rows)])
    order = sorted(range(len(cases)), key=lambda index: -found[index])
    count = min(round(cfg.drop_disagreeing * len(cases)), len(cases) - 1)
    run.note(f"note: disagreement of the {len(folds)} folds, most first ({path} has all cases):")
    for index in order[:SHOWN]:
        mark = "  left out" if index in order[:count] else ""
        run.note(f"  {found[index]:.3f}  {cases[index].name}{mark}")
    run.note(f"note: {count} of {len(cases)} unlabelled cases are left out (drop_disagreeing)")
    left = set(order[:count])
    kept = [case for index, case in enumerate(cases) if index not in left]
    return splits | {"unlabelled": kept}


def _measured(
    teacher: nn.Module, dataset: Dataset, cases: Sequence[Case], run: Run, predict: Callable
) -> list[float]:
    """`fold_disagreement` of each case, of the whole volumes; in all processes."""
    single = [single_fold(teacher, fold) for fold in teacher.folds]
    found = []
    for case in tqdm(
        run.world.part(cases), desc="comparing folds", unit="case", disable=not run.world.main
    ):
        sample = dataset.read(case)
        labels = [predict(network, sample, dataset, run) for network in single]
        found.append(fold_disagreement(labels, dataset.num_classes, dataset.multilabel))
    return run.world.merged(found)


def single_fold(teacher: nn.Module, fold: nn.Module) -> nn.Module:
    """One fold of a teacher as a teacher of its own."""
    return NnUNetTeacher([fold], teacher.outputs, ()).eval()


def _stored(path: Path, cases: Sequence[Case]) -> list[float] | None:
    """What a run has written before; None where that is not of these cases."""
    try:
        header, *rows = read_table(path)
        values = {name: float(value) for name, value in rows}
    except (TableError, ValueError):
        return None
    if header != ["case", "disagreement"] or values.keys() != {case.name for case in cases}:
        return None
    return [values[case.name] for case in cases]
