"""What was measured, as lines of results/*.jsonl, and the tables and figures of RESULTS.md and
results/NOTES.md made of them.

    # add tested runs to a file
    python tools/evidence.py collect results/hippocampus.jsonl runs/hippocampus
    python tools/evidence.py tables                       # write every table anew
    python tools/evidence.py tables --check  # status 1 if one is not what the files give
    python tools/evidence.py figures --out docs/figures

A file begins with the names of its cases. Each further line is a run: the command that trained it,
its settings and commit, the mean scores of test_3d.py or test_2d.py, those of every case (means
over the classes, in the order of the names; null: undefined) and the validation Dice in the course
of training. Dice and Jaccard in %, distances in mm or, for few-label data, voxels. A table stands
in a document below a line `<!-- evidence: FILE TABLE ARGUMENTS -->`.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import yaml
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from metrics import SHOWN
from reporting import score_columns
from tools.report_charts import COLOURS, colour, dash
from tools.tables import (
    TEACHERS,
    Results,
    gap_closed,
    in_unit,
    joined,
    kd_cells,
    make_table,
    mean,
    percent,
    published_gap,
    read,
    read_summary,
    row_of,
    same_seeds,
    title,
)
from utils.checkpoint import read_table, write_text, write_whole
from utils.config import escaped, read_yaml
from utils.run import plain
from utils.runlog import read_log
from utils.scripts import run_tool

# How runs are scored: what test_3d.py and test_2d.py do without flags
SCORING = {
    "hd95_definition": "pooled",
    "empty_policy": "nan",
    "tta": False,
    "amp": "off",
    "protocol": "clean",
}
DESCRIBED = (
    *("dataset", "method", "preset", "teacher", "student", "labelled", "seed", "tag"),
    *("trained_on", "agreement"),
    *("step", "max_steps", "split", "selected_on_reported"),
)
EMPTY_AGREES = "agree"  # empty_policy of few-label runs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("collect", help="add tested runs to a file")
    adding.add_argument(
        "file", type=Path, help="results/NAME.jsonl; lines of the same runs are replaced"
    )
    adding.add_argument("folders", type=Path, nargs="+", help="every summary.json below them")
    writing = commands.add_parser("tables", help="write the tables of the documents anew")
    writing.add_argument(
        "--document", type=Path, nargs="+", default=[Path("RESULTS.md"), Path("results/NOTES.md")]
    )
    writing.add_argument(
        "--results", type=Path, default=Path("results"), help="folder of the files"
    )
    writing.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if a table differs"
    )
    drawing = commands.add_parser("figures", help="gap closed by each method, learning curves")
    drawing.add_argument("--results", type=Path, default=Path("results"))
    drawing.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    try:
        if args.command == "collect":
            return collect(args.file, args.folders)
        if args.command == "figures":
            return figures(args.results, args.out)
        # every document is written or checked, also where an earlier one differs
        return max([tables(document, args.results, args.check) for document in args.document])
    except ValueError as error:
        sys.exit(escaped(f"error: {error}"))


# --- collecting ---


def collect(file: Path, folders: Iterable[Path]) -> int:
    cases, rows = read(file) if file.exists() else ([], [])
    found = {row["run"]: row for row in rows}
    summaries = sorted({path for folder in folders for path in folder.rglob("summary.json")})
    if not summaries:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no summary.json; test runs with test_3d.py or "
            "test_2d.py"
        )
    for path in summaries:
        scored, row = compact(path.parent)
        cases = cases or scored
        if scored != cases:
            raise ValueError(
                f"{path}: scored on other cases than the runs of {file}; take another file"
            )
        found[row["run"]] = row
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"cases": cases}, *(found[run] for run in sorted(found))]
    text = "".join(json.dumps(line, separators=(", ", ": ")) + "\n" for line in lines)
    write_text(file, text)
    print(f"{len(summaries)} runs read, {len(found)} in {file}")
    return 0


def compact(run: Path) -> tuple[list[str], dict]:
    """Names of the cases, and the line of a run folder that was tested."""
    summary, config = read_summary(run / "summary.json"), read_yaml(run / "config.yaml")
    missing = {
        "native",
        "split",
        "selected_on_reported",
        "hd95_definition",
        "empty_policy",
    } - summary.keys()
    if missing:
        raise ValueError(
            f"{run}: summary.json lacks {', '.join(sorted(missing))}; test the run again"
        )
    for key, usual in SCORING.items():
        few_labels = key == "empty_policy" and summary[key] == EMPTY_AGREES
        if summary.get(key, usual) != usual and not few_labels:
            raise ValueError(
                f"{run}: scored with {key} {summary[key]!r}, not {usual!r}; test it without flags "
                "again"
            )
    row, cases = row_of(summary), case_scores(run / "metrics.csv")
    penalised = row.get("penalised", {})
    if None in map(rounded, penalised.values()):
        raise ValueError(f"{run}: summary.json lacks the penalised distances; test the run again")
    seconds, date = time_of(run)
    curve = [
        [entry["step"] + 1, round(100 * entry["dice"], 2)]
        for entry in read_log(run / "log.jsonl")
        if entry["kind"] == "val" and entry["dice"] is not None
    ]
    line = {
        "run": "/".join(run.resolve().parts[-4:]),
        "command": command_of(config),
        **{key: summary[key] for key in DESCRIBED if key in summary},
        "lr": config["lr"],
        "parameters": summary["parameters"],
        "gmacs": round(summary["gmacs"], 4),
        "hd95": summary["hd95_definition"],
        **{key: row[key] for key in ("missed", "spurious", "pairs")},
        "mean": {key: rounded(row["mean"][key]) for key in SHOWN if key in row["mean"]},
        **({"penalised": {k: rounded(v) for k, v in penalised.items()}} if penalised else {}),
        "cases": {
            key: [rounded(in_unit(of_case[key], key)) for of_case in cases.values()]
            for key in next(iter(cases.values()))
        },
        "curve": curve,
        "device": summary["device"],
        "threads": summary["threads"],
        "seconds": seconds,
        "code": summary["code"],
        "date": date,
    }
    return list(cases), line


def rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 3)


def case_scores(path: Path) -> dict[str, dict[str, float | None]]:
    """Case -> metric -> mean over the classes in which it is defined, of a metrics.csv."""
    header, *lines = read_table(path) or [[]]
    rows = [dict(zip(header, line)) for line in lines]
    rows = [row for row in rows if row.get("space", "resampled") == "resampled"]
    if not rows:
        raise ValueError(f"{path}: no rows")
    columns = score_columns(rows[0])
    columns = {metric: columns[metric] for metric in SHOWN if metric in columns}
    found: dict[str, dict] = {}
    for row in rows:
        of_case = found.setdefault(row["case"], {metric: [] for metric in columns})
        for metric, column in columns.items():
            if row[column] not in ("", "nan"):
                of_case[metric].append(float(row[column]))
    for of_case in found.values():
        for metric, values in of_case.items():
            of_case[metric] = statistics.fmean(values) if values else None
    return found


def time_of(run: Path) -> tuple[int, str]:
    """Seconds of the training, validation included, and its last day, by its TensorBoard files: one
    for each start.

    Of a copy without such files, which must have been started once only (--resume writes both files
    anew): from the writing of its configuration to the last line of its log.
    """
    starts = []
    for path in run.glob("events.out.tfevents.*"):
        if times := [event.wall_time for event in LegacyEventFileLoader(str(path)).Load()]:
            starts.append((min(times), max(times)))
    if not starts:
        begin, end = ((run / name).stat().st_mtime for name in ("config.yaml", "log.jsonl"))
        if end <= begin:
            raise ValueError(
                f"{run}: no TensorBoard file says when it was trained, and log.jsonl is no younger "
                "than config.yaml; "
                f"copy run folders with their times (cp -p, tar, rsync -t)"
            )
        starts.append((begin, end))
    last = datetime.date.fromtimestamp(max(end for _, end in starts))
    return round(sum(end - begin for begin, end in starts)), last.isoformat()


def command_of(config: Mapping) -> str:
    """The shortest command that trains with a run's config.yaml, from configs/<dataset>.yaml."""
    module = train_3d_distill
    if "student" not in config:
        module = train_2d_crkd if len(config["patch_size"]) == 2 else train_3d_crkd
    flags = ["--config", f"configs/{config['dataset']}.yaml", "--method", config["method"]]
    if module is train_3d_distill:
        flags += ["--teacher", config["teacher"]] if config["method"] != "supervised" else []
        flags += ["--student", config["student"]]
    if config.get("labelled") is not None:
        flags += ["--labelled", str(config["labelled"])]
    flags += ["--seed", str(config["seed"])]
    # The patch is given along, since the network may refuse that of the file.
    file = yaml.safe_load(Path(flags[1]).read_text(encoding="utf-8"))
    usual = module.parse_args([*flags, "--opts", f"patch_size={flow(config['patch_size'])}"])[1]
    values = {key: plain(value) for key, value in dataclasses.asdict(usual).items()}
    values["patch_size"] = file["patch_size"]
    options = [f"{key}={flow(value)}" for key, value in config.items() if value != values.get(key)]
    words = [f"python {Path(module.__file__).name}", shlex.join(flags)]
    return " ".join([*words, *(["--opts", shlex.join(options)] if options else [])])


def flow(value) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


# --- the document ---


def tables(document: Path, results: Path, check: bool) -> int:
    text = document.read_text(encoding="utf-8")
    marker = re.compile(
        r"(<!-- evidence: (\w+) (\w+)((?: \w+)*) -->\n)((?:(?!<!-- evidence:).)*?)(?=<!-- end -->)",
        re.S,
    )
    if text.count("<!-- evidence:") != len(marker.findall(text)):
        raise ValueError(
            f"{document}: a line '<!-- evidence: FILE TABLE ARGUMENTS -->' is misspelt or has no "
            "end"
        )
    written = marker.sub(
        lambda m: m[1] + make_table(results / f"{m[2]}.jsonl", m[3], m[4].split()), text
    )
    if check:
        differs = [
            m[0].split("\n")[0]
            for m, n in zip(marker.finditer(text), marker.finditer(written))
            if m[0] != n[0]
        ]
        for line in differs:
            print(
                f"{document}: {line}: not what results/ gives; run: python tools/evidence.py tables"
            )
        return 1 if differs else 0
    write_text(document, written)
    print(f"{len(marker.findall(text))} tables in {document}")
    return 0


# --- figures ---


def figures(results: Path, out: Path) -> int:
    drawn = {}
    if (file := results / "hippocampus.jsonl").exists():
        found = Results(*read(file))
        drawn |= {"results_gap.png": gap_figure(found), "results_curves.png": curves_figure(found)}
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        settings = {"dpi": 110, "format": "png", "metadata": {"Software": None}}
        write_whole(out / name, functools.partial(figure.savefig, **settings))
        print(f"figure in {out / name}")
    return 0


def panels(results: Results, height: float) -> tuple[Figure, list[tuple]]:
    """A figure, and (axes, teacher, its name) for each teacher under which a method was run; one at
    least.
    """
    taught = {row["teacher"] for row in results.rows}
    taught_by = {key: name for key, name in TEACHERS.items() if key in taught} or dict(
        [next(iter(TEACHERS.items()))]
    )
    figure = Figure(figsize=(1.5 + 4 * len(taught_by), height), layout="constrained")
    axes = figure.subplots(1, len(taught_by), sharey=True, squeeze=False)[0]
    return figure, [(each, *teacher) for each, teacher in zip(axes, taught_by.items())]


def gap_figure(results: Results) -> Figure:
    """Share of the gap between student and teacher that each method closes, ours beside the
    published.

    A mark is a seed, compared with the student alone of the same seed.
    """
    figure, found = panels(results, 3.8)
    low, high = -60, 130
    for axes, teacher, name in found:
        alone, above = results.alone("unet"), mean(results.alone(teacher), "dice")
        methods = kd_cells(results, teacher)
        for place, (method, rows) in enumerate(methods.items()):
            gap = gap_closed(mean(rows, "dice"), mean(same_seeds(alone, rows), "dice"), above)
            if gap is not None:
                axes.barh(place + 0.2, gap, 0.36, color=COLOURS[0])
                of_seeds = [
                    gap_closed(mean([r], "dice"), mean(same_seeds(alone, [r]), "dice"), above)
                    for r in rows
                ]
                axes.plot(of_seeds, [place + 0.2] * len(rows), "|", color="black", markersize=7)
                if gap < low:
                    axes.text(
                        low + 2, place + 0.2, percent(gap), color="white", va="center", size=7
                    )
            if (published := published_gap("btcv", method, teacher)) is not None:
                axes.barh(
                    place - 0.2,
                    published,
                    0.36,
                    color=COLOURS[4],
                    hatch="///",
                    edgecolor="white",
                    linewidth=0,
                )
        axes.barh(0, 0, color=COLOURS[0], label="hippocampus MRI, here")
        axes.barh(0, 0, color=COLOURS[4], hatch="///", edgecolor="white", label="BTCV, published")
        axes.set(
            title=f"teacher {name}",
            xlabel="gap closed (%)",
            xlim=(low, high),
            ylim=(-0.6, len(methods) - 0.4),
        )
        axes.set_yticks(range(len(methods)), [title(method) for method in methods])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
        axes.legend(fontsize=8, loc="lower right", framealpha=1)
    return figure


def curves_figure(results: Results) -> Figure:
    """Validation Dice in the course of training: every method with each teacher, means over the
    seeds.

    The student alone has the seeds that any method of the panel has.
    """
    figure, found = panels(results, 4.2)
    ends = []
    for axes, teacher, name in found:
        cells = kd_cells(results, teacher, weaker=False)
        cells = {title(method): rows for method, rows in cells.items()}
        alone = same_seeds(results.alone("unet"), joined(cells.values()))
        cells = {"student alone": alone} | cells
        for index, (label, rows) in enumerate(cells.items()):
            at: dict[int, list[float]] = {}
            for row in rows:
                for step, dice in row["curve"]:
                    at.setdefault(step, []).append(dice)
            values = [statistics.fmean(at[step]) for step in sorted(at)]
            if values:
                ends.append(values[-1])
                axes.plot(
                    sorted(at),
                    values,
                    color="black" if not index else colour(index - 1),
                    linestyle=dash(index),
                    marker="o",
                    markersize=3,
                    linewidth=1.5,
                    label=label,
                )
        axes.set(title=f"teacher {name}", xlabel="step", ylabel="validation Dice (%)")
        axes.grid(linewidth=0.4)
        axes.legend(fontsize=7, ncols=2, loc="lower right")
    if ends:  # the beginnings, from nothing, would leave no room for the ends
        axes.set_ylim(max(0, statistics.median(ends) - 25), max(ends) + 2)
    return figure


if __name__ == "__main__":
    sys.exit(run_tool(main))
