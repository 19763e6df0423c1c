"""Segmentation losses of the supervised term, student and teacher alike: MONAI's Dice +
cross-entropy and Dice.
"""

from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn


class SegmentationLoss(nn.Module):
    """`loss(logits, label)` -> scalar; float32 inside, so safe under autocast.

    Multi-class: logits (B, K, *spatial), label (B, 1, *spatial) ids. Mean over classes (background
    included) of 1 - (2 sum p g + 1e-5) / (sum p + sum g + 1e-5) per sample, plus the mean
    cross-entropy.
    Multi-label: label (B, K, *spatial) bool; the same Dice on sigmoids, no cross-entropy (the BraTS
    recipe).
    """

    def __init__(self, multilabel: bool = False) -> None:
        super().__init__()
        smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
        self.loss = (
            DiceLoss(sigmoid=True, **smooth)
            if multilabel
            else DiceCELoss(to_onehot_y=True, softmax=True, **smooth)
        )

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return self.loss(logits.float(), label.float())
