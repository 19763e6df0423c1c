r"""Turn a released checkpoint of ACF-BCKD or CRKD into one of ours: for the test scripts, or as a
distillation teacher.

    python tools/import_checkpoint.py --ckpt best_Dice_81-69_epoch_800.pth \
        --config configs/btcv.yaml --network resunet
    python tools/import_checkpoint.py --ckpt distilled.pth --role student \
        --config configs/btcv.yaml --network unet --teacher resunet \
        --method acf_bckd --opts preset=as_released
    python tools/import_checkpoint.py --ckpt distilled.pth --role teacher \
        --config configs/btcv.yaml --network resunet
    python tools/import_checkpoint.py --ckpt best.pth --config configs/acdc.yaml \
        --network unet2d --method crkd
    python tools/import_checkpoint.py --ckpt iter_9000.pth --config configs/la.yaml \
        --network vnet --method crkd --labelled 8

They write best.pt to the run folder that the training script would use; --out names another file.
Without --method the network counts as trained alone, which is where a teacher is looked for. The
configuration's data format tells which script that is. Both layouts of CRKD's checkpoints are read
('model', 'model_state_dict'), and V-Nets of either naming.

Nothing in the file is executed: it is read with PyTorch's restricted unpickler, and what such files
hold beside tensors and plain values (NumPy scalars, MMEngine's log buffers) is replaced by empty
placeholders.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from dataloaders import DATASETS, FEW_LABELS, build_dataset
from losses import KD_METHODS
from methods import SSL_METHODS
from networks import NETWORKS, build_network
from utils.checkpoint import (
    CheckpointError,
    atomic_save,
    code_version,
    load_foreign,
    load_network_weights,
)
from utils.config import labelled_name, parse_labelled, read_yaml
from utils.run import run_folder
from utils.scripts import run_tool

PREFIXES = {
    "student": "architecture.segmentor.backbone.",  # of a distillation run
    "teacher": "teacher.segmentor.backbone.",  # of a distillation run
    "teacher-run": "segmentor.backbone.",  # any network trained alone
    "plain": "",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="the released file")
    parser.add_argument(
        "--config", required=True, help="YAML file of the data set that it was trained on"
    )
    parser.add_argument("--network", required=True, help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument(
        "--role",
        choices=tuple(PREFIXES),
        help="which network of the file; needed if it holds several",
    )
    parser.add_argument(
        "--method",
        default="supervised",
        help=(
            "that trained it: "
            f"{', '.join(dict.fromkeys(['supervised', *KD_METHODS, *SSL_METHODS]))}"
        ),
    )
    parser.add_argument("--teacher", help="for a distilled student: the network that taught it")
    parser.add_argument(
        "--labelled",
        type=parse_labelled,
        help="how many labels, or which share; default: the YAML's",
    )
    parser.add_argument("--seed", type=int, default=0, help="number of the run folder")
    parser.add_argument(
        "--out", type=Path, help="file to write; default: best.pt in the run folder"
    )
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the YAML file"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    semi = read_yaml(args.config).get("format") in FEW_LABELS
    name, folder, in_channels, described = semi_run(args) if semi else distillation_run(args)
    out = args.out or folder / "best.pt"
    if out.exists():
        raise CheckpointError(
            f"{out}: exists already; remove it, or choose --out, another --seed or --opts tag=NAME"
        )

    content = load_foreign(args.ckpt)
    role, state = choose_role(network_state(content, args.ckpt), args.role, args.ckpt)
    cls = NETWORKS[name]
    weights = without_aliases(state, getattr(cls, "alias_keys", ()), args.ckpt)
    weights, dropped = without_unused(weights, getattr(cls, "unused_keys", ()))

    arguments = dict(described["config"]["network_args"].get(name, {}))
    network = build_network(name, in_channels, described.pop("num_classes"), **arguments)
    try:
        load_network_weights(network, weights, str(args.ckpt))
    except CheckpointError as problem:
        raise CheckpointError(f"{problem}; {diagnosis(weights, name)}") from None
    atomic_save(
        {
            **described,
            "network": {
                "name": name,
                "in_channels": in_channels,
                "num_classes": network.num_classes,
                "arguments": arguments,
            },
            "code": code_version(),
            "weights": network.state_dict(),
            "step": step_of(content),
            "imported": {"file": args.ckpt.name, "role": role},
        },
        out,
    )
    print(
        f"{len(weights)} tensors of {name} (role {role}) written to {out}; left out: {dropped} "
        "that no forward "
        f"pass uses, {len(state) - len(weights) - dropped} under a second name"
    )
    return 0


def settings(script: ModuleType, args: argparse.Namespace, **flags: Any) -> Any:
    """What a training script makes of these flags, as far as they are given."""
    flags |= {"method": args.method, "seed": args.seed}
    words = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    return script.parse_args(["--config", str(args.config), *words, "--opts", *args.opts])[1]


def distillation_run(args: argparse.Namespace) -> tuple[str, Path, int, dict[str, Any]]:
    """Network, run folder, input channels and description, as train_3d_distill.py would make
    them.
    """
    cfg = settings(train_3d_distill, args, student=args.network, teacher=args.teacher)
    folder = run_folder(
        cfg.runs_dir, cfg.dataset, cfg.method, cfg.networks, cfg.seed, cfg.preset, cfg.tag
    )
    arguments = cfg.dataset_arguments()
    dataset = build_dataset(**arguments)
    return (
        cfg.student,
        folder,
        cfg.in_channels,
        describe("3d", cfg, dataset, arguments, dataset.splits()),
    )


def semi_run(args: argparse.Namespace) -> tuple[str, Path, int, dict[str, Any]]:
    """The same as train_2d_crkd.py or train_3d_crkd.py would make them."""
    dims = DATASETS[read_yaml(args.config)["format"]].dims
    script = train_2d_crkd if dims == 2 else train_3d_crkd
    cfg = settings(script, args, network=args.network, labelled=args.labelled)
    networks = f"{cfg.network}-{labelled_name(cfg.labelled)}"
    folder = run_folder(
        cfg.runs_dir, cfg.dataset, cfg.method, networks, cfg.seed, cfg.preset, cfg.tag
    )
    arguments = cfg.dataset_arguments()
    dataset = build_dataset(**arguments)
    splits = dataset.splits(cfg.labelled)
    described = describe(f"{dims}d-semi", cfg, dataset, arguments, splits)
    # Released code chooses its best checkpoint on what it reports: see ssl tables of ACDC, LA, ISIC
    # and Kvasir.
    return (
        cfg.network,
        folder,
        dataset.in_channels,
        described | {"selected_on": "test" if splits["test"] else "val"},
    )


def describe(kind: str, cfg: Any, dataset: Any, arguments: dict, splits: dict) -> dict[str, Any]:
    return {
        "kind": kind,
        "num_classes": dataset.num_classes,
        "class_names": list(cfg.class_names),
        "config": dataclasses.asdict(cfg),
        "dataset": arguments,
        "cases": {split: [case.name for case in cases] for split, cases in splits.items()},
    }


def step_of(content: dict[str, Any]) -> int:
    """Optimiser steps that the file says it has had, 0 if it does not say."""
    meta = content.get("meta")
    step = meta.get("iter") if isinstance(meta, dict) else content.get("iter_num")
    return step if isinstance(step, int) else 0


def network_state(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors under 'state_dict', 'model' or 'model_state_dict', or those of the top level."""
    key = next((key for key in ("state_dict", "model", "model_state_dict") if key in content), None)
    state = content if key is None else content[key]
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: '{key}' is {type(state).__name__}, expected a dictionary of tensors"
        )
    tensors = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(
            f"{path}: no tensors under 'state_dict', 'model', 'model_state_dict' or at the top; "
            "keys: "
            f"{list(content)[:8]}"
        )
    return tensors


def choose_role(
    state: dict[str, Tensor], role: str | None, path: Path
) -> tuple[str, dict[str, Tensor]]:
    """The role, given or the only one there is, and its tensors by their names in the network."""
    found = {
        name: {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        for name, prefix in PREFIXES.items()
        if prefix
    }
    found = {name: tensors for name, tensors in found.items() if tensors} or {"plain": state}
    there = ", ".join(f"{name} ({len(tensors)} tensors)" for name, tensors in found.items())
    if role is None and len(found) > 1:
        raise CheckpointError(f"{path}: holds several networks: {there}; choose one with --role")
    if role is not None and role not in found:
        raise CheckpointError(
            f"{path}: holds no {role}; there is: {there}; keys look like {list(state)[:2]}"
        )
    role = role or next(iter(found))
    return role, found[role]


def without_aliases(
    state: dict[str, Tensor], aliases: tuple[tuple[str, str], ...], path: Path
) -> dict[str, Tensor]:
    """`state` with every tensor under its registered name only; CheckpointError if its two copies
    differ.
    """
    result = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in aliases:
            name = re.sub(pattern, replacement, name)
        if name in result or (name != key and name in state):
            other = state[name] if name in state else result[name]
            if other.shape != value.shape or not torch.equal(other, value):
                raise CheckpointError(
                    f"{path}: {key} and {name} should be one tensor under two names, but differ"
                )
        result.setdefault(name, value)
    return result


def without_unused(
    state: dict[str, Tensor], unused: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """`state` without the tensors that no forward pass uses, and how many those were."""
    kept = {
        key: value
        for key, value in state.items()
        if not any(re.search(pattern, key) for pattern in unused)
    }
    return kept, len(state) - len(kept)


def diagnosis(weights: dict[str, Tensor], wanted: str) -> str:
    """What the names of `weights` say about why they do not fit the network `wanted`."""
    for name in NETWORKS:
        own = build_network(name, 1, 2).state_dict().keys()
        if own == weights.keys():
            if name == wanted:
                return (
                    f"the names are those of {name}, the sizes are not: check class_names, "
                    "in_channels and "
                    f"network_args of the configuration"
                )
            return f"these are weights of {name}: use --network {name}"
    return f"the names are of none of {', '.join(NETWORKS)}"


if __name__ == "__main__":
    sys.exit(run_tool(main, ValueError))
