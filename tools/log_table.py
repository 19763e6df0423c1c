r"""How figures of runs developed: a table of log.jsonl at a few steps, one line per run and figure.

    python tools/log_table.py runs/acdc/crkd/unet2d-3/seed0 \
        --keys val/dice train/mask_ratio train/pseudo_accuracy
    python tools/log_table.py runs/acdc/*/*/seed0* --keys val/dice --steps 150 300 450 600

Figures of 'train' are means since the previous line of the log. A step that was not logged shows
the last one before.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.runlog import read_log

KEYS = (
    "val/dice",
    "train/mask_ratio",
    "train/pseudo_accuracy",
    "train/pseudo_foreground",
    "train/true_foreground",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument(
        "--keys", nargs="+", default=KEYS, help="train/NAME or val/NAME; default: %(default)s"
    )
    parser.add_argument("--steps", nargs="+", type=int, help="default: five, evenly spaced")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "log.jsonl").is_file():
            sys.exit(f"error: {run / 'log.jsonl'}: no such log; name run folders")
    logs = {run: read_log(run / "log.jsonl") for run in args.runs}
    last = max((entry["step"] + 1 for log in logs.values() for entry in log), default=0)
    steps = args.steps or sorted({max(1, round(last * k / 5)) for k in range(1, 6)})
    rows = [
        [
            f"{run.parent.parent.name} {run.parent.name} {run.name}",
            key,
            *(shown(value_at(log, key, s)) for s in steps),
        ]
        for run, log in logs.items()
        for key in args.keys
        if any(key_of(entry, key) for entry in log)
    ]
    if not rows:
        known = sorted(
            {f"{entry['kind']}/{name}" for log in logs.values() for entry in log for name in entry}
        )
        sys.exit(
            f"error: none of {', '.join(args.keys)} is in these logs; there is {', '.join(known)}"
        )
    header = ["run", "figure", *(f"step {step}" for step in steps)]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |")
    return 0


def key_of(entry: dict, key: str) -> bool:
    kind, _, name = key.partition("/")
    return entry["kind"] == kind and name in entry


def value_at(log: list[dict], key: str, step: int) -> float | None:
    """The last logged value before `step` updates were done; None if there is none."""
    values = [
        entry[key.partition("/")[2]] for entry in log if key_of(entry, key) and entry["step"] < step
    ]
    return values[-1] if values else None


def shown(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}" if -1 <= value <= 1 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
