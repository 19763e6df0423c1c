"""What counts as a scan in a file or folder: channel files, series, names."""

import json
import unicodedata

import numpy as np
import pytest

from dataloaders.brats import BraTSDataset
from dataloaders.cases import Case
from dataloaders.checks import check_size
from dataloaders.faults import Report
from dataloaders.lists import find_images, find_scans, read_datalist, read_split, select
from dataloaders.volumes import DataError, as_stored, channel_number
from tests.dataloaders.test_msd import AFFINES
from tests.dataloaders.test_volumes import DOSE, noise_of, stack, write_dicom, write_file


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


def test_warnings_of_scans_to_be_segmented_name_the_others(tmp_path):
    """No list has them, so tools/check_data.py cannot."""
    spoken = {}
    for split in ("", "train"):
        report = Report()
        for name in "abc":
            case = Case(name, (str(tmp_path / f"{name}.nii.gz"),))
            check_size(case, split, (20, 20, 4), (16, 16, 8), report)
        (spoken[split],) = report.spoken_warnings(of_training=bool(split))
    assert "a.nii.gz: 20 x 20 x 4 voxels" in spoken[""]
    assert "padded with zeros; check its voxel size" in spoken[""]
    assert spoken[""].endswith("(the same of b.nii.gz, c.nii.gz)")
    assert "2 more like it; tools/check_data.py lists them" in spoken["train"]


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


def test_a_folder_per_case_names_it_where_files_have_one_name(tmp_path):
    for case in ("c1", "c2"):
        touch(tmp_path / "kits" / case, "imaging.nii.gz", "segmentation.nii.gz")
        touch(tmp_path / "total" / case, "ct.nii.gz", "segmentations/liver.nii.gz")
        touch(tmp_path / "la" / case, "lgemri.nrrd", "laendo.nrrd")
        touch(tmp_path / "two" / case, "t1.nii.gz", "t2.nii.gz")
        touch(tmp_path / "channels" / case, "x_0000.nii.gz", "x_0001.nii.gz")
    for folder, file in (("kits", "imaging.nii.gz"), ("total", "ct.nii.gz"), ("la", "lgemri.nrrd")):
        found, problems = shown(find_scans(tmp_path / folder, 1, whole), tmp_path / folder)
        assert (found, problems) == ({case: [f"{case}/{file}"] for case in ("c1", "c2")}, [])
    found, _ = shown(find_scans(tmp_path / "two", 1, whole), tmp_path)
    assert list(found) == ["c1_t1", "c1_t2", "c2_t1", "c2_t2"]
    found, _ = shown(find_scans(tmp_path / "channels", 2, channel_number), tmp_path)
    assert list(found) == ["c1", "c2"]


def test_hidden_files_are_no_cases(tmp_path):
    touch(tmp_path, "a.nii.gz", "._a.nii.gz", ".DS_Store", ".a.nii.gz.swp")
    assert list(shown(find_scans(tmp_path, 1, whole), tmp_path)[0]) == ["a"]
    touch(tmp_path, "f/one/b.nii.gz", "f/one/._b.nii.gz", "f/__MACOSX/._b.nii.gz", "f/.x/c.nii.gz")
    assert list(shown(find_scans(tmp_path / "f", 1, whole), tmp_path)[0]) == ["b"]
    touch(tmp_path, "p/a.png", "p/._a.png")
    assert [case.name for case in find_images(tmp_path / "p", (".png",))] == ["a"]


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    voxels = np.zeros((4, 4, 3))
    write_dicom(tmp_path / "anna", voxels, AFFINES["LPS"])
    write_dicom(tmp_path / "bert", voxels, AFFINES["LPS"], number=2)
    write_file(tmp_path / "bert/dose.dcm", noise_of(1), stack(1), sop=DOSE)
    (tmp_path / "carl").mkdir()
    (tmp_path / "carl/a.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 50)
    touch(tmp_path, "dora/x_0001.nii.gz")
    found, problems = shown(find_scans(tmp_path, 1, channel_number), tmp_path)
    assert list(found) == ["anna", "bert"]
    assert len(problems) == 1 and "'x' has the channels [1]" in str(problems[0])
    touch(tmp_path, "e/a.nii.gz", "e/b\n.nii.gz", "p/a.png", "p/b\t.png")
    found, problems = shown(find_scans(tmp_path / "e", 1, whole), tmp_path)
    assert (
        list(found) == ["a"]
        and len(problems) == 1
        and "expected a plain file name" in str(problems[0])
    )
    problems = []
    assert [case.name for case in find_images(tmp_path / "p", (".png",), problems)] == ["a"]
    assert len(problems) == 1 and "expected a plain file name" in str(problems[0])


def test_names_are_the_same_however_their_letters_are_composed(tmp_path):
    whole, apart = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    assert Case(apart, ()).name == Case(whole, ()).name == whole
    touch(tmp_path, f"{apart}/{apart}.nii.gz")
    assert as_stored(tmp_path / whole / f"{whole}.nii.gz").is_file()
    assert list(shown(find_scans(tmp_path, 1, lambda name: None), tmp_path)[0]) == [whole]
    (tmp_path / "train.txt").write_text(f"{apart}\n", encoding="utf-8")
    assert read_split(tmp_path, "train") == [whole]
    (tmp_path / "d.json").write_text(
        json.dumps({"training": [{"image": f"{whole}/{whole}.nii.gz"}]}), encoding="utf-8"
    )
    (case,) = read_datalist(tmp_path, "d.json")["training"]
    assert case.name == whole and case.images[0].is_file()
    assert select([case], [apart], "list") == [case]


def test_data_lists_of_folders_and_of_windows(tmp_path):
    entries = [
        {"image": f"{case}/imaging.nii.gz", "label": f"{case}/segmentation.nii.gz"}
        for case in ("c1", "c2", "c3")
    ]
    content = {"training": entries[:2], "test": entries[2:]}
    (tmp_path / "d.json").write_text(json.dumps(content))
    sections = read_datalist(tmp_path, "d.json")
    names = {section: [case.name for case in cases] for section, cases in sections.items()}
    assert names == {"training": ["c1", "c2"], "test": ["c3"]}
    # the same file twice is no second case
    (tmp_path / "d.json").write_text(json.dumps({"training": entries[:1], "test": entries[:1]}))
    assert [c.name for cases in read_datalist(tmp_path, "d.json").values() for c in cases] == [
        "imaging",
        "imaging",
    ]
    # nor do two folders of a split name the cases in them
    parts = [{"image": f"images{part}/{name}.nii.gz"} for part in ("Tr", "Ts") for name in "ab"]
    (tmp_path / "d.json").write_text(json.dumps({"training": parts[:2], "test": parts[2:]}))
    assert [c.name for c in read_datalist(tmp_path, "d.json")["test"]] == ["a", "b"]
    windows = json.dumps({"training": entries[:1]}).replace("/", "\\\\")
    (tmp_path / "d.json").write_text(windows)
    report = Report()
    (case,) = read_datalist(tmp_path, "d.json", report)["training"]
    assert case.label == tmp_path / "c1" / "segmentation.nii.gz"
    assert [w.found for w in report.findings] == [
        "paths with the separators of Windows, backslashes"
    ]
    (tmp_path / "d.json").write_text(json.dumps({"training": [{"image": "..\\..\\x.nii.gz"}]}))
    with pytest.raises(DataError, match="not in the data root"):
        read_datalist(tmp_path, "d.json")


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
