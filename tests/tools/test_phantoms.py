"""Generated scans: anatomy, intensities, determinism; the files that tools/make_demo_data.py
writes.
"""

import json

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd
from scipy import ndimage

from tools.make_demo_data import main, split_cases
from tools.phantoms.scans import (
    BRATS_MODALITIES,
    BTCV_LABELS,
    CT_HU,
    WORD_LABELS,
    brats_phantom,
    btcv_phantom,
    word_phantom,
)

SMALL = {"shape": (72, 56, 40), "spacing": (5.0, 5.0, 5.6)}
# Gas, fluid or fat inside these lowers the median below the HU of their wall; adrenals are about
# one voxel thick.
MIXED = {"stomach", "esophagus", "right_adrenal", "left_adrenal"}


@pytest.fixture(scope="module")
def btcv():
    """Four small BTCV cases."""
    return [btcv_phantom([0, case], **SMALL) for case in range(4)]


@pytest.fixture(scope="module")
def btcv_folder(tmp_path_factory):
    """Six BTCV cases on disk, four of them for training, three of those awkward."""
    out = tmp_path_factory.mktemp("demo") / "btcv"
    main(["--dataset", "btcv", "--out", str(out), "--cases", "6", "--shape", "64", "48", "32"])
    return out


def touching(label, a, b):
    """Number of voxels of organ a with a face neighbour in organ b."""
    return int((ndimage.binary_dilation(label == a) & (label == b)).sum())


def centroid(mask):
    return np.argwhere(mask).mean(0)


def test_same_seed_same_case_and_cases_differ(btcv):
    image, label = btcv_phantom([0, 1], **SMALL)
    assert np.array_equal(image, btcv[1][0])
    assert np.array_equal(label, btcv[1][1])
    assert not np.array_equal(image, btcv[2][0])
    overlap = (label == BTCV_LABELS["liver"]) & (btcv[2][1] == BTCV_LABELS["liver"])
    assert overlap.sum() < 0.95 * (label == BTCV_LABELS["liver"]).sum()
    assert not np.array_equal(image, btcv_phantom([1, 1], **SMALL)[0])


def test_btcv_types_and_ids(btcv):
    for image, label in btcv:
        assert image.shape == label.shape == SMALL["shape"]
        assert image.dtype == np.float32
        assert label.dtype == np.uint8
        counts = np.bincount(label.ravel(), minlength=14)
        assert len(counts) == 14
        assert counts.min() >= 20  # adrenals and esophagus too
        assert -1024 <= image.min() < -950


def test_btcv_intensities_follow_the_table(btcv):
    for name, index in BTCV_LABELS.items():
        for image, label in btcv:
            median = np.median(image[label == index])
            if name in MIXED:
                assert -60 < median < CT_HU[name][0] + 25, name
            else:
                assert abs(median - CT_HU[name][0]) < 35, name


def test_btcv_body_has_air_lung_fat_muscle_and_bone(btcv):
    for image, label in btcv:
        other = image[label == 0]
        for low, high, share in (
            (-1024, -950, 0.1),
            (-900, -700, 0.01),
            (-140, -60, 0.05),
            (30, 90, 0.05),
        ):
            assert np.mean((other > low) & (other < high)) > share, (low, high)
        assert (other > 250).sum() > 200
        assert image[:, 0].max() < -900  # nothing is cut off behind
        assert image[0].max() < -900


def test_intensity_alone_does_not_tell_the_class(btcv):
    image, label = btcv[0]
    spleen = image[label == BTCV_LABELS["spleen"]]
    low, high = np.quantile(spleen, (0.1, 0.9))
    inside = (image > low) & (image < high)
    assert np.mean(label[inside] == BTCV_LABELS["spleen"]) < 0.2
    assert np.mean(label[inside] == 0) > 0.1


def test_organs_lie_where_they_belong(btcv):
    for _, label in btcv:
        at = {name: centroid(label == index) for name, index in BTCV_LABELS.items()}
        right, anterior, superior = 0, 1, 2
        assert at["liver"][right] > at["stomach"][right] > at["spleen"][right]
        for pair in ("kidney", "adrenal"):
            assert at[f"right_{pair}"][right] > at[f"left_{pair}"][right]
        assert at["inferior_vena_cava"][right] > at["aorta"][right]
        assert at["gallbladder"][anterior] > at["right_kidney"][anterior]
        for side in ("right", "left"):
            assert at[f"{side}_adrenal"][superior] > at[f"{side}_kidney"][superior]
        assert at["esophagus"][superior] > at["stomach"][superior] > at["left_kidney"][superior]


def test_neighbours_touch(btcv):
    ids = BTCV_LABELS
    for _, label in btcv:
        for other in ("gallbladder", "right_kidney", "inferior_vena_cava"):
            assert touching(label, ids["liver"], ids[other]) > 0, other
        assert touching(label, ids["pancreas"], ids["portal_splenic_vein"]) > 0
        assert (
            touching(label, ids["stomach"], ids["liver"])
            + touching(label, ids["stomach"], ids["spleen"])
            > 0
        )


def test_missing_organ_changes_only_its_place(btcv):
    image, label = btcv_phantom([0, 0], missing=("gallbladder",), **SMALL)
    reference = btcv[0][1]
    assert not (label == BTCV_LABELS["gallbladder"]).any()
    gone = reference == BTCV_LABELS["gallbladder"]
    assert np.array_equal(label[~gone], reference[~gone])
    assert np.isfinite(image).all()
    with pytest.raises(ValueError, match="unknown organ 'heart'"):
        btcv_phantom(0, missing=("heart",), **SMALL)


@pytest.mark.parametrize("organ", [*BTCV_LABELS])
def test_every_organ_can_be_missing(organ):
    _, label = btcv_phantom(3, shape=(48, 36, 24), spacing=(7.5, 7.5, 9.0), missing=(organ,))
    assert not (label == BTCV_LABELS[organ]).any()
    assert (label > 0).any()


def test_word_ids_sides_and_intensities():
    for case in range(2):
        image, label = word_phantom([0, case], shape=(72, 56, 60), spacing=(5.0, 5.0, 7.2))
        counts = np.bincount(label.ravel(), minlength=17)
        assert len(counts) == 17
        assert counts.min() >= 20
        at = {name: centroid(label == index) for name, index in WORD_LABELS.items()}
        assert at["liver"][0] > at["spleen"][0]
        assert at["right_femoral_head"][0] > at["left_femoral_head"][0]
        assert at["liver"][2] > at["intestine"][2] > at["bladder"][2]
        assert at["bladder"][1] > at["rectum"][1]
        for name in (
            "liver",
            "spleen",
            "left_kidney",
            "right_kidney",
            "bladder",
            "left_femoral_head",
        ):
            assert abs(np.median(image[label == WORD_LABELS[name]]) - CT_HU[name][0]) < 50, name
        assert not (word_phantom(0, (40, 30, 40), (9, 9, 11), missing=("adrenal",))[1] == 12).any()


def test_brats_images_and_nesting():
    for case in range(2):
        images, label = brats_phantom([0, case], (56, 64, 52))
        assert tuple(images) == BRATS_MODALITIES
        assert set(np.unique(label)) == {0, 1, 2, 3}
        brain = images["t1c"] > 0
        for image in images.values():
            assert image.dtype == np.float32
            assert np.array_equal(image > 0, brain)  # skull-stripped and co-registered
        assert 0.2 < brain.mean() < 0.7
        assert not label[~brain].any()
        core = np.isin(label, (1, 3))
        # The enhancing rim closes around the necrotic core, up to the edge of the brain or a
        # ventricle.
        shell = ndimage.binary_dilation(label == 1, iterations=1) & (label != 1)
        assert np.mean(label[shell] == 3) > 0.8
        low, high = np.argwhere(label > 0).min(0), np.argwhere(label > 0).max(0)
        edema = np.argwhere(label == 2)
        # edema is the outer hull
        assert (edema.min(0) == low).sum() + (edema.max(0) == high).sum() >= 5
        assert (label == 2).sum() > 0.5 * core.sum()
        healthy = brain & (label == 0)
        level = {m: [np.median(images[m][label == k]) for k in (1, 2, 3)] for m in BRATS_MODALITIES}
        assert level["t1c"][2] > 1.3 * np.median(images["t1c"][healthy])
        assert level["t1c"][2] > level["t1c"][1]
        assert level["t2f"][1] > 1.3 * np.median(images["t2f"][healthy])
        assert level["t2w"][1] > 1.3 * np.median(images["t2w"][healthy])
        white_matter = np.quantile(images["t1n"][healthy], 0.8)
        assert level["t1n"][0] < level["t1n"][1] < white_matter


def test_brats_without_enhancing_tumour():
    _, label = brats_phantom([0, 0], (56, 64, 52), no_enhancing=True)
    assert set(np.unique(label)) == {0, 1, 2}


def test_split_sizes():
    assert {k: len(v) for k, v in split_cases(16).items()} == {
        "training": 10,
        "validation": 2,
        "test": 4,
    }
    for count in range(1, 40):
        sections = split_cases(count)
        assert [number for part in sections.values() for number in part] == list(
            range(1, count + 1)
        )
        assert count < 3 or all(sections.values())


def test_btcv_layout(btcv_folder):
    data = json.loads((btcv_folder / "dataset_0.json").read_text())
    assert [len(data[s]) for s in ("training", "validation", "test")] == [4, 1, 1]
    assert data["training"][0] == {
        "image": "imagesTr/img0001.nii.gz",
        "label": "labelsTr/label0001.nii.gz",
    }
    assert data["labels"]["6"] == "liver"
    assert data["modality"] == {"0": "CT"}
    spacings, orders, gallbladders, oblique = set(), [], [], []
    for entry in data["training"] + data["validation"] + data["test"]:
        image, label = (nib.load(btcv_folder / entry[key]) for key in ("image", "label"))
        assert image.get_data_dtype() == np.int16
        assert label.get_data_dtype() == np.uint8
        assert image.shape == label.shape
        assert np.array_equal(image.affine, label.affine)
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        spacings.add(tuple(np.round(np.sort(image.header.get_zooms()), 3)))
        orders.append("".join(nib.aff2axcodes(image.affine)))
        oblique.append(nib.affines.obliquity(image.affine).max() > np.radians(2))
        gallbladders.append(bool((np.asarray(label.dataobj) == 4).any()))
    assert len(spacings) == 6
    assert orders == ["RAS", "RAS", "PIR", "RAS", "RAS", "RAS"]
    assert oblique == [False, True, False, False, False, False]
    assert gallbladders == [True, True, True, False, True, True]


def test_awkward_cases_read_back_upright(btcv_folder):
    keys = ("image", "label")
    read = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS"),
            Spacingd(keys, pixdim=(5.0, 5.0, 6.0), mode=("bilinear", "nearest")),
        ]
    )
    data = json.loads((btcv_folder / "dataset_0.json").read_text())
    for entry in data["training"][:3]:
        sample = read({key: str(btcv_folder / entry[key]) for key in keys})
        image, label = (np.asarray(sample[key][0]) for key in keys)
        assert image.shape == label.shape
        at = {name: centroid(label == index) for name, index in BTCV_LABELS.items()}
        assert at["liver"][0] > at["spleen"][0] + 15
        assert at["stomach"][1] > at["left_kidney"][1]
        assert at["esophagus"][2] > at["right_kidney"][2]
        # organs thick enough to be resampled twice without partial volume
        for name in ("liver", "spleen"):
            assert abs(np.median(image[label == BTCV_LABELS[name]]) - CT_HU[name][0]) < 35, name


def test_reruns_are_byte_identical_and_never_overwrite(tmp_path, capsys):
    arguments = ["--dataset", "btcv", "--cases", "2", "--shape", "40", "32", "20"]
    for folder in ("a", "b"):
        main([*arguments, "--out", str(tmp_path / folder)])
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    capsys.readouterr()
    main([*arguments, "--out", str(tmp_path / "a")])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="remove it or choose another --out"):
        main([*arguments, "--seed", "1", "--out", str(tmp_path / "a")])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="not empty"):
        main([*arguments, "--out", str(tmp_path / "own")])
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["mine.txt"]


def test_word_and_brats_layouts(tmp_path):
    main(
        [
            "--dataset",
            "word",
            "--cases",
            "3",
            "--shape",
            "40",
            "32",
            "40",
            "--out",
            str(tmp_path / "word"),
        ]
    )
    data = json.loads((tmp_path / "word" / "dataset.json").read_text())
    assert data["validation"] == [
        {"image": "imagesVal/word_0002.nii.gz", "label": "labelsVal/word_0002.nii.gz"}
    ]
    for section in ("training", "validation", "test"):
        for entry in data[section]:
            assert all((tmp_path / "word" / path).exists() for path in entry.values())
    main(
        [
            "--dataset",
            "brats21",
            "--cases",
            "4",
            "--shape",
            "48",
            "56",
            "44",
            "--out",
            str(tmp_path / "brats"),
        ]
    )
    data = json.loads((tmp_path / "brats" / "dataset_0.json").read_text())
    enhancing = []
    for entry in data["training"]:
        assert [path[-10:-7] for path in entry["image"]] == list(BRATS_MODALITIES)
        label = nib.load(tmp_path / "brats" / entry["label"])
        assert label.shape == (48, 56, 44)
        assert np.allclose(label.header.get_zooms(), 1)
        for path in entry["image"]:
            assert np.array_equal(nib.load(tmp_path / "brats" / path).affine, label.affine)
        enhancing.append(bool((np.asarray(label.dataobj) == 3).any()))
    assert (
        data["training"][0]["label"]
        == "TrainingData/BraTS-GLI-00001-000/BraTS-GLI-00001-000-seg.nii.gz"
    )
    assert enhancing == [True, False]


@pytest.mark.slow
def test_all_organs_present_at_demo_size():
    for case in range(6):
        image, label = btcv_phantom([7, case])
        counts = np.bincount(label.ravel(), minlength=14)
        assert counts[1:].min() > 100
        assert 500 < counts[BTCV_LABELS["liver"]] * 2.8 * 2.8 * 4 / 1000 < 2000  # ml
        for name in ("right_adrenal", "left_adrenal"):
            assert np.median(image[label == BTCV_LABELS[name]]) > 15
