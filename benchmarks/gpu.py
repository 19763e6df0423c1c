"""Steps and whole-volume prediction on one GPU: what the methods add, what bfloat16 and
torch.compile save.

    python benchmarks/gpu.py --out gpu.md
    python benchmarks/gpu.py --parts modes --repeats 5
    python benchmarks/gpu.py --device cpu --small --parts distill crkd inference    # a smoke test

The parts take their work from the scripts that measure the CPU, with the same sizes and peers,
except that LA has its full patch of 112 x 112 x 80 and prediction takes four windows at a time.
Bars of times are those of the CPU; that of predictions is the mean Dice, since float32 is what
PyTorch makes of it: convolutions may take TF32. Every timed call ends when the GPU has finished,
and each side is called once before.

distill: the step of every distillation method against that with the segmentation loss only
(distill_step.py). modes: the ACF-BCKD step under `--amp bf16`, `--channels-last`, `--compile` and
together against that in float32; bar: no slower. crkd: the CRKD step against its network passes
(crkd_step.py). inference: 'exact' and 'fast' prediction against MONAI and the loop of the
left-atrium code, volume and result on the GPU (inference_speed.py).
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import crkd_step, distill_step, inference_speed
from benchmarks.harness import arguments, faster, interleaved, overhead, report
from utils import run
from utils.config import ConfigError

MODES = {
    "bf16": {"amp": "bf16"},
    "channels last": {"memory_format": torch.channels_last_3d},
    "compiled": {"compiled": True},
    "bf16, channels last": {"amp": "bf16", "memory_format": torch.channels_last_3d},
    "bf16, compiled": {"amp": "bf16", "compiled": True},
}
FAST_BARS = {"unet": 3.0, "vnet": 1.5}


def finished(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The call, and the wait until the device is through with it."""

    def call() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def distill(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    batch, size = (2, 16) if args.small else (4, 96)
    for method, bar in distill_step.BARS.items():
        steps = distill_step.Steps(batch, size, device)
        sides = {
            "seg": finished(steps.make(None), device),
            method: finished(steps.make(method), device),
        }
        seconds = interleaved(sides, args.repeats)
        distill_step.check_terms(steps.terms)
        title = f"{method} step, {batch} patches of {size}³"
        yield overhead(title, "segmentation loss only", seconds["seg"], seconds[method], bar)


def modes(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    batch, size = (2, 16) if args.small else (4, 96)
    plain = finished(distill_step.Steps(batch, size, device).make("acf_bckd"), device)
    for mode, settings in MODES.items():
        torch.compiler.reset()
        steps = distill_step.Steps(batch, size, device, **settings)
        ours = finished(steps.make("acf_bckd"), device)
        seconds = interleaved({"plain": plain, "ours": ours}, args.repeats)
        distill_step.check_terms({"seg": {"seg": steps.terms["acf_bckd"]["seg"]}, **steps.terms})
        title = f"acf_bckd step, {batch} patches of {size}³, {mode}"
        yield faster(title, "float32, as it comes", seconds["plain"], seconds["ours"], 1.0)


def crkd(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    tasks = {"2d": crkd_step.TASKS["2d"], "3d": crkd_step.TASKS["3d"]._replace(grid=(112, 112, 80))}
    for part, task in tasks.items():
        yield crkd_step.compare(
            part, task, args.small, functools.partial(measured, args, device), device=device
        )


def measured(
    args: argparse.Namespace, device: torch.device, sides: dict[str, Callable]
) -> dict[str, float]:
    return interleaved(
        {name: finished(function, device) for name, function in sides.items()}, args.repeats
    )


def inference(args: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    tasks = inference_speed.SMALL if args.small else inference_speed.TASKS
    for name, task in tasks.items():
        network = inference_speed.train(task, 2 if args.small else 100, device=device)
        image, label = inference_speed.make_case(task, 0)
        image = image.to(device)
        peer_labels, peer = inference_speed.PEERS[name]
        found: dict[str, torch.Tensor] = {}

        def keep(
            key: str, predict: Callable, network=network, image=image, task=task, found=found
        ) -> None:
            found[key] = predict(network, image, task)

        # On a GPU several windows at a time, as test_3d.py has it by default and MONAI here.
        sides = {
            "peer": peer_labels,
            "exact": functools.partial(inference_speed.fast, dtype=torch.float32, window_batch=4),
            "fast": functools.partial(inference_speed.fast, window_batch=4),
        }
        seconds = measured(
            args, device, {key: functools.partial(keep, key, call) for key, call in sides.items()}
        )
        title = f"{name}, {'x'.join(map(str, task.size))}"
        yield overhead(f"{title}: exact", peer, seconds["peer"], seconds["exact"], 1.0)
        yield faster(f"{title}: fast", peer, seconds["peer"], seconds["fast"], FAST_BARS[name])
        scores = [
            inference_speed.mean_dice(found[key].cpu(), label, task.num_classes)
            for key in ("peer", "exact", "fast")
        ]
        for key, score in zip(("exact", "fast"), scores[1:]):
            away = abs(score - scores[0])
            equal = 100 * (found[key].cpu() == found["peer"].cpu()).double().mean().item()
            yield inference_speed.other_row(
                f"{title}: {key}, mean Dice in %",
                peer,
                (scores[0], score),
                f"{away:.3f} points, {equal:.3f} % equal",
                "below 0.1 points",
                away < 0.1,
            )


PARTS = {"distill": distill, "modes": modes, "crkd": crkd, "inference": inference}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument(
        "--device", default="cuda", help="default %(default)s; cpu: a smoke test, with --small"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    try:
        device = run.resolve_device(args.device)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(args.threads)
    rows = []
    for row in itertools.chain.from_iterable(PARTS[part](args, device) for part in args.parts):
        rows.append(row)
        # the whole takes minutes
        print(f"{row['part']}: {row['ratio']}", file=sys.stderr, flush=True)
    return report(rows, args, device)


if __name__ == "__main__":
    sys.exit(main())
