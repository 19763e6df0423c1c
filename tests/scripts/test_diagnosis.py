"""Measuring the terms of the loss in the scripts: nothing of a training changes, and what was found
is logged.
"""

import importlib.util
import json
import sys

import pytest

from tests.scripts.conftest import make_workspace, train
from tests.scripts.test_train_crkd import make_site
from tests.utils.test_wandb import FakeWandb, module
from utils.checkpoint import digest, load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A workspace with a teacher."""
    folder = make_workspace(tmp_path_factory.mktemp("diagnosis"))
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=2", cwd=folder)
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_training(first, second):
    one, other = (load_checkpoint(folder / "last.pt") for folder in (first, second))
    for key in ("weights", "method"):
        assert digest(one[key]) == digest(other[key]), key
    momenta = [
        {str(k): v["momentum_buffer"] for k, v in each["optimizer"]["state"].items()}
        for each in (one, other)
    ]
    assert digest(momenta[0]) == digest(momenta[1])
    assert one["scaler"] == other["scaler"] and one["best"] == other["best"]
    assert [entry for entry in log_of(first) if entry["kind"] != "diagnosis"] == log_of(second)


@pytest.mark.parametrize(
    "method, amp",
    [
        ("acf_bckd", "off"),
        ("acf_bckd", "fp16"),
        ("acf_bckd", "bf16"),
        ("cirkd", "off"),
        ("ifvd", "off"),
        ("emkd", "off"),
    ],
)
def test_distillation_is_bit_identical_with_and_without(taught, method, amp):
    options = ("--method", method, "--amp", amp, "--opts", "max_steps=3")
    train(*options, "tag=with", "diagnose_interval=1", cwd=taught)
    train(*options, "tag=without", "diagnose_interval=0", cwd=taught)
    base = taught / f"runs/tiny/{method}/resunet-unet"
    tags = [base / f"seed0-{tag}" for tag in ("with", "without")]
    if amp != "off":  # runs of equal tags differ in nothing else
        assert load_checkpoint(tags[0] / "last.pt")["config"]["amp"] == amp
    assert_same_training(*tags)
    lines = [entry for entry in log_of(tags[0]) if entry["kind"] == "diagnosis"]
    assert [entry["step"] for entry in lines] == [0, 1, 2]
    terms = [
        key for key in log_of(tags[1])[1] if key not in ("step", "kind", "loss", "lr", "loss_scale")
    ]
    for entry in lines:
        for figure in ("loss_share", "grad_share"):
            assert sum(entry[f"{figure}/{term}"] for term in terms) == pytest.approx(1)
    for folder in tags:  # the next parameter of this test starts anew
        folder.rename(folder.with_name(f"{folder.name}-{amp}"))


@pytest.mark.parametrize("kind, method", [("la", "crkd"), ("la", "lefed"), ("acdc", "crkd")])
def test_training_with_few_labels_is_bit_identical_with_and_without(tmp_path, kind, method):
    site = make_site(tmp_path, kind)
    options = ("--method", method, "--opts", "max_steps=2")
    site.train(*options, "tag=with", "diagnose_interval=1")
    site.train(*options, "tag=without", "diagnose_interval=0")
    tags = [site.run_folder(method, seed=f"seed0-{tag}") for tag in ("with", "without")]
    assert_same_training(*tags)
    lines = [entry for entry in log_of(tags[0]) if entry["kind"] == "diagnosis"]
    # one for a step, however many updates it makes
    assert [entry["step"] for entry in lines] == [0, 1]
    assert "grad_share/sup" in lines[0]


def test_resume_goes_on_with_the_same_lines(taught):
    base = taught / "runs/tiny/kd/resunet-unet"
    options = ("--method", "kd", "--opts", "diagnose_interval=1")
    train(*options, "tag=straight", cwd=taught)
    train(*options, "tag=broken", "max_steps=2", cwd=taught)
    train("--resume", *options, "tag=broken", cwd=taught)
    kinds = [
        [(e["step"], e["kind"]) for e in log_of(base / f"seed0-{tag}")]
        for tag in ("straight", "broken")
    ]
    assert kinds[0] == kinds[1] and kinds[0][0] == (0, "teacher")


def test_what_was_found_is_printed_once_at_the_end(taught):
    options = (
        "diagnose_interval=1",
        "max_steps=2",
        "tag=weak",
        "method_args={kd: {weight: 1.0e-9}}",
    )
    errors = train("--method", "kd", "--opts", *options, cwd=taught).stderr
    assert errors.count("warning: the term 'kd' is negligible") == 1
    assert errors.count("warning: the term 'seg' dominates") == 1


def test_a_teacher_that_was_validated_otherwise_is_validated_again(taught):
    train("--method", "kd", "--opts", "tag=overlap", "overlap=0.25", "max_steps=1", cwd=taught)
    (line,) = [
        e
        for e in log_of(taught / "runs/tiny/kd/resunet-unet/seed0-overlap")
        if e["kind"] == "teacher"
    ]
    stored = load_checkpoint(taught / "runs/tiny/supervised/resunet/seed0/best.pt")["val"]
    assert line.keys() - {"step", "kind"} == stored.keys()
    assert line["dice"] == pytest.approx(stored["dice"], abs=0.2)


def test_a_logger_is_started_with_the_run_and_goes_on_with_it(taught, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    options = ("--method", "kd", "--opts", "tag=logged")
    train("--logger", "wandb", *options, "max_steps=2", cwd=taught)
    train("--logger", "wandb", "--resume", *options, "max_steps=4", cwd=taught)
    train("--resume", *options, "max_steps=4", cwd=taught)  # and without it
    assert [start["resume"] for start in fake.inits] == [None, "allow"]
    assert fake.inits[0]["id"] == fake.inits[1]["id"] and fake.inits[0]["config"]["method"] == "kd"
    assert all(start["sync_tensorboard"] for start in fake.inits) and fake.finished == 2


def test_a_logger_that_is_not_there_is_an_error_before_the_first_step(taught, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else find(name, *rest),
    )
    names = {
        "wandb": "python -m pip install wandb",
        "mlflow": "mlflow is no longer supported; take --logger wandb",
        "tensorbord": "choose from",
    }
    for name, expected in names.items():
        result = train(
            "--logger", name, "--method", "kd", "--opts", "tag=none", cwd=taught, ok=False
        )
        assert expected in result.stderr and "Traceback" not in result.stderr
