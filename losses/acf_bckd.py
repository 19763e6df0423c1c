"""ACF-BCKD: attention-correction feature distillation and boundary-constraint distillation.

Source: the ACF-BCKD paper on efficient 3D medical image segmentation and its released code.
Total: L = L_seg + L_AFD + L_CFD + a L_HBD + (1 - a) L_SBD, where a falls with training.

- AFD: attention distance between the attended student map and the teacher block's output f(X) + X.
- CFD: attention distance between a projection of the student's attention and the teacher's correction f(X).
- HBD: divergence from the teacher on the label's boundary shells, class by class.
- SBD: log Hausdorff distance-transform loss between the student's probabilities and the teacher's prediction.

Deviations from the released code (preset 'clean'): with SegResNet the correction is the true residual branch, where the
reference, through an in-place addition, compares with the block output twice; preset 'as_released' does the same as the
reference (`correction_source='output'`). The schedule is a function of progress, so resuming cannot restart it. SBD is
skipped while its weight is 0. An empty boundary is skipped by its size, not by the sum of its indices.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.distance import boundary_distance_squared
from losses.taps import attention_distance, class_map, require_taps, resize_nearest


def hard_boundary_weight(progress: float, floor: float = 0.001, decay: float = 1.0) -> float:
    """Weight a of the hard boundary term: max(floor, 1 - decay * progress); the soft term gets 1 - a.

    progress: step / max_steps in [0, 1]. decay: the fall over the whole training (the paper's gamma per epoch times
    the number of epochs: 1.0 and floor 0.001 on BTCV, 0.45 and 0.5 on WORD, 0.5 and 0.5 on BraTS21).
    """
    return max(floor, 1.0 - decay * progress)


def boundary_shells(foreground: Tensor, border: str = "count") -> Tensor:
    """Voxels that have both foreground and background among their neighbours (26 in 3D, 8 in 2D, centre left out).

    foreground: (B, C, *spatial) bool. Returns the same shape, bool: a two-sided shell, one voxel on either side.
    border: 'count' treats the outside of the patch as background (the paper's code), so a class that is cut by the
    patch has a boundary there; 'ignore' repeats the border voxels instead, so it has none.
    """
    count = foreground.to(torch.uint8)  # at most 27 in 3D
    for axis in range(2, foreground.ndim):
        size = count.shape[axis]
        total = count.clone()
        total.narrow(axis, 1, size - 1).add_(count.narrow(axis, 0, size - 1))
        total.narrow(axis, 0, size - 1).add_(count.narrow(axis, 1, size - 1))
        if border == "ignore":
            total.narrow(axis, 0, 1).add_(count.narrow(axis, 0, 1))
            total.narrow(axis, size - 1, 1).add_(count.narrow(axis, size - 1, 1))
        count = total
    neighbours = count.sub_(foreground.to(torch.uint8))
    return (neighbours > 0) & (neighbours < 3 ** (foreground.ndim - 2) - 1)


def hard_boundary_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    multilabel: bool = False,
    reduction: str = "mean",
    border: str = "count",
    label_classes: int | None = None,
) -> Tensor:
    """HBD: sum over samples and classes of the mean divergence on that class's boundary shell (paper, hard boundary).

    logits: (B, K, *spatial). label: (B, 1, *spatial) ids, or (B, K, *spatial) regions if `multilabel`.
    Divergence per voxel: KL(teacher || student) of the softmax, or the summed squared difference of sigmoids.
    reduction: 'mean' also divides by K (the reference's scaling), 'voxel' does not. Empty shells contribute 0.
    label_classes: number of class ids whose shells count, K by default. Gradient to the student only.
    """
    num_classes = student_logits.shape[1]
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    if multilabel:
        foreground = label > 0.5 if label.is_floating_point() else label.bool()
        divergence = (student_logits.sigmoid() - teacher_logits.sigmoid()).square().sum(1)
    else:
        ids = torch.arange(num_classes if label_classes is None else label_classes, device=label.device)
        foreground = class_map(label)[:, None] == ids.view(1, -1, *[1] * (label.ndim - 2))
        teacher_log_probs = F.log_softmax(teacher_logits, dim=1)
        divergence = teacher_log_probs - F.log_softmax(student_logits, dim=1)
        divergence = (teacher_log_probs.exp() * divergence).sum(1)
    shells = boundary_shells(foreground, border).flatten(2)
    sizes = shells.sum(2)
    per_class = (1.0 / sizes.clamp(min=1)).masked_fill(sizes == 0, 0.0)
    # One divergence map serves all shells: a voxel weighs the sum of 1/size over the shells that it lies on.
    with torch.autocast(student_logits.device.type, enabled=False):
        weight = torch.einsum("bc,bcv->bv", per_class, shells.to(per_class.dtype))
    loss = (divergence.flatten(1) * weight).sum()
    return loss / num_classes if reduction == "mean" else loss


def soft_boundary_loss(student_logits: Tensor, teacher_logits: Tensor, multilabel: bool = False) -> Tensor:
    """SBD: log(1 + H), H = mean over channels, samples and voxels of (P - G)^2 (D(P > 0.5)^2 + D(G)^2).

    logits: (B, K, *spatial). P: student probabilities; G: the teacher's own prediction, one-hot argmax (background
    channel left out) or sigmoid >= 0.5. D: distance to the mask's boundary in voxels, constant for the gradient.
    Source: paper, soft boundary; Karimi and Salcudean, TMI 2019 (Hausdorff distance-transform loss).
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    if multilabel:
        probs = student_logits.sigmoid()
        target = teacher_logits >= 0.0  # sigmoid >= 0.5
    else:
        probs = student_logits.softmax(1)[:, 1:]
        ids = torch.arange(1, student_logits.shape[1], device=student_logits.device)
        target = teacher_logits.argmax(1, keepdim=True) == ids.view(1, -1, *[1] * (student_logits.ndim - 2))
    field = boundary_distance_squared((probs.detach() > 0.5).flatten(0, 1))
    field += boundary_distance_squared(target.flatten(0, 1))
    error = (probs - target.to(probs.dtype)).square()
    return torch.log1p((error * field.view_as(error)).mean())


class Attention(nn.Module):
    """Channel gate times spatial gate, both hard sigmoids; (B, C, H, W, D) -> (B, C, H, W, D) in [0, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels)
        self.ch_attn = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), _named_conv(channels, hidden, 1), _named_conv(hidden, channels, 1)
        )
        self.sp_attn = _named_conv(1, 1, 7)

    def forward(self, feature: Tensor) -> Tensor:
        pool, squeeze, excite = self.ch_attn
        channel = F.hardsigmoid(excite(F.relu(squeeze(pool(feature)))))
        spatial = F.hardsigmoid(self.sp_attn(feature.mean(1, keepdim=True)))
        return channel * spatial


def hidden_channels(channels: int) -> int:
    """channels // 16 rounded to a multiple of 8, at least 8, and never more than 10 % below (MobileNet's rule)."""
    wanted = channels // 16
    rounded = max(8, (wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _named_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    # The nested name `conv` is that of released checkpoints.
    conv = nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(OrderedDict(conv=conv))


class AttentionCorrection(nn.Module):
    """AFD and CFD: learnable attention on the student's `acf` tap against the teacher's block (paper, AFD/CFD)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = Attention(channels)
        self.convertor2 = nn.Conv3d(channels, channels, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(
        self, feature: Tensor, teacher_feature: Tensor, teacher_correction: Tensor, reduction: str = "mean"
    ) -> tuple[Tensor, Tensor]:
        """feature (B, C, *grid), teacher maps (B, C', *grid') -> (AFD, CFD) distances, unweighted scalars."""
        attention = self.attn(feature)
        size = teacher_feature.shape[2:]
        attended = resize_nearest(attention * feature, size)
        correction = resize_nearest(self.convertor2(attention), size)
        return (
            attention_distance(attended, teacher_feature, reduction),
            attention_distance(correction, teacher_correction, reduction),
        )


class ACFBCKD(nn.Module):
    """All four terms with the schedule; terms `afd`, `cfd`, `hbd`, `sbd`, each weighted.

    afd, cfd: weights of the feature terms. hbd, sbd: factors on the scheduled boundary weights. A weight of 0 leaves
    the term out. floor, decay: see `hard_boundary_weight`. feature_reduction: 'mean' over voxels (the paper's scale,
    whose strength depends on the grid) or 'sum'. correction_source: 'residual' or 'output'; None follows the preset.
    boundary_reduction, border, label_classes: see `hard_boundary_loss`.
    """

    student_taps = ("acf",)

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        afd: float = 25000.0,
        cfd: float = 25000.0,
        hbd: float = 1.0,
        sbd: float = 1.0,
        floor: float = 0.001,
        decay: float = 1.0,
        feature_reduction: str = "mean",
        boundary_reduction: str = "mean",
        border: str = "count",
        label_classes: int | None = None,
        correction_source: str | None = None,
    ) -> None:
        super().__init__()
        choices = {
            "feature_reduction": (feature_reduction, ("mean", "sum")),
            "boundary_reduction": (boundary_reduction, ("mean", "voxel")),
            "border": (border, ("count", "ignore")),
            "correction_source": (correction_source, (None, "residual", "output")),
        }
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"acf_bckd: {key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"acf_bckd: floor must lie in [0, 1], got {floor}")
        if min(afd, cfd, hbd, sbd) < 0:
            raise ValueError(f"acf_bckd: weights must not be negative, got afd {afd}, cfd {cfd}, hbd {hbd}, sbd {sbd}")
        if label_classes is not None and not 1 <= label_classes <= num_classes:
            raise ValueError(f"acf_bckd: label_classes must lie in 1..{num_classes}, got {label_classes}")
        if correction_source is None:
            # A network in whose reference hook the sum had overwritten f(X) says so by a `hooked_residual` tap.
            hooked = preset == "as_released" and "hooked_residual" in teacher_channels
            self.correction_tap = "hooked_residual" if hooked else "residual"
        else:
            self.correction_tap = "corrected" if correction_source == "output" else "residual"
        self.teacher_taps = tuple({"corrected": None, self.correction_tap: None})
        if not (afd or cfd):
            self.student_taps = self.teacher_taps = ()
        require_taps("acf_bckd", "student", student_channels, self.student_taps)
        require_taps("acf_bckd", "teacher", teacher_channels, self.teacher_taps)
        self.num_classes, self.multilabel = num_classes, multilabel
        self.afd, self.cfd, self.hbd, self.sbd = afd, cfd, hbd, sbd
        self.floor, self.decay = floor, decay
        self.feature_reduction, self.boundary_reduction = feature_reduction, boundary_reduction
        self.border, self.label_classes = border, label_classes
        self.features = AttentionCorrection(student_channels["acf"]) if afd or cfd else None

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        alpha = hard_boundary_weight(progress, self.floor, self.decay)
        zero = student.logits.new_zeros((), dtype=torch.float32)
        terms = {"afd": zero, "cfd": zero, "hbd": zero, "sbd": zero}
        if self.features is not None:
            afd, cfd = self.features(
                student.features["acf"],
                teacher.features["corrected"],
                teacher.features[self.correction_tap],
                self.feature_reduction,
            )
            terms["afd"], terms["cfd"] = self.afd * afd, self.cfd * cfd
        if self.hbd * alpha > 0:
            terms["hbd"] = (self.hbd * alpha) * hard_boundary_loss(
                student.logits, teacher.logits, label, self.multilabel, self.boundary_reduction,
                self.border, self.label_classes,
            )  # fmt: skip
        if self.sbd * (1.0 - alpha) > 0:
            terms["sbd"] = (self.sbd * (1.0 - alpha)) * soft_boundary_loss(
                student.logits, teacher.logits, self.multilabel
            )
        return terms
