r"""What networks cost where they are deployed, and what Dice remains: PyTorch, ONNX Runtime and
OpenVINO in one table.

    python benchmarks/deployment.py --ckpt TEACHER/best.pt STUDENT/best.pt --threads 2 \
        --out deployment.md
    python benchmarks/deployment.py --ckpt best.pt --int8 --dice --data-root data/Task04_Hippocampus
    python benchmarks/deployment.py --ckpt best.pt --runtimes pytorch onnx --repeats 5

Each checkpoint is exported by tools/export.py, which checks it against PyTorch. Latency: median
over `--repeats` passes of one window of the run's patch_size. All networks and runtimes take turns,
so that a machine that slows down slows all of them; each timed pass follows a rest and one that is
not timed, so that idle threads of another runtime do not disturb it. Each row is printed as soon as
its model is there, with the time of one pass; the table of medians follows. Ctrl-C ends the
measuring, and what was measured until then is printed and written. Memory: peak of a fresh
process above one that has loaded PyTorch and the input, so weights and runtime count (Linux).
--dice: mean Dice over the cases of the test list, or of the validation list where there is no
other, on the grid where the network predicts; without the data the column is empty. A row for int8
is the static quantisation of `tools/export.py --int8`. Packages:
pip install -r requirements-export.txt
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import harness
from dataloaders import DataError
from tools import deployed, export
from utils.checkpoint import write_text
from utils.complexity import count_macs, count_parameters, peak_memory
from utils.config import add_plugin_flags
from utils.exported import FORMATS, ExportedModel, model_files
from utils.scripts import run_tool

SETTLE = 0.3  # seconds after which the threads of an idle runtime no longer wait in a loop
STOPPED = 130  # exit status after Ctrl-C
RUNTIMES = {"pytorch": "PyTorch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
HEADER = (
    "network",
    "runtime",
    "precision",
    "parameters",
    "GMACs",
    "file MB",
    "ms/window",
    "x PyTorch",
    "peak MiB",
    "Dice %",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", required=True, nargs="+", type=Path, help="best.pt of teacher and students"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--int8", action="store_true", help="rows of the quantised models too")
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed passes of each model (default %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of every runtime"
    )
    parser.add_argument(
        "--data-root", type=Path, help="folder of the data set, if it is not where the run found it"
    )
    parser.add_argument("--cache-dir", type=Path, help="folder of preprocessed cases")
    parser.add_argument(
        "--cases", type=int, default=0, metavar="N", help="cases for the Dice; 0: the whole list"
    )
    parser.add_argument("--dice", action="store_true", help="measure the Dice, which takes long")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    add_plugin_flags(parser)
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.threads < 1 or args.cases < 0:
        parser.error("--repeats and --threads must be at least 1, --cases 0 or more")
    return args


def name_of(checkpoint: dict) -> str:
    """Network and how it was trained."""
    config, name = checkpoint["config"], checkpoint["network"]["name"]
    if config["method"] == "supervised":
        return f"{name}, supervised"
    taught = f" <- {config['teacher']}" if "teacher" in config else ""
    return f"{name}{taught}, {config['method']}"


def export_all(args: argparse.Namespace, path: Path, folder: Path) -> dict[tuple[str, str], Path]:
    """(runtime, precision) -> exported model of the checkpoint at `path`."""
    found = {}
    common = ["--ckpt", str(path), "--out", str(folder), "--threads", str(args.threads)]
    for key in ("data_root", "cache_dir"):
        common += (
            [f"--{key.replace('_', '-')}", str(getattr(args, key))] if getattr(args, key) else []
        )
    common += [f"--plugin={reference}" for reference in args.plugin]
    common += ["--allow-changed-plugin"] * args.allow_changed_plugin
    for form in ("onnx", "openvino"):
        for int8 in (False, True) if args.int8 else (False,):
            if form in args.runtimes:
                # The table shows what int8 costs: no bound here.
                extra = ["--int8", "--max-dice-cost", "1", "--cases", "1"] if int8 else []
                with contextlib.redirect_stdout(sys.stderr):
                    export.main([*common, "--format", form, *extra])
                found[form, "int8" if int8 else "float32"] = (
                    folder / f"model{'_int8' if int8 else ''}{FORMATS[form]}"
                )
    return found


def dice_of(
    args: argparse.Namespace, checkpoint: dict, model: nn.Module, title: str
) -> float | None:
    """Mean Dice; None where the data are not there or not wanted."""
    if not args.dice:
        return None
    described = deployed.description(checkpoint)
    try:
        dataset = deployed.open_dataset(described, args.data_root, args.cache_dir)
        _, cases = deployed.listed(checkpoint, dataset, ("test", "val"))
        cases = cases[: args.cases or None]
        return deployed.mean_dice_of(
            model, dataset, described, tqdm(cases, desc=f"Dice, {title}", unit="case")
        )
    except DataError as problem:
        if args.data_root:  # asked for
            raise
        print(f"note: no Dice of {title}: {str(problem).splitlines()[0]}", file=sys.stderr)
        return None


@torch.inference_mode()
def run_once(model: nn.Module, window: torch.Tensor) -> None:
    model(window)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    measured: list[dict] = []
    stopped = False
    try:
        with tempfile.TemporaryDirectory() as scratch:
            measure(args, Path(scratch), measured)
    except KeyboardInterrupt:
        if not measured:
            raise
        stopped = True
    text = f"{table(measured)}\n\n{notes(args, measured, stopped)}\n"
    print(f"\n{text}")
    if args.out:
        write_text(args.out, text)
        print(f"written to {args.out}")
    return STOPPED if stopped else 0


def measure(args: argparse.Namespace, scratch: Path, measured: list[dict]) -> None:
    """Put a row for each model into `measured`, as each is there, and its times. scratch: a folder
    for the exported models.
    """
    passes = {}
    for index, path in enumerate(args.ckpt):
        checkpoint, network = deployed.load_network(path, args.plugin, args.allow_changed_plugin)
        window = torch.randn(
            1, checkpoint["network"]["in_channels"], *checkpoint["config"]["patch_size"]
        )
        models = {("pytorch", "float32"): None, **export_all(args, path, scratch / str(index))}
        for (runtime, precision), file in models.items():
            if runtime not in args.runtimes:
                continue
            make = functools.partial(
                deployed.network_of, path, args.plugin, args.allow_changed_plugin
            )
            if file is not None:
                make = functools.partial(ExportedModel, file, args.threads)
            model = make()
            key = (index, runtime, precision)
            run = functools.partial(run_once, model, window)
            row = {
                "key": key,
                "network": name_of(checkpoint),
                "runtime": RUNTIMES[runtime],
                "parameters": count_parameters(network),
                "gmacs": count_macs(network, window.shape) / 1e9,
                "bytes": sum(part.stat().st_size for part in model_files(file)) if file else None,
                "mib": peak_memory(make, window.shape, args.threads, whole=True),
                "dice": dice_of(
                    args,
                    checkpoint,
                    model,
                    f"{name_of(checkpoint)}, {RUNTIMES[runtime]} {precision}",
                ),
                "first": harness.interleaved({key: run}, 1, settle=SETTLE)[key],
                "seconds": [],
            }
            passes[key] = run
            measured.append(row)
            lines = table(measured).splitlines()
            print("\n".join(lines if len(measured) == 1 else lines[-1:]), flush=True)
    for k in range(args.repeats):
        seconds = harness.interleaved(passes, 1, warm=k == 0, settle=SETTLE)
        for row in measured:
            row["seconds"].append(seconds[row["key"]])


def latency(row: dict) -> float:
    """Median seconds of the interleaved passes; before them, the time of the first."""
    return statistics.median(row["seconds"] or [row["first"]])


def table(rows: Sequence[dict]) -> str:
    """Markdown; a cell without a value is '-'."""
    seconds = {row["key"]: latency(row) for row in rows}
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|---|" + "---:|" * (len(HEADER) - 3)]
    for row in rows:
        index, _, precision = row["key"]
        time, reference = seconds[row["key"]], seconds.get((index, "pytorch", "float32"))
        cells = (
            row["network"],
            row["runtime"],
            precision,
            f"{row['parameters']:,}",
            f"{row['gmacs']:.3f}",
            "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}",
            f"{1000 * time:.1f}",
            "-" if reference is None else f"{reference / time:.2f}",
            f"{row['mib']:.0f}",
            "-" if row["dice"] is None else f"{100 * row['dice']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(args: argparse.Namespace, rows: Sequence[dict], stopped: bool) -> str:
    runtimes = ", ".join(
        f"{name} {version(name)}"
        for name, form in (("onnxruntime", "onnx"), ("openvino", "openvino"))
        if form in args.runtimes
    )
    passes = len(rows[0]["seconds"])
    ended = "Stopped by Ctrl-C: not all was measured.\n" if stopped else ""
    how = f"median of {passes} interleaved passes, each" if passes else "one pass"
    return (
        f"{ended}Latency of one window, batch 1, {how} after {SETTLE} s of rest "
        f"and one pass that is not timed; memory above an idle process that has loaded PyTorch.\n"
        f"{harness.machine(args.threads)}" + (f"; {runtimes}" if runtimes else "")
    )


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError, export.ExportError))
