"""EMKD: the teacher's class probabilities, its maps of important places, and the relations between
its classes.

Paper: Qin et al., "Efficient Medical Image Segmentation Based on Knowledge Distillation", TMI 2021
(prediction maps distillation, importance maps distillation, region affinity distillation):

    L_prediction = tau^2 KL(teacher || student), per voxel
                   (weight 0.1, tau 4)
    L_importance = mean_b |q(F_S) - q(F_T)|^2,  q(F) = a / |a|_2,  a = mean_c |F|^4
                   (weight 0.9 for each tap)
    L_region     = mean over class pairs i < j of ( cos(r_i, r_j)_S - cos(r_i, r_j)_T )^2
                   (weight 0.9 for each tap)

r_i is the mean feature of class i over the batch; classes that the batch lacks are left out, and
with fewer than two the term is 0. Taps: stage1 and stage3. The teacher's feature and the label are
brought to the student's grid by nearest neighbour.

Overlapping regions (multi-label): the regions are the classes; the prediction term is the KL of
[p, 1 - p], summed over the regions.

Both presets are the same: the released CT configs of this method do not start, so there is no
arithmetic to follow.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.kd import (
    PRESETS,
    bernoulli_kl,
    check_choice,
    check_positive,
    check_weights,
    class_masks,
    region_masks,
    softmax_kl,
    unit_vectors,
)
from losses.taps import readable, require_taps, resize_nearest


def importance_map(feature: Tensor) -> Tensor:
    """Channel mean of fourth powers, flattened and of unit length: (B, C, *spatial) -> (B, V)
    float32.
    """
    feature = feature.float().flatten(2)
    # The result does not depend on the scale of a sample; without this the squares of fourth powers
    # overflow.
    scale = feature.detach().abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    return F.normalize((feature / scale).pow(4).mean(1), dim=1)


def importance_distance(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Squared distance of the importance maps, mean over B; same grid, any channels; gradient to
    the student only.
    """
    difference = importance_map(student_feature) - importance_map(teacher_feature.detach())
    return difference.square().sum(1).mean()


def region_affinity(student_feature: Tensor, teacher_feature: Tensor, masks: Tensor) -> Tensor:
    """Mean squared difference of the cosines between class features; scalar float32; gradient to
    the student only.

    features (B, C, *grid), channels may differ. masks (B, K, *grid) bool, may overlap.
    """
    masks = masks.transpose(0, 1).flatten(1)  # (K, B * V)
    present = masks.any(1)
    if readable(masks):  # saves the work for absent classes
        masks, present = masks[present], present[present]

    def cosines(feature: Tensor) -> Tensor:
        members = masks.to(torch.float32)
        with torch.autocast(feature.device.type, enabled=False):
            vectors = feature.float().transpose(0, 1).flatten(1)  # (C, B * V)
            # An absent class has the vector 0.
            regions = unit_vectors(
                (members / members.sum(1, keepdim=True).clamp(min=1)) @ vectors.T, dim=1
            )
            return regions @ regions.T

    first, second = torch.triu_indices(len(masks), len(masks), 1, device=masks.device)
    pairs = (present[first] & present[second]).sum()
    difference = (cosines(student_feature) - cosines(teacher_feature.detach()))[first, second]
    return difference.square().sum() / pairs.clamp(min=1)


class EMKD(nn.Module):
    """The terms `emkd_prediction`, `emkd_importance` and `emkd_region`, the last two summed over
    `taps`.
    """

    incomplete = False  # an UNKNOWN voxel is in no class

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        prediction_weight: float = 0.1,
        importance_weight: float = 0.9,
        region_weight: float = 0.9,
        tau: float = 4.0,
        taps: Iterable[str] = ("stage1", "stage3"),
    ) -> None:
        super().__init__()
        check_choice("emkd", "preset", preset, PRESETS)
        check_positive("emkd", tau=tau)
        check_weights(
            "emkd",
            prediction_weight=prediction_weight,
            importance_weight=importance_weight,
            region_weight=region_weight,
        )
        self.student_taps = self.teacher_taps = tuple(taps)
        if not self.student_taps:
            raise ValueError("emkd: taps is empty; name at least one tap")
        require_taps("emkd", "student", student_channels, self.student_taps)
        require_taps("emkd", "teacher", teacher_channels, self.teacher_taps)
        self.multilabel, self.num_classes, self.tau = multilabel, num_classes, tau
        self.prediction_weight, self.importance_weight = prediction_weight, importance_weight
        self.region_weight = region_weight

    def _masks(self, label: Tensor, grid: torch.Size) -> Tensor:
        if self.multilabel:
            return resize_nearest(region_masks(label, self.num_classes).float(), grid).bool()
        return class_masks(resize_nearest(label.float(), grid), self.num_classes)

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        importance, region = [], []
        for tap in self.student_taps:
            student_feature = student.features[tap]
            grid = student_feature.shape[2:]
            teacher_feature = resize_nearest(teacher.features[tap].detach(), grid)
            importance.append(importance_distance(student_feature, teacher_feature))
            region.append(
                region_affinity(student_feature, teacher_feature, self._masks(label, grid))
            )
        divergence = bernoulli_kl if self.multilabel else softmax_kl
        prediction = divergence(student.logits, teacher.logits, self.tau, reduction="voxel")
        return {
            "emkd_prediction": self.prediction_weight * prediction,
            "emkd_importance": self.importance_weight * sum(importance),
            "emkd_region": self.region_weight * sum(region),
        }
