"""The benchmark of a GPU runs at its smallest size, on the CPU too."""

import pytest
import torch

from benchmarks import gpu


@pytest.mark.slow
def test_small_run_prints_a_row_per_comparison(tmp_path, capsys, monkeypatch):
    # two methods will do
    monkeypatch.setattr(gpu.distill_step, "BARS", {"acf_bckd": 1.25, "kd": 1.3})
    out = tmp_path / "table.md"
    arguments = ("--small", "--device", "cpu", "--repeats", "1", "--threads", "1", "--parts")
    assert gpu.main([*arguments, "distill", "crkd", "inference", "--out", str(out)]) == 0
    text = out.read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.endswith((" met |", " MISSED |"))]
    assert len(rows) == 2 + 2 + 2 * 4


@pytest.mark.parametrize(
    "mode", [mode for mode, settings in gpu.MODES.items() if "compiled" not in settings]
)
def test_a_mode_is_what_the_step_computes_in(mode):
    """Same terms as in float32 to the precision of the mode; not the same to the last bit in
    bfloat16.
    """
    found = {}
    for name, settings in {"plain": {}, mode: gpu.MODES[mode]}.items():
        steps = gpu.distill_step.Steps(2, 16, **settings)
        form = settings.get("memory_format", torch.contiguous_format)
        kernels = [
            p
            for network in (steps.student, steps.teacher)
            for p in network.parameters()
            if p.ndim == 5
        ]
        assert all(tensor.is_contiguous(memory_format=form) for tensor in kernels)
        steps.make("acf_bckd")()
        found[name] = torch.tensor(list(steps.terms["acf_bckd"].values()))
    assert torch.allclose(found[mode], found["plain"], rtol=0.05)
    assert ("bf16" in mode) == (not torch.allclose(found[mode], found["plain"], rtol=1e-4))


def test_an_unknown_device_is_refused():
    with pytest.raises(SystemExit, match="error: --device abacus: not usable here"):
        gpu.main(["--small", "--device", "abacus"])
