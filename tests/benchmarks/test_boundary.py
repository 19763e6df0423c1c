"""The benchmark of the boundary losses runs, and the plain form in it is the loss of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.boundary import (
    check_agreement,
    ellipsoids,
    plain_hard_boundary,
    predictions,
    with_gradient,
)
from losses.acf_bckd import hard_boundary_loss
from tests.losses.test_acf_bckd import slow_hard

ROOT = Path(__file__).resolve().parents[2]


def test_small_run(tmp_path):
    out = tmp_path / "table.md"
    command = [
        sys.executable,
        "benchmarks/boundary.py",
        "--small",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        out,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "peak memory grew by" in run.stdout
    table = out.read_text()
    assert table in run.stdout and table.startswith("| part | peer |")
    assert table.count("soft boundary, 2x4x16³") == table.count("hard boundary, 2x4x16³") == 1


def test_plain_form_is_the_formula():
    label = ellipsoids(2, 4, 8, seed=1)
    assert set(label.unique().tolist()) == {0, 1, 2, 3}
    student, teacher = predictions(label, 4, 2.0, 1, seed=1), predictions(label, 4, 4.0, 0, seed=2)
    expected = slow_hard(student.double().numpy(), teacher.double().numpy(), label.numpy())
    assert plain_hard_boundary(student, teacher, label).item() == pytest.approx(expected, rel=1e-5)


def test_disagreement_is_an_error():
    logits = torch.randn(1, 3, 4, 4, 4)
    label = ellipsoids(1, 3, 4, seed=0)
    good = with_gradient(lambda leaf: hard_boundary_loss(leaf, logits.flip(1), label), logits)
    check_agreement("hard", good, good)
    with pytest.raises(AssertionError, match="hard: the two forms disagree"):
        check_agreement("hard", good, (good[0] * 1.001, good[1]))
    with pytest.raises(AssertionError, match="disagree"):
        check_agreement("hard", good, (good[0], good[1] * 1.001))
