"""nnU-Net v2 raw data sets: description, channels, regions, folds, and what is refused."""

import json

import nibabel as nib
import numpy as np
import pytest

from dataloaders import DataError, build_dataset, describe_dataset
from dataloaders.lists import read_json

SHAPE = (8, 9, 10)
PLAIN = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "b": 2, "a": 1},
    "file_ending": ".nii.gz",
}
REGIONS = PLAIN | {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "enhancing": 3},
    "regions_class_order": [2, 1, 3],
}


@pytest.fixture
def root(tmp_path):
    """Four training cases and one for the test, of two channels and the label ids 0..3."""
    rng = np.random.default_rng(0)
    for name, part in (("p_1", "Tr"), ("p_2", "Tr"), ("p_3", "Tr"), ("p_4", "Tr"), ("q", "Ts")):
        files = {
            f"images{part}/{name}_{k:04d}": rng.normal(size=SHAPE).astype(np.float32)
            for k in range(2)
        }
        files[f"labels{part}/{name}"] = rng.integers(0, 4, SHAPE).astype(np.uint8)
        for file, array in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{file}.nii.gz")
    folds = [
        {"train": ["p_1", "p_2"], "val": ["p_3", "p_4"]},
        {"train": ["p_3", "p_4", "p_1"], "val": ["p_2"]},
    ]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    return tmp_path


def make(root, content, **arguments):
    (root / "dataset.json").write_text(json.dumps(content))
    told = describe_dataset("nnunet", str(root), "dataset.json", {})
    fixed = {"datalist": "dataset.json", "cache_dir": str(root / "cache"), "intensity": "none"}
    return build_dataset(
        "nnunet", **{"root": str(root), **fixed, "crop_foreground": False} | told | arguments
    )


def names(cases):
    return [case.name for case in cases]


def test_names_come_by_id_and_lists_from_the_fold(root):
    dataset = make(root, PLAIN | {"labels": {"background": 0, "c": 3, "b": 2, "a": 1}})
    assert dataset.class_names == ("background", "a", "b", "c")
    assert (dataset.in_channels, dataset.num_classes, dataset.multilabel) == (2, 4, False)
    splits = dataset.splits()
    assert {split: names(cases) for split, cases in splits.items()} == {
        "labelled": ["p_1", "p_2"],
        "unlabelled": [],
        "val": ["p_3", "p_4"],
        "test": ["q"],
    }
    other = make(root, PLAIN | {"labels": {"background": 0, "c": 3, "b": 2, "a": 1}}, fold=1)
    assert names(other.splits()["val"]) == ["p_2"]
    sample = dataset.read(splits["labelled"][0])
    stored = [nib.load(root / f"imagesTr/p_1_{k:04d}.nii.gz").get_fdata() for k in range(2)]
    assert np.allclose(sample["image"], stored)
    assert names(dataset.find(["q", "p_2"])) == ["q", "p_2"]


def test_own_lists_win_over_the_folds(root):
    (root / "lists").mkdir()
    for split, chosen in (("train", ["p_4"]), ("val", ["p_1"])):
        (root / "lists" / f"{split}.txt").write_text("\n".join(chosen))
    dataset = make(root, REGIONS, split_dir=str(root / "lists"))
    assert {split: names(cases) for split, cases in dataset.splits().items()} == {
        "labelled": ["p_4"],
        "unlabelled": [],
        "val": ["p_1"],
        "test": [],
    }


def test_regions_overlap_and_come_back_as_ids(root):
    dataset = make(root, REGIONS)
    assert dataset.multilabel
    assert dataset.class_names == ("whole", "core", "enhancing")
    case = dataset.splits()["labelled"][0]
    ids = np.asarray(nib.load(case.label).dataobj)
    label = dataset.read(case)["label"]
    assert np.array_equal(label, [ids > 0, (ids == 1) | (ids == 3), ids == 3])
    assert np.array_equal(dataset.decode_prediction(label), ids)
    # Painted in the order of the regions, whatever they contain.
    odd = dataset.decode_prediction(np.array([0, 1, 1]).reshape(3, 1, 1, 1))
    assert odd.item() == 3
    assert dataset.structures() == {"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,)}
    # predictions may have ids of their own
    renamed = make(root, REGIONS | {"regions_class_order": [7, 8, 9]})
    assert renamed.structures() == {"whole": (7, 8, 9), "core": (8, 9), "enhancing": (9,)}
    assert np.array_equal(np.unique(renamed.decode_prediction(label)), [0, 7, 8, 9])
    assert dataset.id_names()[2] == "whole, the rest of it"
    assert np.array_equal(dataset.native_label(case)[0], label)
    assert dataset.read(case)["ids"] == [1, 2, 3]


def test_regions_have_a_cache_of_their_own(root):
    regions = make(root, REGIONS)
    case = regions.splits()["labelled"][0]
    assert regions.read(case)["label"].shape[0] == 3
    changed = REGIONS | {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [1], "enhancing": 3}
    }
    again = make(root, changed)
    assert not np.array_equal(again.read(case)["label"], regions.read(case)["label"])


def test_files_listed_in_the_json(root):
    entry = {
        "images": ["imagesTr/p_1_0000.nii.gz", "imagesTr/p_1_0001.nii.gz"],
        "label": "labelsTr/p_1.nii.gz",
    }
    dataset = make(root, REGIONS | {"dataset": {"scan": entry}})
    case, tested = dataset.cases()
    assert (case.name, case.images[1].name) == ("scan", "p_1_0001.nii.gz")
    assert tested.name == "q"
    with pytest.raises(DataError, match=r"case .scan. .* a list of 2"):
        make(root, REGIONS | {"dataset": {"scan": entry | {"images": ["a"]}}}).cases()
    for wrong, message in (
        ([entry], "'dataset' is list; expected an object"),
        ("x", "'dataset' is str; expected an object"),
        ({}, "'dataset' names no case"),
        ({"scan": entry | {"images": [1, 2]}}, "a list of 2"),
        ({"scan": entry | {"label": ["a"]}}, "a list of 2"),
        ({"scan": ["a"]}, "a list of 2"),
    ):
        with pytest.raises(DataError, match=message):
            make(root, REGIONS | {"dataset": wrong}).cases()


def test_folders_beside_files_listed_in_the_json(root):
    """imagesTs and imagesUn count where the list names the scans of training; none counts twice."""
    listed = {}
    for name, folder in (("p_1", "Tr"), ("p_2", "Tr"), ("p_3", "Tr"), ("u", "Un")):
        images = [f"images{folder}/{name}_{k:04d}.nii.gz" for k in range(2)]
        listed[name] = {"images": images, "label": f"labelsTr/{name}.nii.gz"}
    del listed["p_2"]["label"], listed["u"]["label"]
    (root / "imagesUn").mkdir()
    for name, folder in (("u", "Un"), ("v", "Un"), ("w", "Ts")):
        for k in range(2):
            copy = root / f"images{folder}/{name}_{k:04d}.nii.gz"
            copy.write_bytes((root / f"imagesTr/p_4_{k:04d}.nii.gz").read_bytes())
    (root / "lists").mkdir()
    for split, chosen in (("train", ["p_1", "p_2"]), ("val", ["p_3"]), ("test", ["q"])):
        (root / "lists" / f"{split}.txt").write_text("\n".join(chosen))
    for unlabelled, more in (("", []), ("test", ["w"])):
        arguments = {"split_dir": str(root / "lists"), "unlabelled": unlabelled}
        splits = make(root, REGIONS | {"dataset": listed}, **arguments).splits()
        assert names(splits["labelled"]) == ["p_1"] and names(splits["test"]) == ["q"]
        assert sorted(names(splits["unlabelled"])) == ["p_2", "u", "v", *more]


@pytest.mark.parametrize("part", ["Tr", "Un", "Ts"])
def test_channels_that_unlabelled_scans_lack(root, part):
    (root / f"images{part}").mkdir(exist_ok=True)
    source = root / "imagesTr/p_4_0001.nii.gz"
    (root / f"images{part}/new_0001.nii.gz").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match=rf"images{part}/new_0001.nii.gz: 'new' has the channels"):
        make(root, REGIONS, unlabelled="test").splits()


def test_json_is_read_as_strictly_as_yaml(root):
    path = root / "dataset.json"
    deep = "[" * 10**5 + "]" * 10**5
    for text, message in (
        ('{"labels": {"a": 1, "a": 2}}', "the key 'a' is there 2 times"),
        ('{"training": [1, 2], "training": [1]}', "the key 'training' is there 2 times"),
        (deep, "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ):
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(DataError, match=message):
            read_json(path)


def test_hidden_files_are_no_cases(root):
    for path in [*root.glob("*/p_*.nii.gz")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert names(make(root, PLAIN).cases()) == ["p_1", "p_2", "p_3", "p_4", "q"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": {"background": 0, "a": 2}}, r"ids \[0, 2\], expected 0 .background. to 1"),
        ({"labels": {"0": "background", "1": "a"}}, "names and ids are swapped, as in nnU-Net v1"),
        ({"labels": {"background": 0}}, "'labels' is"),
        ({"labels": {"background": 0, "a": []}}, "expected an id 0..255 or a list"),
        (
            {"labels": {"background": 0, "a": [1, 2], "b": [2]}},
            "'regions_class_order' is None, expected one id",
        ),
        (
            {"labels": {"background": 0, "a": [0, 1]}, "regions_class_order": [1]},
            "region 'a' holds the id 0",
        ),
        (
            {"labels": {"a": [1, 2], "b": [2]}, "regions_class_order": [1, 300]},
            r"is \[1, 300\], expected an id of its own for each region, of 1 to 255",
        ),
        (
            {"labels": {"a": [1, 2], "b": [2]}, "regions_class_order": [2, 2]},
            r"is \[2, 2\], expected an id of its own",
        ),
        (
            {"labels": {"a": [1, 2, 3], "b": [1, 2], "c": 1}, "regions_class_order": [1, 2, 3]},
            r"paints 'c' with 3, which labels have elsewhere; expected one of its own ids, \[1\]",
        ),
        ({"labels": {"background": 1, "a": 0}}, "the background as 1, expected 0"),
        ({"channel_names": {"1": "CT"}}, "counted from 0"),
        ({"file_ending": ".png"}, "'file_ending' is '.png', expected one of .nii.gz"),
    ],
)
def test_descriptions_that_are_refused(root, change, message):
    with pytest.raises(DataError, match=message):
        make(root, PLAIN | change)


def test_styles_that_are_told_apart(root):
    old = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "a"},
        "training": [],
        "numTraining": 0,
    }
    with pytest.raises(
        DataError, match=r"style of nnU-Net v1 and the decathlon .*format: msd.*convert"
    ):
        make(root, old)
    (root / "dataset.json").write_text(json.dumps(PLAIN))
    for keys in ({}, {"class_names": ("background", "a"), "in_channels": 0}):
        with pytest.raises(DataError, match=r"style of nnU-Net v2 .*format: nnunet"):
            describe_dataset("msd", str(root), "dataset.json", keys)


def test_files_that_are_missing(root):
    dataset = make(root, REGIONS)
    (root / "imagesTr/p_2_0001.nii.gz").rename(root / "imagesTr/p_2.nii.gz")
    with pytest.raises(
        DataError,
        match=r"p_2_0001.nii.gz: no such file, expected for labelsTr/p_2.*lacks the channel",
    ):
        dataset.splits()
    (root / "splits_final.json").unlink()
    (root / "labelsTr/p_2.nii.gz").unlink()
    with pytest.raises(
        DataError, match="no such list of folds; copy nnU-Net's there, or draw lists"
    ):
        dataset.splits()
    with pytest.raises(DataError, match="one id for each"):
        make(root, REGIONS, regions_class_order=(1,))


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "0 folds, counted from 0; fold is 0"),
        ("{}", "holds dict; expected a list of folds"),
        ('[{"train": ["p_1"]}]', "fold 0 has no list of case names 'val'"),
        (
            '[{"train": ["p_1"], "val": ["zz"]}]',
            "1 of 1 cases are not in the data list, for example 'zz'",
        ),
    ],
)
def test_folds_that_are_refused(root, content, message):
    (root / "splits_final.json").write_text(content)
    with pytest.raises(DataError, match=message):
        make(root, REGIONS).splits()


def test_unlabelled_test_scans_are_not_scored(root):
    (root / "labelsTs/q.nii.gz").rename(root / "labelsTs/r.nii.gz")
    for k in range(2):
        image = root / f"imagesTs/q_{k:04d}.nii.gz"
        (root / f"imagesTs/r_{k:04d}.nii.gz").write_bytes(image.read_bytes())
    dataset = make(root, REGIONS, unlabelled="test")
    splits = dataset.splits()
    assert names(splits["test"]) == names(dataset.own_test()) == ["r"]
    assert "q" in names(splits["unlabelled"])


def test_an_unlabelled_scan_of_a_training_name_is_refused(root):
    (root / "imagesUn").mkdir()
    for k in range(2):
        image = root / f"imagesTr/p_2_{k:04d}.nii.gz"
        (root / f"imagesUn/{image.name}").write_bytes(image.read_bytes())
    with pytest.raises(DataError, match=r"imagesUn/p_2.*an unlabelled scan with"):
        make(root, REGIONS).splits()
