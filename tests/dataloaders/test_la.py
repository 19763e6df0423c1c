"""LA on tiny HDF5 files: the three layouts, lists and labelled prefixes, views, bad input."""

import os
import unicodedata
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from dataloaders import faults
from dataloaders.faults import DataError, Report
from dataloaders.la import LAYOUTS, LADataset
from dataloaders.lists import read_split

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = ["D", "A", "C", "B"], ["T1", "T2"]
SHAPE = (14, 12, 9)


def save(path, image, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def scan(seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32), (rng.random(shape) > 0.7).astype(np.uint8)


def build(root, layout=LAYOUTS[0], **arguments):
    """A data set of six scans in one layout."""
    for seed, name in enumerate(TRAIN + TEST):
        save(root / layout.format(name), *scan(seed))
    (root / "splits").mkdir(exist_ok=True)
    for split, names in (("train", TRAIN), ("test", TEST)):
        (root / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return LADataset(str(root), str(root / "splits"), **{"patch_size": (8, 8, 6)} | arguments)


def names(cases):
    return [case.name for case in cases]


def test_the_committed_lists_are_the_published_ones():
    train, val, test = (
        read_split(ROOT / "splits" / "la", split) for split in ("train", "val", "test")
    )
    assert (len(train), val, len(test)) == (80, None, 20)
    assert not set(train) & set(test)
    assert all(len(name) == 20 for name in train + test)
    assert (train[0], train[3], train[7], train[15]) == (
        "06SR5RBREL16DQ6M8LWS",
        "1GU15S0GJ6PFNARO469W",
        "38CWS74285MFGZZXR09Z",
        "5BHTH9RHH3PQT913I59W",
    )
    assert [int(share * 80) for share in (0.05, 0.1, 0.2)] == [4, 8, 16]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_labelled_prefixes(tmp_path, layout):
    data = build(tmp_path, layout)
    for labelled, count in ((1, 1), (3, 3), (0.5, 2), (None, 4)):
        splits = data.splits(labelled)
        assert names(splits["labelled"]) == TRAIN[:count]
        assert names(splits["unlabelled"]) == TRAIN[count:]
        assert (splits["val"], names(splits["test"])) == ([], TEST)
    sample = data.sample(splits["labelled"][1])
    image, label = scan(1)
    assert np.array_equal(sample["image"][0], image) and np.array_equal(sample["label"][0], label)


def test_a_val_list_is_taken_if_there_is_one(tmp_path):
    data = build(tmp_path)
    (tmp_path / "splits" / "val.txt").write_text("B\n")
    with pytest.raises(DataError, match=r"'B' is in both the train and the val list"):
        data.splits(1)
    (tmp_path / "splits" / "train.txt").write_text("D\nA\nC\n")
    splits = data.splits(1)
    assert (names(splits["val"]), names(splits["unlabelled"])) == (["B"], ["A", "C"])


def test_lists_that_are_wrong(tmp_path):
    data = build(tmp_path)
    with pytest.raises(
        DataError, match=r"train.txt: 4 scans with a label, but labelled is 5; expected 1..4"
    ):
        data.splits(5)
    (tmp_path / "splits" / "test.txt").write_text("T1\nA\n")
    with pytest.raises(DataError, match=r"'A' is in both the train and the test list"):
        data.splits(1)
    (tmp_path / "splits" / "test.txt").write_text("T1\nT9\n")
    with pytest.raises(DataError, match=r"T9.mri_norm2.h5: no such file, nor data/T9.h5"):
        data.splits(1)
    (tmp_path / "splits" / "train.txt").write_text("# none\n")
    with pytest.raises(DataError, match="empty"):
        data.splits(1)
    (tmp_path / "splits" / "train.txt").unlink()
    with pytest.raises(DataError, match=r"train.txt: no such list; expected one scan per line"):
        data.splits(1)


def test_volumes(tmp_path):
    data = build(tmp_path)
    volume = data.read(data.find(["T2"])[0])
    assert volume["image"].shape == volume["label"].shape == (1, *SHAPE)
    assert volume["spacing"] == [1.0, 1.0, 1.0]
    assert np.array_equal(volume["affine"], np.eye(4))
    assert volume["name"] == "T2"


def test_views_are_functions_of_sample_and_rng(tmp_path):
    data = build(tmp_path)
    label = (np.random.default_rng(0).random((1, *SHAPE)) > 0.5).astype(np.uint8)
    sample = {"image": label * np.float32(2) - 1, "label": label}
    different = set()
    for seed in range(10):
        weak = data.weak(sample, np.random.default_rng(seed))
        assert weak["image"].shape == weak["label"].shape == (1, 8, 8, 6)
        assert np.array_equal(weak["image"] > 0, weak["label"] > 0)
        again = data.patch(sample, np.random.default_rng(seed))
        assert np.array_equal(again["image"], weak["image"])
        strong = data.strong(weak, np.random.default_rng(seed))
        assert strong["image"].dtype == np.float32
        assert np.array_equal(strong["label"], weak["label"])
        different.add(weak["image"].tobytes())
    assert len(different) == 10


def test_strong_views_stay_aligned(tmp_path):
    data = build(tmp_path)
    half = np.ones((1, 24, 8, 6), np.float32)
    half[:, :12] = -1
    # bias field and gamma keep every sign; the widest blur moves the edge by less than 3 voxels
    for seed in range(30):
        strong = data.strong(
            {"image": half, "label": np.zeros_like(half, np.uint8)}, np.random.default_rng(seed)
        )
        assert (strong["image"][:, :9] < 0).all()
        assert (strong["image"][:, 15:] > 0).all()


@pytest.mark.parametrize("last_start", [True, False])
def test_scans_smaller_than_the_patch_are_padded(tmp_path, last_start):
    data = build(tmp_path, patch_size=(16, 8, 12), last_start=last_start)
    weak = data.weak(data.sample(data.splits(1)["labelled"][0]), np.random.default_rng(0))
    assert weak["image"].shape == (1, 16, 8, 12)
    assert (weak["image"] == 0).mean() > 0.2


def spoiled(root, image=None, label=None, **arrays):
    data = build(root)
    good = scan(0)
    path = root / "D" / "mri_norm2.h5"
    if arrays:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    else:
        save(path, good[0] if image is None else image, good[1] if label is None else label)
    return data


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"data": np.zeros(3)}, r"no array 'image', found \['data'\]; expected the keys"),
        ({"label": np.full(SHAPE, 255, np.uint8)}, r"label ids \[255\]; expected only 0..1"),
        (
            {"label": np.zeros((14, 12, 8))},
            r"image has shape \(14, 12, 9\), label has shape \(14, 12, 8\)",
        ),
        ({"image": np.full(SHAPE, np.nan)}, "1512 voxels are NaN or infinite"),
        ({"image": np.full(SHAPE, 2.0)}, "constant image"),
        ({"image": np.zeros((3, 3)), "label": np.zeros((3, 3))}, "expected the same 3 axes"),
    ],
)
def test_bad_scans(tmp_path, arguments, message):
    data = spoiled(tmp_path, **arguments)
    case = data.splits(1)["labelled"][0]
    for read in (data.sample, data.read):
        with pytest.raises(DataError, match=message) as caught:
            read(case)
        assert "D/mri_norm2.h5" in str(caught.value)


def test_a_truncated_scan_is_reported_by_prepare(tmp_path):
    data = build(tmp_path)
    path = tmp_path / "A" / "mri_norm2.h5"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        DataError, match=r"(?s)1 of 6 files.*A/mri_norm2.h5: unreadable or truncated"
    ):
        data.prepare(data.splits(1))


def test_a_scan_that_another_program_writes_is_not_called_damaged(tmp_path, monkeypatch):
    def locked(*arguments, **keywords):
        raise BlockingIOError(11, "Unable to synchronously open file (unable to lock file)")

    data = build(tmp_path)
    monkeypatch.setattr("dataloaders.cases.h5py.File", locked)
    with pytest.raises(DataError, match=r"open for writing.*HDF5_USE_FILE_LOCKING=FALSE"):
        data.prepare(data.splits(1))


def test_bad_arguments(tmp_path):
    with pytest.raises(DataError, match="3 numbers"):
        build(tmp_path, patch_size=(8, 8))
    with pytest.raises(DataError, match="no such folder"):
        LADataset(str(tmp_path / "nowhere")).splits(4)


@pytest.mark.parametrize("strong_views", [0, 1, 2])
def test_views_have_one_geometry_and_strong_views_of_their_own(tmp_path, strong_views):
    data = build(tmp_path)
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
            assert views[key].shape == (1, 8, 8, 6) and views[key].dtype == np.float32
        assert views["label"].shape == (1, 8, 8, 6) and views["label"].dtype == np.uint8
    assert all(np.array_equal(sample[key], kept[key]) for key in kept)


def test_strong_views_of_one_image_differ(tmp_path):
    data = build(tmp_path)
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


def test_weak_view_and_label_are_aligned_in_views(tmp_path):
    data = build(tmp_path)
    label = (np.random.default_rng(0).random((1, *SHAPE)) > 0.5).astype(np.uint8)
    sample = {"image": label * np.float32(2) - 1, "label": label}
    for seed in range(20):
        views = partial(data.views, strong_views=1)(sample, np.random.default_rng(seed))
        assert np.array_equal(views["weak"] > 0, views["label"] > 0)


def rebuilt(root, change):
    """A data set of which the file of scan A is made anew by `change(file)`; the path of it."""
    data, path = build(root), root / LAYOUTS[0].format("A")
    path.unlink()
    with h5py.File(path, "w") as file:
        file["label"] = scan(1)[1]
        change(file)
    return data, path


def test_arrays_are_in_the_file_itself(tmp_path):
    """Links, raw data beside and virtual arrays would be read from wherever the file says."""
    save(tmp_path / "other.h5", *scan(0))
    layout = h5py.VirtualLayout(SHAPE, np.float32)
    layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "image", SHAPE)

    def linked(file):
        file["image"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "image")

    def soft(file):
        file["image"] = h5py.SoftLink("/label")

    def beside(file):
        where = [(str(tmp_path / "other.h5"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("image", SHAPE, np.float32, external=where)

    def virtual(file):
        file.create_virtual_dataset("image", layout)

    for change, message in (
        (linked, "'image' is a link"),
        (soft, "'image' is a link"),
        (beside, "'image' is stored in '.*other.h5'"),
        (virtual, "'image' is made of other arrays"),
    ):
        data, path = rebuilt(tmp_path, change)
        with pytest.raises(DataError, match=message) as caught:
            data.sample(data.find(["A"])[0])
        (finding,) = caught.value.findings
        assert (finding.fault, finding.file) == ("outside", str(path))


def test_arrays_that_fit_no_memory_are_refused_before_they_are_read(tmp_path):
    huge = (100_000,) * 3
    data, _ = rebuilt(tmp_path, lambda file: file.create_dataset("image", huge, "f4", chunks=SHAPE))
    with pytest.raises(DataError, match="100000 x 100000 x 100000 values") as caught:
        data.sample(data.find(["A"])[0])
    assert caught.value.findings[0].fault == "too large"


def test_arrays_are_read_where_the_system_does_not_tell_its_memory(monkeypatch):
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    faults.memory.cache_clear()
    try:
        faults.check_room(Path("a.h5"), SHAPE, 4)
    finally:
        faults.memory.cache_clear()


def test_hidden_files_and_composed_names(tmp_path):
    whole, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    data = build(tmp_path)
    save(tmp_path / LAYOUTS[0].format(apart), *scan(9))
    assert data.find([whole])[0].images[0].is_file()
    save(tmp_path / "more" / "a.h5", *scan(8))
    (tmp_path / "more" / "._a.h5").write_bytes(b"\0\5\x16\7")
    assert names(data.folder_cases(tmp_path / "more", Report())) == ["a"]
