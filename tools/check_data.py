r"""Examine a whole data set as training would, before training, and list everything that is wrong
with it.

    python tools/check_data.py --config configs/btcv.yaml
    python tools/check_data.py --config configs/hippocampus.yaml \
        --opts data_root=/data/hippocampus --json faults.json
    python tools/check_data.py --config configs/acdc.yaml --strict
    python tools/check_data.py --config configs/mine.yaml --opts labelled=8 unlabelled=data/more

Works for every configuration of the three training scripts, and through the code that they check
data with: what is an error here keeps a run from starting, with the same words. All files of all
lists are read, whatever the cache remembers of them; cases without labels too, also where a run has
no use for them, and where labelled and unlabelled ones overlap is said. Of NIfTI data the
preprocessed cases stay in cache_dir, so that the run that follows starts at once; --no-cache keeps
nothing. Exit status: 0 without errors (warnings are allowed, or counted by --strict), else 1.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from dataloaders import DATASETS, FEW_LABELS, DataError, Report, build_dataset
from dataloaders.faults import FAULTS, Finding, grouped
from utils.checkpoint import write_text
from utils.config import ConfigError, config_path, read_yaml
from utils.run import no_selection
from utils.scripts import run_tool

COLUMNS = ("level", "fault", "list", "file", "found", "expected", "fix")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="faults:\n"
        + "\n".join(f"  {fault:14} {meaning}" for fault, meaning in FAULTS.items()),
    )
    parser.add_argument(
        "--config",
        required=True,
        type=config_path,
        help="YAML file of the data set, such as configs/btcv.yaml, or just btcv",
    )
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the YAML file"
    )
    parser.add_argument("--strict", action="store_true", help="warnings count as errors")
    parser.add_argument(
        "--all", action="store_true", help="a row for every file, also of warnings that many share"
    )
    parser.add_argument("--json", type=Path, help="also write all findings there")
    parser.add_argument("--no-cache", action="store_true", help="keep no preprocessed case")
    parser.add_argument(
        "--allow-outside", action="store_true", help="lists may name files outside of the data root"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    report = Report()
    cases = examine(args, report)
    rows = report.findings if args.all else shortened(report)
    if rows:
        print_table([row(finding) for finding in sorted(rows, key=lambda finding: finding.level)])
    errors, warnings = len(report.errors), len(report.warnings)
    counts = ", ".join(f"{number} {split}" for split, number in cases.items())
    print(
        f"{errors} error(s), {warnings} warning(s) in {sum(cases.values())} files or cases "
        f"({counts})"
    )
    for split, shares in report.unknown.items():
        if any(shares):
            mean = 100 * sum(shares) / len(shares)
            print(f"{mean:.1f} % of the {split} labels' voxels are marked as not labelled")
    if args.json:
        write_json(args, report, cases)
        print(f"findings in {args.json}")
    return int(bool(errors) or (args.strict and bool(warnings)))


def examine(args: argparse.Namespace, report: Report) -> dict[str, int]:
    """Look at the whole data set of a configuration; -> the number of cases or files of each
    list.
    """
    # a data folder that is not there is a finding; wrong arguments end the program
    with report.catching():
        cfg = settings(args)
        arguments = cfg.dataset_arguments()
        if "memory_gb" in arguments:
            arguments["memory_gb"] = 0.0
        dataset = build_dataset(**arguments, allow_outside=args.allow_outside)
        splits = dataset.splits(getattr(cfg, "labelled", None), report)
        dataset.prepare(splits, report, not args.no_cache, cfg.select_on)
        if not splits[cfg.select_on] and not report.errors:
            found = no_selection(cfg.select_on, cfg.split_dir or args.config)
            report.error("empty list", args.config, found)
        return {split: len(found) for split, found in splits.items()}
    return {}


def settings(args: argparse.Namespace):
    """The configuration as the first of the scripts reads it that takes it."""
    refusals = []
    for script in scripts_for(args):
        try:
            return script.parse_args(["--config", str(args.config), "--opts", *args.opts])[1]
        except ConfigError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def scripts_for(args: argparse.Namespace) -> list:
    """The training scripts that a configuration may be for, the likeliest first."""
    given = [option.partition("=") for option in args.opts]
    values = read_yaml(args.config) | {key: yaml.safe_load(value) for key, _, value in given}
    name, sides = values.get("format", "msd"), values.get("patch_size")
    if isinstance(sides, list):
        dims = len(sides)
    else:
        dims = DATASETS[name].dims if name in DATASETS else 3
    few_labels = train_2d_crkd if dims == 2 else train_3d_crkd
    if name in FEW_LABELS or (name not in DATASETS and "datalist" not in values):
        return [few_labels]
    if values.get("labelled") or values.get("unlabelled"):
        return [few_labels, train_3d_distill]
    return [train_3d_distill]


def shortened(report: Report) -> list[Finding]:
    """Errors one by one; of warnings that more than three files share the first, with their
    number.
    """
    rows = list(report.errors)
    for group in grouped(report.warnings):
        if len(group) > 3:
            first = group[0]
            group = [
                dataclasses.replace(
                    first, file=f"{first.file} and {len(group) - 1} more (--all lists them)"
                )
            ]
        rows += group
    return rows


def row(finding: Finding) -> tuple[str, ...]:
    return (
        finding.level,
        finding.fault,
        finding.split,
        finding.file,
        finding.found,
        finding.expected,
        finding.fix,
    )


def print_table(rows: list[tuple[str, ...]]) -> None:
    """One table; long cells are wrapped to the terminal's width."""
    width = max(shutil.get_terminal_size((160, 40)).columns, 100)
    needed = [max(len(cells[k]) for cells in [COLUMNS, *rows]) for k in range(len(COLUMNS))]
    widths = list(needed)
    free = width - 3 * len(COLUMNS) - 1 - sum(needed[:3])
    for k, share in zip(range(3, 7), (0.3, 0.3, 0.16, 0.24)):
        widths[k] = min(needed[k], max(int(free * share), 10))
    line = ["-" * w for w in widths]
    for cells in [COLUMNS, line, *rows]:
        wrapped = [textwrap.wrap(cell, w) or [""] for cell, w in zip(cells, widths)]
        for part in range(max(map(len, wrapped))):
            shown = [
                (lines[part] if part < len(lines) else "").ljust(w)
                for lines, w in zip(wrapped, widths)
            ]
            print(f"| {' | '.join(shown)} |")


def write_json(args: argparse.Namespace, report: Report, cases: dict[str, int]) -> None:
    content = {
        "config": str(args.config),
        "opts": args.opts,
        "cases": cases,
        "errors": len(report.errors),
        "warnings": len(report.warnings),
        "findings": [
            {**dataclasses.asdict(finding), "message": str(finding)} for finding in report.findings
        ],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
