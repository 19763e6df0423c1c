"""When the scores in a teacher's checkpoint stand for those of a new run."""

import dataclasses
from types import SimpleNamespace

import pytest

from dataloaders import Case
from dataloaders.lists import patient_function
from train_3d_distill import Config
from utils.distillation import (
    _other_preprocessing,
    _seen_in_training,
    _validated_alike,
    teacher_path,
)

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


@pytest.mark.parametrize(
    "changed, shown",
    [
        ({}, []),
        ({"spacing": None, "flip_prob": 0.5, "patch_size": (8, 8, 8), "normalize": "volume"}, []),
        ({"window": [-1000.0, 1000.0]}, ["window: [-1000.0, 1000.0] in the teacher's run, "]),
        (
            {"intensity": "zscore", "spacing": (2, 2, 2)},
            ["intensity: zscore", "spacing: [2, 2, 2]"],
        ),
        ({"orientation": "LPS", "crop_foreground": False}, ["crop_foreground", "orientation: LPS"]),
        ({"format": "nnunet"}, ["format: nnunet"]),
        ({"format": "la"}, ["format: la in the teacher's run, msd here"]),
        ({"format": "mine"}, ["format: mine"]),
    ],
)
def test_a_teacher_of_other_preprocessing(changed, shown):
    found = _other_preprocessing(checkpoint(**changed), CONFIG)
    assert len(found) == len(shown)
    for text, start in zip(found, shown):
        assert text.startswith(start) and " here" in text


def test_a_teacher_that_has_seen_the_cases():
    dataset = SimpleNamespace(patient=patient_function(""), named=lambda case: case.name)
    splits = {"val": [Case("a", ())], "test": [Case("p1_visit2", ()), Case("c", ())]}
    lists = {"labelled": ["x", "p1_visit1"], "unlabelled": ["c"], "val": ["a"], "test": []}
    alone = {"cases": lists, "config": {"method": "supervised"}}
    assert _seen_in_training(alone, dataset, splits) == ["p1_visit2 (test)"]
    semi = {"cases": lists | {"labelled": ["a"]}, "config": {"method": "crkd"}}
    assert _seen_in_training(semi, dataset, splits) == ["a (val)", "c (test)"]
    older = {"cases": {"train": ["c"], "val": ["a"]}}
    assert _seen_in_training(older, dataset, splits) == ["c (test)"]


def test_a_fold_has_the_teacher_of_its_tag(tmp_path):
    def path(tag, **more):
        return teacher_path(dataclasses.replace(CONFIG, runs_dir=str(tmp_path), tag=tag, **more))

    plain, tagged = path(""), tmp_path / "x/supervised/resunet/seed0-fold1/best.pt"
    assert plain == tmp_path / "x/supervised/resunet/seed0/best.pt" == path("fold1")
    tagged.parent.mkdir(parents=True)
    tagged.touch()
    assert (path("fold1"), path("fold2"), path("")) == (tagged, plain, plain)
    assert str(path("fold1", teacher_checkpoint="other.pt")) == "other.pt"
