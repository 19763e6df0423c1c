"""What the benchmarks share: timing two or more ways of doing one thing in alternation, and a table
with verdicts.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CPU = torch.device("cpu")
PACKAGES = ("torch", "monai", "medpy", "numpy", "numba", "scipy")


def arguments(doc: str, repeats: int = 3) -> argparse.ArgumentParser:
    """Parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=repeats,
        help="timed calls of each side (default %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes, as a smoke test; bars are not enforced"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    return parser


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm: bool = True,
    settle: float = 0.0,
) -> dict[str, float]:
    """Median seconds of each function, called in alternation, if `warm` after one call each that is
    not timed.

    Alternation lets a machine that slows down slow all of them. With `settle`, every timed call
    comes after that many seconds of rest and a call that is not timed: idle threads of another
    library wait for work in a loop for a while, and take the processor from whoever has the next
    turn.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for function in functions.values() if warm else ():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if settle:
                time.sleep(settle)
                function()
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def faster(part: str, peer: str, peer_seconds: float, ours_seconds: float, bar: float) -> dict:
    """A row for a part that must take at most 1 / bar of the peer's time."""
    ratio = peer_seconds / ours_seconds
    return _row(
        part, peer, peer_seconds, ours_seconds, ratio, f"{bar:g}x faster", ratio >= bar, "x faster"
    )


def overhead(part: str, peer: str, peer_seconds: float, ours_seconds: float, bar: float) -> dict:
    """A row for a part that must take at most `bar` times the peer's time."""
    ratio = ours_seconds / peer_seconds
    return _row(
        part,
        peer,
        peer_seconds,
        ours_seconds,
        ratio,
        f"at most {bar:g}x",
        ratio <= bar,
        "x its time",
    )


def _row(part, peer, peer_seconds, ours_seconds, ratio, bar, passed, unit) -> dict:
    return {
        "part": part,
        "peer": peer,
        "peer_seconds": peer_seconds,
        "ours_seconds": ours_seconds,
        "ratio": f"{ratio:.2f}{unit}",
        "bar": bar,
        "passed": passed,
    }


def table(rows: Sequence[Mapping]) -> str:
    """Rows as a Markdown table; times in milliseconds."""
    lines = [
        "| part | peer | peer ms | ours ms | ratio | bar | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = (f"{1000 * row[key]:,.1f}" for key in ("peer_seconds", "ours_seconds"))
        cells = [
            row["part"],
            row["peer"],
            *times,
            row["ratio"],
            row["bar"],
            "met" if row["passed"] else "MISSED",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a peer of some benchmarks only
        return "missing"


def machine(threads: int, device: torch.device = CPU) -> str:
    """One line: versions, kind of processor, threads, date."""
    versions = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    processor = f"{platform.machine()} CPU, {threads} thread(s)"
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}, {processor}"
    return f"{processor}; {versions}; {datetime.date.today().isoformat()}"


def report(rows: Sequence[Mapping], args: argparse.Namespace, device: torch.device = CPU) -> int:
    """Print the table, write it to `args.out`; 1 if a bar is missed, which `--small` does not
    count, else 0.
    """
    text = f"{table(rows)}\n\n{machine(args.threads, device)}\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    missed = [row["part"] for row in rows if not row["passed"]]
    if missed and not args.small:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0
