"""What the soft boundary term sees: against loops, a student that gives a class up, the table of finished runs."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from losses.acf_bckd import soft_boundary_loss
from tests.scripts.conftest import make_workspace, run, train
from tests.scripts.test_train_crkd import make_site
from tools.soft_boundary import Seen, seen, soft_boundary, table

SHAPE = (5, 6, 4)


def field(mask):
    """Squared distance to the other kind of voxel; 0 everywhere if there is one kind only."""
    if mask.all() or not mask.any():
        return np.zeros(mask.shape)
    return distance_transform_edt(mask) ** 2 + distance_transform_edt(~mask) ** 2


@pytest.mark.parametrize("multilabel", [False, True])
def test_equal_to_loops(multilabel):
    generator = torch.Generator().manual_seed(0)
    logits, target = (2 * torch.randn(3, *SHAPE, generator=generator) for _ in range(2))
    if multilabel:
        chances, regions = torch.sigmoid(logits).numpy(), (torch.sigmoid(target) >= 0.5).numpy()
        label = np.random.default_rng(0).random((3, *SHAPE)) < 0.4
        predicted = chances >= 0.5
    else:
        chances = torch.softmax(logits, 0)[1:].numpy()
        regions = np.stack([target.argmax(0).numpy() == c for c in (1, 2)])
        ids = np.random.default_rng(0).integers(0, 3, SHAPE)
        label, predicted = (np.stack([values == c for c in (1, 2)]) for values in (ids, logits.argmax(0).numpy()))
    rows = seen(logits, target, label if multilabel else ids, multilabel)
    assert len(rows) == len(regions)
    for c, row in enumerate(rows):
        weighted = (chances[c] - regions[c]) ** 2 * (field(chances[c] > 0.5) + field(regions[c]))
        voxels = list(np.ndindex(SHAPE))
        for name, kept in (("inside", True), ("outside", False)):
            total = sum(weighted[v] for v in voxels if regions[c][v] == kept)
            assert getattr(row, name) == pytest.approx(total / len(voxels), rel=1e-5)
        own = [v for v in voxels if regions[c][v]]
        other = [v for v in voxels if regions[:, *v].any() and not regions[c][v]]
        pairs = [(chances[c][a], chances[c][b]) for a in own for b in other]
        wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
        assert row.auc == pytest.approx(wins / (len(own) * len(other)))
        both = (predicted[c] & label[c]).sum()
        assert row.dice == pytest.approx(2 * both / (predicted[c].sum() + label[c].sum()))
        assert row.highest == pytest.approx(chances[c].max())
    term = soft_boundary_loss(logits[None], target[None], multilabel).item()
    assert soft_boundary(rows) == pytest.approx(term, rel=1e-5)


def two_blocks(chance_of_first, chance_of_second):
    """SBD and its classes, for a teacher that sees two flat structures in line, and a student that tells the two from
    the background, but not from each other: the same probabilities in both."""
    label = np.zeros((40, 12, 8), np.int64)
    label[4:20, 4:8, 2:5], label[20:36, 4:8, 2:5] = 1, 2
    target = torch.nn.functional.one_hot(torch.tensor(label), 3).movedim(-1, 0).float()
    inside = torch.tensor(label) > 0
    chances = torch.zeros(3, *label.shape)
    chances[1], chances[2] = chance_of_first * inside, chance_of_second * inside
    chances[0] = 1 - chances[1:].sum(0)
    rows = seen(chances.clamp_min(1e-6).log(), target, label, False)
    return soft_boundary(rows), rows


def test_a_class_that_is_given_up_costs_less_than_one_that_is_misplaced():
    undecided, (first, second) = two_blocks(0.5, 0.5)
    assert first.outside > 10 * first.inside and second.outside > 10 * second.inside
    assert first.auc == 0.5  # the same probabilities in both
    given_up, (left_out, kept) = two_blocks(0.05, 0.9)
    neither, _ = two_blocks(0.05, 0.05)
    assert left_out.dice == 0 and left_out.highest == pytest.approx(0.05, abs=1e-3) and kept.dice > 0.6
    assert left_out.inside + left_out.outside < 0.2 * (first.inside + first.outside)
    assert neither < given_up and neither < 0.3 * undecided


def test_a_class_that_is_nowhere():
    """Neither Dice nor AUC of a class that is not there; a row of what is defined."""
    logits = torch.full((3, *SHAPE), -5.0)
    logits[0] = 5.0
    logits[1, :2] = 9.0
    label = np.zeros(SHAPE, np.int64)
    label[:2] = 1
    one, none = seen(logits, logits, label, False)
    assert math.isnan(none.auc) and math.isnan(one.auc) and math.isnan(none.dice) and one.dice == 1
    lines = table(["a.pt"], ["x", "y"], [[[one, none], [one, Seen(0.5, 0.5, 0.75, 1.0, 2.0)]]])
    assert len(lines) == 4 and lines[2].split(" | ")[2:6] == ["x", "100.0", "0.98", "-"]
    assert lines[3].split(" | ")[2:6] == ["y", "50.0", "0.25", "0.750"]
    assert lines[2].startswith("| `a.pt` | ")


@pytest.mark.slow
def test_the_table_of_finished_runs(tmp_path):
    folder = make_workspace(tmp_path)
    train("--method", "supervised", "--student", "resunet", cwd=folder)
    train("--method", "kd", "--opts", "teacher_checkpoint=runs/tiny/supervised/resunet/seed0/best.pt", cwd=folder)
    teacher, student = "runs/tiny/supervised/resunet/seed0/best.pt", "runs/tiny/kd/resunet-unet/seed0/last.pt"
    result = run("tools/soft_boundary.py", "--teacher", teacher, student, teacher, "--split", "train", cwd=folder)
    lines = result.stdout.splitlines()
    assert lines[-1] == f"5 train cases, teacher {teacher}" and len(lines) == 7
    rows = [line.strip("| ").split(" | ") for line in lines[2:6]]
    assert [(cells[0], cells[2]) for cells in rows] == [(f"`{path}`", name) for path in (student, teacher)
                                                         for name in ("ball", "box")]  # fmt: skip
    assert all(len(cells) == 8 and np.isfinite([float(cell) for cell in cells[3:]]).all() for cells in rows)
    one = run("tools/soft_boundary.py", "--teacher", teacher, student, "--cases", "1", cwd=folder)
    assert one.stdout.splitlines()[-1].startswith("1 val cases")

    site = make_site(tmp_path / "few", "la")
    site.replace("max_steps: 4", "max_steps: 1")
    run("train_3d_crkd.py", "--config", "tiny.yaml", "--method", "supervised", cwd=site.folder)
    few = str(site.run_folder("supervised") / "last.pt")
    for arguments, expected in (
        ([few], "a run of few labels"),
        ([student, "--cases", "0"], "expected 1 or more"),
        (["nothing.pt"], "nothing.pt"),
    ):
        failed = run("tools/soft_boundary.py", "--teacher", teacher, *arguments, cwd=folder, ok=False)
        assert failed.returncode and expected in failed.stderr
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text().replace("dataset: tiny", "dataset: other"))
    train("--method", "supervised", "--opts", "max_steps=1", cwd=folder)
    failed = run("tools/soft_boundary.py", "--teacher", teacher, "runs/other/supervised/unet/seed0/last.pt", cwd=folder,
                 ok=False)  # fmt: skip
    assert "trained on other with background, ball, box, but --teacher" in failed.stderr
