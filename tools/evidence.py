"""What was measured, as lines of results/*.jsonl, and the tables and figures of RESULTS.md made of
them.

    # add tested runs to a file
    python tools/evidence.py collect results/hippocampus.jsonl runs/hippocampus
    python tools/evidence.py tables                       # write every table of RESULTS.md anew
    python tools/evidence.py tables --check  # status 1 if one is not what the files give
    python tools/evidence.py figures --out docs/figures

A file begins with the names of its cases. Each further line is a run: the command that trained it,
its settings and commit, the mean scores of test_3d.py or test_2d.py, those of every case (means
over the classes, in the order of the names; null: undefined) and the validation Dice in the course
of training. Dice and Jaccard in %, distances in mm or, for few-label data, voxels. A table stands
in RESULTS.md below a line `<!-- evidence: FILE TABLE ARGUMENTS -->`.

Means and population standard deviations are over seeds. Paired tests (utils/statistics.py) take the
cases as the sample, the seeds averaged case by case; p values are Holm's over the rows of a table.
"""

import argparse
import csv
import dataclasses
import datetime
import functools
import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
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
from dataloaders.cases import patient_function
from tools.report_charts import COLOURS, colour, dash
from tools.results_table import (
    METHODS,
    METRICS,
    PUBLISHED,
    PUBLISHED_SSL,
    RIVALS,
    STUDENTS,
    TEACHERS,
)
from utils.checkpoint import write_text
from utils.config import ConfigError
from utils.run import plain
from utils.runlog import read_log
from utils.statistics import average_seeds, holm, paired_comparison

# How runs are scored: what test_3d.py and test_2d.py do without flags
SCORING = {
    "hd95_definition": "pooled",
    "empty_policy": "nan",
    "tta": False,
    "amp": "off",
    "protocol": "clean",
}
EMPTY_AGREES = "agree"  # empty_policy of few-label runs
NAMES = {
    "supervised": "labels alone",
    "acf_bckd": "ACF-BCKD",
    "unimatch": "UniMatch",
    "crossmatch": "CrossMatch",
    "lefed": "LeFeD",
    "acmt": "AC-MT",
    "acf_bckd sum": "ACF-BCKD, weaker",
}
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
Rows = Sequence[dict]


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
    writing = commands.add_parser("tables", help="write the tables of a document anew")
    writing.add_argument("--document", type=Path, default=Path("RESULTS.md"))
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
        return tables(args.document, args.results, args.check)
    except (ValueError, OSError, ConfigError) as error:
        sys.exit(f"error: {error}")


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


def read(file: Path) -> tuple[list[str], list[dict]]:
    """Case names and runs of a file."""
    try:
        first, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if any(not row["curve"] or "lr" not in row for row in rows):
            raise ValueError("a line without a learning rate or curve")
        return first["cases"], rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of tools/evidence.py collect ({error})") from None


def compact(run: Path) -> tuple[list[str], dict]:
    """Names of the cases, and the line of a run folder that was tested."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
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
        if summary.get(key, usual) not in (
            usual,
            *((EMPTY_AGREES,) if key == "empty_policy" else ()),
        ):
            raise ValueError(
                f"{run}: scored with {key} {summary[key]!r}, not {usual!r}; test it without flags "
                "again"
            )
    scores = summary.get("resampled", summary["native"])
    cases = case_scores(run / "metrics.csv")
    counts = scores["counts"]
    failed = counts["missed"] + counts["spurious"]
    seconds, date = time_of(run)
    curve = [
        [entry["step"] + 1, round(100 * entry["dice"], 2)]
        for entry in read_log(run / "log.jsonl")
        if entry["kind"] == "val" and entry["dice"] is not None
    ]
    row = {
        "run": "/".join(run.resolve().parts[-4:]),
        "command": command_of(config),
        **{key: summary[key] for key in ("dataset", "method", "preset", "teacher", "student")},
        **({"labelled": summary["labelled"]} if "labelled" in summary else {}),
        **{
            key: summary[key]
            for key in ("seed", "tag", "step", "max_steps", "split", "selected_on_reported")
        },
        "lr": config["lr"],
        "parameters": summary["parameters"],
        "gmacs": round(summary["gmacs"], 4),
        "hd95": summary["hd95_definition"],
        "missed": counts["missed"],
        "spurious": counts["spurious"],
        "pairs": counts["pairs"],
        "mean": {key: rounded(scores["mean"][key], key) for key in METRICS},
        **(
            {
                "penalised": {
                    key: rounded(value, key)
                    for key, value in scores["penalised"]["mean"].items()
                    if key in METRICS
                }
            }
            if failed
            else {}
        ),
        "cases": {
            key: [rounded(of_case[key], key) for of_case in cases.values()] for key in METRICS
        },
        "curve": curve,
        "device": summary["device"],
        "threads": summary["threads"],
        "seconds": seconds,
        "code": summary["code"],
        "date": date,
    }
    return list(cases), row


def rounded(value: float | None, metric: str) -> float | None:
    return None if value is None or value != value else round(METRICS[metric] * value, 3)


def case_scores(path: Path) -> dict[str, dict[str, float | None]]:
    """Case -> metric -> mean over the classes in which it is defined, of a metrics.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("space", "resampled") == "resampled"]
    if not rows:
        raise ValueError(f"{path}: no rows")
    columns = {
        metric: next(name for name in rows[0] if name.startswith(metric)) for metric in METRICS
    }
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of_case = found.setdefault(row["case"], {metric: [] for metric in METRICS})
        for metric, column in columns.items():
            if row[column] not in ("", "nan"):
                of_case[metric].append(float(row[column]))
    return {
        case: {
            metric: statistics.fmean(values) if values else None
            for metric, values in of_case.items()
        }
        for case, of_case in found.items()
    }


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
    last = max(end for _, end in starts)
    return round(sum(end - begin for begin, end in starts)), datetime.date.fromtimestamp(
        last
    ).isoformat()


def command_of(config: Mapping) -> str:
    """The shortest command that trains with a run's config.yaml, from configs/<dataset>.yaml."""
    module = train_3d_distill
    if "labelled" in config:
        module = train_2d_crkd if len(config["patch_size"]) == 2 else train_3d_crkd
    flags = ["--config", f"configs/{config['dataset']}.yaml", "--method", config["method"]]
    if module is train_3d_distill:
        flags += ["--teacher", config["teacher"]] if config["method"] != "supervised" else []
        flags += ["--student", config["student"]]
    elif config["labelled"] is not None:
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
    return (
        yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    )


# --- tables ---


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
    document.write_text(written, encoding="utf-8")
    print(f"{len(marker.findall(text))} tables in {document}")
    return 0


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
    of = "" if len(gpus) == len(rows) else f"{len(gpus)} of them "
    text = (
        f"{len(rows)} training{'s' * (len(rows) > 1)} of {minutes:.0f} minutes together, "
        + (f"{of}tested on {' and '.join(sorted(set(gpus)))}, " if gpus else "")
        + (
            f"{cases} {'/'.join(sorted({row['split'] for row in rows}))} cases; "
            if cases is not None
            else ""
        )
        + f"{' to '.join(dates[:1] + dates[1:][-1:])}; "
        f"commit {', '.join(sorted({row['code'] for row in rows}))}."
    )
    if cases is None:
        return [text]
    if any(row["selected_on_reported"] for row in rows):
        text += " best.pt was selected on these same cases."
    if any("penalised" in row for row in rows):
        text += (
            " *: distances with a missed or wrongly predicted structure as the diagonal; compare "
            "runs by these."
        )
    return [text]


class Results:
    """The runs of a file by cell. Of runs that differ in the learning rate only, a cell has the
    best on validation.
    """

    def __init__(self, cases: Sequence[str], rows: Rows) -> None:
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
        """Score of every patient: the mean over the seeds and over the patient's cases, which are
        no sample of two.
        """
        of_case = average_seeds([dict(zip(self.cases, row["cases"][metric])) for row in rows])
        patients: dict[str, list[float | None]] = {}
        for case, value in of_case.items():
            patients.setdefault(self.patient(case), []).append(value)
        return {
            patient: None if None in values else statistics.fmean(values)
            for patient, values in patients.items()
        }

    def compared(self, reference: Rows, others: Mapping[str, Rows]) -> dict[str, dict]:
        """Paired comparison of the Dice of each with a reference, over the seeds that both have;
        Holm over all.
        """
        pairs = {}
        for name, rows in others.items():
            seeds = {row["seed"] for row in rows} & {row["seed"] for row in reference}
            if seeds:
                sides = (
                    [row for row in side if row["seed"] in seeds] for side in (reference, rows)
                )
                scores = dict(
                    zip(("reference", name), (self.by_patient(side, "dice") for side in sides))
                )
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
    s600-lr0.05-afd.
    """
    return "-".join(word for word in row["tag"].split("-") if not re.fullmatch(RECIPE, word))


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


def mean(rows: Rows, metric: str) -> float | None:
    values = [row["mean"][metric] for row in rows]
    return statistics.fmean(values) if values and None not in values else None


def shown(rows: Rows, metric: str) -> str:
    """83.61 ± 0.12, 83.61 of one run, 1.73 (2.10*) with the penalised mean, '-' if undefined, or
    'not run'.
    """
    if not rows:
        return "not run"
    average = mean(rows, metric)
    text = "-" if average is None else f"{average:.2f}"
    if len(rows) > 1 and average is not None:
        text += f" ± {statistics.pstdev(row['mean'][metric] for row in rows):.2f}"
    if metric in ("hd95", "asd") and any("penalised" in row for row in rows):
        text += (
            f" ({statistics.fmean(row.get('penalised', row['mean'])[metric] for row in rows):.2f}*)"
        )
    return text


def together(rows: Rows, metrics: Sequence[str]) -> str:
    return " / ".join(shown(rows, metric) for metric in metrics) if rows else "not run"


def gap_closed(student: float | None, alone: float | None, teacher: float | None) -> float | None:
    """Share in % of the distance from the student alone to its teacher that a method makes up for.

    None where the teacher is not at least a point above: a share of next to nothing says nothing.
    """
    if None in (student, alone, teacher) or teacher - alone < 1:
        return None
    return 100 * (student - alone) / (teacher - alone)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{round(value)} %"


def shown_p(value: float | None) -> str:
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def title(name: str) -> str:
    return NAMES.get(name, name.upper())


@functools.cache
def published_kd() -> dict:
    return yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))


def alone_table(results: Results) -> tuple[list[str], list[list[str]], list[dict]]:
    """Teachers and students without a teacher."""
    figures_ = published_kd()
    body, used = [], []
    for network, name in {**TEACHERS, **STUDENTS}.items():
        rows = results.alone(network)
        used += rows
        size = [f"{rows[0]['parameters']:,}", f"{rows[0]['gmacs']:.2f}"] if rows else ["-", "-"]
        published = [f"{figures_[data]['alone'][network][0]:.2f}" for data in ("btcv", "word")]
        scores = [shown(rows, metric) for metric in ("dice", "hd95", "asd")]
        body.append(
            [
                name,
                *size,
                str(rows[0]["max_steps"]) if rows else "-",
                str(len(rows)),
                *scores,
                *published,
            ]
        )
    header = ["network", "parameters", "GMACs", "steps", "runs", "Dice", "HD95", "ASD"]
    return [*header, "published Dice: BTCV", "WORD"], body, used


def methods_table(
    results: Results, teacher: str, which: str = ""
) -> tuple[list[str], list[list[str]], list[dict]]:
    """The U-Net under every method and one teacher. which: 'run' leaves out the methods that were
    not.
    """
    if which not in ("", "run"):
        raise ValueError(f"methods: {which!r} is neither 'run' nor left out")
    found = {
        method: results.cell(method=method, student="unet", teacher=teacher, preset="clean")
        for method in (*RIVALS, "acf_bckd")
    }
    weaker = results.cell(
        method="acf_bckd", student="unet", teacher=teacher, preset="clean", variant=WEAKER
    )
    if weaker:
        found["acf_bckd " + WEAKER] = weaker
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
    own = [shown(alone, metric) for metric in ("dice", "hd95", "asd")]
    body = [["none", str(len(alone)), *own, *["-"] * 8]]
    for method, rows in (run if which == "run" else found).items():
        row = tested.get(method)
        same = same_seeds(alone, rows)
        figures_ = [published_gap(data, method, teacher) for data in ("btcv", "word", "brats21")]
        body.append(
            [
                title(method),
                str(len(rows)),
                *(shown(rows, metric) for metric in ("dice", "hd95", "asd")),
                str(order.index(method) + 1) if rows else "-",
                percent(gap_closed(mean(rows, "dice"), mean(same, "dice"), mean(above, "dice"))),
                change(row),
                shown_p(row and row["p_holm"]),
                shown_p(rivals.get(method) and rivals[method]["p_holm"]),
                *map(percent, figures_),
            ]
        )
    header = [
        "method",
        "runs",
        "Dice",
        "HD95",
        "ASD",
        "rank",
        "gap closed",
        "Dice above the student alone",
        "p",
        "p against ACF-BCKD",
        "published gap closed: BTCV",
        "WORD",
        "BraTS",
    ]
    return header, body, [*above, *alone, *(row for rows in found.values() for row in rows)]


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
    figures_ = published_kd()[dataset]
    taught = figures_["distilled"].get(method, {}).get(student, {}).get(teacher)
    if taught is None:
        return None
    return gap_closed(taught[0], figures_["alone"][student][0], figures_["alone"][teacher][0])


def rates_table(results: Results) -> tuple[list[str], list[list[str]], list[dict]]:
    """Best validation Dice of every method at each learning rate that was tried with seed 0, the
    best in bold.
    """
    tried = [list(rows.values()) for rows in results.rates.values() if len(rows) > 1]
    rates = sorted({row["lr"] for rows in tried for row in rows})
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
    return (
        ["method", *(f"rate {rate:g}" for rate in rates)],
        body,
        [row for rows in tried for row in rows],
    )


def students_table(results: Results) -> tuple[list[str], list[list[str]], list[dict]]:
    """The other students: alone, under ACF-BCKD, KD and the two rivals that do best with U-Net and
    ResU-Net.
    """
    body, used = [], []
    for student in list(STUDENTS)[1:]:
        alone = results.alone(student)
        used += alone
        size = f"{alone[0]['parameters']:,}" if alone else "-"
        own = together(alone, ("dice", "hd95", "asd"))
        body.append([STUDENTS[student], size, "alone", own, "", own, "", ""])
        for method in ("kd", "at", "dist", "acf_bckd"):
            cells = []
            for teacher in TEACHERS:
                rows = results.cell(method=method, student=student, teacher=teacher, preset="clean")
                used += rows
                base = mean(same_seeds(alone, rows), "dice")
                gap = gap_closed(mean(rows, "dice"), base, mean(results.alone(teacher), "dice"))
                cells += [together(rows, ("dice", "hd95", "asd")), percent(gap)]
            published = published_gap("btcv", method, "resunet", student)
            body.append([STUDENTS[student], size, title(method), *cells, percent(published)])
    header = [
        "student",
        "parameters",
        "method",
        "T1: Dice / HD95 / ASD",
        "gap closed",
        "T2: Dice / HD95 / ASD",
    ]
    return [*header, "gap closed", "published on BTCV, T1"], body, used


def parts_table(
    results: Results, teacher: str, student: str = "unet"
) -> tuple[list[str], list[list[str]], list[dict]]:
    """ACF-BCKD with parts of its terms, of the seeds that all parts were run with.

    With another student than the U-Net: single terms, all but SBD, a tenth of SBD.
    """
    terms = ("afd", "cfd", "hbd", "sbd")
    without = [tuple(term for term in terms if term != left) for left in terms]
    more = [terms[:2], terms[2:], *without] if student == "unet" else without[-1:]
    kept = {"": (), **{"+".join(part): part for part in ([(term,) for term in terms] + more)}}
    weaker = {WEAKER: terms[:2]} | ({} if student == "unet" else {"sbd0.1": terms[3:]})
    cells = {"": results.alone(student)} | {
        variant: results.cell(
            method="acf_bckd",
            student=student,
            teacher=teacher,
            preset="clean",
            variant="" if variant == "all" else variant,
        )
        for variant in (*list(kept)[1:], *weaker, "all")
    }
    run = [{row["seed"] for row in rows} for rows in cells.values() if rows]
    seeds = set.intersection(*run) if run else set()
    if run and not seeds:
        raise ValueError(
            f"parts of ACF-BCKD with {student} under {teacher}: no seed that all were run with"
        )
    cells = {
        variant: [row for row in rows if row["seed"] in seeds] for variant, rows in cells.items()
    }
    alone = cells[""]
    body, used = [], []
    for variant, rows in cells.items():
        used += rows
        change = (
            f"{mean(rows, 'dice') - mean(alone, 'dice'):+.2f}"
            if rows and alone and variant
            else "-"
        )
        marks = [
            "weaker"
            if term in weaker.get(variant, ())
            else "x"
            if term in kept.get(variant, terms)
            else ""
            for term in terms
        ]
        body.append([*marks, *(shown(rows, metric) for metric in ("dice", "hd95", "asd")), change])
    return (
        ["AFD", "CFD", "HBD", "SBD", "Dice", "HD95", "ASD", "above the student alone"],
        body,
        used,
    )


def presets_table(results: Results) -> tuple[list[str], list[list[str]], list[dict]]:
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
        # the variants of these have tables of their own
        if not values["teacher"] and values["method"] != "crkd":
            alike = (
                row
                for row in results.rows
                if row["preset"] == "clean" and values.items() <= row.items()
            )
            variants |= {variant_of(row) for row in alike}
        for variant in sorted(variants):
            clean = results.cell(preset="clean", variant=variant, **values)
            clean = [row for row in clean if row["seed"] in {one["seed"] for one in released}]
            used += clean if variant else [*clean, *released]
            pairs = [together(rows, ("dice", "hd95")) for rows in (clean, released)]
            name = title(values["method"])
            body.append(
                [f"{name}, {variant}", of, pairs[0], "-"] if variant else [name, of, *pairs]
            )
    return (
        ["method", "teacher or labels", "clean: Dice / HD95", "as_released: Dice / HD95"],
        body,
        used,
    )


def few_labels_table(
    results: Results, published: str, labelled: str
) -> tuple[list[str], list[list[str]], list[dict]]:
    """Every few-label method. published: the data set of the published figures."""
    count = int(labelled)
    # 3D only
    methods = [name for name in METHODS if published == "la" or name not in ("lefed", "mlrpl")]
    found = {name: results.cell(method=name, preset="clean", labelled=count) for name in methods}
    run = {name: rows for name, rows in found.items() if rows}
    tested = results.compared(
        found["crkd"], {name: rows for name, rows in run.items() if name != "crkd"}
    )
    order = sorted(run, key=lambda name: -mean(run[name], "dice"))
    figures_ = yaml.safe_load(PUBLISHED_SSL.read_text(encoding="utf-8"))[published][count]
    body = []
    for name, rows in found.items():
        row = tested.get(name)
        body.append(
            [
                title(name),
                str(len(rows)),
                *(shown(rows, metric) for metric in METRICS),
                str(order.index(name) + 1) if rows else "-",
                change(row, -1),
                shown_p(row and row["p_holm"]),
                " / ".join(f"{value:.2f}" for value in figures_[name]) if name in figures_ else "-",
            ]
        )
    header = [
        "method",
        "runs",
        "Dice",
        "Jaccard",
        "HD95",
        "ASD",
        "rank",
        "Dice of CRKD above it",
        "p",
    ]
    return (
        [*header, "published: Dice / Jaccard / HD95 / ASD"],
        body,
        [row for rows in found.values() for row in rows],
    )


def trials_table(results: Results, labelled: str) -> tuple[list[str], list[list[str]], list[dict]]:
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
        body.append([name, *(shown(rows, metric) for metric in ("dice", "hd95", "asd")), curve])
    steps = next((rows[0]["curve"] for rows in trials.values() if rows), [])
    header = [
        "trial",
        "Dice",
        "HD95",
        "ASD",
        f"Dice after {' / '.join(str(step) for step, _ in steps)} steps",
    ]
    return header, body, [row for rows in trials.values() for row in rows]


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


# --- figures ---


def figures(results: Path, out: Path) -> int:
    drawn = {}
    if (file := results / "hippocampus.jsonl").exists():
        found = Results(*read(file))
        drawn |= {"results_gap.png": gap_figure(found), "results_curves.png": curves_figure(found)}
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / name, dpi=110, metadata={"Software": None})
        print(f"figure in {out / name}")
    return 0


def panels(results: Results, height: float) -> tuple[Figure, list[tuple]]:
    """A figure, and (axes, teacher, its name) for each teacher under which a method was run; one at
    least.
    """
    taught = {row["teacher"] for row in results.rows}
    shown_ = {key: name for key, name in TEACHERS.items() if key in taught} or dict(
        [next(iter(TEACHERS.items()))]
    )
    figure = Figure(figsize=(1.5 + 4 * len(shown_), height), layout="constrained")
    axes = figure.subplots(1, len(shown_), sharey=True, squeeze=False)[0]
    return figure, [(each, *teacher) for each, teacher in zip(axes, shown_.items())]


def gap_figure(results: Results) -> Figure:
    """Share of the gap between student and teacher that each method closes, ours beside the
    published.

    A mark is a seed, compared with the student alone of the same seed.
    """
    figure, found = panels(results, 3.8)
    low, high = -60, 130
    for axes, teacher, name in found:
        alone, above = results.alone("unet"), mean(results.alone(teacher), "dice")
        cells = {
            method: results.cell(method=method, student="unet", teacher=teacher, preset="clean")
            for method in (*RIVALS, "acf_bckd")
        }
        weaker = results.cell(
            method="acf_bckd", student="unet", teacher=teacher, preset="clean", variant=WEAKER
        )
        methods = {**cells, **({"acf_bckd " + WEAKER: weaker} if weaker else {})}
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
        cells = {
            title(method): results.cell(
                method=method, student="unet", teacher=teacher, preset="clean"
            )
            for method in (*RIVALS, "acf_bckd")
        }
        alone = same_seeds(results.alone("unet"), [row for rows in cells.values() for row in rows])
        cells = {"student alone": alone} | cells
        for index, (label, rows) in enumerate(cells.items()):
            at: dict[int, list[float]] = {}
            for step, dice in (point for row in rows for point in row["curve"]):
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
    sys.exit(main())
