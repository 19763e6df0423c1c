"""ACDC on tiny HDF5 files: both layouts, lists and labelled prefixes, views, the way back to
volumes, bad input.
"""

from functools import partial
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from dataloaders.acdc import ACDCDataset, SliceCase
from dataloaders.cases import read_image
from dataloaders.faults import DataError, Report
from dataloaders.lists import labelled_count, read_split

ROOT = Path(__file__).resolve().parents[2]
# not sorted: the order of the list counts
TRAIN = ["patient003", "patient001", "patient002", "patient005"]
SLICES = {
    "patient001": 2,
    "patient002": 3,
    "patient003": 11,
    "patient005": 2,
    "patient006": 2,
    "patient007": 4,
}


def save(path, image, label, **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in {"image": image, "label": label, **extra}.items():
            file.create_dataset(key, data=array, compression="gzip")


def volume(seed, slices, shape=(20, 14)):
    rng = np.random.default_rng(seed)
    image = rng.random((slices, *shape))
    return image, rng.integers(0, 4, image.shape).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    """Four training patients, one to validate, one to test; patient002 has the frame numbers of own
    conversions.
    """
    for seed, (patient, slices) in enumerate(SLICES.items()):
        for frame in (4, 5) if patient == "patient002" else (1, 2):
            image, label = volume([seed, frame], slices)
            stem = f"{patient}_frame{frame:02d}"
            save(tmp_path / "data" / f"{stem}.h5", image, label, scribble=label)
            for z in range(slices):
                save(tmp_path / "data" / "slices" / f"{stem}_slice_{z + 1}.h5", image[z], label[z])
    for split, names in (("train", TRAIN), ("val", ["patient006"]), ("test", ["patient007"])):
        write_list(tmp_path, split, names)
    return tmp_path


def write_list(root, split, names):
    path = root / "splits" / f"{split}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# a comment\n" + "\n".join(names))  # no newline at the end, as in public lists


def dataset(root, **arguments):
    return ACDCDataset(str(root), str(root / "splits"), **{"patch_size": (16, 16)} | arguments)


def remove_slices(root):
    for path in (root / "data" / "slices").iterdir():
        path.unlink()
    (root / "data" / "slices").rmdir()


def patients(cases):
    return list(dict.fromkeys(case.name.split("_")[0] for case in cases))


# Lists


def test_the_committed_lists_are_the_published_ones():
    lists = {
        split: read_split(ROOT / "splits" / "acdc", split) for split in ("train", "val", "test")
    }
    assert {split: len(names) for split, names in lists.items()} == {
        "train": 70,
        "val": 10,
        "test": 20,
    }
    assert sorted(name for names in lists.values() for name in names) == [
        f"patient{k:03d}" for k in range(1, 101)
    ]
    assert [name[-3:] for name in lists["train"][:7]] == [
        "099",
        "038",
        "050",
        "100",
        "058",
        "021",
        "049",
    ]


@pytest.mark.parametrize("with_slices", [True, False])
def test_labelled_is_a_prefix_and_unlabelled_what_remains(root, with_slices):
    if not with_slices:
        remove_slices(root)
    splits = dataset(root).splits(2)
    assert patients(splits["labelled"]) == TRAIN[:2]
    assert patients(splits["unlabelled"]) == TRAIN[2:]
    assert [len(splits[key]) for key in ("labelled", "unlabelled", "val", "test")] == [
        22 + 4,
        6 + 4,
        2,
        2,
    ]
    assert [case.name for case in splits["val"]] == ["patient006_frame01", "patient006_frame02"]
    assert [case.name for case in splits["labelled"][8:11]] == [
        f"patient003_frame01_slice_{z}" for z in (9, 10, 11)
    ]
    # frames 04 and 05 are found too
    assert patients(splits["unlabelled"]) == ["patient002", "patient005"]


def test_both_layouts_hold_the_same(root):
    data = dataset(root)
    from_slices = [(case.name, data.sample(case)) for case in data.splits()["labelled"]]
    remove_slices(root)
    data = dataset(root)
    cases = data.splits()["labelled"]
    assert [case.name for case in cases] == [name for name, _ in from_slices]
    assert all(isinstance(case, SliceCase) and case.index is not None for case in cases)
    for case, (_, stored) in zip(cases, from_slices):
        read = data.sample(case)
        assert np.array_equal(read["image"], stored["image"])
        assert np.array_equal(read["label"], stored["label"])


@pytest.mark.parametrize(
    "labelled,count", [(1, 1), (3, 3), (0.5, 2), (0.74, 2), (0.25, 1), (None, 4), (1.0, 4)]
)
def test_counts_and_shares(root, labelled, count):
    splits = dataset(root).splits(labelled)
    assert patients(splits["labelled"]) == TRAIN[:count]
    assert patients(splits["unlabelled"]) == TRAIN[count:]


@pytest.mark.parametrize("labelled", [0, -1, 5, 0.1, 0.0, 1.5, "3", True, float("nan")])
def test_impossible_counts(root, labelled):
    with pytest.raises(DataError, match="labelled is"):
        dataset(root).splits(labelled)


def test_shares_of_the_tables():
    assert [labelled_count(share, 70, "", "patient") for share in (0.05, 0.1, 0.2)] == [3, 7, 14]
    assert labelled_count(0.29, 100, "", "patient") == 29


def test_a_patient_in_two_lists(root):
    write_list(root, "val", ["patient001"])
    with pytest.raises(DataError, match=r"patient001' is in both the train and the val list"):
        dataset(root).splits(1)


def test_missing_and_empty_lists(root):
    write_list(root, "val", [])
    with pytest.raises(DataError, match="empty"):
        dataset(root).splits(1)
    (root / "splits" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt: no such list"):
        dataset(root).splits(1)
    write_list(root, "val", ["patient006"])
    (root / "splits" / "test.txt").unlink()
    assert dataset(root).splits(1)["test"] == []


@pytest.mark.parametrize("with_slices", [True, False])
def test_patients_without_files(root, with_slices):
    if not with_slices:
        remove_slices(root)
    write_list(root, "train", [*TRAIN, "patient044"])
    with pytest.raises(DataError, match=r"no files of 1 of \d+ patients, for example 'patient044'"):
        dataset(root).splits(5 if with_slices else 1)
    with pytest.raises(DataError, match="no such folder"):
        ACDCDataset(str(root / "nowhere"), str(root / "splits")).splits(1)


def test_find(root):
    data = dataset(root)
    assert [case.name for case in data.find(["patient007_frame02", "patient001_frame01"])] == [
        "patient007_frame02",
        "patient001_frame01",
    ]
    with pytest.raises(DataError, match="patient099_frame01"):
        data.find(["patient099_frame01"])


# Reading and views


def test_read(root):
    data = dataset(root)
    case = data.splits(1)["labelled"][0]
    sample = data.sample(case)
    image, label = volume([2, 1], 11)
    assert sample["image"].dtype == np.float32 and sample["label"].dtype == np.uint8
    np.testing.assert_allclose(sample["image"], image[:1], rtol=1e-6)
    assert np.array_equal(sample["label"], label[:1])


def test_memory_limits_what_is_kept(root, monkeypatch):
    one = 20 * 14 * 5  # bytes of a slice, float32 and uint8
    for room, kept in ((0, 0), (3.5 * one, 3), (1e9, 48)):
        data = dataset(root, memory_gb=room / 1e9)
        splits = data.splits(2)
        data.prepare(splits)
        assert len(data._memory) == min(kept, 36)
    monkeypatch.setattr(data, "load", None)  # nothing is read from disk any more
    assert all(
        data.sample(case)["image"].shape == (1, 20, 14)
        for case in splits["labelled"] + splits["unlabelled"]
    )


def test_prepare_lists_every_faulty_file(root):
    splits = dataset(root).splits(1)
    for case in splits["labelled"][:2]:
        save(case.images[0], np.full((20, 14), np.nan), np.zeros((20, 14)))
    with pytest.raises(DataError, match=r"(?s)2 of 40 files.*slice_1.h5.*slice_2.h5"):
        dataset(root).prepare(splits)


def test_views_are_functions_of_sample_and_rng(root):
    data = dataset(root)
    sample = data.sample(data.splits(1)["labelled"][0])
    kept = {key: value.copy() for key, value in sample.items()}
    for seed in range(8):
        weak, again = (data.weak(sample, np.random.default_rng(seed)) for _ in range(2))
        patch = data.patch(sample, np.random.default_rng(seed))
        strong = data.strong(weak, np.random.default_rng(seed))
        assert weak["image"].shape == weak["label"].shape == (1, 16, 16)
        assert np.array_equal(weak["image"], again["image"]) and np.array_equal(
            weak["label"], again["label"]
        )
        # The weak view is the labelled one, cut to 8 bits; the strong one shares its geometry.
        assert np.array_equal(weak["label"], patch["label"])
        assert np.array_equal(np.rint(weak["image"] * 255), np.trunc(patch["image"] * 255))
        assert np.array_equal(strong["label"], weak["label"])
    assert all(np.array_equal(sample[key], kept[key]) for key in kept)


def test_image_and_label_move_together(root):
    data = dataset(root)
    label = np.random.default_rng(0).integers(1, 4, (1, 20, 14)).astype(np.uint8)
    sample = {"image": (label * 85 / np.float32(255)).astype(np.float32), "label": label}
    for seed in range(20):
        patch = data.patch(sample, np.random.default_rng(seed))
        assert np.array_equal(np.rint(patch["image"] * 3), patch["label"])


def test_shares_of_the_three_geometries(root):
    data = dataset(root, patch_size=(9, 9))
    plane = np.random.default_rng(0).random((1, 9, 9)).astype(np.float32)
    turned = {np.flip(np.rot90(plane[0], k), a).tobytes() for k in range(4) for a in range(2)}
    sample = {"image": plane, "label": np.zeros((1, 9, 9), np.uint8)}
    counts = {"turned": 0, "same": 0, "rotated": 0}
    generator = np.random.default_rng(1)
    for _ in range(1000):
        image = data.patch(sample, generator)["image"][0]
        kind = (
            "turned"
            if image.tobytes() in turned
            else "same"
            if np.array_equal(image, plane[0])
            else "rotated"
        )
        counts[kind] += 1
    assert 440 < counts["turned"] < 560
    assert 200 < counts["rotated"] < 290  # a few of the smallest angles move no pixel
    assert 200 < counts["same"] < 320


def test_volumes_to_slices_and_back(root):
    data = dataset(root, patch_size=(40, 40))
    case = data.splits(1)["test"][0]
    read = data.read(case)
    image, label = volume([5, 1], 4)
    assert read["image"].shape == (1, 20, 14, 4)
    np.testing.assert_allclose(read["image"][0, ..., 2], image[2], rtol=1e-6)
    assert np.array_equal(read["label"][0, ..., 3], label[3])
    assert read["spacing"] == [1.0, 1.0, 1.0]
    slices = data.slices(read)
    assert slices.shape == (4, 1, 40, 40)
    prediction = data.slices({"image": read["label"]})[:, 0]
    assert np.array_equal(data.unslice(prediction, read), read["label"][0])


# Bad input


def spoil_slice(root, image=None, label=None, keys=("image", "label")):
    path = root / "data" / "slices" / "patient003_frame01_slice_1.h5"
    good = volume(0, 1)
    image, label = (
        given if given is not None else known[0] for given, known in zip((image, label), good)
    )
    with h5py.File(path, "w") as file:
        for key, array in zip(keys, (image, label)):
            file[key] = array
    data = dataset(root)
    return lambda: data.sample(data.splits(1)["labelled"][0])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"keys": ("mask", "label")}, r"no array 'image', found \['label', 'mask'\]"),
        ({"label": np.full((20, 14), 4)}, r"label ids \[4\]; expected only 0..3"),
        ({"label": np.full((20, 14), 0.5)}, r"label ids \[0.5\]"),
        ({"label": np.zeros((20, 13))}, r"image has shape \(20, 14\), label has shape \(20, 13\)"),
        (
            {"image": np.zeros((2, 20, 14)), "label": np.zeros((2, 20, 14))},
            "expected the same 2 axes",
        ),
        ({"image": np.full((20, 14), np.inf)}, "280 voxels are NaN or infinite"),
        ({"image": np.full((20, 14), 0.3)}, "constant image"),
        ({"image": np.arange(280.0).reshape(20, 14)}, r"intensities 0..279; expected 0..1"),
    ],
)
def test_bad_slices(root, arguments, message):
    read = spoil_slice(root, **arguments)
    with pytest.raises(DataError, match=message) as caught:
        read()
    assert "patient003_frame01_slice_1.h5" in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_truncated_files(root, size):
    for name in ("slices/patient003_frame01_slice_1.h5", "patient006_frame01.h5"):
        path = root / "data" / name
        path.write_bytes(path.read_bytes()[:size])
    data = dataset(root)
    splits = data.splits(1)
    with pytest.raises(DataError, match=r"slice_1.h5: unreadable or truncated"):
        data.sample(splits["labelled"][0])
    with pytest.raises(DataError, match=r"patient006_frame01.h5: unreadable or truncated"):
        data.read(splits["val"][0])


def test_a_damaged_volume_where_slices_are_counted(root):
    remove_slices(root)
    path = root / "data" / "patient003_frame01.h5"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"patient003_frame01.h5: unreadable or truncated"):
        dataset(root).splits(1)


def test_bad_data_inside_a_file(root):
    path = root / "data" / "slices" / "patient003_frame01_slice_1.h5"
    with h5py.File(path) as file:
        chunk = file["image"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 40] = bytes(40)
    path.write_bytes(content)
    data = dataset(root)
    with pytest.raises(DataError, match="unreadable or truncated"):
        data.sample(data.splits(1)["labelled"][0])


def test_a_file_that_is_gone(root):
    data = dataset(root)
    splits = data.splits(1)
    splits["labelled"][0].images[0].unlink()
    with pytest.raises(DataError, match="no such file"):
        data.sample(splits["labelled"][0])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"patch_size": (16, 16, 16)}, "2 numbers"),
        ({"patch_size": (0, 16)}, "positive"),
        ({"memory_gb": -1}, "memory_gb"),
        ({"class_names": ("background",)}, "class_names"),
    ],
)
def test_bad_arguments(root, arguments, message):
    with pytest.raises(DataError, match=message):
        dataset(root, **arguments)


@pytest.mark.parametrize("strong_views", [0, 1, 2])
def test_views_have_one_geometry_and_strong_views_of_their_own(root, strong_views):
    data = dataset(root)
    sample = data.sample(data.splits(1)["unlabelled"][0])
    kept = {key: value.copy() for key, value in sample.items()}
    function = partial(data.views, strong_views=strong_views)
    keys = ["weak", *(f"strong{k}" for k in range(strong_views)), "label"]
    for seed in range(6):
        views, again = (function(sample, np.random.default_rng(seed)) for _ in range(2))
        assert list(views) == keys
        assert all(np.array_equal(views[key], again[key]) for key in keys)
        weak = data.weak(sample, np.random.default_rng(seed))
        assert np.array_equal(views["weak"], weak["image"]) and np.array_equal(
            views["label"], weak["label"]
        )
        for key in keys[:-1]:
            assert views[key].shape == (1, 16, 16) and views[key].dtype == np.float32
        assert views["label"].shape == (1, 16, 16) and views["label"].dtype == np.uint8
    assert all(np.array_equal(sample[key], kept[key]) for key in kept)


def test_strong_views_of_one_image_differ(root):
    data = dataset(root)
    sample = data.sample(data.splits(1)["unlabelled"][0])
    differ = 0
    for seed in range(10):
        views = data.views(sample, np.random.default_rng(seed), strong_views=2)
        differ += not np.array_equal(views["strong0"], views["strong1"])
        first = data.views(sample, np.random.default_rng(seed), strong_views=1)
        assert np.array_equal(views["weak"], first["weak"]) and np.array_equal(
            views["strong0"], first["strong0"]
        )
    assert differ >= 8  # a view is at times left as it is


def test_weak_view_and_label_are_aligned_in_views(root):
    data = dataset(root)
    label = np.random.default_rng(0).integers(1, 4, (1, 20, 14)).astype(np.uint8)
    sample = {"image": (label * 85 / np.float32(255)).astype(np.float32), "label": label}
    for seed in range(20):
        views = partial(data.views, strong_views=1)(sample, np.random.default_rng(seed))
        assert np.array_equal(np.rint(views["weak"] * 3), views["label"])


# Further cases without labels


@pytest.mark.parametrize("slices", [True, False])
@pytest.mark.parametrize("scored", ["patient006", "patient007"])
def test_scans_of_scored_patients_are_found_in_the_folder(root, tmp_path, scored, slices):
    """Under their own name: the patient is known from it. Under another: the image is the same."""
    if not slices:
        remove_slices(root)
    more = tmp_path / "more"
    copy = f"{scored}_frame01"
    stacks = volume([list(SLICES).index(scored), 1], SLICES[scored])
    save(more / f"{copy}.h5", *stacks)
    with pytest.raises(DataError, match=f"patient '{scored}' is in both the unlabelled list"):
        dataset(root, unlabelled=str(more)).splits()
    (more / f"{copy}.h5").rename(more / "other_frame01.h5")
    data = dataset(root, unlabelled=str(more))
    with pytest.raises(DataError, match=r"the same image as .*other_frame01\.h5 \(train list\)"):
        data.prepare(data.splits())


def test_an_image_of_one_name_in_two_lists_is_a_duplicate(root):
    data = dataset(root)
    test = data.splits()["test"]
    plane = SliceCase("patient007_frame01_slice_1", test[0].images, None, 0)
    lists = {"labelled": [], "unlabelled": [plane], "val": [], "test": test}
    with pytest.raises(DataError, match=r"the same image as .*here in the test list"):
        data.prepare(lists)


def test_a_scan_file_is_read_once_and_its_slices_are_kept_alone(tmp_path, root, monkeypatch):
    scan = np.random.default_rng(0).random((14, 20, 3)).astype(np.float32)
    (tmp_path / "more").mkdir()
    nib.save(nib.Nifti1Image(scan, np.diag([1, 1, 8, 1])), tmp_path / "more/u.nii.gz")
    data = dataset(root, unlabelled=str(tmp_path / "more"))
    cases = data.folder_cases(tmp_path / "more", Report())
    read = []
    monkeypatch.setattr(
        "dataloaders.acdc.read_image", lambda *given: read.append(given) or read_image(*given)
    )
    stored = [data.load(case, None)["image"] for case in cases]
    assert len(read) == 1
    for k, image in enumerate(stored):
        owner = image if image.base is None else image.base
        assert owner.size == image.size == 14 * 20
        expected = (scan[..., k].T - scan.min()) / np.ptp(scan)
        assert np.allclose(image[0], expected, atol=1e-6)


def test_labelled_files_of_any_name_in_the_folder(tmp_path, root):
    image, label = volume(0, 2)
    save(tmp_path / "more/anyname.h5", image, label)
    save(tmp_path / "more/empty.h5", 1 - image, 0 * label)
    data = dataset(root, unlabelled=str(tmp_path / "more"))
    splits = data.splits()
    assert len(splits["unlabelled"]) == 4
    (warning,) = data.prepare(splits)
    assert warning.fault == "empty label" and warning.file.endswith("empty.h5")
