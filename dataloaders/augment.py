"""Crops, random augmentations, and weak and strong views, in 3D and 2D: functions of (sample, rng),
so that data are a function of (seed, draw) alone.

A sample is a dict with `image` (C, H, W) or (C, H, W, D) float32 and `label` (1 or K, H, W[, D])
uint8. Geometry moves both together; strong views start from a weak one and change intensities only,
so they stay aligned. What each recipe takes:

    CT, BraTS (ACF-BCKD)   crop_pos_neg or crop_uniform, random_flip, random_rot90, random_scale,
                           random_shift, with other probabilities each
    LA                     rot_flip, crop_padded, strong_volume    (UA-MT; CrossMatch's intensities)
    ACDC                   rot_flip, rotate_small, resize_nearest, strong_grey  (SSL4MIS; UniMatch)
    ISIC, Kvasir           rot_flip, resize_rgb, strong_rgb, rotate_small_rgb             (CRKD)

Colour jitter, grayscale and 2D blur are torchvision's on 8-bit Pillow images; bias field, gamma and
3D blur are TorchIO's; both are written here so that neither library is needed.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from scipy import ndimage

BIAS_ORDER = 3  # total degree of the bias field's polynomial: 20 coefficients in 3D


# Patches of volumes


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


# Geometry of views


def rot_flip(sample: dict, rng: np.random.Generator) -> dict:
    """Turn by 0, 90, 180 or 270 degrees in the plane of the first two spatial axes, then always
    mirror one of them.
    """
    turns, axis = int(rng.integers(4)), int(rng.integers(2))
    return sample | {
        key: np.flip(np.rot90(sample[key], turns, axes=(1, 2)), 1 + axis)
        for key in ("image", "label")
    }


def rotate_small(sample: dict, rng: np.random.Generator) -> dict:
    """Turn a slice by a whole number of degrees in -20..19, nearest neighbour, zeros outside
    (SciPy).
    """
    angle = int(rng.integers(-20, 20))
    return sample | {
        key: ndimage.rotate(sample[key], angle, axes=(2, 1), order=0, reshape=False)
        for key in ("image", "label")
    }


def rotate_small_rgb(sample: dict, rng: np.random.Generator) -> dict:
    """Turn an RGB image by a whole number of degrees in -20..20, nearest neighbour, zeros outside
    (Pillow).
    """
    angle = int(rng.integers(-20, 21))
    label = Image.fromarray(np.ascontiguousarray(sample["label"][0])).rotate(angle)
    return sample | {
        "image": from_pil(to_pil(sample["image"]).rotate(angle)),
        "label": np.asarray(label)[None],
    }


@lru_cache(maxsize=4096)
def _nearest(size: int, target: int) -> np.ndarray:
    """Which of `size` pixels `scipy.ndimage.zoom(order=0)` takes for each of `target`; the last one
    is the last.

    Mode 'nearest', because in its default mode rounding takes the last pixel of some sizes for
    outside and drops it.
    """
    return ndimage.zoom(
        np.arange(size, dtype=np.float64), target / size, order=0, mode="nearest"
    ).astype(np.intp)


def resize_nearest(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(..., H, W) -> (..., *size), the same pixels as `scipy.ndimage.zoom(order=0,
    mode="nearest")`.
    """
    return array[
        ..., _nearest(array.shape[-2], size[0])[:, None], _nearest(array.shape[-1], size[1])
    ]


def resize_rgb(sample: dict, size: Sequence[int]) -> dict:
    """Image bilinear, label nearest (Pillow, so reduction averages). Nothing happens if the size is
    right already.
    """
    if sample["image"].shape[1:] == tuple(size):
        return sample
    label = Image.fromarray(np.ascontiguousarray(sample["label"][0]))
    label = np.asarray(label.resize((size[1], size[0]), Image.Resampling.NEAREST))[None]
    return sample | {"image": resize_image(sample["image"], size), "label": label}


def resize_image(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """8-bit image (1 or 3, H, W) -> (1 or 3, *size), bilinear; nothing happens if the size is right
    already.
    """
    if image.shape[1:] == tuple(size):
        return image
    return from_pil(to_pil(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def pad_for_crop(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """If any axis is not larger than the patch, zero-pad every axis by max((patch - size) // 2 + 3,
    0) on both sides.

    UA-MT's rule: afterwards every axis is larger than the patch, so that released code can draw a
    start.
    """
    have = array.shape[1:]
    if all(n > want for n, want in zip(have, size)):
        return array
    margins = [max((want - n) // 2 + 3, 0) for n, want in zip(have, size)]
    return np.pad(array, [(0, 0), *((m, m) for m in margins)])


def crop_padded(
    sample: dict, rng: np.random.Generator, size: Sequence[int], last_start: bool = True
) -> dict:
    """Random crop of `size` after `pad_for_crop`, starts uniform per axis.

    last_start: the last admissible start can be drawn; False is the released rule, which never
    draws it.
    """
    padded = {key: pad_for_crop(sample[key], size) for key in ("image", "label")}
    have = padded["label"].shape[1:]
    starts = [int(rng.integers(n - want + int(last_start))) for n, want in zip(have, size)]
    window = (slice(None), *(slice(start, start + want) for start, want in zip(starts, size)))
    return sample | {key: array[window] for key, array in padded.items()}


# 8-bit intensities, 2D


def quantise(image: np.ndarray) -> np.ndarray:
    """[0, 1] -> the value that `uint8(255 * x)`, which truncates, keeps of it; float32 multiples of
    1/255.
    """
    return (255 * image).astype(np.uint8).astype(np.float32) / np.float32(255)


def to_pil(image: np.ndarray) -> Image.Image:
    """(1 or 3, H, W) float32 multiples of 1/255 -> Pillow image of mode L or RGB."""
    pixels = np.rint(image * np.float32(255)).astype(np.uint8)
    return Image.fromarray(
        np.ascontiguousarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    )


def from_pil(image: Image.Image) -> np.ndarray:
    """Pillow image -> (1 or 3, H, W) float32 in [0, 1]."""
    pixels = np.asarray(image)
    pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    return pixels.astype(np.float32) / np.float32(255)


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Turn the hue by `shift` of the colour circle; 8-bit steps that wrap around. Grey images have
    no hue.
    """
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(shift * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def color_jitter(
    image: Image.Image,
    rng: np.random.Generator,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> Image.Image:
    """torchvision's ColorJitter: four adjustments in random order, factors U(1 - x, 1 + x), hue
    shift U(-hue, hue).

    On a grey image saturation and hue change nothing.
    """
    order = rng.permutation(4)
    factors = [rng.uniform(1 - x, 1 + x) for x in (brightness, contrast, saturation)]
    shift = rng.uniform(-hue, hue)
    for step in order:
        if step == 3:
            image = shift_hue(image, shift)
        else:
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
            image = enhancer(image).enhance(factors[step])
    return image


def blur(
    image: Image.Image, rng: np.random.Generator, low: float = 0.1, high: float = 2.0
) -> Image.Image:
    """Pillow's Gaussian blur with a standard deviation of U(low, high) pixels."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(low, high)))


def strong_grey(sample: dict, rng: np.random.Generator) -> dict:
    """ACDC: with probability 0.8 jitter(0.5, 0.5, 0.5, 0.25), then with 0.5 blur; the image must be
    8-bit.
    """
    image = to_pil(sample["image"])
    if rng.random() < 0.8:
        image = color_jitter(image, rng, 0.5, 0.5, 0.5, 0.25)
    if rng.random() < 0.5:
        image = blur(image, rng)
    return sample | {"image": from_pil(image)}


def strong_rgb(sample: dict, rng: np.random.Generator) -> dict:
    """ISIC, Kvasir: with 0.8 jitter(0.4, 0.4, 0.4, 0.1), with 0.2 grayscale, with 0.5 blur; the
    image must be 8-bit.
    """
    image = to_pil(sample["image"])
    if rng.random() < 0.8:
        image = color_jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = blur(image, rng)
    return sample | {"image": from_pil(image)}


# Intensities, 3D


def bias_field(shape: Sequence[int], coefficients: np.ndarray) -> np.ndarray:
    """exp of a polynomial of total degree 3 in the voxel offsets from the centre, each axis scaled
    to -1..1; float32.

    coefficients (20,): of x^i y^j z^k for all i + j + k <= 3, k running fastest.
    """
    size = BIAS_ORDER + 1
    cube = np.zeros((size,) * 3)
    orders = [(i, j, k) for i in range(size) for j in range(size - i) for k in range(size - i - j)]
    cube[tuple(np.transpose(orders))] = coefficients
    powers = []
    for n in shape:
        offset = np.arange(n) - (n - 1) / 2
        powers.append((offset / max(offset[-1], 1e-9))[:, None] ** np.arange(size))
    # One axis at a time: the full sum over 20 monomials per voxel costs ten times as much.
    field = np.einsum("ijk,zk->ijz", cube, powers[2])
    field = np.einsum("ijz,yj->iyz", field, powers[1]).astype(np.float32)
    return np.exp(np.einsum("iyz,xi->xyz", field, powers[0].astype(np.float32)))


def random_bias_field(
    image: np.ndarray, rng: np.random.Generator, limit: float = 0.5
) -> np.ndarray:
    """Multiply (C, H, W, D) by a bias field with coefficients U(-limit, limit)."""
    return image * bias_field(image.shape[1:], rng.uniform(-limit, limit, 20))


def random_gamma(image: np.ndarray, rng: np.random.Generator, limit: float = 0.5) -> np.ndarray:
    """sign(v) |v|^gamma with log gamma from U(-limit, limit)."""
    return np.copysign(np.abs(image) ** np.float32(np.exp(rng.uniform(-limit, limit))), image)


def random_blur_volume(
    image: np.ndarray, rng: np.random.Generator, low: float = 0.1, high: float = 2.0
) -> np.ndarray:
    """Gaussian filter of (C, H, W, D) with a standard deviation of U(low, high) voxels for each
    axis on its own.
    """
    return ndimage.gaussian_filter(image, (0.0, *rng.uniform(low, high, 3)))


def strong_volume(sample: dict, rng: np.random.Generator) -> dict:
    """LA: with probability 0.8 bias field and gamma, then with 0.5 blur."""
    image = sample["image"]
    if rng.random() < 0.8:
        image = random_gamma(random_bias_field(image, rng), rng)
    if rng.random() < 0.5:
        image = random_blur_volume(image, rng)
    return sample | {"image": np.asarray(image, np.float32)}
