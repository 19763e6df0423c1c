"""The benchmark of a CRKD step runs at its smallest size and compares equal passes."""

import re

import pytest

from benchmarks import crkd_step


@pytest.mark.parametrize("clock", [[], ["--cpu-time"]])
def test_small_run_prints_a_row_per_part(tmp_path, capsys, clock):
    out = tmp_path / "table.md"
    assert (
        crkd_step.main(["--small", "--repeats", "1", "--threads", "1", "--out", str(out), *clock])
        == 0
    )
    text = out.read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if re.match(r"\| [23]d: ", line)]
    assert len(rows) == 2 and all("at most 1.15x" in row for row in rows)


def test_sides_with_other_passes_are_refused(monkeypatch):
    def lazy(network, labelled, unlabelled, perturb):
        return {"labelled": network(labelled["image"], return_features=True).logits.mean()}

    monkeypatch.setattr(crkd_step, "network_alone", lazy)
    with pytest.raises(AssertionError, match="differ in their passes"):
        crkd_step.main(["--small", "--repeats", "1", "--threads", "1", "--parts", "2d"])
