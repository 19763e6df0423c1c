"""Cases without labels in decathlon-style data sets: DICOM series, names that occur twice."""

import shutil

import numpy as np
import pytest

from dataloaders import Case, DataError
from tests.dataloaders.test_msd import AFFINES, SHAPE, Folder, noise
from tests.dataloaders.test_volumes import write_dicom


def test_dicom_series_without_labels(tmp_path):
    """A folder, or one file that stands for its series: cached once, anew when a slice changes."""
    voxels = noise(0, SHAPE) * 100
    write_dicom(tmp_path / "more/p1", voxels, AFFINES["RAS"])
    folder = Folder(tmp_path).add("training", "a").add("validation", "b")
    dataset = folder.dataset(unlabelled=str(tmp_path / "more"), intensity="zscore")
    splits = dataset.splits()
    (case,) = splits["unlabelled"]
    assert case.images[0].is_dir()
    dataset.prepare(splits)
    stored = list((tmp_path / "cache").glob("p1-*"))
    assert len(stored) == 1
    before = np.array(dataset.sample(case)["image"])
    assert before.shape == (1, *SHAPE) and list((tmp_path / "cache").glob("p1-*")) == stored
    slices = sorted((tmp_path / "more/p1").iterdir())
    alone = Case("p2", (slices[0],))
    assert np.array_equal(dataset.sample(alone)["image"], before)
    changed = voxels.copy()
    changed[..., -1] += 50
    write_dicom(tmp_path / "more/p1", changed, AFFINES["RAS"])
    for again in (case, alone):
        assert not np.array_equal(dataset.sample(again)["image"], before)
    shutil.rmtree(tmp_path / "more/p1")
    with pytest.raises(DataError, match="p1: no such file"):
        dataset.sample(case)


@pytest.mark.parametrize("first", ["training", "test"])
def test_a_nameless_test_scan_does_not_replace_the_training_case_of_its_name(tmp_path, first):
    folder = Folder(tmp_path).add("training", "a").add("validation", "b")
    lists = folder.lists | {"test": ["imagesTs/a.nii.gz"]}
    folder.lists = dict(sorted(lists.items(), key=lambda item: item[0] != first))
    shutil.copytree(tmp_path / "imagesTr", tmp_path / "imagesTs")
    (case,) = folder.dataset().splits()["labelled"]
    assert case.label and case.images[0].parent.name == "imagesTr"
    with pytest.raises(DataError, match=r"imagesTs/a.nii.gz: an unlabelled scan with the name of"):
        folder.dataset(unlabelled="test").splits()
