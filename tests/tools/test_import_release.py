"""tools/import_release.py: the releases of ACDC and LA become the published layout, whole or not at
all; ISIC-2018 and Kvasir-SEG are trained on as they are downloaded.
"""

import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from dataloaders.acdc import ACDCDataset
from dataloaders.cases import Case
from dataloaders.faults import DataError
from dataloaders.la import LADataset
from tests.scripts.conftest import run
from tests.tools.releases import write_patient, write_scan
from tools import import_release
from utils.checkpoint import load_checkpoint

COMMON = """
labelled_batch: 2
unlabelled_batch: 2
workers: 0
max_steps: 2
val_interval: 2
log_interval: 1
split_dir: splits
network_args: {unet2d: {channels: [2, 2, 4, 4, 4]}, vnet: {n_filters: 2}}
method_args: {crkd: {csd_samples: 16, projection_channels: 8}}
"""
HEART = COMMON + (
    "dataset: heart\nformat: acdc\ndata_root: data/ACDC\npatch_size: [32, 32]\n"
    "class_names: [background, right, wall, left]\n"
)
ATRIUM = COMMON + (
    "dataset: atrium\nformat: la\ndata_root: data/LA\npatch_size: [16, 16, 16]\n"
    "stride: [16, 16, 16]\nval_stride: [16, 16, 16]\nclass_names: [background, left atrium]\n"
)
PHOTOGRAPHS = COMMON + (
    "dataset: skin\nformat: images2d\ndata_root: data\npatch_size: [32, 32]\n"
    "class_names: [background, lesion]\n"
)


def heart(seed, shape=(5, 20, 24)):
    """Image int16 and label of a frame, (slices, rows, columns)."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    label[1:, 4:9, 6:18] = 1
    label[1:, 9:14, 6:18] = 2
    label[1:, 10:13, 8:15] = 3
    image = 60 + 200 * label + rng.integers(0, 90, shape)
    return image.astype(np.int16), label


def atrium(seed, shape=(30, 26, 18), low=(8, 7, 4), high=(20, 19, 14)):
    """Image uint8 and label of a scan, (x, y, z)."""
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(a, b) for a, b in zip(low, high))] = 1
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    return (noise + 120 * label).astype(np.uint8), label


@pytest.fixture
def acdc(tmp_path):
    """Three patients for training, of whom the third beats the other way round, and one test
    patient without labels.
    """
    folder = tmp_path / "ACDC"
    for k, (diastole, systole) in enumerate(((1, 12), (1, 9), (11, 4)), 1):
        frames = {diastole: heart([k, 0]), systole: heart([k, 1])}
        write_patient(folder / f"training/patient{k:03d}", diastole, systole, frames)
    frames = {1: heart([9, 0])[:1], 14: heart([9, 1])[:1]}
    write_patient(folder / "testing/patient101", 1, 14, frames)
    (folder / "MANDATORY_CITATION.md").write_text("please cite")
    return folder


@pytest.fixture
def la(tmp_path):
    """Three scans for training and two test scans without labels."""
    folder = tmp_path / "LA"
    for k, name in enumerate(("AAA", "BBB", "CCC")):
        write_scan(folder / "Training Set" / name, *atrium(k))
    for k, name in enumerate(("DDD", "EEE"), 5):
        write_scan(folder / "Testing Set" / name, atrium(k)[0], None)
    return folder


def do_import(release, source, out):
    import_release.main([release, str(source), "--out", str(out)])
    return out


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def arrays(path):
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file}


# Values


def test_acdc_is_scaled_and_cut_into_slices(acdc, tmp_path, capsys):
    out = do_import("acdc", acdc, tmp_path / "data/ACDC")
    printed = capsys.readouterr().out
    assert f"6 labelled frames, 2 without a label (--unlabelled {out}/unlabelled)" in printed
    assert f"check_data.py --config configs/acdc.yaml --opts data_root={out}" in printed
    assert len(list((out / "data").glob("*.h5"))) == 6
    assert len(list((out / "data/slices").glob("*.h5"))) == 30
    # patient003's end of diastole is frame 11 of the release, its end of systole frame 4
    for frame, number in (("frame01", 11), ("frame02", 4)):
        stem = acdc / f"training/patient003/patient003_frame{number:02d}"
        voxels = nib.load(f"{stem}.nii.gz").get_fdata()
        ids = nib.load(f"{stem}_gt.nii.gz").get_fdata()
        low, high = min(voxels.ravel()), max(voxels.ravel())
        volume = arrays(out / f"data/patient003_{frame}.h5")
        assert volume["image"].dtype == np.float32 and volume["label"].dtype == np.uint8
        assert volume["image"].shape == (5, 20, 24)  # slices, rows, columns
        for z in range(5):
            plane = arrays(out / f"data/slices/patient003_{frame}_slice_{z + 1}.h5")
            for y in range(20):
                for x in range(24):
                    expected = np.float32((voxels[x, y, z] - low) / (high - low))
                    assert plane["image"][y, x] == volume["image"][z, y, x] == expected
                    assert plane["label"][y, x] == volume["label"][z, y, x] == ids[x, y, z]
    assert set(arrays(out / "unlabelled/patient101_frame02.h5")) == {"image"}


def test_acdc_lies_as_new_scans_are_read(acdc, tmp_path):
    out = do_import("acdc", acdc, tmp_path / "out")
    data = ACDCDataset(str(out))
    (case,) = data.find(["patient001_frame02"])
    file = acdc / "training/patient001/patient001_frame12.nii.gz"
    read = data.read_file(Case("new", (file,)))["image"]
    np.testing.assert_allclose(data.read(case)["image"], read, atol=1e-6)


def box_by_search(label, axis):
    """First and last index that are kept, by trying every plane."""
    planes = np.moveaxis(label, axis, 0)
    held = [index for index, plane in enumerate(planes) if plane.any()]
    width = held[-1] - held[0]
    extra = 15
    while width + 2 * (extra - 15) + 2 <= 112:
        extra += 1
    keep = range(held[0] - extra, held[-1] + extra)
    return [index for index in range(len(planes)) if index in keep]


@pytest.mark.parametrize(
    "shape, low, high",
    [
        ((30, 26, 18), (8, 7, 4), (20, 19, 14)),  # smaller than its margins
        ((220, 190, 8), (50, 70, 2), (181, 100, 6)),  # one side longer than 112, one shorter
        ((200, 160, 6), (2, 30, 1), (60, 159, 6)),  # at borders
    ],
)
def test_la_is_normalised_and_cropped(tmp_path, shape, low, high):
    image, label = atrium(3, shape, low, high)
    write_scan(tmp_path / "LA/Training Set/AAA", image, label)
    file = do_import("la", tmp_path / "LA", tmp_path / "out") / "AAA/mri_norm2.h5"
    values = image.ravel().tolist()
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    rows, columns = (box_by_search(label, axis) for axis in (0, 1))
    expected = (image[np.ix_(rows, columns)] - mean) / deviation
    found = arrays(file)
    assert found["image"].dtype == np.float32 and found["label"].dtype == np.uint8
    np.testing.assert_allclose(found["image"], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(found["label"], label[np.ix_(rows, columns)])
    assert found["image"].shape[2] == shape[2]  # z is kept


def test_la_lies_as_new_scans_are_read(tmp_path):
    write_scan(
        tmp_path / "LA/Training Set/AAA", *atrium(3, (200, 160, 6), (70, 30, 1), (90, 50, 6))
    )
    out = do_import("la", tmp_path / "LA", tmp_path / "out")
    scan = Case("new", (tmp_path / "LA/Training Set/AAA/lgemri.nrrd",))
    whole = LADataset(str(out)).read_file(scan)["image"][0]
    with h5py.File(out / "AAA/mri_norm2.h5") as file:
        part = tuple(slice(a, a + n) for a, n in zip(file.attrs["start"], file["image"].shape))
        np.testing.assert_allclose(file["image"], whole[part], atol=1e-5)


def test_la_scans_without_a_label_keep_what_all_boxes_hold(tmp_path):
    source = tmp_path / "LA"
    boxes = {"AAA": ((300, 40, 2), (420, 160, 4)), "BBB": ((90, 100, 1), (230, 220, 5))}
    for k, (name, (low, high)) in enumerate(boxes.items()):
        write_scan(source / "Training Set" / name, *atrium(k, (500, 280, 6), low, high))
    write_scan(source / "Testing Set/DDD", atrium(7, (560, 280, 6))[0], None)
    out = do_import("la", source, tmp_path / "out")
    with h5py.File(out / "unlabelled/DDD.h5") as file:
        # x 75 .. 434 of 500, which is 30 further on in 560; y 25 .. 234 of 280
        assert file.attrs["start"].tolist() == [105, 25, 0]
        assert file["image"].shape == (359, 209, 6) and set(file) == {"image"}


# Training


def test_two_steps_on_acdc(acdc, tmp_path):
    do_import("acdc", acdc, tmp_path / "data/ACDC")
    write_lists(tmp_path, ["patient001", "patient002"], ["patient003"])
    (tmp_path / "heart.yaml").write_text(HEART)
    flags = ("--labelled", "1", "--unlabelled", "data/ACDC/unlabelled")
    run("train_2d_crkd.py", "--config", "heart.yaml", *flags, cwd=tmp_path)
    cases = load_checkpoint(tmp_path / "runs/heart/crkd/unet2d-1/seed0/last.pt")["cases"]
    assert cases["labelled"] == [
        f"patient001_frame0{frame}_slice_{z}" for frame in (1, 2) for z in range(1, 6)
    ]
    assert "patient002_frame02_slice_5" in cases["unlabelled"]
    assert "patient101_frame02_slice_5" in cases["unlabelled"]


def test_two_steps_on_la(la, tmp_path):
    do_import("la", la, tmp_path / "data/LA")
    write_lists(tmp_path, ["AAA", "BBB"], ["CCC"])
    (tmp_path / "atrium.yaml").write_text(ATRIUM)
    flags = ("--labelled", "1", "--unlabelled", "data/LA/unlabelled")
    run("train_3d_crkd.py", "--config", "atrium.yaml", *flags, cwd=tmp_path)
    cases = load_checkpoint(tmp_path / "runs/atrium/crkd/vnet-1/seed0/last.pt")["cases"]
    assert cases["labelled"] == ["AAA"] and cases["unlabelled"] == ["BBB", "DDD", "EEE"]


def write_lists(folder, train, val):
    (folder / "splits").mkdir()
    for split, names in (("train", train), ("val", val)):
        (folder / f"splits/{split}.txt").write_text("\n".join(names))


# image, mask and what lies beside them in the downloads
LAYOUTS = {
    "isic2018": (
        "ISIC2018_Task1-2_Training_Input/ISIC_{:07d}.jpg",
        "ISIC2018_Task1_Training_GroundTruth/ISIC_{:07d}_segmentation.png",
        "ISIC2018_Task1-2_Training_Input/ATTRIBUTION.txt",
    ),
    "kvasir": ("images/cju{:03d}.jpg", "masks/cju{:03d}.jpg", "kavsir_bboxes.json"),
}


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_two_steps_on_photographs_as_downloaded(tmp_path, dataset):
    image_name, mask_name, beside = LAYOUTS[dataset]
    for number in range(10):
        rng = np.random.default_rng(number)
        mask = np.zeros((36, 40), np.uint8)
        mask[8:24, 10:30] = 255
        image = np.uint8(rng.integers(0, 80, (36, 40, 3)) + mask[..., None] // 2)
        for name, pixels in ((image_name, image), (mask_name, mask)):
            path = tmp_path / "data" / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (tmp_path / "data" / beside).write_text("{}")
    (tmp_path / "skin.yaml").write_text(PHOTOGRAPHS)
    lists = ("--data-root", "data", "--out", "splits", "--val", "2", "--ratios", "50")
    run("tools/make_splits.py", "images", *lists, cwd=tmp_path)
    run("train_2d_crkd.py", "--config", "skin.yaml", "--labelled", "50%", cwd=tmp_path)
    cases = load_checkpoint(tmp_path / "runs/skin/crkd/unet2d-50%/seed0/last.pt")["cases"]
    assert [len(cases[key]) for key in ("labelled", "unlabelled")] == [4, 4]


# What is wrong with a release


def remove(path):
    path.unlink()


def relabel(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.uint8(4), image.affine), path)


def empty(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)


def shorten(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., 1:], image.affine), path)


def without_systole(path):
    path.write_text("ED: 1\nGroup: NOR\n")


@pytest.mark.parametrize(
    "change, file, message",
    [
        (remove, "patient002_frame09.nii.gz", "patient002_frame09.nii.gz: no such file"),
        (remove, "patient002_frame09_gt.nii.gz", "patient002_frame09_gt.nii.gz: no such file"),
        (remove, "Info.cfg", "Info.cfg: no such file; expected the frames of ED and ES"),
        (without_systole, "Info.cfg", "Info.cfg: no line 'ES: NUMBER'"),
        (relabel, "patient002_frame01_gt.nii.gz", r"_gt.nii.gz: label ids \[4, 5, 6, 7\]"),
        (empty, "patient002_frame01_gt.nii.gz", "_gt.nii.gz: no foreground"),
        (shorten, "patient002_frame01_gt.nii.gz", r"shape \(24, 20, 4\), but its image"),
    ],
)
def test_faults_of_acdc(acdc, tmp_path, change, file, message):
    change(acdc / "training/patient002" / file)
    with pytest.raises(DataError, match=message):
        do_import("acdc", acdc, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_faults_of_la(la, tmp_path):
    label = la / "Training Set/BBB/laendo.nrrd"
    # as some copies have it, which would leave nothing of the atrium
    sitk.WriteImage(sitk.ReadImage(str(label)) / 255, str(label))
    with pytest.raises(
        DataError, match=r"laendo.nrrd: label ids \[1(\.0)?\]; expected only 0, 255"
    ):
        do_import("la", la, tmp_path / "out")
    label.unlink()
    shutil.copytree(la / "Training Set/AAA", la / "Testing Set/AAA")
    with pytest.raises(DataError) as error:
        do_import("la", la, tmp_path / "out")
    # one test scan has a label, so the others lack theirs; nothing hides anything else
    for message in (
        "BBB/laendo.nrrd: no such file",
        "DDD/laendo.nrrd: no such file",
        "EEE/laendo.nrrd: no such file",
        "'AAA' is there twice",
    ):
        assert message in str(error.value)


def test_places(acdc, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; expected the unpacked download"):
        do_import("acdc", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="no cases; expected training/patientXXX or testing"):
        do_import("acdc", tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is there already and was not made of these files"):
        do_import("acdc", acdc, tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    (acdc / "database").mkdir()
    for part in ("training", "testing"):
        (acdc / part).rename(acdc / "database" / part)
    assert len(list((do_import("acdc", acdc, tmp_path / "other") / "data").glob("*.h5"))) == 6


def test_headers_that_differ_are_warned_of(acdc, tmp_path, capsys):
    path = acdc / "training/patient001/patient001_frame01_gt.nii.gz"
    label = np.asarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image(label, np.diag([-1.0, -1.0, 5.0, 1.0])), path)
    out = do_import("acdc", acdc, tmp_path / "out")
    printed = capsys.readouterr().err
    assert f"warning: {path}: voxels of 1 x 1 x 5 mm" in printed
    found = arrays(out / "data/patient001_frame01.h5")["label"]
    assert np.array_equal(found, label.transpose(2, 1, 0))


# Interruptions


@pytest.mark.parametrize("release", ["acdc", "la"])
def test_an_interrupted_import_goes_on(request, tmp_path, monkeypatch, capsys, release):
    source = request.getfixturevalue(release)
    whole = contents(do_import(release, source, tmp_path / "whole"))
    save, calls = import_release.save_h5, []

    def interrupted(path, *arguments, **attributes):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        save(path, *arguments, **attributes)

    monkeypatch.setattr(import_release, "save_h5", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do_import(release, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*/mri_norm2.h5")
    }
    assert len(done) == (3 if release == "la" else 0)
    monkeypatch.setattr(import_release, "save_h5", save)
    out = do_import(release, source, tmp_path / "out")
    assert contents(out) == whole and not (tmp_path / "out.partial").exists()
    for path, time in done.items():
        kept = out / path.relative_to(tmp_path / "out.partial")
        assert kept.stat().st_mtime_ns == time
    capsys.readouterr()
    do_import(release, source, tmp_path / "out")
    assert "already there: " in capsys.readouterr().out


def test_an_unfinished_import_of_other_files_is_not_gone_on_with(acdc, tmp_path):
    partial = tmp_path / "out.partial"
    (partial / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"out.partial: holds no unfinished import; remove it"):
        do_import("acdc", acdc, tmp_path / "out")
    record = {"release": "acdc", "margin": 15, "files": {}}
    (partial / "import.json").write_text(json.dumps(record))
    (partial / "data/patient001_frame01.h5").write_bytes(b"of another release")
    out = do_import("acdc", acdc, tmp_path / "out")
    assert arrays(out / "data/patient001_frame01.h5")["image"].max() == 1
