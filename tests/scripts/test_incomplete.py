"""Labels that are not complete, from the files to the scores, in both halves: the scan's upper end
was labelled by nobody, two training cases and the validation case have the box alone, another the
ball.
"""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch

from inference import predict_labels
from methods import SSL_METHODS
from tests.scripts.conftest import run, train
from tests.scripts.test_formats import few_labels, network_of
from utils.checkpoint import load_checkpoint

BALL, BOX = ["case1"], ["case2", "case4", "case5"]
TOLD = ("ignore_label=7", "labelled_classes={case1: [ball], 'case[245]': [2]}")
QUICK = ("max_steps=2", "diagnose_interval=0", "bn_batches=0")


@pytest.fixture
def incomplete(workspace):
    for path in sorted((workspace / "data/labelsTr").iterdir()):
        stored = nib.load(path)
        label = np.asarray(stored.dataobj).copy()
        name = path.name.removesuffix(".nii.gz")
        label[label == (2 if name in BALL else 1)] *= name not in BALL + BOX
        label[..., 14:] = 7
        nib.save(nib.Nifti1Image(label, stored.affine), path)
    return workspace


def scored_by_hand(workspace, checkpoint, name="case5", number=2, **how):
    """Dice of the box over the voxels that somebody labelled."""
    image, label = (
        np.asarray(nib.load(workspace / f"data/{part}Tr/{name}.nii.gz").dataobj)
        for part in ("images", "labels")
    )
    seen = torch.from_numpy(np.clip(image / 100, 0, 1).astype(np.float32)[None])
    ids = predict_labels(
        network_of(checkpoint), seen, patch_size=(16, 16, 16), window_batch=1, **how
    )
    found, truth = ids.numpy()[..., :14] == number, label[..., :14] == number
    assert (found & truth).any() and (ids.numpy()[..., 14:] == number).any()
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())


def test_teacher_and_student(incomplete):
    train("--method", "supervised", "--student", "resunet", "--opts", *QUICK, *TOLD, cwd=incomplete)
    train("--opts", *QUICK, *TOLD, cwd=incomplete)
    folder = incomplete / "runs/tiny/acf_bckd/resunet-unet/seed0"
    checkpoint = load_checkpoint(folder / "best.pt")
    # of the validation case the ball has no score
    assert math.isnan(checkpoint["val"]["ball"])
    expected = scored_by_hand(incomplete, checkpoint, overlap=0.5)
    assert checkpoint["val"]["dice"] == pytest.approx(expected, abs=1e-6)
    assert checkpoint["val"]["box"] == checkpoint["val"]["dice"]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in logged if entry["kind"] == "train"]
    assert steps and all(math.isfinite(entry[key]) for entry in steps for key in ("seg", "hbd"))

    run(
        "test_3d.py",
        "--ckpt",
        str(folder / "best.pt"),
        "--split",
        "val",
        "--overlays",
        cwd=incomplete,
    )
    summary = json.loads((folder / "summary_val.json").read_text())
    for space in ("resampled", "native"):
        assert set(summary[space]["classes"]) == {"box"}
        assert summary[space]["mean"]["dice"] == pytest.approx(expected, abs=1e-6)
    printed = run(
        "tools/check_data.py", "--config", "tiny.yaml", "--opts", *TOLD, cwd=incomplete
    ).stdout
    assert "22.2 % of the labelled labels' voxels are marked as not labelled" in printed


def test_few_labels(incomplete):
    few_labels(3, *TOLD, cwd=incomplete, flags=("--labelled", "3"))
    checkpoint = load_checkpoint(incomplete / "runs/tiny/crkd/vnet-3/seed0/best.pt")
    how = {"stride": (8, 8, 8), "probabilities": True}
    expected = scored_by_hand(incomplete, checkpoint, **how)
    assert checkpoint["val"]["dice"] == pytest.approx(expected, abs=1e-6)
    assert math.isnan(checkpoint["val"]["ball"])
    path = incomplete / "runs/tiny/crkd/vnet-3/seed0/best.pt"
    run("test_3d.py", "--ckpt", str(path), "--split", "val", cwd=incomplete)
    summary = json.loads((path.parent / "summary_val.json").read_text())
    assert set(summary["native"]["classes"]) == {"box"}
    # slices; the one case whose pseudo-labels are monitored could be compared in part alone
    few_labels(2, *TOLD, cwd=incomplete, flags=("--labelled", "4"))
    log = incomplete / "runs/tiny/crkd/unet2d-4/seed0/log.jsonl"
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [entry for entry in logged if entry["kind"] == "train"]
    assert steps and all(0 <= entry["mask_ratio"] <= 1 for entry in steps)
    assert all(entry.get("true_foreground") is None for entry in steps)


PLUG_IN = """
from losses.consistency import ce_dice_loss
from methods import Method


class Own(Method):
    uses_unlabelled = False

    def __init__(self, make_network, max_steps, preset="clean"):
        super().__init__(make_network, max_steps)

    def loss(self, labelled, unlabelled, step):
        return {"sup": ce_dice_loss(self.network(labelled["image"]), labelled["label"])}
"""
KD_PLUG_IN = """
import torch
from torch import nn


class Seen(nn.Module):
    def __init__(
        self, student_channels, teacher_channels, num_classes, multilabel=False, preset="clean"
    ):
        super().__init__()

    def forward(self, student, teacher, label, progress):
        assert label.max() < 3
        return {"own": student.logits.square().mean()}
"""


def test_what_does_not_fit_is_said_before_the_first_step(incomplete):
    for option, message in (
        ("ignore_label=2", "ignore_label: 2 is also the id of the class 'box'"),
        ("labelled_classes={case9: [1]}", "no case fits the pattern 'case9'"),
    ):
        result = train(
            "--method",
            "supervised",
            "--student",
            "unet",
            "--opts",
            option,
            cwd=incomplete,
            ok=False,
        )
        assert result.returncode == 1 and message in result.stderr
    assert not (incomplete / "runs").exists()
    assert all(method.incomplete for method in SSL_METHODS.values())
    (incomplete / "own.py").write_text(PLUG_IN)
    result = few_labels(3, *TOLD, "method=own.py:Own", cwd=incomplete, ok=False)
    assert "Own does not say that it can take labels that are not complete" in result.stderr
    # a distillation method of one's own is given the teacher's classes at such voxels
    (incomplete / "seen.py").write_text(KD_PLUG_IN)
    train("--method", "supervised", "--student", "resunet", "--opts", *QUICK, *TOLD, cwd=incomplete)
    train("--method", "seen.py:Seen", "--opts", *QUICK, *TOLD, cwd=incomplete)
