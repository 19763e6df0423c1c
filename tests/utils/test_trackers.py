"""What is sent to Weights & Biases and MLflow, through stand-ins with their interfaces."""

import importlib.machinery
import json
import math
import sys
import types

import pytest

from utils.config import ConfigError
from utils.runlog import RunLog
from utils.trackers import open_tracker, require_logger

CONFIG = {"dataset": "tiny", "lr": 0.1, "class_names": ("background", "kidney (left)")}


def module(name, **members):
    result = types.ModuleType(name)
    result.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(result).update(members)
    return result


class FakeWandb:
    """wandb.init and the run that it returns."""

    def __init__(self):
        self.inits, self.metrics, self.lines, self.finished = [], [], [], 0

    def init(self, *, project, name, id, resume, dir, config):
        self.inits.append(
            {"project": project, "name": name, "id": id, "resume": resume, "config": config}
        )
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished += 1


class FakeMlflow:
    """The fluent interface of mlflow."""

    def __init__(self):
        self.uri, self.experiment, self.starts, self.params, self.lines, self.ended = (
            None,
            None,
            [],
            [],
            [],
            0,
        )

    def set_tracking_uri(self, uri):
        self.uri = uri

    def set_experiment(self, name):
        self.experiment = name

    def start_run(self, run_id, run_name):
        self.starts.append((run_id, run_name))
        return types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=run_id or f"run{len(self.starts)}")
        )

    def log_params(self, params):
        self.params.append(params)

    def log_metrics(self, metrics, step):
        self.lines.append((step, metrics))

    def end_run(self):
        self.ended += 1


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    names = (
        "set_tracking_uri",
        "set_experiment",
        "start_run",
        "log_params",
        "log_metrics",
        "end_run",
    )
    members = {name: getattr(fake, name) for name in names}
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", **members))
    return fake


@pytest.fixture
def folder(tmp_path):
    result = tmp_path / "runs/tiny/kd/a-b/seed0"
    result.mkdir(parents=True)
    return result


def config(tmp_path):
    return CONFIG | {"runs_dir": str(tmp_path / "runs")}


def test_without_a_logger_there_is_no_tracker(folder, tmp_path):
    assert open_tracker("", folder, config(tmp_path), False) is None
    assert not (folder / "tracker.json").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_names_the_command(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"python -m pip install {name}"):
        require_logger(name)
    require_logger("")


def test_wandb(wandb, folder, tmp_path):
    log = RunLog(folder, 0, open_tracker("wandb", folder, config(tmp_path), False))
    log.scalars(3, "val", {"dice": 0.5, "liver": math.nan})
    log.close()
    (start,) = wandb.inits
    assert (
        start["project"] == "tiny"
        and start["name"] == "tiny/kd/a-b/seed0"
        and start["resume"] is None
    )
    assert start["config"]["lr"] == 0.1
    assert wandb.lines == [{"step": 3, "val/dice": 0.5}]
    assert wandb.metrics == [("*", "step")] and wandb.finished == 1
    assert json.loads((folder / "tracker.json").read_text()) == {"wandb": start["id"]}


def test_wandb_goes_on_under_the_same_identifier(wandb, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for resumed in (False, True, False):
        open_tracker("wandb", folder, config(tmp_path), resumed).close()
    first, second, third = wandb.inits
    assert first["id"] == second["id"] != third["id"]
    assert [start["resume"] for start in wandb.inits] == [None, "allow", None]
    assert first["project"] == "mine"


def test_mlflow(mlflow, folder, tmp_path):
    log = RunLog(folder, 0, open_tracker("mlflow", folder, config(tmp_path), False))
    log.scalars(7, "val", {"dice": 0.5, "kidney (left)": 0.25, "liver": math.nan})
    log.close()
    assert mlflow.uri == f"sqlite:///{tmp_path / 'runs/mlflow.db'}" and mlflow.experiment == "tiny"
    assert mlflow.starts == [(None, "tiny/kd/a-b/seed0")] and mlflow.ended == 1
    assert mlflow.params[0]["lr"] == "0.1"
    assert mlflow.lines == [(7, {"val/dice": 0.5, "val/kidney _left_": 0.25})]
    assert json.loads((folder / "tracker.json").read_text()) == {"mlflow": "run1"}


def test_mlflow_goes_on_under_the_same_identifier(mlflow, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for resumed in (False, True, False):
        open_tracker("mlflow", folder, config(tmp_path), resumed).close()
    assert [run for run, _ in mlflow.starts] == [None, "run1", None]
    assert len(mlflow.params) == 2  # those of a run that goes on cannot change
    assert mlflow.uri is None and mlflow.experiment is None  # the user's own hold


def test_identifiers_of_both_services_are_kept(wandb, mlflow, folder, tmp_path):
    for name in ("wandb", "mlflow"):
        open_tracker(name, folder, config(tmp_path), False)
    assert json.loads((folder / "tracker.json").read_text()).keys() == {"wandb", "mlflow"}


def test_a_service_that_fails_does_not_stop_the_training(
    wandb, folder, tmp_path, monkeypatch, capsys
):
    log = RunLog(folder, 0, open_tracker("wandb", folder, config(tmp_path), False))

    def fail(values):
        raise ConnectionError("the network\nis down")

    monkeypatch.setattr(wandb, "log", fail)
    for step in range(3):
        log.scalars(step, "train", {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("wandb stopped recording (the network is down)") == 1
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3


def test_a_service_that_does_not_start_is_a_clear_error(folder, tmp_path, monkeypatch):
    def init(**arguments):
        raise RuntimeError("no account")

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    with pytest.raises(
        ConfigError, match=r"wandb does not start \(no account\).*WANDB_MODE=offline"
    ):
        open_tracker("wandb", folder, config(tmp_path), False)
    assert not (folder / "tracker.json").exists()
