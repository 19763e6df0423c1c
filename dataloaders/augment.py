"""Crops and random augmentations: functions of (sample, rng), so that data are a function of (seed,
draw) alone.

A sample is a dict with `image` (C, H, W, D) float32 and `label` (1 or K, H, W, D) uint8. Steps 6-10
of the CT recipe of ACF-BCKD, and steps 3-7 of its BraTS recipe, use these with other probabilities.
"""

from collections.abc import Sequence

import numpy as np


def pad_to(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Zero-pad the trailing three axes to at least `size`, evenly on both sides (as sliding-window
    inference does).
    """
    missing = [max(want - have, 0) for want, have in zip(size, array.shape[-3:])]
    if not any(missing):
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 3) + [(m // 2, m - m // 2) for m in missing])


def crop_around(array: np.ndarray, centre: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Crop `size` voxels around `centre`, moved inwards where it would leave the volume, padded if
    still too small.
    """
    slices = []
    for middle, want, have in zip(centre, size, array.shape[-3:]):
        start = min(max(int(middle) - want // 2, 0), max(have - want, 0))
        slices.append(slice(start, start + want))
    return pad_to(np.asarray(array[(..., *slices)]), size)


def crop_pos_neg(
    sample: dict, rng: np.random.Generator, size: Sequence[int], pos_ratio: float = 0.5
) -> dict:
    """Random crop centred on a foreground voxel with probability `pos_ratio`, else on a background
    one.

    Background centres are label 0 inside the body; both are given as flat indices, `foreground` and
    `background`, of the volume. If one kind does not exist the other is taken; if neither does, the
    centre is uniform.
    """
    shape = sample["label"].shape[-3:]
    wanted = (
        ("foreground", "background") if rng.random() < pos_ratio else ("background", "foreground")
    )
    indices = next((sample[kind] for kind in wanted if len(sample[kind])), None)
    voxel = (
        int(indices[rng.integers(len(indices))])
        if indices is not None
        else int(rng.integers(np.prod(shape)))
    )
    centre = np.unravel_index(voxel, shape)
    return {key: crop_around(sample[key], centre, size) for key in ("image", "label")}


def crop_uniform(sample: dict, rng: np.random.Generator, size: Sequence[int]) -> dict:
    """Random crop, every position equally likely."""
    shape = sample["label"].shape[-3:]
    centre = [
        rng.integers(have - want + 1) + want // 2 if have > want else have // 2
        for have, want in zip(shape, size)
    ]
    return {key: crop_around(sample[key], centre, size) for key in ("image", "label")}


def random_flip(sample: dict, rng: np.random.Generator, prob: float) -> dict:
    """Mirror each spatial axis independently with probability `prob`."""
    axes = [axis for axis in (-3, -2, -1) if rng.random() < prob]
    return {key: np.flip(sample[key], axes) for key in ("image", "label")} if axes else sample


def random_rot90(sample: dict, rng: np.random.Generator, prob: float) -> dict:
    """With probability `prob` rotate by 90, 180 or 270 degrees in the plane of the first two
    spatial axes.
    """
    if rng.random() >= prob:
        return sample
    turns = int(rng.integers(1, 4))
    return {key: np.rot90(sample[key], turns, axes=(-3, -2)) for key in ("image", "label")}


def random_scale(sample: dict, rng: np.random.Generator, prob: float, amount: float = 0.1) -> dict:
    """With probability `prob` multiply the image by 1 + U(-amount, amount)."""
    if rng.random() >= prob:
        return sample
    return sample | {"image": sample["image"] * np.float32(1.0 + rng.uniform(-amount, amount))}


def random_shift(sample: dict, rng: np.random.Generator, prob: float, amount: float = 0.1) -> dict:
    """With probability `prob` add U(-amount, amount) to the image."""
    if rng.random() >= prob:
        return sample
    return sample | {"image": sample["image"] + np.float32(rng.uniform(-amount, amount))}


def zscore_nonzero(image: np.ndarray) -> np.ndarray:
    """(x - mean) / std of each channel over its non-zero voxels; zeros stay zero, a constant
    channel is centred.
    """
    result = np.zeros_like(image)
    for channel, target in zip(image, result):
        inside = channel != 0
        if inside.any():
            values = channel[inside]
            spread = float(values.std())
            target[inside] = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return result
