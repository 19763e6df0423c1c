"""One table of tested runs: accuracy beside size and speed.

    python tools/results_table.py runs/btcv/supervised/resunet/seed0 runs/btcv/acf_bckd/resunet-unet/seed0
    python tools/results_table.py runs/btcv/*/*/seed0 --space native --csv table.csv
"""

import argparse
import csv
import json
import sys
from pathlib import Path

COLUMNS = ("run", "Dice", "Jaccard", "HD95 mm", "ASD mm", "missed", "parameters", "GMACs", "ms/volume")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a summary.json, or summary files")
    parser.add_argument("--space", choices=("resampled", "native"), default="resampled")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    args = parser.parse_args()
    summaries = []
    for run in args.runs:
        path = run if run.suffix == ".json" else run / "summary.json"
        if not path.is_file():
            sys.exit(f"error: {path}: no such summary; make it with: python test_3d.py --ckpt {path.parent / 'best.pt'}")
        summaries.append(json.loads(path.read_text(encoding="utf-8")))
    rows = [cells(summary, args.space) for summary in summaries]
    widths = [max(len(row[k]) for row in [COLUMNS, *rows]) for k in range(len(COLUMNS))]
    for row in [COLUMNS, tuple("-" * width for width in widths), *rows]:
        aligned = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print(f"| {' | '.join(aligned)} |")
    for note in notes(summaries):
        print(note)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        print(f"table in {args.csv}")
    return 0


def title(summary: dict) -> str:
    """Which network, taught how."""
    if summary["teacher"] is None:
        return f"{summary['student']}, supervised"
    preset = "" if summary["preset"] == "clean" else f", {summary['preset']}"
    return f"{summary['student']} <- {summary['teacher']}, {summary['method']}{preset}"


def cells(summary: dict, space: str) -> tuple[str, ...]:
    mean, counts = summary[space]["mean"], summary[space]["counts"]

    def number(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    return (
        title(summary) + (f" [{summary['tag']}]" if summary["tag"] else ""),
        number(mean["dice"], 2, 100), number(mean["jaccard"], 2, 100), number(mean["hd95"], 2), number(mean["asd"], 2),
        f"{counts['missed']}/{counts['pairs']}", f"{summary['parameters']:,}", number(summary["gmacs"], 2),
        number(summary["ms_per_volume"], 0),
    )  # fmt: skip


def notes(summaries: list[dict]) -> list[str]:
    """What a reader must know to compare the rows."""
    first = summaries[0]
    cases = {summary["resampled"]["cases"] for summary in summaries}
    steps = ", ".join(f"{title(s)} {s['step']} of {s['max_steps']}" for s in summaries)
    lines = [
        f"Dice and Jaccard in %, means over {'/'.join(map(str, sorted(cases)))} {first['split']} cases; HD95 "
        f"{first['hd95_definition']}, ASD one-sided; 'missed': organs not found at all, of all organs (their distances "
        f"are undefined and left out).",
        f"GMACs of one patch {'x'.join(map(str, first['patch_size']))}; milliseconds on {first['device']}"
        + (f" with {first['threads']} thread(s)." if first["device"] == "CPU" else "."),
        f"Checkpoint steps: {steps}.",
    ]
    if any(summary["selected_on_reported"] for summary in summaries):
        lines.append("This data set has no third list: best.pt was selected on the cases reported here; see last.pt too.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
