"""The benchmark of distillation steps runs, and refuses to time terms that are not at work."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.distill_step import BARS, Steps, check_terms

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_is_at_work():
    steps = Steps(2, 16)
    for method in (None, *BARS):
        steps.make(method)()
    assert steps.terms.keys() == {"seg", *BARS}
    check_terms(steps.terms)


def test_small_run(tmp_path):
    out, methods = tmp_path / "table.md", ("acf_bckd", "cirkd")
    command = [
        sys.executable,
        "benchmarks/distill_step.py",
        "--small",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        out,
        "--methods",
        *methods,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    table = out.read_text()
    assert table in run.stdout
    assert all(table.count(f"| {method} step, 2 patches of 16³ |") == 1 for method in methods)


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
