"""Whole-volume prediction against the loops that others use: time, peak memory and what half
precision changes.

    python benchmarks/inference_speed.py --threads 2 --out inference.md
    python benchmarks/inference_speed.py --parts unet --repeats 1
    python benchmarks/inference_speed.py --cpu-time  # on a computer that is busy with other work
    python benchmarks/inference_speed.py --small                    # seconds, bars not enforced

unet: the U-Net student on 240 x 200 x 160 voxels, 14 classes, 96³ windows that overlap by half,
against MONAI's `sliding_window_inference` (float32, four windows at a time, constant weights) and
an argmax. vnet: the protocol of the left-atrium tables, V-Net, 54 windows of 112 x 112 x 80 at
stride 18, 18, 4, softmax averaged, against one window at a time that is copied to NumPy and added
there. 'exact' is `predict_labels` of the network's `fast_copy` in float32, one window at a time,
'fast' that of its copy in bfloat16. Both networks are first trained on a generated scan for
`--train-steps`, since the labels of an untrained one are all near-ties. The memory is the peak of a
fresh process above its level before the call (Linux). Full size takes some 3 GB of memory. Rows
that are no times say so. On a processor without instructions for bfloat16 'fast' is not measured,
and the table says so.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import arguments, faster, interleaved, overhead, report
from inference import fast_copy, fast_dtype, predict_labels, predict_logits
from metrics import dice
from networks import build_network, init_weights
from tools.phantoms.few_labels import la_phantom
from tools.phantoms.scans import btcv_phantom

BTCV_EXTENT = (358, 269, 224)  # mm that the generated abdomen is made for
HU_WINDOW = (-175.0, 250.0)


class Task(NamedTuple):
    """What is predicted: network, sides in voxels of the volume, of a window and of a training
    crop.
    """

    network: str
    num_classes: int
    size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    crop: tuple[int, int, int]
    # None: overlap by half, logits averaged; else softmax averaged
    stride: tuple[int, int, int] | None = None


TASKS = {
    "unet": Task("unet", 14, (240, 200, 160), (96, 96, 96), (48, 48, 48)),
    "vnet": Task("vnet", 2, (148, 148, 100), (112, 112, 80), (48, 48, 32), (18, 18, 4)),
}
SMALL = {
    "unet": Task("unet", 14, (40, 32, 32), (24, 24, 24), (16, 16, 16)),
    "vnet": Task("vnet", 2, (24, 20, 20), (16, 16, 16), (16, 16, 16), (8, 8, 4)),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--train-steps", type=int, help="default 100, with --small 2")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds of all threads, not wall time"
    )
    args = parser.parse_args(argv)
    if args.train_steps is None:
        args.train_steps = 2 if args.small else 100
    if args.threads < 1 or args.repeats < 1 or args.train_steps < 0:
        parser.error("--threads and --repeats must be at least 1, --train-steps at least 0")
    return args


def make_case(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """A generated scan: image (1, H, W, D) float32 and ids (H, W, D) uint8."""
    if task.network == "vnet":
        image, label = la_phantom(seed, task.size)
    else:
        hu, label = btcv_phantom(
            seed, task.size, tuple(e / n for e, n in zip(BTCV_EXTENT, task.size))
        )
        low, high = HU_WINDOW
        image = (np.clip(hu, low, high) - low) / (high - low)
    return torch.from_numpy(np.ascontiguousarray(image, np.float32))[None], torch.from_numpy(
        label.copy()
    )


def train(task: Task, steps: int, seed: int = 0, device: str = "cpu") -> nn.Module:
    """The task's network after `steps` updates on one generated scan: two crops a step, centred on
    the foreground.
    """
    torch.manual_seed(seed)
    network = init_weights(build_network(task.network, 1, task.num_classes)).to(device).train()
    image, label = make_case(task, seed + 1)
    rng = np.random.default_rng(seed)
    present = [np.argwhere(label.numpy() == k) for k in range(1, task.num_classes)]
    present = [voxels for voxels in present if len(voxels)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 1))
    objective = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(steps):
        crops = []
        for _ in range(2):
            voxels = present[rng.integers(len(present))]
            centre = voxels[rng.integers(len(voxels))]
            low = [
                int(np.clip(c - p // 2, 0, n - p)) for c, p, n in zip(centre, task.crop, task.size)
            ]
            place = tuple(slice(a, a + p) for a, p in zip(low, task.crop))
            crops.append((image[(slice(None), *place)], label[None][(slice(None), *place)]))
        images, labels = (torch.stack(part) for part in zip(*crops))
        loss = objective(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 25 == 0:
            print(
                f"{task.network}: training step {step + 1} of {steps}, loss {loss.item():.3f}",
                file=sys.stderr,
            )
    return network.eval().requires_grad_(False)


def monai_logits(network: nn.Module, image: Tensor, task: Task) -> Tensor:
    """Logits (K, H, W, D) by MONAI."""
    with torch.inference_mode():
        return sliding_window_inference(
            image[None], task.patch_size, 4, network, overlap=0.5, mode="constant"
        )[0]


def monai_labels(network: nn.Module, image: Tensor, task: Task) -> Tensor:
    return monai_logits(network, image, task).argmax(0).to(torch.uint8)


def window_by_window(network: nn.Module, image: Tensor, task: Task) -> Tensor:
    """Ids by the loop that the code of the left-atrium literature shares; the volume is at least a
    window large.
    """
    score = np.zeros((task.num_classes, *image.shape[1:]), np.float32)
    count = np.zeros(image.shape[1:], np.float32)
    steps = [-(-(n - p) // s) + 1 for n, p, s in zip(image.shape[1:], task.patch_size, task.stride)]
    for index in np.ndindex(*steps):
        low = [
            min(k * s, n - p)
            for k, s, n, p in zip(index, task.stride, image.shape[1:], task.patch_size)
        ]
        place = tuple(slice(a, a + p) for a, p in zip(low, task.patch_size))
        with torch.no_grad():
            probs = network(image[(None, slice(None), *place)]).softmax(1)
        score[(slice(None), *place)] += probs.cpu().numpy()[0]
        count[place] += 1
    return torch.from_numpy(np.argmax(score / count, axis=0).astype(np.uint8))


PEERS = {
    "unet": (monai_labels, "MONAI, 4 windows, argmax"),
    "vnet": (window_by_window, "window by window, NumPy"),
}


def fast(
    network: nn.Module,
    image: Tensor,
    task: Task,
    dtype: torch.dtype = torch.bfloat16,
    window_batch: int = 1,
) -> Tensor:
    """Ids by ours; making the copy is part of the time."""
    averaged = (
        {"overlap": 0.5} if task.stride is None else {"stride": task.stride, "probabilities": True}
    )
    return predict_labels(
        fast_copy(network, dtype),
        image,
        patch_size=task.patch_size,
        window_batch=window_batch,
        **averaged,
    )


exact = functools.partial(fast, dtype=torch.float32)


def measures_fast(args: argparse.Namespace) -> bool:
    return args.small or fast_dtype(torch.device("cpu")) == torch.bfloat16


def cpu_interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """As `interleaved` without a warm-up, but in processor seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.process_time()
            function()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_mib(field: str) -> float:
    """Resident memory of this process in MiB, now (`VmRSS`) or at its peak (`VmHWM`)."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def measured_call(
    predict: Callable, case: Path, task: Task, threads: int, sender: Connection
) -> None:
    torch.set_num_threads(threads)
    stored = torch.load(case, weights_only=True)
    network = build_network(task.network, 1, task.num_classes).eval()
    network.load_state_dict(stored["weights"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    predict(network, stored["image"], task)
    sender.send(resident_mib("VmHWM") - before)


def memory_of(predict: Callable, case: Path, task: Task, threads: int) -> float:
    """MiB by which `predict` raises the memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measured_call, args=(predict, case, task, threads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def other_row(
    part: str, peer: str, values: tuple[float, float], ratio: str, bar: str, passed: bool
) -> dict:
    """A row of something that is no time; the table multiplies by 1000 what it takes for
    seconds.
    """
    return {
        "part": part,
        "peer": peer,
        "peer_seconds": values[0] / 1000,
        "ours_seconds": values[1] / 1000,
        "ratio": ratio,
        "bar": bar,
        "passed": passed,
    }


def mean_dice(ids: Tensor, label: Tensor, num_classes: int) -> float:
    """Mean Dice in % over the classes that the label has."""
    kept = [k for k in range(1, num_classes) if (label == k).any()]
    return 100 * float(np.mean([dice((ids == k).numpy(), (label == k).numpy()) for k in kept]))


def compare(name: str, task: Task, args: argparse.Namespace) -> Iterator[dict]:
    """Rows of one task, each as soon as it is known."""
    network = train(task, args.train_steps)
    image, label = make_case(task, 0)
    peer_labels, peer = PEERS[name]
    found: dict[str, Tensor] = {}

    def keep(key: str, predict: Callable) -> None:
        found[key] = predict(network, image, task)

    sides = {"peer": peer_labels, "exact": exact} | ({"fast": fast} if measures_fast(args) else {})
    calls = {key: functools.partial(keep, key, predict) for key, predict in sides.items()}
    one_window = image[(slice(None), *(slice(side) for side in task.patch_size))]
    for predict in sides.values():  # to warm up: a whole call takes minutes and is many windows
        predict(network, one_window, task)
    seconds = (
        cpu_interleaved(calls, args.repeats)
        if args.cpu_time
        else interleaved(calls, args.repeats, warm=False)
    )
    title = f"{name}, {'x'.join(map(str, task.size))}"
    clock = ", processor time" if args.cpu_time else ""
    yield overhead(f"{title}: exact{clock}", peer, seconds["peer"], seconds["exact"], 1.0)
    if "fast" in found:
        yield faster(
            f"{title}: fast{clock}",
            peer,
            seconds["peer"],
            seconds["fast"],
            3.0 if name == "unet" else 1.5,
        )
        scores = [mean_dice(found[key], label, task.num_classes) for key in ("peer", "fast")]
        away = abs(scores[1] - scores[0])
        equal = (found["fast"] == found["peer"]).double().mean().item()
        yield other_row(
            f"{title}: fast, mean Dice in %",
            peer,
            tuple(scores),
            f"{away:.3f} points, {100 * equal:.3f} % equal",
            *(
                ("below 0.1 points", away < 0.1)
                if name == "unet"
                else ("99.9 % equal", equal >= 0.999)
            ),
        )
    flips = int((found["exact"] != found["peer"]).sum())
    if name == "vnet":
        yield other_row(
            f"{title}: exact, voxels of other label",
            peer,
            (0, flips),
            f"of {label.numel():,}",
            "none",
            flips == 0,
        )
        return
    with torch.inference_mode():
        logits = monai_logits(network, image, task)
        copied = fast_copy(network, torch.float32)
        logits -= predict_logits(
            copied, image, patch_size=task.patch_size, overlap=0.5, window_batch=1
        )
        difference = logits.abs_().max().item()
        del logits
    yield other_row(
        f"{title}: exact, voxels of other label",
        peer,
        (0, flips),
        f"logits within {difference:.1e}",
        "logits within 1e-5",
        difference <= 1e-5,
    )
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        torch.save({"weights": network.state_dict(), "image": image}, case)
        memory = [memory_of(predict, case, task, args.threads) for predict in (peer_labels, exact)]
    yield other_row(
        f"{title}: exact, peak memory in MiB",
        peer,
        tuple(memory),
        f"{memory[1] / memory[0]:.2f}x its memory",
        "at most 0.5x",
        memory[1] <= 0.5 * memory[0],
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    tasks = SMALL if args.small else TASKS
    rows = []
    for name in args.parts:
        for row in compare(name, tasks[name], args):
            rows.append(row)
            print(f"{row['part']}: {row['ratio']}", file=sys.stderr)  # the whole takes a while
    status = report(rows, args)
    if not measures_fast(args):
        remark = "'fast' is not measured: this processor has no instructions for bfloat16.\n"
        print(remark)
        if args.out:
            args.out.write_text(
                f"{args.out.read_text(encoding='utf-8')}\n{remark}", encoding="utf-8"
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
