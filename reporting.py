"""Scores of a checkpoint, from its cases to files and a printed table, for both test scripts.

Few-label runs have two protocols.

'clean': the definitions of metrics.py; both masks empty counts as agreement (Dice 1, distances 0),
one empty as Dice 0 with undefined distances and a count. Mean over cases of the mean over classes.
'published': what published tables of these data sets print. Volumes (ACDC, LA): HD95 pooled, ASD
one-sided, all four metrics 0 if the prediction or the label lacks the class. Images (ISIC, Kvasir):
HD95 directed, ASD the mean of both directed means, both empty Dice 1, distances of an empty mask
left out. Mean over classes of the mean over cases.
It has no NSD. In neither do the distances of a class that was missed make a mean worse. So the
table has them a second time, marked *, with missed and false positive classes as the diagonal of
the volume (`penalised` in the summary).

Scans of NIfTI formats are scored on the grid of their files, with distances in mm. The HDF5 files
and photographs carry no voxel size: there distances are in voxels or pixels, as in every published
table. Both hold for either protocol. `accuracy` is the share of all voxels that are labelled right,
background included; `ci95` Student's 95 % confidence interval of the mean over cases, undefined
values left out.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import scipy.stats
import torch
from PIL import Image
from tqdm import tqdm

from dataloaders import DATASETS, DataError, Dataset, build_dataset
from inference import fast_copy, fast_dtype
from metrics import (
    DISTANCES,
    FLAGS,
    METRICS,
    PENALISED,
    PUBLISHED,
    SHOWN,
    UNKNOWN,
    asd,
    case_metrics,
    counts,
    diagonal,
    penalise,
    summarise,
    tolerance_text,
    without_unknown,
)
from networks import NETWORKS, described_network
from utils import figures, plugins
from utils.checkpoint import dataset_arguments, describing, load_checkpoint, write_table, write_text
from utils.complexity import count_macs, count_parameters
from utils.config import NSD_TOLERANCE, ConfigError, class_tolerances, labelled_name
from utils.distributed import World
from utils.predictions import save_whole, volume_image

# Flag -> its column in metrics.csv. Files from before it had this name call it as the rows do.
FLAG_COLUMNS = {flag: flag for flag in FLAGS} | {"spurious": "false_positive"}


# --- scores of a case ---


def case_rows(
    case: str,
    prediction: np.ndarray,
    label: np.ndarray,
    class_names: Sequence[str],
    *,
    protocol: str,
    hd95: str,
    empty: str,
    spacing: Sequence[float] | None = None,
    tolerances: Sequence[float] | None = None,
    annotated: np.ndarray | None = None,
) -> list[dict]:
    """A row for each foreground class of ids `(H, W[, D])`, with the accuracy and diagonal of the
    whole case in each; hd95, empty and tolerances, of NSD for each row, are for the clean protocol.

    spacing: in mm, None for distances in voxels. annotated: of all classes, those that the label
    tells: the others have no row, and count as background in the accuracy, which is of the labelled
    voxels.
    """
    spacing = [1.0] * label.ndim if spacing is None else spacing
    known = label != UNKNOWN
    prediction, label = without_unknown(prediction, label, len(class_names))
    told = np.ones(len(class_names), bool) if annotated is None else annotated
    right = np.where(told[prediction], prediction, 0) == label
    if protocol == "published":
        scores = published_scores(prediction, label, len(class_names), spacing)
    else:
        if tolerances is None:
            tolerances = [NSD_TOLERANCE] * (len(class_names) - 1)
        how = {"spacing": spacing, "hd95": hd95, "empty": empty, "tolerance": tolerances}
        scores = case_metrics(prediction, label, len(class_names), **how)
        scores = [row | {"tolerance": mm} for row, mm in zip(scores, tolerances)]
    shared = {"accuracy": float(np.mean(right[known])), "diagonal": diagonal(label.shape, spacing)}
    return [
        {"case": case, "class": name, **row, **shared}
        for name, row, has in zip(class_names[1:], scores, told[1:])
        if has
    ]


def published_scores(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    spacing: Sequence[float] | None = None,
) -> list[dict]:
    """The PUBLISHED metrics of each foreground class by the published protocol of volumes or of
    images; spacing as in `case_rows`.
    """
    spacing = [1.0] * label.ndim if spacing is None else spacing
    image = label.ndim == 2
    found = case_metrics(
        prediction, label, num_classes, spacing=spacing, hd95="directed" if image else "pooled"
    )
    rows = []
    for k, scores in enumerate(found, 1):
        row = {key: scores[key] for key in (*PUBLISHED, *FLAGS)}
        empty = any(row[flag] for flag in FLAGS)
        if image:
            if row["absent"]:
                row |= {key: METRICS[key].best for key in PUBLISHED if key not in DISTANCES}
            if not empty:
                both = (prediction == k, label == k), (label == k, prediction == k)
                row["asd"] = statistics.fmean(asd(*pair, spacing=spacing) for pair in both)
        elif empty:
            row |= dict.fromkeys(PUBLISHED, 0.0)
        rows.append(row)
    return rows


def published_case(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    multilabel: bool,
    told: Sequence[bool] | None = None,
) -> dict[str, float]:
    """One case by the ACF-BCKD code's own protocol: percent, HD95 'directed' in voxels, classes
    absent from the label left out even where they were predicted, undefined distances dropped,
    rounded to two decimals. Beside its HD95 the one that counts a missed organ as the diagonal.
    told: of the foreground classes, those that the label tells; None: all.
    """
    unit = [1.0] * (label.ndim - multilabel)
    scores = case_metrics(
        prediction, label, num_classes, spacing=unit, multilabel=multilabel, hd95="directed"
    )
    if told is not None:
        scores = [row for row, has in zip(scores, told) if has]
    kept = [row for row in scores if not row["absent"] and not row["spurious"]]
    longest = diagonal(label.shape[int(multilabel) :], unit)
    found = {
        "dice": [row["dice"] for row in kept],
        "hd95_voxels": [row["hd95"] for row in kept],
        "hd95_voxels_penalised": [longest if row["missed"] else row["hd95"] for row in kept],
    }
    means = {key: math.nan if (mean := _mean(v)) is None else mean for key, v in found.items()}
    return {key: round(means[key] * (100 if key == "dice" else 1), 2) for key in means}


def published_means(cases: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Means over cases of what `published_case` gives; None where nothing is defined."""
    return {key: _mean(case[key] for case in cases) for key in cases[0]}


# --- means ---


def summary_of(rows: Sequence[dict], protocol: str) -> dict:
    """`mean`, `std`, `ci95`, `accuracy`, `classes`, `counts`, `cases`, `penalised` of rows, in the
    protocol's order of averaging.
    """
    accuracy = statistics.fmean({row["case"]: row["accuracy"] for row in rows}.values())
    if protocol == "clean":
        keys, summary = tuple(METRICS), summarise(rows)
    else:
        keys, summary = PUBLISHED, _published_summary(rows, PUBLISHED)
        distances = [key for key in PUBLISHED if key in DISTANCES]
        failed = _published_summary(penalise(rows), distances)
        summary["penalised"] = {part: failed[part] for part in ("mean", "classes")}
    intervals = {
        key: confidence_interval(values) for key, values in _case_means(rows, keys).items()
    }
    return summary | {"accuracy": accuracy, "ci95": intervals}


def confidence_interval(values: Sequence[float | None], level: float = 0.95) -> list[float] | None:
    """[low, high] of the mean by Student's t, n - 1 degrees of freedom; None and NaN are left out;
    None for n < 2.
    """
    known = _known(values)
    if len(known) < 2:
        return None
    half = (
        float(scipy.stats.t.ppf(0.5 + level / 2, len(known) - 1))
        * statistics.stdev(known)
        / math.sqrt(len(known))
    )
    return [statistics.fmean(known) - half, statistics.fmean(known) + half]


def _published_summary(rows: Sequence[dict], keys: Sequence[str]) -> dict:
    classes = {}
    for name in dict.fromkeys(row["class"] for row in rows):
        own = [row for row in rows if row["class"] == name]
        classes[name] = {key: _mean(row[key] for row in own) for key in keys}
    per_case = {key: _known(values) for key, values in _case_means(rows, keys).items()}
    return {
        "cases": len({row["case"] for row in rows}),
        "mean": {key: _mean(entry[key] for entry in classes.values()) for key in keys},
        "std": {key: statistics.pstdev(v) if v else None for key, v in per_case.items()},
        "classes": classes,
        "counts": counts(rows),
    }


def _case_means(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, list[float | None]]:
    """Metric -> for each case the mean over its classes."""
    cases = dict.fromkeys(row["case"] for row in rows)
    return {
        key: [_mean(row[key] for row in rows if row["case"] == case) for case in cases]
        for key in keys
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.fmean(known) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    """The values that are neither None nor NaN."""
    return [value for value in values if value is not None and not math.isnan(value)]


# --- files ---


def write_csv(path: Path, rows: Sequence[dict], protocol: str, hd95: str, unit: str) -> None:
    """One line per case and class (and space, if rows have it); the header names definition, unit
    and protocol, if there is one; undefined values are empty.

    `accuracy`, if rows have it, and `diagonal`, what a failed distance counts as in penalised
    means, are those of the whole case; `tolerance`, if rows have it, is that of NSD.
    """
    definitions = {"hd95": hd95}
    if protocol:
        one_sided = protocol == "clean" or unit != "pixels"
        definitions["asd"] = "one_sided" if one_sided else "mean_of_both"

    def column(metric: str) -> str:
        words = [metric]
        if metric in DISTANCES:
            words += [definitions.get(metric), unit]
        return "_".join(filter(None, [*words, protocol]))

    titles = {"space": "space", "case": "case", "class": "class"}
    titles |= {metric: column(metric) for metric in METRICS}
    titles |= FLAG_COLUMNS
    titles |= {"accuracy": "accuracy", "diagonal": f"diagonal_{unit}"}
    titles |= {"tolerance": f"tolerance_{unit}"}
    titles = {key: title for key, title in titles.items() if key in rows[0]}
    values = [[_written(row[key]) for key in titles] for row in rows]
    write_table(path, [list(titles.values()), *values])


def score_columns(header: Iterable[str]) -> dict[str, str]:
    """Metric -> its column in the header of a metrics.csv, of the metrics that the file has.

    A column is the metric's whose name it begins with, of several the longest: a name may have
    underscores, as what `write_csv` puts behind it has. ValueError for two columns of one metric.
    """
    columns: dict[str, str] = {}
    for column in header:
        found = [key for key in METRICS if column == key or column.startswith(f"{key}_")]
        if not found:
            continue
        metric = max(found, key=len)
        if metric in columns:
            raise ValueError(f"both {columns[metric]} and {column} are columns of {metric}")
        columns[metric] = column
    return columns


def flag_columns(header: Iterable[str]) -> dict[str, str]:
    """Flag -> its column in the header of a metrics.csv, of the flags that the file has."""
    header, columns = list(header), {}
    for flag, column in FLAG_COLUMNS.items():
        known = [name for name in (column, flag) if name in header]
        if known:
            columns[flag] = known[0]
    return columns


def _written(value: str | int | float) -> str | int:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def write_summary(path: Path, summary: dict) -> None:
    write_text(path, json.dumps(summary, indent=1))


def describe(checkpoint: dict, name: str, split: str) -> dict:
    """The part of a summary that comes from the checkpoint; `name` is its file name.

    The best checkpoint was chosen on a list: scores on it are then the highest of many, not an
    estimate (`selected_on_reported`).
    """
    config = checkpoint["config"]
    few_labels = "labelled" in config and "student" not in config
    alone = few_labels or config["method"] == "supervised"
    selected_on = checkpoint.get("selected_on", "val")
    return {
        "dataset": config["dataset"],
        "method": config["method"],
        "preset": config["preset"],
        "teacher": None if alone else config["teacher"],
        "student": checkpoint["network"]["name"],
        **({"labelled": config["labelled"]} if few_labels else _labels_of_student(checkpoint)),
        "seed": config["seed"],
        "tag": config["tag"],
        "checkpoint": name,
        "step": checkpoint["step"],
        "max_steps": config["max_steps"],
        "split": split,
        "selected_on": selected_on,
        "selected_on_reported": Path(name).stem == "best" and selected_on in split.split("+"),
        "patch_size": list(config["patch_size"]),
        "code": checkpoint["code"],
    }


def _labels_of_student(checkpoint: dict) -> dict:
    """Of a distillation run whose labels were not simply all: `trained_on`, how many were labelled,
    as in the name of its folder, and how many scans the teacher labelled; and its `agreement`, the
    Dice with the teacher on unlabelled scans.
    """
    labelled = checkpoint["config"].get("labelled")
    taught = checkpoint["config"].get("unlabelled_batch")
    if labelled is None and not taught:
        return {}
    unlabelled = len(checkpoint["cases"]["unlabelled"])
    found = {"trained_on": {"labelled": labelled_name(labelled), "unlabelled": unlabelled}}
    if "agreement" in checkpoint:
        found["agreement"] = checkpoint["agreement"]["dice"]
    return found


# --- printed tables ---


def score_titles(entry: dict, failed: bool, unit: str = "") -> str:
    """Titles of the columns of `score_cells`."""
    shown = [metric for metric in SHOWN if metric in entry]
    titles = [METRICS[key].title + f" {unit}" * bool(unit and key in DISTANCES) for key in shown]
    titles += [f"{METRICS[key].title}*" for key in shown if failed and key in DISTANCES]
    return "  ".join(f"{title:>7}" for title in titles)


def score_cells(entry: dict, penalised: dict | None) -> str:
    """The metrics of a class or mean as columns of a table and, if given, the distances
    penalised.
    """
    shown = [metric for metric in SHOWN if metric in entry]
    values = [(entry[key], METRICS[key].digits) for key in shown]
    if penalised is not None:
        values += [(penalised[key], METRICS[key].digits) for key in shown if key in DISTANCES]
    return "  ".join("      -" if v is None else f"{v:7.{digits}f}" for v, digits in values)


def failures(counts: dict) -> int:
    """How many distances are undefined because the class was missed, or a false positive."""
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
    failed = failures(scores["counts"]) > 0
    print(
        f"{summary['checkpoint']}, step {summary['step']} of {summary['max_steps']}, "
        f"{summary['protocol']} protocol, "
        f"{scores['cases']} {summary['split']} cases"
    )
    lines = _lines([scores], failed, "mean")
    width = max(map(len, lines))
    print(f"{'':{width}} {score_titles(scores['mean'], failed)}   ({unit})")
    for name, cells in lines.items():
        print(f"{name:{width}} {cells}")
    interval = scores["ci95"]["dice"]
    known = ""
    if interval:
        known = f", 95 % confidence of the mean Dice {interval[0]:.4f} to {interval[1]:.4f}"
    print(f"voxels labelled right: {100 * scores['accuracy']:.2f} %{known}")
    print(counts_text(scores))
    print_remarks(summary, failed)
    print(selection(summary))
    if summary["selected_on_reported"]:
        print(
            "note: this checkpoint was selected on cases that are reported here; the scores of "
            "last.pt were not"
        )


def counts_text(scores: dict) -> str:
    """How many classes were missed, false positive and absent, of how many in all cases."""
    counts = scores["counts"]
    return (
        f"of {counts['pairs']} classes in {scores['cases']} cases: {counts['missed']} missed, "
        f"{counts['spurious']} false positive, {counts['absent']} absent"
    )


def print_remarks(summary: dict, failed: bool) -> None:
    """What NSD and the columns with * are."""
    if "nsd_tolerance" in summary:
        within = tolerance_text(summary["nsd_tolerance"], summary["unit"])
        print(f"NSD: share of the surfaces that are not further apart than {within}")
    if failed:
        print(PENALISED)


def report_spaces(summary: dict, spaces: Sequence[str]) -> None:
    """`report` of a distillation run, which is scored on two grids side by side."""
    scores, unit = [summary[space] for space in spaces], summary["unit"]
    failed = any(failures(entry["counts"]) for entry in scores)
    lines = _lines(scores, failed, "mean of cases")
    width = max(map(len, lines))
    titles = score_titles(scores[0]["mean"], failed, "mm" if unit == "mm" else "")
    grids = "    ".join(f"{space + ' grid':{len(titles)}}" for space in spaces)
    print(f"{'':{width}}  {grids.rstrip()}")
    other_unit = "" if unit == "mm" else f"   ({unit})"
    print(f"{'':{width}}  " + "    ".join([titles] * len(spaces)) + other_unit)
    for name, cells in lines.items():
        print(f"{name:{width}}  {cells}")
    as_diagonal = ""
    if summary["empty_policy"] == "diag":
        as_diagonal = " (missed and false positive ones count as the diagonal)"
    print(f"{counts_text(scores[0])}; the distances leave these out{as_diagonal}")
    print_remarks(summary, failed)
    if "published_protocol" in summary:
        values = summary["published_protocol"]
        shown = {key: "undefined" if v is None else f"{v:.2f}" for key, v in values.items()}
        print(
            f"by the published code's protocol: Dice {shown['dice']} %, HD95 "
            f"{shown['hd95_voxels']} voxels "
            f"({shown['hd95_voxels_penalised']} with missed classes as the diagonal)"
        )
    print(selection(summary))
    if summary["selected_on_reported"]:
        print(
            "note: this checkpoint was selected on the cases reported here; report last.pt beside "
            "it"
        )


def _lines(scores: Sequence[dict], failed: bool, mean: str) -> dict[str, str]:
    """Name -> cells of every class, then of the mean: those of all `scores` side by side."""
    lines = {}
    for name in (*scores[0]["classes"], None):
        cells = []
        for entry in scores:
            own, also = (
                part["mean"] if name is None else part["classes"][name]
                for part in (entry, entry["penalised"])
            )
            cells.append(score_cells(own, also if failed else None))
        lines[mean if name is None else name] = "    ".join(cells)
    return lines


# --- scoring a checkpoint ---


class Scoring:
    """A checkpoint with its data, its network and the folders of its results.

    args: the flags of the test script. Raises ConfigError, DataError or CheckpointError for what
    does not go together.
    """

    def __init__(
        self, args, path: Path, checkpoint: dict, world: World, device: torch.device
    ) -> None:
        self.args, self.path, self.checkpoint = args, path, checkpoint
        self.world, self.device = world, device
        few_labels, published = checkpoint["kind"] != "3d", args.protocol == "published"
        contracts = (plugins.network(NETWORKS), plugins.data_format(DATASETS, Dataset))
        plugins.plug_in_for(checkpoint, path, args.plugin, contracts, args.allow_changed_plugin)
        cache_dir = getattr(args, "cache_dir", None)
        with describing(path):
            self.config = checkpoint["config"]
            arguments = dataset_arguments(
                checkpoint, path, args.data_root, cache_dir, args.allow_outside
            )
            if published and arguments["format"] == "images2d":
                arguments["eval_resize"] = "nearest"
            self.dataset = build_dataset(**arguments)
            self.unit = self.dataset.distance_unit
        tolerance = args.nsd_tolerance
        if tolerance is None:
            tolerance = self.config.get("nsd_tolerance", NSD_TOLERANCE)
        scored = list(self.dataset.classes.values())
        # of each class that is scored
        self.tolerances = dict(zip(scored, class_tolerances(tolerance, scored)))
        with describing(path):
            self.split, default = self._splits()
            listed = [name for part in self.split.split("+") for name in checkpoint["cases"][part]]
            describe(checkpoint, path.name, self.split)  # what its summary needs is there
        self.cases = self.dataset.find(listed)
        if not self.cases:
            raise DataError(f"{path}: the run had no {self.split} list; choose another --split")
        if not few_labels:
            with world.main_first():
                self.dataset.prepare({self.split: self.cases})
        network = described_network(checkpoint["network"], checkpoint["weights"], str(path))
        self.network = network.to(device).eval()
        self.predictor = self.network
        if getattr(args, "fast", False):
            self.predictor = fast_copy(self.network, fast_dtype(device))
        self.out = args.out or path.parent
        self.suffix = "" if path.stem == "best" else f"_{path.stem}"
        self.suffix += "_published" if published and few_labels else ""
        self.suffix += "" if self.split == default else f"_{self.split}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.predictions = self._folder("predictions", not args.no_predictions)
        self.overlays = self._folder("overlays", args.overlays)

    def _splits(self) -> tuple[str, str]:
        """The list that is scored, and the one that is without --split."""
        listed = self.checkpoint["cases"]
        default = "test" if listed["test"] else "val"
        # published tables of ACDC are of both, on which they select too
        both = self.checkpoint["kind"] == "2d-semi" and self.args.protocol == "published"
        if both and listed["test"] and listed["val"]:
            default = "val+test"
        return self.args.split or default, default

    def _folder(self, name: str, wanted: bool) -> Path | None:
        if not wanted:
            return None
        folder = self.out / f"{name}{self.suffix}"
        folder.mkdir(exist_ok=True)
        return folder

    def results(self, score_case: Callable) -> list:
        """What `score_case` returns for each case; the processes of torchrun share the cases."""
        cases = tqdm(
            self.world.part(self.cases),
            desc=f"testing {self.checkpoint['network']['name']} on {self.split}",
            unit="case",
            disable=not self.world.main,
        )
        return self.world.merged([score_case(case) for case in cases])

    def save(
        self, name: str, ids: np.ndarray, affine: np.ndarray | None, picture: Callable
    ) -> None:
        """Write the label map of a case and what `picture` draws of it, as the flags say."""
        if self.predictions and ids.ndim == 3:
            volume = volume_image(ids, affine)
            save_whole(self.predictions / f"{name}.nii.gz", lambda path: nib.save(volume, path))
        elif self.predictions:
            save_whole(self.predictions / f"{name}.png", Image.fromarray(255 * ids).save)
        if self.overlays:
            drawn = picture()
            path = self.overlays / f"{name}.png"
            save_whole(path, lambda path: matplotlib.image.imsave(path, drawn))

    def write(
        self,
        rows: Sequence[dict],
        seconds: Sequence[float],
        columns: tuple[str, str, str],
        values: dict,
        print_table: Callable[[dict], None],
    ) -> None:
        """Write metrics.csv and summary.json, print the table.

        columns: protocol, HD95 definition and unit for the header. values: the part of the summary
        that is of this kind of runs.
        """
        files = f"metrics{self.suffix}.csv", f"summary{self.suffix}.json"
        write_csv(self.out / files[0], rows, *columns)
        patch = (1, self.checkpoint["network"]["in_channels"], *self.config["patch_size"])
        cuda = self.device.type == "cuda"
        summary = {
            **describe(self.checkpoint, self.path.name, self.split),
            **values,
            "parameters": count_parameters(self.network),
            "gmacs": count_macs(self.network, patch) / 1e9,
            "ms_per_volume": 1000 * statistics.median(seconds),
            "device": torch.cuda.get_device_name(self.device) if cuda else "CPU",
            "threads": torch.get_num_threads(),
        }
        write_summary(self.out / files[1], summary)
        print_table(summary)
        print(f"results in {self.out}: {', '.join(files)}")


def score_few_labels(
    args,
    checkpoint: dict,
    world: World,
    device: torch.device,
    predict: Callable[[Scoring, dict], tuple[np.ndarray, float]],
    settings: dict,
) -> None:
    """Score a few-label run, and last.pt beside it where best.pt was selected on the cases that are
    reported.

    predict: a volume of the data set -> ids on the grid of `read`, and the seconds that it took.
    settings: how it predicts, for the summary.
    """
    if args.protocol == "published" and args.nsd_tolerance is not None:
        raise ConfigError("--nsd-tolerance: the published protocol has no NSD; leave it out")
    for flag, value in (("--hd95", args.hd95), ("--empty", args.empty)):
        if args.protocol == "published" and value is not None:
            raise ConfigError(
                f"{flag} {value}: the published protocol has its own definition; leave it out"
            )
    paths = [args.ckpt]
    for path in paths:
        scoring = Scoring(args, path, checkpoint, world, device)
        _score_few_labels(scoring, predict, settings)
        last = path.with_name("last.pt")
        marked = describe(checkpoint, path.name, scoring.split)["selected_on_reported"]
        if marked and path.name == "best.pt" and last.is_file():
            paths.append(last)
            checkpoint = load_checkpoint(last)


def _score_few_labels(scoring: Scoring, predict: Callable, settings: dict) -> None:
    args, dataset = scoring.args, scoring.dataset
    empty, hd95 = args.empty or "agree", args.hd95 or "pooled"

    def score_case(case) -> tuple[list[dict], float]:
        volume = dataset.read(case)
        ids, seconds = predict(scoring, volume)
        image, label = volume["image"], volume["label"][0]
        shown = (image, label, ids, dataset.class_names[1:], case.name)
        affine, spacing = volume.get("affine"), None
        if scoring.unit == "mm":
            ids = dataset.native(ids, volume)
            label, affine = dataset.native_label(case)
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
        how = {"protocol": args.protocol, "hd95": hd95, "empty": empty, "spacing": spacing}
        how |= {"tolerances": list(scoring.tolerances.values())}
        how["annotated"] = dataset.annotated(case)
        rows = case_rows(case.name, ids, label, dataset.class_names, **how)
        dice = [row["dice"] for row in rows]
        scoring.save(
            case.name, ids, affine, lambda: figures.compared(*shown, dice, side=figures.SIDE)
        )
        return rows, seconds

    results = scoring.results(score_case)
    if not scoring.world.main:
        return
    if args.protocol == "published":
        empty, hd95 = "zero", "directed" if scoring.unit == "pixels" else "pooled"
    rows = [row for rows_of_case, _ in results for row in rows_of_case]
    values = {
        "protocol": args.protocol,
        "unit": scoring.unit,
        "hd95_definition": hd95,
        "empty_policy": empty,
        **settings,
        "native": summary_of(rows, args.protocol),
    }
    if args.protocol == "clean":
        values["nsd_tolerance"] = scoring.tolerances
    seconds = [value for _, value in results]
    scoring.write(rows, seconds, (args.protocol, hd95, scoring.unit), values, report)
