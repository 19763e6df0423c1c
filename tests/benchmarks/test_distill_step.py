"""The benchmark of distillation steps runs, and refuses to time terms that are not at work."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.distill_step import BARS, check_terms

ROOT = Path(__file__).resolve().parents[2]


def test_small_run_of_every_method(tmp_path):
    out = tmp_path / "table.md"
    command = [
        sys.executable, "benchmarks/distill_step.py", "--small", "--repeats", "1", "--threads", "1", "--out", out
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    table = out.read_text()
    assert table in run.stdout
    assert all(table.count(f"| {method} step, 2 patches of 16³ |") == 1 for method in BARS)


@pytest.mark.parametrize(
    "method, message",
    [
        ({"seg": 2.0, "kd": 1.0}, "kd: its student differs"),
        ({"seg": 1.0, "kd": 0.0}, "kd: the term kd is not a positive number"),
        ({"seg": 1.0, "kd": float("nan")}, "kd: the term kd"),
    ],
)
def test_idle_or_different_steps_are_errors(method, message):
    check_terms({"seg": {"seg": 1.0}, "kd": {"seg": 1.0, "kd": 0.5}})
    with pytest.raises(AssertionError, match=message):
        check_terms({"seg": {"seg": 1.0}, "kd": method})
