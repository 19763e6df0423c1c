"""Why a training signal helps or not: what each term of the loss asks of the network, and what to
conclude from it.

A term's share of the loss says little: a large value may have hardly any gradient. So at some steps
the gradient of each term with respect to the trained network's parameters is measured, by itself,
before the step's own backward pass. It changes nothing of the training, and costs one backward pass
for each term at those steps.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import World

NEGLIGIBLE = 0.01  # share of the gradient norm below which a term does nothing
# median share below which a term that never acted has no gradient, rather than a small weight
VANISHED = 0.001
DOMINANT = 0.8  # median share above which a term leaves the others without effect
OPPOSED = -0.2  # median cosine with the first term's gradient below which a term works against it
LOST = 0.25  # share of the true foreground below which pseudo-labels have lost it
UNSEEN = 0.05  # recall of a class below which pseudo-labels have lost it
UNLEARNT = 0.1  # best mean Dice below which nothing was learnt
FAQ_BACKGROUND = "docs/faq.md, 'The network predicts nothing but background'"
FAQ_COLLAPSE = "docs/faq.md, 'Few labels: the pseudo-labels collapse'"


class Finding(NamedTuple):
    """Something that a reader of a run's log should know, and what to do about it."""

    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class Diagnosis:
    """Measures the terms every `interval` steps and writes what it finds to the log, under the kind
    'diagnosis'.

    interval: steps; 0 measures never. parameters: of the network that is trained and deployed, not
    those of a method's adapters. A loss of one term has nothing to compare and is not measured.
    """

    def __init__(
        self, interval: int, parameters: Iterable[Tensor], world: World, log, compiled: bool = False
    ) -> None:
        self.interval, self.world, self.log = interval, world, log
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.last = -1
        if interval and compiled:
            # A compiled backward pass may overwrite what the forward pass kept for it; here it runs
            # more than once.
            torch._functorch.config.donated_buffer = False

    def measure(self, step: int, terms: Mapping[str, Tensor], scaler: torch.amp.GradScaler) -> None:
        """Call with the terms of each step (0-based) before its backward pass; a step counts once.
        In all processes.
        """
        due = self.interval and (step + 1) % self.interval == 0 and step != self.last
        if not due or len(terms) < 2:
            return
        self.last = step
        self.log.scalars(
            step, "diagnosis", term_shares(terms, self.parameters, self.world, scaler.get_scale())
        )


def term_shares(
    terms: Mapping[str, Tensor], parameters: Sequence[Tensor], world: World, scale: float = 1.0
) -> dict[str, float]:
    """What each of the scalar `terms` contributes, with the graph kept and no `.grad` touched.

    Keys for each term: `loss_share/NAME`, |value| / sum of |values|; `grad_norm/NAME`, L2 norm of
    its gradient with respect to `parameters`, averaged over the processes as a step's is;
    `grad_share/NAME`, norm / sum of norms; and but for the first term `cosine/NAME`, of its
    gradient with that of the first (NaN if either is zero).
    scale: factor of the backward pass that keeps half-precision gradients from underflow; smaller
    ones are tried where it overflows.
    """
    values = world.means({name: abs(term.item()) for name, term in terms.items()})
    norms, cosines, first = {}, {}, None
    for name, term in terms.items():
        gradient = _gradient(term, parameters, scale)
        world.average([gradient])
        norms[name] = torch.linalg.vector_norm(gradient).item()
        if first is None:
            first, first_norm = gradient, norms[name]
        else:
            product = norms[name] * first_norm
            cosines[name] = torch.dot(gradient, first).item() / product if product else math.nan
    return {
        **{f"loss_share/{name}": value for name, value in _shares(values).items()},
        **{f"grad_norm/{name}": value for name, value in norms.items()},
        **{f"grad_share/{name}": value for name, value in _shares(norms).items()},
        **{f"cosine/{name}": value for name, value in cosines.items()},
    }


def _gradient(term: Tensor, parameters: Sequence[Tensor], scale: float) -> Tensor:
    """The gradient of a scalar as one float32 vector; zeros where it does not reach."""
    sizes = sum(parameter.numel() for parameter in parameters)
    if not term.requires_grad:  # a constant: a term whose weight is 0 may not even be computed
        return parameters[0].new_zeros(sizes, dtype=torch.float32)
    while True:
        found = torch.autograd.grad(term * scale, parameters, retain_graph=True, allow_unused=True)
        flat = torch.cat(
            [
                torch.zeros_like(parameter, dtype=torch.float32).flatten()
                if part is None
                else part.float().flatten()
                for part, parameter in zip(found, parameters)
            ]
        ).div_(scale)
        if scale <= 1 or torch.isfinite(flat).all():
            return flat
        scale = max(1.0, scale / 16)


def _shares(sizes: Mapping[str, float]) -> dict[str, float]:
    total = sum(sizes.values())
    return {name: size / total if total else math.nan for name, size in sizes.items()}


def term_history(entries: Iterable[Mapping], figure: str) -> dict[str, list[tuple[int, float]]]:
    """Lines of a log -> for each term the (step, value) of a figure such as 'grad_share'; undefined
    values left out.
    """
    history: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        if entry["kind"] != "diagnosis":
            continue
        for key, value in entry.items():
            kind, _, name = key.partition("/")
            if kind == figure and value is not None:
                history.setdefault(name, []).append((entry["step"], value))
    return history


def _logged(training: Iterable[Mapping], name: str) -> list[float]:
    """Values of a term in the course of training. training: the lines of the kind 'train'."""
    values = (entry.get(name) for entry in training)
    return [value for value in values if value is not None]


def _stuck_since(measured: Sequence[tuple[int, float]], values: Sequence[float]) -> int | None:
    """Step from which a term has had no gradient to the end, over half of the measurements,
    although it has hardly fallen. A term whose weight has been taken away falls too; one whose
    weight is small has little gradient, not none. (One whose weight is tiny has none worth the name
    either: ask only of terms that count in the loss.)
    """
    since, last = None, []
    for step, share in reversed(measured):
        if share >= NEGLIGIBLE:
            break
        since = step
        last.append(share)
    if since is None or 2 * len(last) < len(measured) or not values:
        return None
    acted = len(last) < len(measured)
    if not acted and statistics.median(last) > VANISHED:
        return None
    return (
        since if statistics.fmean(values[-max(1, len(values) // 4) :]) > 0.5 * max(values) else None
    )


def findings(entries: Sequence[Mapping]) -> list[Finding]:
    """What a reader of a run's log should know: a teacher that is no better, terms without effect,
    or against it.

    entries: the lines of log.jsonl. Of what was not measured nothing is said.
    """
    found = []
    training = [entry for entry in entries if entry["kind"] == "train"]
    teacher = next((entry["dice"] for entry in entries if entry["kind"] == "teacher"), None)
    validated = [
        entry["dice"]
        for entry in entries
        if entry["kind"] == "val" and entry.get("dice") is not None
    ]
    if teacher is not None and validated and teacher <= max(validated):
        found.append(
            Finding(
                "the teacher is not better than the student on the validation cases: Dice "
                f"{teacher:.4f} against {max(validated):.4f}",
                "a longer or larger teacher has more to teach",
            )
        )
    shares, cosines = term_history(entries, "grad_share"), term_history(entries, "cosine")
    loss = _logged(training, "loss")
    for name, measured in shares.items():
        found += _share_findings(name, measured, _logged(training, name), loss, len(shares) > 1)
    first = next(iter(shares), "")
    for name, measured in cosines.items():
        median = statistics.median(value for _, value in measured)
        largest = max((value for _, value in shares.get(name, [])), default=0)
        if median < OPPOSED and largest >= NEGLIGIBLE:
            found.append(
                Finding(
                    f"the term '{name}' works against '{first}': cosine of their gradients "
                    f"{median:.2f} at the median of {_times(measured)}",
                    "lower its weight, let it begin later (distill_warmup), or compare with a run "
                    "without it",
                )
            )
    return found + _pseudo_label_findings(entries, training) + _unlearnt(validated)


def _share_findings(
    name: str,
    measured: Sequence[tuple[int, float]],
    logged: Sequence[float],
    loss: Sequence[float],
    others: bool,
) -> list[Finding]:
    """Whether a term is stuck, negligible or dominates.

    measured: (step, share of the gradient norm). logged, loss: values of the term and of the whole
    loss in the course of training. others: whether there are other terms.
    """
    values = [value for _, value in measured]
    counts = logged and (not loss or logged[-1] >= NEGLIGIBLE * loss[-1])
    since = _stuck_since(measured, logged) if counts else None
    if since is not None:
        what = (
            f"the term '{name}' is stuck: since step {since + 1} it has under "
            f"{100 * NEGLIGIBLE:.0f} % of the gradient norm, while its value stays at "
            f"{logged[-1]:.3g}"
        )
        advice = "what it goes through may be saturated, then a lower learning rate helps"
        return [Finding(what, advice)]
    if max(values) < NEGLIGIBLE:
        what = (
            f"the term '{name}' is negligible: at most {100 * max(values):.2g} % of the gradient "
            f"norm in {_times(measured)}"
        )
        return [Finding(what, "raise its weight, or leave it out and save its time")]
    if others and statistics.median(values) > DOMINANT:
        what = (
            f"the term '{name}' dominates: {100 * statistics.median(values):.0f} % of the gradient "
            f"norm at the median of {_times(measured)}"
        )
        advice = "the others hardly act beside it: lower its weight or raise theirs"
        return [Finding(what, advice)]
    return []


def _times(measured: Sequence) -> str:
    return f"{len(measured)} measurement{'s' * (len(measured) > 1)}"


def _pseudo_label_findings(
    entries: Sequence[Mapping], training: Sequence[Mapping]
) -> list[Finding]:
    """What the pseudo-labels of the last quarter of the training lack, where the truth is known."""
    foreground = _logged(training, "pseudo_foreground")
    truth = _logged(training, "true_foreground")
    if not foreground or not truth:
        return []
    advice = f"let their loss come in later or train more slowly, see {FAQ_COLLAPSE}"
    found, expected = _last_quarter(foreground), _last_quarter(truth)
    if found < LOST * expected:
        what = (
            f"the pseudo-labels have lost the foreground: {100 * found:.2f} % of the voxels at the "
            f"end, where the truth has {100 * expected:.2f} %"
        )
        return [Finding(what, advice)]
    scores = next((entry for entry in reversed(entries) if entry["kind"] == "val"), {})
    names = [key for key in scores if key not in ("step", "kind", "dice")]
    lost = []
    for number in range(1, len(names) + 1):
        recalls = _logged(training, f"recall_{number}")
        if recalls and _last_quarter(recalls) < UNSEEN:
            what = (
                f"the pseudo-labels have lost the class '{names[number - 1]}': "
                f"only {100 * _last_quarter(recalls):.1f} % of its voxels are labelled so, with "
                "enough confidence, at the end"
            )
            lost.append(Finding(what, advice))
    return lost


def _unlearnt(validated: Sequence[float]) -> list[Finding]:
    if not validated or max(validated) >= UNLEARNT:
        return []
    what = f"the validation stayed near 0: the best mean Dice is {max(validated):.4f}"
    advice = f"train longer or at a higher rate, and look at the pictures; see {FAQ_BACKGROUND}"
    return [Finding(what, advice)]


def _last_quarter(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(1, len(values) // 4) :])
