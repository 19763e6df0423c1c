"""Decathlon-style data sets on tiny NIfTI files: geometry, cache, the way back to the native grid,
and bad input.
"""

import errno
import gzip
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from dataloaders import DATASETS, Case, DataError, build_dataset, describe_dataset
from dataloaders.cases import read_image, read_label
from dataloaders.checks import check_disjoint
from dataloaders.faults import Report
from dataloaders.lists import read_datalist
from dataloaders.msd import MSDDataset, surviving
from dataloaders.volumes import read_volume, to_native
from utils.checkpoint import DiskError, Lock

CLASSES = ("background", "liver", "spleen")
SHAPE = (12, 10, 8)


def rotation(degrees, axis=2):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(3)
    first, second = [k for k in range(3) if k != axis]
    matrix[first, first] = matrix[second, second] = c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix


def affine_of(linear, origin=(-20.0, 13.0, 5.0)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, origin
    return affine


AFFINES = {
    "RAS": affine_of(np.diag([2.0, 1.5, 3.0])),
    "LPS": affine_of(np.diag([-2.0, -1.5, 3.0])),
    "SLP": affine_of(np.array([[0, -1.5, 0], [0, 0, -3.0], [2.0, 0, 0]])),
    "oblique": affine_of(rotation(20) @ rotation(10, 0) @ np.diag([2.0, 1.5, 3.0])),
    "oblique LPS": affine_of(rotation(-25, 1) @ np.diag([-2.0, -1.5, 3.0])),
}
SLOPE = np.array([3.0, -2.0, 5.0])  # per mm, along the world's axes


def world(affine, shape):
    """World coordinates (*shape, 3) of all voxel centres."""
    return (
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T
        + affine[:3, 3]
    )


def ramp(affine, shape):
    """An image that is linear in world coordinates: linear interpolation gives it back exactly."""
    return world(affine, shape) @ SLOPE


def blocks(shape=SHAPE):
    label = np.zeros(shape, np.uint8)
    label[2:8, 2:7, 2:6] = 1
    label[6:10, 5:9, 3:7] = 2
    return label


def save(path, array, affine=AFFINES["RAS"], dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, dtype), affine), path)
    return path


def noise(seed, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape)


class Folder:
    """A data set in a temporary folder: `cases` (name -> image, label, affine) and the JSON that
    lists them.
    """

    def __init__(self, root):
        self.root = root
        self.lists = {"training": [], "validation": []}

    def add(self, section, name, image=None, label=None, affine=AFFINES["RAS"]):
        image = noise(len(self.names())) if image is None else image
        save(self.root / "imagesTr" / f"{name}.nii.gz", image, affine)
        label = blocks(image.shape) if label is None else label
        save(self.root / "labelsTr" / f"{name}.nii.gz", label, affine, np.uint8)
        self.lists.setdefault(section, []).append(
            {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
        )
        return self

    def names(self):
        return [entry for entries in self.lists.values() for entry in entries]

    def dataset(self, **arguments):
        (self.root / "dataset.json").write_text(json.dumps(self.lists))
        defaults = {"orientation": "", "intensity": "none", "crop_foreground": False}
        return MSDDataset(
            str(self.root),
            "dataset.json",
            CLASSES,
            cache_dir=str(self.root / "cache"),
            **defaults | arguments,
        )

    def only(self, **arguments):
        """The preprocessed first training case."""
        dataset = self.dataset(**arguments)
        return dataset.read(dataset.splits()["labelled"][0])


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "data")


@pytest.fixture
def pair(folder):
    """One training and one validation case."""
    return folder.add("training", "a").add("validation", "b")


def one(folder, image=None, label=None, affine=AFFINES["RAS"], **arguments):
    folder.add("training", "a", image, label, affine).add("validation", "z")
    return folder.only(**arguments)


# Geometry


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SLP", ""])
@pytest.mark.parametrize("name", AFFINES)
def test_reorientation_moves_voxels_with_their_world_coordinates(folder, name, orientation):
    affine, label = AFFINES[name], blocks()
    sample = one(folder, ramp(affine, SHAPE), label, affine, orientation=orientation)
    image, new = np.array(sample["image"][0]), np.array(sample["affine"])
    np.testing.assert_allclose(image, ramp(new, image.shape), rtol=1e-5, atol=1e-3)
    codes = "".join(nib.aff2axcodes(new))
    assert codes == (orientation or "".join(nib.aff2axcodes(affine)))
    np.testing.assert_allclose(sample["spacing"], np.linalg.norm(new[:3, :3], axis=0))
    assert sample["native_shape"] == list(SHAPE)
    np.testing.assert_allclose(sample["native_affine"], affine, atol=1e-5)
    stored = np.round(
        (world(new, image.shape) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    ).astype(int)
    np.testing.assert_array_equal(sample["label"][0], label[tuple(np.moveaxis(stored, -1, 0))])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 1.5, 2.0), (3.0, 2.0, 4.0)])
@pytest.mark.parametrize("name", AFFINES)
def test_resampling_a_linear_ramp_is_exact_inside(folder, name, spacing):
    affine, label = AFFINES[name], blocks()
    sample = one(folder, ramp(affine, SHAPE), label, affine, orientation="RAS", spacing=spacing)
    image, new = np.array(sample["image"][0]), np.array(sample["affine"])
    np.testing.assert_allclose(sample["spacing"], spacing, rtol=1e-5)
    # Coordinates on the stored grid: inside, ramp and label are known; beyond its outermost centres
    # neither is.
    stored = (world(new, image.shape) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    inside = ((stored >= 0) & (stored <= np.array(SHAPE) - 1)).all(-1)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(image[inside], ramp(new, image.shape)[inside], rtol=1e-4, atol=1e-2)
    # no tie between two voxels
    clear = inside & (abs(stored - np.floor(stored) - 0.5) > 1e-3).all(-1)
    nearest = np.round(stored[clear]).astype(int)
    np.testing.assert_array_equal(np.array(sample["label"][0])[clear], label[tuple(nearest.T)])
    assert set(np.unique(sample["label"])) <= {0, 1, 2} and sample["label"].dtype == np.uint8
    # The whole field of view is covered: its size in mm changes by less than a new voxel.
    before = np.sort(np.linalg.norm(affine[:3, :3], axis=0) * (np.array(SHAPE) - 1))
    after = np.sort(np.array(spacing) * (np.array(image.shape) - 1))
    assert (abs(before - after) <= max(spacing)).all()


def test_spacing_of_the_file_is_kept_where_none_is_asked_for(folder):
    sample = one(folder, noise(1))
    np.testing.assert_allclose(sample["spacing"], [2.0, 1.5, 3.0])
    np.testing.assert_allclose(sample["image"][0], noise(1), atol=1e-6)


# Intensity and crop


def test_window_maps_and_clips(folder):
    image = np.linspace(-1000, 1000, np.prod(SHAPE)).reshape(SHAPE)
    sample = one(folder, image, intensity="window", window=(-175.0, 250.0))
    np.testing.assert_allclose(sample["image"][0], np.clip((image + 175) / 425, 0, 1), atol=1e-5)
    assert sample["image"].dtype == np.float32


def test_zscore_is_per_channel_over_the_volume(folder):
    image = np.stack([noise(1) * 3 + 10, noise(2) * 0.1 - 4], -1)
    sample = one(folder, image, blocks(), intensity="zscore", in_channels=2)
    for channel in range(2):
        values = image[..., channel]
        np.testing.assert_allclose(
            sample["image"][channel], (values - values.mean()) / values.std(), atol=1e-4
        )


def test_crop_foreground_is_the_tight_box_of_what_the_window_leaves(folder):
    image = np.full(SHAPE, -900.0)
    image[3:9, 2:8, 1:5] = 40
    image[3, 2, 1] = image[8, 7, 4] = -174  # just inside the window: the corners of the box
    image[0, 0, 0] = -175  # exactly 0 after the window: outside
    sample = one(
        folder, image, blocks(), intensity="window", window=(-175.0, 250.0), crop_foreground=True
    )
    assert sample["image"].shape == (1, 6, 6, 4) and sample["label"].shape == (1, 6, 6, 4)
    np.testing.assert_array_equal(sample["label"][0], blocks()[3:9, 2:8, 1:5])
    expected = AFFINES["RAS"] @ np.array([3, 2, 1, 1.0])
    np.testing.assert_allclose(np.array(sample["affine"])[:, 3], expected, atol=1e-5)
    assert sample["native_shape"] == list(SHAPE)


@pytest.mark.parametrize("crop", [True, False])
def test_patch_centres(folder, crop):
    image = np.where(noise(3) > 0, 1.0, -1.0)
    image[0, 0, 0] = image[-1, -1, -1] = 1.0  # the box is the whole volume
    sample = one(folder, image, blocks(), crop_foreground=crop)
    label, body = blocks() > 0, image > 0
    np.testing.assert_array_equal(sample["foreground"], np.flatnonzero(label))
    np.testing.assert_array_equal(
        sample["background"], np.flatnonzero(~label & (body if crop else True))
    )
    assert sample["ids"] == [0, 1, 2]


def test_an_empty_foreground_box_is_an_error(folder):
    image = np.linspace(-900, -500, np.prod(SHAPE)).reshape(SHAPE)
    with pytest.raises(
        DataError, match=r"a\.nii\.gz: nothing is left after cropping.*check the window"
    ):
        one(folder, image, intensity="window", crop_foreground=True)


# Cache


def refuse(case):
    raise AssertionError(f"{case.name} was preprocessed again")


def prepared(folder, **arguments):
    dataset = folder.dataset(**arguments)
    dataset.prepare(dataset.splits())
    return dataset


def test_second_start_preprocesses_nothing(pair, monkeypatch):
    first = prepared(pair)
    before = {
        key: np.array(value) for key, value in first.read(first.splits()["labelled"][0]).items()
    }
    monkeypatch.setattr(MSDDataset, "preprocess", lambda self, case: refuse(case))
    second = prepared(pair)
    after = second.read(second.splits()["labelled"][0])
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_cached_equals_fresh_and_is_read_only(pair):
    dataset = prepared(pair)
    case = dataset.splits()["labelled"][0]
    fresh, cached = dataset.preprocess(case), dataset.read(case)
    for key, value in fresh.items():
        np.testing.assert_array_equal(value, cached[key], err_msg=key)
    with pytest.raises(ValueError, match="read-only"):
        cached["image"][:] = 0


def test_a_full_disk_behind_the_cache_names_the_entry(pair, monkeypatch):
    def full(path, array):
        raise OSError("7920 requested and 5088 written")  # as NumPy says it

    monkeypatch.setattr("dataloaders.cache.np.save", full)
    with pytest.raises(DiskError, match=r"a-\w{16}: cannot be written \(the disk is full, "):
        prepared(pair)


def test_a_touched_file_is_a_hit_and_a_changed_one_a_miss(pair, monkeypatch):
    prepared(pair)
    made, original = [], MSDDataset.preprocess

    def spy(self, case):
        made.append(case.name)
        return original(self, case)

    monkeypatch.setattr(MSDDataset, "preprocess", spy)
    image = pair.root / "imagesTr" / "a.nii.gz"
    image.touch()
    prepared(pair)
    assert made == []
    save(image, noise(77))
    prepared(pair)
    assert made == ["a"]
    save(pair.root / "labelsTr" / "b.nii.gz", np.ones(SHAPE), dtype=np.uint8)
    dataset = prepared(pair)
    assert made == ["a", "b"]
    assert (dataset.read(dataset.splits()["val"][0])["label"] == 1).all()
    np.testing.assert_allclose(
        dataset.read(dataset.splits()["labelled"][0])["image"][0], noise(77), atol=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"orientation": "LPS"},
        {"spacing": (2.0, 2.0, 2.0)},
        {"intensity": "zscore"},
        {"intensity": "window"},
        {"intensity": "window", "window": (0.0, 1.0)},
        {"crop_foreground": True},
    ],
    ids=str,
)
def test_other_parameters_are_a_miss(pair, monkeypatch, change):
    prepared(pair)
    prepared(pair, intensity="window", window=(-1.0, 1.0))
    monkeypatch.setattr(MSDDataset, "preprocess", lambda self, case: refuse(case))
    with pytest.raises(AssertionError, match="preprocessed again"):
        prepared(pair, **change)


def entry_of(pair, name="a"):
    (entry,) = (pair.root / "cache").glob(f"{name}-*")
    return entry


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "one bit"])
@pytest.mark.parametrize("name", ["image.npy", "label.npy", "meta.json", "checksums.json"])
def test_a_damaged_entry_is_made_again_and_said(pair, capsys, name, how):
    first = prepared(pair)
    case = first.splits()["labelled"][0]
    before = {key: np.array(value) for key, value in first.read(case).items()}
    path = entry_of(pair) / name
    damage(path, how)
    capsys.readouterr()
    second = pair.dataset()
    after = second.read(case)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    assert f"{path.parent}: damaged" in capsys.readouterr().err
    pair.dataset().read(case)
    assert capsys.readouterr().err == ""
    assert not list((pair.root / "cache").glob(".making-*"))


def test_a_source_of_equal_size_and_time_but_other_content_is_a_miss(pair):
    prepared(pair)
    path = pair.root / "imagesTr" / "a.nii.gz"
    before = path.stat()
    damage(path, "one bit")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(DataError, match=r"a\.nii\.gz"):
        prepared(pair)


def test_a_cache_that_cannot_be_written_serves_what_it_has(pair, monkeypatch):
    case = prepared(pair).splits()["labelled"][0]

    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for function in ("mkdir", "rename", "open"):
        monkeypatch.setattr(os, function, refused)
    reader = pair.dataset()
    reader.prepare(reader.splits())
    assert reader.read(case)["image"].shape == (1, *SHAPE)
    changed = pair.dataset(intensity="zscore")
    with pytest.raises(DiskError, match=r"cache/a-\w+: cannot be written \(Read-only.*cache_dir"):
        changed.read(case)


def test_what_a_killed_process_left_is_swept_unless_someone_makes_an_entry(pair):
    prepared(pair)
    left = pair.root / "cache" / ".making-img-4711"
    left.mkdir()
    (left / "image.npy").write_bytes(b"half")
    context = multiprocessing.get_context("fork")
    busy = context.Event()

    def make():
        lock = Lock(left.parent / ".lock")
        lock.take(shared=True)
        busy.set()
        time.sleep(60)

    making = context.Process(target=make)
    making.start()
    try:
        assert busy.wait(30)
        prepared(pair)
        assert left.exists()
    finally:
        making.kill()
        making.join()
    prepared(pair)
    assert not left.exists()


def test_processes_of_one_number_fill_one_cache(pair):
    """As the first processes of two containers do."""
    context = multiprocessing.get_context("fork")
    case = pair.dataset().splits()["labelled"][0]
    barrier = context.Barrier(4)

    def fill():
        os.getpid = lambda: 1
        barrier.wait(30)
        assert pair.dataset().read(case)["image"].shape == (1, *SHAPE)

    processes = [context.Process(target=fill) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.name[:2] for path in (pair.root / "cache").iterdir()) == [".l", "a-"]


def test_an_interrupted_preprocessing_leaves_no_entry(pair, monkeypatch):
    dataset = pair.dataset()
    monkeypatch.setattr(np, "save", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dataset.prepare(dataset.splits())
    assert [path for path in (pair.root / "cache").iterdir() if path.is_dir()] == []


# Back to the native grid


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_identity_grid_changes_nothing(dtype):
    ids = np.random.default_rng(0).integers(0, 5, SHAPE).astype(dtype)
    restored = to_native(ids, AFFINES["oblique"], AFFINES["oblique"], SHAPE)
    assert restored.dtype == dtype
    np.testing.assert_array_equal(restored, ids)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SLP", "PIR"])
@pytest.mark.parametrize("name", AFFINES)
def test_reorientation_is_undone_exactly(folder, name, orientation):
    label = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
    sample = one(folder, noise(0), label, AFFINES[name], orientation=orientation)
    found = np.array(sample["label"][0])
    restored = to_native(found, sample["affine"], sample["native_affine"], sample["native_shape"])
    np.testing.assert_array_equal(restored, label)


@pytest.mark.parametrize("spacing", [(1.3, 1.7, 2.1), (3.7, 3.3, 5.1)])
@pytest.mark.parametrize("name", AFFINES)
def test_resampling_and_cropping_are_undone_by_nearest_neighbour(folder, name, spacing):
    affine = AFFINES[name]
    image = np.full(SHAPE, -1.0)
    image[2:11, 1:9, 1:7] = 1.0
    sample = one(
        folder, image, None, affine, orientation="RAS", spacing=spacing, crop_foreground=True
    )
    shape = sample["label"].shape[1:]
    # no 0: what is outside shows
    prediction = np.random.default_rng(2).integers(1, 9, shape).astype(np.uint8)
    restored = to_native(
        prediction, sample["affine"], sample["native_affine"], sample["native_shape"]
    )
    assert restored.shape == SHAPE and restored.dtype == np.uint8
    new = np.array(sample["affine"])
    checked = outside = 0
    for voxel, place in zip(np.ndindex(*SHAPE), world(affine, SHAPE).reshape(-1, 3)):
        there = np.linalg.solve(new[:3, :3], place - new[:3, 3])
        if (abs(there - np.floor(there) - 0.5) < 1e-3).any():
            continue  # a tie between two voxels
        nearest = np.round(there).astype(int)
        within = all(0 <= n < size for n, size in zip(nearest, shape))
        assert restored[voxel] == (prediction[tuple(nearest)] if within else 0), voxel
        checked, outside = checked + 1, outside + (not within)
    assert checked > 300 and outside > 100


def test_native_label_is_the_file(pair):
    dataset = pair.dataset(orientation="LPS", spacing=(1.0, 1.0, 1.0))
    label, affine = dataset.native_label(dataset.splits()["labelled"][0])
    np.testing.assert_array_equal(label, blocks())
    np.testing.assert_allclose(affine, AFFINES["RAS"])


# Lists


def test_splits_of_the_json_and_of_files(folder):
    for section, name in (("training", "a"), ("training", "b"), ("validation", "c"), ("test", "d")):
        folder.add(section, name)
    folder.lists["test"].append("imagesTs/unlabelled.nii.gz")
    splits = folder.dataset().splits()
    assert {split: [case.name for case in cases] for split, cases in splits.items()} == {
        "labelled": ["a", "b"],
        "unlabelled": [],
        "val": ["c"],
        "test": ["d"],
    }
    lists = folder.root / "splits"
    lists.mkdir()
    (lists / "train.txt").write_text("# seeded\nd\na  # the first\n\n")
    (lists / "val.txt").write_text("b\n")
    splits = folder.dataset(split_dir=str(lists)).splits()
    assert {split: [case.name for case in cases] for split, cases in splits.items()} == {
        "labelled": ["d", "a"],
        "unlabelled": [],
        "val": ["b"],
        "test": [],
    }
    assert [case.name for case in folder.dataset().find(["c", "a"])] == ["c", "a"]


def test_several_files_are_the_channels_of_one_case(tmp_path):
    files = [f"scans/p1/p1-{kind}.nii.gz" for kind in ("t1", "t2")]
    for seed, file in enumerate(files):
        save(tmp_path / file, noise(seed))
    (tmp_path / "d.json").write_text(json.dumps({"training": [{"image": files}]}))
    (case,) = read_datalist(tmp_path, "d.json")["training"]
    assert case.name == "p1" and case.label is None
    image, affine = read_image(case, 2)
    assert image.shape == (2, *SHAPE) and image.dtype == np.float32
    np.testing.assert_allclose(image[1], noise(1), atol=1e-6)
    np.testing.assert_allclose(affine, AFFINES["RAS"])


def test_two_scans_of_one_name_in_one_list_are_an_error(folder):
    folder.add("training", "site1/scan").add("training", "site2/scan").add("validation", "b")
    lists = folder.root / "splits"
    lists.mkdir()
    (lists / "train.txt").write_text("scan\n")
    (lists / "val.txt").write_text("b\n")
    with pytest.raises(DataError, match="scan"):
        folder.dataset(split_dir=str(lists)).splits()


def test_one_case_twice_in_one_list_is_an_error(pair):
    pair.lists["validation"] *= 2
    with pytest.raises(DataError, match="'b'"):
        pair.dataset().splits()


def test_class_names_and_channels_come_from_the_json(tmp_path):
    def told(given, **content):
        (tmp_path / "d.json").write_text(
            json.dumps({"training": [{"image": "a", "label": "b"}], **content})
        )
        return describe_dataset("msd", str(tmp_path), "d.json", given)

    labels = {str(k): f"c{k}" for k in range(12)}  # by number, not by text
    assert told({}, labels=labels) == {"class_names": tuple(labels.values()), "in_channels": 1}
    for modality in ({"0": "T1", "1": "T2"}, ["T1", "T2"]):
        assert told({"class_names": ("a", "b")}, modality=modality) == {"in_channels": 2}
    assert told({"class_names": ("a", "b"), "in_channels": 0}, modality="CT") == {"in_channels": 1}
    assert told({"class_names": ("a", "b"), "in_channels": 3}) == {}
    for labels in (None, {"0": "a"}, {"0": "a", "2": "b"}, {"a": 0, "b": 1}, ["a", "b"]):
        with pytest.raises(DataError, match=r"d.json: 'labels' is .*expected a name for each id"):
            told({}, labels=labels)
    with pytest.raises(DataError, match=r"'modality' is \{\}; expected a name for each channel"):
        told({"class_names": ("a", "b")}, modality={})
    assert describe_dataset("msd", str(tmp_path), "absent.json", {"class_names": ("a", "b")}) == {
        "in_channels": 1
    }
    with pytest.raises(DataError, match="no such data list"):
        describe_dataset("msd", str(tmp_path), "absent.json", {})
    assert describe_dataset("brats", str(tmp_path), "absent.json", {})["in_channels"] == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"d\.json: not valid JSON"),
        (b"\xff\xfe\x00", r"d\.json: not valid JSON"),
        ("[]", r"d\.json: holds list; expected an object with a list 'training'"),
        (
            "{}",
            r"d\.json: the list 'training' is missing or empty; "
            r"expected entries with 'image' and 'label'",
        ),
        ('{"training": []}', r"d\.json: the list 'training' is missing or empty"),
        ('{"training": {"image": "a"}}', r"d\.json: the list 'training' is missing"),
        (
            '{"training": [{"label": "b"}]}',
            r"entry 0 of 'training' is .*expected .*imagesTr/x\.nii\.gz",
        ),
        ('{"training": ["a", 5]}', r"entry 1 of 'training' is 5; expected"),
        ('{"training": [{"image": []}]}', r"entry 0 of 'training' is"),
        ('{"training": [{"image": ["a", 1]}]}', r"entry 0 of 'training' is"),
        ('{"training": [{"image": "a", "label": ["b"]}]}', r"entry 0 of 'training' is"),
    ],
)
def test_bad_lists(tmp_path, content, message):
    path = tmp_path / "d.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + ".*" + message):
        read_datalist(tmp_path, "d.json")


def test_missing_list(tmp_path):
    flags = r"--opts data_root=FOLDER \(in test scripts --data-root FOLDER\)"
    with pytest.raises(DataError, match=rf"dataset\.json: no such data list; .*{flags}"):
        read_datalist(tmp_path, "dataset.json")


@pytest.mark.parametrize(
    "train, val, message",
    [
        ("a\n", "# nobody\n", r"val\.txt: the list is empty"),
        ("a\n", None, r"val\.txt: the val list is empty; expected at least one labelled case"),
        ("a\na\n", "b\n", r"train\.txt: listed twice: a"),
        (
            "a\nc\n",
            "b\n",
            r"train\.txt: 1 of 2 cases are not in the data list, for example 'c'; "
            r"names look like a, b",
        ),
        ("a\n", "a\n", r"'a' is in both the train and the val list"),
    ],
)
def test_bad_split_files(pair, train, val, message):
    lists = pair.root / "splits"
    lists.mkdir()
    for name, text in (("train", train), ("val", val)):
        if text is not None:
            (lists / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        pair.dataset(split_dir=str(lists)).splits()


def test_the_json_has_no_validation_list(folder):
    with pytest.raises(DataError, match=r"dataset\.json: the val list is empty; .*make_splits"):
        folder.add("training", "a").dataset().splits()


def test_one_case_in_two_lists(pair):
    pair.lists["validation"].append(pair.lists["training"][0])
    with pytest.raises(DataError, match=r"'a' is in both the train and the val list \("):
        pair.dataset().splits()


def test_one_file_in_two_lists_by_two_paths(tmp_path):
    scan = save(tmp_path / "x" / "scan.nii.gz", noise(0))
    (tmp_path / "y").symlink_to(tmp_path / "x")
    cases = Case("p", (scan,)), Case("q", (tmp_path / "y" / "scan.nii.gz",))
    with pytest.raises(
        DataError, match=r"'q' is in both the train and the test list \(.*scan\.nii\.gz\)"
    ):
        check_disjoint({"train": cases[:1], "test": cases[1:]})
    check_disjoint({"train": cases})


def test_one_content_under_two_names(pair):
    shutil.copy(pair.root / "imagesTr" / "a.nii.gz", pair.root / "imagesTr" / "b.nii.gz")
    dataset = pair.dataset()
    message = r"b\.nii\.gz: the same image as .*a\.nii\.gz \(train list\), here in the val list"
    with pytest.raises(DataError, match=message):
        dataset.prepare(dataset.splits())


# Files


def rewrite(path, change):
    """Store `change(voxels)` with the affine that was there."""
    image = nib.load(path)
    save(path, change(image.get_fdata()), image.affine, image.get_data_dtype())


def put(value):
    def change(voxels):
        voxels[1, 2, 3] = value
        return voxels

    return change


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def text(path):
    path.write_text("not a scan")


def other_affine(path):
    image = nib.load(path)
    moved = image.affine.copy()
    moved[0, 3] += 1.0
    save(path, image.get_fdata(), moved, np.uint8)


BAD_FILES = {
    "missing image": (
        "imagesTr",
        lambda path: path.unlink(),
        r"no such file; restore it or take the case out",
    ),
    "missing label": (
        "labelsTr",
        lambda path: path.unlink(),
        r"no such file; restore it or take the case out",
    ),
    "truncated image": ("imagesTr", truncate, r"unreadable or truncated \(.*copy the file again"),
    "text image": ("imagesTr", text, r"unreadable or truncated \(.*copy the file again"),
    "NaN": (
        "imagesTr",
        lambda path: rewrite(path, put(np.nan)),
        r"1 voxels are NaN or infinite; expected finite",
    ),
    "infinite": (
        "imagesTr",
        lambda path: rewrite(path, put(np.inf)),
        r"1 voxels are NaN or infinite",
    ),
    "constant": (
        "imagesTr",
        lambda path: rewrite(path, lambda v: 0 * v - 3),
        r"constant image \(every voxel is -3\)",
    ),
    "label shape": (
        "labelsTr",
        lambda path: rewrite(path, lambda v: v[:-1]),
        r"shape \(11, 10, 8\), but its image a\.nii\.gz has \(12, 10, 8\); "
        r"image and label must be on one grid",
    ),
    "label affine": (
        "labelsTr",
        other_affine,
        r"puts a corner 1\.00 mm away .*expected the same affine",
    ),
    "label id": (
        "labelsTr",
        lambda path: rewrite(path, put(7)),
        r"label ids \[7.*\]; expected only 0\.\.2; mend",
    ),
    "channels": (
        "imagesTr",
        lambda path: rewrite(path, lambda v: np.stack([v, v], -1)),
        r"2 channel\(s\) and shape \(12, 10, 8, 2\); expected 1 channel\(s\)",
    ),
    "slice": (
        "imagesTr",
        lambda path: rewrite(path, lambda v: v[..., 0]),
        r"shape \(12, 10\); expected .*a 3D scan",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_with_what_was_expected(pair, kind):
    place, spoil, message = BAD_FILES[kind]
    path = pair.root / place / "a.nii.gz"
    dataset = pair.dataset()
    splits = dataset.splits()
    spoil(path)
    start = r"1 of 1 labelled cases cannot be used:\s+" + re.escape(str(path))
    with pytest.raises(DataError, match=start + ".*" + message):
        dataset.prepare(splits)


def test_all_bad_files_are_reported_at_once(folder):
    for name in "abcd":
        folder.add("training", name)
    folder.add("validation", "z")
    dataset = folder.dataset()
    splits = dataset.splits()
    (folder.root / "imagesTr" / "a.nii.gz").unlink()
    truncate(folder.root / "imagesTr" / "c.nii.gz")
    with pytest.raises(
        DataError,
        match=r"(?s)2 of 4 labelled cases.*a\.nii\.gz: no such file.*c\.nii\.gz: unreadable",
    ):
        dataset.prepare(splits)


def test_truncated_at_any_length(tmp_path):
    path = save(tmp_path / "x.nii.gz", noise(0))
    whole = path.read_bytes()
    for length in [0, 1, 9, 100, *range(500, len(whole) - 8, 700)]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.nii\.gz: unreadable or truncated"):
            read_volume(path)
    path = save(tmp_path / "y.nii", noise(0))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"y\.nii: unreadable or truncated"):
        read_volume(path)
    (tmp_path / "z.nii.gz").write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(DataError, match=r"z\.nii\.gz: unreadable or truncated"):
        read_volume(tmp_path / "z.nii.gz")


def test_labels_that_are_no_ids(tmp_path):
    image = save(tmp_path / "image.nii.gz", noise(0))
    for value in (0.5, -1.0, np.nan):
        label = save(tmp_path / "label.nii.gz", put(value)(np.zeros(SHAPE)))
        with pytest.raises(DataError, match=r"label\.nii\.gz: label ids .*expected only 0, 1"):
            read_label(Case("a", (image,), label), (0, 1), SHAPE, AFFINES["RAS"])
    with pytest.raises(DataError, match="case 'a' has no label"):
        read_label(Case("a", (image,)), (0, 1), SHAPE, AFFINES["RAS"])


def test_channels_on_different_grids(tmp_path):
    first = save(tmp_path / "a.nii.gz", noise(0))
    for name, other in (
        ("b", save(tmp_path / "b.nii.gz", noise(1)[:-1])),
        ("c", save(tmp_path / "c.nii.gz", noise(1), AFFINES["LPS"])),
    ):
        with pytest.raises(
            DataError,
            match=rf"{name}\.nii\.gz: shape .* all channels of a case must be on one grid",
        ):
            read_image(Case("a", (first, other)), 2)


def test_a_nan_in_one_channel_names_its_file(tmp_path):
    files = [
        save(tmp_path / f"{k}.nii.gz", noise(k) if k != 1 else put(np.nan)(noise(1)))
        for k in range(3)
    ]
    with pytest.raises(DataError, match=r"/1\.nii\.gz: 1 voxels are NaN"):
        read_image(Case("a", tuple(files)), 3)


def found_of(dataset, case="a"):
    """Faults and words of the warnings about a case, as training and as prediction give them."""
    (case,) = dataset.find([case])
    trained = [(fault, found) for _, fault, found, *_ in dataset.preprocess(case)["warnings"]]
    predicted = [(f.fault, f.found) for f in dataset.read_file(case)["findings"]]
    return trained, predicted


def body(shape=SHAPE):
    """A scan in Hounsfield units: air, tissue, bone."""
    scan = np.where(blocks(shape) > 0, 60.0, -1000.0) + noise(3, shape)
    scan[4, 4, 4] = 700
    return scan


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hu: hu, None),
        (lambda hu: hu + 1024, "nothing is below -200"),
        (lambda hu: 255 * (hu + 1024) / 1800, "nothing is below -200"),
        (lambda hu: (hu + 1024) / 1800, "nothing is below -200"),
        (lambda hu: np.clip(hu, -175, 250), "nothing is below -200"),
        (lambda hu: hu - 1024, "nothing is above 300"),
        (lambda hu: 10 * hu, "most values are beyond those of a CT scan"),
        (lambda hu: np.where(hu < -900, -3024, hu), None),  # padding of some scanners
    ],
)
def test_scans_that_are_not_in_hounsfield_units(folder, change, message):
    folder.add("training", "a", change(body()))
    how = {"intensity": "window", "window": (-175.0, 250.0)}
    for found in found_of(folder.dataset(**how)):
        assert [fault for fault, _ in found] == ([] if message is None else ["range"])
        assert message is None or message in found[0][1]
    # a window of another unit, or none, says nothing of Hounsfield units
    for how in ({"intensity": "window", "window": (0.0, 100.0)}, {"intensity": "zscore"}):
        assert found_of(folder.dataset(**how)) == ([], [])


def test_a_scan_unlike_the_others_is_warned_of(folder):
    for name in "abcd":
        folder.add("training", name, body() if name != "c" else np.abs(body()))
    dataset = folder.dataset(intensity="window", window=(-175.0, 250.0))
    report = Report()
    dataset.prepare({"labelled": dataset.find("abcd")}, report, store=False)
    told = [(f.case, f.found) for f in report.findings if "lie below, in and above" in f.found]
    assert [case for case, _ in told] == ["c"]


def test_labels_that_cropping_cuts_off_are_warned_of(folder):
    scan, label = body(), blocks()
    scan[2:4] = -1000  # a part of the liver is air, as a lung is
    scan[:, 2:4][label[:, 2:4] == 1] = -1000
    folder.add("training", "a", scan, label)
    how = {"intensity": "window", "window": (-175.0, 250.0)}
    sample = folder.dataset(crop_foreground=True, **how)
    (case,) = sample.find(["a"])
    kept = sample.preprocess(case)["label"]
    lost = [100 * (1 - (kept == k).sum() / (label == k).sum()) for k in (1, 2)]
    assert lost[0] > 10 and lost[1] == 0
    ((fault, found),) = found_of(folder.dataset(crop_foreground=True, **how))[0]
    assert fault == "lost labels" and found.endswith(f": {lost[0]:.3g} % of 'liver'")
    assert found_of(folder.dataset(**how))[0] == []


def test_labels_that_resampling_loses_are_warned_of(folder):
    label = blocks()
    label[label == 2] = 0
    label[10, 8, 7] = 2  # one voxel of 9 mm3, on a grid of 8 mm
    folder.add("training", "a", label=label)
    assert found_of(folder.dataset(spacing=(2.0, 1.5, 3.0)))[0] == []
    ((fault, found),) = found_of(folder.dataset(spacing=(8.0, 8.0, 8.0)))[0]
    assert fault == "lost labels" and found.startswith("resampling to 8 x 8 x 8 mm loses")
    assert "100 % of 'spleen'" in found
    # one of several small structures that is met by a coarse voxel does not stand for the others
    label[::3, ::3, ::3][label[::3, ::3, ::3] == 0] = 2
    folder.add("training", "b", label=label)
    ((fault, found),) = found_of(folder.dataset(spacing=(8.0, 8.0, 8.0)), "b")[0]
    assert fault == "lost labels" and "'spleen'" in found


def test_what_survives_on_another_grid(folder):
    """Against the resampled label brought back to the stored grid, voxel by voxel."""
    folder.add("training", "a", affine=AFFINES["oblique"]).add("validation", "b")
    for spacing in ((2.0, 1.5, 3.0), (3.0, 3.0, 3.0), (1.0, 5.0, 2.0)):
        sample = folder.only(orientation="RAS", spacing=spacing)
        label = blocks()
        back = to_native(sample["label"][0], sample["affine"], AFFINES["oblique"], SHAPE)
        found = surviving(
            label, AFFINES["oblique"], sample["label"][0], sample["affine"], (1, 2, 9)
        )
        assert found.keys() == {1, 2}
        for k, share in found.items():
            assert share == pytest.approx((back[label == k] == k).mean(), abs=0.02)


def test_an_affine_that_places_nothing(folder):
    folder.add("training", "a").add("validation", "z")
    for place in ("imagesTr", "labelsTr"):
        path = folder.root / place / "a.nii.gz"
        image = nib.Nifti1Image(nib.load(path).get_fdata(dtype=np.float32), None)
        image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=1)
        nib.save(image, path)
    dataset = folder.dataset(orientation="RAS", spacing=(1.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"a\.nii\.gz.*affine"):
        dataset.prepare(dataset.splits())


# Arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"intensity": "minmax"},
            "intensity must be one of window, zscore, none, nnunet, got 'minmax'",
        ),
        ({"window": (250.0, -175.0)}, r"window must be two rising values, got \(250\.0, -175\.0\)"),
        ({"spacing": (1.0, 1.0)}, "spacing must be three positive values"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing must be three positive values"),
        *(
            ({"orientation": code}, f"orientation must name three axes, such as RAS, got '{code}'")
            for code in ("RA", "RAL", "XYZ", "ras", "RASS")
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        MSDDataset(str(tmp_path), "d.json", CLASSES, **arguments)


def test_every_orientation_is_accepted(tmp_path):
    for axes in itertools.permutations(("LR", "PA", "IS")):
        for code in itertools.product(*axes):
            MSDDataset(str(tmp_path), "d.json", CLASSES, orientation="".join(code))


def test_build_dataset(tmp_path):
    dataset = build_dataset("msd", root=str(tmp_path), datalist="d.json", class_names=CLASSES)
    assert (
        isinstance(dataset, MSDDataset)
        and dataset.num_classes == 3
        and dataset.allowed_ids == (0, 1, 2)
    )
    with pytest.raises(
        DataError, match=f"unknown data format 'dicom'; choose from .*{sorted(DATASETS)[-1]}"
    ):
        build_dataset("dicom")


# Patches


@pytest.mark.parametrize("crop", ["pos_neg", "uniform"])
@pytest.mark.parametrize("size", [(6, 6, 4), (16, 16, 16)])
def test_patches_of_a_cached_case(pair, crop, size):
    probabilities = {f"{name}_prob": 0.5 for name in ("flip", "rot90", "scale", "shift")}
    dataset = prepared(pair, patch_size=size, crop=crop, **probabilities)
    sample = dataset.read(dataset.splits()["labelled"][0])
    for seed in range(10):
        patch, again = (dataset.patch(sample, np.random.default_rng(seed)) for _ in range(2))
        assert patch["image"].shape == patch["label"].shape == (1, *size)
        assert patch["image"].dtype == np.float32 and patch["label"].dtype == np.uint8
        np.testing.assert_array_equal(patch["image"], again["image"])
        torch.from_numpy(np.ascontiguousarray(patch["image"]))


def test_patches_keep_image_and_label_together(folder):
    label = blocks()
    folder.add("training", "a", label * 5.0 + 1, label).add("validation", "z")
    dataset = folder.dataset(
        patch_size=(6, 6, 4), flip_prob=0.5, rot90_prob=0.5, scale_prob=0.0, shift_prob=0.0
    )
    sample = dataset.read(dataset.splits()["labelled"][0])
    for seed in range(30):
        patch = dataset.patch(sample, np.random.default_rng(seed))
        np.testing.assert_allclose(patch["image"], patch["label"] * 5.0 + 1)


def test_pos_neg_patches_see_foreground_more_often(folder):
    label = np.zeros((20, 20, 20), np.uint8)
    label[0, 0, 0] = 1
    folder.add("training", "a", noise(0, label.shape), label).add("validation", "z")
    share = {}
    for crop in ("pos_neg", "uniform"):
        dataset = folder.dataset(patch_size=(4, 4, 4), crop=crop)
        sample = dataset.read(dataset.splits()["labelled"][0])
        draws = [dataset.patch(sample, np.random.default_rng(seed)) for seed in range(300)]
        share[crop] = np.mean([patch["label"].any() for patch in draws])
    assert share["pos_neg"] == pytest.approx(0.5, abs=0.1) and share["uniform"] < 0.02


def test_patch_arguments(pair):
    with pytest.raises(DataError, match="crop must be one of pos_neg, uniform, got 'random'"):
        pair.dataset(crop="random")
    with pytest.raises(
        DataError, match=r"rot90_prob is 0\.2, but a patch of \(6, 4, 4\).*set rot90_prob: 0"
    ):
        pair.dataset(patch_size=(6, 4, 4))
    pair.dataset(patch_size=(6, 4, 4), rot90_prob=0.0)
    pair.dataset(patch_size=(4, 4, 6))
