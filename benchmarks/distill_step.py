r"""Time of a whole distillation step against the same step with the segmentation loss only, for
each method; on the CPU.

    python benchmarks/distill_step.py
    python benchmarks/distill_step.py --methods acf_bckd kd cirkd --size 64 --repeats 1 \
        --threads 2 --out step.md
    python benchmarks/distill_step.py --batch 1 --threads 1 --cpu-time
    python benchmarks/distill_step.py --small  # seconds, tiny sizes, bars not enforced

A step: ResU-Net teacher forward, U-Net student forward, loss, backward, SGD update, on 4 patches of
14 classes. The step that is compared with runs the teacher too. ACF-BCKD is timed in mid-schedule,
where both boundary terms count. The networks are untrained, so both predictions get a fixed map
added that favours an ellipsoid of every class of every patch: without boundaries the boundary terms
would cost little.

Each method has a process of its own, in which its step and the plain one alternate, and freed
memory is kept as the training scripts keep it. In one process for all, every step would meet a heap
that another method has left in pieces and wait for the system to clear pages, which training does
not do once it has come to its peak.
"""

import argparse
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import harness
from benchmarks.boundary import arguments, ellipsoids, interleaved, predictions
from inference import autocast
from losses import build_kd
from losses.segmentation import SegmentationLoss
from networks import build_network
from utils.modes import keep_freed_memory

# Method: largest time relative to the step without distillation.
BARS = {
    "acf_bckd": 1.25,
    **dict.fromkeys(("kd", "at", "nkd", "skd", "ifvd", "cwd", "dist", "dkd"), 1.30),
    "cirkd": 2.0,
}
NUM_CLASSES = 14
PROGRESS = 0.5


class Steps:
    """The data, the two networks, and a step function per method; on any device, in any numeric
    mode.
    """

    def __init__(
        self,
        batch: int,
        size: int,
        device: str = "cpu",
        amp: str = "off",
        compiled: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.amp = torch.device(device), amp
        self.image = torch.randn(batch, 1, size, size, size).to(device, memory_format=memory_format)
        label = ellipsoids(batch, NUM_CLASSES, size, seed=0)
        self.student_map = predictions(label, NUM_CLASSES, 4.0, max(1, size // 24), seed=0).to(
            device
        )
        self.teacher_map = predictions(label, NUM_CLASSES, 7.0, 0, seed=1).to(device)
        self.label = label.float().to(device)
        self.teacher = build_network("resunet", 1, NUM_CLASSES).eval().requires_grad_(False)
        self.student = build_network("unet", 1, NUM_CLASSES)
        for network in (self.teacher, self.student):
            network.to(device, memory_format=memory_format)
            if compiled:
                network.compile()
        self.seg_loss = SegmentationLoss()
        self.terms: dict[str, dict[str, float]] = {}  # of the latest step of each method

    def make(self, method: str | None):
        """A function that takes one step with `method`; None for the segmentation loss only."""
        kd = None
        if method is not None:
            kd = build_kd(
                method, self.student.feature_channels, self.teacher.feature_channels, NUM_CLASSES
            )
            kd.to(self.device)
        trained = [*self.student.parameters(), *([] if kd is None else kd.parameters())]
        # So small a rate that every method meets the same predictions.
        optimizer = torch.optim.SGD(trained, lr=1e-10, momentum=0.9, weight_decay=5e-4)

        def step() -> None:
            with autocast(self.device, self.amp):
                with torch.no_grad():
                    teacher_out = self.teacher(self.image, return_features=True)
                    teacher_out = teacher_out._replace(logits=teacher_out.logits + self.teacher_map)
                student_out = self.student(self.image, return_features=True)
                student_out = student_out._replace(logits=student_out.logits + self.student_map)
                terms = {"seg": self.seg_loss(student_out.logits, self.label)}
                if kd is not None:
                    terms |= kd(student_out, teacher_out, self.label, progress=PROGRESS)
            optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            optimizer.step()
            self.terms[method or "seg"] = {name: term.item() for name, term in terms.items()}

        return step


def check_terms(terms: dict[str, dict[str, float]]) -> None:
    """Raise AssertionError unless every method met the same predictions and all of its terms were
    at work.
    """
    expected = terms["seg"]["seg"]
    for method, values in terms.items():
        if abs(values["seg"] - expected) > 1e-4 * expected:
            raise AssertionError(
                f"{method}: its student differs (segmentation loss {values['seg']}, not {expected})"
            )
        idle = [name for name, value in values.items() if not 0 < value < float("inf")]
        if idle:
            raise AssertionError(
                f"{method}: the term {', '.join(idle)} is not a positive number: {values}"
            )


def measure(method: str, args: argparse.Namespace, sender: Connection) -> None:
    """Send the seconds of a plain step and of one with `method`."""
    torch.set_num_threads(args.threads)
    if not args.give_back:
        keep_freed_memory()
    steps = Steps(*((2, 16) if args.small else (args.batch, args.size)))
    functions = {"seg": steps.make(None), method: steps.make(method)}
    seconds = interleaved(functions, args)
    check_terms(steps.terms)
    sender.send((seconds["seg"], seconds[method]))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument(
        "--size",
        type=int,
        default=96,
        help="side of the cubic patches, voxels (default %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="patches in a step (default %(default)s)"
    )
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="let the C library give freed memory back (its habit)",
    )
    args = parser.parse_args()
    batch, size = (2, 16) if args.small else (args.batch, args.size)
    context = multiprocessing.get_context("spawn")
    rows = []
    for method in args.methods:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(method, args, sender))
        process.start()
        sender.close()
        try:
            seconds = receiver.recv()
        except EOFError:
            sys.exit(f"error: {method}: its process stopped; see above")
        finally:
            process.join()
        title = f"{method} step, {batch} patches of {size}³"
        rows.append(harness.overhead(title, "segmentation loss only", *seconds, BARS[method]))
        print(f"{title}: {rows[-1]['ratio']}", file=sys.stderr)  # the whole takes a while
    return harness.report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
