"""Freed memory is kept: a step that takes the same again does not wait for the system to clear pages."""

import platform
import subprocess
import sys

import pytest

from utils import memory

PROGRAM = """
import resource, sys
import torch
from utils.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def step():
    weight = torch.ones(1, requires_grad=True)
    a = torch.ones(40, 2**20)
    (weight * a * a).sum().backward()  # the backward pass runs in another thread on some builds

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    out = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(out.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_pages_are_not_given_back():
    assert faults("kept") * 20 < faults("as usual")


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert memory.keep_freed_memory() is False
