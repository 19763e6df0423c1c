"""nnU-Net's preprocessing against slow references; tests/test_nnunet.py compares with nnU-Net
itself.
"""

import nibabel as nib
import numpy as np
import pytest
from scipy.interpolate import make_interp_spline

from dataloaders import build_dataset, describe_dataset
from dataloaders import nnunet_preprocessing as prep
from dataloaders.faults import DataError
from tests.nnunet_folders import CT, write_raw

FAR = 20  # samples beyond an edge, after which a cubic spline has forgotten it


def along(values, axis, count, how):
    """`values` at `count` places along an axis, each line by itself. how: line, places -> line."""
    place = values.shape[axis] / count * (np.arange(count) + 0.5) - 0.5
    return np.apply_along_axis(how, axis, values, place)


def cubic(line, place):
    spline = make_interp_spline(
        np.arange(-FAR, len(line) + FAR), np.pad(line, FAR, mode="edge"), k=3
    )
    return spline(place)


def linear(line, place):
    return np.interp(place, np.arange(len(line)), line)


def resized(values, shape, how, axes=(0, 1, 2)):
    for axis in axes:
        values = along(values, axis, shape[axis], how)
    return values


@pytest.mark.parametrize("shape", [(9, 14, 8), (7, 11, 12), (16, 11, 7)])
def test_images_are_resampled_by_cubic_splines(shape):
    image = np.random.default_rng(0).normal(size=(7, 11, 12)) + 5
    expected = np.clip(resized(image, shape, cubic), image.min(), image.max())
    assert np.allclose(prep.resample_image(image, shape), expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_a_coarse_axis_are_resampled_one_by_one(axis):
    image = np.random.default_rng(1).normal(size=(6, 6, 6))
    shape = [9, 9, 9]
    shape[axis] = 4
    plane = [k for k in range(3) if k != axis]
    expected = []
    for number in (0, 2, 3, 5):  # the slices nearest to the centres of four thick ones
        row = np.take(image, [number], axis)
        expected.append(np.clip(resized(row, shape, cubic, plane), row.min(), row.max()))
    found = prep.resample_image(image, shape, axis)
    assert np.allclose(found, np.concatenate(expected, axis), atol=1e-5)


def test_labels_go_to_the_id_with_the_largest_share():
    rng = np.random.default_rng(2)
    label = rng.integers(0, 3, (5, 6, 7)).astype(np.uint8)
    shape = (8, 9, 11)
    shares = np.stack([resized((label == k).astype(float), shape, linear) for k in range(3)])
    ordered = np.sort(shares, axis=0)
    clear = ordered[2] - ordered[1] > 1e-4
    found = prep.resample_label(label, shape)
    assert clear.mean() > 0.8
    assert np.array_equal(found[clear], shares.argmax(0)[clear])
    assert found.dtype == np.uint8
    # two ids with half of a voxel each: that of the nearest voxel, whichever number is higher
    line = np.array([2, 2, 2, 1, 1, 1], np.uint8).reshape(6, 1, 1)
    assert prep.resample_label(line, (3, 1, 1)).ravel().tolist() in ([2, 1, 1], [2, 2, 1])


@pytest.mark.parametrize(
    "spacing, target, axis",
    [
        ((1, 1, 1), (1, 1, 1), None),
        ((1, 1, 3), (1, 1, 3), None),  # three times is not more than three times
        ((1, 1, 3.1), (1, 1, 1), 2),
        ((1, 1, 1), (5, 1, 1), 0),
        ((0.2, 1, 1), (1, 1, 1), None),  # two coarse axes
    ],
)
def test_the_coarse_axis_of_the_scan_then_of_the_target(spacing, target, axis):
    assert prep.coarse_axis(spacing, target) == axis


def test_each_scheme_normalises_as_it_says():
    rng = np.random.default_rng(3)
    image = rng.uniform(0, 250, (4, 5, 6)).astype(np.float32)
    mask = rng.random((4, 5, 6)) > 0.5
    flat = image.astype(np.float64)
    inside = flat[mask]
    expected = {
        "CTNormalization": (np.clip(flat, -60, 160) - 40) / 25,
        "ZScoreNormalization": (flat - flat.mean()) / flat.std(),
        "NoNormalization": flat,
        "RescaleTo01Normalization": (flat - flat.min()) / (flat.max() - flat.min()),
        "RGBTo01Normalization": flat / 255,
    }
    assert expected.keys() == prep.SCHEMES.keys()
    for scheme, values in expected.items():
        how = {"scheme": scheme} | (CT if scheme == "CTNormalization" else {})
        assert np.allclose(prep.normalized(image, how, mask), values, atol=1e-4), scheme
    masked = prep.normalized(image, {"scheme": "ZScoreNormalization", "mask": True}, mask)
    assert np.allclose(masked[mask], (inside - inside.mean()) / inside.std(), atol=1e-4)
    assert np.array_equal(masked[~mask], image[~mask])
    with pytest.raises(DataError, match="0 to 255"):
        prep.normalized(image + 100, {"scheme": "RGBTo01Normalization"}, mask)


def test_the_box_of_nonzero_voxels_keeps_its_holes():
    image = np.zeros((2, 8, 8, 8))
    image[0, 2:5, 2:5, 2:5] = 1
    image[0, 3, 3, 3] = 0
    image[1, 6, 4, 4] = -1
    mask = prep.nonzero_mask(image)
    assert mask.sum() == 28
    assert prep.box(mask) == (slice(2, 7), slice(2, 5), slice(2, 5))
    assert prep.box(np.zeros((2, 2), bool)) == (slice(0, 0), slice(0, 0))


@pytest.mark.parametrize(
    "channels, expected",
    [
        ([], "0 entries, expected one for each of 1"),
        ([{"scheme": "Own"}], "one of CTNormalization"),
        (["CTNormalization"], "expected a mapping"),
        ([{"scheme": "CTNormalization", "mean": 1.0}], "needs the numbers"),
        ([{"scheme": "CTNormalization", **CT, "std": float("nan")}], "needs the numbers"),
        ([{"scheme": "CTNormalization", **CT, "percentile_00_5": 200.0}], "must be below"),
        ([{"scheme": "NoNormalization", "mean": 1.0}], "has no use for mean"),
        ([{"scheme": "ZScoreNormalization", "mask": 1}], "true or false"),
    ],
)
def test_what_a_channel_must_say(channels, expected):
    with pytest.raises(DataError, match=expected):
        prep.check_channels(channels, 1)


def test_a_prediction_goes_back_to_the_grid_of_the_scan(tmp_path):
    """The label, prepared and put back, is the label, but for voxels at its surface."""
    raw = write_raw(tmp_path / "raw", channels=("T1", "T2"), count=1, spacing=(1.0, 1.2, 2.0))
    told = describe_dataset("nnunet", str(raw), "dataset.json", {})
    how = {"scheme": "ZScoreNormalization", "mask": True}
    channels = {"intensity": "nnunet", "intensity_channels": (how, how)}
    arguments = {"root": str(raw), "datalist": "dataset.json", "orientation": "RAS"} | told
    arguments |= {
        "spacing": (0.9, 0.9, 1.5),
        "intensity": "nnunet",
        "cache_dir": str(tmp_path / "c"),
    }
    dataset = build_dataset("nnunet", **arguments | channels)
    (case,) = dataset.cases()
    sample = dataset.read(case)
    assert np.allclose(sample["spacing"], (0.9, 0.9, 1.5), rtol=0.1)
    stored = np.asarray(nib.load(case.label).dataobj)
    box = prep.box(prep.nonzero_mask(np.stack([nib.load(p).get_fdata() for p in case.images])))
    assert all(side.start > 0 for side in box)  # something is cut away
    back = dataset.native(np.array(sample["label"][0]), sample)
    kept = np.zeros_like(stored)
    kept[box] = stored[box]
    assert back.shape == stored.shape
    assert (back == kept).mean() > 0.97
    # what is empty is refused, with its file
    nib.save(nib.Nifti1Image(np.zeros(stored.shape, np.float32), np.eye(4)), case.images[0])
    nib.save(nib.Nifti1Image(np.zeros(stored.shape, np.float32), np.eye(4)), case.images[1])
    with pytest.raises(DataError, match=r"case_0_0000\.nii\.gz"):
        dataset.preprocess(case)
    with pytest.raises(DataError, match="does not use it"):
        build_dataset("nnunet", **arguments | channels | {"intensity": "zscore"})
