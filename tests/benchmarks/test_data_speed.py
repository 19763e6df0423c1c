"""The data benchmark runs at its smallest size: the cache, files read anew and MONAI's transforms
agree.
"""

import re

import numpy as np
import pytest

from benchmarks import data_speed
from dataloaders.msd import MSDDataset

ARGUMENTS = ["--small", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def short_step(monkeypatch):
    monkeypatch.setattr(data_speed, "STEP", 0.005)


def test_small_run_prints_a_row_per_part(tmp_path, capsys):
    out = tmp_path / "table.md"
    assert data_speed.main([*ARGUMENTS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert out.read_text() in printed and "wait for a batch" in printed
    for part, rows in (("start-up", 2), ("batch", 2), ("fed", 1)):
        assert len(re.findall(rf"^\| {part}, ", printed, re.MULTILINE)) == rows


def test_a_cache_that_returns_something_else_is_refused(monkeypatch):
    read = MSDDataset.read

    def wrong(self, case):
        sample = read(self, case)
        return sample | {"image": np.array(sample["image"]) + 1}

    monkeypatch.setattr(MSDDataset, "read", wrong)
    with pytest.raises(AssertionError, match="'image' from the cache differs"):
        data_speed.main(ARGUMENTS)
