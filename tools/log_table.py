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

from tools.tables import log_table, markdown
from utils.runlog import read_log
from utils.scripts import run_tool

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
    header, rows = log_table(logs, args.keys, args.steps)
    if not rows:
        known = sorted(
            {f"{entry['kind']}/{name}" for log in logs.values() for entry in log for name in entry}
        )
        sys.exit(
            f"error: none of {', '.join(args.keys)} is in these logs; there is {', '.join(known)}"
        )
    print(markdown(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
