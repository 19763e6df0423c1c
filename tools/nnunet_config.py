"""The configuration of students of an nnU-Net, from its results folder, for tools/new_config.py.

spacing, intensity  those of the plans, axis by axis as our images have them; the image is not
                    turned unless nnU-Net turned it.
patch_size          that of the plans, each side up to a multiple that the students take too.
lists               a fold of splits_final.json: beside the data, --fold-lists, or in the folder
                    where nnU-Net keeps preprocessed data (nnUNet_preprocessed); else drawn.
student             for each of --networks the widest candidate within --budget-ms (of one patch, on
                    --threads of this machine) and --budget-params; without a budget 6 % of the
                    teacher's parameters.
"""

import argparse
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dataloaders import DataError
from dataloaders.lists import read_json
from networks import NETWORKS, build_network
from tools.make_splits import write_lists
from utils import nnunet
from utils.complexity import count_parameters, measure_latency
from utils.config import ConfigError

SHARE = 0.06  # of the teacher's parameters, where no budget is given
DIVISORS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # of widths
UNET_WIDTHS = (32, 64, 128, 256)
REPEATS = 3  # of a timed pass
SPLITS = "splits_final.json"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("students of an nnU-Net").add_argument
    add("--nnunet", type=Path, metavar="FOLDER", help="its results folder, TRAINER__PLANS__CONFIG")
    add("--fold", type=int, help="whose lists to use; default: the first that is there")
    add("--fold-lists", type=Path, metavar="FILE", help="splits_final.json, if not in --data")
    add("--budget-ms", type=float, help="milliseconds of a student's pass over one patch")
    add("--budget-params", type=float, help="parameters of a student")
    add("--threads", type=int, help="CPU threads to time on; default: PyTorch's number")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop at flags that do not go together."""
    for name in ("fold", "fold_lists", "budget_ms", "budget_params", "threads"):
        value = getattr(args, name)
        if value is not None and not args.nnunet:
            parser.error(f"--{name.replace('_', '-')} goes with --nnunet")
        if name in ("budget_ms", "budget_params", "threads") and value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if args.nnunet and args.labelled:
        parser.error(
            "--labelled: with --nnunet 0, where no scan has a label; else leave it out, and give "
            "the number to train_3d_distill.py"
        )
    if not args.nnunet and args.labelled == 0:
        parser.error("--labelled 0: without labels a teacher is needed; it goes with --nnunet")
    if args.nnunet and args.patch:
        parser.error("--patch: with --nnunet the patch is that of its plans")
    if not args.nnunet and "nnunet" in (args.networks or ()):
        parser.error("--networks nnunet goes with --nnunet")


def fitting_results(args: argparse.Namespace, told: dict) -> nnunet.Results:
    """What the results folder says; DataError or CheckpointError if it is not of data as `told`."""
    results = nnunet.read_results(args.nnunet)
    if told["in_channels"] != results.in_channels:
        raise DataError(
            f"{args.data}: {told['in_channels']} channel(s), the nnU-Net of {args.nnunet} takes "
            f"{results.in_channels}"
        )
    results.outputs(told["class_names"], str(args.nnunet))
    return results


def choose(
    args: argparse.Namespace, results: nnunet.Results, told: dict
) -> dict[str, tuple[object, str]]:
    """Key -> value and why, but for the lists and lengths. args.candidates: what was timed."""
    plan = f"of {results.configuration} in plans.json"
    turned = f"nnU-Net turned scans to {results.orientation}" if results.orientation else ""
    schemes = ", ".join(channel["scheme"] for channel in results.intensity_channels)
    choices: dict[str, tuple[object, str]] = {
        "orientation": (results.orientation, turned or "as stored, like nnU-Net"),
        "spacing": (list(results.spacing), f"mm, {plan}"),
        "intensity": ("nnunet", "normalised, then resampled with cubic splines"),
        "intensity_channels": (list(results.intensity_channels), schemes),
        "crop_foreground": (True, "to the box of non-zero voxels"),
    }
    choices |= choose_patch(args, results)
    patch = choices["patch_size"][0]
    args.candidates = candidates(args, results, patch, len(told["class_names"]))
    picked = pick(args, args.candidates)
    first = next(iter(picked.values()))
    narrow = {row["network"]: row["arguments"] for row in picked.values() if row["arguments"]}
    folds = ", ".join(results.chosen(()))
    return choices | {
        "teacher": ("nnunet", f"{args.candidates[0]['parameters']:,} parameters"),
        "teacher_checkpoint": (args.nnunet.as_posix(), f"fold {folds}"),
        "student": (first["network"], f"{first['parameters']:,} parameters"),
        "network_args": (narrow, ""),
    }


def fold_lists(
    args: argparse.Namespace, results: nnunet.Results, dataset, made: list[Path]
) -> tuple:
    """split_dir and why, of the lists that the nnU-Net was trained with; the fold too, if they lie
    beside the data; () where they are nowhere. Files that are written go to `made`.
    """
    numbered = [int(fold) for fold in results.folds if fold.isdecimal()]
    fold = args.fold if args.fold is not None else (numbered or [0])[0]
    kept = os.environ.get("nnUNet_preprocessed", "")
    places = [args.data / SPLITS]
    if kept and results.dataset:
        places.append(Path(kept) / results.dataset / SPLITS)
    if args.fold_lists:
        places = [args.fold_lists]
    found = next((path for path in places if path.is_file()), None)
    others = [str(other) for other in numbered if other != fold]
    seen = f"; fold {', '.join(others)} of the teacher saw its val list" if others else ""
    if found is None and args.fold_lists:
        raise DataError(f"{args.fold_lists}: no such file")
    if found is None:
        return ()
    why = f"fold {fold} of {found}{seen}"
    if found == args.data / SPLITS:
        return "", why, fold
    folds = read_json(found, list, "a list of folds")
    entry = folds[fold] if 0 <= fold < len(folds) else None
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(split), list) for split in ("train", "val")
    ):
        raise DataError(f"{found}: {len(folds)} folds, no fold {fold} with 'train' and 'val'")
    lists = {split: [str(case) for case in entry[split]] for split in ("train", "val")}
    tested = sorted(case.name for case in dataset.own_test())
    lists |= {"test": tested} if tested else {}
    folder = args.splits or Path("splits") / args.name
    if (folder / "train.txt").is_file():
        raise ConfigError(f"{folder}: has lists already; remove them or choose another --splits")
    made += [folder / f"{split}.txt" for split in lists]
    made += [above for above in (folder, *folder.parents) if not above.exists()]
    write_lists(folder, lists, f"fold {fold} of {found.name}")
    return str(folder), why


def without_labels(args: argparse.Namespace, dataset) -> tuple[str, str]:
    """split_dir and why, where the nnU-Net's prediction is the only label: lists that are there, or
    none, since all scans are trained on and none can be validated on.
    """
    folder = args.splits or Path("splits") / args.name
    if (folder / "train.txt").is_file():
        return str(folder), "lists that are there"
    if dataset.cases():
        raise ConfigError(
            f"{args.data}: has labels; leave --labelled 0 out here, so that some validate, and "
            "give it to train_3d_distill.py"
        )
    return "", "all scans are trained on"


def choose_patch(args: argparse.Namespace, results: nnunet.Results) -> dict[str, tuple]:
    """patch_size and what depends on it."""
    multiples = [NETWORKS["nnunet"].multiples(**results.network)]
    for network in args.networks:
        if network != "nnunet":
            multiples.append((NETWORKS[network].stride,) * 3)
    steps = [math.lcm(*sides) for sides in zip(*multiples)]
    patch = [-(-side // step) * step for side, step in zip(results.patch_size, steps)]
    same = tuple(patch) == results.patch_size
    why = "as in plans.json" if same else f"{list(results.patch_size)} in plans.json, made larger"
    turned = patch[0] == patch[1] and math.isclose(*results.spacing[:2], rel_tol=0.05)
    return {
        "patch_size": (patch, f"{why}; multiples of {steps}"),
        "crop": ("pos_neg", "every second patch is centred on a label"),
        "rot90_prob": (0.2, "square") if turned else (0.0, "not square, so it cannot be turned"),
        "cases_per_batch": (1, "several patches of one scan, which is read once"),
        "crops_per_case": (results.batch_size, "batch_size of plans.json"),
    }


def candidates(
    args: argparse.Namespace, results: nnunet.Results, patch: Sequence[int], classes: int
) -> list[dict]:
    """Networks smaller than the teacher, which stands first, with their parameters and the
    milliseconds of a pass.
    """
    tried = [("nnunet", results.network, "the teacher")]
    with torch.device("meta"):
        teacher = build_network("nnunet", results.in_channels, classes, **results.network)
    most = parameter_budget(args, count_parameters(teacher))
    for network in args.networks:
        if network == "nnunet":
            widths = list(results.network["features_per_stage"])
        elif network == "unet":
            widths = list(UNET_WIDTHS)
        else:
            tried.append((network, {}, "default"))
            continue
        key = "features_per_stage" if network == "nnunet" else "channels"
        given = results.network if network == "nnunet" else {}
        made = functools.partial(narrowed, given, key, widths)
        divisors = list(DIVISORS[network == "nnunet" :])
        if most:
            for first in range(widths[0] - 1, 0, -1):  # between two of them may be a wider one
                arguments = made(widths[0] / first)
                with torch.device("meta"):
                    built = build_network(network, results.in_channels, classes, **arguments)
                if count_parameters(built) <= most:
                    divisors.append(widths[0] / first)
                    break
        for divisor in sorted(divisors):
            arguments = made(divisor)
            tried.append((network, arguments, "-".join(map(str, arguments[key]))))
    rows: list[dict] = []
    for network, arguments, widths in tried:
        built = build_network(network, results.in_channels, classes, **arguments)
        same = any((row["network"], row["arguments"]) == (network, arguments) for row in rows)
        if same or (rows and count_parameters(built) >= rows[0]["parameters"]):
            continue  # no smaller than the teacher
        ms = measure_latency(built, (1, results.in_channels, *patch), REPEATS, args.threads)
        rows.append(
            {
                "network": network,
                "arguments": arguments,
                "widths": widths,
                "parameters": count_parameters(built),
                "ms": ms,
            }
        )
    return rows


def narrowed(given: dict, key: str, widths: Sequence[int], divisor: float) -> dict:
    """Arguments of a network whose widths, those of `key`, are divided."""
    arguments = dict(given) | {key: [max(1, round(width / divisor)) for width in widths]}
    if arguments.get("stem_channels"):
        arguments["stem_channels"] = max(1, round(given["stem_channels"] / divisor))
    return arguments


def parameter_budget(args: argparse.Namespace, teacher: int) -> float | None:
    """The most parameters of a student of a teacher with so many; None where time decides alone."""
    if args.budget_params or args.budget_ms:
        return args.budget_params
    return SHARE * teacher


def pick(args: argparse.Namespace, rows: Sequence[dict]) -> dict[str, dict]:
    """Network -> its candidate with the most parameters within the budget; marks it `picked`."""
    most = parameter_budget(args, rows[0]["parameters"]) or math.inf
    slowest = args.budget_ms or math.inf
    picked: dict[str, dict] = {}
    for row in sorted(rows[1:], key=lambda row: -row["parameters"]):
        fits = row["parameters"] <= most and row["ms"] <= slowest
        if fits and row["network"] not in picked:
            picked[row["network"]] = row
            row["picked"] = True
    if not picked and len(rows) == 1:
        raise ConfigError(f"no candidate is smaller than the teacher, {rows[0]['parameters']:,}")
    if not picked:
        small = min(rows[1:], key=lambda row: row["ms"] if args.budget_ms else row["parameters"])
        raise ConfigError(
            f"no candidate is within the budget; {small['network']} {small['widths']} has "
            f"{small['parameters']:,} parameters and takes {small['ms']:.0f} ms"
        )
    return {network: picked[network] for network in args.networks if network in picked}


def show_candidates(args: argparse.Namespace) -> None:
    """Print what the students cost."""
    threads = f"{args.threads} threads" if args.threads else "PyTorch's threads"
    print(f"| network | widths | parameters | of the teacher's | ms/patch, {threads} | chosen |")
    print("|---|---|---|---|---|---|")
    teacher = args.candidates[0]
    for row in args.candidates:
        share = row["parameters"] / teacher["parameters"]
        mark = "yes" if row.get("picked") else ""
        print(
            f"| {row['network']} | {row['widths']} | {row['parameters']:,} | {share:.1%} | "
            f"{row['ms']:.0f} | {mark} |"
        )
