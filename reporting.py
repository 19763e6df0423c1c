"""Scores of semi-supervised runs: two protocols, tables of cases, summaries. Used by test_2d.py and
test_3d.py.

'clean': the definitions of metrics.py; both masks empty counts as agreement (Dice 1, distances 0),
one empty as Dice 0 with undefined distances and a count. Mean over cases of the mean over classes.
'published': what published tables of these data sets print. Volumes (ACDC, LA): HD95 pooled, ASD
one-sided, all four metrics 0 if the prediction or the label lacks the class. Images (ISIC, Kvasir):
HD95 directed, ASD the mean of both directed means, both empty Dice 1, distances of an empty mask
left out. Mean over classes of the mean over cases. In neither do the distances of a structure that
was not found make a mean worse. So the table has them a second time, marked *, with missed and
spurious structures as the diagonal of the volume (`penalised` in the summary).

The HDF5 files and photographs carry no voxel size: distances are in voxels or pixels in either
protocol. `accuracy` is the share of all voxels that are labelled right, background included; `ci95`
Student's 95 % confidence interval of the mean over cases, undefined values left out.
"""

import csv
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats

from metrics import METRICS, asd, case_metrics, diagonal, penalise, summarise

PROTOCOLS = ("clean", "published")
PUBLISHED = ("dice", "jaccard", "hd95", "asd")


def case_rows(
    case: str,
    prediction: np.ndarray,
    label: np.ndarray,
    class_names: Sequence[str],
    *,
    protocol: str,
    hd95: str,
    empty: str,
) -> list[dict]:
    """A row for each foreground class of ids `(H, W[, D])`, with the accuracy and diagonal of the
    whole case in each; hd95 and empty are for the clean protocol.
    """
    if protocol == "published":
        scores = published_scores(prediction, label, len(class_names))
    else:
        unit = [1.0] * label.ndim
        scores = case_metrics(
            prediction, label, len(class_names), spacing=unit, hd95=hd95, empty=empty
        )
    shared = {
        "accuracy": float(np.mean(prediction == label)),
        "diagonal": diagonal(label.shape, [1.0] * label.ndim),
    }
    return [
        {"case": case, "class": name, **row, **shared} for name, row in zip(class_names[1:], scores)
    ]


def published_scores(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> list[dict]:
    """Dice, jaccard, hd95, asd of each foreground class by the published protocol of volumes or of
    images.
    """
    unit, image = [1.0] * label.ndim, label.ndim == 2
    rows = case_metrics(
        prediction, label, num_classes, spacing=unit, hd95="directed" if image else "pooled"
    )
    for k, row in enumerate(rows, 1):
        empty = row["absent"] or row["missed"] or row["spurious"]
        if image:
            if row["absent"]:
                row["dice"] = row["jaccard"] = 1.0
            if not empty:
                both = (prediction == k, label == k), (label == k, prediction == k)
                row["asd"] = statistics.fmean(asd(*pair, spacing=unit) for pair in both)
        elif empty:
            row |= dict.fromkeys(PUBLISHED, 0.0)
        del row["assd"]
    return rows


def summary_of(rows: Sequence[dict], protocol: str) -> dict:
    """`mean`, `std`, `ci95`, `accuracy`, `classes`, `counts`, `cases`, `penalised` of rows, in the
    protocol's order of averaging.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    accuracy = statistics.fmean({row["case"]: row["accuracy"] for row in rows}.values())
    if protocol == "clean":
        keys, summary = METRICS, summarise(rows)
    else:
        keys, summary = PUBLISHED, _published_summary(rows, cases)
        failed = _published_summary(penalise(rows), cases)
        summary["penalised"] = {
            "mean": {key: failed["mean"][key] for key in ("hd95", "asd")},
            "classes": {
                name: {key: entry[key] for key in ("hd95", "asd")}
                for name, entry in failed["classes"].items()
            },
        }
    per_case = {
        key: [_mean(row[key] for row in rows if row["case"] == case) for case in cases]
        for key in keys
    }
    return summary | {
        "accuracy": accuracy,
        "ci95": {key: confidence_interval(v) for key, v in per_case.items()},
    }


def confidence_interval(values: Sequence[float | None], level: float = 0.95) -> list[float] | None:
    """[low, high] of the mean by Student's t, n - 1 degrees of freedom; None and NaN are left out;
    None for n < 2.
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    if len(known) < 2:
        return None
    half = (
        float(scipy.stats.t.ppf(0.5 + level / 2, len(known) - 1))
        * statistics.stdev(known)
        / math.sqrt(len(known))
    )
    return [statistics.fmean(known) - half, statistics.fmean(known) + half]


def _published_summary(rows: Sequence[dict], cases: Sequence[str]) -> dict:
    names = list(dict.fromkeys(row["class"] for row in rows))
    classes = {
        name: {key: _mean(row[key] for row in rows if row["class"] == name) for key in PUBLISHED}
        for name in names
    }
    per_case = {
        key: [_mean(row[key] for row in rows if row["case"] == case) for case in cases]
        for key in PUBLISHED
    }
    known = {
        key: [value for value in values if value is not None] for key, values in per_case.items()
    }
    return {
        "cases": len(cases),
        "mean": {key: _mean(classes[name][key] for name in names) for key in PUBLISHED},
        "std": {
            key: statistics.pstdev(values) if values else None for key, values in known.items()
        },
        "classes": classes,
        "counts": {
            "pairs": len(rows),
            **{key: sum(r[key] for r in rows) for key in ("absent", "missed", "spurious")},
        },
    }


def _mean(values) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return statistics.fmean(known) if known else None


def write_csv(path: Path, rows: Sequence[dict], protocol: str, hd95: str, unit: str) -> None:
    """One line per case and class; the header names protocol, definition and unit; undefined values
    are empty.

    `accuracy` and `diagonal`, what a failed distance counts as in penalised means, are those of the
    whole case.
    """
    sides = {
        "clean": "one_sided",
        "published": "one_sided" if unit == "voxels" else "mean_of_both",
    }[protocol]
    titles = {
        "dice": "dice",
        "jaccard": "jaccard",
        "hd95": f"hd95_{hd95}_{unit}",
        "asd": f"asd_{sides}_{unit}",
        "assd": f"assd_{unit}",
    }
    kept = [key for key in titles if key in rows[0]]
    flags = ["absent", "missed", "spurious"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        last = ["accuracy", f"diagonal_{unit}"]
        writer.writerow(
            ["case", "class", *(f"{titles[key]}_{protocol}" for key in kept), *flags, *last]
        )
        for row in rows:
            shown = ["" if math.isnan(row[key]) else f"{row[key]:.6g}" for key in kept]
            values = [
                *shown,
                *(row[flag] for flag in flags),
                f"{row['accuracy']:.6g}",
                f"{row['diagonal']:.6g}",
            ]
            writer.writerow([row["case"], row["class"], *values])


def write_summary(path: Path, summary: dict) -> None:
    path.write_text(json.dumps(summary, indent=1), encoding="utf-8")


def describe(checkpoint: dict, name: str, split: str) -> dict:
    """The part of a summary that comes from the checkpoint; `name` is its file name."""
    config = checkpoint["config"]
    selected_on = checkpoint["selected_on"]
    return {
        "dataset": config["dataset"],
        "method": config["method"],
        "preset": config["preset"],
        "teacher": None,
        "student": checkpoint["network"]["name"],
        "labelled": config["labelled"],
        "seed": config["seed"],
        "tag": config["tag"],
        "checkpoint": name,
        "step": checkpoint["step"],
        "max_steps": config["max_steps"],
        "split": split,
        "selected_on": selected_on,
        "selected_on_reported": name == "best.pt" and selected_on in (split, *split.split("+")),
        "patch_size": list(config["patch_size"]),
        "code": checkpoint["code"],
    }


def score_cells(entry: dict, penalised: dict | None) -> str:
    """Dice, Jaccard, HD95 and ASD of a class or mean as columns of a table and, if given, both
    distances penalised.
    """
    values = [entry["dice"], entry["jaccard"], entry["hd95"], entry["asd"]]
    values += [penalised["hd95"], penalised["asd"]] if penalised is not None else []
    return "  ".join(
        "      -" if v is None else f"{v:7.{4 if k < 2 else 2}f}" for k, v in enumerate(values)
    )


def failures(counts: dict) -> int:
    """Organs whose distances are undefined because they were missed, or predicted where there is
    none.
    """
    return counts["missed"] + counts["spurious"]


def selection(summary: dict) -> str:
    """Which list chose the checkpoint of a summary; a choice on test cases is said in so many
    words.
    """
    if summary["checkpoint"] != "best.pt":
        return f"{summary['checkpoint']}: not selected, the state of its step"
    if summary.get("selected_on", "val") == "test":
        return (
            "best.pt was selected on the test list, by --select-on test: no estimate for new cases"
        )
    return f"best.pt was selected on the {summary.get('selected_on', 'val')} list"


def report(summary: dict) -> None:
    """Print one table: classes, then the mean, and what a reader must know about it."""
    scores, unit = summary["native"], summary["unit"]
    counts = scores["counts"]
    failed = scores["penalised"] if failures(counts) else None
    width = max(len(name) for name in (*scores["classes"], "mean"))
    print(
        f"{summary['checkpoint']}, step {summary['step']} of {summary['max_steps']}, "
        f"{summary['protocol']} protocol, "
        f"{scores['cases']} {summary['split']} cases"
    )
    titles = "   Dice  Jaccard     HD95      ASD" + "    HD95*     ASD*" * bool(failed)
    print(f"{'':{width}} {titles}   ({unit})")
    for name, entry in [*scores["classes"].items(), ("mean", scores["mean"])]:
        also = (
            None
            if failed is None
            else failed["mean"]
            if entry is scores["mean"]
            else failed["classes"][name]
        )
        print(f"{name:{width}} " + score_cells(entry, also))
    interval = scores["ci95"]["dice"]
    known = (
        f", 95 % confidence of the mean Dice {interval[0]:.4f} to {interval[1]:.4f}"
        if interval
        else ""
    )
    print(f"voxels labelled right: {100 * scores['accuracy']:.2f} %{known}")
    print(
        f"of {counts['pairs']} structures: {counts['missed']} missed, {counts['spurious']} "
        "predicted where there is "
        f"none, {counts['absent']} absent"
    )
    if failed:
        print(
            "* with missed and wrongly predicted structures as the diagonal of the volume: compare "
            "runs by these"
        )
    print(selection(summary))
    if summary["selected_on_reported"]:
        print(
            "note: this checkpoint was selected on cases that are reported here; the scores of "
            "last.pt were not"
        )
