"""From a results folder of nnU-Net to its students: configuration, training, test, prediction."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from tests.nnunet_folders import (
    LABELS,
    REGIONS,
    make_plans,
    plan_arguments,
    write_raw,
    write_results,
)
from tests.scripts.conftest import run
from utils.checkpoint import digest, load_checkpoint, load_foreign

SMALL = ("max_steps=2", "val_interval=2", "workers=0", "log_interval=1", "bn_batches=1")
FOLDER = "results/nnUNetTrainer__nnUNetPlans__3d_fullres"
CONFIG = ("tools/new_config.py", "--nnunet", FOLDER, "--data", "raw", "--out", "mine.yaml")
BUDGET = ("--budget-params", "9000", "--threads", "1")


def workspace(folder, encoder="plain", labels=LABELS, **plans):
    channels = ("T1", "T2") if labels is REGIONS else ("CT",)
    scheme = "ZScoreNormalization" if labels is REGIONS else "CTNormalization"
    write_raw(folder / "raw", channels, labels)
    plans = make_plans(encoder, channels=len(channels), scheme=scheme) | plans
    axes = {"axes": [2 - k for k in plans["transpose_forward"]]}
    options = {"labels": labels, "channels": channels, "folds": ("0", "1")}
    write_results(folder / "results", plan_arguments(encoder) | axes, plans, **options)


def allow_mirrors(path, axes):
    """Write another inference_allowed_mirroring_axes to a checkpoint."""
    content = load_foreign(path)
    content.pop("_best_ema", None)  # which is left out of what is read
    torch.save(content | {"inference_allowed_mirroring_axes": axes}, path)


def train(folder, *flags, opts=(), ok=True):
    words = ("train_3d_distill.py", "--config", "mine.yaml", *flags, "--opts", *SMALL, *opts)
    return run(*words, cwd=folder, ok=ok)


@pytest.mark.slow
def test_a_plain_network_teaches_students_that_segment_scans(tmp_path):
    # the coarse axis of the scans is not the first one that nnU-Net reads
    workspace(tmp_path, transpose_forward=[2, 0, 1])
    written = run(*CONFIG, *BUDGET, cwd=tmp_path)
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (values["spacing"], values["patch_size"]) == ([1.5, 1.0, 1.0], [16, 24, 24])
    assert values["network_args"]["nnunet"]["axes"] == [0, 2, 1]
    assert (values["fold"], values["split_dir"], values["student"]) == (0, "", "nnunet")
    rows = [line for line in written.stdout.splitlines() if line.startswith("| nnunet ")]
    assert "the teacher" in rows[0] and any(row.endswith("| yes |") for row in rows[1:])
    assert "fold 1 of the teacher saw its val list" in written.stdout
    trained = train(tmp_path, "--teacher", FOLDER, "--student", "unet")
    assert "fold 0 (checkpoint_final.pth), 1 (checkpoint_final.pth)" in trained.stderr
    assert "goes without AFD and CFD" in trained.stderr
    one = train(tmp_path, "--teacher", FOLDER, "--teacher-folds", "1", "--method", "kd")
    assert "fold 1 (checkpoint_final.pth)\n" in one.stderr
    train(tmp_path, "--method", "supervised")
    # of nnU-Net's axes the second, which is our third, then none
    for tag, axes, said in (("some", (1,), "no axis but 2"), ("none", None, "no mirrors")):
        allow_mirrors(tmp_path / FOLDER / "fold_0/checkpoint_final.pth", axes)
        flips = ("teacher_views=flips", f"tag={tag}")
        taught = train(tmp_path, "--method", "kd", "--labelled", "2", opts=flips)
        assert said in taught.stderr
    best = tmp_path / "runs/mine/kd/nnunet-nnunet/seed0/best.pt"
    run("test_3d.py", "--ckpt", str(best), "--split", "val", cwd=tmp_path)
    scan = "raw/imagesTr/case_0_0000.nii.gz"
    run("predict_3d.py", "--ckpt", str(best), "--input", scan, "--output", "out", cwd=tmp_path)
    (segmented,) = (tmp_path / "out").glob("*.nii.gz")
    assert nib.load(segmented).shape == nib.load(tmp_path / scan).shape
    tested = nib.load(best.parent / "predictions/case_0.nii.gz")
    assert np.array_equal(np.asarray(nib.load(segmented).dataobj), np.asarray(tested.dataobj))
    # the student as a results folder, which teaches in turn
    export = ("tools/export.py", "--ckpt", str(best), "--format", "nnunet", "--out", "students")
    written = run(*export, cwd=tmp_path)
    folder = f"students/Dataset900_Test/{Path(FOLDER).name}"
    assert "checkpoint_final.pth, the first case of the val list: largest" in written.stdout
    assert "nnUNetv2_predict_from" in (tmp_path / folder / "model_card.md").read_text()
    again = run(*export, cwd=tmp_path, ok=False)
    assert again.returncode and f"{folder}: is there already" in again.stderr
    train(tmp_path, "--teacher", folder, "--method", "kd", "--student", "unet")
    # a supervised student has the plans of the file's teacher, or those that are named
    alone = ("--ckpt", str(tmp_path / "runs/mine/supervised/nnunet/seed0/best.pt"))
    (tmp_path / "results").rename(tmp_path / "moved")
    export = (*export[:1], *alone, *export[3:])
    refused = run(*export, "--out", "alone", cwd=tmp_path, ok=False)
    assert refused.returncode and f"{FOLDER}: the results folder that the run" in refused.stderr
    assert not (tmp_path / "alone").exists()
    moved = FOLDER.replace("results", "moved")
    run(*export, "--out", "alone", "--plans", moved, cwd=tmp_path)
    assert (tmp_path / folder.replace("students", "alone") / "plans.json").is_file()


@pytest.mark.slow
def test_a_residual_network_of_regions_teaches_all_of_acf_bckd(tmp_path):
    workspace(tmp_path, "residual", REGIONS)
    (tmp_path / "raw/splits_final.json").rename(tmp_path / "folds.json")
    flags = ("--fold", "1", "--fold-lists", "folds.json", "--networks", "nnunet")
    run(*CONFIG, *flags, "--budget-ms", "60000", cwd=tmp_path)
    assert (tmp_path / "splits/mine/val.txt").read_text().split()[-1] == "case_1"
    trained = train(tmp_path)  # the file names the teacher
    assert "AFD" not in trained.stderr
    lines = (tmp_path / "runs/mine/acf_bckd/nnunet-nnunet/seed0/log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert any('"afd": ' in line and '"afd": 0.0' not in line for line in lines), logged
    # a teacher of other images or classes is refused
    for change, expected in (
        ("spacing=[1.0,1.0,1.0]", "prepared in another way (spacing"),
        ("intensity=zscore", "intensity_channels"),
        ("teacher_folds=[3]", "no fold 3; there is 0, 1"),
        ("class_names=[whole,other]", "class_names"),
    ):
        refused = train(tmp_path, opts=(change, "tag=refused"), ok=False)
        assert refused.returncode and expected in refused.stderr, change
    refused = train(tmp_path, "--teacher", "no/such/folder", ok=False)
    assert refused.returncode and "TRAINER__PLANS__CONFIGURATION" in refused.stderr
    refused = train(tmp_path, "--teacher", "unet", "--teacher-folds", "0", ok=False)
    assert refused.returncode and "teacher_folds" in refused.stderr


@pytest.mark.slow
def test_without_any_label_and_without_what_the_folds_disagree_on(tmp_path):
    workspace(tmp_path)
    refused = run(*CONFIG, *BUDGET, "--labelled", "0", cwd=tmp_path, ok=False)
    assert refused.returncode and "has labels; leave --labelled 0 out here" in refused.stderr
    shutil.rmtree(tmp_path / "raw/labelsTr")
    (tmp_path / "raw/splits_final.json").unlink()
    (tmp_path / "more").mkdir()
    for number in (3, 4):
        shutil.move(tmp_path / f"raw/imagesTr/case_{number}_0000.nii.gz", tmp_path / "more")
    flags = ("--labelled", "0", "--unlabelled", "more", "--networks", "unet")
    out = run(*CONFIG, *BUDGET, *flags, cwd=tmp_path)
    assert "all scans are trained on: 5 unlabelled" in out.stdout
    options = ("drop_disagreeing=0.4", "save_interval=1", "tag=less")
    out = train(tmp_path, "--method", "kd", opts=options)
    assert "2 of 5 unlabelled cases are left out" in out.stderr
    folder = tmp_path / "runs/mine/kd/nnunet-unet-0-unlabelled/seed0-less"
    with (folder / "disagreement.csv").open() as file:
        header, *rows = csv.reader(file)
    values = {name: float(value) for name, value in rows}
    assert header == ["case", "disagreement"] and len(set(values.values())) > 1
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert set(values) == {f"case_{number}" for number in range(5)}
    straight = load_checkpoint(folder / "last.pt")
    assert straight["cases"]["unlabelled"] == sorted(list(values)[2:])
    assert all(f"{value:.3f}  {name}" in out.stderr for name, value in values.items())

    # a resumed run takes what was measured: it would choose otherwise by other figures
    (folder / "last.previous.pt").replace(folder / "last.pt")
    again = run("train_3d_distill.py", "--resume", str(folder), cwd=tmp_path)
    assert "comparing folds" in out.stderr and "comparing folds" not in again.stderr
    assert digest(load_checkpoint(folder / "last.pt")["weights"]) == digest(straight["weights"])

    # all are listed where none is left out, and none is compared where that is not wanted
    out = train(tmp_path, "--method", "kd", opts=("tag=listed",))
    assert "0 of 5 unlabelled cases are left out" in out.stderr
    out = train(tmp_path, "--method", "kd", opts=("tag=none", "drop_disagreeing=null"))
    assert "comparing folds" not in out.stderr
    for flags, option, expected in (
        (("--teacher-folds", "1"), "drop_disagreeing=0.1", "has 1 fold(s)"),
        ((), "drop_disagreeing=1", "a share in [0, 1)"),
    ):
        refused = train(tmp_path, *flags, opts=(option, "tag=refused"), ok=False)
        assert refused.returncode and expected in refused.stderr


def test_flags_and_folders_that_do_not_fit_are_refused(tmp_path):
    workspace(tmp_path)
    for flags, expected in (
        (("--budget-params", "10"), "no candidate is within the budget"),
        (("--fold-lists", "none.json"), "none.json: no such file"),
        (("--patch", "8", "8", "8"), "the patch is that of its plans"),
        (("--threads", "0"), "must be above 0"),
        (("--labelled", "2"), "give the number to train_3d_distill.py"),
    ):
        refused = run(*CONFIG, *flags, cwd=tmp_path, ok=False)
        assert refused.returncode and expected in refused.stderr, flags
        assert not (tmp_path / "mine.yaml").exists()
    plain = ("tools/new_config.py", "--data", "raw", "--out", "mine.yaml")
    for flags in (("--budget-ms", "3"), ("--networks", "nnunet"), ("--labelled", "0")):
        refused = run(*plain, *flags, cwd=tmp_path, ok=False)
        assert refused.returncode and "goes with --nnunet" in refused.stderr
    described = tmp_path / FOLDER / "dataset.json"
    content = json.loads(described.read_text())
    content["labels"] = {"background": 0, "organ": 1, "vessel": 2}
    described.write_text(json.dumps(content))
    refused = run(*CONFIG, *BUDGET, cwd=tmp_path, ok=False)
    assert refused.returncode and "its classes are background, organ, vessel" in refused.stderr
