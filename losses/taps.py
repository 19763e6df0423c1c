"""What losses share: checks of feature taps, resizing between grids, class maps, copies that no GPU
is waited for.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def require_taps(method: str, role: str, channels: Mapping[str, int], taps: Iterable[str]) -> None:
    """Raise ValueError if the `role` ('student' or 'teacher') network with taps `channels` lacks
    one of `taps`.
    """
    missing = [tap for tap in taps if tap not in channels]
    if missing:
        raise ValueError(
            f"{method} needs the tap {', '.join(missing)} of the {role}, whose network offers only "
            f"{', '.join(sorted(channels)) or 'none'}; choose another {role} or add the tap to its "
            "features"
        )


def resize_nearest(feature: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """`feature` (B, C, *spatial) on a grid of `size` by nearest neighbour; the same tensor if it
    has that size.
    """
    return (
        feature
        if tuple(feature.shape[2:]) == tuple(size)
        else F.interpolate(feature, size=tuple(size))
    )


def readable(values: Tensor) -> bool:
    """Whether the host can ask what `values` are without waiting for their device: whether they are
    on the CPU.

    Where it cannot, a loss must not let a shape depend on them.
    """
    return values.device.type == "cpu"


def moved(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, from page-locked memory if that is a GPU: a copy from elsewhere makes
    the host wait.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def class_map(label: Tensor) -> Tensor:
    """Label (B, 1, *spatial) of any dtype -> class ids (B, *spatial), int64."""
    return label[:, 0].long()


def attention_distance(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared difference of two normalised spatial attention maps; scalar float32.

    student (B, C, *spatial), teacher (B, C', *spatial) on the same grid; channels may differ, they
    are averaged away. A map is the channel mean of squares, flattened and divided by its L2 norm.
    reduction: 'mean' over B and voxels, or 'sum' over voxels and mean over B. No gradient to the
    teacher. Zagoruyko and Komodakis, ICLR 2017 (AT).
    """
    return energy_distance(attention_energy(student), attention_energy(teacher), reduction)


def attention_energy(feature: Tensor) -> Tensor:
    """Channel mean of squares, (B, C, *spatial) -> (B, *spatial) float32: an attention map before
    normalisation.
    """
    return feature.float().square().mean(1)


def energy_distance(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """`attention_distance` of the channel means of squares of both; (B, *spatial), same grid."""
    student, teacher = (
        F.normalize(energy.flatten(1), dim=1, eps=1e-12) for energy in (student, teacher.detach())
    )
    per_sample = (student - teacher).square()
    return per_sample.mean() if reduction == "mean" else per_sample.sum(1).mean()
