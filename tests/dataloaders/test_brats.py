"""BraTS data: regions, the crop box against MONAI, what training and evaluation see, and the split
rule.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import CropForeground, NormalizeIntensity

from dataloaders import DataError, Report, build_dataset
from dataloaders.brats import CHANNELS, REGIONS, BraTSDataset, crop_padded, enlarge
from dataloaders.lists import read_split
from tools.make_splits import drawn, every_fifth

SHAPE = (20, 24, 18)
# Patches without augmentation
PLAIN = {
    "patch_size": (16, 16, 16),
    **{f"{name}_prob": 0.0 for name in ("flip", "rot90", "scale", "shift")},
}


def write_case(root, name, rng, ids=(0, 1, 2, 3), channels=CHANNELS, shape=SHAPE):
    """One case with a brain in the middle and four blocks of label ids; -> its entry of the
    JSON.
    """
    folder = root / name
    folder.mkdir(parents=True)
    brain = np.zeros(shape, bool)
    brain[4:15, 5:21, 3:14] = True
    label = np.zeros(shape, np.uint8)
    label[6:12, 8:16, 5:11] = rng.choice(ids, size=(6, 8, 6))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    for channel in channels:
        image = np.where(brain, rng.integers(1, 900, shape), 0).astype(np.int16)
        nib.save(nib.Nifti1Image(image, affine), folder / f"{name}-{channel}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), folder / f"{name}-seg.nii.gz")
    return {
        "image": [f"{name}/{name}-{channel}.nii.gz" for channel in channels],
        "label": f"{name}/{name}-seg.nii.gz",
    }


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    entries = [write_case(tmp_path, f"case{k}", rng) for k in range(3)]
    content = {"training": entries[:2], "validation": entries[2:]}
    (tmp_path / "dataset_0.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def make(root, **arguments) -> BraTSDataset:
    return build_dataset(
        "brats",
        root=str(root),
        datalist="dataset_0.json",
        class_names=REGIONS,
        in_channels=4,
        cache_dir=str(root / "cache"),
        **arguments,
    )


def stored(root, name):
    images = [
        nib.load(root / name / f"{name}-{channel}.nii.gz").get_fdata(dtype=np.float32)
        for channel in CHANNELS
    ]
    return np.stack(images), np.asarray(nib.load(root / name / f"{name}-seg.nii.gz").dataobj)


def test_regions_and_back():
    dataset = BraTSDataset("somewhere", "dataset_0.json")
    ids = np.array([0, 1, 2, 3, 4], np.uint8).reshape(1, 5, 1, 1)
    regions = dataset.encode_label(ids)
    assert regions.dtype == np.uint8
    assert regions[:, :, 0, 0].tolist() == [[0, 1, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert dataset.decode_prediction(regions)[:, 0, 0].tolist() == [0, 1, 2, 3, 3]
    # Predictions need not be nested: enhancing tumour is painted last, whole tumour first.
    free = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1]], np.uint8).reshape(3, 3, 1, 1)
    assert dataset.decode_prediction(free)[:, 0, 0].tolist() == [1, 3, 3]
    assert dataset.multilabel
    assert dataset.num_classes == 3


def test_evaluation_sees_the_whole_volume(root):
    dataset = make(root)
    splits = dataset.splits()
    dataset.prepare(splits)
    case = splits["val"][0]
    sample = dataset.read(case)
    image, label = stored(root, "case2")
    expected = NormalizeIntensity(nonzero=True, channel_wise=True)(torch.from_numpy(image)).numpy()
    assert sample["image"].dtype == np.float32
    np.testing.assert_allclose(sample["image"], expected, atol=1e-4)
    np.testing.assert_array_equal(sample["label"], dataset.encode_label(label[None]))
    assert sample["spacing"] == [1.0, 1.0, 1.0]
    native, affine = dataset.native_label(case)
    np.testing.assert_array_equal(native, sample["label"])
    np.testing.assert_array_equal(affine, sample["affine"])


def test_box_is_monai_foreground_crop(root):
    dataset = make(root)
    case = dataset.splits()["labelled"][0]
    low, high = enlarge(*dataset.sample(case)["box"], (8, 8, 8))
    image, _ = stored(root, "case0")
    crop = CropForeground(k_divisible=8, allow_smaller=True, select_fn=lambda x: x > 0)
    expected = crop(torch.from_numpy(image)).numpy()
    np.testing.assert_array_equal(crop_padded(image, low, np.subtract(high, low)), expected)
    # A brain of 140 x 170 x 145 voxels in 240 x 240 x 155: 192 along each axis, beyond the volume
    # along the last.
    low, high = enlarge((50, 35, 5), (190, 205, 150), (96, 96, 96))
    assert np.subtract(high, low).tolist() == [192, 192, 192]
    assert low == [24, 24, -18]


@pytest.mark.parametrize("normalize", ["crop", "volume"])
def test_patches(root, normalize):
    dataset = make(root, normalize=normalize, **PLAIN)
    case = dataset.splits()["labelled"][0]
    augment = dataset.patch
    sample = dataset.sample(case)
    assert sample["image"].dtype == np.int16
    full = dataset.read(case)["image"]
    for draw in range(5):
        patch = augment(sample, np.random.default_rng(draw))
        assert patch["image"].shape == (4, 16, 16, 16)
        assert patch["image"].dtype == np.float32
        assert patch["label"].shape == (3, 16, 16, 16)
        again = augment(sample, np.random.default_rng(draw))
        np.testing.assert_array_equal(patch["image"], again["image"])
        if normalize == "crop":
            for channel in patch["image"]:
                inside = channel[channel != 0]
                assert abs(inside.mean()) < 1e-4
                assert abs(inside.std() - 1) < 1e-3
        else:  # the same values as in the evaluated volume
            assert np.isin(patch["image"], np.append(full, 0)).all()


def test_patches_are_not_cut_from_the_evaluation_sample(root):
    dataset = make(root)
    case = dataset.splits()["labelled"][0]
    with pytest.raises(ValueError, match=r"cut from sample\(case\)"):
        dataset.patch(dataset.read(case), np.random.default_rng(0))


def test_patches_cover_the_box_evenly(root):
    dataset = make(root, patch_size=(8, 8, 8))
    sample = dataset.sample(dataset.splits()["labelled"][0])
    seen = set()

    class Recorder:
        def integers(self, low, high):
            seen.add((low, high))
            return low

    dataset.cut(sample, Recorder())
    # Brain 4..14, 5..20, 3..13: boxes of 16 voxels from 2, 5 and 1; nine positions each.
    assert seen == {(2, 11), (5, 14), (1, 10)}


def test_augmentations_apply_to_image_and_regions(root):
    changes = {"flip_prob": 1.0, "rot90_prob": 0, "scale_prob": 1, "shift_prob": 1}
    plain, flipped = make(root, **PLAIN), make(root, **PLAIN | changes)
    sample = plain.sample(plain.splits()["labelled"][0])
    first, second = (d.patch(sample, np.random.default_rng(3)) for d in (plain, flipped))
    np.testing.assert_array_equal(first["label"][:, ::-1, ::-1, ::-1], second["label"])
    a, b = first["image"][:, ::-1, ::-1, ::-1].ravel(), second["image"].ravel()
    slope, shift = np.polyfit(a, b, 1)
    np.testing.assert_allclose(b, slope * a + shift, atol=1e-4)
    assert 0.9 <= slope <= 1.1
    assert abs(shift) <= 0.1
    assert slope != 1


def test_ids_of_the_2021_release_and_wrong_ones(tmp_path):
    rng = np.random.default_rng(1)
    entries = [
        write_case(tmp_path, "old", rng, ids=(0, 1, 2, 4)),
        write_case(tmp_path, "wrong", rng, ids=(0, 5)),
    ]
    (tmp_path / "dataset_0.json").write_text(
        json.dumps({"training": entries, "validation": []}), encoding="utf-8"
    )
    dataset = make(tmp_path)
    old, wrong = dataset.find(["old", "wrong"])
    assert dataset.read(old)["label"][2].any()
    with pytest.raises(DataError, match=r"label ids \[5\]"):
        dataset.read(wrong)


def test_wrong_channel_order_is_refused(tmp_path):
    rng = np.random.default_rng(1)
    wrong = write_case(tmp_path, "a", rng, channels=("t1n", "t1c", "t2f", "t2w"))
    old = write_case(tmp_path, "b", rng, channels=("t1ce", "t1", "flair", "t2"))
    (tmp_path / "dataset_0.json").write_text(
        json.dumps({"training": [wrong, old]}), encoding="utf-8"
    )
    dataset = make(tmp_path)
    a, b = dataset.find(["a", "b"])
    with pytest.raises(DataError, match="order must be t1c, t1n, t2f, t2w"):
        dataset.read(a)
    assert dataset.read(b)["image"].shape == (4, *SHAPE)


def test_ids_of_other_releases(tmp_path):
    rng = np.random.default_rng(1)
    old = ("t1ce", "t1", "flair", "t2")
    cases = {
        "cavity": {"ids": (0, 1, 2, 3, 4)},
        "new": {"ids": (0, 1, 2, 3)},
        "old": {"ids": (0, 1, 2, 4), "channels": old},
        "odd": {"ids": (0, 1, 2, 4)},
        "BraTS-PED-1": {"ids": (0, 1, 2, 3)},
    }
    entries = {name: write_case(tmp_path, name, rng, **how) for name, how in cases.items()}

    def findings(*names):
        content = {"training": [entries[name] for name in names], "validation": []}
        (tmp_path / "dataset_0.json").write_text(json.dumps(content), encoding="utf-8")
        dataset, report = make(tmp_path), Report()
        dataset.prepare({"labelled": dataset.find(names)}, report)
        return [(f.level, f.case, f.found) for f in report.findings]

    assert findings("old") == findings("new") == []
    ((level, case, found),) = findings("cavity")
    assert (level, case) == ("error", "cavity") and "both ids 3 and 4" in found
    assert findings("new", "old") == [("error", "old", "id 4, and 1 other cases have id 3")]
    ((level, case, found),) = findings("old", "odd")
    assert (level, case) == ("warning", "odd") and "file names of 2023 and later" in found
    ((level, _, found),) = findings("BraTS-PED-1")
    assert level == "warning" and "paediatric" in found


@pytest.mark.parametrize(
    "told, faults",
    [
        ({}, []),
        ({"modality": {"0": "T1Gd", "1": "T1w", "2": "FLAIR", "3": "T2w"}}, []),
        ({"modality": ["t1ce", "t1", "flair", "t2"]}, []),
        ({"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}, ["channels"]),
        ({"modality": {"0": "a", "1": "b"}}, []),
        (
            {"labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor"}},
            2 * ["label ids"],
        ),
        ({"labels": {"0": "background", "1": "NCR", "2": "ED", "3": "ET"}}, []),
        ({"labels": {"background": 0, "necrotic": 1, "oedema": 2, "enhancing": 4}}, []),
        ({"labels": {"NETC": 1, "SNFH": 2, "ET": 3, "RC": 4}}, ["label ids"]),
        ({"labels": {"ET": 1, "NET": 2, "CC": 3, "ED": 4}}, 4 * ["label ids"]),
    ],
)
def test_what_the_list_says_of_channels_and_ids_is_compared(root, told, faults):
    path = root / "dataset_0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    report = Report()
    make(root).splits(report=report)
    assert [finding.fault for finding in report.findings] == faults


def test_labels_outside_of_the_brain_are_warned_of(tmp_path):
    entry = write_case(tmp_path, "a", np.random.default_rng(1))
    label = nib.load(tmp_path / entry["label"])
    ids = np.array(label.dataobj)
    ids[0, 0, 0] = 2
    nib.save(nib.Nifti1Image(ids, label.affine), tmp_path / entry["label"])
    (tmp_path / "dataset_0.json").write_text(json.dumps({"training": [entry]}))
    dataset = make(tmp_path)
    (warning,) = dataset.preprocess(dataset.find(["a"])[0])["warnings"]
    assert warning[1] == "lost labels" and "of 'oedema'" in warning[2]


def test_arguments_are_checked():
    with pytest.raises(DataError, match="regions tumour core"):
        BraTSDataset("x", "y", class_names=["background", "tumour"])
    with pytest.raises(DataError, match="normalize"):
        BraTSDataset("x", "y", normalize="patch")
    with pytest.raises(DataError, match="crop: uniform"):
        BraTSDataset("x", "y", crop="pos_neg")


def test_every_fifth_gives_the_published_split():
    names = [f"BraTS2021_{k:05d}" for k in range(1251)]
    lists = every_fifth(names[::-1])
    assert len(lists["train"]) == 1001
    assert len(lists["val"]) == 250
    assert lists["val"] == [name for k, name in enumerate(names) if k % 5 == 4]
    assert set(lists["train"]) | set(lists["val"]) == set(names)


def test_drawn_lists_are_those_in_the_repository():
    folder = Path(__file__).resolve().parents[2] / "splits" / "hippocampus"
    lists = {split: read_split(folder, split) for split in ("train", "val", "test")}
    names = sorted(name for chosen in lists.values() for name in chosen)
    assert drawn(names, (128, 30, 50), 0) == lists
