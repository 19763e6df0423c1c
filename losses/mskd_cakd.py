"""MSKD-CAKD: the teacher's affinities between classes, and its predictions tempered by the norm of
the feature.

Two terms of the ACF-BCKD authors' repository. Class affinity, of the probabilities P (C, V) of one
sample:

    L_affinity = mean_{b,c} [1 - cos(column c of (P P^T)_S, column c of (P P^T)_T)]    weight 1

and feature-normalised distillation (Xu et al., "Feature Normalized Knowledge Distillation for Image
Classification", ECCV 2020), |F| being the length of a voxel's feature vector before the classifier:

    L_norm = mean over voxels of CE(softmax(z_T / |F_T|), softmax(z_S / |F_S|))        weight 1

A voxel whose feature is long has a soft target. The lowest value of L_norm is the teacher's
entropy, not 0. The tap is the one before the classifier (decoder), brought to the grid of the
logits by nearest neighbour. Lengths count as 0.1 at least: behind a ReLU some voxels have no
feature at all.

Overlapping regions (multi-label): P holds the sigmoids of the regions, and L_norm is the binary
cross-entropy, mean over regions too.

Both presets are the same. The released code leaves out the constant 1 of L_affinity, and takes the
logarithm of the softmax twice in L_norm, which changes nothing: log-probabilities are their own
log-softmax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.kd import PRESETS, check_choice, check_positive, check_weights, unit_vectors
from losses.taps import require_taps, resize_nearest


def class_affinity_distance(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """L_affinity of probabilities (B, C, *spatial); scalar float32 in [0, 1]; gradient to the
    student only.
    """

    def columns(probs: Tensor) -> Tensor:
        flat = probs.float().flatten(2)
        with torch.autocast(probs.device.type, enabled=False):  # sums over all voxels
            return unit_vectors(flat @ (flat / flat.shape[2]).transpose(1, 2), dim=1)  # (B, C, C)

    return 1.0 - (columns(student_probs) * columns(teacher_probs.detach())).sum(1).mean()


def tempered_logits(logits: Tensor, feature: Tensor, min_norm: float = 0.1) -> Tensor:
    """Logits (B, C, *spatial) over the lengths of the feature vectors (B, C', *grid), at least
    `min_norm`; float32.
    """
    length = feature.float().square().sum(1, keepdim=True).clamp_min(min_norm**2).sqrt()
    return logits.float() / resize_nearest(length, logits.shape[2:])


class MSKDCAKD(nn.Module):
    """The terms `mskd_affinity` and `mskd_norm`."""

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        affinity_weight: float = 1.0,
        norm_weight: float = 1.0,
        min_norm: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("mskd_cakd", "preset", preset, PRESETS)
        check_positive("mskd_cakd", min_norm=min_norm)
        check_weights("mskd_cakd", affinity_weight=affinity_weight, norm_weight=norm_weight)
        self.student_taps = self.teacher_taps = ("decoder",)
        require_taps("mskd_cakd", "student", student_channels, self.student_taps)
        require_taps("mskd_cakd", "teacher", teacher_channels, self.teacher_taps)
        self.multilabel = multilabel
        self.affinity_weight, self.norm_weight, self.min_norm = (
            affinity_weight,
            norm_weight,
            min_norm,
        )

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        ours = tempered_logits(student.logits, student.features["decoder"], self.min_norm)
        theirs = tempered_logits(
            teacher.logits.detach(), teacher.features["decoder"].detach(), self.min_norm
        )
        if self.multilabel:
            norm = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid())
            probs = [output.logits.float().sigmoid() for output in (student, teacher)]
        else:
            norm = F.cross_entropy(ours, theirs.softmax(1))
            probs = [output.logits.float().softmax(1) for output in (student, teacher)]
        return {
            "mskd_affinity": self.affinity_weight * class_affinity_distance(*probs),
            "mskd_norm": self.norm_weight * norm,
        }
