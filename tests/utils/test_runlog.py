import json
import math

import numpy as np
import pytest

from utils.runlog import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def write(folder, steps, start=0):
    log = RunLog(folder, start)
    for step in steps:
        log.scalars(step, "train", {"loss": step / 2})
    log.close()


def test_one_line_per_call(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(3, "train", {"loss": 1.5, "lr": 1})
    assert lines(tmp_path) == [{"step": 3, "kind": "train", "loss": 1.5, "lr": 1}]  # flushed at once
    log.scalars(3, "val", {"dice": 0.5})
    log.image(3, "picture", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert lines(tmp_path)[1] == {"step": 3, "kind": "val", "dice": 0.5}
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(tmp_path, value):
    log = RunLog(tmp_path)
    log.scalars(0, "val", {"dice": value, "liver": 0.5})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 0, "kind": "val", "dice": None, "liver": 0.5}


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


def test_a_new_run_starts_an_empty_log(tmp_path):
    write(tmp_path, range(4))
    write(tmp_path, [0])
    assert [entry["step"] for entry in lines(tmp_path)] == [0]


def test_resume_without_a_log(tmp_path):
    write(tmp_path, [7], start=7)
    assert [entry["step"] for entry in lines(tmp_path)] == [7]
