"""What semi-supervised methods share: cross-entropy and Dice on trusted voxels, the ramp of the
consistency weight.

    L = 0.5 (CE + Dice),   Dice_k = 1 - (2 sum p_k y_k + eps) / (sum p_k^2 + sum y_k^2 + eps)

The sums of Dice run over the whole batch, so a class that one image lacks is still counted in the
others. The papers differ in which classes they take, which is all that `background`, `average` and
`eps` choose:

    CRKD, supervised                foreground, summed: the defaults here
    SSL4MIS, UniMatch, AC-MT        all classes, averaged: background=True, average=True
    CrossMatch (ACDC)               the same with eps=1e-4 instead of 1e-5
    LeFeD, CrossMatch (left atrium) the one foreground class of two: the defaults here

UniMatch and CrossMatch give the labelled images half the weight as well. `supervised_loss` chooses
between a method's own form and CRKD's, so that a comparison can hold the supervised part equal.

Label maps, masks and confidences may be (B, 1, *spatial) or (B, *spatial). Labels that are not
complete come with `annotated` (B, K), see losses/incomplete.py: then the losses are those of the
merged probabilities at labelled voxels.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from losses.incomplete import labelled_part
from losses.kd import class_masks

SUP_LOSSES = ("own", "ce_dice")


def sigmoid_rampup(t: float, length: float) -> float:
    """exp(-5 (1 - t / length)^2), t clamped to [0, length]: 0.0067 at the start, 1 from `length`
    on; 1 if length <= 0.

    t and length in any one unit (steps, epochs, fraction of the training). Laine and Aila, ICLR
    2017.
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(t, 0.0), length) / length) ** 2)


def without_channel(values: Tensor, logits: Tensor) -> Tensor:
    """A map (B, 1, *spatial) or (B, *spatial) of the size of `logits` -> (B, *spatial); ValueError
    for other shapes.
    """
    result = values[:, 0] if values.ndim == logits.ndim and values.shape[1] == 1 else values
    if result.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"a map for logits of shape {tuple(logits.shape)} must have their batch and spatial "
            "sizes and one channel "
            f"or none, got {tuple(values.shape)}"
        )
    return result


def cross_entropy_map(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy per voxel: logits (B, C, *spatial), ids of any dtype -> (B, *spatial)
    float32.
    """
    return F.cross_entropy(logits.float(), without_channel(label, logits).long(), reduction="none")


def cross_entropy_loss(
    logits: Tensor, label: Tensor, mask: Tensor | None = None, annotated: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the voxels of `mask` (all without one); 0 with a zero gradient if
    there are none. annotated: of labels that are not complete, whose labelled voxels are the mask.
    """
    if annotated is not None:
        logits, label, mask = labelled_part(logits, label, annotated)
    loss = cross_entropy_map(logits, label)
    if mask is None:
        return loss.mean()
    mask = without_channel(mask, logits).bool()
    return loss.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def dice_loss(
    logits: Tensor,
    label: Tensor,
    background: bool = False,
    average: bool = False,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    absent: bool = True,
    annotated: Tensor | None = None,
) -> Tensor:
    """Soft Dice with squared denominators on softmax probabilities; scalar float32.

    logits: (B, C, *spatial). label: ids of any dtype. background: count class 0 too. average: mean
    over the counted classes instead of their sum. mask: voxels that count, bool or 0/1; with none
    left the loss and its gradient are 0.
    absent: count classes without a voxel in the label too. Such a class has loss 0 if it is not
    predicted and tends to 1 if it is, so pseudo-labels that lack a class push it to nothing; False
    leaves it out.
    annotated: of labels that are not complete, whose labelled voxels are the mask. A class that no
    sample tells has loss 0 and is not in the average.
    """
    first = 0 if background else 1
    if annotated is not None:
        logits, label, mask = labelled_part(logits, label, annotated)
    probs = logits.float().softmax(1)[:, first:]
    target = class_masks(without_channel(label, logits)[:, None], logits.shape[1])[:, first:]
    if mask is not None:
        mask = without_channel(mask, logits).bool()[:, None]
        probs, target = probs.where(mask, 0.0), target & mask
    axes = [0, *range(2, logits.ndim)]
    overlap = probs.where(target, 0.0).sum(axes)
    total = probs.square().sum(axes) + target.sum(axes)
    per_class = 1.0 - (2.0 * overlap + eps) / (total + eps)
    if absent and average and annotated is not None:
        return per_class.sum() / annotated.any(0)[first:].sum().clamp(min=1)
    if absent:
        return per_class.mean() if average else per_class.sum()
    present = target.sum(axes) > 0
    per_class = per_class.where(present, 0.0)
    return per_class.sum() / (present.sum().clamp(min=1) if average else 1)


def ce_dice_loss(
    logits: Tensor,
    label: Tensor,
    background: bool = False,
    average: bool = False,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    absent: bool = True,
    annotated: Tensor | None = None,
) -> Tensor:
    """0.5 (cross-entropy + Dice); arguments as `dice_loss`. Scalar float32, gradient to the logits.

    Supervised on labelled images without a `mask`; on pseudo-labels with their validity (confidence
    >= threshold).
    """
    dice = dice_loss(logits, label, background, average, eps, mask, absent, annotated)
    return 0.5 * (cross_entropy_loss(logits, label, mask, annotated) + dice)


def supervised_loss(
    logits: Tensor,
    label: Tensor,
    sup_loss: str = "own",
    weight: float = 1.0,
    annotated: Tensor | None = None,
    **own: Any,
) -> Tensor:
    """The loss on labelled images, scalar float32, as `sup_loss` says (one of SUP_LOSSES).

    own: the method's, `weight` times `ce_dice_loss` with the arguments `own`. ce_dice: that of CRKD
    and of the labels alone, `ce_dice_loss` with its defaults and weight 1, whatever the method's.
    """
    if sup_loss == "ce_dice":
        return ce_dice_loss(logits, label, annotated=annotated)
    return weight * ce_dice_loss(logits, label, annotated=annotated, **own)
