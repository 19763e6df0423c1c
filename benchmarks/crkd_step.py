"""What a CRKD step costs beyond its network: all losses and reports against the same passes with a
trivial loss.

    python benchmarks/crkd_step.py --threads 2 --out crkd_step.md
    python benchmarks/crkd_step.py --parts 2d --repeats 1
    python benchmarks/crkd_step.py --cpu-time  # on a computer that is busy with other work
    python benchmarks/crkd_step.py --small                 # seconds, bars not enforced

2d: U-Net, 12 labelled and 12 unlabelled slices of 256 x 256, 4 classes. 3d: V-Net, 2 and 2 patches
of 96 x 96 x 64 (not the 112 x 112 x 80 of LA, which take some 7 GB), 2 classes. Ours is the step of
the training scripts with the default arguments of methods/crkd.py. The peer makes the same four
passes (pseudo-labels without gradient, labelled, two perturbed views), takes the sum of the means
of the three logits as loss, and makes the same backward pass and update. Both sides must pass the
same shapes through the network in the same modes. The classifier has large random weights and the
confidence threshold is 0, so that predictions hold all classes and no term is empty.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import arguments, interleaved, overhead, report
from methods import build_method
from methods.base import Method
from networks import build_network
from utils.modes import keep_freed_memory
from utils.schedules import build_optimizer

TERMS = {"sup", "pseudo_s", "pseudo_fp", "lec", "csd", "ckd_pixel", "ckd_feature"}
BAR = 1.15


class Task(NamedTuple):
    """Network, classes, batch of labelled and of unlabelled images each, spatial sizes; the same
    for `--small`.
    """

    network: str
    num_classes: int
    batch: int
    grid: tuple[int, ...]
    small_batch: int
    small_grid: tuple[int, ...]
    memory: torch.memory_format


TASKS = {
    "2d": Task("unet2d", 4, 12, (256, 256), 2, (32, 32), torch.channels_last),
    "3d": Task("vnet", 2, 2, (96, 96, 64), 1, (32, 32, 16), torch.channels_last_3d),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--batch",
        type=int,
        help="images of each kind in place of 12 and 2, to save time and memory",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds of all threads, not wall time"
    )
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    return args


def cpu_interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """As `interleaved`, in processor seconds of this process, so that what others do to the
    computer matters little.

    Without a warm-up call: both sides have made a step before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_method(task: Task, device: str = "cpu") -> Method:
    torch.manual_seed(0)
    method = build_method(
        "crkd",
        lambda: build_network(task.network, 1, task.num_classes),
        max_steps=100,
        threshold=0.0,
    )
    nn.init.normal_(method.network.decoder.out_conv.weight, std=0.5)
    return method.to(device, memory_format=task.memory)


def make_batches(
    task: Task, small: bool, batch: int | None = None, device: str = "cpu"
) -> tuple[dict, dict]:
    usual, grid = (task.small_batch, task.small_grid) if small else (task.batch, task.grid)
    batch = batch or usual
    rng = torch.Generator().manual_seed(1)
    weak = torch.rand(batch, 1, *grid, generator=rng)
    labels = torch.randint(0, task.num_classes, (2, batch, 1, *grid), generator=rng).byte()
    labelled = {"image": torch.rand(batch, 1, *grid, generator=rng), "label": labels[0]}
    unlabelled = {"weak": weak, "strong0": (0.8 * weak + 0.1).clamp(0, 1), "label": labels[1]}
    return tuple(
        {name: value.to(device) for name, value in part.items()} for part in (labelled, unlabelled)
    )


def make_step(
    method: Method, losses: Callable[[], Mapping[str, torch.Tensor]]
) -> Callable[[], dict]:
    """One update as in the training scripts; returns the terms."""
    optimizer = build_optimizer(
        "sgd", [p for p in method.parameters() if p.requires_grad], 0.01, 0.9, 1e-4, False
    )

    def step() -> dict:
        method.train()
        terms = losses()
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        optimizer.step()
        return terms

    return step


def network_alone(
    network: nn.Module, labelled: dict, unlabelled: dict, perturb: float
) -> dict[str, torch.Tensor]:
    """The passes of a CRKD step, each reduced to the mean of its logits."""
    with torch.no_grad():
        network(unlabelled["weak"])
    outputs = {
        "labelled": network(labelled["image"], return_features=True),
        "strong": network(unlabelled["strong0"], return_features=True),
        "perturbed": network(unlabelled["weak"], return_features=True, perturb=perturb),
    }
    return {name: output.logits.mean() for name, output in outputs.items()}


def passes(network: nn.Module, step: Callable[[], dict]) -> tuple[list[tuple], dict]:
    """What goes through `network` in one step (shape, training mode, whether gradients are
    recorded, options), and the terms of the step.
    """
    seen: list[tuple] = []

    def note(module, inputs, options):
        seen.append((tuple(inputs[0].shape), module.training, torch.is_grad_enabled(), options))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    terms = step()
    handle.remove()
    return seen, terms


def compare(
    part: str,
    task: Task,
    small: bool,
    measure: Callable[[dict], dict],
    batch: int | None = None,
    device: str = "cpu",
) -> dict:
    """The row of one task. measure: gives the seconds of functions by name."""
    batches = make_batches(task, small, batch, device)
    method, bare = make_method(task, device), make_method(task, device)
    ours = make_step(method, lambda: method.loss(*batches, step=50))
    peer = make_step(bare, lambda: network_alone(bare.network, *batches, perturb=method.perturb))
    found, terms = passes(method.network, ours)
    expected, _ = passes(bare.network, peer)
    if found != expected:
        raise AssertionError(f"{part}: the sides differ in their passes: {found} and {expected}")
    if terms.keys() != TERMS or not all(value.isfinite() and value > 0 for value in terms.values()):
        raise AssertionError(f"{part}: a term is missing, empty or not finite: {terms}")
    seconds = measure({"peer": peer, "ours": ours})
    batch, grid = (len(batches[0]["image"]), "x".join(map(str, batches[0]["image"].shape[2:])))
    name = f"{part}: {task.network}, {batch} + {batch} of {grid}"
    return overhead(name, "network passes, update", seconds["peer"], seconds["ours"], BAR)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the training scripts do
    measure = functools.partial(
        cpu_interleaved if args.cpu_time else interleaved, repeats=args.repeats
    )
    return report(
        [compare(part, TASKS[part], args.small, measure, args.batch) for part in args.parts], args
    )


if __name__ == "__main__":
    sys.exit(main())
