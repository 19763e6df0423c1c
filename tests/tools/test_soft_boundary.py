"""What the soft boundary term sees: against loops, a student that gives a class up, the table of
finished runs.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from losses.acf_bckd import soft_boundary_loss
from tests.scripts.conftest import make_workspace, run, train
from tests.scripts.test_train_crkd import make_site
from tools.soft_boundary import Seen, seen, soft_boundary, table
from utils.checkpoint import atomic_save, load_checkpoint

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
        label, predicted = (
            np.stack([values == c for c in (1, 2)]) for values in (ids, logits.argmax(0).numpy())
        )
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


def two_blocks(first):
    """SBD and its classes for a teacher that sees two flat structures, 16 voxels long, end to end;
    the student has the second one right, and the first where `first`, a function of the structures'
    masks, says.
    """
    label = np.zeros((40, 12, 8), np.int64)
    label[4:20, 4:8, 2:5], label[20:36, 4:8, 2:5] = 1, 2
    ids = torch.tensor(label)
    target = torch.nn.functional.one_hot(ids, 3).movedim(-1, 0).float()
    chances = torch.zeros(3, *label.shape)
    chances[1] = first(ids == 1, ids > 0)
    chances[2] = torch.minimum(0.9 * (ids == 2), 1 - chances[1])
    chances[0] = 1 - chances[1:].sum(0)
    rows = seen(chances.clamp_min(1e-6).log(), target, label, False)
    return soft_boundary(rows), rows


def test_a_class_that_is_left_out_costs_less_than_one_in_the_wrong_place():
    left_out, (first, second) = two_blocks(lambda own, both: 0.05 * both)
    assert first.dice == 0 and first.highest == pytest.approx(0.05, abs=1e-3) and second.dice == 1
    everywhere, (first, _) = two_blocks(lambda own, both: 0.45 * both)
    assert first.outside > 10 * first.inside and everywhere > 5 * left_out
    shifted, (first, _) = two_blocks(lambda own, both: 0.9 * own.roll(4, 0))
    assert first.dice == 0.75 and shifted > 3 * left_out
    shifted_more, (first, _) = two_blocks(lambda own, both: 0.9 * own.roll(8, 0))
    assert first.dice == 0.5 and shifted_more > 10 * left_out
    right, _ = two_blocks(lambda own, both: 0.9 * own)
    assert right < left_out


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
    train(
        "--method",
        "kd",
        "--opts",
        "teacher_checkpoint=runs/tiny/supervised/resunet/seed0/best.pt",
        cwd=folder,
    )
    teacher, student = (
        "runs/tiny/supervised/resunet/seed0/best.pt",
        "runs/tiny/kd/resunet-unet/seed0/last.pt",
    )
    result = run(
        "tools/soft_boundary.py",
        "--teacher",
        teacher,
        student,
        teacher,
        "--split",
        "train",
        cwd=folder,
    )
    lines = result.stdout.splitlines()
    assert lines[-1] == f"5 train cases, teacher {teacher}" and len(lines) == 7
    rows = [line.strip("| ").split(" | ") for line in lines[2:6]]
    assert [(cells[0], cells[2]) for cells in rows] == [
        (f"`{path}`", name) for path in (student, teacher) for name in ("ball", "box")
    ]
    assert all(
        len(cells) == 8 and np.isfinite([float(cell) for cell in cells[3:]]).all() for cells in rows
    )
    one = run("tools/soft_boundary.py", "--teacher", teacher, student, "--cases", "1", cwd=folder)
    assert one.stdout.splitlines()[-1].startswith("1 val cases")
    # what changes patches alone, and where things are, changes no case
    finished = load_checkpoint(folder / student)
    elsewhere = {"flip_prob": 0.5, "crop": "uniform", "cache_dir": "elsewhere", "unlabelled": "x"}
    atomic_save(finished | {"dataset": finished["dataset"] | elsewhere}, folder / "patches.pt")
    both = run("tools/soft_boundary.py", "--teacher", teacher, student, "patches.pt", cwd=folder)
    rows = [line.split(" | ")[1:] for line in both.stdout.splitlines()[2:6]]
    assert rows[:2] == rows[2:]

    site = make_site(tmp_path / "few", "la")
    site.replace("max_steps: 4", "max_steps: 1")
    run("train_3d_crkd.py", "--config", "tiny.yaml", "--method", "supervised", cwd=site.folder)
    few = str(site.run_folder("supervised") / "last.pt")
    for arguments, expected in (
        ([few], "a run of few labels"),
        ([student, "--cases", "0"], "expected 1 or more"),
        (["nothing.pt"], "nothing.pt"),
    ):
        failed = run(
            "tools/soft_boundary.py", "--teacher", teacher, *arguments, cwd=folder, ok=False
        )
        assert failed.returncode and expected in failed.stderr
    changed = load_checkpoint(folder / student)
    for name, values, expected in (
        (
            "finer",
            {"dataset": changed["dataset"] | {"spacing": (1.0, 1.0, 1.0)}},
            "spacing (1.0, 1.0, 1.0) instead of",
        ),
        ("fold", {"cases": changed["cases"] | {"val": ["case0"]}}, "another val list"),
    ):
        atomic_save(changed | values, folder / f"{name}.pt")
        failed = run(
            "tools/soft_boundary.py",
            "--teacher",
            teacher,
            student,
            f"{name}.pt",
            cwd=folder,
            ok=False,
        )
        assert (
            f"{name}.pt: not comparable with {student}" in failed.stderr
            and expected in failed.stderr
        )
    atomic_save(
        load_checkpoint(folder / teacher) | {"class_names": ["background", "box", "ball"]},
        folder / "other.pt",
    )
    failed = run("tools/soft_boundary.py", "--teacher", "other.pt", student, cwd=folder, ok=False)
    assert "classes background, box, ball instead of background, ball, box" in failed.stderr

    source = b"from networks import NETWORKS\n\n\nclass Own(NETWORKS['unet']):\n    pass\n"
    (folder / "own.py").write_bytes(source)
    record = {"file": "own.py", "sha256": hashlib.sha256(source).hexdigest(), "roles": ["student"]}
    own = changed | {"plugins": {"Own": record}, "network": changed["network"] | {"name": "Own"}}
    atomic_save(own, folder / "own.pt")
    arguments = ("--teacher", teacher, "own.pt", student, "--cases", "1")
    table_of_both = run(
        "tools/soft_boundary.py", *arguments, "--plugin", "own.py:Own", cwd=folder
    ).stdout
    assert [line.split(" | ")[1:] for line in table_of_both.splitlines()[2:4]] == [
        line.split(" | ")[1:] for line in table_of_both.splitlines()[4:6]
    ]
    for more, expected in (
        ((), "to run that file, say so"),
        (("--plugin", "own.py:Else"), "leave it out"),
    ):
        failed = run("tools/soft_boundary.py", *arguments, *more, cwd=folder, ok=False)
        assert failed.returncode and expected in failed.stderr
