r"""One HTML page about one or several runs: curves, scores of each class and case, pictures,
comparison of the runs.

    python tools/report.py runs/btcv/acf_bckd/resunet-unet/seed0  # writes report.html there
    python tools/report.py runs/btcv/supervised/unet/seed* runs/btcv/acf_bckd/resunet-unet/seed* \
        --out report.html
    python tools/report.py runs/acdc/supervised/unet2d-3/seed0 runs/acdc/crkd/unet2d-3/seed0 \
        --out few_labels.html

The page needs nothing but itself: no network, no other file. Its text and looks are in
report.html.jinja; here runs become the values that it shows. They come from log.jsonl and from what
test_3d.py or test_2d.py wrote (metrics.csv, summary.json, predictions/); of what is missing the
page says how to make it. Pictures need the data set as well, or the overlays/ of a test. Runs that
differ in the seed alone are taken as one in comparisons, each case by its mean over the seeds.
Statistics: utils/statistics.py; metrics and empty masks: metrics.py, reporting.py.
"""

import argparse
import base64
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jinja2
import numpy as np
import yaml
from matplotlib.colors import to_hex
from PIL import Image

from metrics import DISTANCES, FLAGS, METRICS, SHARES, SHOWN
from tools import report_charts as charts
from tools.figure import views_of
from tools.report_data import (
    ReportError,
    Run,
    defined,
    log_series,
    mean,
    named,
    read_run,
    teacher_validation,
)
from tools.tables import notes, penalised
from utils import figures
from utils.checkpoint import CheckpointError, load_checkpoint, write_text
from utils.config import plain_name
from utils.diagnosis import findings, term_history
from utils.scripts import run_tool
from utils.statistics import (
    average_seeds,
    bootstrap_interval,
    by_patient,
    case_means,
    paired_comparison,
)

SIDE = 560  # largest side of a picture in pixels


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
        "--suffix", default="", help="which test: _last, _published, _val, ...; default: best.pt"
    )
    spaces = ("resampled", "native")
    parser.add_argument(
        "--space", choices=spaces, default="resampled", help="as in results_table.py"
    )
    parser.add_argument(
        "--against-first", action="store_true", help="compare with the first run, not all pairs"
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
    write_text(out, page)
    plural, size = "s" if len(runs) > 1 else "", out.stat().st_size / 2**20
    print(f"report of {len(runs)} run{plural}: {out} ({size:.1f} MiB)")
    return 0


def build_page(runs: list[Run], teacher: Run | None, args: argparse.Namespace) -> str:
    scored = [run for run in runs if run.summary is not None]
    tested = [run for run in runs if run.rows]
    order = [run.name for run in runs]
    teachers = {run.name: teacher or run.teacher() for run in runs if run.distilled}
    datasets = ", ".join(dict.fromkeys(run.config["dataset"] for run in runs))
    heading = runs[0].name if len(runs) == 1 else f"{len(runs)} runs on {datasets}"
    return page_template().render(
        heading=args.title or heading,
        datasets=datasets,
        code=sorted({run.summary["code"] for run in scored if run.summary.get("code")}),
        runs=runs,
        tested=tested,
        order=order,
        unit=units(runs),
        metrics={metric: METRICS[metric] for metric in SHOWN},
        shares=SHARES,
        summary=summary(scored),
        comparison=comparison(tested, args.against_first),
        taught=[teacher_and_student(run, teachers[run.name]) for run in runs if run.distilled],
        classes=classes(tested, order),
        cases=[cases_of(run) for run in tested],
        all_cases=cases_of_all(tested),
        pictures=[pictures_of(run, args.data_root) for run in tested],
        training=training_charts(runs),
        validation=validation_charts(runs, teachers),
        terms=[terms_of(run, teachers.get(run.name)) for run in runs],
        differing=differing_settings(runs),
    )


def page_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of runs, classes and cases come from files
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (shown, score, p_value, sort_key, as_yaml)
    functions = (metric_titles, charts.colour, charts.swatch_dash)
    environment.filters |= {each.__name__: each for each in filters}
    environment.globals |= {each.__name__: each for each in functions}
    return environment.get_template("report.html.jinja")


# --------------------------------------------------------------------------------------------------
# numbers as text


def shown(value: float | None, spec: str) -> str:
    """A number by its format, with a true minus sign; a dash for one that is undefined."""
    return "–" if value is None else format(value, spec).replace("-", "−")


def score(value: float | None, metric: str) -> str:
    """Shares in percent with one decimal, distances with two."""
    return shown(scaled(value, metric), ".1f" if metric in SHARES else ".2f")


def scaled(value: float | None, metric: str) -> float | None:
    """In the unit that is shown."""
    return None if value is None else METRICS[metric].factor * value


def p_value(value: float | None) -> str:
    if value is not None and value < 1e-4:
        return "< 0.0001"
    return shown(value, ".4f" if value is not None and value < 0.01 else ".3f")


def sort_key(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def as_yaml(config: dict) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def metric_titles(unit: str) -> dict[str, str]:
    units = {metric: "%" if metric in SHARES else unit for metric in SHOWN}
    return {metric: f"{METRICS[metric].title}, {units[metric]}" for metric in SHOWN}


# --------------------------------------------------------------------------------------------------
# sections


def summary(scored: list[Run]) -> dict | None:
    """Of each run with scores, what its summary does not hold itself; and notes on all of them."""
    if not scored:
        return None
    rows = []
    for run in scored:
        dice = by_patient(run.case_means("dice"), run.patient)
        interval = bootstrap_interval(list(dice.values()))
        distances = [metric for metric in SHOWN if metric in DISTANCES]
        failed = {metric: penalised(run.summary, run.space, metric) for metric in distances}
        rows.append({"run": run, "interval": interval, "penalised": failed})
    lines = notes([run.summary for run in scored], scored[0].space)
    # The steps are a column of the table.
    lines = [line for line in lines if not line.startswith("Checkpoint steps")]
    return {"rows": rows, "notes": lines}


def comparison(tested: list[Run], against_first: bool) -> dict | None:
    """Paired tests of the cells that were scored on the same cases; None for fewer than two."""
    cells = {name: [run.name for run in runs] for name, runs in cells_of(tested).items()}
    if len(cells) < 2:
        return None
    reference = next(iter(cells)) if against_first else None
    tables = [compared(tested, cells, metric, reference) for metric in ("dice", "hd95")]
    least = [row["least_p"] for row in tables[0]["rows"] + tables[1]["rows"] if row["n"]]
    ways = {run.name: way_of_scoring(run) for run in tested}
    differ = len(set(ways.values())) > 1
    ways = [f"{name}: {way}" for name, way in ways.items()] if differ else []
    return {"tables": tables, "least_p": max(least, default=0.0), "ways": ways}


def cells_of(tested: list[Run]) -> dict[str, list[Run]]:
    """The runs that differ in the seed alone, under one name."""
    members: dict[tuple, list[Run]] = {}
    for run in tested:
        members.setdefault(run.cell, []).append(run)
    several_sets = len({dataset for dataset, _ in members}) > 1
    cells = {}
    for (dataset, name), of_cell in members.items():
        of_set = f", {dataset}" if several_sets else ""
        seeds = f" ({len(of_cell)} seeds)" if len(of_cell) > 1 else ""
        cells[name + of_set + seeds] = of_cell
    return cells


def compared(
    tested: list[Run], cells: Mapping[str, Sequence[str]], metric: str, reference: str | None
) -> dict:
    """One metric of all cells, which are given by the names of their runs."""
    rows_of = {run.name: run.rows for run in tested}
    means, left_out = case_means(rows_of, metric, shared=metric == "hd95")
    averaged = {cell: average_seeds([means[name] for name in runs]) for cell, runs in cells.items()}
    patient_of = {run.name: run.patient for run in tested}
    averaged = {c: by_patient(scores, patient_of[cells[c][0]]) for c, scores in averaged.items()}
    rows = paired_comparison(averaged, reference)
    drawn = []
    for row in rows:
        for key in ("mean_a", "mean_b", "difference", "low", "high"):
            row[key] = scaled(row[key], metric)
        if row["n"]:
            name = f"{row['b']}\n− {row['a']}"
            drawn.append((name, row["difference"], row["low"], row["high"]))
    unit = "percentage points" if metric in SHARES else units(tested)
    title = METRICS[metric].title
    label = f"difference of mean {title}, {unit}"
    chart = charts.interval_chart(title, drawn, label) if drawn else ""
    return {"metric": metric, "chart": chart, "rows": rows, "left_out": left_out}


def way_of_scoring(run: Run) -> str:
    found = run.summary
    return (
        f"{found.get('protocol', 'clean')} protocol, split {found['split']}, HD95 "
        f"{found['hd95_definition']} in {run.unit}, empty masks {found['empty_policy']}"
    )


def teacher_and_student(run: Run, teacher: Run | None) -> dict:
    """Dice of each class of the teacher, the distilled student and, if they were trained, the
    student alone and the one distilled on the labels alone: on the validation cases, and on the
    test cases where all were scored on the same.
    """
    others = {"student alone": run.alone(), "distilled on the labels alone": run.untaught()}
    others = {name: other for name, other in others.items() if other}
    tables = []
    taught, of_teacher = run.best_validation(), teacher_validation(run, teacher)
    if taught and of_teacher:
        best = {name: other.best_validation() for name, other in others.items()}
        where = "validation cases, best step"
        tables.append(taught_table(where, of_teacher, best, taught))
    if run.rows and teacher and set(teacher.cases) == set(run.cases):
        comparable = {k: other for k, other in others.items() if set(other.cases) == set(run.cases)}
        scored = {name: other.class_dice() for name, other in comparable.items()}
        where = f"{run.summary['split']} cases"
        tables.append(taught_table(where, teacher.class_dice(), scored, run.class_dice()))
    return {"name": run.name, "tables": tables, "agreement": run.agreement()}


def taught_table(
    where: str, teacher: dict, others: Mapping[str, dict | None], student: dict
) -> dict:
    others = {name: scores for name, scores in others.items() if scores}
    alone = others.get("student alone")
    series = {"teacher": teacher} | others | {"distilled student": student}
    classes = [name for name in student if name != "dice"]
    rows = []
    for name in [*classes, "dice"]:
        values = [scaled(scores.get(name), "dice") for scores in series.values()]
        first, last = values[0], values[-1]
        gap = None if None in (first, last) else last - first
        closed = None
        if alone and None not in values and first > values[1]:  # the student alone
            closed = 100 * (last - values[1]) / (first - values[1])
        label = "mean" if name == "dice" else name
        rows.append({"name": label, "dice": values, "gap": gap, "closed": closed})
    drawn = {
        name: [scaled(scores.get(each), "dice") for each in classes]
        for name, scores in series.items()
    }
    chart = charts.dot_chart(f"Dice on {where}", classes, drawn, "Dice, %")
    header = ["class", *(f"{name}, %" for name in series), "student − teacher"]
    header += ["gap closed"] if alone else []
    return {"where": where, "header": header, "alone": alone, "rows": rows, "chart": chart}


def classes(tested: list[Run], order: list[str]) -> dict | None:
    """Box plots and a table of each class and run."""
    if not tested:
        return None
    names = {}
    for run in tested:
        names |= dict.fromkeys(run.classes)
    boxes = {metric: {name: {} for name in names} for metric in ("dice", "hd95")}
    rows = []
    for name in names:
        for run in tested:
            own = run.of_class(name)
            row = {"name": name if run is tested[0] else "", "run": run.name, "cases": len(own)}
            row["means"] = {metric: mean(each[metric] for each in own) for metric in SHOWN}
            row["counts"] = {flag: sum(each[flag] for each in own) for flag in FLAGS}
            rows.append(row)
            for metric, values in boxes.items():
                values[name][run.name] = defined(scaled(each[metric], metric) for each in own)
    titles = metric_titles(units(tested))
    drawn = [charts.box_chart(METRICS[key].title, boxes[key], order, titles[key]) for key in boxes]
    return {"charts": drawn, "rows": rows}


def cases_of_all(tested: list[Run]) -> dict | None:
    """Mean Dice of each case under each cell, the mean over its seeds, and how the later cells
    differ from the first; of a single cell under each seed. None for one run.
    """
    if len(tested) < 2:
        return None
    cells = cells_of(tested)
    seeds_alone = len(cells) == 1
    if seeds_alone:
        cells = {run.name: [run] for run in tested}
    means = [average_seeds([run.case_means("dice") for run in runs]) for runs in cells.values()]
    cases = {}
    for scores in means:
        cases |= scores
    rows = []
    for case in cases:
        first, *others = [scores.get(case) for scores in means]
        changes = [None if None in (first, each) else 100 * (each - first) for each in others]
        changes = [] if seeds_alone else changes
        rows.append({"case": case, "dice": [first, *others], "changes": changes})
    names = list(cells)
    header = ["case", *(f"{name}: Dice, %" for name in names)]
    if len(names) == 2 and not seeds_alone:
        header.append("second − first")
    elif not seeds_alone:
        header += [f"{name} − {names[0]}" for name in names[1:]]
    what = "Mean Dice over organs of each case and run"
    if not seeds_alone:
        what += "; runs that differ in the seed alone are averaged"
    return {"header": header, "caption": what, "rows": rows}


def cases_of(run: Run) -> dict:
    """The means of each case over organs, and the scores of each organ."""
    means = {metric: run.case_means(metric) for metric in SHOWN}
    rows = []
    for case in run.cases:
        own = {row["class"]: row for row in run.rows if row["case"] == case}
        organs = [own.get(name) for name in run.classes]
        missed = sum(row["missed"] for row in own.values())
        over_organs = {metric: means[metric][case] for metric in SHOWN}
        rows.append({"case": case, "means": over_organs, "missed": missed, "organs": organs})
    return {"name": run.name, "unit": run.unit, "classes": run.classes, "rows": rows}


def pictures_of(run: Run, data_root: str | None) -> dict | None:
    """Best, median and worst case of a tested run: image, ground truth and prediction, or the
    picture of a test with --overlays. None where no case has a Dice.
    """
    means = {case: dice for case, dice in run.case_means("dice").items() if dice is not None}
    if not means:
        return None
    ranked = sorted(means, key=means.__getitem__)
    picked: dict[str, list[str]] = {}
    for what, place in (("best", -1), ("median", (len(ranked) - 1) // 2), ("worst", 0)):
        picked.setdefault(ranked[place], []).append(what)
    found, problem, legend, checkpoint = [], "", {}, None
    for case, what in picked.items():
        caption = f"{', '.join(what)}: {case}, Dice {100 * means[case]:.1f} %"
        try:
            checkpoint = checkpoint or checkpoint_of(run, data_root)
            views = views_of(checkpoint, [run.folder / f"predictions{run.suffix}"], case)
        except (ValueError, OSError) as error:  # no data, no prediction, or one of another grid
            problem = problem or " ".join(str(error).split())
            stored = run.folder / f"overlays{run.suffix}" / f"{case}.png"
            # a case of metrics.csv is a file of this folder, not a path to others
            if plain_name(case) and stored.is_file():
                image = Image.open(stored, formats=("PNG",)).convert("RGB")
                image.thumbnail((3 * SIDE, SIDE))
                found.append({"caption": caption, "whole": inline(image)})
        else:
            parts = zip(("image", "ground truth", "prediction"), views.pictures)
            images = {name: inline(view_image(picture)) for name, picture in parts}
            found.append({"caption": caption, "place": views.place, "parts": images})
            legend |= {k: views.names[k - 1] for k in views.present}
    palette = figures.palette(max(legend, default=0) + 1)
    legend = [(to_hex(palette[k]), name) for k, name in sorted(legend.items())]
    return {"run": run, "cases": found, "problem": problem, "legend": legend}


def checkpoint_of(run: Run, data_root: str | None) -> dict:
    """Of the tested file; CheckpointError if it does not say which data it was made for."""
    name = run.summary["checkpoint"]
    if not plain_name(name):
        raise CheckpointError(f"{run.folder}: its summary names {name!r} for a checkpoint")
    path = run.folder / name
    checkpoint = load_checkpoint(path)
    if "dataset" not in checkpoint or "kind" not in checkpoint:
        raise CheckpointError(f"{path}: does not say which data it was trained on")
    if data_root:
        checkpoint["dataset"] = checkpoint["dataset"] | {"root": data_root}
    return checkpoint


def view_image(picture: np.ndarray) -> Image.Image:
    """A picture of `Views`, not larger than SIDE."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def inline(image: Image.Image) -> str:
    """A picture inside the page. Its outlines keep their colours: these are not averaged over
    neighbours, as JPEG does otherwise.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def training_charts(runs: list[Run]) -> list[str]:
    """One chart for each figure of the 'train' lines, all runs in it; the loss first, the learning
    rate last.
    """
    series, order = log_series(runs, "train"), [run.name for run in runs]
    titles = {"loss": "loss, all terms", "lr": "learning rate"}
    drawn = []
    for key in sorted(series, key=lambda key: (key != "loss", key == "lr")):
        label = "learning rate" if key == "lr" else "mean value"
        drawn.append(charts.line_chart(titles.get(key, key), series[key], order, label))
    return drawn


def validation_charts(runs: list[Run], teachers: Mapping[str, Run | None]) -> list[str]:
    """Dice on the validation cases over steps; the teacher's as a line where all distilled runs
    have the same one.
    """
    order = [run.name for run in runs]
    known = [teacher_validation(run, teachers[run.name]) for run in runs if run.distilled]
    common = known[0] if known and all(each == known[0] for each in known) else None
    drawn = []
    for key, points in log_series(runs, "val", factor=100).items():
        title = "mean Dice" if key == "dice" else key
        level = (common or {}).get(key)
        level = None if level is None else ("teacher", 100 * level)
        drawn.append(
            charts.line_chart(title, points, order, "Dice, %", marks=True, reference=level)
        )
    agreed = log_series(runs, "agreement", factor=100).get("dice")
    if agreed:
        title = "agreement with the teacher on unlabelled scans"
        drawn.append(charts.line_chart(title, agreed, order, "Dice, %", marks=True))
    return drawn


def terms_of(run: Run, teacher: Run | None) -> dict | None:
    """Warnings about a run with several terms, and their shares of loss and gradient, norms and
    directions where they were measured; None of a run with nothing to say.
    """
    entries = list(run.log)
    if run.distilled and not any(entry["kind"] == "teacher" for entry in entries):
        known = teacher_validation(run, teacher)
        entries += [{"step": 0, "kind": "teacher", **known}] if known else []
    found = [
        {"what": capital(each.what), "advice": capital(each.advice)} for each in findings(entries)
    ]
    losses, shares = term_history(entries, "loss_share"), term_history(entries, "grad_share")
    norms, cosines = term_history(entries, "grad_norm"), term_history(entries, "cosine")
    order = list(shares)
    legend = [(charts.colour(k), name) for k, name in enumerate(order)]
    described = {"name": run.name, "findings": found, "order": order, "legend": legend}
    if not order:
        return described if found or run.distilled else None
    drawn = [
        charts.share_chart("share of the loss", losses, order),
        charts.share_chart("share of the gradient norm", shares, order),
        charts.line_chart("gradient norm", norms, order, "L2 norm", log=True),
    ]
    if cosines:
        look = {"ylabel": "cosine of gradients", "reference": ("", 0.0)}
        drawn.append(charts.line_chart(f"direction beside {order[0]}", cosines, order, **look))
    rows = []
    for name, points in shares.items():
        measured = [100 * share for _, share in points]
        row = {"name": name, "low": min(measured), "high": max(measured), "count": len(measured)}
        row |= {"loss": median(losses.get(name), 100), "gradient": median(points, 100)}
        rows.append(row | {"cosine": median(cosines.get(name))})
    return described | {"charts": drawn, "rows": rows}


def capital(text: str) -> str:
    """A sentence of a phrase."""
    return f"{text[:1].upper()}{text[1:]}."


def median(points: Sequence[tuple[int, float]] | None, factor: float = 1.0) -> float | None:
    return factor * statistics.median(value for _, value in points) if points else None


def as_text(value) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def differing_settings(runs: list[Run]) -> list[list[str]]:
    """Rows of the keys that are not equal in all runs, with their values."""
    rows = []
    keys = {}
    for run in runs:
        keys |= run.config
    for key in keys:
        values = [run.config.get(key) for run in runs]
        if len({json.dumps(value) for value in values}) > 1:
            rows.append([key, *map(as_text, values)])
    return rows


def units(runs: Sequence[Run]) -> str:
    return "/".join(sorted({run.unit for run in runs if run.summary is not None})) or "mm"


if __name__ == "__main__":
    sys.exit(run_tool(main, ReportError))
