"""KD: the student imitates the teacher's class probabilities, voxel by voxel.

Paper: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 deep
learning workshop:

    L = weight * tau^2 * KL( softmax(z_T / tau) || softmax(z_S / tau) ),    weight 10, tau 1

Overlapping regions (multi-label): mean squared difference of the sigmoids, weight 10, as the
reference does.

Presets. The released code compares sigmoids on multi-class data too, because a flag defaults to
True. 'clean': KL of the softmax on multi-class data. 'as_released': difference of sigmoids
everywhere. `mode` overrides either.
Reduction. 'mean' (default, the reference's scaling) averages over all elements of (B, K, *spatial),
which is K times less than the mathematical divergence per voxel; 'voxel' sums over the channels and
averages over the voxels.

The divergences here serve the other methods that have a logit term.
"""

import inspect
import typing
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import PRESETS
from losses.taps import class_map
from losses.voxelwise import voxel_sums

REDUCTIONS = ("mean", "voxel")


def check_choice(method: str, name: str, value: object, allowed: Collection) -> None:
    """Raise ValueError unless the argument `name` of `method` has one of the `allowed` values."""
    if value not in allowed:
        raise ValueError(
            f"{method}: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}"
        )


def takes_options(options: type) -> Callable[[type], type]:
    """Decorates a method whose constructor ends in `**options`, the fields of a dataclass: they are
    arguments like the others, so configurations name them beside those, and only the code groups
    them.
    """

    def decorate(cls: type) -> type:
        constructor = cls.__init__  # not the class: one that inherits may have its own
        own = list(inspect.signature(constructor).parameters.values())[:-1]
        fields = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(options).parameters.values()
        ]
        constructor.__signature__ = inspect.Signature([*own, *fields])
        constructor.__annotations__ |= typing.get_type_hints(options)
        return cls

    return decorate


def check_positive(method: str, **values: float) -> None:
    """Raise ValueError for an argument of `method` that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{method}: {name} must be above 0, got {value}")


def check_not_negative(method: str, **values: float) -> None:
    """Raise ValueError for an argument of `method` below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{method}: {name} must be at least 0, got {value}")


def check_weights(method: str, **values: float | None) -> None:
    """Raise ValueError for a weight of `method` that is negative or not finite; None stands for a
    default.
    """
    for name, value in values.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{method}: {name} is a weight and must be at least 0, got {value}")


def check_fractions(method: str, **values: float) -> None:
    """Raise ValueError for an argument of `method` outside [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{method}: {name} must lie in [0, 1], got {value}")


def region_masks(label: Tensor, num_regions: int) -> Tensor:
    """Label (B, num_regions, *spatial), bool or 0/1 of any dtype -> bool, False where it is UNKNOWN
    (losses/incomplete.py); ValueError for another channel count.
    """
    if label.shape[1] != num_regions:
        raise ValueError(
            f"a multi-label label needs one channel per region: expected (B, {num_regions}, "
            "*spatial), "
            f"got {tuple(label.shape)}; set multilabel=False for labels of class ids"
        )
    return (label > 0.5) & (label < 1.5) if label.is_floating_point() else label == 1


def class_masks(label: Tensor, num_classes: int) -> Tensor:
    """Class ids (B, 1, *spatial) of any dtype -> (B, num_classes, *spatial) bool, one-hot."""
    ids = torch.arange(num_classes, device=label.device)
    return class_map(label)[:, None] == ids.view(1, -1, *[1] * (label.ndim - 2))


def unit_vectors(vectors: Tensor, dim: int, eps: float = 1e-6) -> Tensor:
    """float32 `vectors` over their L2 norm along `dim`; 0 without gradient where that norm is below
    `eps`.

    A clamped division would give such a vector, which has no direction, a gradient of 1 / eps.
    """
    norm = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors * torch.where(norm < eps, 0.0, 1.0 / norm.clamp_min(eps))


def softmax_kl(
    student_logits: Tensor, teacher_logits: Tensor, tau: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """tau^2 KL(teacher || student) between the class distributions of each voxel; scalar float32.

    logits: (B, K, *spatial). reduction: 'mean' over B, K and voxels, or 'voxel', the sum over K
    averaged over B and voxels. Gradient to the student only.
    """

    def total(student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = (F.log_softmax(logits.float() / tau, dim=1) for logits in (student, teacher))
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)[None]

    divergence = (
        tau**2 * voxel_sums(total, student_logits, teacher_logits)[0] / student_logits.numel()
    )
    return divergence if reduction == "mean" else divergence * student_logits.shape[1]


def bernoulli_kl_map(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL between the two-class distributions [q, 1 - q] and [p, 1 - p], q and p the sigmoids;
    elementwise, float32.

    logits: any equal shapes, any range (log-sigmoids, so no logarithm of 0). Gradient to the
    student only.
    """
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    inside = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    outside = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return inside + outside


def bernoulli_kl(
    student_logits: Tensor, teacher_logits: Tensor, tau: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """tau^2 KL(teacher || student) with each channel a binary problem; arguments and reductions as
    `softmax_kl`.
    """
    divergence = (
        tau**2 * bernoulli_kl_map(student_logits.float() / tau, teacher_logits.float() / tau).mean()
    )
    return divergence if reduction == "mean" else divergence * student_logits.shape[1]


def sigmoid_mse(student_logits: Tensor, teacher_logits: Tensor, reduction: str = "mean") -> Tensor:
    """Squared difference of the sigmoids; logits (B, K, *spatial), reductions as `softmax_kl`;
    scalar float32.
    """
    error = F.mse_loss(student_logits.float().sigmoid(), teacher_logits.detach().float().sigmoid())
    return error if reduction == "mean" else error * student_logits.shape[1]


class KD(nn.Module):
    """The term `kd`.

    mode: 'kl' (multi-class), 'bernoulli_kl' (multi-label) or 'mse_sigmoid'; None follows the
    preset.
    tau: temperature of the two KL modes. reduction: 'mean' or 'voxel', see the head of this file.
    """

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float = 10.0,
        mode: str | None = None,
        tau: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("kd", "preset", preset, PRESETS)
        check_choice("kd", "reduction", reduction, REDUCTIONS)
        check_positive("kd", tau=tau)
        check_weights("kd", weight=weight)
        self.student_taps = self.teacher_taps = ()
        if mode is None:
            mode = "mse_sigmoid" if multilabel or preset == "as_released" else "kl"
        check_choice("kd", "mode", mode, ("bernoulli_kl" if multilabel else "kl", "mse_sigmoid"))
        self.weight, self.mode, self.tau, self.reduction = weight, mode, tau, reduction

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        if self.mode == "mse_sigmoid":
            loss = sigmoid_mse(student.logits, teacher.logits, self.reduction)
        else:
            divergence = softmax_kl if self.mode == "kl" else bernoulli_kl
            loss = divergence(student.logits, teacher.logits, self.tau, self.reduction)
        return {"kd": self.weight * loss}
