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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import tables
from utils.checkpoint import write_table
from utils.scripts import run_tool


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
        "--dataset",
        help="for --layout kd and ssl; default: every one with published figures or runs",
    )
    parser.add_argument(
        "--protocol", choices=("published", "clean"), default="published", help="for --layout ssl"
    )
    args = parser.parse_args()
    if args.layout == "runs":
        if not args.runs:
            parser.error("name the run folders, or take --layout kd or ssl")
        return named_runs(args)
    if args.layout == "kd":
        cells = tables.kd_layout(args.runs_dir, args.dataset, args.space)
    else:
        cells = tables.few_labels_layout(args.runs_dir, args.dataset, args.protocol)
    if args.csv and cells:
        tables.write_csv(args.csv, cells)
        print(f"cells in {args.csv}")
    return 0


def named_runs(args: argparse.Namespace) -> int:
    """Print a table of the runs that are named."""
    summaries = []
    for run in args.runs:
        path = run if run.suffix == ".json" else run / "summary.json"
        if not path.is_file():
            best = path.parent / "best.pt"
            sys.exit(
                f"error: {path}: no such summary; make it with: python test_3d.py --ckpt {best}"
            )
        summaries.append(tables.read_summary(path))
    header, rows = tables.runs_table(summaries, args.space)
    print(tables.markdown(header, rows, right=True))
    print("\n".join(tables.notes(summaries, args.space)))
    if args.csv:
        write_table(args.csv, [header, *rows])
        print(f"table in {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
