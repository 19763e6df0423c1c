"""What counts as a scan in a file or folder: channel files, series, names."""

import numpy as np
import pytest

from dataloaders.brats import BraTSDataset
from dataloaders.lists import find_images, find_scans
from dataloaders.volumes import DataError, channel_number
from tests.dataloaders.test_msd import AFFINES
from tests.dataloaders.test_volumes import write_dicom


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def whole(name):
    """channel_of of a network with one channel."""
    return None


def shown(found, root):
    cases, problems = found
    return {case.name: [str(p.relative_to(root)) for p in case.images] for case in cases}, problems


def test_folder_and_file_of_whole_scans(tmp_path):
    touch(tmp_path, "b.nii.gz", "a.mha", "notes.txt", ".hidden.nii.gz", "c_0000.nii", "sub/d.nrrd")
    assert shown(find_scans(tmp_path, 1, whole), tmp_path) == (
        {"a": ["a.mha"], "b": ["b.nii.gz"], "c_0000": ["c_0000.nii"]},
        [],
    )
    assert shown(find_scans(tmp_path / "b.nii.gz", 1, whole), tmp_path) == ({"b": ["b.nii.gz"]}, [])
    assert shown(find_scans(tmp_path / "sub", 1, whole), tmp_path) == ({"d": ["sub/d.nrrd"]}, [])


def test_channel_files_belong_together(tmp_path):
    touch(tmp_path, "x_0001.nii.gz", "x_0000.nii.gz", "y_0000.nii.gz", "z.nii.gz")
    found, problems = shown(find_scans(tmp_path, 2, channel_number), tmp_path)
    assert found == {"x": ["x_0000.nii.gz", "x_0001.nii.gz"], "z": ["z.nii.gz"]}
    assert len(problems) == 1
    assert str(problems[0]) == (
        f"{tmp_path / 'y_0000.nii.gz'}: 'y' has the channels [0], as its file names say; expected "
        "2, counted from 0: [0, 1]; add the missing files or remove the scan"
    )
    one = shown(find_scans(tmp_path / "x_0001.nii.gz", 2, channel_number), tmp_path)
    assert one == ({"x": ["x_0000.nii.gz", "x_0001.nii.gz"]}, [])


@pytest.mark.parametrize(
    "names",
    [
        ("BraTS-1-t1c", "BraTS-1-t1n", "BraTS-1-t2f", "BraTS-1-t2w"),
        ("BraTS_1_t1ce", "BraTS_1_t1", "BraTS_1_flair", "BraTS_1_t2"),
    ],
)
@pytest.mark.parametrize("folder", ["", "BraTS-1/"])
def test_brats_names_give_the_order(tmp_path, names, folder):
    dataset = BraTSDataset(root="", datalist="")
    files = [f"{folder}{name}.nii.gz" for name in names]
    touch(tmp_path, *files, f"{folder}{names[0][:7]}-seg.nii.gz")
    assert shown(find_scans(tmp_path, 4, dataset.channel_of), tmp_path) == (
        {names[0][:7]: files},
        [],
    )


def test_dicom_folders(tmp_path):
    voxels = np.zeros((4, 4, 3))
    write_dicom(tmp_path / "in/p1", voxels, AFFINES["LPS"], number=1)
    write_dicom(tmp_path / "in/p2", voxels, AFFINES["LPS"], number=2)
    assert shown(find_scans(tmp_path / "in", 1, whole), tmp_path) == (
        {"p1": ["in/p1"], "p2": ["in/p2"]},
        [],
    )
    assert shown(find_scans(tmp_path / "in/p1", 1, whole), tmp_path) == ({"p1": ["in/p1"]}, [])
    file = next((tmp_path / "in/p1").glob("*.dcm"))
    assert shown(find_scans(file, 1, whole), tmp_path)[0] == {
        "p1": [str(file.relative_to(tmp_path))]
    }


def test_nothing_there_and_names_twice(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_scans(tmp_path / "absent", 1, whole)
    with pytest.raises(DataError, match="no scan or image"):
        find_scans(tmp_path, 1, whole)
    touch(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(DataError, match=r"a.nii.gz: called 'a' as .*/a.nii is; expected a name"):
        find_scans(tmp_path, 1, whole)
    touch(tmp_path, "p/a.png", "p/b.JPG", "p/c.txt")
    assert [case.name for case in find_images(tmp_path / "p", (".jpg", ".png"))] == ["a", "b"]
    touch(tmp_path, "p/a.jpg")
    with pytest.raises(DataError, match=r"a.png: called 'a' as .*/p/a.jpg is"):
        find_images(tmp_path / "p", (".jpg", ".png"))
    with pytest.raises(DataError, match="no scan or image"):
        find_images(tmp_path / "p", (".bmp",))
