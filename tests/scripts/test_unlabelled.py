"""Cases without labels: how each format has them, that they are trained on, and what is wrong with
them.
"""

import json
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.scripts.conftest import run
from tests.scripts.test_formats import as_nnunet, few_labels
from utils.checkpoint import load_checkpoint

LISTS = {"training": ["case0", "case1", "case2"], "validation": ["case5"], "test": ["case6"]}


def write_list(workspace, without=(), test=()):
    """The JSON of the workspace, with these training cases without labels and these tests as plain
    names.
    """
    lists = {}
    for section, names in LISTS.items():
        entries = [{"image": f"imagesTr/{name}.nii.gz"} for name in names]
        for name, entry in zip(names, entries):
            if name not in without:
                entry["label"] = f"labelsTr/{name}.nii.gz"
        lists[section] = entries
    lists["test"] += [f"imagesTr/{name}.nii.gz" for name in test]
    (workspace / "data/dataset_0.json").write_text(json.dumps(lists))
    for name in (*without, *test):
        (workspace / f"data/labelsTr/{name}.nii.gz").unlink()


def cases_of(workspace, dims=3, labelled="all"):
    name = {2: "unet2d", 3: "vnet"}[dims]
    folder = workspace / f"runs/tiny/crkd/{name}-{labelled}/seed0"
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    cases = load_checkpoint(folder / "last.pt")["cases"]
    (last,) = [record for record in records if record["kind"] == "train"][-1:]
    return cases["labelled"], cases["unlabelled"], last


def folder_of(workspace, names):
    (workspace / "more").mkdir()
    for name in names:
        shutil.move(workspace / f"data/imagesTr/{name}.nii.gz", workspace / f"more/{name}.nii.gz")
    return "more"


@pytest.mark.parametrize("dims", [2, 3])
def test_entries_without_a_label_are_unlabelled(workspace, dims):
    write_list(workspace, without=["case1"])
    printed = few_labels(dims, cwd=workspace, flags=()).stderr
    assert "1 of 3 cases have no label, for example 'case1'; they count as unlabelled" in printed
    labelled, unlabelled, _ = cases_of(workspace, dims)
    assert (labelled, unlabelled) == (["case0", "case2"], ["case1"])


def test_a_number_of_labels_counts_those_that_have_one(workspace):
    write_list(workspace, without=["case0"])
    few_labels(3, cwd=workspace, flags=("--labelled", "1"))
    assert cases_of(workspace, labelled=1)[:2] == (["case1"], ["case0", "case2"])
    stderr = few_labels(3, cwd=workspace, flags=("--labelled", "3"), ok=False).stderr
    assert "dataset_0.json: 2 cases with a label, but labelled is 3; expected 1..2" in stderr
    assert "ask for fewer or label more of its cases" in stderr


def test_test_entries_as_strings_on_demand(workspace):
    write_list(workspace, test=["case3"])
    few_labels(3, cwd=workspace, flags=("--unlabelled", "test"))
    labelled, unlabelled, _ = cases_of(workspace)
    assert (labelled, unlabelled) == (["case0", "case1", "case2"], ["case3"])


def test_a_list_of_unlabelled_cases_beside_the_others(workspace):
    write_list(workspace, test=["case3", "case4"])
    (workspace / "lists").mkdir()
    chosen = {"train": ["case0", "case1"], "val": ["case5"], "unlabelled": ["case4", "case3"]}
    for split, names in chosen.items():
        (workspace / f"lists/{split}.txt").write_text("\n".join(names))
    few_labels(3, "split_dir=lists", cwd=workspace, flags=())
    assert cases_of(workspace)[:2] == (chosen["train"], chosen["unlabelled"])
    (workspace / "lists/unlabelled.txt").write_text("case5\n")
    stderr = few_labels(3, "split_dir=lists", "tag=b", cwd=workspace, flags=(), ok=False).stderr
    assert "'case5' is in both the" in stderr and "unlabelled" in stderr


@pytest.mark.parametrize("dims", [2, 3])
def test_a_folder_of_scans_is_added(workspace, dims):
    write_list(workspace)
    more = folder_of(workspace, ["case3", "case4"])
    few_labels(dims, cwd=workspace, flags=("--unlabelled", more))
    labelled, unlabelled, log = cases_of(workspace, dims)
    assert (labelled, unlabelled) == (["case0", "case1", "case2"], ["case3", "case4"])
    assert 0 <= log["mask_ratio"] <= 1  # which needs no label
    compared = ("pseudo_accuracy", "true_foreground", "recall_1", "recall_2")
    assert [log[key] for key in compared] == [None] * 4


def test_pseudo_labels_are_monitored_where_there_is_a_label(workspace):
    write_list(workspace)
    more = folder_of(workspace, ["case3"])
    few_labels(
        3, "unlabelled_batch=4", cwd=workspace, flags=("--labelled", "2", "--unlabelled", more)
    )
    _, unlabelled, log = cases_of(workspace, labelled=2)
    assert unlabelled == ["case2", "case3"]
    assert 0 < log["true_foreground"] < 0.5


def test_nnunet_folders(workspace):
    options = as_nnunet(workspace)
    (workspace / "raw/labelsTr/case3.nii.gz").unlink()
    (workspace / "raw/imagesUn").mkdir()
    shutil.move(workspace / "raw/imagesTr/case6_0000.nii.gz", workspace / "raw/imagesUn")
    (workspace / "raw/labelsTr/case6.nii.gz").unlink()
    few_labels(3, *options, cwd=workspace, flags=("--labelled", "2"))
    labelled, unlabelled, _ = cases_of(workspace, labelled=2)
    assert labelled == ["case0", "case1"]
    assert sorted(unlabelled) == ["case2", "case3", "case4", "case6"]


def hdf5(workspace, form, without):
    rng = np.random.default_rng(0)
    shape, place = (18, 16, 16), "{}/mri_norm2.h5"
    if form == "acdc":
        shape, place = (4, 18, 16), "data/{}_frame01.h5"
    for name in ("a1", "a2", "a3", "v1"):
        image, label = rng.random(shape).astype(np.float32), np.zeros(shape, np.uint8)
        label[1:3, 4:8, 4:8] = 1
        path = workspace / "h5" / place.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["image"] = image
            if name != without:
                file["label"] = label
    for split, names in (("train", "a1 a2 a3"), ("val", "v1")):
        (workspace / f"h5/{split}.txt").write_text("\n".join(names.split()))
    patch = [16] * (3 if form == "la" else 2)
    (workspace / "tiny.yaml").write_text(
        f"dataset: tiny\nformat: {form}\ndata_root: h5\nsplit_dir: h5\npatch_size: {patch}\n"
        "class_names: [background, ball]\nworkers: 0\nmax_steps: 2\n"
    )


@pytest.mark.parametrize("form, dims", [("la", 3), ("la", 2), ("acdc", 2)])
def test_hdf5_files_without_the_array_label(workspace, form, dims):
    hdf5(workspace, form, without="a2")
    few_labels(dims, cwd=workspace, flags=())
    labelled, unlabelled, _ = cases_of(workspace, dims)
    assert {name[:2] for name in labelled} == {"a1", "a3"}
    assert {name[:2] for name in unlabelled} == {"a2"}
    hdf5(workspace, form, without="v1")
    stderr = few_labels(dims, "tag=v", cwd=workspace, flags=("--labelled", "2"), ok=False).stderr
    assert "v1" in stderr and "has no label; expected one" in stderr


@pytest.mark.parametrize("form, dims", [("la", 3), ("acdc", 2)])
@pytest.mark.parametrize("kind", ["h5", "nii.gz"])
def test_folders_beside_hdf5_files(workspace, form, dims, kind):
    hdf5(workspace, form, without="")
    rng, more = np.random.default_rng(1), workspace / "more"
    more.mkdir()
    for name in ("u1", "u2"):
        if kind == "h5":
            with h5py.File(more / f"{name}.h5", "w") as file:
                file["image"] = rng.random((4, 18, 16) if form == "acdc" else (18, 16, 16))
        else:
            size, mm = ((18, 16, 4), (1, 1, 8)) if form == "acdc" else ((18, 16, 16), (0.625,) * 3)
            image = nib.Nifti1Image(rng.random(size).astype(np.float32), np.diag([*mm, 1.0]))
            nib.save(image, more / f"{name}.nii.gz")
    few_labels(dims, cwd=workspace, flags=("--unlabelled", "more"))
    unlabelled = cases_of(workspace, dims)[1]
    expected = ["u1", "u2"]
    if form == "acdc":
        expected = [f"{name}_slice_{k}" for name in expected for k in (1, 2, 3, 4)]
    assert unlabelled == expected


@pytest.fixture
def photographs(workspace):
    rng = np.random.default_rng(0)
    for part, names in (
        ("train", ("p0", "p1", "p2", "p3")),
        ("val", ("q0",)),
        ("more", ("m0", "m1")),
    ):
        for name in names:
            pixels = rng.integers(0, 255, (20, 18, 3), np.uint8)
            mask = np.zeros((20, 18), np.uint8)
            mask[4:12, 4:12] = 255
            for kind, array in (("images", pixels), ("masks", mask)):
                path = workspace / (f"photos/{part}/{kind}" if part != "more" else "more")
                if part != "more" or kind == "images":
                    path.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path / f"{name}.png")
    (workspace / "tiny.yaml").write_text(
        "dataset: tiny\nformat: images2d\ndata_root: photos\npatch_size: [16, 16]\n"
        "class_names: [background, polyp]\nworkers: 0\nmax_steps: 2\n"
    )
    return workspace


def test_images_without_a_mask_and_a_folder_of_images(photographs):
    (photographs / "photos/train/masks/p1.png").unlink()
    printed = few_labels(2, cwd=photographs, flags=("--unlabelled", "more")).stderr
    assert "1 of 4 images have no label, for example 'p1'" in printed
    assert cases_of(photographs, 2)[:2] == (["p0", "p2", "p3"], ["p1", "m0", "m1"])


def test_bad_folders_stop_before_the_first_step(workspace):
    write_list(workspace)

    def message(*options):
        flags = ("--unlabelled", "more")
        result = few_labels(3, *options, cwd=workspace, flags=flags, ok=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert not list(workspace.glob("runs/**/last.pt"))
        return result.stderr

    assert "more: no such file or folder; expected .nii.gz" in message()
    folder = workspace / "more"
    folder.mkdir()
    assert "more: no scan or image; expected .nii.gz" in message()
    # the validation scan under another name
    shutil.copy(workspace / "data/imagesTr/case5.nii.gz", folder / "other.nii.gz")
    assert "other.nii.gz (train list), here in the val list" in message()
    (folder / "other.nii.gz").rename(folder / "case0.nii.gz")
    assert "'case0' is in both the" in message()
    (folder / "case0.nii.gz").unlink()
    four = nib.Nifti1Image(np.random.default_rng(0).random((18, 18, 18, 2)), np.diag([2, 2, 2, 1]))
    nib.save(four, folder / "u.nii.gz")
    assert "u.nii.gz: 2 channel(s)" in message() and "expected 1 channel(s)" in message()
    fine = nib.Nifti1Image(
        np.random.default_rng(0).random((18, 18, 18)), np.diag([0.5, 0.5, 0.5, 1])
    )
    nib.save(fine, folder / "u.nii.gz")
    assert "voxels of 0.5 x 0.5 x 0.5 mm; expected about those" in message("spacing=[]")


def test_the_checker_knows_cases_without_labels(workspace):
    write_list(workspace, without=["case1"])
    more = folder_of(workspace, ["case3"])

    def check(*options):
        arguments = ("--config", "tiny.yaml", "--json", "found.json", "--opts", *options)
        result = run("tools/check_data.py", *arguments, cwd=workspace, ok=False)
        assert "Traceback" not in result.stderr
        findings = json.loads((workspace / "found.json").read_text())["findings"]
        errors = [found["message"] for found in findings if found["level"] == "error"]
        assert result.returncode == bool(errors)
        return result.stdout, errors

    printed, errors = check()
    assert "(2 labelled, 1 unlabelled, 1 val, 1 test)" in printed and not errors
    printed, errors = check("labelled=1", f"unlabelled={more}")
    assert "(1 labelled, 3 unlabelled, 1 val, 1 test)" in printed and not errors
    # the labelled scan under another name, and as what it is
    shutil.copy(workspace / "data/imagesTr/case0.nii.gz", workspace / "more/again.nii.gz")
    (error,) = check("labelled=1", f"unlabelled={more}")[1]
    assert "case0.nii.gz (labelled list), here in the unlabelled list" in error
    (workspace / "more/again.nii.gz").rename(workspace / "more/case0.nii.gz")
    (error,) = check("labelled=1", f"unlabelled={more}")[1]
    assert "'case0' is in both the" in error
    (workspace / "more/case0.nii.gz").unlink()
    two = nib.Nifti1Image(np.random.default_rng(0).random((18, 18, 18, 2)), np.diag([2, 2, 2, 1]))
    nib.save(two, workspace / "more/case3.nii.gz")
    (error,) = check(f"unlabelled={more}")[1]
    assert "case3.nii.gz: 2 channel(s)" in error
