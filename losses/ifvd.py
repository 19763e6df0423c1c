"""IFVD: how close each voxel's feature is to its class centre, in the student as in the teacher;
and a KD term.

Paper: Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV
2020, eq. 1-3. With mu_k the mean feature of class k in one sample and y_v the label:

    L = kd_weight * KD(logits)
        + weight * mean_{b,v} ( cos(F_S,v , mu_S,y_v) - cos(F_T,v , mu_T,y_v) )^2,   10 and 200

on the `decoder` taps, whose channel counts may differ. The label and the teacher's feature are
brought to the student's grid by nearest neighbour. The gradient also flows through the student's
centres. Voxels of a class id of `num_label_classes` or above count as their own centre and so add 0
to the mean.

On an untrained student the gradient of the second term is 200 to 300 times that of the segmentation
loss: 200 is its weight, and nearly all voxels push the same way, since nearly all are less like
their centre than the teacher's. It needs `distill_warmup`; docs/methods.md has figures.

Overlapping regions (multi-label): each region is a problem of two classes, region and the rest, on
the whole feature; mean over the regions. KD term: the squared difference of sigmoids.

Presets. They differ in the KD term: 'clean' is the KL of `losses/kd.py`, 'as_released' the squared
difference of sigmoids on multi-class data too. The released WORD configs with the ResU-Net teacher
have 14 label classes where the data have 17: `num_label_classes=14` gives those. The reference's
multi-label form compares single feature channels, where a cosine is a sign: it has no gradient, and
'as_released' is refused there.
"""

import torch
from torch import Tensor, nn

from losses.incomplete import UNKNOWN, known_voxels, masked_mean
from losses.kd import (
    PRESETS,
    REDUCTIONS,
    check_choice,
    check_weights,
    region_masks,
    sigmoid_mse,
    softmax_kl,
    unit_vectors,
)
from losses.taps import class_map, require_taps, resize_nearest


def centre_similarity(feature: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Cosine between each voxel's feature and the mean feature of its class in the same sample: (B,
    V) float32.

    feature: (B, C, *spatial). classes: (B, V) ids; those outside 0 .. num_classes - 1 are left out
    and get 0. Gradient to the feature, through the centres too.
    """
    with torch.autocast(feature.device.type, enabled=False):
        feature = feature.float().flatten(2)
        valid = (classes >= 0) & (classes < num_classes)
        classes = classes.masked_fill(~valid, 0)
        members = feature.new_zeros(*classes.shape, num_classes)  # (B, V, K), one-hot
        members.scatter_(2, classes[..., None], valid[..., None].to(feature.dtype))
        centres = (feature @ members) / (members.sum(1, keepdim=True) + 1e-6)  # (B, C, K)
        # All K products and a gather take K floats per voxel; spreading the centres over the grid
        # would take C.
        products = (unit_vectors(centres, 1).transpose(1, 2) @ unit_vectors(feature, 1)).gather(
            1, classes[:, None]
        )
        cosine = products[:, 0]
    return cosine.masked_fill(~valid, 0.0)


def feature_variation(
    student_feature: Tensor,
    teacher_feature: Tensor,
    classes: Tensor,
    num_classes: int,
    incomplete: bool = False,
) -> Tensor:
    """Mean over B and voxels of the squared difference of both centre similarities; scalar float32.

    student_feature (B, C, *grid), teacher_feature (B, C', *grid), classes (B, *grid) ids;
    incomplete: those that are UNKNOWN are in no mean. Gradient to the student only.
    """
    classes = classes.flatten(1)
    student = centre_similarity(student_feature, classes, num_classes)
    teacher = centre_similarity(teacher_feature.detach(), classes, num_classes)
    return masked_mean((student - teacher).square(), classes != UNKNOWN if incomplete else None)


class IFVD(nn.Module):
    """The terms `ifvd_kd` and `ifvd`.

    num_label_classes: class ids that have a centre, from 0; None means all of num_classes.
    reduction: of the KD term, 'mean' or 'voxel' as in `losses/kd.py`.
    """

    incomplete = False

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float = 200.0,
        kd_weight: float = 10.0,
        num_label_classes: int | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("ifvd", "preset", preset, PRESETS)
        check_choice("ifvd", "reduction", reduction, REDUCTIONS)
        check_weights("ifvd", weight=weight, kd_weight=kd_weight)
        if multilabel and preset == "as_released":
            raise ValueError(
                "ifvd: the reference's multi-label form has no gradient; use preset 'clean'"
            )
        if multilabel and num_label_classes is not None:
            raise ValueError(
                "ifvd: num_label_classes is for class ids; multi-label data use every region"
            )
        if num_label_classes is not None and not 1 <= num_label_classes <= num_classes:
            raise ValueError(
                f"ifvd: num_label_classes must lie in 1 .. {num_classes}, got {num_label_classes}"
            )
        self.student_taps = self.teacher_taps = ("decoder",)
        require_taps("ifvd", "student", student_channels, self.student_taps)
        require_taps("ifvd", "teacher", teacher_channels, self.teacher_taps)
        self.multilabel, self.num_classes = multilabel, num_classes
        self.num_label_classes = num_label_classes or num_classes
        self.weight, self.kd_weight, self.reduction = weight, kd_weight, reduction
        self.kd = sigmoid_mse if multilabel or preset == "as_released" else softmax_kl

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        student_feature = student.features["decoder"]
        grid = student_feature.shape[2:]
        teacher_feature = resize_nearest(teacher.features["decoder"].detach(), grid)
        if self.multilabel:
            regions = region_masks(label, self.num_classes).float()
            if self.incomplete:
                regions = regions.where(known_voxels(label)[1], UNKNOWN)
            variations = [
                feature_variation(student_feature, teacher_feature, region, 2, self.incomplete)
                for region in resize_nearest(regions, grid).long().unbind(1)
            ]
            variation = sum(variations) / len(variations)
        else:
            classes = class_map(resize_nearest(label.float(), grid))
            variation = feature_variation(
                student_feature, teacher_feature, classes, self.num_label_classes, self.incomplete
            )
        kd = self.kd(student.logits, teacher.logits, reduction=self.reduction)
        return {"ifvd_kd": self.kd_weight * kd, "ifvd": self.weight * variation}
