"""Segmentation losses of the supervised term, student and teacher alike: MONAI's Dice +
cross-entropy and Dice.
"""

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from losses.incomplete import known_voxels, labelled_part, masked_mean, per_voxel
from losses.kd import class_masks

SMOOTH = 1e-5


class SegmentationLoss(nn.Module):
    """`loss(logits, label)` -> scalar; float32 inside, so safe under autocast.

    Multi-class: logits (B, K, *spatial), label (B, 1, *spatial) ids. Mean over classes (background
    included) of 1 - (2 sum p g + 1e-5) / (sum p + sum g + 1e-5) per sample, plus the mean
    cross-entropy.
    Multi-label: label (B, K, *spatial) bool; the same Dice on sigmoids, no cross-entropy (the BraTS
    recipe).
    incomplete: labels may be; then `loss(logits, label, annotated)`, see losses/incomplete.py.
    """

    def __init__(self, multilabel: bool = False, incomplete: bool = False) -> None:
        super().__init__()
        smooth = {"smooth_nr": SMOOTH, "smooth_dr": SMOOTH}
        self.multilabel, self.incomplete = multilabel, incomplete
        self.loss = (
            DiceLoss(sigmoid=True, **smooth)
            if multilabel
            else DiceCELoss(to_onehot_y=True, softmax=True, **smooth)
        )

    def forward(self, logits: Tensor, label: Tensor, annotated: Tensor | None = None) -> Tensor:
        """annotated: (B, K) bool; None: all classes of all samples are."""
        if not self.incomplete:
            return self.loss(logits.float(), label.float())
        if annotated is None:
            annotated = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        return incomplete_loss(logits, label, annotated, self.multilabel)


def incomplete_loss(logits: Tensor, label: Tensor, annotated: Tensor, multilabel: bool) -> Tensor:
    """The loss above of labels that are not complete; scalar float32.

    Dice: sums over the labelled voxels; mean over the annotated classes of all samples that have
    such a voxel. Cross-entropy: mean over the labelled voxels of the batch. 0 where nothing is
    labelled.
    """
    entropy = 0.0
    if multilabel:
        target, known = known_voxels(label)
        probs, target = logits.float().sigmoid(), target.bool()
    else:
        logits, ids, known = labelled_part(logits, label, annotated)
        probs, target = logits.softmax(1), class_masks(ids, logits.shape[1])
        per_voxel_entropy = F.cross_entropy(logits, ids[:, 0].long(), reduction="none")
        entropy = masked_mean(per_voxel_entropy, known[:, 0])
    known = known & per_voxel(annotated, logits.ndim)
    target, axes = target & known, list(range(2, logits.ndim))
    overlap = probs.where(target, 0.0).sum(axes)
    total = probs.where(known, 0.0).sum(axes) + target.sum(axes)
    per_class = 1.0 - (2.0 * overlap + SMOOTH) / (total + SMOOTH)  # (B, K)
    return masked_mean(per_class, known.flatten(2).any(2)) + entropy
