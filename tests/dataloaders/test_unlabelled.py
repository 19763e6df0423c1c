"""Cases without labels in decathlon-style data sets: DICOM series, names that occur twice."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dataloaders import Case, DataError, Report
from dataloaders.checks import check_spacings
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


def test_voxel_sizes_of_cases_without_labels():
    """They are held against the cases with labels, wherever those are listed; these are let be."""

    def errors(size, ids=None):
        cases = {("labelled", "a"): (1.0, [0, 1]), ("val", "b"): (3.0, [0])}
        cases |= {("unlabelled", "c"): (40.0, [1]), ("unlabelled", "u"): (size, ids)}
        del cases["unlabelled", "c" if ids is None else "u"]
        facts = {
            (split, Case(name, (Path(f"{name}.nii"),))): {"ids": found, "spacing": [mm, 2.0, mm]}
            for (split, name), (mm, found) in cases.items()
        }
        report = Report()
        check_spacings(facts, report)
        return [str(finding) for finding in report.errors]

    assert errors(0.6) == errors(6.0) == errors(40.0, ids=[1]) == []
    (error,) = errors(0.4)
    assert error.startswith("u.nii: voxels of 0.4 x 2 x 0.4 mm; expected about those of the")
    assert "labelled cases, 1 x 2 x 1 to 3 x 2 x 3 mm; set spacing" in error
    assert len(errors(6.1)) == 1
