"""How nnU-Net v2 prepares a scan: crop to the box of non-zero voxels, normalise each channel, then
resample, so that a student sees what its nnU-Net teacher was trained on.

Arrays are (C, H, W, D) or, of labels, (H, W, D). The order of axes does not matter to what is
computed, so that nnU-Net's transposition is left to its network. Isensee et al., Nature Methods 18
(2021), supplementary note 3.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.ndimage import binary_fill_holes, zoom

from dataloaders.faults import DataError

# Scheme -> the numbers that it needs, as nnU-Net names them
SCHEMES = {
    "CTNormalization": ("percentile_00_5", "percentile_99_5", "mean", "std"),
    "ZScoreNormalization": (),
    "NoNormalization": (),
    "RescaleTo01Normalization": (),
    "RGBTo01Normalization": (),
}
ANISOTROPIC = 3  # an axis more than this many times as coarse as the finest is resampled apart
TIE = 1e-6  # shares of a voxel that are closer than this are the same
TINY = 1e-8  # smallest deviation or range to divide by


def check_channels(channels: Sequence[Mapping], in_channels: int) -> None:
    """DataError unless `channels` says for each channel which scheme normalises it, with its
    numbers.
    """
    key = "intensity_channels"
    if len(channels) != in_channels:
        raise DataError(
            f"{key}: {len(channels)} entries, expected one for each of {in_channels} channel(s)"
        )
    for channel in channels:
        scheme = channel.get("scheme") if isinstance(channel, Mapping) else None
        if scheme not in SCHEMES:
            raise DataError(
                f"{key}: {channel!r}, expected a mapping with 'scheme', one of {', '.join(SCHEMES)}"
            )
        wanted = SCHEMES[scheme]
        allowed = {"scheme", *wanted, *(("mask",) if scheme == "ZScoreNormalization" else ())}
        unknown = sorted(channel.keys() - allowed)
        if unknown:
            raise DataError(f"{key}: {scheme} has no use for {', '.join(map(str, unknown))}")
        numbers = [channel.get(name) for name in wanted]
        if not all(type(number) in (int, float) and np.isfinite(number) for number in numbers):
            raise DataError(f"{key}: {scheme} needs the numbers {', '.join(wanted)}, got {channel}")
        if type(channel.get("mask", False)) is not bool:
            raise DataError(f"{key}: 'mask' must be true or false, got {channel['mask']!r}")
        if wanted and numbers[0] >= numbers[1]:
            raise DataError(f"{key}: percentile_00_5 must be below percentile_99_5, got {channel}")


def nonzero_mask(image: np.ndarray) -> np.ndarray:
    """Voxels (H, W, D) that are not 0 in some channel of (C, H, W, D), and the holes in them."""
    return binary_fill_holes((image != 0).any(0))


def box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds the voxels of a mask; empty where there are none."""
    slices = []
    for axis in range(mask.ndim):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        places = np.flatnonzero(mask.any(others))
        slices.append(slice(places[0], places[-1] + 1) if len(places) else slice(0, 0))
    return tuple(slices)


def normalized(channel: np.ndarray, how: Mapping, mask: np.ndarray) -> np.ndarray:
    """One channel (H, W, D), normalised as `how` says: float32. mask: the non-zero voxels, outside
    of which a masked z-score leaves the image as it is.
    """
    scheme = how["scheme"]
    channel = channel.astype(np.float32)
    if scheme == "CTNormalization":
        clipped = np.clip(channel, how["percentile_00_5"], how["percentile_99_5"])
        return ((clipped - how["mean"]) / max(how["std"], TINY)).astype(np.float32)
    if scheme == "ZScoreNormalization" and how.get("mask", False):
        inside = channel[mask]
        channel[mask] = (inside - inside.mean()) / max(inside.std(), TINY)
        return channel
    if scheme == "ZScoreNormalization":
        return (channel - channel.mean()) / max(channel.std(), TINY)
    if scheme == "RescaleTo01Normalization":
        channel = channel - channel.min()
        return channel / max(channel.max(), TINY)
    if scheme == "RGBTo01Normalization":
        if channel.min() < 0 or channel.max() > 255:
            raise DataError(
                f"RGBTo01Normalization takes intensities of 0 to 255, got {channel.min():g} to "
                f"{channel.max():g}"
            )
        return channel / np.float32(255)
    return channel


def new_shape(
    shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]
) -> tuple[int, ...]:
    """Voxels along each axis once `shape` voxels of `spacing` mm are of `target` mm."""
    sides = (round(float(now / then * n)) for n, now, then in zip(shape, spacing, target))
    return tuple(max(1, side) for side in sides)


def coarse_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The axis that is resampled apart: the coarsest of the scan where that is anisotropic, else of
    the target where that is; None where neither is, or where two axes are the coarsest.
    """
    for values in (np.asarray(spacing, float), np.asarray(target, float)):
        if values.max() / values.min() > ANISOTROPIC:
            coarsest = np.flatnonzero(values == values.max())
            return int(coarsest[0]) if len(coarsest) == 1 else None
    return None


def resample_image(
    channel: np.ndarray, shape: Sequence[int], apart: int | None = None
) -> np.ndarray:
    """A channel (H, W, D) on a grid of `shape` voxels over the same extent: cubic splines, cut off
    at the lowest and highest value that was there. Float32.

    apart: an axis whose slices are resampled one by one, and which then takes the nearest slice.
    """
    return _resample(channel, shape, apart, _cubic).astype(np.float32)


def resample_label(label: np.ndarray, shape: Sequence[int], apart: int | None = None) -> np.ndarray:
    """Ids (H, W, D) on a grid of `shape` voxels: each id's mask linearly, and the id with the most
    of a voxel; where two have as much, that of the nearest voxel.

    apart: as in `resample_image`.
    """
    return _resample(label, shape, apart, _linear_ids).astype(label.dtype)


def resampled_affine(
    affine: np.ndarray, start: Sequence[int], shape: Sequence[int], new: Sequence[int]
) -> np.ndarray:
    """Affine (4, 4) of a grid of `new` voxels over the extent of `shape` voxels from `start` on."""
    scale = np.asarray(shape, float) / np.asarray(new, float)
    change = np.diag([*scale, 1.0])
    change[:3, 3] = np.asarray(start, float) + (scale - 1) / 2  # voxel centres, not corners
    return np.asarray(affine, float) @ change


def _resample(values: np.ndarray, shape: Sequence[int], apart: int | None, resize) -> np.ndarray:
    shape = tuple(shape)
    if values.shape == shape:
        return values
    if apart is None:
        return resize(values, shape)
    rows = np.moveaxis(values, apart, 0)
    plane = tuple(side for axis, side in enumerate(shape) if axis != apart)
    slices = np.stack([resize(row, plane) for row in rows])
    place = len(rows) / shape[apart] * (np.arange(shape[apart]) + 0.5) - 0.5
    # halves go up, as in the nearest-neighbour spline of scipy
    nearest = np.clip(np.floor(place + 0.5).astype(int), 0, len(rows) - 1)
    return np.moveaxis(slices[nearest], 0, apart)


def _zoomed(values: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    factors = [new / old for new, old in zip(shape, values.shape)]
    return zoom(values.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)


def _cubic(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if values.shape == shape:
        return values
    return np.clip(_zoomed(values, shape, 3), values.min(), values.max())


def _linear_ids(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    result = _zoomed(values, shape, 0).astype(values.dtype)  # where two ids share the most: nearest
    first, second = np.full(shape, -1.0), np.full(shape, -1.0)
    winner = np.zeros(shape, values.dtype)
    for number in np.unique(values):  # one at a time: a scan may have a hundred ids
        share = _zoomed(values == number, shape, 1)
        higher = share > first
        second = np.where(higher, first, np.maximum(second, share))
        first = np.where(higher, share, first)
        winner[higher] = number
    clear = first - second > TIE
    result[clear] = winner[clear]
    return result
