"""Losses and gradients that are not finite, loss scales, and --deterministic, in the scripts as
they are run.
"""

import functools
import json

import pytest
import torch

from tests.reliability.faults import poison_batch, poison_gradient
from tests.reliability.test_kill import differences
from utils.checkpoint import PREVIOUS, load_checkpoint

ONE_OF_EACH_SCRIPT = ("supervised", "crkd", "lefed")
# Draws of labelled data that make step 3, and the number of an update of that step
DRAWS = {"supervised": 3, "acf_bckd": 3, "cirkd": 3, "crkd": 6, "acmt": 6, "lefed": 6}
# LeFeD makes three updates of each batch
UPDATES = {name: 10 if name == "lefed" else 3 for name in DRAWS}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
def test_what_is_not_finite_stops_the_run_and_keeps_the_evidence(site, name, what):
    place = site(name)
    trap = (
        functools.partial(poison_batch, DRAWS[name])
        if what == "loss"
        else functools.partial(poison_gradient, UPDATES[name])
    )
    ended = place.run(prepare=trap)
    assert ended.code == 1 and "Traceback" not in ended.text
    said = ended.text.strip().splitlines()[-1]
    path = place.folder / "nonfinite_step3.pt"
    assert said.startswith("error: step 3: ") and f"in {place.cell.folder}/{path.name}" in said, (
        ended.text
    )
    assert "skip_nonfinite=10" in said and "cases ['" in said
    kept = load_checkpoint(path)
    assert kept["step"] == 3 and kept["cases"]
    assert all(f"{term} {value:.4g}" in said for term, value in kept["terms"].items())
    images = (
        kept["batch"]["labelled"]["image"]
        if "labelled" in kept["batch"]
        else kept["batch"]["image"]
    )
    if what == "loss":
        assert "the loss is not finite" in said
        assert (
            any(value != value for value in kept["terms"].values())
            and not torch.isfinite(images).all()
        )
    else:
        assert (
            "1 gradients are not finite, the first that of " + kept["nonfinite_gradients"][0]
            in said
        )
        assert torch.isfinite(images).all() and len(kept["nonfinite_gradients"]) == 1
    assert load_checkpoint(place.folder / "last.pt")["step"] == 2
    assert all(
        torch.isfinite(v).all()
        for v in load_checkpoint(place.folder / "last.pt")["weights"].values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cirkd", "acmt", "lefed"])
def test_steps_that_are_left_out_leave_no_trace(site, name):
    """Two poisoned steps of two allowed: running statistics, queues, teachers and weights stay
    finite, log and checkpoint count them, and a third one stops the run.
    """
    place = site(name)
    draws = (DRAWS[name], DRAWS[name] + (1 if DRAWS[name] == 3 else 2))
    ended = place.run(
        "skip_nonfinite=2", "log_interval=1", prepare=functools.partial(poison_batch, *draws)
    )
    assert ended.code == 0, ended.text
    assert "left out (1 of 2)" in ended.text and "left out (2 of 2)" in ended.text
    last = load_checkpoint(place.folder / "last.pt")
    assert last["watch"] == {"skipped": 2} and last["step"] == 6
    tensors = [*last["weights"].values(), *last["method"].values()]
    assert all(torch.isfinite(value).all() for value in tensors if value.is_floating_point())
    train = [entry for entry in lines(place.folder) if entry["kind"] == "train"]
    assert [entry["skipped"] for entry in train] == [0, 0, 0, 1, 2, 2]
    assert [entry["loss"] is None for entry in train] == [False, False, False, True, True, False]

    other = site(name, "one allowed")
    ended = other.run("skip_nonfinite=1", prepare=functools.partial(poison_batch, *draws))
    assert (
        ended.code == 1
        and "step 4: the loss" in ended.text
        and "1 steps before were left out" in ended.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cirkd", "acmt"])
def test_a_step_that_is_left_out_changes_nothing(site, name):
    """Weights, statistics, queues and moving averages after the third step are those before it, to
    the last bit.
    """
    place, draw = site(name), 2 if DRAWS[name] == 3 else 4
    ended = place.run(
        "max_steps=3",
        "save_interval=1",
        "val_interval=100",
        "skip_nonfinite=1",
        prepare=functools.partial(poison_batch, draw),
    )
    assert ended.code == 0, ended.text
    before, after = (load_checkpoint(place.folder / name) for name in (PREVIOUS, "last.pt"))
    assert (before["step"], after["step"]) == (2, 3)
    assert (before["watch"], after["watch"]) == ({"skipped": 0}, {"skipped": 1})
    for key in ("weights", "method", "optimizer"):
        found = differences(before[key], after[key])
        assert all(where.endswith("/lr") for where in found), found


@pytest.mark.slow
def test_a_stopped_run_goes_on_when_steps_may_be_left_out(site):
    place, trap = site("supervised"), functools.partial(poison_batch, 3)
    assert place.run(prepare=trap).code == 1
    ended = place.run("--resume", "skip_nonfinite=10", prepare=trap)
    assert ended.code == 0 and "left out (1 of 10)" in ended.text
    assert load_checkpoint(place.folder / "last.pt")["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
def test_a_collapsing_loss_scale_is_reported(site, name):
    """fp16: every update overflows, whatever the scale. One that overflows is nothing to report."""
    steps = "max_steps=20" if name != "lefed" else "max_steps=8"  # of three updates each
    once = site(name, "once").run(
        "--amp", "fp16", "max_steps=2", prepare=functools.partial(poison_gradient, 0)
    )
    assert once.code == 0, once.text
    place = site(name)
    ended = place.run(
        "--amp",
        "fp16",
        steps,
        "log_interval=2",
        "val_interval=100",
        "save_interval=100",
        prepare=functools.partial(poison_gradient, *range(100)),
    )
    assert ended.code == 1, ended.text
    said = ended.text.strip().splitlines()[-1]
    assert (
        "the fp16 loss scale fell to 0.5" in said
        and "--amp bf16" in said
        and "Traceback" not in ended.text
    )
    scales = [entry["loss_scale"] for entry in lines(place.folder) if entry["kind"] == "train"]
    assert scales == sorted(scales, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
def test_deterministic_says_what_it_cannot_guarantee_and_trains_the_same(site, name):
    plain, strict = site(name, "plain"), site(name, "strict")
    assert plain.run("max_steps=2").code == 0
    ended = strict.run("--deterministic", "max_steps=2")
    assert ended.code == 0
    assert (
        "--deterministic: equal runs give equal bits with the same processor type, OMP_NUM_THREADS"
        in ended.text
    )
    first, second = (load_checkpoint(place.folder / "last.pt") for place in (plain, strict))
    assert not differences(first["weights"], second["weights"])  # a CPU has nothing else to offer
    assert second["config"]["deterministic"] is True
