"""Verdicts on steps, also late ones; what is kept of a bad step; deterministic algorithms."""

import math
import subprocess
import sys

import pytest
import torch

from utils.checkpoint import load_checkpoint
from utils.distributed import World
from utils.numerics import AHEAD, StepWatch

OFF = torch.amp.GradScaler("cpu", enabled=False)


def watched(folder, allowed=0, scaler=OFF):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    return network, StepWatch(folder, {"student": network}, scaler, World(), allowed)


def step(watch, number, loss=1.0, **more):
    terms = {"seg": torch.tensor(loss), "kd": torch.tensor(0.5)}
    return watch.passes(
        number, terms, {"image": torch.full((1,), float(number))}, ["case7"], **more
    )


def test_a_finite_step_passes_and_leaves_no_file(tmp_path):
    _, watch = watched(tmp_path)
    assert (
        all(step(watch, k) for k in range(5))
        and not list(tmp_path.iterdir())
        and watch.report() == {}
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(tmp_path, loss):
    _, watch = watched(tmp_path)
    with pytest.raises(
        FloatingPointError,
        match=r"step 4: the loss is not finite \(seg .*, kd 0\.5\); cases \['case7",
    ):
        step(watch, 4, loss)
    kept = load_checkpoint(tmp_path / "nonfinite_step4.pt")
    assert (
        kept["nonfinite_gradients"] == []
        and kept["batch"]["image"].item() == 4
        and kept["terms"]["kd"] == 0.5
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named(tmp_path, value):
    network, watch = watched(tmp_path)
    network[0].bias.grad[1] = value
    network[1].weight.grad = None  # of a parameter that was not used
    with pytest.raises(
        FloatingPointError, match=r"step 0: 1 gradients are not .* that of student\.0\.bias,"
    ):
        step(watch, 0)
    assert load_checkpoint(tmp_path / "nonfinite_step0.pt")["nonfinite_gradients"] == [
        "student.0.bias"
    ]


def test_huge_gradients_are_finite(tmp_path):
    """A sum of squares would overflow."""
    network, watch = watched(tmp_path)
    network[0].weight.grad.fill_(1e30)
    assert step(watch, 0)


class Late:
    """Stands for the event of a device that is `behind` steps behind."""

    def __init__(self, clock, behind):
        self.clock, self.due, self.waited = clock, clock[0] + behind, False

    def query(self):
        return self.waited or self.clock[0] >= self.due

    def synchronize(self):
        self.waited = True


@pytest.mark.parametrize("behind, at", [(0, 3), (2, 5), (100, 3 + AHEAD)])
def test_a_verdict_that_arrives_late_names_its_own_step_and_batch(
    tmp_path, monkeypatch, behind, at
):
    """As on a GPU: nothing waits, but for a verdict of more than AHEAD steps ago."""
    _, watch = watched(tmp_path)
    clock, look = [0], watch._look

    def looking(*arguments):
        found = look(*arguments)
        found.arrived = Late(clock, behind)
        return found

    monkeypatch.setattr(watch, "_look", looking)
    for clock[0] in range(at):
        assert step(watch, clock[0], math.nan if clock[0] == 3 else 1.0)
    clock[0] = at
    with pytest.raises(FloatingPointError, match="step 3: the loss is not finite"):
        step(watch, at, math.nan if at == 3 else 1.0)
    assert load_checkpoint(tmp_path / "nonfinite_step3.pt")["batch"]["image"].item() == 3


def test_all_is_settled_before_something_is_saved(tmp_path, monkeypatch):
    _, watch = watched(tmp_path)
    look, events = watch._look, []

    def looking(*arguments):
        found = look(*arguments)
        found.arrived = Late([0], 100)
        events.append(found.arrived)
        return found

    monkeypatch.setattr(watch, "_look", looking)
    assert step(watch, 0, math.nan) and step(watch, 1) and not any(event.waited for event in events)
    with pytest.raises(FloatingPointError, match="step 0"):
        step(watch, 2, wait=True)


def test_buffers_are_as_before_a_step_that_is_left_out(tmp_path):
    network, watch = watched(tmp_path, allowed=2)
    watch.before()
    network(torch.full((4, 2), math.nan))
    assert not torch.isfinite(network[1].running_mean).all()
    assert not step(watch, 0, math.nan)
    assert (
        torch.equal(network[1].running_mean, torch.zeros(3)) and network[1].num_batches_tracked == 0
    )
    assert watch.report() == {"skipped": 1.0} and watch.state_dict() == {"skipped": 1}


def test_a_step_of_several_updates_counts_once_and_the_count_goes_on_after_a_resume(tmp_path):
    _, watch = watched(tmp_path, allowed=2)
    for _ in range(3):
        watch.before()
        assert not step(watch, 5, math.nan)
    _, resumed = watched(tmp_path, allowed=2)
    resumed.load_state_dict(watch.state_dict())
    resumed.before()
    assert not step(resumed, 6, math.nan)
    with pytest.raises(
        FloatingPointError, match=r"step 7: .*2 steps before were left out.*skip_nonfinite=12"
    ):
        step(resumed, 7, math.nan)


def test_a_checkpoint_from_before_steps_were_counted(tmp_path):
    _, watch = watched(tmp_path, allowed=1)
    watch.load_state_dict({})
    assert watch.skipped == 0


def test_overflow_under_fp16_is_the_scalers_business_until_the_scale_collapses(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    network, watch = watched(tmp_path, scaler=scaler)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    scaler.scale(torch.tensor(1.0))
    for number in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        assert step(watch, number, wait=True)
        scaler.step(optimizer)
        scaler.update()
    assert watch.report() == {"loss_scale": 0.5}
    with pytest.raises(
        FloatingPointError, match=r"step 3: the fp16 loss scale fell to 0\.5.*--amp bf16"
    ):
        step(watch, 3, wait=True)
    assert len(load_checkpoint(tmp_path / "nonfinite_step3.pt")["nonfinite_gradients"]) == 4
    with pytest.raises(FloatingPointError, match="step 4: the loss is not finite"):
        step(watch, 4, math.nan)


def test_operations_without_a_deterministic_form_are_named_once():
    """In a process of its own: the switches are for the whole process."""
    code = (
        "import torch\n"
        "from utils.numerics import use_deterministic\n"
        "use_deterministic(torch.device('cpu'), compiled=True)\n"
        "assert torch.are_deterministic_algorithms_enabled() and "
        "torch.backends.cudnn.deterministic\n"
        "import os, warnings\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "for _ in range(3):\n"
        "    torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))\n"
        "warnings.warn('another matter')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("put_ has no such form") == 1 and "another matter" in result.stderr
    assert (
        "with the same processor type" in result.stderr
        and "torch.compile generates is outside" in result.stderr
    )
