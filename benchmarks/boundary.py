"""The two boundary losses of ACF-BCKD, value and gradient, against the plain forms they replace; on
the CPU.

    python benchmarks/boundary.py
    python benchmarks/boundary.py --repeats 5 --threads 2 --out boundary.md
    # on a computer that is busy with other work
    python benchmarks/boundary.py --threads 1 --cpu-time
    python benchmarks/boundary.py --small  # seconds, tiny sizes, bars not enforced

Soft boundary loss: MONAI's LogHausdorffDTLoss on the same logits, with the teacher's argmax as
target. Hard boundary loss: the sum written sample by sample and class by class, neighbours counted
by a convolution. The data are ellipsoids, one for each class of each patch, with scattered voxels
in the predictions. Also checked: values and gradients agree, and 200 calls of both losses leave the
memory of the process as it was.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import LogHausdorffDTLoss
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import harness
from losses.acf_bckd import hard_boundary_loss, soft_boundary_loss

BAR = 10.0
LARGEST_GROWTH = 16.0  # MB over 200 calls; each call handles more than 1 MB


def ellipsoids(batch: int, num_classes: int, size: int, seed: int) -> Tensor:
    """Class ids (batch, 1, size, size, size), int64: background and an ellipsoid of every other
    class, some cut.
    """
    rng = torch.Generator().manual_seed(seed)
    axis = torch.arange(size) / size
    places = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    label = torch.zeros(batch, 1, size, size, size, dtype=torch.int64)
    for sample in range(batch):
        for index in range(1, num_classes):
            centre, radius = torch.rand(2, 3, 1, 1, 1, generator=rng)
            radius = 0.06 + 0.16 * radius
            label[sample, 0][((places - centre) / radius).square().sum(0) < 1] = index
    return label


def predictions(label: Tensor, num_classes: int, certainty: float, shift: int, seed: int) -> Tensor:
    """Logits (B, num_classes, *spatial) that favour the label, displaced by `shift` voxels, under
    unit noise.
    """
    rng = torch.Generator().manual_seed(seed)
    shape = (len(label), num_classes, *label.shape[2:])
    logits = torch.randn(shape, generator=rng)
    moved = label.roll((shift, shift), (2, 3))
    return logits.scatter_add_(1, moved, torch.full(moved.shape, certainty))


def plain_hard_boundary(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """The hard boundary loss as its formula is written, one class of one sample at a time."""
    kernel = torch.ones(1, 1, 3, 3, 3)
    kernel[0, 0, 1, 1, 1] = 0
    num_classes, total = student.shape[1], torch.zeros(())
    for sample in range(len(student)):
        for index in range(num_classes):
            mask = (label[sample : sample + 1] == index).float()
            neighbours = F.conv3d(mask, kernel, padding=1)[0, 0]
            boundary = (neighbours > 0) & (neighbours < 26)
            if boundary.any():
                log_p = F.log_softmax(student[sample][:, boundary], dim=0)
                q = F.softmax(teacher[sample][:, boundary], dim=0)
                total = total + F.kl_div(log_p, q)  # mean over voxels and classes
    return total


def with_gradient(loss, logits: Tensor) -> tuple[float, Tensor]:
    """Value of `loss(logits)` and its gradient."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.item(), leaf.grad


def check_agreement(part: str, ours: tuple[float, Tensor], peer: tuple[float, Tensor]) -> None:
    """Raise AssertionError unless values agree to 1e-5 and gradients to 1e-5 of the largest."""
    difference = abs(ours[0] - peer[0]) / abs(peer[0])
    gradient = ((ours[1] - peer[1]).abs().max() / peer[1].abs().max()).item()
    print(
        f"{part}: {ours[0]:.7f} and {peer[0]:.7f}, relative difference {difference:.1e}, of "
        f"gradients {gradient:.1e}"
    )
    if difference > 1e-5 or gradient > 1e-5:
        raise AssertionError(f"{part}: the two forms disagree")


def growth(calls: int = 200, size: int = 24) -> float:
    """MB by which the peak memory of the process grows over `calls` of both losses, after some to
    warm up.
    """
    label = ellipsoids(2, 5, size, seed=2)
    student, teacher = (predictions(label, 5, 3.0, shift, seed=3) for shift in (1, 0))

    def both(logits: Tensor) -> Tensor:
        return soft_boundary_loss(logits, teacher) + hard_boundary_loss(logits, teacher, label)

    def peak() -> float:  # kB on Linux, bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1e6 if sys.platform == "darwin" else 1e3
        )

    for _ in range(20):
        with_gradient(both, student)
    before = peak()
    for _ in range(calls):
        with_gradient(both, student)
    return peak() - before


def arguments(doc: str, repeats: int = 3) -> argparse.ArgumentParser:
    """The harness's flags and `--cpu-time`."""
    parser = harness.arguments(doc, repeats)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds of all threads, not wall time"
    )
    return parser


def interleaved(
    functions: Mapping[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of each function as `harness.interleaved`; of processor time with
    `--cpu-time`.
    """
    if not args.cpu_time:
        return harness.interleaved(functions, args.repeats)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + args.repeats):  # the first is a warm-up
        for name, function in functions.items():
            begin = time.process_time()
            function()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> int:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    batch, num_classes, size = (2, 4, 16) if args.small else (4, 14, 96)
    increase = growth()  # first: the peak must not be that of the large inputs

    label = ellipsoids(batch, num_classes, size, seed=0)
    student = predictions(label, num_classes, 4.0, size // 24, seed=0)
    teacher = predictions(label, num_classes, 7.0, 0, seed=1)
    target = teacher.argmax(1, keepdim=True)
    monai_loss = LogHausdorffDTLoss(include_background=False, to_onehot_y=True, softmax=True)
    pairs = {
        "soft boundary": (
            "MONAI LogHausdorffDTLoss",
            lambda logits: monai_loss(logits, target),
            lambda logits: soft_boundary_loss(logits, teacher),
        ),
        "hard boundary": (
            "class by class",
            lambda logits: plain_hard_boundary(logits, teacher, label),
            lambda logits: hard_boundary_loss(logits, teacher, label),
        ),
    }
    rows = []
    for part, (peer_name, peer, ours) in pairs.items():
        results = {}  # of the latest call; agreement is checked on what was timed

        def timed(key, loss, results=results):
            results[key] = with_gradient(loss, student)

        functions = {
            "peer": lambda peer=peer: timed("peer", peer),
            "ours": lambda ours=ours: timed("ours", ours),
        }
        seconds = interleaved(functions, args)
        check_agreement(part, results["ours"], results["peer"])
        part = f"{part}, {batch}x{num_classes}x{size}³, value and gradient"
        rows.append(harness.faster(part, peer_name, seconds["peer"], seconds["ours"], BAR))
    print(f"peak memory grew by {increase:.1f} MB over 200 calls\n")
    missed = harness.report(rows, args)
    if increase > LARGEST_GROWTH:
        print(f"memory: grew by more than {LARGEST_GROWTH:g} MB", file=sys.stderr)
        return 1
    return missed


if __name__ == "__main__":
    sys.exit(main())
