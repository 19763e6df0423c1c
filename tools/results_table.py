r"""Tables of tested runs: accuracy beside size and speed.

    python tools/results_table.py runs/btcv/supervised/resunet/seed0 \
        runs/btcv/acf_bckd/resunet-unet/seed0
    python tools/results_table.py runs/btcv/*/*/seed0 --space native --csv table.csv
    python tools/results_table.py --layout kd --runs-dir runs --dataset btcv --csv btcv.csv

--layout kd gathers every summary.json of best.pt under --runs-dir, averages over the seeds and
prints the tables of the ACF-BCKD paper in Markdown, each cell beside the published figure
(tools/published_kd.yaml). --layout ssl does the same for summary_published.json of few-label runs
and the tables of CRKD (tools/published_ssl.yaml); --protocol clean takes summary.json instead.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import labelled_name

COLUMNS = (
    "run",
    "Dice",
    "Jaccard",
    "HD95 {}",
    "ASD {}",
    "missed",
    "parameters",
    "GMACs",
    "ms/volume",
)
TEACHERS = {"resunet": "T1 ResU-Net", "segresnet": "T2 SegResNet"}
STUDENTS = {
    "unet": "U-Net",
    "espnetv2": "ESPNetV2",
    "mobile_unet": "Mobile U-Net",
    "lcovnet": "LCOV-Net",
}
METHODS = ("supervised", "unimatch", "crossmatch", "lefed", "acmt", "mlrpl", "crkd")
METRICS = {"dice": 100.0, "jaccard": 100.0, "hd95": 1.0, "asd": 1.0}  # factors to the tables' units
RIVALS = ("kd", "at", "nkd", "skd", "ifvd", "cwd", "dist", "dkd", "cirkd")
PENALISED = (
    "* with missed and wrongly predicted organs as the diagonal of the volume: compare runs by "
    "these (nan: not known, "
    "test the run again)."
)
PUBLISHED = Path(__file__).with_name("published_kd.yaml")
PUBLISHED_SSL = Path(__file__).with_name("published_ssl.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, help="run folders with a summary.json, or summary files"
    )
    parser.add_argument("--space", choices=("resampled", "native"), default="resampled")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    parser.add_argument(
        "--layout",
        choices=("runs", "kd", "ssl"),
        default="runs",
        help="kd, ssl: the published tables",
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="for --layout kd and ssl"
    )
    parser.add_argument(
        "--dataset", help="for --layout kd and ssl; default: every data set with published figures"
    )
    parser.add_argument(
        "--protocol", choices=("published", "clean"), default="published", help="for --layout ssl"
    )
    args = parser.parse_args()
    if args.layout == "kd":
        return published_layout(args)
    if args.layout == "ssl":
        return few_label_layout(args)
    if not args.runs:
        parser.error("name the run folders, or take --layout kd or ssl")
    summaries = []
    for run in args.runs:
        path = run if run.suffix == ".json" else run / "summary.json"
        if not path.is_file():
            best = path.parent / "best.pt"
            sys.exit(
                f"error: {path}: no such summary; make it with: python test_3d.py --ckpt {best}"
            )
        summaries.append(json.loads(path.read_text(encoding="utf-8")))
    units = {summary.get("unit", "mm") for summary in summaries}
    columns = tuple(column.format("/".join(sorted(units))) for column in COLUMNS)
    rows = [cells(summary, args.space) for summary in summaries]
    widths = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]
    for row in [columns, tuple("-" * width for width in widths), *rows]:
        aligned = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
        ]
        print(f"| {' | '.join(aligned)} |")
    for note in notes(summaries, args.space):
        print(note)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        print(f"table in {args.csv}")
    return 0


def title(summary: dict) -> str:
    """Which network, taught how."""
    if "labelled" in summary:
        preset = (
            ""
            if summary["preset"] == "clean" or summary["method"] == "supervised"
            else f", {summary['preset']}"
        )
        return (
            f"{summary['student']}, {labelled_name(summary['labelled'])} labelled, "
            f"{summary['method']}{preset}"
        )
    if summary["teacher"] is None:
        return f"{summary['student']}, supervised"
    preset = "" if summary["preset"] == "clean" else f", {summary['preset']}"
    return f"{summary['student']} <- {summary['teacher']}, {summary['method']}{preset}"


def selections(summaries: list[dict]) -> str:
    """Which lists chose the checkpoints of a table; runs that were selected on test cases are
    named.
    """
    chosen = [summary for summary in summaries if summary.get("checkpoint", "best.pt") == "best.pt"]
    lists = sorted({summary.get("selected_on", "val") for summary in chosen}) or ["none"]
    on_test = [f"{title(s)}, seed {s['seed']}" for s in chosen if s.get("selected_on") == "test"]
    named = f"; on test (--select-on test): {'; '.join(dict.fromkeys(on_test))}" if on_test else ""
    return f"best.pt was selected on: {', '.join(lists)}{named}."


def scores(summary: dict, space: str) -> dict:
    """The means of a space; runs of train_2d_crkd.py and train_3d_crkd.py have one only."""
    return summary.get(space, summary["native"])


def penalised(summary: dict, space: str, metric: str) -> float | None:
    """The mean distance with missed and spurious organs as the diagonal; None where no organ
    failed.

    NaN for a summary that says how many failed but not at what distance: written before there was
    this figure.
    """
    counts = scores(summary, space)["counts"]
    if not counts["missed"] + counts.get("spurious", 0):
        return None
    found = scores(summary, space).get("penalised", {"mean": {}})["mean"].get(metric)
    return math.nan if found is None else found


def cells(summary: dict, space: str) -> tuple[str, ...]:
    mean, counts = scores(summary, space)["mean"], scores(summary, space)["counts"]

    def number(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    def distance(metric: str) -> str:
        also = penalised(summary, space, metric)
        return number(mean[metric], 2) + ("" if also is None else f" / {also:.2f}*")

    return (
        title(summary) + (f" [{summary['tag']}]" if summary["tag"] else ""),
        number(mean["dice"], 2, 100),
        number(mean["jaccard"], 2, 100),
        distance("hd95"),
        distance("asd"),
        f"{counts['missed']}/{counts['pairs']}",
        f"{summary['parameters']:,}",
        number(summary["gmacs"], 2),
        number(summary["ms_per_volume"], 0),
    )


def notes(summaries: list[dict], space: str) -> list[str]:
    """What a reader must know to compare the rows."""
    first = summaries[0]
    cases = {summary["native"]["cases"] for summary in summaries}
    steps = ", ".join(f"{title(s)} {s['step']} of {s['max_steps']}" for s in summaries)
    counted = (
        f"Dice and Jaccard in %, means over {'/'.join(map(str, sorted(cases)))} {first['split']} "
        "cases"
    )
    if any(summary.get("protocol") == "published" for summary in summaries):
        counted += "; distances as published tables of the data set have them (reporting.py)."
    else:
        counted += (
            f"; HD95 {first['hd95_definition']}, ASD one-sided; 'missed': organs not found at all, "
            "of all organs "
            f"(their distances are undefined and left out)."
        )
    lines = [
        counted,
        f"GMACs of one patch {'x'.join(map(str, first['patch_size']))}; milliseconds on "
        f"{first['device']}"
        + (f" with {first['threads']} thread(s)." if first["device"] == "CPU" else "."),
        f"Checkpoint steps: {steps}.",
        selections(summaries),
    ]
    if any(summary["selected_on_reported"] for summary in summaries):
        lines.append(
            "This data set has no third list: best.pt was selected on the cases reported here; see "
            "last.pt too."
        )
    if any("*" in cell for summary in summaries for cell in cells(summary, space)):
        lines.append(PENALISED)
    protocols = {summary["protocol"] for summary in summaries if "protocol" in summary}
    if protocols:
        lines.append(f"Protocol (reporting.py): {', '.join(sorted(protocols))}.")
    return lines


def published_layout(args: argparse.Namespace) -> int:
    """Print the tables of the paper, and write their cells to --csv, one per line."""
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    runs, tagged = gather(args.runs_dir)
    written = []
    for dataset in [args.dataset] if args.dataset else list(published):
        own = {key[1:]: summaries for key, summaries in runs.items() if key[0] == dataset}
        written += dataset_tables(dataset, own, published.get(dataset, {}), args.space)
    used = [summary for row in written for summary in row.pop("summaries")]
    for note in layout_notes(used, tagged, args.space):
        print(note)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(written[0]))
            writer.writeheader()
            writer.writerows(written)
        print(f"cells in {args.csv}")
    return 0


def gather(runs_dir: Path) -> tuple[dict[tuple, list[dict]], int]:
    """(dataset, method, teacher or None, student, preset) -> summaries of its seeds; and how many
    tagged runs were left out: their settings are not those of the cell. A network trained alone has
    no preset.
    """
    cells_found: dict[tuple, dict[int, dict]] = {}
    tagged = 0
    for path in sorted(runs_dir.rglob("summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if (
            summary.get("checkpoint") != "best.pt"
            or "student" not in summary
            or "labelled" in summary
        ):
            continue
        if summary["tag"]:
            tagged += 1
            continue
        preset = "-" if summary["teacher"] is None else summary["preset"]
        key = (
            summary["dataset"],
            summary["method"],
            summary["teacher"],
            summary["student"],
            preset,
        )
        seeds = cells_found.setdefault(key, {})
        if summary["seed"] in seeds:
            name = "/".join(map(str, key))
            sys.exit(
                f"error: {path}: a second run of {name} with seed {summary['seed']}; remove one"
            )
        seeds[summary["seed"]] = summary
    return {
        key: [seeds[seed] for seed in sorted(seeds)] for key, seeds in cells_found.items()
    }, tagged


def dataset_tables(
    dataset: str, runs: dict[tuple, list[dict]], published: dict, space: str
) -> list[dict]:
    """Print the three tables of one data set; -> the cells as CSV rows, with their `summaries`.

    runs: (method, teacher or None, student, preset) -> summaries.
    """
    written = []

    def cell(method: str, teacher: str | None, student: str, preset: str) -> list[str]:
        summaries = runs.get((method, teacher, student, preset), [])
        alone = published.get("alone", {}).get(student)
        taught = published.get("distilled", {}).get(method, {}).get(student, {}).get(teacher)
        figure = alone if teacher is None else taught
        written.append(
            {
                "dataset": dataset,
                "method": method,
                "teacher": teacher or "",
                "student": student,
                "preset": preset,
                **statistics_of(summaries, space),
                **published_fields(figure),
                "summaries": summaries,
            }
        )
        return [
            shown(written[-1]),
            str(len(summaries)) if summaries else "-",
            shown_published(figure),
        ]

    def size(*keys: tuple) -> list[str]:
        summary = next((runs[key][0] for key in keys if key in runs), None)
        return [f"{summary['parameters']:,}", f"{summary['gmacs']:.2f}"] if summary else ["-", "-"]

    def pair(method: str, student: str, preset: str) -> list[str]:
        keys = [(method, teacher, student, preset) for teacher in TEACHERS]
        return [*size(*keys), preset, *(part for key in keys for part in cell(*key))]

    def presets(method: str, student: str) -> list[str]:
        found = {key[3] for key in runs if key[0] == method and key[2] == student}
        return ["clean", *sorted(found - {"clean"})]

    results = ("Dice % / HD95", "runs", "published")
    both = [f"{teacher}: {column}" for teacher in ("T1", "T2") for column in results]
    rows = [
        [title_, *size(("supervised", None, network, "-")), *cell("supervised", None, network, "-")]
        for network, title_ in (TEACHERS | STUDENTS).items()
    ]
    print_markdown(f"{dataset}: trained alone", ["network", "parameters", "GMACs", *results], rows)
    rows = [
        [title_, *pair("acf_bckd", student, preset)]
        for student, title_ in STUDENTS.items()
        for preset in presets("acf_bckd", student)
    ]
    print_markdown(
        f"{dataset}: ACF-BCKD", ["student", "parameters", "GMACs", "preset", *both], rows
    )
    # Data sets without published figures show the rivals that were run.
    known = published.get("distilled") or {key[0]: None for key in runs}
    rows = [
        [method.upper(), *pair(method, "unet", preset)]
        for method in RIVALS
        if method in known
        for preset in presets(method, "unet")
    ]
    if rows:
        print_markdown(
            f"{dataset}: methods, student U-Net",
            ["method", "parameters", "GMACs", "preset", *both],
            rows,
        )
    return written


def few_label_layout(args: argparse.Namespace) -> int:
    """Print the tables of CRKD, and write their cells to --csv, one per line."""
    published = yaml.safe_load(PUBLISHED_SSL.read_text(encoding="utf-8"))
    name = "summary_published.json" if args.protocol == "published" else "summary.json"
    runs: dict[tuple, dict[int, dict]] = {}
    tagged = 0
    for path in sorted(args.runs_dir.rglob(name)):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if "labelled" not in summary:
            continue
        if summary["tag"]:
            tagged += 1
            continue
        preset = "-" if summary["method"] == "supervised" else summary["preset"]
        key = (summary["dataset"], labelled_name(summary["labelled"]), summary["method"], preset)
        seeds = runs.setdefault(key, {})
        if summary["seed"] in seeds:
            sys.exit(
                f"error: {path}: a second run of {'/'.join(key)} with seed {summary['seed']}; "
                "remove one"
            )
        seeds[summary["seed"]] = summary
    written = []
    found = list(dict.fromkeys([*published, *(key[0] for key in runs)]))
    for dataset in [args.dataset] if args.dataset else found:
        figures = published.get(dataset, {})
        counts = dict.fromkeys([*map(str, figures), *(key[1] for key in runs if key[0] == dataset)])
        for labelled in counts:
            own = {key[2:]: seeds for key, seeds in runs.items() if key[:2] == (dataset, labelled)}
            known = {str(k): v for k, v in figures.items()}.get(labelled, {})
            rows = []
            for method in METHODS:
                presets = sorted({preset for m, preset in own if m == method}) or ["-"] * (
                    method in known
                )
                for preset in presets:
                    fields = few_label_fields(list(own.get((method, preset), {}).values()))
                    figure = known.get(method)
                    written.append(
                        {
                            "dataset": dataset,
                            "labelled": labelled,
                            "method": method,
                            "preset": preset,
                            **fields,
                            **{
                                f"published_{metric}": v
                                for metric, v in zip(METRICS, figure or [""] * 4)
                            },
                        }
                    )
                    cells_ = [with_spread(fields, metric) for metric in METRICS]
                    shown_ = " / ".join(f"{value:.2f}" for value in figure) if figure else "-"
                    counted = (
                        [f"{fields['missed']}/{fields['pairs']}", str(fields["runs"])]
                        if fields["runs"]
                        else "--"
                    )
                    rows.append([method, preset, *cells_, *counted, shown_])
            header = [
                "method",
                "preset",
                "Dice %",
                "Jaccard %",
                "HD95",
                "ASD",
                "missed",
                "runs",
                "published",
            ]
            if rows:
                print_markdown(f"{dataset}, {labelled} labelled", header, rows)
    print(
        f"Ours: {args.protocol} protocol (reporting.py), mean ± population standard deviation over "
        "the runs (seeds) of "
        "best.pt; distances in voxels or pixels. Published: Dice / Jaccard / HD95 / ASD of the "
        "best checkpoint on the "
        f"reported cases."
    )
    print(PENALISED)
    if runs:
        print(selections([summary for seeds in runs.values() for summary in seeds.values()]))
    if tagged:
        print(f"{tagged} tagged run(s) left out.")
    if args.csv and written:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(written[0]))
            writer.writeheader()
            writer.writerows(written)
        print(f"cells in {args.csv}")
    return 0


def few_label_fields(summaries: list[dict]) -> dict:
    """Mean and population standard deviation over seeds of the four metrics; empty where there are
    no runs.
    """
    fields = {
        "runs": len(summaries),
        "seeds": " ".join(str(summary["seed"]) for summary in summaries),
    }
    for metric, factor in METRICS.items():
        values = [summary["native"]["mean"][metric] for summary in summaries]
        complete = values and all(value is not None for value in values)
        fields[metric] = f"{factor * statistics.fmean(values):.2f}" if complete else ""
        fields[f"{metric}_std"] = (
            f"{factor * statistics.pstdev(values):.2f}" if complete and len(values) > 1 else ""
        )
    return fields | failed_fields(summaries, "native", {"hd95": "hd95", "asd": "asd"})


def with_spread(fields: dict, metric: str) -> str:
    """76.21 ± 0.30, 76.21, 4.10 / 9.30* with the penalised mean, or 'not run'."""
    if not fields["runs"]:
        return "not run"
    spread, also = fields[f"{metric}_std"], fields.get(f"{metric}_penalised")
    return (
        (fields[metric] or "-")
        + (f" ± {spread}" if spread else "")
        + (f" / {also}*" if also else "")
    )


def statistics_of(summaries: list[dict], space: str) -> dict:
    """Mean and population standard deviation over seeds, as the paper's; Dice in %, HD95 in mm and,
    where test_3d.py ran with --published, in voxels. Empty where there are no runs.
    """
    fields = {
        "runs": len(summaries),
        "seeds": " ".join(str(summary["seed"]) for summary in summaries),
    }
    values = {
        "dice": [100 * summary[space]["mean"]["dice"] for summary in summaries],
        "hd95_mm": [summary[space]["mean"]["hd95"] for summary in summaries],
        "hd95_voxels": [
            summary.get("published_protocol", {}).get("hd95_voxels") for summary in summaries
        ],
    }
    for name, entries in values.items():
        # neither None nor NaN
        complete = entries and all(value is not None and value == value for value in entries)
        fields[name] = f"{statistics.fmean(entries):.2f}" if complete else ""
        fields[f"{name}_std"] = (
            f"{statistics.pstdev(entries):.2f}" if complete and len(entries) > 1 else ""
        )
    fields |= {name: summaries[0][name] if summaries else "" for name in ("parameters", "gmacs")}
    voxels = [
        summary.get("published_protocol", {}).get("hd95_voxels_penalised") for summary in summaries
    ]
    return (
        fields
        | failed_fields(summaries, space, {"hd95_mm": "hd95"})
        | {
            "hd95_voxels_penalised": f"{statistics.fmean(voxels):.2f}"
            if voxels and None not in voxels
            else ""
        }
    )


def failed_fields(summaries: list[dict], space: str, names: dict[str, str]) -> dict:
    """Organs missed, of all, over the runs; and the penalised mean of each field (-> its metric),
    'unknown' where a summary lacks it, empty where nothing failed.
    """
    counts = [scores(summary, space)["counts"] for summary in summaries]
    fields = {
        key: sum(count[key] for count in counts) if counts else "" for key in ("missed", "pairs")
    }
    for name, metric in names.items():
        found = [penalised(summary, space, metric) for summary in summaries]
        own = [scores(summary, space)["mean"][metric] for summary in summaries]
        # A run in which no organ failed enters with its own mean.
        values = [mean if value is None else value for value, mean in zip(found, own)]
        known = all(value is not None and value == value for value in values)
        failed = any(value is not None for value in found)
        fields[f"{name}_penalised"] = (
            "" if not failed else f"{statistics.fmean(values):.2f}" if known else "unknown"
        )
    return fields


def published_fields(figure: list[float] | None) -> dict:
    """The published figure as CSV fields."""
    names = ("published_dice", "published_dice_std", "published_hd95_voxels")
    return dict(zip(names, [*(figure or []), "", "", ""]))


def shown(fields: dict) -> str:
    """76.21 ± 0.30 / 12.40 ± 1.10 / 30.20* (10.80 / 21.70* vox), missed 3/78, or 'not run'; *:
    penalised.
    """
    if not fields["runs"]:
        return "not run"

    def with_std(name: str) -> str:
        std = fields[f"{name}_std"]
        return (fields[name] or "-") + (f" ± {std}" if std else "")

    marked = {
        name: f" / {fields[key]}*" if fields["hd95_mm_penalised"] and fields[key] else ""
        for name, key in (("mm", "hd95_mm_penalised"), ("vox", "hd95_voxels_penalised"))
    }
    voxels = f" ({fields['hd95_voxels']}{marked['vox']} vox)" if fields["hd95_voxels"] else ""
    missed = f", missed {fields['missed']}/{fields['pairs']}"
    return f"{with_std('dice')} / {with_std('hd95_mm')}{marked['mm']}{voxels}{missed}"


def shown_published(figure: list[float] | None) -> str:
    if not figure:
        return "-"
    dice, std, hd95 = [*figure, None, None][:3]
    return (
        f"{dice:.2f}"
        + (f" ± {std:.2f}" if std is not None else "")
        + (f" / {hd95:.2f} vox" if hd95 else "")
    )


def print_markdown(title_: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    print(f"### {title_}\n")
    for row in [header, ["-" * width for width in widths], *rows]:
        print(f"| {' | '.join(value.ljust(width) for value, width in zip(row, widths))} |")
    print()


def layout_notes(summaries: list[dict], tagged: int, space: str) -> list[str]:
    """What a reader must know to compare our figures with the published ones."""
    lines = [
        f"Ours: Dice in % and HD95 in mm on the {space} grid, mean ± population standard deviation "
        "over the runs "
        "(seeds) of best.pt; 'vox': HD95 in voxels by the published protocol, where test_3d.py "
        "ran with --published.",
        "Published: HD95 is in voxels of the resampled grid (CT: 1.5 x 1.5 x 2.0 mm; BraTS: 1 mm), "
        "and organs that "
        "were not found at all are left out of it; mean of three runs.",
        "Parameters are those that a forward pass uses; GMACs of one patch.",
        PENALISED,
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


if __name__ == "__main__":
    sys.exit(main())
