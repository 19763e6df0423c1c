"""DKD: KD split into the target class against the rest, and the classes of the rest, with a weight
for each.

Paper: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7. With t the label's class,
p and q the student's and teacher's probabilities at tau, and p^, q^ those of the other classes
scaled to sum to 1:

    L = g * weight * tau^2 * mean_v [ alpha KL([q_t, 1 - q_t] || [p_t, 1 - p_t])
                                      + beta KL(q^ || p^) ],      alpha 1, beta 8, tau 4, weight 0.1

g = min(progress / warmup, 1) is the authors' warm-up over the first twelfth of the training (20 of
240 epochs). The weight is ACF-BCKD's; the authors' is 1.

Overlapping regions (multi-label). 'clean': a voxel's target classes are the regions that contain
it; KL of [p, 1 - p] at tau, with alpha on the targets and beta on the other regions, both over the
number of all elements: alpha = beta = 1 is plain KD. Weight 0.1. 'as_released': alpha * MSE(s(z_S),
s(z_T)) + beta * MSE(s(z_S m), s(z_T m)), s the sigmoid, m 1 outside the region and 0 inside, no
temperature, weight 1: the MSE with the elements outside weighted alpha + beta.

Presets. 'as_released' has no warm-up (g = 1), as the released code of ACF-BCKD has none; on
multi-class data that is the only difference. Deviation of both: logarithms of probabilities come
from log-sum-exp, so none is infinite where the reference's can be.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.incomplete import known_voxels, masked_mean
from losses.kd import (
    PRESETS,
    bernoulli_kl_map,
    check_choice,
    check_fractions,
    check_positive,
    check_weights,
    class_masks,
    region_masks,
)
from losses.taps import class_map
from losses.voxelwise import voxel_sums


def _split(logits: Tensor, label: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_t, log(1 - p_t), both (B, 1, *spatial), and log p^ (B, K, *spatial), finite though
    unused at the target.
    """
    everything = logits.logsumexp(1, keepdim=True)
    others = logits.masked_fill(is_target, -float("inf")).logsumexp(1, keepdim=True)
    target = logits.gather(1, class_map(label)[:, None])
    return target - everything, others - everything, logits - others


def decoupled_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    tau: float,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """tau^2 times the target and non-target divergences, mean over B and voxels; scalars float32.

    logits: (B, K, *spatial), K >= 2. label: (B, 1, *spatial) class ids. known: of the label's
    shape, bool, the voxels of the mean; None: all. Gradient to the student only.
    """

    def totals(student: Tensor, teacher: Tensor, label: Tensor, *known: Tensor) -> Tensor:
        is_target = class_masks(label, student.shape[1])
        log_p, log_not_p, log_p_rest = _split(student.float() / tau, label, is_target)
        log_q, log_not_q, log_q_rest = _split(teacher.float() / tau, label, is_target)
        target = log_q.exp() * (log_q - log_p) + log_not_q.exp() * (log_not_q - log_not_p)
        probs = log_q_rest.masked_fill(is_target, -float("inf")).exp()
        for mask in known:
            target, probs = target * mask, probs * mask
        return torch.stack([target.sum(), (probs * (log_q_rest - log_p_rest)).sum()])

    constants = (teacher_logits, label) if known is None else (teacher_logits, label, known)
    count = label.numel() if known is None else known.sum().clamp(min=1)
    target, rest = tau**2 * voxel_sums(totals, student_logits, *constants) / count
    return target, rest


def decoupled_bernoulli_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    tau: float,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """tau^2 times the two-class divergence inside and outside the regions, each over all elements,
    or all that are `known`; scalars float32.

    logits, label and known: (B, K, *spatial). Gradient to the student only.
    """
    inside = region_masks(label, student_logits.shape[1])
    divergence = tau**2 * bernoulli_kl_map(
        student_logits.float() / tau, teacher_logits.float() / tau
    )
    return masked_mean(divergence * inside, known), masked_mean(divergence * ~inside, known)


def masked_sigmoid_mse(
    student_logits: Tensor, teacher_logits: Tensor, label: Tensor, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared difference of sigmoids, of all logits and of those set to 0 inside the region;
    the latter where the label is `known`, which the former does not need. Scalars float32.
    """
    outside = ~region_masks(label, student_logits.shape[1])
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    everything = F.mse_loss(student.sigmoid(), teacher.sigmoid())
    pair = (student * outside).sigmoid(), (teacher * outside).sigmoid()
    if known is None:
        return everything, F.mse_loss(*pair)
    return everything, masked_mean(F.mse_loss(*pair, reduction="none"), known)


class DKD(nn.Module):
    """The terms `dkd_target` and `dkd_nontarget`.

    weight: None means 0.1, and 1 for multi-label data with preset 'as_released', whose squared
    differences have no tau. warmup: share of the training, in [0, 1], in which both terms grow
    linearly from 0 to their weights; None means 1/12, and 0 (none) with preset 'as_released'.
    Raises ValueError for an argument outside its range.
    """

    incomplete = False

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float | None = None,
        alpha: float = 1.0,
        beta: float = 8.0,
        tau: float = 4.0,
        warmup: float | None = None,
    ) -> None:
        super().__init__()
        if warmup is None:
            warmup = 0.0 if preset == "as_released" else 1 / 12
        check_choice("dkd", "preset", preset, PRESETS)
        check_positive("dkd", tau=tau)
        check_weights("dkd", weight=weight, alpha=alpha, beta=beta)
        check_fractions("dkd", warmup=warmup)
        self.student_taps = self.teacher_taps = ()
        self.multilabel, self.squared = multilabel, multilabel and preset == "as_released"
        if weight is None:
            weight = 1.0 if self.squared else 0.1
        self.alpha, self.beta, self.tau = weight * alpha, weight * beta, tau
        self.warmup = warmup

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        label, known = known_voxels(label) if self.incomplete else (label, None)
        both = student.logits, teacher.logits
        if self.squared:
            target, rest = masked_sigmoid_mse(*both, label, known)
        else:
            decoupled = decoupled_bernoulli_kl if self.multilabel else decoupled_kl
            target, rest = decoupled(*both, label, self.tau, known)
        grown = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        return {
            "dkd_target": grown * self.alpha * target,
            "dkd_nontarget": grown * self.beta * rest,
        }
