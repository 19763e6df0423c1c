"""Several distillation methods at once: their terms side by side.

The loss is the sum of what each method gives by itself, at its own weights:

    L = L_seg + sum_m sum_i L_{m,i},    m the methods, i the terms of each

Student and teacher run once, all methods read the same outputs, and the segmentation loss counts
once. The plain sum is this project's choice; no paper is behind it.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from losses.incomplete import completed


class Combined(nn.Module):
    """The terms of `methods`, name -> module as `build_kd` makes it, in their order.

    A term, or a number of a `monitor`, keeps its name unless two methods use it: then it is called
    'method.name'. Schedules, memories and parameters stay those of each method. multilabel: as of
    `build_kd`.
    """

    def __init__(self, methods: Mapping[str, nn.Module], multilabel: bool = False) -> None:
        super().__init__()
        self.methods = nn.ModuleDict(methods)
        self.multilabel = multilabel
        self.monitor: dict[str, Tensor] = {}

    @property
    def incomplete(self) -> bool:
        """Whether a method leaves voxels that nobody labelled out by itself (losses/incomplete.py);
        the others are then given the label without them.
        """
        return any(getattr(method, "incomplete", False) for method in self.methods.values())

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        filled = self._filled(label, teacher.logits)
        terms, monitors = {}, {}
        for name, method in self.methods.items():
            its_label = label if getattr(method, "incomplete", False) else filled
            terms[name] = method(student, teacher, its_label, progress)
            monitors[name] = getattr(method, "monitor", {})
        counts = Counter()
        for name in self.methods:
            counts.update(terms[name].keys() | monitors[name].keys())
        self.monitor = _side_by_side(monitors, counts)
        return _side_by_side(terms, counts)

    def _filled(self, label: Tensor, logits: Tensor) -> Tensor:
        """The label with the teacher's prediction at voxels that nobody labelled."""
        if not self.incomplete:
            return label
        everything = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return completed(label, logits, everything, self.multilabel, fill=True)


def _side_by_side(
    found: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """One dict of those of several methods. counts: name -> how many methods use it."""
    joined = {}
    for method, values in found.items():
        for name, value in values.items():
            joined[name if counts[name] == 1 else f"{method}.{name}"] = value
    return joined
