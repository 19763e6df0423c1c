"""Labels that are not complete, as each format reads them: voxels that nobody labelled, classes
that were not annotated, and settings that do not fit the data.
"""

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

import metrics
from dataloaders import DataError, Report, describe_dataset
from dataloaders.acdc import ACDCDataset
from dataloaders.cases import UNKNOWN
from dataloaders.samplers import PatchDataset, collate
from losses import incomplete
from methods import base
from tests.dataloaders import test_acdc, test_brats, test_images2d, test_la, test_nnunet
from tests.dataloaders.test_msd import Folder, blocks
from tests.dataloaders.test_nnunet import root as nnunet_root  # noqa: F401 - a fixture


def marked(shape=(12, 10, 8), ignore=9):
    """Two blocks of classes and a slab that nobody labelled, which covers part of them."""
    label = blocks(shape)
    label[:, :4] = ignore
    return label


def folder_of(tmp_path, *entries, **arguments):
    """Cases a, b, ... in training, z in validation; entries: of each what it has besides."""
    folder = Folder(tmp_path)
    for name, more in zip("abcdef", entries):
        folder.add("training", name, label=more.pop("voxels", None))
        folder.lists["training"][-1] |= more
    folder.add("validation", "z", label=arguments.pop("val", None))
    return folder.dataset(patch_size=(8, 8, 8), rot90_prob=0.0, **arguments)


def views_of(dataset, sample, seed=0):
    """Labels of a patch and of a weak view."""
    rng = np.random.default_rng(seed)
    return dataset.patch(sample, rng)["label"], dataset.views(sample, rng, 1)["label"]


def test_the_reserved_id_is_one():
    assert UNKNOWN == incomplete.UNKNOWN == base.UNKNOWN == metrics.UNKNOWN


@pytest.mark.parametrize("spacing", [(), (3.0, 3.0, 3.0)])
def test_scans(tmp_path, spacing):
    dataset = folder_of(tmp_path, {"voxels": marked()}, {}, ignore_label=9, spacing=spacing)
    assert dataset.incomplete
    splits, report = dataset.splits(), Report()
    dataset.prepare(splits, report)
    assert not report.errors
    case, complete = splits["labelled"]
    sample = dataset.read(case)
    label = np.array(sample["label"])
    assert set(np.unique(label)) == {0, 1, 2, UNKNOWN}
    if not spacing:
        assert np.array_equal(label[0] == UNKNOWN, marked() == 9)
        assert report.unknown == {"labelled": [pytest.approx(0.4), 0.0], "val": [0.0]}
    for kind, wanted in (("foreground", {1, 2}), ("background", {0})):
        assert set(np.unique(label.ravel()[sample[kind]])) == wanted
    native, _ = dataset.native_label(case)
    assert np.array_equal(native, np.where(marked() == 9, UNKNOWN, marked()))
    for seen in views_of(dataset, sample):
        assert UNKNOWN in seen and set(np.unique(seen)) <= {0, 1, 2, UNKNOWN}
    # without the key such a label is an error, and what is cached does not hide it
    other = folder_of(tmp_path, {"voxels": marked()}, {}, spacing=spacing)
    with pytest.raises(DataError, match=r"a.nii.gz: label ids \[9\]; expected only 0..2"):
        other.prepare(other.splits())
    assert UNKNOWN not in dataset.read(complete)["label"]


def test_which_classes_a_label_tells(tmp_path):
    label = blocks()
    label[label == 2] = 0
    partial = {"voxels": label, "labelled_classes": ["liver"]}
    dataset = folder_of(
        tmp_path, partial, {}, {}, labelled_classes={"b": [1, 2], "z": ["spleen", 0]}
    )
    with pytest.raises(DataError, match=r"z.nii.gz: it has 'liver', which labelled_classes"):
        dataset.prepare(dataset.splits())
    dataset = folder_of(
        tmp_path, {**partial, "voxels": label}, {}, {}, labelled_classes={"[bz]": [2, 1]}
    )
    splits = dataset.splits()
    dataset.prepare(splits)
    told = [dataset.annotated(case).tolist() for case in splits["labelled"] + splits["val"]]
    assert told == [[True, True, False], *[[True, True, True]] * 3] and dataset.incomplete
    patches = PatchDataset(
        splits["labelled"], dataset.sample, dataset.patch, 0, 2, annotated=dataset.annotated
    )
    batch = collate([patches[0, 0], patches[1, 2]])
    assert batch["annotated"].dtype == torch.bool and batch["annotated"].tolist() == [
        *[told[0]] * 2,
        *[told[2]] * 2,
    ]
    complete = folder_of(tmp_path, {}, {})
    assert not complete.incomplete and complete.annotated(complete.splits()["val"][0]).all()


def test_nnunet_classes_and_regions(nnunet_root):  # noqa: F811
    path = nnunet_root / "labelsTr/p_1.nii.gz"
    stored = np.asarray(nib.load(path).dataobj)
    labels = {"background": 0, "a": 1, "b": 2, "ignore": 3}
    dataset = test_nnunet.make(nnunet_root, test_nnunet.PLAIN | {"labels": labels})
    assert (dataset.class_names, dataset.ignore_label) == (("background", "a", "b"), 3)
    (case, _), *_ = dataset.splits().values()
    expected = np.where(stored == 3, UNKNOWN, stored)
    assert np.array_equal(dataset.read(case)["label"][0], expected)

    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    change = {"labels": labels, "regions_class_order": [1, 2]}
    told = {"labelled_classes": {"p_1": ["core"]}}
    dataset = test_nnunet.make(nnunet_root, test_nnunet.PLAIN | change, **told)
    splits = dataset.splits()
    case = splits["labelled"][0]
    label = np.array(dataset.read(case)["label"])
    assert label.shape[0] == 2 and ((label == UNKNOWN) == (stored == 3)).all()
    assert np.array_equal(label[1] == 1, stored == 2)
    assert dataset.annotated(case).tolist() == [False, True]
    assert dataset.annotated(splits["val"][0]).all()
    dataset.prepare(splits)  # a voxel of the core is one of the whole too, of which this is a part
    other = test_nnunet.make(
        nnunet_root, test_nnunet.PLAIN | change, labelled_classes={"p_1": ["whole"]}
    )
    with pytest.raises(DataError, match=r"p_1.nii.gz: it has 'core', which labelled_classes"):
        other.prepare(splits)
    with pytest.raises(DataError, match=r"expected a list of names of \['whole', 'core'\]"):
        test_nnunet.make(nnunet_root, test_nnunet.PLAIN | change, labelled_classes={"p_1": [1]})


def test_brats_regions(tmp_path):
    rng = np.random.default_rng(0)
    entries = [
        test_brats.write_case(tmp_path, f"case{k}", rng, ids=(0, 1, 2, 3, 5)) for k in range(2)
    ]
    lists = {"training": entries[:1], "validation": entries[1:]}
    (tmp_path / "dataset_0.json").write_text(json.dumps(lists))
    dataset = test_brats.make(tmp_path, ignore_label=5, **test_brats.PLAIN)
    splits = dataset.splits()
    dataset.prepare(splits)
    (case,) = splits["labelled"]
    stored = np.asarray(nib.load(tmp_path / entries[0]["label"]).dataobj)
    label = dataset.read(case)["label"]
    assert ((label == UNKNOWN) == (stored == 5)).all()
    assert np.array_equal(label[1] == 1, np.isin(stored, (1, 2, 3)))
    patch = dataset.patch(dataset.sample(case), np.random.default_rng(0))["label"]
    assert patch.shape[0] == 3 and set(np.unique(patch)) == {0, 1, UNKNOWN}
    assert ((patch == UNKNOWN).all(0) == (patch == UNKNOWN).any(0)).all()


def test_hdf5_volumes_and_slices(tmp_path):
    image, label = test_la.scan(0)
    test_la.build(tmp_path / "la")
    label[:4] = 7
    test_la.save(tmp_path / "la/D/mri_norm2.h5", image, label)
    dataset = test_la.LADataset(
        str(tmp_path / "la"), str(tmp_path / "la/splits"), (8, 8, 6), ignore_label=7
    )
    splits = dataset.splits(2)
    dataset.prepare(splits)
    sample = dataset.sample(splits["labelled"][0])
    assert ((sample["label"][0] == UNKNOWN) == (label == 7)).all()
    seen = np.stack([views_of(dataset, sample, seed) for seed in range(5)])
    assert UNKNOWN in seen and 7 not in seen

    for seed, name in enumerate(("p1", "p2")):
        planes, ids = test_acdc.volume(seed, 3)
        ids[1] = 4  # a slice that nobody labelled
        test_acdc.save(tmp_path / f"acdc/data/{name}_frame01.h5", planes, ids)
    for split, name in (("train", "p1"), ("val", "p2")):
        (tmp_path / f"acdc/{split}.txt").write_text(name)
    dataset = ACDCDataset(str(tmp_path / "acdc"), str(tmp_path / "acdc"), (16, 16), ignore_label=4)
    splits, report = dataset.splits(), Report()
    dataset.prepare(splits, report)
    assert not report.errors
    assert report.unknown["labelled"] == [0.0, 1.0, 0.0]
    labels = [dataset.sample(case)["label"] for case in splits["labelled"]]
    assert [(ids == UNKNOWN).mean() for ids in labels] == [0.0, 1.0, 0.0]
    volume = dataset.read(splits["val"][0])["label"]
    assert (volume[..., 1] == UNKNOWN).all() and UNKNOWN not in volume[..., 0]
    turned = [
        dataset.patch(dataset.sample(splits["labelled"][1]), np.random.default_rng(k))
        for k in range(6)
    ]
    assert all(set(np.unique(patch["label"])) <= {0, UNKNOWN} for patch in turned)


def test_masks_of_images(tmp_path):
    test_images2d.add(tmp_path, "train", ["a", "b"])
    test_images2d.add(tmp_path, "val", ["v"], first=5)
    mask = test_images2d.mask_of(0)
    mask[:, :9] = 128
    test_images2d.save(tmp_path / "train/masks/a.png", mask)
    dataset = test_images2d.dataset(tmp_path, ignore_label=128)
    splits = dataset.splits()
    dataset.prepare(splits)
    label = dataset.read(splits["labelled"][0])["label"]
    assert ((label[0] == UNKNOWN) == (mask == 128)).all() and set(np.unique(label)) == {
        0,
        1,
        UNKNOWN,
    }
    for seen in views_of(dataset, dataset.sample(splits["labelled"][0])):
        assert set(np.unique(seen)) == {0, 1, UNKNOWN}
    test_images2d.save(tmp_path / "train/masks/b.png", np.full_like(test_images2d.mask_of(1), 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # shares of no pixels are nothing to divide
        test_images2d.dataset(tmp_path, ignore_label=128).prepare(splits)
    test_images2d.save(tmp_path / "train/masks/b.png", test_images2d.mask_of(1))
    other = test_images2d.dataset(tmp_path)
    with pytest.raises(DataError, match=r"values \[128\] in .* of the pixels"):
        other.prepare(other.splits())
    test_images2d.save(tmp_path / "train/masks/a.jpg", mask)
    (tmp_path / "train/masks/a.png").unlink()
    dataset = test_images2d.dataset(tmp_path, ignore_label=128)
    with pytest.raises(DataError, match="a JPEG, whose values are not exact, with ignore_label"):
        dataset.prepare(dataset.splits())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"ignore_label": 2},
            "ignore_label: 2 is also the id of the class 'spleen'; expected an id",
        ),
        ({"ignore_label": 0}, "ignore_label: 0 is also the id of the class 'background'"),
        (
            {"labelled_classes": {"a": ["lung"]}},
            "labelled_classes of 'a': 'lung', which is none; exp",
        ),
        (
            {"labelled_classes": {"a": [3]}},
            "labelled_classes of 'a': 3, which is none; expected a list",
        ),
        ({"labelled_classes": {"a": [True]}}, "labelled_classes of 'a': True, which is none"),
        ({"labelled_classes": {"a": [1.0]}}, "labelled_classes of 'a': 1.0, which is none"),
        ({"labelled_classes": {"a": [0]}}, "labelled_classes of 'a': 'background' alone; expected"),
        (
            {"labelled_classes": {"a": []}},
            r"labelled_classes of 'a': \[\]; expected a list of names",
        ),
        ({"labelled_classes": {"a": "liver"}}, "labelled_classes of 'a': 'liver'; expected a list"),
        (
            {"labelled_classes": {"amos_*": [1]}},
            r"no case fits the pattern 'amos_\*'; names look like",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        folder_of(tmp_path, {}, {}, **arguments).splits()


@pytest.mark.parametrize(
    "classes, message",
    [
        ([4], "labelled_classes of case 'a': 4, which is none"),
        ([], r"dataset.json: 'labelled_classes' of 'a' is \[\]; expected a list of names or ids"),
        ({"liver": 1}, "dataset.json: 'labelled_classes' of 'a' is {'liver': 1}"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, classes, message):
    with pytest.raises(DataError, match=message):
        folder_of(tmp_path, {"labelled_classes": classes}, {}).splits()


def test_data_that_do_not_fit(tmp_path, nnunet_root):  # noqa: F811
    dataset = folder_of(tmp_path, {}, val=np.full((12, 10, 8), 9), ignore_label=9)
    with pytest.raises(DataError, match=r"z.nii.gz: every voxel is marked as not labelled"):
        dataset.prepare(dataset.splits())
    for labels in (
        {"background": 0, "a": 1, "ignore": 1},
        {"background": 0, "a": [1], "ignore": 0},
    ):
        change = {"labels": labels, "regions_class_order": [1]}
        with pytest.raises(DataError, match=r"'labels' has 'ignore': ., which is also '"):
            test_nnunet.make(nnunet_root, test_nnunet.PLAIN | change)
    labels = {"background": 0, "a": 1, "ignore": [3]}
    with pytest.raises(DataError, match=r"'ignore': \[3\]; expected one id of no class"):
        test_nnunet.make(nnunet_root, test_nnunet.PLAIN | {"labels": labels})
    labels = {"background": 0, "a": [1, 255], "b": [255], "ignore": 3}
    change = {"labels": labels, "regions_class_order": [1, 255]}
    with pytest.raises(DataError, match="ignore_label: 3, but 255 is the id of a class; labels"):
        test_nnunet.make(nnunet_root, test_nnunet.PLAIN | change)
    given = {"ignore_label": 0}  # background, which is refused, and not taken for none
    assert "ignore_label" not in describe_dataset("nnunet", str(nnunet_root), "dataset.json", given)
    with pytest.raises(DataError, match="ignore_label: 4 is also the id of a class"):
        test_brats.make(tmp_path, ignore_label=4)
    with pytest.raises(DataError, match="ignore_label: 255 is also the id of a class; expected"):
        test_images2d.dataset(tmp_path, ignore_label=255)
    with pytest.raises(DataError, match="ignore_label: 300 is no grey value"):
        test_images2d.dataset(tmp_path, ignore_label=300)
