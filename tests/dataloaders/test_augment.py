"""Crops and augmentations: exact where they are deterministic, counted where they are random."""

import numpy as np
import pytest

from dataloaders import augment

SHAPE = (7, 6, 5)


def make_sample(shape=SHAPE, channels=1):
    """Image and label with the voxel's own flat index (+ 1): what comes out shows where it came
    from.
    """
    index = np.arange(1, np.prod(shape) + 1).reshape(1, *shape)
    image = np.concatenate([index * 10.0**c for c in range(channels)]).astype(np.float32)
    return {"image": image, "label": index.astype(np.int32)}


def check_aligned(patch):
    np.testing.assert_array_equal(patch["image"][0], patch["label"][0])


@pytest.mark.parametrize("size", [(7, 6, 5), (3, 3, 3), (10, 6, 2), (8, 9, 12)])
def test_pad_to_is_even_and_only_where_needed(size):
    array = make_sample()["image"]
    padded = augment.pad_to(array, size)
    assert padded.shape == (1, *(max(a, b) for a, b in zip(SHAPE, size)))
    place = tuple(
        slice(max(want - have, 0) // 2, max(want - have, 0) // 2 + have)
        for have, want in zip(SHAPE, size)
    )
    np.testing.assert_array_equal(padded[(slice(None), *place)], array)
    assert padded.sum() == array.sum()


@pytest.mark.parametrize("size", [(4, 3, 2), (7, 6, 5), (9, 3, 5), (1, 1, 1)])
def test_crop_around_holds_the_centre_or_is_moved_inwards(size):
    array = make_sample()["image"]
    for centre in np.ndindex(SHAPE):
        crop = augment.crop_around(array, centre, size)
        assert crop.shape == (1, *size)
        starts = [
            min(max(c - n // 2, 0), max(have - n, 0)) for c, n, have in zip(centre, size, SHAPE)
        ]
        inner = array[(0, *(slice(s, s + n) for s, n in zip(starts, size)))]
        np.testing.assert_array_equal(crop[crop != 0], inner.ravel())
        assert array[(0, *centre)] in crop


def test_pos_neg_centres():
    sample = make_sample((9, 9, 9))
    sample |= {"foreground": np.array([0, 400, 728]), "background": np.arange(100, 140)}
    rng, centres = np.random.default_rng(0), []
    for _ in range(4000):
        patch = augment.crop_pos_neg(sample, rng, (1, 1, 1))
        check_aligned(patch)
        centres.append(int(patch["label"].item()) - 1)
    positive = [c for c in centres if c in (0, 400, 728)]
    assert set(positive) == {0, 400, 728} and set(centres) - set(positive) == set(range(100, 140))
    assert len(positive) / 4000 == pytest.approx(0.5, abs=0.04)
    for index in (0, 400, 728):
        assert positive.count(index) / len(positive) == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize("ratio, expected", [(0.0, {5}), (1.0, {3})])
def test_pos_ratio(ratio, expected):
    sample = make_sample() | {"foreground": np.array([3]), "background": np.array([5])}
    rng = np.random.default_rng(0)
    found = {
        int(augment.crop_pos_neg(sample, rng, (1, 1, 1), ratio)["label"].item()) - 1
        for _ in range(50)
    }
    assert found == expected


@pytest.mark.parametrize(
    "foreground, background, expected", [([3], [], {3}), ([], [5], {5}), ([], [], set(range(8)))]
)
def test_a_missing_kind_of_centre_is_replaced(foreground, background, expected):
    sample = make_sample((2, 2, 2)) | {
        "foreground": np.array(foreground, int),
        "background": np.array(background, int),
    }
    rng = np.random.default_rng(0)
    found = {
        int(augment.crop_pos_neg(sample, rng, (1, 1, 1))["label"].item()) - 1 for _ in range(200)
    }
    assert found == expected


@pytest.mark.parametrize("crop", [augment.crop_pos_neg, augment.crop_uniform])
@pytest.mark.parametrize("size", [(4, 4, 4), (8, 8, 8), (7, 3, 9)])
def test_patches_have_the_size_asked_for(crop, size):
    sample = make_sample(channels=2) | {
        "foreground": np.arange(20),
        "background": np.arange(20, 200),
    }
    for seed in range(20):
        patch = crop(sample, np.random.default_rng(seed), size)
        assert set(patch) == {"image", "label"}
        assert patch["image"].shape == (2, *size) and patch["label"].shape == (1, *size)
        check_aligned(patch)


@pytest.mark.parametrize("size", [(4, 3, 2), (3, 4, 5), (1, 6, 1)])
def test_uniform_crop_covers_every_position_equally(size):
    rng, sample = np.random.default_rng(0), make_sample()
    first = [int(augment.crop_uniform(sample, rng, size)["label"].flat[0]) - 1 for _ in range(6000)]
    positions = [have - want + 1 for have, want in zip(SHAPE, size)]
    expected = {np.ravel_multi_index(corner, SHAPE) for corner in np.ndindex(*positions)}
    assert set(first) == expected
    share = 6000 / len(expected)
    counts = np.array([first.count(corner) for corner in expected])
    assert (abs(counts - share) < 6 * np.sqrt(share)).all()


def flips_of(original, changed):
    """Which axes were mirrored."""
    for code in range(8):
        axes = tuple(axis for axis in (1, 2, 3) if code >> (axis - 1) & 1)
        if np.array_equal(np.flip(original, axes), changed):
            return axes
    raise AssertionError("not a flip")


def test_flips_are_independent_per_axis_and_equal_in_image_and_label():
    sample, rng = make_sample((3, 4, 5)), np.random.default_rng(0)
    counts = np.zeros(4)
    for _ in range(3000):
        patch = augment.random_flip(sample, rng, 0.2)
        check_aligned(patch)
        axes = flips_of(sample["image"], patch["image"])
        counts[list(axes)] += 1
        counts[0] += len(axes) == 3
    assert counts[1:] / 3000 == pytest.approx([0.2] * 3, abs=0.03)
    assert counts[0] / 3000 == pytest.approx(0.2**3, abs=0.008)


def test_rot90_turns_the_first_two_axes_of_image_and_label_alike():
    sample, rng = make_sample((4, 4, 3)), np.random.default_rng(0)
    turned = {k: np.rot90(sample["image"], k, (1, 2)) for k in range(4)}
    counts = dict.fromkeys(range(4), 0)
    for _ in range(3000):
        patch = augment.random_rot90(sample, rng, 0.6)
        check_aligned(patch)
        (turns,) = [k for k, image in turned.items() if np.array_equal(image, patch["image"])]
        counts[turns] += 1
    assert np.array(list(counts.values())) / 3000 == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)


@pytest.mark.parametrize("function", [augment.random_scale, augment.random_shift])
def test_intensity_changes_leave_the_label_and_the_input_alone(function):
    sample, rng, changes = make_sample(), np.random.default_rng(0), []
    original = sample["image"].copy()
    for _ in range(2000):
        patch = function(sample, rng, 0.3)
        assert patch["image"].dtype == np.float32 and patch["label"] is sample["label"]
        ratio, difference = patch["image"] / original - 1, patch["image"] - original
        change = ratio if function is augment.random_scale else difference
        assert np.ptp(change) < 2e-5  # one number for the whole patch
        changes.append(change.flat[0])
    np.testing.assert_array_equal(sample["image"], original)
    changes = np.array(changes)
    changed = changes[changes != 0]
    assert len(changed) / 2000 == pytest.approx(0.3, abs=0.04)
    assert (
        -0.1001 < changed.min() < -0.09
        and 0.09 < changed.max() < 0.1001
        and abs(changed.mean()) < 0.01
    )


@pytest.mark.parametrize("name", ["random_flip", "random_rot90", "random_scale", "random_shift"])
def test_probability_zero_and_one(name):
    sample, function = make_sample((3, 3, 3)), getattr(augment, name)
    for seed in range(30):
        assert function(sample, np.random.default_rng(seed), 0.0) is sample
        assert not np.array_equal(
            function(sample, np.random.default_rng(seed), 1.0)["image"], sample["image"]
        )


def test_zscore_nonzero():
    rng = np.random.default_rng(0)
    image = rng.normal(5, 3, (3, 6, 5, 4)).astype(np.float32)
    image[0, :2] = 0
    image[1] = 0
    image[2] = 0
    image[2, 0] = 7
    before = image.copy()
    result = augment.zscore_nonzero(image)
    np.testing.assert_array_equal(image, before)
    assert result.dtype == np.float32
    inside = image[0] != 0
    values = image[0][inside].astype(float)
    np.testing.assert_allclose(
        result[0][inside], (values - values.mean()) / values.std(), atol=1e-5
    )
    assert (result[0][~inside] == 0).all()
    assert (result[1:] == 0).all()  # an empty channel, and a constant one that is centred
