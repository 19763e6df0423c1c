import json
import math

import numpy as np
import pytest
import torch

from utils import runlog
from utils.config import ConfigError
from utils.runlog import BOARD_GROUPS, Averages, RunLog, board_tag, check_terms, read_log


def lines(folder):
    return [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def write(folder, steps, start=0):
    log = RunLog(folder, start)
    for step in steps:
        log.scalars(step, "train", {"loss": step / 2})
    log.close()


def test_one_line_per_call(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(3, "train", {"loss": 1.5, "lr": 1})
    # flushed at once
    assert lines(tmp_path) == [{"step": 3, "kind": "train", "loss": 1.5, "lr": 1}]
    log.scalars(3, "val", {"dice": 0.5})
    log.image(3, "picture", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert lines(tmp_path)[1] == {"step": 3, "kind": "val", "dice": 0.5}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_tensorboard_opens_on_the_loss_and_the_mean_dice(tmp_path):
    """It sorts groups by name and opens the first two."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, values = RunLog(tmp_path), {"loss": 1.0, "lr": 0.1, "dice": 0.5, "aorta": 0.5}
    for kind in BOARD_GROUPS:
        log.scalars(0, kind, values)
    log.close()
    board = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = sorted(board.Tags()["scalars"])
    assert tags[:3] == ["train/loss", "train/lr", "val/dice"]
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert groups[:2] == ["train", "val"]
    assert len(tags) == len(BOARD_GROUPS) * len(values)  # none stands for another
    assert board_tag("of a kind of one's own", "x") == "of a kind of one's own/x"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    log = RunLog(tmp_path)
    log.scalars(0, "val", {"dice": value, "liver": 0.5})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 0,
        "kind": "val",
        "dice": None,
        "liver": 0.5,
    }


def test_resume_drops_lines_from_the_start_step_on(tmp_path):
    write(tmp_path, range(6))
    write(tmp_path, [4, 5, 6], start=4)
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2, 3, 4, 5, 6]


def test_resumed_and_straight_logs_are_equal_bytes(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    write(straight, range(6))
    write(resumed, range(5))
    write(resumed, range(3, 6), start=3)
    assert (straight / "log.jsonl").read_bytes() == (resumed / "log.jsonl").read_bytes()


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    write(tmp_path, range(4))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "tra')
    write(tmp_path, [4], start=4)
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x01",
        b'{"step": 1, "kind": "tra',
        b'{"step": "1", "kind": "val"}',
        b'{"kind": "val", "dice": 0.5}',
        b'{"step": 1, "kind": "val", "dice": "x"}',
        b'{"step": 1, "kind": "val", "dice": NaN}',
        b'{"step": 1, "kind": "val", "\\u001b[2J": 1}',
        b"[" * 100_000,
        b"[1]",
    ],
)
def test_a_damaged_line_costs_that_line_alone(tmp_path, line, capsys):
    write(tmp_path, range(4))
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:2], line + b"\n", *whole[2:], line]))
    assert [entry["step"] for entry in read_log(path)] == [0, 1, 2, 3]
    write(tmp_path, [4], start=4)
    assert [entry["step"] for entry in lines(tmp_path)] == [0, 1, 2, 3, 4]
    assert "log.jsonl: 1 line(s) cannot be read and are left out" in capsys.readouterr().err


def test_each_text_of_a_log_is_looked_at_once(tmp_path, monkeypatch):
    write(tmp_path, range(300))
    looked = []
    real = runlog.check_plain_texts
    monkeypatch.setattr(runlog, "check_plain_texts", lambda text: looked.append(text) or real(text))
    assert len(read_log(tmp_path / "log.jsonl")) == 300
    assert sorted(looked) == ["kind", "loss", "step", "train"]


def test_a_new_run_starts_an_empty_log(tmp_path):
    write(tmp_path, range(4))
    write(tmp_path, [0])
    assert [entry["step"] for entry in lines(tmp_path)] == [0]


def test_resume_without_a_log(tmp_path):
    write(tmp_path, [7], start=7)
    assert [entry["step"] for entry in lines(tmp_path)] == [7]


def added(*steps):
    averages = Averages()
    for step in steps:
        averages.add({name: torch.tensor(value) for name, value in step.items()})
    return averages


def test_averages_are_means_per_name():
    assert added({"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 8.0}).take() == {"a": 1.5, "b": 6.0}


def test_averages_leave_nan_out():
    assert added({"a": 1.0}, {"a": math.nan}, {"a": 3.0}).take() == {"a": 2.0}
    assert math.isnan(added({"a": math.nan}).take()["a"])


def test_a_name_is_averaged_over_the_steps_that_had_it():
    assert added({"a": 1.0}, {"a": 3.0, "b": 5.0}, {"b": 7.0}).take() == {"a": 2.0, "b": 6.0}


def test_averages_start_anew_after_they_are_taken():
    averages = added({"a": 1.0, "b": 2.0})
    averages.take()
    assert averages.take() == {}
    averages.add({"a": torch.tensor(9.0)})
    assert averages.take() == {"a": 9.0}


def test_averages_take_no_graph_and_any_dtype_along():
    averages = Averages()
    averages.add(
        {
            "a": torch.tensor(2.0, requires_grad=True) ** 2,
            "b": torch.tensor(3),
            "c": torch.tensor(1.5).half(),
        }
    )
    assert not any(value.requires_grad for value in averages.sums.values())
    assert averages.take() == {"a": 4.0, "b": 3.0, "c": 1.5}


def test_averages_of_many_small_numbers_are_exact():
    averages = Averages()
    for _ in range(1000):
        averages.add({"a": torch.tensor(0.1)})
    assert averages.take()["a"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_averages_go_on_after_a_round_trip(tmp_path):
    averages, steps = added({"a": 1.0, "b": math.nan}), [{"a": 2.0}, {"b": 3.0, "c": 4.0}]
    torch.save(averages.state_dict(), tmp_path / "state.pt")
    resumed = Averages()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (averages, resumed):
        for step in steps:
            each.add({name: torch.tensor(value) for name, value in step.items()})
    assert resumed.take() == averages.take() == {"a": 1.5, "b": 3.0, "c": 4.0}


def test_a_stored_state_of_averages_does_not_change_afterwards():
    averages = added({"a": 1.0})
    state = averages.state_dict()
    averages.add({"a": torch.tensor(3.0), "b": torch.tensor(1.0)})
    resumed = Averages()
    resumed.load_state_dict(state)
    resumed.add({"c": torch.tensor(1.0)})
    assert state["sums"] == {"a": 1.0} and state["counts"] == {"a": 1}


@pytest.mark.parametrize("name", ["seg", "loss", "lr", "step", "kind", "skipped", "", 3])
def test_names_that_the_log_has_for_something_else(name):
    check_terms({"kd": 1.0}, {"agreement": 0.5}, others=("seg",))
    for terms, monitor in (({name: 1.0}, {}), ({"kd": 1.0}, {name: 0.5})):
        with pytest.raises(ConfigError, match=f"is called {name!r}; expected text other than.*seg"):
            check_terms(terms, monitor, others=("seg",))
    with pytest.raises(ConfigError, match="a number of its monitor is called 'kd'"):
        check_terms({"kd": 1.0}, {"kd": 0.5})
