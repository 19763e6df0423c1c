"""How Weights & Biases is started, through a stand-in with its interface."""

import importlib.machinery
import json
import sys
import types

import pytest

from utils.config import ConfigError
from utils.runlog import RunLog, require_logger, start_wandb

CONFIG = {"dataset": "tiny", "lr": 0.1, "class_names": ("background", "kidney (left)")}


def module(name, **members):
    result = types.ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(result).update(members)
    return result


class FakeWandb:
    """wandb.init and the run that it returns."""

    def __init__(self):
        self.inits, self.finished = [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def finish(self):
        self.finished += 1


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    return fake


@pytest.fixture
def folder(tmp_path):
    result = tmp_path / "runs/tiny/kd/a-b/seed0"
    result.mkdir(parents=True)
    return result


def config(tmp_path):
    return CONFIG | {"runs_dir": str(tmp_path / "runs")}


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="python -m pip install wandb"):
        require_logger("wandb")
    require_logger("")


def test_a_service_that_is_gone_says_what_to_take():
    with pytest.raises(ConfigError, match="mlflow is no longer supported; take --logger wandb"):
        require_logger("mlflow")


def test_wandb_copies_the_events_of_tensorboard(wandb, folder, tmp_path):
    log = RunLog(folder, 0, start_wandb(folder, config(tmp_path), False))
    log.scalars(3, "val", {"dice": 0.5})
    log.close()
    (start,) = wandb.inits
    assert start["sync_tensorboard"] is True and start["dir"] == str(folder)
    assert (start["project"], start["name"], start["resume"]) == ("tiny", "tiny/kd/a-b/seed0", None)
    assert start["config"]["lr"] == 0.1 and wandb.finished == 1
    assert json.loads((folder / "tracker.json").read_text()) == {"wandb": start["id"]}


def test_wandb_goes_on_under_the_same_identifier(wandb, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for resumed in (False, True, False):
        start_wandb(folder, config(tmp_path), resumed)
    first, second, third = wandb.inits
    assert first["id"] == second["id"] != third["id"]
    assert [start["resume"] for start in wandb.inits] == [None, "allow", None]
    assert first["project"] == "mine"


def test_a_service_that_does_not_finish_is_a_warning(wandb, folder, tmp_path, monkeypatch, capsys):
    log = RunLog(folder, 0, start_wandb(folder, config(tmp_path), False))

    def fail():
        raise ConnectionError("the network is down")

    monkeypatch.setattr(wandb, "finish", fail)
    log.close()
    assert "wandb did not finish (the network is down)" in capsys.readouterr().err


def test_a_service_that_does_not_start_is_a_clear_error(folder, tmp_path, monkeypatch):
    def init(**arguments):
        raise RuntimeError("no account")

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    with pytest.raises(
        ConfigError, match=r"wandb does not start \(no account\).*WANDB_MODE=offline"
    ):
        start_wandb(folder, config(tmp_path), False)
    assert not (folder / "tracker.json").exists()
