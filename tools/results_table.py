r"""Tables of tested runs: accuracy beside size and speed, each seed and the mean over seeds.

    python tools/results_table.py runs/btcv/supervised/resunet/seed0 \
        runs/btcv/acf_bckd/resunet-unet/seed0
    python tools/results_table.py runs/btcv/*/*/seed0 --space native --csv table.csv
    python tools/results_table.py --layout kd --runs-dir runs --dataset btcv --csv btcv.csv

Runs that cannot stand beside the others, as they are not tested, or on other cases, are left out
and named at the end, with the command that completes them.

--layout kd gathers every summary.json of best.pt under --runs-dir, averages over the seeds and
prints the tables of the ACF-BCKD paper in Markdown, each cell beside the published figure
(tools/published_kd.yaml). --layout ssl does the same for summary_published.json of few-label runs
and the tables of CRKD (tools/published_ssl.yaml); --protocol clean takes summary.json instead.
"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import tables
from utils.checkpoint import read_table, write_table
from utils.config import ConfigError, read_yaml
from utils.runlog import read_log
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
    tested, left_out = {}, []
    for run in args.runs:
        path = run if run.suffix == ".json" else run / "summary.json"
        if path.is_file():
            tested[path] = tables.read_summary(path)
        else:
            left_out.append((path, *untested(path)))
    usual = most_common_list(tested)
    for path, summary in list(tested.items()):
        if difference := other_list(path, summary, usual):
            del tested[path]
            command = f"{command_of_test(path.parent, path.stem)} --split {usual['split']}"
            if summary["dataset"] != usual["dataset"]:
                command = f"python tools/results_table.py {shlex.quote(str(path))}"
            left_out.append((path, difference, command))
    summaries = list(tested.values())
    if summaries:
        header, rows = tables.runs_table(summaries, args.space)
        print(tables.markdown(header, rows, right=True))
        print("\n".join(tables.notes(summaries, args.space)))
    if args.csv and summaries:
        write_table(args.csv, [header, *rows])
        print(f"table in {args.csv}")
    if left_out:
        print(f"{len(left_out)} left out:")
    for path, reason, command in left_out:
        print(f"- {path.parent}: {reason}" + (f"; run: {command}" if command else ""))
    if not summaries:
        sys.exit("error: none of these runs is tested")
    return 0


def untested(path: Path) -> tuple[str, str]:
    """Why a summary is not there, and the command that makes it; '' where there is none."""
    folder = path.parent
    best, config = folder / "best.pt", folder / "config.yaml"
    if not best.is_file() and not config.is_file():
        return "no run there: neither config.yaml nor best.pt", ""
    if config.is_file():
        try:
            settings = read_yaml(config)
        except ConfigError as error:
            return f"its configuration cannot be read: {error}", ""
        last = max((line["step"] + 1 for line in read_log(folder / "log.jsonl")), default=0)
        wanted = settings.get("max_steps", 0)
        if last < wanted:
            resume = f"python {script(settings, 'train')} --resume {shlex.quote(str(folder))}"
            return f"still training, or stopped: step {last} of {wanted}", resume
    return "not tested", command_of_test(folder, path.stem)


def script(settings: dict, what: str) -> str:
    """The script that trains or tests a run with these settings."""
    axes = len(settings.get("patch_size", ())) or 3
    if what == "test":
        return f"test_{axes}d.py"
    if "student" in settings:
        return "train_3d_distill.py"
    return f"train_{axes}d_crkd.py"


def command_of_test(folder: Path, stem: str) -> str:
    """The command that tests the run in `folder`. stem: of the name of its summary."""
    config = folder / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    name = "last.pt" if stem.startswith("summary_last") else "best.pt"
    command = f"python {script(settings, 'test')} --ckpt {shlex.quote(str(folder / name))}"
    return command + " --protocol published" * ("_published" in stem)


def cases_of(path: Path) -> list[str]:
    """The cases that a summary is of; empty where the scores are not beside it."""
    scores = path.with_name(path.name.replace("summary", "metrics", 1)).with_suffix(".csv")
    if not scores.is_file():
        return []
    header, *lines = read_table(scores) or [[]]
    if "case" not in header:
        return []
    return sorted({line[header.index("case")] for line in lines if len(line) == len(header)})


def most_common_list(tested: dict[Path, dict]) -> dict:
    """Data set, split, number and names of the cases on which most of the runs are scored, of
    several the first.
    """
    known = {}
    for path, summary in tested.items():
        known[path] = (summary["dataset"], summary["split"], summary["native"]["cases"])
    if not known:
        return {}
    (chosen, _), *_ = Counter(known.values()).most_common(1)
    names = [tuple(cases_of(path)) for path, key in known.items() if key == chosen]
    (most, _), *_ = Counter(filter(None, names)).most_common(1) or [((), 0)]
    return dict(zip(("dataset", "split", "cases"), chosen)) | {"names": list(most)}


def other_list(path: Path, summary: dict, usual: dict) -> str:
    """How the cases of a run differ from those of the others; '' if they do not."""
    if summary["dataset"] != usual["dataset"]:
        return f"of the data set {summary['dataset']}, the others of {usual['dataset']}"
    if summary["split"] != usual["split"]:
        return f"scored on the list {summary['split']}, the others on {usual['split']}"
    cases = summary["native"]["cases"]
    if cases != usual["cases"]:
        return f"scored on {cases} cases, the others on {usual['cases']}"
    names = cases_of(path)
    if not names or not usual["names"]:
        return ""
    differing = sorted(set(names) - set(usual["names"])) or sorted(set(usual["names"]) - set(names))
    return f"scored on other {usual['split']} cases, such as {differing[0]}" if differing else ""


if __name__ == "__main__":
    sys.exit(run_tool(main))
