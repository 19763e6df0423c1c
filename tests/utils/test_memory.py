"""Freed memory is kept: a step that takes the same again does not wait for the system to clear
pages.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from utils import modes

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import resource, sys
import torch
from utils.modes import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    weight = torch.ones(1, requires_grad=True)
    a = torch.ones(40, 2**20)
    (weight * a * a).sum().backward()  # the backward pass runs in another thread on some builds

for _ in range(12):  # until the heap has found its order
    step()
taken = []
for _ in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(taken)[3])  # the median: under load the heap may grow once more
"""


def faults(mode):
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))
    }
    command = [sys.executable, "-c", PROGRAM, mode]
    out = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return int(out.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_pages_are_not_given_back():
    assert faults("kept") * 8 < faults("as usual")


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(modes.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(modes.ctypes, "CDLL", None)
    assert modes.keep_freed_memory() is False
