"""When the scores in a teacher's checkpoint stand for those of a new run."""

import dataclasses

import pytest

from dataloaders import Case
from train_3d_distill import Config
from utils.distillation import _validated_alike

CASES = [Case("a", ()), Case("b", ())]
CONFIG = Config(
    dataset="x", data_root="d", max_steps=2, patch_size=(16, 16, 16), flip_prob=0.0, cache_dir="c"
)


def checkpoint(**changed):
    config = dataclasses.asdict(CONFIG) | changed
    config = {key: value for key, value in config.items() if value is not None}
    return {"config": config, "cases": {"val": ["a", "b"]}}


@pytest.mark.parametrize(
    "changed",
    [
        {"k_divisible": None, "regions": None, "spacing": None, "unlabelled": None},  # not there
        {"cache_dir": "other", "memory_gb": 0.0, "unlabelled": "more", "crop": "uniform"},
        {"flip_prob": 0.5, "rot90_prob": 0.0, "scale_prob": 0.0, "shift_prob": 0.0},
        {"last_start": False, "augmentation": "supervised"},
        {"window": [-175.0, 250.0]},
    ],
)
def test_keys_that_change_no_score(changed):
    assert _validated_alike(checkpoint(**changed), CONFIG, CASES)


@pytest.mark.parametrize(
    "changed",
    [{"spacing": (1.0, 1.0, 1.0)}, {"window": (0.0, 1.0)}, {"dataset": "y"}, {"overlap": 0.25}],
)
def test_keys_that_change_scores(changed):
    assert not _validated_alike(checkpoint(**changed), CONFIG, CASES)
    older = {key: None for key in changed if key in ("spacing", "window")}
    assert _validated_alike(checkpoint(**older), CONFIG, CASES)
