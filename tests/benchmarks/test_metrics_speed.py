"""The benchmark runs on tiny sizes, its results agree, and its table has a row for each part and
kind.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_small_run(tmp_path):
    command = [
        sys.executable,
        "benchmarks/metrics_speed.py",
        "--small",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        tmp_path / "table.md",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ][2:]
    assert [row[1] for row in rows] == ["medpy", "medpy", "MONAI", "MONAI", "medpy", "medpy"]
    assert [row[0].split(", ")[2] for row in rows] == ["clean", "noisy"] * 3
