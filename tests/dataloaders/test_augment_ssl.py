"""Weak and strong views: exact geometry, 8-bit intensities and 3D intensities against slow
independent references.
"""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dataloaders import augment as ssl


class Fixed:
    """A generator whose draws are given; `low` and `high` of each integer draw are kept."""

    def __init__(self, *integers):
        self.values, self.asked = list(integers), []

    def integers(self, low, high=None):
        self.asked.append((low, high) if high is not None else (0, low))
        return self.values.pop(0)


def sample(shape=(12, 9), channels=1, seed=0):
    """8-bit image and a label that is a function of it, so that alignment can be checked voxel by
    voxel.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (channels, *shape))
    return {"image": (pixels / 255).astype(np.float32), "label": label_of(pixels[:1] / 255)}


def label_of(image):
    return (np.rint(image * 255).astype(int) // 64).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


# Geometry


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("axis", range(2))
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4)])
def test_rot_flip_turns_then_mirrors(turns, axis, shape):
    before = sample(shape)
    after = ssl.rot_flip(before, Fixed(turns, axis))
    expected = np.flip(np.rot90(before["image"][0], turns), axis)
    assert np.array_equal(after["image"][0], expected)
    assert np.array_equal(after["label"], label_of(after["image"]))


def test_rot_flip_draws_every_case_equally_often():
    asked = Fixed(0, 0)
    ssl.rot_flip(sample(), asked)
    assert asked.asked == [(0, 4), (0, 2)]
    generator, seen = rng(), {}
    for _ in range(800):
        key = ssl.rot_flip(sample((3, 3)), generator)["image"].tobytes()
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 4  # each of the four mirrored squares can be reached in two ways
    assert min(seen.values()) > 150


def test_rotate_small_is_scipys_and_reaches_both_ends():
    before = sample((20, 16))
    asked = Fixed(13)
    after = ssl.rotate_small(before, asked)
    assert asked.asked == [(-20, 20)]
    assert np.array_equal(
        after["image"][0], ndimage.rotate(before["image"][0], 13, order=0, reshape=False)
    )
    inside = (
        ssl.rotate_small({k: np.ones_like(v) for k, v in before.items()}, Fixed(13))["label"] > 0
    )
    assert np.array_equal(after["label"][inside], label_of(after["image"])[inside])
    assert (after["label"][~inside] == 0).all()


def test_rotate_small_rgb_keeps_image_and_label_together():
    before = sample((24, 18), channels=3)
    asked = Fixed(-20)
    after = ssl.rotate_small_rgb(before, asked)
    assert asked.asked == [(-20, 21)]
    ones = {"image": np.ones_like(before["image"]), "label": np.ones_like(before["label"])}
    inside = ssl.rotate_small_rgb(ones, Fixed(-20))["label"] > 0
    assert 0.5 < inside.mean() < 1
    assert np.array_equal(after["label"][inside], label_of(after["image"][:1])[inside])


def nearest_loop(array, size):
    """Nearest neighbour with the corner pixels kept, pixel by pixel."""
    result = np.zeros(size, array.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            row, column = (k * (n - 1) / (m - 1) for k, n, m in zip((i, j), array.shape, size))
            result[i, j] = array[int(row + 0.5), int(column + 0.5)]
    return result


@pytest.mark.parametrize(
    "shape,size", [((9, 14), (16, 16)), ((33, 20), (16, 16)), ((16, 16), (16, 16))]
)
def test_resize_nearest_against_a_loop_and_scipy(shape, size):
    array = np.random.default_rng(1).random((2, *shape))
    result = ssl.resize_nearest(array, size)
    for plane, resized in zip(array, result):
        zoomed = ndimage.zoom(
            plane, (size[0] / shape[0], size[1] / shape[1]), order=0, mode="nearest"
        )
        assert np.array_equal(resized, zoomed)
        assert np.array_equal(resized, nearest_loop(plane, size))


@pytest.mark.parametrize("size", [105, 154, 224, 256, 300, 512])
def test_resize_nearest_keeps_the_last_pixel_there_and_back(size):
    array = np.arange(size * 2.0).reshape(2, size)
    back = ssl.resize_nearest(ssl.resize_nearest(array, (2, 256)), (2, size))
    assert back[0, 0] == array[0, 0]
    assert back[1, -1] == array[1, -1]


def test_resize_rgb_reduces_by_averaging_and_leaves_the_right_size_alone():
    checker = np.indices((8, 8)).sum(0) % 2
    before = {
        "image": np.tile(checker, (3, 1, 1)).astype(np.float32),
        "label": checker[None].astype(np.uint8),
    }
    after = ssl.resize_rgb(before, (2, 2))
    assert after["image"].shape == (3, 2, 2)
    np.testing.assert_allclose(after["image"], 0.5, atol=0.02)
    assert set(np.unique(after["label"])) <= {0, 1}
    assert ssl.resize_rgb(before, (8, 8)) is before


def crop_loop(volume, size, starts):
    """UA-MT's rule, written out: pad everything if one axis is not larger than the patch, then
    cut.
    """
    w, h, d = volume.shape
    if w <= size[0] or h <= size[1] or d <= size[2]:
        pw, ph, pd = (max((p - n) // 2 + 3, 0) for p, n in zip(size, (w, h, d)))
        padded = np.zeros((w + 2 * pw, h + 2 * ph, d + 2 * pd), volume.dtype)
        padded[pw : pw + w, ph : ph + h, pd : pd + d] = volume
        volume = padded
    return volume.shape, volume[tuple(slice(s, s + p) for s, p in zip(starts, size))]


@pytest.mark.parametrize("shape", [(9, 8, 7), (5, 8, 4), (6, 7, 7), (2, 3, 1)])
@pytest.mark.parametrize("last_start", [True, False])
def test_crop_padded_follows_the_rule(shape, last_start):
    size = (6, 6, 4)
    before = sample(shape)
    padded, _ = crop_loop(before["image"][0], size, (0, 0, 0))
    for starts in ((0, 0, 0), tuple(n - p - (not last_start) for n, p in zip(padded, size))):
        asked = Fixed(*starts)
        after = ssl.crop_padded(before, asked, size, last_start)
        assert asked.asked == [(0, n - p + last_start) for n, p in zip(padded, size)]
        assert np.array_equal(after["image"][0], crop_loop(before["image"][0], size, starts)[1])
        assert np.array_equal(after["label"], label_of(after["image"]))
        assert after["image"].shape == (1, *size)


def test_only_the_clean_rule_draws_the_last_start():
    volume = {
        "image": np.arange(8.0, dtype=np.float32).reshape(1, 8, 1, 1)
        * np.ones((1, 8, 4, 4), np.float32)
    }
    volume["label"] = np.zeros((1, 8, 4, 4), np.uint8)
    for last_start, expected in ((True, {0, 1, 2, 3}), (False, {0, 1, 2})):
        generator = rng()
        drawn = {
            int(ssl.crop_padded(volume, generator, (5, 3, 3), last_start)["image"][0, 0, 0, 0])
            for _ in range(200)
        }
        assert drawn == expected


# 8-bit intensities


def test_quantise_truncates():
    image = np.array([0.0, 0.999 / 255, 1 / 255 + 1e-6, 0.5, 1.0])
    assert np.rint(ssl.quantise(image) * 255).tolist() == [0, 0, 1, 127, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_and_back(channels):
    image = sample(channels=channels)["image"]
    assert np.array_equal(ssl.from_pil(ssl.to_pil(image)), image)


def grey_reference(pixels, steps):
    """Brightness and contrast as torchvision defines them, in Python integers; `steps` in order."""
    for kind, factor in steps:
        base = 0 if kind == "brightness" else int(pixels.mean() + 0.5)
        moved = base + np.float32(factor) * (pixels.astype(np.float32) - base)
        pixels = np.clip(np.trunc(moved), 0, 255).astype(int)
    return pixels


@pytest.mark.parametrize("seed", range(12))
def test_jitter_of_a_grey_image_is_brightness_and_contrast_in_the_drawn_order(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (15, 11))
    image = Image.fromarray(pixels.astype(np.uint8))
    result = ssl.color_jitter(image, rng(seed), 0.5, 0.5, 0.5, 0.25)
    generator = rng(seed)
    order = [step for step in generator.permutation(4) if step < 2]
    factors = [generator.uniform(0.5, 1.5) for _ in range(3)]
    expected = grey_reference(
        pixels, [(("brightness", "contrast")[step], factors[step]) for step in order]
    )
    # Pillow blends in single precision: a value on the edge of a whole number may fall to either
    # side.
    assert np.abs(np.asarray(result, int) - expected).max() <= 1
    assert (np.asarray(result, int) == expected).mean() > 0.98


def test_jitter_draws_the_whole_range_and_both_orders():
    flat = Image.new("L", (4, 4), 100)  # contrast of a flat image does nothing
    values = [
        np.asarray(ssl.color_jitter(flat, rng(seed), 0.5, 0.5, 0.5, 0.25))[0, 0]
        for seed in range(400)
    ]
    assert min(values) < 54
    assert max(values) > 146
    assert abs(np.mean(values) - 100) < 4
    first = [[step for step in rng(seed).permutation(4) if step < 2][0] for seed in range(400)]
    assert 150 < sum(first) < 250


def test_hue_turns_the_colour_circle_and_spares_grey():
    red = Image.new("RGB", (1, 1), (200, 0, 0))
    assert np.argmax(ssl.shift_hue(red, 1 / 3).getpixel((0, 0))) == 1
    assert np.argmax(ssl.shift_hue(red, -1 / 3).getpixel((0, 0))) == 2
    grey = Image.new("L", (1, 1), 77)
    assert ssl.shift_hue(grey, 0.2) is grey
    assert ssl.shift_hue(Image.new("RGB", (1, 1), (90, 90, 90)), 0.3).getpixel((0, 0)) == (
        90,
        90,
        90,
    )


@pytest.mark.parametrize("strong,channels", [(ssl.strong_grey, 1), (ssl.strong_rgb, 3)])
def test_strong_views_change_the_image_only(strong, channels):
    before = sample((16, 16), channels) | {"name": "x"}
    kept = {key: before[key].copy() for key in ("image", "label")}
    changed = 0
    for seed in range(60):
        after = strong(before, rng(seed))
        assert after["label"] is before["label"]
        assert after["name"] == "x"
        assert after["image"].shape == before["image"].shape
        assert after["image"].dtype == np.float32
        assert 0 <= after["image"].min() and after["image"].max() <= 1
        changed += not np.array_equal(after["image"], before["image"])
        assert np.array_equal(after["image"], strong(before, rng(seed))["image"])
    assert all(np.array_equal(before[key], kept[key]) for key in kept)
    # Left alone with probability 0.2 * 0.5 (grey) or 0.2 * 0.8 * 0.5 (RGB).
    assert 45 < changed < 60


def test_grayscale_happens_in_a_fifth_of_the_rgb_views():
    before = sample((8, 8), 3)
    grey = 0
    for seed in range(500):
        image = ssl.strong_rgb(before, rng(seed))["image"]
        grey += np.array_equal(image[0], image[1]) and np.array_equal(image[1], image[2])
    assert 70 < grey < 130


# 3D intensities


def bias_loop(shape, coefficients):
    """The polynomial monomial by monomial."""
    axes = [(np.arange(n) - (n - 1) / 2) / ((n - 1) / 2) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    total, index = np.zeros(shape), 0
    for i in range(4):
        for j in range(4 - i):
            for k in range(4 - i - j):
                total += coefficients[index] * x**i * y**j * z**k
                index += 1
    assert index == 20
    return np.exp(total)


@pytest.mark.parametrize("shape", [(7, 6, 5), (4, 9, 2)])
def test_bias_field_against_a_loop(shape):
    coefficients = np.random.default_rng(0).uniform(-0.5, 0.5, 20)
    np.testing.assert_allclose(
        ssl.bias_field(shape, coefficients), bias_loop(shape, coefficients), rtol=2e-6
    )
    assert ssl.bias_field((3, 3, 1), coefficients).shape == (3, 3, 1)


def test_bias_coefficients_fill_their_range():
    image = np.ones((1, 3, 3, 3), np.float32)
    # the constant term
    centre = [np.log(ssl.random_bias_field(image, rng(seed))[0, 1, 1, 1]) for seed in range(300)]
    assert min(centre) < -0.47 and max(centre) > 0.47
    assert np.abs(centre).max() <= 0.5


def test_gamma_keeps_signs():
    image = np.array([-2.0, -0.5, 0.0, 0.5, 2.0], np.float32).reshape(1, 5, 1, 1)
    gammas = []
    for seed in range(300):
        result = ssl.random_gamma(image, rng(seed)).ravel()
        gammas.append(np.log2(result[-1]))
        np.testing.assert_allclose(
            result, np.sign(image.ravel()) * np.abs(image.ravel()) ** gammas[-1], rtol=1e-5
        )
    assert np.exp(-0.5) <= min(gammas) < 0.63
    assert 1.58 < max(gammas) <= np.exp(0.5)


def test_blur_draws_one_width_per_axis():
    impulse = np.zeros((1, 41, 41, 41), np.float32)
    impulse[0, 20, 20, 20] = 1
    widths = []
    for seed in range(8):
        result = ssl.random_blur_volume(impulse, rng(seed))[0]
        expected = rng(seed).uniform(0.1, 2.0, 3)
        assert result.sum() == pytest.approx(1, abs=1e-4)
        offset = np.arange(41) - 20
        for axis, sigma in enumerate(expected):
            profile = result.sum(tuple(k for k in range(3) if k != axis))
            kernel = np.exp(-0.5 * (offset / sigma) ** 2)
            np.testing.assert_allclose(profile, kernel / kernel.sum(), atol=2e-4)
        widths.append(expected)
    assert np.ptp(widths, axis=1).min() > 0.05


def test_strong_volume_applies_its_steps_as_often_as_stated():
    before = {"image": np.random.default_rng(0).normal(size=(1, 6, 6, 6)).astype(np.float32)}
    before["label"] = np.zeros((1, 6, 6, 6), np.uint8)
    same = blurred = 0
    for seed in range(400):
        after = ssl.strong_volume(before, rng(seed))["image"]
        assert after.dtype == np.float32
        same += np.array_equal(after, before["image"])
        # the other two keep all signs
        blurred += not np.array_equal(np.sign(after), np.sign(before["image"]))
    assert 20 < same < 60  # 0.2 * 0.5
    assert 140 < blurred < 230  # about half; the narrowest blurs move no sign
