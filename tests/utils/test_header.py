"""What a training prints at its start, and its estimates of time."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import header
from utils.header import TIMED, Pace, duration


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.2, "1 s"),
        (59.4, "59 s"),
        (59.8, "1 min"),
        (3570, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (48 * 3600 + 4 * 3600, "2 d 4 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_the_header_names_data_networks_teacher_device_and_folder():
    described = {
        "cases": {"labelled": ["a", "b"], "unlabelled": [], "val": ["c"], "test": ["d"] * 3},
        "network": {"name": "net"},
    }
    cfg = Namespace(dataset="d", method="kd", preset="as_released", max_steps=24000, teacher="big")
    parts = {"student": nn.Linear(9, 10), "method": nn.Linear(3, 3), "scaler": None}
    where = Path("runs/with space"), torch.device("cpu"), 2
    scores = {"dice": 0.8234}
    lines = header.header(cfg, described, *where, parts, nn.Linear(99, 100), scores)
    assert lines[:4] == [
        "data     d, 2 labelled, 1 val, 3 test",
        "network  net, 100 parameters",
        "teacher  big, 10,000 parameters, validation Dice 82.3",
        "method   kd, as_released, 24,000 steps",
    ]
    threads = torch.get_num_threads()
    assert lines[4].startswith(f"device   cpu, {threads} CPU thread")
    assert lines[4].endswith(", in each of 2 processes")
    assert lines[6] == "watch    tensorboard --logdir 'runs/with space'"
    unknown = header.header(cfg, described, *where, parts, nn.Linear(99, 100), None)
    assert unknown[2] == "teacher  big, 10,000 parameters"


def test_unlabelled_cases_that_a_method_leaves_out_are_named_so():
    method = nn.Module()
    method.uses_unlabelled = False
    cases = {"labelled": ["a"], "unlabelled": ["b", "c"]}
    assert header.case_counts(cases, method) == "1 labelled, 2 unlabelled (not used)"
    method.uses_unlabelled = True
    assert header.case_counts(cases, method) == "1 labelled, 2 unlabelled"


def test_estimates_leave_out_the_first_steps_and_take_in_the_first_validation():
    pace, said = Pace(1000, 10, resumed=False), {}
    for done in range(1, 201):
        slow = 50.0 if done < 4 else 0.6
        took = 30.6 if done % 100 == 0 else slow
        text = pace.took(took, validates=done % 100 == 0, saves=done % 100 == 0)
        if text:
            said[done] = text
    assert list(said) == [TIMED, 100]
    assert said[TIMED].startswith("about 10 min for 1,000 steps, without 10 validations")
    assert said[100] == "about 15 min for 1,000 steps, with 10 validations of 30 s"


def test_a_resumed_run_estimates_what_is_left_and_a_short_one_nothing():
    pace = Pace(40, 0, resumed=True)
    said = [pace.took(3.0, validates=False, saves=False) for _ in range(40)]
    assert [text for text in said if text] == ["about 2 min for the 40 steps that were left"]
    short = Pace(TIMED, 1, resumed=False)
    assert not any(short.took(1.0, validates=False, saves=False) for _ in range(TIMED))


def test_steps_that_only_save_are_no_measure():
    pace = Pace(100, 0, resumed=False)
    said = [pace.took(9.0 if k % 2 else 1.0, False, saves=bool(k % 2)) for k in range(TIMED)]
    assert re.match("about 2 min for 100 steps", said[-1])
