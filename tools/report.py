r"""One HTML page about one or several runs: curves, scores of each class and case, pictures,
comparison of the runs.

    python tools/report.py runs/btcv/acf_bckd/resunet-unet/seed0  # writes report.html there
    python tools/report.py runs/btcv/supervised/unet/seed* runs/btcv/acf_bckd/resunet-unet/seed* \
        --out report.html
    python tools/report.py runs/acdc/supervised/unet2d-3/seed0 runs/acdc/crkd/unet2d-3/seed0 \
        --out few_labels.html

The page needs nothing but itself: no network, no other file. It is made of log.jsonl and of what
test_3d.py or test_2d.py wrote (metrics.csv, summary.json, predictions/); of what is missing it says
how to make it. Pictures need the data set as well, or the overlays/ of a test. Runs that differ in
the seed alone are taken as one in comparisons, each case by its mean over the seeds. Statistics:
utils/statistics.py; metrics and empty masks: metrics.py, reporting.py.
"""

import argparse
import csv
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml
from PIL import Image

from tools import report_charts as charts
from tools.figure import Views, views_of
from tools.report_parts import (
    PERCENT,
    Cell,
    escape,
    grid,
    inline,
    minus,
    number,
    p_value,
    paragraph,
    score_cell,
    sentence,
    short,
    sortable,
    table,
    warning,
)
from tools.results_table import notes, penalised, scores, title
from utils import figures
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.diagnosis import findings, term_history
from utils.run import run_folder
from utils.runlog import read_log
from utils.statistics import average_seeds, bootstrap_interval, case_means, paired_comparison

METRICS = {"dice": "Dice", "jaccard": "Jaccard", "hd95": "HD95", "asd": "ASD"}
FLAGS = ("absent", "missed", "spurious")
METRIC_TITLES = ("Dice, %", "Jaccard, %", "HD95, {}", "ASD, {}")
PAGE = Path(__file__).with_name("report_page.html")
SIDE = 560  # largest side of a picture in pixels
LIMITS = ("difference", "low", "high")
LEAST_CASES = 6  # that differ: 2 / 2^6 is the first p below 0.05 that a signed-rank test can give


class ReportError(ValueError):
    """Something that no report can be made of; the message names the file and the fix."""


@dataclasses.dataclass
class Run:
    """A run folder: what was set, logged and, after a test, scored."""

    folder: Path
    config: dict
    name: str  # told apart from the others of the page
    cell: tuple[str, str]  # data set and what was trained: equal for seeds
    log: list[dict]
    summary: dict | None
    rows: list[dict]  # of each case and class: case, class, METRICS (NaN: undefined), FLAGS
    suffix: str  # of the files of this test: '', '_last', ...
    space: str  # of the rows, where a test has several

    @property
    def unit(self) -> str:
        return (self.summary or {}).get("unit", "mm")

    @property
    def runs_dir(self) -> str:
        """Where it lies now: runs_dir/<dataset>/<method>/<teacher>-<student>/seed<k>."""
        above = self.folder.resolve().parents
        return str(above[3] if len(above) > 3 else self.folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--out", type=Path, help="HTML file to write; default: report.html in the first run"
    )
    parser.add_argument(
        "--teacher", type=Path, help="the teacher's run; default: found from the configuration"
    )
    parser.add_argument(
        "--suffix",
        default="",
        help="which test: _last, _published, _val, ... as in metrics_last.csv; default: best.pt",
    )
    parser.add_argument(
        "--space",
        choices=("resampled", "native"),
        default="resampled",
        help="as in results_table.py",
    )
    parser.add_argument(
        "--against-first",
        action="store_true",
        help="compare with the first run only, not all pairs",
    )
    parser.add_argument(
        "--data-root", help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument("--title", help="heading of the page")
    args = parser.parse_args()
    folders = list({path.resolve(): path for path in args.runs}.values())
    runs = named([read_run(folder, args.space, args.suffix) for folder in folders])
    teacher = read_run(args.teacher, args.space, "") if args.teacher else None
    out = args.out or folders[0] / "report.html"
    page = build_page(runs, teacher, args)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(
        f"report of {len(runs)} run{'s' * (len(runs) > 1)}: {out} "
        f"({out.stat().st_size / 2**20:.1f} MiB)"
    )
    return 0


# --------------------------------------------------------------------------------------------------
# reading


def read_run(folder: Path, space: str, suffix: str) -> Run:
    """The run in `folder`; ReportError if there is none."""
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: no such folder; name run folders, such as "
            "runs/btcv/acf_bckd/resunet-unet/seed0"
        )
    if (folder / "config.yaml").is_file():
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    elif (folder / "best.pt").is_file():  # imported weights
        config = load_checkpoint(folder / "best.pt").get("config", {})
    else:
        raise ReportError(
            f"{folder}: holds neither config.yaml nor best.pt; name the folder of a run, with its "
            "seed"
        )
    metrics, summary = folder / f"metrics{suffix}.csv", folder / f"summary{suffix}.json"
    if suffix and not metrics.is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("metrics*.csv"))) or "none"
        raise ReportError(
            f"{metrics}: no such scores; there are: {there}; --suffix is what follows 'metrics'"
        )
    tested = metrics.is_file() and summary.is_file()
    few_labels = "labelled" in config
    described = {
        "student": config["network"] if few_labels else config["student"],
        "method": config["method"],
        "teacher": None if few_labels or config["method"] == "supervised" else config["teacher"],
        "preset": config["preset"],
        **({"labelled": config["labelled"]} if few_labels else {}),
    }
    name = title(described) + (f" [{config['tag']}]" if config.get("tag") else "")
    return Run(
        folder=folder,
        config=config,
        name=name.replace("<-", "←"),
        cell=(config["dataset"], name),
        log=read_log(folder / "log.jsonl"),
        summary=json.loads(summary.read_text(encoding="utf-8")) if tested else None,
        rows=read_rows(metrics, space) if tested else [],
        suffix=suffix,
        space=space,
    )


def read_rows(path: Path, space: str) -> list[dict]:
    """Rows of metrics.csv as test_3d.py (of one space) or reporting.py wrote it; empty fields
    become NaN.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = {}
        for metric in METRICS:
            found = [
                name
                for name in reader.fieldnames or ()
                if name == metric or name.startswith(f"{metric}_")
            ]
            if len(found) != 1:
                raise ReportError(
                    f"{path}: expected one column of {metric}, found {found}; test the run again"
                )
            columns[metric] = found[0]
        rows = []
        for line in reader:
            if line.get("space", space) == space:
                values = {
                    metric: float(line[column] or "nan") for metric, column in columns.items()
                }
                flags = {flag: int(line[flag]) for flag in FLAGS}
                rows.append({"case": line["case"], "class": line["class"], **values, **flags})
    return rows


def named(runs: list[Run]) -> list[Run]:
    """The runs under names of their own: the seed, data set and folder are added where needed."""
    for key in ("seed", "dataset", "folder"):
        before = [run.name for run in runs]
        for run in runs:
            if before.count(run.name) > 1:
                run.name += (
                    f", seed {run.config['seed']}"
                    if key == "seed"
                    else f", {run.config.get(key, run.folder)}"
                )
    return runs


def distance(run: Run, metric: str) -> str:
    """The mean distance and, where organs failed, the one with these as the diagonal: as in
    results_table.py.
    """
    also = penalised(run.summary, run.space, metric)
    return number(own_scores(run)["mean"][metric], metric) + (
        "" if also is None else f" / {also:.2f}*"
    )


def distilled(run: Run) -> bool:
    return "labelled" not in run.config and run.config["method"] != "supervised"


def teacher_of(run: Run, given: Run | None, space: str) -> Run | None:
    """The teacher's run of a distilled one: the one `given`, or where the run's own configuration
    has it.
    """
    if not distilled(run):
        return None
    if given is not None:
        return given
    config = run.config
    checkpoint = config.get("teacher_checkpoint")
    name, seed = config["teacher"], config["teacher_seed"]
    found = run_folder(run.runs_dir, config["dataset"], "supervised", name, seed, "clean", "")
    found = Path(checkpoint).parent if checkpoint else found
    return read_run(found, space, "") if (found / "config.yaml").is_file() else None


def alone_of(run: Run, space: str) -> Run | None:
    """The same student with the same seed without a teacher, if it was trained."""
    config = run.config
    folder = run_folder(
        run.runs_dir,
        config["dataset"],
        "supervised",
        config["student"],
        config["seed"],
        "clean",
        "",
    )
    return read_run(folder, space, "") if (folder / "config.yaml").is_file() else None


# --------------------------------------------------------------------------------------------------
# the page


def build_page(runs: list[Run], teacher: Run | None, args: argparse.Namespace) -> str:
    order = [run.name for run in runs]
    teachers = {run.name: teacher_of(run, teacher, args.space) for run in runs}
    sections = [
        ("summary", "Summary", summary_section(runs)),
        ("comparison", "Comparison", comparison_section(runs, args.against_first)),
        ("teacher", "Teacher and student", teacher_section(runs, teachers, args.space)),
        ("classes", "Classes", classes_section(runs, order)),
        ("cases", "Cases", cases_section(runs)),
        ("pictures", "Pictures", pictures_section(runs, args.data_root)),
        ("training", "Training", training_section(runs, order)),
        ("validation", "Validation", validation_section(runs, order, teachers)),
        ("terms", "Loss terms", terms_section(runs, teachers)),
        ("settings", "Settings", settings_section(runs)),
    ]
    sections = [section for section in sections if section[2]]
    datasets = ", ".join(dict.fromkeys(run.config["dataset"] for run in runs))
    heading = args.title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs on {datasets}")
    links = "".join(f'<li><a href="#{key}">{text}</a></li>' for key, text, _ in sections)
    body = "\n".join(
        f'<section id="{key}"><h2>{text}</h2>\n{content}\n</section>'
        for key, text, content in sections
    )
    code = sorted({(run.summary or {}).get("code", "") for run in runs} - {""})
    made = f" Code version of the runs: {', '.join(map(escape, code))}." if code else ""
    body = (
        f"<header><h1>{escape(heading)}</h1><p class='soft'>Data set "
        f"{escape(datasets)}</p></header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav><main>{body}</main>'
        f"<footer>Made by tools/report.py from the runs' own files.{made}</footer>"
    )
    return (
        PAGE.read_text(encoding="utf-8")
        .replace("{{title}}", escape(heading))
        .replace("{{body}}", body)
    )


def summary_section(runs: list[Run]) -> str:
    dice, *others = (part.format(unit_of(runs)) for part in METRIC_TITLES)
    header = ["run", dice, "95 % interval", *others]
    header += ["missed", "false", "parameters", "GMACs", "ms/volume", "checkpoint"]
    rows, untested = [], []
    for run in runs:
        if run.summary is None:
            untested.append(run)
            continue
        summary, means = run.summary, own_scores(run)
        interval = bootstrap_interval(list(case_means({"": run.rows}, "dice")[0][""].values()))
        counts = means["counts"]
        rows.append(
            [
                run.name,
                *(number(means["mean"][m], m) for m in ("dice",)),
                "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
                number(means["mean"]["jaccard"], "jaccard"),
                *(distance(run, metric) for metric in ("hd95", "asd")),
                f"{counts['missed']} of {counts['pairs']}",
                str(counts["spurious"]),
                f"{summary['parameters']:,}",
                f"{summary['gmacs']:.2f}",
                f"{summary['ms_per_volume']:.0f}",
                f"{summary['checkpoint']}, step {summary['step']:,} of {summary['max_steps']:,}",
            ]
        )
    text = ""
    if rows:
        tested = [run.summary for run in runs if run.summary is not None]
        text = table(header, rows) + paragraph(
            "Dice and Jaccard of an organ that was missed are 0; its distances are undefined and "
            "left out of the "
            "means, so they are to be read beside the counts: 'missed' organs were not found at "
            "all, 'false' ones were "
            "predicted where there is none. The interval is a bootstrap over the cases (BCa, 9,999 "
            "resamples, seeded); "
            "it does not hold the variation between trainings."
        )
        lines = [
            line for line in notes(tested, runs[0].space) if not line.startswith("Checkpoint steps")
        ]
        text += f"<ul class='soft'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    for run in untested:
        script = "test_2d.py" if len(run.config["patch_size"]) == 2 else "test_3d.py"
        text += warning(
            f"{run.name} has no test scores.",
            [f"Make them with: python {script} --ckpt {run.folder / 'best.pt'}"],
        )
    return text


def comparison_section(runs: list[Run], against_first: bool) -> str:
    """Paired tests of the cells that were scored on the same cases; empty for fewer than two."""
    cells: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.rows:
            cells.setdefault(run.cell, []).append(run)
    if len(cells) < 2:
        return ""
    several_sets = len({dataset for dataset, _ in cells}) > 1
    names = {}
    for (dataset, name), members in cells.items():
        seeds = f" ({len(members)} seeds)" if len(members) > 1 else ""
        names[dataset, name] = (
            name.replace("<-", "←") + (f", {dataset}" if several_sets else "") + seeds
        )
    reference = next(iter(names.values())) if against_first else None
    text = ""
    ways = {
        run.name: f"{run.summary.get('protocol', 'clean')} protocol, split {run.summary['split']}, "
        f"HD95 {run.summary['hd95_definition']} in {run.unit}, empty masks "
        f"{run.summary['empty_policy']}"
        for run in runs
        if run.rows
    }
    if len(set(ways.values())) > 1:
        text += warning(
            "These runs were scored in different ways.",
            [f"{name}: {way}" for name, way in ways.items()],
        )
    least = []
    for metric in ("dice", "hd95"):
        means, left_out = case_means(
            {r.name: r.rows for r in runs if r.rows}, metric, shared=metric == "hd95"
        )
        averaged = {
            names[cell]: average_seeds([means[r.name] for r in members])
            for cell, members in cells.items()
        }
        rows = paired_comparison(averaged, reference)
        unit, factor = ("percentage points", 100.0) if metric in PERCENT else (unit_of(runs), 1.0)
        better = "higher is better" if metric in PERCENT else "lower is better"
        least += [row["least_p"] for row in rows if row["n"]]
        shown = [comparison_cells(row, factor) for row in rows]
        header = [
            "compared: second − first",
            "cases",
            "first",
            "second",
            "difference",
            "95 % interval",
        ]
        header += ["rises / falls", "effect", "p", "p, Holm"]
        drawn = [
            (
                f"{row['b']}\n− {row['a']}",
                *(None if row[key] is None else factor * row[key] for key in LIMITS),
            )
            for row in rows
            if row["n"]
        ]
        text += f"<h3>{METRICS[metric]} ({better})</h3>"
        if drawn:
            label = f"difference of mean {METRICS[metric]}, {unit}"
            text += (
                '<figure class="chart '
                f'wide">{charts.interval_chart(METRICS[metric], drawn, label)}</figure>'
            )
        text += table(header, shown)
        undefined = sum(row["undefined"] for row in rows)
        unmatched = sum(row["unmatched"] for row in rows)
        if metric == "hd95":
            text += paragraph(
                "A case is averaged over the organs whose distance is defined in all runs. Left "
                "out of every run: "
                f"{left_out} organs, each counted once for each case, that some run missed or that "
                "are absent."
            )
        if undefined or unmatched:
            text += paragraph(
                f"Summed over the pairs, {undefined} cases are left out because a score is "
                f"undefined, and {unmatched} "
                f"because only one of the two has them."
            )
    text += paragraph(
        "Each case is its mean over organs, and over seeds. p: Wilcoxon's signed-rank test of "
        "paired cases, two-sided; "
        "p, Holm: corrected for all rows of the table. Effect: matched-pairs rank-biserial "
        "correlation, from −1 (lower "
        "in every case) over 0 to 1 (higher in every case). Intervals: BCa bootstrap of the mean "
        "difference over "
        "cases, 9,999 resamples, seeded, not corrected for the number of rows."
    )
    if least and max(least) > 0.05:
        text += warning(
            f"The smallest p that so few differing cases can give is {max(least):.3g}.",
            [
                f"At least {LEAST_CASES} are needed to reach 0.05: a large p does not show that "
                "two runs are equal."
            ],
        )
    return text


def comparison_cells(row: dict, factor: float) -> list[str]:
    def scaled(value: float | None, signed: bool = False) -> str:
        return "–" if value is None else minus(f"{factor * value:{'+' if signed else ''}.2f}")

    interval = (
        "–" if row["low"] is None else f"{scaled(row['low'], True)} to {scaled(row['high'], True)}"
    )
    return [
        f"{row['b']} − {row['a']}",
        str(row["n"]),
        scaled(row["mean_a"]),
        scaled(row["mean_b"]),
        scaled(row["difference"], True),
        interval,
        f"{row['rises']} / {row['falls']}",
        "–" if row["effect"] is None else minus(f"{row['effect']:+.2f}"),
        p_value(row["p"]),
        p_value(row["p_holm"]),
    ]


def teacher_section(runs: list[Run], teachers: Mapping[str, Run | None], space: str) -> str:
    """For each distilled run, Dice of each class of teacher, student and, if it was trained, the
    student alone.
    """
    text = ""
    for run in runs:
        if not distilled(run):
            continue
        teacher, alone = teachers[run.name], alone_of(run, space)
        blocks = []
        taught = best_validation(run.log)
        of_teacher = teacher_validation(run, teacher)
        if taught and of_teacher:
            by_itself = best_validation(alone.log) if alone else None
            blocks.append(("validation cases, best step", of_teacher, by_itself, taught))
        if run.rows and teacher and same_cases(teacher, run):
            by_itself = class_scores(alone) if alone and same_cases(alone, run) else None
            blocks.append(
                (
                    f"{run.summary['split']} cases",
                    class_scores(teacher),
                    by_itself,
                    class_scores(run),
                )
            )
        text += f"<h3>{escape(run.name)}</h3>"
        if not blocks:
            text += paragraph(
                "The teacher's scores are not in the log, and its run was not found; name its "
                "folder with --teacher."
            )
        for where, *series in blocks:
            text += teacher_block(where, *series)
    return text


def teacher_block(where: str, teacher: dict, alone: dict | None, student: dict) -> str:
    classes = [name for name in student if name != "dice"]
    rows, series = (
        [],
        {
            "teacher": teacher,
            **({"student alone": alone} if alone else {}),
            "distilled student": student,
        },
    )
    for name in [*classes, "dice"]:
        values = [scores_.get(name) for scores_ in series.values()]
        first, last = values[0], values[-1]
        gap = "–" if None in (first, last) else minus(f"{100 * (last - first):+.1f}")
        closed = []
        if alone:
            full = None if None in values else first - values[1]
            closed = [
                f"{100 * (last - values[1]) / full:.0f} %" if full is not None and full > 0 else "–"
            ]
            closed[0] = minus(closed[0])
        rows.append(
            ["mean" if name == "dice" else name, *(number(v, "dice") for v in values), gap, *closed]
        )
    header = [
        "class",
        *(f"{name}, %" for name in series),
        "student − teacher",
        *(["gap closed"] if alone else []),
    ]
    drawn = {name: [percent(scores_.get(c)) for c in classes] for name, scores_ in series.items()}
    chart = charts.dot_chart(f"Dice on {where}", classes, drawn, "Dice, %")
    closed = ". Gap closed: of the distance from the student alone to the teacher" if alone else ""
    return f'<figure class="chart wide">{chart}</figure>' + table(
        header, rows, f"Dice on {where}{closed}."
    )


def classes_section(runs: list[Run], order: list[str]) -> str:
    tested = [run for run in runs if run.rows]
    if not tested:
        return ""
    names = list(dict.fromkeys(row["class"] for run in tested for row in run.rows))
    text = legend(tested, order)
    shown_order = [run.name for run in tested]
    for metric in ("dice", "hd95"):
        values = {
            name: {
                run.name: defined(row[metric] for row in run.rows if row["class"] == name)
                for run in tested
            }
            for name in names
        }
        scaled = {
            name: {
                run: [100 * v for v in found] if metric in PERCENT else found
                for run, found in each.items()
            }
            for name, each in values.items()
        }
        label = f"{METRICS[metric]}, {'%' if metric in PERCENT else unit_of(tested)}"
        text += (
            '<figure class="chart '
            f'wide">{charts.box_chart(METRICS[metric], scaled, shown_order, label)}</figure>'
        )
    text += paragraph(
        "Box: quartiles and median; whiskers: the last case within 1.5 box lengths; every case is "
        "a dot. Organs that "
        "were missed have Dice 0 and no distance: the table counts them."
    )
    several = len(tested) > 1
    header = ["class", *(["run"] * several), "cases", *METRIC_TITLES, "missed", "false", "absent"]
    rows = []
    for name in names:
        for k, run in enumerate(tested):
            own = [row for row in run.rows if row["class"] == name]
            cells = ["" if k else name, *([run.name] * several), str(len(own))]
            for metric in METRICS:
                found = defined(row[metric] for row in own)
                cells.append(number(statistics.fmean(found) if found else None, metric))
            rows.append(
                cells
                + [str(sum(row[flag] for row in own)) for flag in ("missed", "spurious", "absent")]
            )
    return text + table([part.format(unit_of(tested)) for part in header], rows)


def cases_section(runs: list[Run]) -> str:
    tested = [run for run in runs if run.rows]
    if not tested:
        return ""
    text = paragraph("Press a column's heading to sort by it, again to turn the order around.")
    if len(tested) > 1:
        means, _ = case_means({run.name: run.rows for run in tested}, "dice")
        cases = list(dict.fromkeys(case for scores_ in means.values() for case in scores_))
        last = (
            f"difference, {tested[-1].name} − {tested[0].name}"
            if len(tested) > 2
            else "second − first"
        )
        rows = []
        for case in cases:
            values = [means[run.name].get(case) for run in tested]
            first, final = values[0], values[-1]
            change = None if first is None or final is None else 100 * (final - first)
            shown = Cell("–" if change is None else minus(f"{change:+.1f}"), change)
            rows.append([Cell(case, case), *(score_cell(v, "dice") for v in values), shown])
        header = ["case", *(f"{run.name}: Dice, %" for run in tested), last]
        text += sortable(header, rows, "Mean Dice over organs of each case and run")
    for k, run in enumerate(tested):
        names = list(dict.fromkeys(row["class"] for row in run.rows))
        own: dict[str, dict[str, dict]] = {}
        for row in run.rows:
            own.setdefault(row["case"], {})[row["class"]] = row
        means = {metric: case_means({"": run.rows}, metric)[0][""] for metric in METRICS}
        rows = []
        for case, classes in own.items():
            missed = sum(row["missed"] for row in classes.values())
            each = []
            for name in names:
                row = classes.get(name)
                if row is None:
                    each.append(Cell("–", None))
                elif row["missed"]:
                    each.append(Cell("missed", 0.0, "missed", "the organ was not found: Dice 0"))
                elif row["absent"] and math.isnan(row["dice"]):
                    each.append(Cell("–", None, "", "neither there nor predicted"))
                else:
                    each.append(
                        score_cell(
                            row["dice"], "dice", "predicted where there is none" * row["spurious"]
                        )
                    )
            rows.append(
                [
                    Cell(case, case),
                    *(score_cell(means[metric][case], metric) for metric in METRICS),
                    Cell(str(missed), missed, "missed" if missed else ""),
                    *each,
                ]
            )
        header = ["case", *(part.format(run.unit) for part in METRIC_TITLES), "missed"]
        caption = f"{run.name}: means over organs, then Dice of each organ in %"
        inner = sortable([*header, *names], rows, caption)
        opened = " open" if len(tested) == 1 or k == len(tested) - 1 else ""
        text += f"<details{opened}><summary>{escape(run.name)}</summary>{inner}</details>"
    return text


def pictures_section(runs: list[Run], data_root: str | None) -> str:
    """Best, median and worst case of each tested run."""
    text = ""
    for run in runs:
        if not run.rows:
            continue
        means = {
            case: v
            for case, v in case_means({"": run.rows}, "dice")[0][""].items()
            if v is not None
        }
        ranked = sorted(means, key=means.__getitem__)
        if not ranked:
            continue
        picked: dict[str, str] = {}
        for what, case in (
            ("best", ranked[-1]),
            ("median", ranked[(len(ranked) - 1) // 2]),
            ("worst", ranked[0]),
        ):
            picked[case] = f"{picked[case]}, {what}" if case in picked else what
        content, problem, legend_of = "", "", {}
        checkpoint = None
        for case, what in picked.items():
            caption = f"{what}: {case}, Dice {100 * means[case]:.1f} %"
            try:
                checkpoint = checkpoint or checkpoint_of(run, data_root)
                views = views_of(checkpoint, [run.folder / f"predictions{run.suffix}"], case)
            except (ValueError, OSError) as error:  # no data, no prediction, or one of another grid
                problem = problem or " ".join(str(error).split())
                content += stored_overlay(run, case, caption)
            else:
                content += view_figures(views, caption)
                legend_of |= {k: views.names[k - 1] for k in views.present}
        text += f"<h3>{escape(run.name)}</h3>"
        if legend_of:
            colours = figures.palette(max(legend_of) + 1)
            marks = [
                '<li><span class="swatch" '
                f'style="background:rgb({",".join(str(round(255 * c)) for c in colours[k])})">'
                f"</span>{escape(legend_of[k])}</li>"
                for k in sorted(legend_of)
            ]
            text += f'<ul class="legend">{"".join(marks)}</ul>'
        text += content
        if not content:
            script = "test_2d.py" if len(run.config["patch_size"]) == 2 else "test_3d.py"
            text += warning(
                "No pictures: they need predictions and the data set, or overlays.",
                [
                    problem,
                    f"Make overlays with: python {script} --ckpt {run.folder / 'best.pt'} "
                    "--overlays",
                ],
            )
    return text


def checkpoint_of(run: Run, data_root: str | None) -> dict:
    """Of the tested file; CheckpointError if it does not say which data it was made for."""
    path = run.folder / run.summary["checkpoint"]
    checkpoint = load_checkpoint(path)
    if "dataset" not in checkpoint or "kind" not in checkpoint:
        raise CheckpointError(f"{path}: does not say which data it was trained on")
    if data_root:
        checkpoint["dataset"] = checkpoint["dataset"] | {"root": data_root}
    return checkpoint


def view_figures(views: Views, caption: str) -> str:
    parts = ""
    for name, picture in zip(("image", "ground truth", "prediction"), views.pictures):
        image = Image.fromarray(picture)
        factor = min(1.0, SIDE / max(image.width, image.height * views.aspect))
        if image.width * factor < SIDE / 2:  # small slices are shown larger, voxel by voxel
            factor = max(1, SIDE // 2 // image.width)
        size = (
            max(1, round(image.width * factor)),
            max(1, round(image.height * factor * views.aspect)),
        )
        image = image.resize(
            size, Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
        )
        text = f"{name} of the case: {caption}"
        parts += (
            f'<figure><img alt="{escape(text)}" '
            f'src="{inline(image)}"><figcaption>{name}</figcaption></figure>'
        )
    return f'<div class="cases"><h4>{escape(caption + views.place)}</h4>{parts}</div>'


def stored_overlay(run: Run, case: str, caption: str) -> str:
    """The picture of a test with --overlays, in one piece; '' if there is none."""
    path = run.folder / f"overlays{run.suffix}" / f"{case}.png"
    if not path.is_file():
        return ""
    image = Image.open(path).convert("RGB")
    image.thumbnail((3 * SIDE, SIDE))
    return (
        f'<div class="cases"><h4>{escape(caption)}</h4><figure class="whole"><img '
        f'alt="{escape(caption)}" '
        f'src="{inline(image)}"><figcaption>image, ground truth, '
        "prediction</figcaption></figure></div>"
    )


def training_section(runs: list[Run], order: list[str]) -> str:
    """One chart for each figure of the 'train' lines, all runs in it."""
    series = series_of(runs, "train")
    if not series:
        return paragraph("No run has a log.jsonl with training steps.")
    keys = [
        "loss",
        *(key for key in series if key not in ("loss", "lr")),
        *(["lr"] if "lr" in series else []),
    ]
    titles = {"loss": "loss, all terms", "lr": "learning rate"}
    drawn = [
        charts.line_chart(
            titles.get(key, key),
            series[key],
            order,
            "learning rate" if key == "lr" else "mean value",
        )
        for key in keys
        if key in series
    ]
    text = paragraph("Means since the line of the log before; terms with their weights.")
    return text + legend(runs, order) + grid(drawn)


def validation_section(
    runs: list[Run], order: list[str], teachers: Mapping[str, Run | None]
) -> str:
    """Dice on the validation cases over steps; the teacher's as a line where all distilled runs
    have the same one.
    """
    series = series_of(runs, "val")
    if not series:
        return ""
    known = [teacher_validation(run, teachers[run.name]) for run in runs if distilled(run)]
    common = known[0] if known and all(known) and all(k == known[0] for k in known) else {}
    drawn = []
    for key, values in series.items():
        level = common.get(key)
        drawn.append(
            charts.line_chart(
                "mean Dice" if key == "dice" else key,
                {run: [(s, 100 * v) for s, v in p] for run, p in values.items()},
                order,
                "Dice, %",
                marks=True,
                reference=None if level is None else ("teacher", 100 * level),
            )
        )
    return legend(runs, order) + grid(drawn)


def terms_section(runs: list[Run], teachers: Mapping[str, Run | None]) -> str:
    """Of each run with several terms: warnings, shares of loss and gradient, norms and
    directions.
    """
    text = ""
    for run in runs:
        entries = list(run.log)
        if distilled(run) and not any(entry["kind"] == "teacher" for entry in entries):
            known = teacher_validation(run, teachers[run.name])
            entries += [{"step": 0, "kind": "teacher", **known}] if known else []
        history = {
            f: term_history(entries, f) for f in ("loss_share", "grad_share", "grad_norm", "cosine")
        }
        found = findings(entries)
        measured = bool(history["grad_share"])
        if not measured and not found and not distilled(run):
            continue
        text += f"<h3>{escape(run.name)}</h3>"
        if found:
            text += warning("Worth a look", [sentence(line) for line in found])
        elif measured:
            text += paragraph("No term is negligible, dominates or works against the first one.")
        if not measured:
            text += paragraph(
                "Gradients of the terms were not measured: the key diagnose_interval sets how "
                "often."
            )
            continue
        order = list(history["grad_share"])
        marks = "".join(
            f"<li>{charts.swatch(k, 'area')}{escape(name)}</li>" for k, name in enumerate(order)
        )
        text += f'<ul class="legend">{marks}</ul>' + grid(
            [
                charts.share_chart("share of the loss", history["loss_share"], order),
                charts.share_chart("share of the gradient norm", history["grad_share"], order),
                charts.line_chart(
                    "gradient norm", positive(history["grad_norm"]), order, "L2 norm", log=True
                ),
                *(
                    [
                        charts.line_chart(
                            f"direction beside {order[0]}",
                            history["cosine"],
                            order,
                            "cosine of gradients",
                            reference=("", 0.0),
                        )
                    ]
                    if history["cosine"]
                    else []
                ),
            ]
        )
        rows = []
        for name in order:
            share = [value for _, value in history["grad_share"][name]]
            cells = [name]
            for figure in ("loss_share", "grad_share"):
                values = [value for _, value in history[figure].get(name, [])]
                cells.append(f"{100 * statistics.median(values):.1f}" if values else "–")
            cosine = [value for _, value in history["cosine"].get(name, [])]
            cells += [f"{100 * min(share):.1f} to {100 * max(share):.1f}"]
            rows.append(
                [
                    *cells,
                    minus(f"{statistics.median(cosine):+.2f}") if cosine else "–",
                    str(len(share)),
                ]
            )
        header = [
            "term",
            "share of the loss, %",
            "share of the gradient, %",
            "range, %",
            f"cosine with {order[0]}",
        ]
        text += table([*header, "measurements"], rows)
    if text:
        text += paragraph(
            "Medians over the measured steps. The gradient of each term is that with respect to "
            "the trained network's "
            "parameters, before the optimiser; a share is the term's norm over the sum of the "
            "norms of all terms. "
            "Cosine 1: the term asks for the same change as the first term, 0: an unrelated one, "
            "−1: the opposite."
        )
    return text


def settings_section(runs: list[Run]) -> str:
    text = ""
    if len(runs) > 1:
        keys = dict.fromkeys(key for run in runs for key in run.config)
        differing = [
            key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1
        ]
        rows = [[key, *(short(run.config.get(key)) for run in runs)] for key in differing]
        text += "<h3>What differs</h3>" + table(["key", *(run.name for run in runs)], rows)
    for run in runs:
        listing = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        text += (
            f"<details><summary>{escape(run.name)}</summary><p "
            f"class='soft'>{escape(str(run.folder))}</p>"
        )
        text += f"<pre>{escape(listing)}</pre></details>"
    return text


# --------------------------------------------------------------------------------------------------
# parts


def own_scores(run: Run) -> dict:
    """Means and counts of the rows that are shown: of their space."""
    return scores(run.summary, run.space)


def teacher_validation(run: Run, teacher: Run | None) -> dict | None:
    """The teacher's Dice on the validation cases: from the run's own log, or the teacher's best
    step.
    """
    line = next((entry for entry in run.log if entry["kind"] == "teacher"), None)
    if line is not None:
        return {key: value for key, value in line.items() if key not in ("step", "kind")}
    return best_validation(teacher.log) if teacher else None


def best_validation(log: list[dict]) -> dict | None:
    """Scores of the validation with the highest mean Dice."""
    lines = [entry for entry in log if entry["kind"] == "val" and entry.get("dice") is not None]
    if not lines:
        return None
    return {
        k: v
        for k, v in max(lines, key=lambda entry: entry["dice"]).items()
        if k not in ("step", "kind")
    }


def class_scores(run: Run) -> dict[str, float | None]:
    """Mean Dice of each class, and under 'dice' the mean over cases."""
    names = dict.fromkeys(row["class"] for row in run.rows)
    found = {
        name: defined(row["dice"] for row in run.rows if row["class"] == name) for name in names
    }
    cases = defined(case_means({"": run.rows}, "dice")[0][""].values())
    return {
        "dice": statistics.fmean(cases) if cases else None,
        **{name: statistics.fmean(values) if values else None for name, values in found.items()},
    }


def same_cases(one: Run, other: Run) -> bool:
    return {row["case"] for row in one.rows} == {row["case"] for row in other.rows}


def series_of(runs: list[Run], kind: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Figures of a kind of log lines: key -> run -> (updates done, value); undefined values are
    left out.
    """
    series: dict[str, dict[str, list]] = {}
    for run in runs:
        for entry in run.log:
            if entry["kind"] == kind:
                for key, value in entry.items():
                    if key not in ("step", "kind") and value is not None:
                        series.setdefault(key, {}).setdefault(run.name, []).append(
                            (entry["step"] + 1, value)
                        )
    return series


def positive(history: Mapping[str, list]) -> dict[str, list]:
    """Without what a logarithmic axis cannot show."""
    kept = {
        name: [(step, value) for step, value in points if value > 0]
        for name, points in history.items()
    }
    return {name: points for name, points in kept.items() if points}


def defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not math.isnan(value)]


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def unit_of(runs: Sequence[Run]) -> str:
    return "/".join(sorted({run.unit for run in runs if run.summary is not None})) or "mm"


def legend(runs: Sequence[Run], order: Sequence[str]) -> str:
    """Which line is which run; nothing to say of one run."""
    if len(order) < 2:
        return ""
    items = "".join(
        f"<li>{charts.swatch(order.index(run.name))}{escape(run.name)}</li>" for run in runs
    )
    return f'<ul class="legend">{items}</ul>'


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ReportError, CheckpointError) as problem:
        sys.exit(f"error: {problem}")
