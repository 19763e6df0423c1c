"""NKD: soft cross-entropy on the target class, and on the other classes after normalising them
among themselves.

Paper: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
with Normalized Loss and Customized Soft Labels", ICCV 2023, eq. 6. With t the label's class, p and
q the student's and teacher's probabilities, and p^, q^ those of the classes other than t at
temperature tau, scaled to sum to 1:

    L = weight * mean_v [ -q_t log p_t
                          - gamma tau^2 sum_{i != t} q^_i log p^_i ],  gamma 1.5, tau 1, weight 1

It is a cross-entropy, so it is above 0 even where the student equals the teacher.

Overlapping regions (multi-label; neither paper nor reference has a form): each region of each voxel
is a two-class problem, region or not, and the target is the class that the label names. The only
other class always has the probability 1 after normalising, so its term is exactly 0 and is left
out: L = weight * mean_{b,k,v} [-q_t log p_t].

Deviations: the teacher is constant in both terms (the reference leaves the second one attached,
which changes no value). 'as_released' equals 'clean' on multi-class data and is refused on
multi-label data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.incomplete import known_voxels, masked_mean
from losses.kd import (
    PRESETS,
    check_choice,
    check_positive,
    check_weights,
    class_masks,
    region_masks,
)
from losses.taps import class_map
from losses.voxelwise import voxel_sums


def normalised_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    tau: float = 1.0,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Target and non-target cross-entropies, unweighted scalars float32; gradient to the student
    only.

    logits: (B, K, *spatial), K >= 2. label: (B, 1, *spatial) class ids. known: of the label's
    shape, bool, the voxels of the mean; None: all. The second carries tau^2, not gamma.
    """

    def totals(student: Tensor, teacher: Tensor, label: Tensor, *known: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        target = class_map(label)[:, None]
        target_probs = teacher.softmax(1).gather(1, target)
        for mask in known:
            target_probs = target_probs * mask
        target_loss = -(target_probs * F.log_softmax(student, dim=1).gather(1, target)).sum()

        is_target = class_masks(label, student.shape[1])
        # exactly 0 at the target
        rest = (teacher / tau).masked_fill(is_target, -float("inf")).softmax(1)
        for mask in known:
            rest = rest * mask
        # The target channel of the student stays finite: 0 * -inf would be NaN.
        scaled = student / tau
        log_rest = scaled - scaled.masked_fill(is_target, -float("inf")).logsumexp(1, keepdim=True)
        return torch.stack([target_loss, -(rest * log_rest).sum()])

    constants = (teacher_logits, label) if known is None else (teacher_logits, label, known)
    count = label.numel() if known is None else known.sum().clamp(min=1)
    target_loss, rest_loss = voxel_sums(totals, student_logits, *constants) / count
    return target_loss, tau**2 * rest_loss


def binary_target_kd(
    student_logits: Tensor, teacher_logits: Tensor, label: Tensor, known: Tensor | None = None
) -> Tensor:
    """Mean over elements, those `known` if given, of -q_t log p_t with t = region or not; logits,
    label and known (B, K, *spatial); scalar float32.
    """
    sign = region_masks(label, student_logits.shape[1]).float() * 2 - 1
    target_probs = (teacher_logits.detach().float() * sign).sigmoid()
    return -masked_mean(target_probs * F.logsigmoid(student_logits.float() * sign), known)


class NKD(nn.Module):
    """The terms `nkd_target` and, on multi-class data, `nkd_nontarget`."""

    incomplete = False

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float = 1.0,
        gamma: float = 1.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("nkd", "preset", preset, PRESETS)
        check_positive("nkd", tau=tau)
        check_weights("nkd", weight=weight, gamma=gamma)
        if multilabel and preset == "as_released":
            raise ValueError(
                "nkd: the reference has no multi-label form to be 'as_released'; use preset 'clean'"
            )
        self.student_taps = self.teacher_taps = ()
        self.multilabel, self.weight, self.gamma, self.tau = multilabel, weight, gamma, tau

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        label, known = known_voxels(label) if self.incomplete else (label, None)
        both = student.logits, teacher.logits
        if self.multilabel:
            return {"nkd_target": self.weight * binary_target_kd(*both, label, known)}
        target, rest = normalised_kd(*both, label, self.tau, known)
        return {
            "nkd_target": self.weight * target,
            "nkd_nontarget": self.weight * self.gamma * rest,
        }
