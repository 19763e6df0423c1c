"""All tables: of tested run folders, and those of RESULTS.md and results/NOTES.md, of the lines of
results/*.jsonl.

A row is a run: its settings, `mean` with a number of each metric in the unit of tables (METRICS in
metrics.py), and where a class was missed or false positive `penalised` with the distances in which
it counts as the diagonal. Methods, networks and data sets are those of the registries, of the
papers and of the runs that are found, in the papers' order where they have one. Means and
population standard deviations are over seeds. Paired tests (utils/statistics.py) take the patients
as the sample, the seeds averaged case by case; p values are Holm's over the rows of a table.
"""

import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from losses import KD_METHODS
from methods import SSL_METHODS
from metrics import DISTANCES, METRICS, PENALISED, PUBLISHED, SHARES, SHOWN, tolerance_text
from utils.checkpoint import TableError, read_json, write_table
from utils.config import labelled_name
from utils.statistics import average_seeds, by_patient, holm, paired_comparison

# Networks of the ACF-BCKD paper, and few-label methods of the CRKD paper, in the papers' order
TEACHERS = {"resunet": "T1 ResU-Net", "segresnet": "T2 SegResNet"}
STUDENTS = {
    "unet": "U-Net",
    "espnetv2": "ESPNetV2",
    "mobile_unet": "Mobile U-Net",
    "lcovnet": "LCOV-Net",
}
FEW_LABELS = {
    "supervised": "labels alone",
    "unimatch": "UniMatch",
    "crossmatch": "CrossMatch",
    "lefed": "LeFeD",
    "acmt": "AC-MT",
    "mlrpl": "MLRPL",
    "crkd": "CRKD",
}
NAMES = FEW_LABELS | {"acf_bckd": "ACF-BCKD", "acf_bckd sum": "ACF-BCKD, weaker"}
RIVALS = tuple(method for method in KD_METHODS if method != "acf_bckd")
PUBLISHED_KD = Path(__file__).with_name("published_kd.yaml")
PUBLISHED_SSL = Path(__file__).with_name("published_ssl.yaml")
NOT_KNOWN = f"{PENALISED} (nan: not known, test the run again)."
AGREEMENT = (
    "Agreement: Dice with the teacher's prediction on unlabelled training scans; no score, and "
    "nothing is chosen by it."
)
# Trials of scripts/table_small.sh
TRIALS = {
    "": "CRKD, the defaults",
    "no_lec": "without LEC (`lec: 0`)",
    "no_csd": "without CSD (`csd: 0`)",
    "no_ckd": "without CKD (`ckd_pixel: 0, ckd_feature: 0`)",
    "no_lec_csd_ckd": "without all three (`consistency: 0`)",
    "consistency_1": "the three with ten times their weight (`consistency: 1`)",
    "no_pseudo_loss": "without the pseudo-label loss (`pseudo_weight: 0`)",
    "cross_entropy": "pseudo-labels by cross-entropy alone (`pseudo_loss: ce`)",
    "present_classes": "Dice of pseudo-labels over present classes only (`dice_absent: false`)",
    "tau_1": "temperature of CSD 1 (`csd_tau: 1`)",
    "projected": "CKD on projected features (`feature_space: projected`)",
    "joint": "pseudo-labels of the joint training-mode pass (`pseudo_mode: joint`)",
}
# variant of ACF-BCKD: AFD and CFD as strong as the paper's weights are on its grid of 48x48x48
WEAKER = "sum"
# What a summary of the test scripts has at least, whichever table it is for
SUMMARY = {
    **dict.fromkeys(("dataset", "method", "preset", "tag", "student", "checkpoint", "split"), str),
    **dict.fromkeys(("hd95_definition", "device"), str),
    **dict.fromkeys(("seed", "step", "max_steps", "parameters", "threads"), int),
    **dict.fromkeys(("gmacs", "ms_per_volume"), (int, float)),
    "patch_size": list,
    "selected_on_reported": bool,
    "native": dict,
}
BRIEF = ("dice", "hd95", "asd")  # what most tables of RESULTS.md have room for
BRIEF_TITLES = [METRICS[metric].title for metric in BRIEF]
Rows = Sequence[dict]
Table = tuple[list[str], list[list[str]], list[dict]]  # header, body, the rows that it is of


# --- rows, and the text of a cell ---


def row_of(summary: dict, space: str = "resampled") -> dict:
    """The row of a summary.json; its `penalised` is NaN where the file does not say it.

    space: of distillation runs; the others have one only.
    """
    found = scores(summary, space)
    counts = found["counts"]
    mean = {key: in_unit(found["mean"][key], key) for key in SHOWN if key in found["mean"]}
    row = summary | {"spurious": 0} | counts | {"mean": mean}
    for key, value in summary.get("published_protocol", {}).items():
        if key != "dice":
            row["mean"][key] = value
    if row["missed"] + row["spurious"]:
        also = found.get("penalised", {"mean": {}})["mean"]
        row["penalised"] = {key: also.get(key, math.nan) for key in mean if key in DISTANCES}
    return row


def read_summary(path: Path) -> dict:
    """A summary.json of the test scripts; TableError for one that is damaged or something else."""
    summary = read_json(path)
    check_summary(summary, path)
    return summary


def check_summary(summary: dict, path: Path) -> None:
    """TableError unless it has what tables are made of, each of its kind."""
    wrong = [key for key, kind in SUMMARY.items() if not isinstance(summary.get(key), kind)]
    grids = [key for key in ("native", "resampled") if isinstance(summary.get(key), dict)]
    for grid in grids:
        found = summary[grid]
        counts, mean = found.get("counts"), found.get("mean")
        if not isinstance(counts, dict) or not {"pairs", "missed"} <= counts.keys():
            wrong.append(f"{grid}.counts")
        if not isinstance(mean, dict) or not all(known_number(v) for v in mean.values()):
            wrong.append(f"{grid}.mean")
    if summary.get("teacher") is not None and not isinstance(summary["teacher"], str):
        wrong.append("teacher")
    if wrong:
        raise TableError(
            f"{path}: not a summary of the test scripts, or a damaged one ({', '.join(wrong)} "
            "missing or wrong); test the run again"
        )


def known_number(value: object) -> bool:
    """Whether it is a number, or null for one that is undefined."""
    return value is None or isinstance(value, (int, float))


def scores(summary: dict, space: str) -> dict:
    """The means of a space; runs of train_2d_crkd.py and train_3d_crkd.py have one only."""
    return summary.get(space, summary["native"])


def penalised(summary: dict, space: str, metric: str) -> float | None:
    """The mean distance with missed and false positive classes as the diagonal; None where none
    failed, NaN for a summary from before there was this figure.
    """
    return row_of(summary, space).get("penalised", {}).get(metric)


def in_unit(value: float | None, metric: str) -> float | None:
    """A score in the unit of tables; None if it is undefined."""
    return None if value is None or math.isnan(value) else METRICS[metric].factor * value


def mean(rows: Rows, metric: str) -> float | None:
    """None without rows, and where one of them has none."""
    values = [row["mean"].get(metric) for row in rows]
    return statistics.fmean(values) if values and None not in values else None


def mean_penalised(rows: Rows, metric: str) -> float | None:
    """None where nothing failed, NaN where it is not known. A run in which nothing failed enters
    with its own mean.
    """
    if metric not in DISTANCES or not any("penalised" in row for row in rows):
        return None
    values = [row.get("penalised", row["mean"]).get(metric) for row in rows]
    return math.nan if None in values else statistics.fmean(values)


def spread(rows: Rows, metric: str) -> str:
    if len(rows) < 2 or mean(rows, metric) is None:
        return ""
    return f"{statistics.pstdev(row['mean'][metric] for row in rows):.2f}"


def number(value: float | None, missing: str = "-") -> str:
    return missing if value is None else f"{value:.2f}"


def shown(rows: Rows, metric: str, also: str = " ({}*)", unknown: str = "unknown") -> str:
    """83.61 ± 0.12, 83.61 of one run, 1.73 (2.10*) with the penalised mean, '-' if undefined, or
    'not run'.
    """
    if not rows:
        return "not run"
    text, deviation = number(mean(rows, metric)), spread(rows, metric)
    text += f" ± {deviation}" if deviation else ""
    value = mean_penalised(rows, metric)
    if value is not None:
        text += also.format(unknown if math.isnan(value) else f"{value:.2f}")
    return text


def together(rows: Rows, metrics: Sequence[str]) -> str:
    return " / ".join(shown(rows, metric) for metric in metrics) if rows else "not run"


def metrics_of(rows: Rows) -> list[str]:
    """Those of which a row has a mean, and those of the papers."""
    return [key for key in SHOWN if key in PUBLISHED or any(key in row["mean"] for row in rows)]


def size(rows: Rows) -> list[str]:
    """Parameters and GMACs."""
    return [f"{rows[0]['parameters']:,}", f"{rows[0]['gmacs']:.2f}"] if rows else ["-", "-"]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{round(value)} %"


def shown_p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def title(name: str) -> str:
    """Of a method, or of several that trained together."""
    parts = [name] if name in NAMES else name.split("+")
    return " + ".join(NAMES.get(part, part.upper()) for part in parts)


def joined(lists: Iterable[Rows]) -> list[dict]:
    return list(itertools.chain.from_iterable(lists))


def in_order(first: Iterable[str], *others: Iterable[str]) -> list[str]:
    """All names, each once."""
    return list(dict.fromkeys(itertools.chain(first, *others)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """A table in aligned columns; right: numbers, below the right end of their title."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(path: Path, cells: Sequence[dict]) -> None:
    header = list(cells[0])
    write_table(path, [header, *([row[key] for key in header] for row in cells)])


@functools.cache
def published_figures(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- run folders: named ones ---


def run_title(summary: dict) -> str:
    """Which network, taught how."""
    usual = summary["preset"] == "clean" or summary["method"] == "supervised"
    preset = "" if usual else f", {summary['preset']}"
    if "labelled" in summary:
        return (
            f"{summary['student']}, {labelled_name(summary['labelled'])} labelled, "
            f"{summary['method']}{preset}"
        )
    labels = f", {labels_of(summary)}" if "trained_on" in summary else ""
    if summary["teacher"] is None:
        return f"{summary['student']}, supervised{labels}"
    return f"{summary['student']} <- {summary['teacher']}, {summary['method']}{preset}{labels}"


def labels_of(summary: Mapping) -> str:
    """'16 labelled', or '16 labelled + unlabelled': what a distillation run was trained on; ''
    where that is simply all labels.
    """
    if "trained_on" not in summary:
        return ""
    labelled = f"{summary['trained_on']['labelled']} labelled"
    return labelled + " + unlabelled" * bool(summary["trained_on"]["unlabelled"])


def runs_table(summaries: Sequence[dict], space: str) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each run: accuracy beside size and speed. Below runs that differ in the
    seed alone stands their mean, with the standard deviation.
    """
    unit = "/".join(sorted({summary.get("unit", "mm") for summary in summaries}))
    rows = [row_of(summary, space) for summary in summaries]
    metrics = metrics_of(rows)
    titles = [METRICS[key].title + f" {unit}" * (key in DISTANCES) for key in metrics]
    titles += ["agreement"] * any("agreement" in row for row in rows)
    header = ["run", *titles, "missed", "parameters", "GMACs", "ms/volume"]
    cells_of: dict[str, list[dict]] = {}
    for row, label in zip(rows, cell_titles(summaries)):
        cells_of.setdefault(label, []).append(row)
    body = []
    for label, of_cell in cells_of.items():
        seeds = {row["seed"] for row in of_cell}
        for row in of_cell:
            name = f"{label}, seed {row['seed']}" if len(seeds) > 1 else label
            body.append(cells(name, [row], metrics, "agreement" in titles))
        # the same seed twice would count twice
        if len(seeds) > 1 and len(seeds) == len(of_cell):
            name = f"{label}, {len(seeds)} seeds"
            body.append(cells(name, of_cell, metrics, "agreement" in titles))
    return header, body


def cell_titles(summaries: Sequence[dict]) -> list[str]:
    """Of each run what all of its seeds have in common; the checkpoint where the table has both."""
    titles = []
    for summary in summaries:
        title = run_title(summary)
        if len({other["checkpoint"] for other in summaries}) > 1:
            title += f", {summary['checkpoint']}"
        titles.append(title + (f" [{summary['tag']}]" if summary["tag"] else ""))
    return titles


def cells(name: str, rows: Rows, metrics: Sequence[str], agreement: bool) -> list[str]:
    """A line of `runs_table`: of one run, or the mean of several seeds."""
    agreed = [in_unit(row.get("agreement"), "dice") for row in rows]
    agreed = None if None in agreed else statistics.fmean(agreed)
    missed, pairs = (sum(row[key] for row in rows) for key in ("missed", "pairs"))
    return [
        name,
        *(shown(rows, metric, also=" / {}*", unknown="nan") for metric in metrics),
        *([number(agreed)] * agreement),
        f"{missed}/{pairs}",
        *size(rows),
        f"{statistics.fmean(row['ms_per_volume'] for row in rows):.0f}",
    ]


def selections(summaries: list[dict]) -> str:
    """Which lists chose the checkpoints of a table; runs that were selected on test cases are
    named.
    """
    chosen = [s for s in summaries if s.get("checkpoint", "best.pt") == "best.pt"]
    lists = sorted({summary.get("selected_on", "val") for summary in chosen}) or ["none"]
    on_test = [s for s in chosen if s.get("selected_on") == "test"]
    names = dict.fromkeys(f"{run_title(s)}, seed {s['seed']}" for s in on_test)
    named = f"; on test (--select-on test): {'; '.join(names)}" if names else ""
    return f"best.pt was selected on: {', '.join(lists)}{named}."


def notes(summaries: list[dict], space: str) -> list[str]:
    """What a reader must know to compare the rows."""
    first, rows = summaries[0], [row_of(summary, space) for summary in summaries]
    cases = {summary["native"]["cases"] for summary in summaries}
    steps = ", ".join(f"{run_title(s)} {s['step']} of {s['max_steps']}" for s in summaries)
    *shares, last = [METRICS[key].title for key in metrics_of(rows) if key in SHARES]
    shares = f"{', '.join(shares)} and {last}"
    counted = (
        f"{shares} in %, means over {'/'.join(map(str, sorted(cases)))} {first['split']} cases"
    )
    if any(summary.get("protocol") == "published" for summary in summaries):
        counted += "; distances as published tables of the data set have them (reporting.py)."
    else:
        counted += (
            f"; HD95 {first['hd95_definition']}, ASD one-sided; 'missed': classes that a case has "
            "and the prediction lacks, of all classes of all cases (their distances are undefined "
            "and left out)."
        )
    lines = [
        counted,
        f"GMACs of one patch {'x'.join(map(str, first['patch_size']))}; milliseconds on "
        f"{first['device']}"
        + (f" with {first['threads']} thread(s)." if first["device"] == "CPU" else "."),
        f"Checkpoint steps: {steps}.",
        selections(summaries),
    ]
    within = {
        tolerance_text(summary["nsd_tolerance"], summary.get("unit", "mm"))
        for summary in summaries
        if summary.get("nsd_tolerance")
    }
    if within:
        lines.append(f"NSD: share of the surfaces not further apart than {' or '.join(within)}.")
    if any("agreement" in summary for summary in summaries):
        lines.append(AGREEMENT)
    if any(summary["selected_on_reported"] for summary in summaries):
        lines.append(
            "This data set has no third list: best.pt was selected on the cases reported here; see "
            "last.pt too."
        )
    if any("penalised" in row for row in rows):
        lines.append(NOT_KNOWN)
    protocols = {summary["protocol"] for summary in summaries if "protocol" in summary}
    if protocols:
        lines.append(f"Protocol (reporting.py): {', '.join(sorted(protocols))}.")
    return lines


# --- run folders: the tables of the papers, over seeds ---


def gather(
    runs_dir: Path, name: str, space: str, key: Callable[[dict], tuple | None]
) -> tuple[dict[tuple, list[dict]], int]:
    """Key -> rows of its seeds, of all files `name`; and how many tagged runs were left out: their
    settings are not those of the cell. key: None for a run of other tables.
    """
    found: dict[tuple, dict[int, dict]] = {}
    tagged = 0
    for path in sorted(runs_dir.rglob(name)):
        summary = read_json(path)
        cell = key(summary)
        if cell is None:
            continue
        check_summary(summary, path)
        if summary["tag"]:
            tagged += 1
            continue
        seeds = found.setdefault(cell, {})
        if summary["seed"] in seeds:
            sys.exit(
                f"error: {path}: a second run of {'/'.join(map(str, cell))} with seed "
                f"{summary['seed']}; remove one"
            )
        seeds[summary["seed"]] = row_of(summary, space)
    return {cell: [seeds[seed] for seed in sorted(seeds)] for cell, seeds in found.items()}, tagged


def kd_key(summary: dict) -> tuple | None:
    """Of a distillation run on all labels; a network trained alone has no preset."""
    if summary.get("checkpoint") != "best.pt" or "student" not in summary:
        return None
    if "labelled" in summary or "trained_on" in summary:
        return None
    preset = "-" if summary["teacher"] is None else summary["preset"]
    names = ("dataset", "method", "teacher", "student")
    return (*(summary[name] for name in names), preset)


def few_labels_key(summary: dict) -> tuple | None:
    if "labelled" not in summary:
        return None
    preset = "-" if summary["method"] == "supervised" else summary["preset"]
    return summary["dataset"], labelled_name(summary["labelled"]), summary["method"], preset


def fields(rows: Rows, metrics: Mapping[str, str]) -> dict:
    """Mean and population standard deviation of each column (-> its metric) over the seeds, for a
    CSV file; empty where there are no runs.
    """
    found = {"runs": len(rows), "seeds": " ".join(str(row["seed"]) for row in rows)}
    for column, metric in metrics.items():
        found[column] = number(mean(rows, metric), "")
        found[f"{column}_std"] = spread(rows, metric)
    return found


def failed_fields(rows: Rows, metrics: Mapping[str, str]) -> dict:
    """Classes missed, of all, over the runs; and the penalised mean of each column (-> its metric),
    'unknown' where a run lacks it, empty where nothing failed.
    """
    found = {key: sum(row[key] for row in rows) if rows else "" for key in ("missed", "pairs")}
    for column, metric in metrics.items():
        value = mean_penalised(rows, metric)
        unknown = value is not None and math.isnan(value)
        found[f"{column}_penalised"] = "unknown" if unknown else number(value, "")
    return found


def kd_layout(runs_dir: Path, chosen: str | None, space: str) -> list[dict]:
    """Print the tables of the ACF-BCKD paper for each data set; -> their cells."""
    published = published_figures(PUBLISHED_KD)
    runs, tagged = gather(runs_dir, "summary.json", space, kd_key)
    written = []
    for dataset in [chosen] if chosen else in_order(published, (key[0] for key in runs)):
        own = {key[1:]: rows for key, rows in runs.items() if key[0] == dataset}
        written += kd_tables(dataset, own, published.get(dataset, {}))
    used = [row for cell in written for row in cell.pop("rows")]
    print("\n".join(kd_notes(used, tagged, space)))
    return written


def kd_tables(dataset: str, runs: dict[tuple, list[dict]], published: dict) -> list[dict]:
    """Print the tables of one data set; -> their cells for a CSV file, with their `rows`.

    runs: (method, teacher or None, student, preset) -> rows.
    """
    written = []
    taught = published.get("distilled", {})
    teachers = in_order(TEACHERS, (key[1] for key in runs if key[1]))
    students = in_order(STUDENTS, (key[2] for key in runs if key[1]))
    networks = in_order(TEACHERS, students, (key[2] for key in runs))

    def cell(method: str, teacher: str | None, student: str, preset: str) -> list[str]:
        rows = runs.get((method, teacher, student, preset), [])
        figure = taught.get(method, {}).get(student, {}).get(teacher)
        if teacher is None:
            figure = published.get("alone", {}).get(student)
        names = {"dataset": dataset, "method": method, "teacher": teacher or ""}
        names |= {"student": student, "preset": preset}
        written.append(names | kd_fields(rows, figure) | {"rows": rows})
        return [kd_cell(rows), str(len(rows)) if rows else "-", shown_published(figure)]

    def lines(method: str, student: str, name: str) -> list[list[str]]:
        """One for each preset, `clean` first; the teachers side by side."""
        found = {key[3] for key in runs if key[0] == method and key[2] == student}
        body = []
        for preset in in_order(["clean"], sorted(found)):
            keys = [(method, teacher, student, preset) for teacher in teachers]
            known = next((runs[key] for key in keys if key in runs), [])
            body.append([name, *size(known), preset])
            for key in keys:
                body[-1] += cell(*key)
        return body

    results = ("Dice % / HD95", "runs", "published")
    body = []
    for network in networks:
        key = ("supervised", None, network, "-")
        body.append([network_name(network), *size(runs.get(key, [])), *cell(*key)])
    print_table(f"{dataset}: trained alone", ["network", "parameters", "GMACs", *results], body)
    header = ["parameters", "GMACs", "preset"]
    for teacher in teachers:
        # T1 of 'T1 ResU-Net'
        header += [f"{network_name(teacher).split()[0]}: {column}" for column in results]
    body = []
    for student in students:
        body += lines("acf_bckd", student, network_name(student))
    print_table(f"{dataset}: ACF-BCKD", ["student", *header], body)
    methods = in_order(RIVALS, (key[0] for key in runs if key[1] and key[0] != "acf_bckd"))
    for student in students:
        body = []
        for method in methods:
            run = any(key[0] == method and key[2] == student for key in runs)
            if run or student in taught.get(method, {}):
                body += lines(method, student, title(method))
        if body:
            name = f"{dataset}: methods, student {network_name(student)}"
            print_table(name, ["method", *header], body)
    return written


def network_name(name: str) -> str:
    return (TEACHERS | STUDENTS).get(name, name)


def kd_fields(rows: Rows, figure: Sequence[float] | None) -> dict:
    """The CSV fields of a cell: Dice in %, HD95 in mm and, where test_3d.py ran with --published,
    in voxels; the published figure.
    """
    found = fields(rows, {"dice": "dice", "hd95_mm": "hd95", "hd95_voxels": "hd95_voxels"})
    found |= {name: rows[0][name] if rows else "" for name in ("parameters", "gmacs")}
    found |= failed_fields(rows, {"hd95_mm": "hd95"})
    found["hd95_voxels_penalised"] = number(mean(rows, "hd95_voxels_penalised"), "")
    names = ("published_dice", "published_dice_std", "published_hd95_voxels")
    return found | dict(zip(names, [*(figure or []), "", "", ""]))


def kd_cell(rows: Rows) -> str:
    """76.21 ± 0.30 / 12.40 ± 1.10 / 30.20* (10.80 / 21.70* vox), missed 3/78, or 'not run'; *:
    penalised.
    """
    if not rows:
        return "not run"
    text = f"{shown(rows, 'dice')} / {shown(rows, 'hd95', also=' / {}*')}"
    voxels, also = mean(rows, "hd95_voxels"), mean(rows, "hd95_voxels_penalised")
    failed = mean_penalised(rows, "hd95") is not None and also is not None
    if voxels is not None:
        text += f" ({voxels:.2f}{f' / {also:.2f}*' if failed else ''} vox)"
    missed, pairs = (sum(row[key] for row in rows) for key in ("missed", "pairs"))
    return f"{text}, missed {missed}/{pairs}"


def shown_published(figure: list[float] | None) -> str:
    if not figure:
        return "-"
    dice, std, hd95 = [*figure, None, None][:3]
    return (
        f"{dice:.2f}"
        + (f" ± {std:.2f}" if std is not None else "")
        + (f" / {hd95:.2f} vox" if hd95 else "")
    )


def print_table(name: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    print(f"### {name}\n\n{markdown(header, body)}\n")


def kd_notes(summaries: Rows, tagged: int, space: str) -> list[str]:
    """What a reader must know to compare our figures with the published ones."""
    lines = [
        f"Ours: Dice in % and HD95 in mm on the {space} grid, mean ± population standard deviation "
        "over the runs "
        "(seeds) of best.pt; 'vox': HD95 in voxels by the published protocol, where test_3d.py "
        "ran with --published.",
        "Published: HD95 is in voxels of the resampled grid (CT: 1.5 x 1.5 x 2.0 mm; BraTS: 1 mm), "
        "and organs that "
        "were missed are left out of it; mean of three runs.",
        "Parameters are those that a forward pass uses; GMACs of one patch.",
        NOT_KNOWN,
    ]
    if summaries:
        definitions = ", ".join(sorted({summary["hd95_definition"] for summary in summaries}))
        splits = ", ".join(sorted({summary["split"] for summary in summaries}))
        lines.append(f"HD95 definition: {definitions}; scored on: {splits}.")
        lines.append(selections(summaries))
    if any(summary["selected_on_reported"] for summary in summaries):
        lines.append(
            "Where there is no third list, best.pt was selected on the reported cases, as in the "
            "paper."
        )
    if tagged:
        lines.append(f"{tagged} tagged run(s) left out.")
    return lines


def few_labels_layout(runs_dir: Path, chosen: str | None, protocol: str) -> list[dict]:
    """Print the tables of CRKD for each data set; -> their cells for a CSV file."""
    published = published_figures(PUBLISHED_SSL)
    name = "summary_published.json" if protocol == "published" else "summary.json"
    runs, tagged = gather(runs_dir, name, "native", few_labels_key)
    metrics = metrics_of(joined(runs.values()))
    written = []
    for dataset in [chosen] if chosen else in_order(published, (key[0] for key in runs)):
        figures = {str(count): known for count, known in published.get(dataset, {}).items()}
        for labelled in in_order(figures, (key[1] for key in runs if key[0] == dataset)):
            own = {key[2:]: rows for key, rows in runs.items() if key[:2] == (dataset, labelled)}
            names = {"dataset": dataset, "labelled": labelled}
            written += few_labels_cells(names, own, figures.get(labelled, {}), metrics)
    print(
        f"Ours: {protocol} protocol (reporting.py), mean ± population standard deviation over "
        "the runs (seeds) of best.pt; distances in voxels or pixels. Published: "
        f"{' / '.join(METRICS[key].title for key in PUBLISHED)} of the best checkpoint on the "
        "reported cases."
    )
    print(NOT_KNOWN)
    if runs:
        print(selections(joined(runs.values())))
    if tagged:
        print(f"{tagged} tagged run(s) left out.")
    return written


def few_labels_cells(
    names: dict, runs: dict[tuple, list[dict]], figures: Mapping, metrics: Sequence[str]
) -> list[dict]:
    """Print the table of one data set and number of labels; -> its cells.

    names: of these two. runs: (method, preset) -> rows. figures: method -> published figures.
    """
    written, body = [], []
    for method in in_order(FEW_LABELS, SSL_METHODS, (key[0] for key in runs)):
        presets = sorted(preset for own, preset in runs if own == method)
        if not presets and method in figures:
            presets = ["-"]
        for preset in presets:
            rows, figure = runs.get((method, preset), []), figures.get(method)
            found = fields(rows, {metric: metric for metric in metrics})
            found |= failed_fields(rows, {key: key for key in metrics if key in DISTANCES})
            published = {f"published_{key}": "" for key in PUBLISHED}
            published |= dict(zip(published, figure or []))
            written.append(names | {"method": method, "preset": preset} | found | published)
            counted = (
                [f"{found['missed']}/{found['pairs']}", str(len(rows))] if rows else ["-", "-"]
            )
            scored = [shown(rows, metric, also=" / {}*") for metric in metrics]
            body.append([method, preset, *scored, *counted, few_labels_figure(figure)])
    titles = [METRICS[key].title + " %" * (key in SHARES) for key in metrics]
    if body:
        header = ["method", "preset", *titles, "missed", "runs", "published"]
        print_table(f"{names['dataset']}, {names['labelled']} labelled", header, body)
    return written


def few_labels_figure(figure: Sequence[float] | None) -> str:
    return " / ".join(f"{value:.2f}" for value in figure) if figure else "-"


# --- run folders: logs ---


def log_table(
    logs: Mapping[Path, list[dict]], keys: Sequence[str], steps: Sequence[int]
) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each run and figure ('train/NAME' or 'val/NAME') that is in its log."""
    last = max((entry["step"] + 1 for log in logs.values() for entry in log), default=0)
    steps = steps or sorted({max(1, round(last * k / 5)) for k in range(1, 6)})
    body = []
    for run, log in logs.items():
        for key in keys:
            kind, _, name = key.partition("/")
            entries = [entry for entry in log if entry["kind"] == kind and name in entry]
            if entries:
                label = f"{run.parent.parent.name} {run.parent.name} {run.name}"
                body.append([label, key, *(logged(entries, name, step) for step in steps)])
    return ["run", "figure", *(f"step {step}" for step in steps)], body


def logged(entries: Sequence[dict], name: str, step: int) -> str:
    """The last value before `step` updates were done."""
    values = [entry[name] for entry in entries if entry["step"] < step]
    if not values or values[-1] is None:
        return "-"
    return f"{100 * values[-1]:.1f}" if -1 <= values[-1] <= 1 else f"{values[-1]:.4g}"


# --- lines of results/*.jsonl: the tables of RESULTS.md and results/NOTES.md ---


def read(file: Path) -> tuple[list[str], list[dict]]:
    """Case names and runs of a file."""
    try:
        first, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if any(not row["curve"] or "lr" not in row for row in rows):
            raise ValueError("a line without a learning rate or curve")
        return first["cases"], rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of tools/evidence.py collect ({error})") from None


def make_table(file: Path, name: str, arguments: Sequence[str]) -> str:
    """A table of TABLES as Markdown, with a line on what it is of."""
    if name not in TABLES:
        raise ValueError(f"no table '{name}'; choose from {', '.join(TABLES)}")
    cases, rows = read(file) if file.exists() else ([], [])  # a table of which no row was run
    header, body, used = TABLES[name](Results(cases, rows), *arguments)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]
    return "\n".join(["", *lines, "", *footer(used, None if name == "rates" else len(cases)), ""])


def footer(rows: Rows, cases: int | None) -> list[str]:
    """Of what and when the rows of a table are. cases: on how many it scores; None for scores in
    training.
    """
    rows = list({row["run"]: row for row in rows}.values())
    if not rows:
        return ["No run yet."]
    dates = sorted({row["date"] for row in rows})
    minutes = sum(row["seconds"] for row in rows) / 60
    gpus = [row["device"] for row in rows if row["device"] != "CPU"]
    splits = "/".join(sorted({row["split"] for row in rows}))
    of = "" if len(gpus) == len(rows) else f"{len(gpus)} of them "
    text = (
        f"{len(rows)} training{'s' * (len(rows) > 1)} of {minutes:.0f} minutes together, "
        + (f"{of}tested on {' and '.join(sorted(set(gpus)))}, " if gpus else "")
        + (f"{cases} {splits} cases; " if cases is not None else "")
        + f"{' to '.join(dates[:1] + dates[1:][-1:])}; "
        f"commit {', '.join(sorted({row['code'] for row in rows}))}."
    )
    if cases is None:
        return [text]
    if any(row["selected_on_reported"] for row in rows):
        text += " best.pt was selected on these same cases."
    if any("penalised" in row for row in rows):
        text += (
            " *: distances with a missed or false positive class as the diagonal; compare runs by "
            "these."
        )
    return [text]


class Results:
    """The runs of a file by cell. Of runs that differ in the learning rate only, a cell has the
    best on validation.
    """

    def __init__(self, cases: Sequence[str], rows: Rows) -> None:
        # the package takes seconds to import, which tables of run folders do without
        from dataloaders.lists import patient_function

        self.cases, self.rows, self.patient = cases, rows, patient_function("")
        self.rates = {}  # of every run, told apart by all but its rate: {rate: row}
        for row in rows:
            same = self.rates.setdefault(identity(row), {})
            if row["lr"] in same:
                raise ValueError(
                    f"{row['run']}, {same[row['lr']]['run']}: the same training twice; keep one of "
                    "them"
                )
            same[row["lr"]] = row

    def rate(self, row: Mapping) -> float:
        """The learning rate of the runs like this one that did best on validation in the course of
        training.

        Only seed 0 is run with several; all else of a method (seeds, teachers, students, parts) is
        run with its best.
        """
        return max(self.rates[identity(row)].values(), key=best_validation)["lr"]

    def cell(self, *, variant: str = "", **values) -> list[dict]:
        """Runs with these values, of all seeds. variant: what the tag says beside the recipe."""
        found = [
            row
            for row in self.rows
            if variant_of(row) == variant
            and all(row.get(key) == value for key, value in values.items())
            and row["lr"] == self.rate(row)
        ]
        recipes = {(row["max_steps"], row["lr"], recipe_of(row)) for row in found}
        if len(recipes) > 1 or len({row["seed"] for row in found}) < len(found):
            runs = ", ".join(row["run"] for row in found)
            raise ValueError(
                f"{runs}: one cell, but of different lengths, rates or recipes, or with one seed "
                "twice; keep one of "
                f"each, others in a file of their own"
            )
        return found

    def alone(self, network: str) -> list[dict]:
        return self.cell(method="supervised", student=network)

    def by_patient(self, rows: Rows, metric: str) -> dict[str, float | None]:
        """Score of every patient over the seeds."""
        scores = [dict(zip(self.cases, row["cases"][metric])) for row in rows]
        return by_patient(average_seeds(scores), self.patient)

    def compared(self, reference: Rows, others: Mapping[str, Rows]) -> dict[str, dict]:
        """Paired comparison of the Dice of each with a reference, over the seeds that both have;
        Holm over all.
        """
        pairs = {}
        for name, rows in others.items():
            seeds = {row["seed"] for row in rows} & {row["seed"] for row in reference}
            if seeds:
                scores = {}
                for key, side in (("reference", reference), (name, rows)):
                    same = [row for row in side if row["seed"] in seeds]
                    scores[key] = self.by_patient(same, "dice")
                pairs[name] = paired_comparison(scores, "reference")[0]
        for row, corrected in zip(pairs.values(), holm([row["p"] for row in pairs.values()])):
            # Where so few patients cannot reach 0.05 whatever they say, a p value would only look
            # like an answer.
            possible = (row["least_p"] or 1.0) * len(pairs) <= 0.05
            row["p_holm"] = corrected if possible else None
        return pairs


# What a tag says of the recipe of its table: steps, first width, learning rate, own rate of a
# method, clipping, warm-up
RECIPE = r"s\d+|w\d+|lr[\d.]+|own|clip|warmup"


def variant_of(row: Mapping) -> str:
    """What a tag says beside the recipe: '' of s600-w4-lr0.05-own-warmup, afd of
    s600-lr0.05-afd; before it the labels, where they are not simply all.
    """
    words = [word for word in row["tag"].split("-") if not re.fullmatch(RECIPE, word)]
    return "-".join(filter(None, [labels_of(row), *words]))


def recipe_of(row: Mapping) -> tuple[str, ...]:
    """Width, own rate and warm-up, by the tag. Clipping is what keeps a method from diverging, and
    no other recipe.
    """
    return tuple(word for word in row["tag"].split("-") if re.fullmatch(r"w\d+|own|warmup", word))


def identity(row: Mapping) -> tuple:
    """All that tells runs apart but their learning rate."""
    keys = ("method", "preset", "teacher", "student", "labelled", "seed", "max_steps")
    return (*(row.get(key) for key in keys), variant_of(row), recipe_of(row))


def best_validation(row: Mapping) -> float:
    return max(dice for _, dice in row["curve"])


def gap_closed(student: float | None, alone: float | None, teacher: float | None) -> float | None:
    """Share in % of the distance from the student alone to its teacher that a method makes up for.

    None where the teacher is not at least a point above: a share of next to nothing says nothing.
    """
    if None in (student, alone, teacher) or teacher - alone < 1:
        return None
    return 100 * (student - alone) / (teacher - alone)


def alone_table(results: Results) -> Table:
    """Teachers and students without a teacher."""
    tabled = published_figures(PUBLISHED_KD)
    body, used = [], []
    for network, name in (TEACHERS | STUDENTS).items():
        rows = results.alone(network)
        used += rows
        published = [f"{tabled[data]['alone'][network][0]:.2f}" for data in ("btcv", "word")]
        scores = [shown(rows, metric) for metric in BRIEF]
        steps = str(rows[0]["max_steps"]) if rows else "-"
        body.append([name, *size(rows), steps, str(len(rows)), *scores, *published])
    header = ["network", "parameters", "GMACs", "steps", "runs", *BRIEF_TITLES]
    return [*header, "published Dice: BTCV", "WORD"], body, used


def kd_cells(results: Results, teacher: str, weaker: bool = True) -> dict[str, list[dict]]:
    """Method -> runs of the U-Net under a teacher, of every method that a paper has or that was
    run; then those of several methods at once; ACF-BCKD last, then its weaker form if that was run.
    """
    cell = functools.partial(results.cell, student="unet", teacher=teacher, preset="clean")
    tabled = published_figures(PUBLISHED_KD)["btcv"]["distilled"]
    several = sorted({row["method"] for row in results.rows if "+" in row["method"]})
    found = {method: cell(method=method) for method in (*RIVALS, *several, "acf_bckd")}
    found = {method: rows for method, rows in found.items() if rows or method in tabled}
    if weaker and (rows := cell(method="acf_bckd", variant=WEAKER)):
        found["acf_bckd " + WEAKER] = rows
    return found


def methods_table(results: Results, teacher: str, which: str = "") -> Table:
    """The U-Net under one teacher by every method that a paper has or that was run. which: 'run'
    leaves out the methods that were not.
    """
    if which not in ("", "run"):
        raise ValueError(f"methods: {which!r} is neither 'run' nor left out")
    found = kd_cells(results, teacher)
    alone, above = results.alone("unet"), results.alone(teacher)
    run = {method: rows for method, rows in found.items() if rows}
    tested = results.compared(alone, run)
    # Ranked by what a method adds to the student alone with the same seeds: means of other seeds do
    # not compare.
    if all(method in tested for method in run):
        order = sorted(run, key=lambda method: -tested[method]["difference"])
    else:
        order = sorted(run, key=lambda method: -mean(run[method], "dice"))
    rivals = results.compared(
        found["acf_bckd"], {method: rows for method, rows in run.items() if method != "acf_bckd"}
    )
    own = [shown(alone, metric) for metric in BRIEF]
    body = [["none", str(len(alone)), *own, *["-"] * 8]]
    for method, rows in (run if which == "run" else found).items():
        row = tested.get(method)
        same = same_seeds(alone, rows)
        published = [published_gap(data, method, teacher) for data in ("btcv", "word", "brats21")]
        body.append(
            [
                title(method),
                str(len(rows)),
                *(shown(rows, metric) for metric in BRIEF),
                str(order.index(method) + 1) if rows else "-",
                percent(gap_closed(mean(rows, "dice"), mean(same, "dice"), mean(above, "dice"))),
                change(row),
                shown_p(row and row["p_holm"]),
                shown_p(rivals.get(method) and rivals[method]["p_holm"]),
                *map(percent, published),
            ]
        )
    header = [
        "method",
        "runs",
        *BRIEF_TITLES,
        "rank",
        "gap closed",
        "Dice above the student alone",
        "p",
        "p against ACF-BCKD",
        "published gap closed: BTCV",
        "WORD",
        "BraTS",
    ]
    return header, body, [*above, *alone, *joined(found.values())]


def same_seeds(alone: Rows, rows: Rows) -> Rows:
    """Of the student alone the runs with the seeds of `rows`; all of them if it has none."""
    return [one for one in alone if one["seed"] in {row["seed"] for row in rows}] or alone


def change(row: Mapping | None, sign: int = 1) -> str:
    """+1.20 [+0.80, +1.60]: a difference of means with its interval, which fewer than six patients
    do not give.
    """
    if row is None or row["difference"] is None:
        return "-"
    text = f"{sign * row['difference']:+.2f}"
    if row["low"] is None or row["n"] < 6:
        return text
    low, high = sorted((sign * row["low"], sign * row["high"]))
    return f"{text} [{low:+.2f}, {high:+.2f}]"


def published_gap(dataset: str, method: str, teacher: str, student: str = "unet") -> float | None:
    published = published_figures(PUBLISHED_KD)[dataset]
    taught = published["distilled"].get(method, {}).get(student, {}).get(teacher)
    if taught is None:
        return None
    return gap_closed(taught[0], published["alone"][student][0], published["alone"][teacher][0])


def rates_table(results: Results) -> Table:
    """Best validation Dice of every method at each learning rate that was tried with seed 0, the
    best in bold.
    """
    tried = [list(rows.values()) for rows in results.rates.values() if len(rows) > 1]
    rates = sorted({row["lr"] for row in joined(tried)})
    body = []
    for rows in tried:
        if rows[0]["seed"] or variant_of(rows[0]):
            raise ValueError(
                f"{rows[0]['run']}: several rates of a cell that is none of seed 0 and the whole "
                "method"
            )
        at, chosen = {row["lr"]: best_validation(row) for row in rows}, results.rate(rows[0])
        cells = [f"{at[rate]:.2f}" if rate in at else "-" for rate in rates]
        marked = [f"**{cell}**" if rate == chosen else cell for rate, cell in zip(rates, cells)]
        body.append([title(rows[0]["method"]), *marked])
    return ["method", *(f"rate {rate:g}" for rate in rates)], body, joined(tried)


def students_table(results: Results) -> Table:
    """The other students: alone, under ACF-BCKD, KD and the two rivals that do best with U-Net and
    ResU-Net.
    """
    body, used = [], []
    for student in list(STUDENTS)[1:]:
        alone = results.alone(student)
        used += alone
        parameters = size(alone)[0]
        own = together(alone, BRIEF)
        body.append([STUDENTS[student], parameters, "alone", own, "", own, "", ""])
        for method in ("kd", "at", "dist", "acf_bckd"):
            cells = []
            for teacher in TEACHERS:
                rows = results.cell(method=method, student=student, teacher=teacher, preset="clean")
                used += rows
                base = mean(same_seeds(alone, rows), "dice")
                gap = gap_closed(mean(rows, "dice"), base, mean(results.alone(teacher), "dice"))
                cells += [together(rows, BRIEF), percent(gap)]
            published = published_gap("btcv", method, "resunet", student)
            body.append([STUDENTS[student], parameters, title(method), *cells, percent(published)])
    header = ["student", "parameters", "method"]
    for teacher in ("T1", "T2"):
        header += [f"{teacher}: {' / '.join(BRIEF_TITLES)}", "gap closed"]
    return [*header, "published on BTCV, T1"], body, used


def parts_table(results: Results, teacher: str, student: str = "unet") -> Table:
    """ACF-BCKD with parts of its terms, of the seeds that all parts were run with.

    With another student than the U-Net: single terms, all but SBD, a tenth of SBD.
    """
    terms = ("afd", "cfd", "hbd", "sbd")
    without = [tuple(term for term in terms if term != left) for left in terms]
    more = [terms[:2], terms[2:], *without] if student == "unet" else without[-1:]
    kept = {"": (), **{"+".join(part): part for part in ([(term,) for term in terms] + more)}}
    weaker = {WEAKER: terms[:2]} | ({} if student == "unet" else {"sbd0.1": terms[3:]})
    taught = {"method": "acf_bckd", "student": student, "teacher": teacher, "preset": "clean"}
    cells = {"": results.alone(student)}
    for variant in (*list(kept)[1:], *weaker, "all"):
        cells[variant] = results.cell(**taught, variant="" if variant == "all" else variant)
    run = [{row["seed"] for row in rows} for rows in cells.values() if rows]
    seeds = set.intersection(*run) if run else set()
    if run and not seeds:
        raise ValueError(
            f"parts of ACF-BCKD with {student} under {teacher}: no seed that all were run with"
        )
    cells = {
        variant: [row for row in rows if row["seed"] in seeds] for variant, rows in cells.items()
    }

    def mark(variant: str, term: str) -> str:
        if term in weaker.get(variant, ()):
            return "weaker"
        return "x" if term in kept.get(variant, terms) else ""

    alone, body = cells[""], []
    for variant, rows in cells.items():
        above = "-"
        if rows and alone and variant:
            above = f"{mean(rows, 'dice') - mean(alone, 'dice'):+.2f}"
        marks = [mark(variant, term) for term in terms]
        body.append([*marks, *(shown(rows, metric) for metric in BRIEF), above])
    header = [*(term.upper() for term in terms), *BRIEF_TITLES, "above the student alone"]
    return header, body, joined(cells.values())


def presets_table(results: Results) -> Table:
    """`clean` beside `as_released`, of the seeds that the latter was run with.

    Below a few-label method its clean form with settings of its own, by the tag.
    """
    keys = ("method", "student", "teacher", "labelled")
    cells: dict[tuple, dict] = {}
    for row in sorted(results.rows, key=lambda row: (row["method"], row["run"])):
        if row["preset"] == "as_released" and not variant_of(row):
            values = {key: row[key] for key in keys if key in row}
            cells[tuple(values.values())] = values
    body, used = [], []
    for values in cells.values():
        released = results.cell(preset="as_released", **values)
        of = TEACHERS[values["teacher"]] if values["teacher"] else f"{values['labelled']} labelled"
        variants = {""}
        # variants of distillation and of CRKD have tables of their own
        if not values["teacher"] and values["method"] != "crkd":
            like = (values | {"preset": "clean"}).items()
            variants |= {variant_of(row) for row in results.rows if like <= row.items()}
        for variant in sorted(variants):
            clean = results.cell(preset="clean", variant=variant, **values)
            clean = [row for row in clean if row["seed"] in {one["seed"] for one in released}]
            used += clean if variant else [*clean, *released]
            pairs = [together(rows, ("dice", "hd95")) for rows in (clean, released)]
            name = title(values["method"])
            if variant:
                name, pairs[1] = f"{name}, {variant}", "-"
            body.append([name, of, *pairs])
    forms = [f"{form}: Dice / HD95" for form in ("clean", "as_released")]
    return ["method", "teacher or labels", *forms], body, used


def few_labels_table(results: Results, published: str, labelled: str) -> Table:
    """Every few-label method of the paper and every other that was run. published: the data set of
    the published figures.
    """
    count, axes = int(labelled), 3 if published == "la" else 2
    methods = in_order(FEW_LABELS, SSL_METHODS)
    methods = [name for name in methods if axes in SSL_METHODS[name].dimensions]
    metrics = metrics_of(results.rows)
    found = {name: results.cell(method=name, preset="clean", labelled=count) for name in methods}
    found = {name: rows for name, rows in found.items() if rows or name in FEW_LABELS}
    run = {name: rows for name, rows in found.items() if rows}
    tested = results.compared(
        found["crkd"], {name: rows for name, rows in run.items() if name != "crkd"}
    )
    order = sorted(run, key=lambda name: -mean(run[name], "dice"))
    tabled = published_figures(PUBLISHED_SSL)[published][count]
    body = []
    for name, rows in found.items():
        row = tested.get(name)
        body.append(
            [
                title(name),
                str(len(rows)),
                *(shown(rows, metric) for metric in metrics),
                str(order.index(name) + 1) if rows else "-",
                change(row, -1),
                shown_p(row and row["p_holm"]),
                few_labels_figure(tabled.get(name)),
            ]
        )
    header = [
        "method",
        "runs",
        *(METRICS[metric].title for metric in metrics),
        "rank",
        "Dice of CRKD above it",
        "p",
    ]
    names = " / ".join(METRICS[metric].title for metric in PUBLISHED)
    return [*header, f"published: {names}"], body, joined(found.values())


def trials_table(results: Results, labelled: str) -> Table:
    """CRKD with one decision changed at a time, seed 0."""
    count = int(labelled)
    alone = results.cell(method="supervised", labelled=count, seed=0)
    trials = {"labels alone": alone} | {
        name: results.cell(method="crkd", preset="clean", labelled=count, seed=0, variant=tag)
        for tag, name in TRIALS.items()
    }
    body = []
    for name, rows in trials.items():
        curve = " / ".join(f"{dice:.1f}" for _, dice in rows[0]["curve"]) if rows else "-"
        body.append([name, *(shown(rows, metric) for metric in BRIEF), curve])
    steps = next((rows[0]["curve"] for rows in trials.values() if rows), [])
    after = " / ".join(str(step) for step, _ in steps)
    header = ["trial", *BRIEF_TITLES, f"Dice after {after} steps"]
    return header, body, joined(trials.values())


TABLES = {
    "alone": alone_table,
    "methods": methods_table,
    "students": students_table,
    "parts": parts_table,
    "presets": presets_table,
    "rates": rates_table,
    "few_labels": few_labels_table,
    "trials": trials_table,
}
