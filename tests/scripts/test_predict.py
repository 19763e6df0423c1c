"""Prediction of new scans and images as a user runs it, against what the testers write for the same
ones.
"""

import csv
import hashlib
import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from dataloaders import build_dataset
from tests.dataloaders.test_volumes import write_dicom
from tests.scripts import test_multilabel, test_train_crkd
from tests.scripts.conftest import make_workspace, run, train
from utils import figures
from utils.checkpoint import atomic_save, load_checkpoint

# with less training predictions are nothing but background
MORE = ("--opts", "max_steps=60", "val_interval=60", "lr=0.1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workspace with a network that finds the ball and the box, and the tester's predictions."""
    folder = make_workspace(tmp_path_factory.mktemp("predict"))
    train("--method", "supervised", "--student", "resunet", *MORE, cwd=folder)
    run("test_3d.py", "--ckpt", "runs/tiny/supervised/resunet/seed0/best.pt", cwd=folder)
    return folder


@pytest.fixture
def site(trained, tmp_path):
    """The checkpoint and one scan in a folder of the test's own."""
    shutil.copy(trained / "runs/tiny/supervised/resunet/seed0/best.pt", tmp_path)
    (tmp_path / "in").mkdir()
    shutil.copy(trained / "data/imagesTr/case6.nii.gz", tmp_path / "in")
    return tmp_path


def predict(*arguments, cwd, ok=True, script="predict_3d.py", source="in"):
    return run(
        script,
        "--ckpt",
        "best.pt",
        "--input",
        source,
        "--output",
        "out",
        *arguments,
        cwd=cwd,
        ok=ok,
    )


def array(path):
    return np.asarray(nib.load(path).dataobj)


def expected_of(trained):
    return nib.load(trained / "runs/tiny/supervised/resunet/seed0/predictions/case6.nii.gz")


def test_as_the_tester_predicts(trained, site):
    out = predict(cwd=site)
    assert "segmented 1, there already 0, failed 0" in out.stdout
    found, expected = nib.load(site / "out/case6.nii.gz"), expected_of(trained)
    ids = np.asarray(found.dataobj)
    assert set(np.unique(ids)) == {0, 1, 2}
    assert np.array_equal(ids, np.asarray(expected.dataobj))
    given = nib.load(site / "in/case6.nii.gz")
    assert np.allclose(found.affine, given.affine)
    for form in ("sform_code", "qform_code", "srow_x", "quatern_b", "qoffset_x"):
        assert np.array_equal(found.header[form], given.header[form])
    assert found.get_data_dtype() == np.uint8
    about = json.loads((site / "out/case6.json").read_text())
    assert about["labels"] == {"0": "background", "1": "ball", "2": "box"}
    assert about["structures"] == {"ball": [1], "box": [2]}
    assert about["input"] == ["case6.nii.gz"]
    with (site / "out/volumes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["structure"], int(row["voxels"])) for row in rows] == [
        ("case6", name, int((ids == k).sum())) for k, name in ((1, "ball"), (2, "box"))
    ]
    assert [float(row["volume_ml"]) for row in rows] == pytest.approx(
        [0.008 * int(row["voxels"]) for row in rows]
    )
    assert about["volumes_ml"]["ball"] == float(rows[0]["volume_ml"])


@pytest.mark.parametrize("kind", ["mha", "nrrd", "dicom", "4D"])
def test_other_formats_give_the_same(trained, site, kind):
    path = site / "in/case6.nii.gz"
    image = nib.load(path)
    if kind == "dicom":
        # Whole numbers, as DICOM holds them; the NIfTI file gets the same.
        voxels = np.rint(np.asarray(image.dataobj)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
        predict(cwd=site)
        expected = array(site / "out/case6.nii.gz")
        path.unlink()
        identifier = write_dicom(site / "in/case6", voxels, image.affine)
    elif kind == "4D":
        expected = np.asarray(expected_of(trained).dataobj)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), path)
    else:
        expected = np.asarray(expected_of(trained).dataobj)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(site / f"in/case6.{kind}"))
        path.unlink()
    predict("--overwrite", "--overlays", cwd=site)
    found = nib.load(site / "out/case6.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), expected)
    drawn = np.asarray(Image.open(site / "out/overlays/case6.png"))
    first = (255 * figures.palette(3)[1]).round()
    assert (drawn == first).all(-1).sum() > 100  # the outlines of the ball
    assert np.allclose(found.affine, image.affine, atol=1e-4)
    about = json.loads((site / "out/case6.json").read_text())
    rows = list(csv.DictReader((site / "out/volumes.csv").open()))
    if kind == "dicom":
        assert about["SeriesInstanceUID"] == identifier
        assert {row["SeriesInstanceUID"] for row in rows} == {identifier}
        predict(cwd=site)  # from what is there
        assert list(csv.DictReader((site / "out/volumes.csv").open())) == rows
    else:
        assert "SeriesInstanceUID" not in about.keys() | rows[0].keys()


def test_dicom_segmentation(trained, site):
    hd = pytest.importorskip("highdicom")
    from pydicom.sr.codedict import codes

    path = site / "in/case6.nii.gz"
    image = nib.load(path)
    # Rows along y: the volume is then read from the last slice to the first.
    affine = image.affine @ [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    voxels = np.rint(np.asarray(image.dataobj)).astype(np.int16).swapaxes(0, 1)
    path.unlink()
    identifier = write_dicom(site / "in/case6", voxels, affine)
    slices = [f"{identifier}.{k + 1}" for k in reversed(range(voxels.shape[2]))]
    predict("--dicom-seg", cwd=site)
    ids, affine = array(site / "out/case6.nii.gz"), nib.load(site / "out/case6.nii.gz").affine
    assert set(np.unique(ids)) == {0, 1, 2}

    seg = hd.seg.segread(site / "out/case6.dcm")
    assert [segment.segment_label for segment in map(seg.get_segment_description, (1, 2))] == [
        "ball",
        "box",
    ]
    for segment in map(seg.get_segment_description, (1, 2)):
        assert segment.algorithm_identification.family == codes.cid7162.ArtificialIntelligence
        assert segment.segmented_property_category == codes.SCT.BodyStructure
    (source,) = seg.ReferencedSeriesSequence
    assert source.SeriesInstanceUID == identifier and seg.SeriesInstanceUID != identifier
    refers = {one.ReferencedSOPInstanceUID for one in source.ReferencedInstanceSequence}
    assert refers == set(slices)
    # every pixel of every slice, by the slice that it refers to
    planes = seg.get_pixels_by_source_instance(slices, assert_missing_frames_are_empty=True)
    for number in (1, 2):
        assert np.array_equal(planes[..., number - 1].astype(bool), (ids == number).T)
    # and by its own geometry alone: each pixel lies where the label map has it
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    volume = seg.get_volume(combine_segments=True)
    places = np.argwhere(volume.array > 0)
    world = to_ras @ volume.affine @ np.c_[places, np.ones(len(places))].T
    voxels = np.rint(np.linalg.inv(affine) @ world)[:3].astype(int)
    found = np.zeros_like(ids)
    found[tuple(voxels)] = volume.array[tuple(places.T)]
    assert np.array_equal(found, ids)

    assert "there already 1" in predict("--dicom-seg", cwd=site).stdout
    (site / "out/case6.dcm").unlink()
    assert "segmented 1" in predict("--dicom-seg", cwd=site).stdout
    shutil.copy(trained / "data/imagesTr/case0.nii.gz", site / "in")
    refused = predict("--dicom-seg", cwd=site, ok=False)
    assert "case0.nii.gz is no DICOM series; leave the flag out" in refused.stderr


def test_a_bad_scan_does_not_lose_the_others(trained, site):
    shutil.copy(trained / "data/imagesTr/case0.nii.gz", site / "in/a_whole.nii.gz")
    data = (site / "in/case6.nii.gz").read_bytes()
    (site / "in/b_short.nii.gz").write_bytes(data[: len(data) // 2])
    nib.save(
        nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)), site / "in/c_nan.nii.gz"
    )
    voxels = array(trained / "data/imagesTr/case0.nii.gz")
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), site / "in/d_nowhere.nii.gz")
    (site / "in/._case6.nii.gz").write_bytes(b"\0\5\x16\7")
    result = predict(cwd=site, ok=False)
    assert result.returncode == 1
    assert "segmented 3, there already 0, failed 2" in result.stdout
    # as training says it
    assert "d_nowhere.nii.gz: the affine is the identity" in result.stderr
    assert "b_short.nii.gz: unreadable or truncated" in result.stderr
    assert "c_nan.nii.gz: 512 voxels are NaN" in result.stderr
    assert sorted(p.name for p in (site / "out").glob("*.nii.gz")) == [
        "a_whole.nii.gz",
        "case6.nii.gz",
        "d_nowhere.nii.gz",
    ]
    table = (site / "out/volumes.csv").read_text()
    assert table.count("a_whole") == table.count("case6") == 2


def test_what_is_there_is_kept(site):
    predict(cwd=site)
    result = site / "out/case6.nii.gz"
    before = result.stat().st_mtime_ns, (site / "out/volumes.csv").read_text()
    again = predict("--overlays", cwd=site)
    assert "segmented 0, there already 1" in again.stdout
    assert (site / "out/overlays/case6.png").is_file()  # of a result that was there
    assert not again.stderr.rstrip().startswith("warning")
    assert (result.stat().st_mtime_ns, (site / "out/volumes.csv").read_text()) == before
    (site / "out/volumes.csv").unlink()  # is made again from the label maps
    assert (
        "1 results that were there come from other weights or settings"
        in predict("--tta", cwd=site).stderr
    )
    assert (site / "out/volumes.csv").read_text() == before[1]
    predict("--overwrite", cwd=site)
    assert result.stat().st_mtime_ns != before[0]
    # Scans that come later are added to the table.
    shutil.move(site / "in/case6.nii.gz", site / "in/later.nii.gz")
    predict(cwd=site)
    assert {line.split(",")[0] for line in (site / "out/volumes.csv").read_text().splitlines()} == {
        "case",
        "case6",
        "later",
    }


def test_options_reach_the_prediction(site):
    import predict_3d

    predict("--tta", "--amp", "bf16", "--fast", "--threads", "1", "--window-batch", "1", cwd=site)
    settings = json.loads((site / "out/case6.json").read_text())["settings"]
    assert settings | {"weights": ""} == {
        "model": "best.pt",
        "weights": "",
        "tta": True,
        "amp": "bf16",
        "fast": True,
    }
    calls = []
    description = predict_3d.describe(load_checkpoint(site / "best.pt"), site / "best.pt")
    assert json.loads(json.dumps(description)) == description
    dataset = build_dataset(**description["dataset"])
    cases, _ = predict_3d.find_scans(site / "in", 1, dataset.channel_of)

    def constant(windows):  # any function can take the network's place
        calls.append(windows.shape)
        return (
            windows.new_tensor([0.0, 0.0, 1.0])
            .view(1, 3, 1, 1, 1)
            .expand(len(windows), 3, *windows.shape[2:])
        )

    for tta, batch in ((False, 1), (True, 4)):
        args = predict_3d.argparse.Namespace(tta=tta, amp="off", window_batch=batch)
        ids, _ = predict_3d.segment(constant, dataset, description, cases[0], args)
        assert (ids == 2).all()
        assert ids.shape == (22, 20, 18)
    assert calls == [(1, 1, 16, 16, 16)] * 8 + [(4, 1, 16, 16, 16)] * 16


@pytest.mark.parametrize(
    "arguments, source, message",
    [
        (("--window-batch", "0"), "in", "--window-batch: must be at least 1"),
        (("--threads", "0"), "in", "--threads: must be at least 1"),
        ((), "absent", "no such file or folder"),
        (("--output", "in"), "in", "results could replace them"),
        (("--ckpt", "bad.pt"), "in", "bad.pt: damaged or not a checkpoint"),
    ],
)
def test_refused_before_anything_is_predicted(site, arguments, source, message):
    (site / "bad.pt").write_bytes(b"x")
    result = predict(*arguments, cwd=site, ok=False, source=source)
    assert message in result.stderr
    assert not list(site.glob("*/case6.json"))


def test_regions_come_back_as_ids(tmp_path):
    rng = np.random.default_rng(0)
    entries = [test_multilabel.write_case(tmp_path / "data", f"case{k}", rng) for k in range(4)]
    lists = {"training": entries[:2], "validation": entries[2:3], "test": entries[3:]}
    (tmp_path / "data/dataset_0.json").write_text(json.dumps(lists))
    (tmp_path / "tiny.yaml").write_text(test_multilabel.CONFIG)
    train("--method", "supervised", "--student", "resunet", *MORE, cwd=tmp_path)
    best = "runs/tiny/supervised/resunet/seed0/best.pt"
    run("test_3d.py", "--ckpt", best, cwd=tmp_path)
    shutil.copy(tmp_path / best, tmp_path)
    # four channel files and a segmentation, under the names of the release
    predict(cwd=tmp_path, source="data/case3")
    ids = array(tmp_path / "out/case3.nii.gz")
    assert len(np.unique(ids)) > 1
    assert np.array_equal(
        ids, array(tmp_path / "runs/tiny/supervised/resunet/seed0/predictions/case3.nii.gz")
    )
    about = json.loads((tmp_path / "out/case3.json").read_text())
    assert about["structures"]["tumour core"] == [1, 3]
    assert about["volumes_ml"]["whole tumour"] == pytest.approx((ids > 0).sum() / 1000, abs=1e-4)


def test_one_region_of_several_ids(tmp_path):
    """nnU-Net's layout without a background class or any class names in the configuration; also
    taught by a teacher.
    """
    make_workspace(tmp_path)
    for kind, ending in (("images", "_0000"), ("labels", "")):
        for k in range(7):
            source = tmp_path / f"data/{kind}Tr/case{k}.nii.gz"
            source.rename(source.with_name(f"case{k}{ending}.nii.gz"))
    (tmp_path / "data/dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "both": [1, 2]},
                "regions_class_order": [5],
                "file_ending": ".nii.gz",
            }
        )
    )
    folds = [{"train": [f"case{k}" for k in range(5)], "val": ["case5", "case6"]}]
    (tmp_path / "data/splits_final.json").write_text(json.dumps(folds))
    text = (
        (tmp_path / "tiny.yaml")
        .read_text()
        .replace("class_names: [background, ball, box]", "format: nnunet")
    )
    (tmp_path / "tiny.yaml").write_text(text.replace("datalist: dataset_0.json", ""))
    train("--method", "supervised", "--student", "resunet", *MORE, cwd=tmp_path)
    train("--method", "kd", "--opts", "max_steps=2", cwd=tmp_path)
    best = tmp_path / "runs/tiny/supervised/resunet/seed0/best.pt"
    assert load_checkpoint(best)["class_names"] == ["both"]
    shutil.copy(best, tmp_path)
    predict(cwd=tmp_path, source="data/imagesTr")
    assert len(list((tmp_path / "out").glob("case?.nii.gz"))) == 7
    assert set(np.unique(array(tmp_path / "out/case0.nii.gz"))) == {0, 5}
    about = json.loads((tmp_path / "out/case0.json").read_text())
    assert about["labels"] == {"0": "background", "5": "both"}
    assert about["volumes_ml"]["both"] == pytest.approx(
        0.008 * (array(tmp_path / "out/case0.nii.gz") == 5).sum()
    )


def test_a_class_of_the_users_own_must_be_named(site):
    content = load_checkpoint(site / "best.pt")
    source = b"from networks import NETWORKS\n\n\nclass Own(NETWORKS['resunet']):\n    pass\n"
    (site / "own.py").write_bytes(source)
    record = {"file": "own.py", "sha256": hashlib.sha256(source).hexdigest(), "roles": ["student"]}
    content |= {"plugins": {"Own": record}, "network": content["network"] | {"name": "Own"}}
    atomic_save(content, site / "best.pt")
    refused = predict(cwd=site, ok=False)
    assert "to run that file, say so: --plugin own.py:Own" in refused.stderr
    assert "segmented 1," in predict("--plugin", "own.py:Own", cwd=site).stdout


def semi_site(folder, kind, method="supervised"):
    """A trained run of one kind of few-label data."""
    site = test_train_crkd.make_site(folder, kind)
    site.train("--method", method, "--labelled", "all", *MORE)
    run_folder = site.run_folder(method, "all")
    shutil.copy(run_folder / "best.pt", folder)
    return site, run_folder


def test_left_atrium(tmp_path):
    """A NIfTI file of any unit, axis order and intensity scale gives what the HDF5 file gives."""
    site, run_folder = semi_site(tmp_path, "la")
    path = tmp_path / "data/T1/mri_norm2.h5"
    with h5py.File(path, "a") as file:
        image = file["image"][()]
        del file["image"]
        file["image"] = (image - image.mean()) / image.std()
    site.score(run_folder)
    expected = array(run_folder / "predictions/T1.nii.gz")
    assert len(np.unique(expected)) == 2
    (tmp_path / "in").mkdir()
    for name, step in (("lps", 1), ("ras", -1)):
        affine = np.diag([-0.625 * step, -0.625 * step, 0.625, 1.0])
        nib.save(
            nib.Nifti1Image(100 + 40 * image[::step, ::step], affine),
            tmp_path / f"in/{name}.nii.gz",
        )
        predict(cwd=tmp_path)
        found = array(tmp_path / f"out/{name}.nii.gz")
        assert (found != expected[::step, ::step]).mean() < 1e-3


def test_cardiac_stack(tmp_path):
    site, run_folder = semi_site(tmp_path, "acdc")
    path = tmp_path / "data/data/patient006_frame01.h5"
    with h5py.File(path, "a") as file:
        image = file["image"][()]
        image = (image - image.min()) / (image.max() - image.min())
        del file["image"]
        file["image"] = image
    site.score(run_folder)
    expected = array(run_folder / "predictions/patient006_frame01.nii.gz")  # (y, x, slice)
    assert len(np.unique(expected)) > 2
    (tmp_path / "in").mkdir()
    stack = nib.Nifti1Image(
        (1000 * image.transpose(2, 1, 0)).astype(np.float32), np.diag([1.5, 1.5, 10.0, 1.0])
    )
    nib.save(stack, tmp_path / "in/heart.nii.gz")
    nib.save(
        nib.Nifti1Image(stack.dataobj, np.diag([10.0, 1.5, 1.5, 1.0])),
        tmp_path / "in/turned.nii.gz",
    )
    result = predict("--overlays", cwd=tmp_path, script="predict_2d.py", ok=False)
    assert (
        "turned.nii.gz: voxels of 10 x 1.5 x 1.5 mm, expected slices along the third axis"
        in result.stderr
    )
    found = array(tmp_path / "out/heart.nii.gz")
    assert (found != expected.swapaxes(0, 1)).mean() < 1e-3
    assert (tmp_path / "out/overlays/heart.png").stat().st_size > 0
    table = list(csv.DictReader((tmp_path / "out/volumes.csv").open()))
    assert float(table[0]["volume_ml"]) == pytest.approx(0.0225 * (found == 1).sum(), abs=1e-4)
    wrong = run(
        "predict_3d.py",
        "--ckpt",
        "best.pt",
        "--input",
        "in",
        "--output",
        "out",
        cwd=tmp_path,
        ok=False,
    )
    assert "a 2D network; use predict_2d.py" in wrong.stderr


def test_photographs(tmp_path):
    site, run_folder = semi_site(tmp_path, "images2d")
    site.score(run_folder)
    (tmp_path / "in").mkdir()
    for name in ("seen0", "seen1"):
        shutil.copy(tmp_path / f"data/images/{name}.png", tmp_path / "in")
    (tmp_path / "in/broken.jpg").write_bytes(b"no image")
    result = predict("--overlays", cwd=tmp_path, script="predict_2d.py", ok=False)
    assert result.returncode == 1
    assert "broken.jpg: unreadable or truncated" in result.stderr
    for name in ("seen0", "seen1"):
        mask = np.asarray(Image.open(tmp_path / f"out/{name}.png"))
        assert set(np.unique(mask)) == {0, 255}
        assert np.array_equal(mask, np.asarray(Image.open(run_folder / f"predictions/{name}.png")))
    assert json.loads((tmp_path / "out/seen0.json").read_text())["labels"] == {
        "0": "background",
        "255": "lesion",
    }
    before = (tmp_path / "out/areas.csv").read_text()
    row = before.splitlines()[1].split(",")
    first = np.asarray(Image.open(tmp_path / "out/seen0.png")) == 255
    assert (row[0], int(row[2]), float(row[3])) == (
        "seen0",
        first.sum(),
        pytest.approx(100 * first.mean(), abs=1e-4),
    )
    (tmp_path / "out/areas.csv").unlink()
    (tmp_path / "in/broken.jpg").unlink()
    assert "segmented 0, there already 2" in predict(cwd=tmp_path, script="predict_2d.py").stdout
    assert (tmp_path / "out/areas.csv").read_text() == before
    # the image and its copy, side by side and enlarged
    height, width, _ = np.asarray(Image.open(tmp_path / "out/overlays/seen0.png")).shape
    assert height > 300 and width > height


def test_a_full_disk_ends_the_prediction_in_one_line_and_leaves_no_part(site, monkeypatch):
    def full(image, path):
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.predictions.nib.save", full)
    result = predict(cwd=site, ok=False)
    assert "error: out/case6.nii.gz: cannot be written (the disk is full, " in result.stderr
    assert "make room" in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in (site / "out").iterdir()] == ["volumes.csv"]


def test_a_damaged_table_of_volumes_is_made_again(site):
    predict(cwd=site)
    path = site / "out/volumes.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    predict(cwd=site)
    assert path.read_bytes() == whole
