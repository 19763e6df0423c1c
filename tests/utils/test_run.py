"""Run folders: derived names, no run overwritten, no resume under another configuration."""

import dataclasses
import json
import os
import re
import signal
import threading
import unicodedata
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dataloaders import Case, Report
from utils.checkpoint import PREVIOUS, CheckpointError, load_checkpoint, save_last
from utils.config import (
    ConfigError,
    labelled_name,
    parse_labelled,
    parse_labelled_or_zero,
    parse_ratio,
)
from utils.run import (
    RESUMABLE,
    STOPPING,
    Run,
    Settings,
    StopSignal,
    open_run,
    resolve_device,
    run_folder,
    run_script,
)
from utils.runlog import read_log


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 1e-6
    max_steps: int = 10
    workers: int = 4
    patch_size: tuple[int, ...] = (8, 8, 8)
    args: dict = dataclasses.field(default_factory=lambda: {"unet": {"channels": (8, 16)}})
    names: tuple[str, ...] = ("background", "Leber ä")


@pytest.mark.parametrize(
    "method, networks, preset, tag, expected",
    [
        ("acf_bckd", "resunet-unet", "clean", "", "acf_bckd/resunet-unet/seed3"),
        ("acf_bckd", "resunet-unet", "as_released", "", "acf_bckd-as_released/resunet-unet/seed3"),
        ("acf_bckd", "resunet-unet", "clean", "wide", "acf_bckd/resunet-unet/seed3-wide"),
        ("supervised", "unet", "clean", "", "supervised/unet/seed3"),
        ("supervised", "unet", "as_released", "", "supervised/unet/seed3"),
    ],
)
def test_run_folder(method, networks, preset, tag, expected):
    assert (
        run_folder("runs", "btcv", method, networks, 3, preset, tag) == Path("runs/btcv") / expected
    )


def test_new_run_writes_its_configuration(tmp_path):
    folder = tmp_path / "a" / "b"
    open_run(folder, Config(), resume=False)
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored == {
        "lr": 1e-6,
        "max_steps": 10,
        "workers": 4,
        "patch_size": [8, 8, 8],
        "args": {"unet": {"channels": [8, 16]}},
        "names": ["background", "Leber ä"],
    }
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_is_not_overwritten(tmp_path):
    open_run(tmp_path, Config(), resume=False)
    open_run(tmp_path, Config(), resume=False)  # nothing saved yet: no loss
    save_last({"step": 1}, tmp_path)
    with pytest.raises(ConfigError, match=r"holds a run already; go on with --resume.*tag=NAME"):
        open_run(tmp_path, Config(), resume=False)
    with pytest.raises(ConfigError, match="holds a run already; its lr differ; remove the folder"):
        open_run(tmp_path, Config(lr=0.1), resume=False)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 1e-6


def test_a_run_of_which_only_the_previous_checkpoint_is_left_is_not_overwritten(tmp_path):
    open_run(tmp_path, Config(), resume=False)
    save_last({"step": 1}, tmp_path)
    os.replace(tmp_path / "last.pt", tmp_path / PREVIOUS)
    with pytest.raises(ConfigError, match="holds a run already"):
        open_run(tmp_path, Config(lr=0.1), resume=False)


def test_resume_with_the_same_configuration(tmp_path):
    open_run(tmp_path, Config(), resume=False)
    save_last({"step": 1}, tmp_path)
    open_run(tmp_path, Config(), resume=True)


def test_resume_with_what_may_change(tmp_path):
    open_run(tmp_path, Config(), resume=False)
    open_run(tmp_path, Config(workers=0, max_steps=20), resume=True)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (stored["workers"], stored["max_steps"]) == (0, 20)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.1}, r"lr: 1e-06 then, 0\.1 now"),
        ({"patch_size": (8, 8, 4)}, r"patch_size: \[8, 8, 8\] then, \[8, 8, 4\] now"),
        ({"args": {"unet": {"channels": (8, 17)}}}, r"args: .*16.* then, .*17.* now"),
    ],
)
def test_resume_with_another_configuration_is_refused(tmp_path, change, message):
    open_run(tmp_path, Config(), resume=False)
    with pytest.raises(ConfigError, match="cannot resume with another configuration.*" + message):
        open_run(tmp_path, Config(workers=0, **change), resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["workers"] == 4


def test_resume_without_the_configuration_is_refused(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(ConfigError, match=r"has a checkpoint but no config\.yaml"):
        open_run(tmp_path, Config(), resume=True)
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("kept", [0, 10, -1, -4])
def test_resume_with_a_configuration_that_was_cut_is_refused(tmp_path, kept):
    open_run(tmp_path, Config(), resume=False)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text()[:kept])
    with pytest.raises(
        ConfigError, match=r"config\.yaml: .*no whole configuration of a run; restore"
    ):
        open_run(tmp_path, Config(), resume=True)


def test_resumable_keys_leave_the_arithmetic_alone():
    forbidden = {
        "lr",
        "seed",
        "patch_size",
        "cases_per_batch",
        "crops_per_case",
        "method",
        "student",
        "teacher",
        "amp",
    }
    assert not RESUMABLE & forbidden


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="--device quantum: not usable here"):
        resolve_device("quantum")
    with pytest.raises(ConfigError, match=r"--device cuda:99: not usable here.*use --device cpu"):
        resolve_device("cuda:99")


def test_stop_signal():
    names = [name for name in STOPPING if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        stop = StopSignal()
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop and stop.exit_code == 128 + signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
        assert not StopSignal() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def test_a_run_from_before_a_key_existed_can_go_on(tmp_path):
    @dataclasses.dataclass
    class Before:
        lr: float = 0.1

    @dataclasses.dataclass
    class Now:
        lr: float = 0.1
        added: str = "default"
        regions: dict = dataclasses.field(default_factory=lambda: {"all": (1, 2)})

    open_run(tmp_path, Before(), resume=False)
    open_run(tmp_path, Now(), resume=True)
    with pytest.raises(ConfigError, match="added: 'default' then, 'other' now"):
        open_run(tmp_path, Now(added="other"), resume=True)
    with pytest.raises(ConfigError, match=r"regions: .*then, \{\} now"):
        open_run(tmp_path, Now(regions={}), resume=True)


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("1", 1),
        ("0.05", 0.05),
        ("5%", 0.05),
        ("12.5%", 0.125),
        ("100%", 1.0),
        ("1.0", 1.0),
        ("all", 1.0),
        ("3.0", 3),
        ("1e-2", 0.01),
    ],
)
def test_labelled_units_are_a_number_or_a_share(text, value):
    parsed = parse_labelled(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "three",
        "3 patients",
        "5 %%",
        "ALL",
        "1/3",
        "200%",
        "0%",
        "-1",
        "0",
        "1.5",
        "inf",
        "nan",
    ],
)
def test_labelled_units_are_nothing_else(text):
    with pytest.raises(ValueError):
        parse_labelled(text)


def test_a_ratio_of_one_is_all_of_them():
    assert labelled_name(parse_ratio("1")) == "all"
    assert [parse_ratio(text) for text in ("0.05", "5%", "1.0", "all")] == [0.05, 0.05, 1.0, 1.0]
    with pytest.raises(ArgumentTypeError, match=r"at most at 1, got 8; .* --labelled"):
        parse_ratio("8")


@pytest.mark.parametrize(
    "labelled, name",
    [
        (3, "3"),
        (1, "1"),
        (0.05, "5%"),
        (0.07, "7%"),
        (0.29, "29%"),
        (0.125, "12.5%"),
        (1.0, "all"),
        (None, "all"),
        (0, "0"),
    ],
)
def test_labelled_units_in_the_name_of_a_folder(labelled, name):
    assert labelled_name(labelled) == name


@pytest.mark.parametrize("text", ["3", "1", "5%", "7%", "29%", "12.5%", "all"])
def test_a_name_of_labelled_units_reads_back_as_itself(text):
    assert labelled_name(parse_labelled(text)) == text
    assert parse_labelled_or_zero(text) == parse_labelled(text)


def test_no_labels_at_all_where_that_is_possible():
    assert parse_labelled_or_zero("0") == 0
    with pytest.raises(ValueError):
        parse_labelled_or_zero("0%")


def test_too_little_memory_of_a_gpu_is_said_in_a_sentence():
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 8 GiB. See the docs."
        )

    said = run_script(main)
    assert said.startswith(
        "error: the GPU has too little memory (CUDA out of memory. Tried to allocate 20.00 MiB. GPU"
    )
    assert "cases_per_batch" in said and {"window_batch", "eval_batch"} <= RESUMABLE


def broken(*arguments):
    raise ConnectionResetError(104, "Connection reset by peer")


class DiesWhileItsItemIsRead(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return torch.zeros(3)


def test_a_connection_that_a_dying_loader_breaks_is_named_as_its_death(monkeypatch):
    def main():
        next(iter(torch.utils.data.DataLoader(DiesWhileItsItemIsRead(), num_workers=1)))

    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_storage_fd", broken)
    said = run_script(main)
    assert said.startswith("error: a loader process died (DataLoader worker (pid")
    assert "killed by signal: Killed" in said
    with pytest.raises(ConnectionResetError):  # of something else
        run_script(broken)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny(Settings):
    method: str = "own"
    preset: str = "clean"
    network: str = "net"
    teacher: str = "big"
    class_names: tuple[str, ...] = ("background", "organ")

    def dataset_arguments(self):
        return {}


@pytest.fixture
def tiny_run(tmp_path):
    """Starts a Run of one layer on the CPU, whose signals are handled as before afterwards."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING}

    def start(resume=False, lists=None, contents=None, teacher=None, **values):
        cfg = Tiny(dataset="d", data_root="x", device="cpu", runs_dir=str(tmp_path), **values)
        run = Run(cfg, Namespace(show_run=False, resume=resume, plugins={}), "net")
        layer, report = nn.Linear(1, 1), Report()
        report.contents = contents or {}
        run.open(report)
        splits = {key: [Case(name, ()) for name in names] for key, names in (lists or {}).items()}
        run.describe("3d", "net", 1, 2, splits, teacher)
        run.keep(layer=layer, nothing=None, scaler=torch.amp.GradScaler("cpu", enabled=False))
        return run, layer

    yield start
    for name, handler in handlers.items():
        signal.signal(getattr(signal, name), handler)


def test_what_is_due_at_which_step(tiny_run):
    run, _ = tiny_run(max_steps=7, log_interval=2, val_interval=3, save_interval=5)
    due = [(run.logs, run.validates, run.saves) for _ in run.steps()]
    assert [k + 1 for k, (logs, _, _) in enumerate(due) if logs] == [2, 4, 6, 7]
    assert [k + 1 for k, (_, validates, _) in enumerate(due) if validates] == [3, 6, 7]
    assert [k + 1 for k, (_, _, saves) in enumerate(due) if saves] == [5, 7]
    assert run.end() == 0


@pytest.mark.parametrize(
    "start, interval, first, steps",
    [(0, 3, 0, 7), (3, 3, 0, 9), (0, 2, 5, 8), (6, 2, 9, 7), (2, 50, 0, 7)],
)
def test_validations_are_counted_as_they_come(tiny_run, monkeypatch, start, interval, first, steps):
    run, _ = tiny_run(max_steps=steps, val_interval=interval)
    monkeypatch.setattr(Tiny, "val_start", first)
    run.start = start
    expected = run._validations_left()
    assert expected == sum(run.validates for _ in run.steps())
    run.end()


def test_the_header_and_the_best_score_are_shown(tiny_run, capsys):
    run, layer = tiny_run(max_steps=4, log_interval=1, val_interval=2, lists={"val": ["a", "b"]})
    shown = capsys.readouterr().out
    assert "data     d, 2 val" in shown and "network  net, 2 parameters" in shown
    assert f"tensorboard --logdir {run.folder}" in shown
    picture = np.zeros((4, 4, 3), np.uint8)
    for step in run.steps():
        run.averages.add({"seg": torch.tensor(1.5)})
        run.record({"seg": None})
        if run.validates:
            run.validated({"dice": 0.8234 - step / 10}, picture, layer.state_dict())
        run.save(layer.state_dict())
    assert "loss 1.500, best 72.3 at 2" in capsys.readouterr().err
    run.end()
    # of more steps, and of none that are left
    resumed, _ = tiny_run(resume=True, max_steps=2000)
    assert "goes on from step 4 of 2,000" in capsys.readouterr().out
    resumed.end()
    done, _ = tiny_run(resume=True, max_steps=4)
    assert "data" not in capsys.readouterr().out
    done.end()


def test_a_teacher_whose_dice_was_not_known_is_shown_when_it_is(tiny_run, capsys):
    run, _ = tiny_run(max_steps=4, teacher=nn.Linear(9, 10))
    assert "teacher  big, 100 parameters\n" in capsys.readouterr().out
    run.teacher_validated({"dice": 0.75})
    assert "teacher  big, 100 parameters, validation Dice 75.0" in capsys.readouterr().out
    assert read_log(run.folder / "log.jsonl") == [{"step": 0, "kind": "teacher", "dice": 0.75}]
    run.end()


def test_a_signal_saves_and_ends_the_steps_and_resume_goes_on(tiny_run, capsys):
    run, layer = tiny_run(max_steps=9, save_interval=100)
    done = []
    for step in run.steps():
        done.append(step)
        run.averages.add({"seg": torch.tensor(float(step))})
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.saves:
            run.save(layer.state_dict())
    assert done == [0, 1, 2, 3]  # the step that begins after the signal is the last
    assert run.end() == 128 + signal.SIGTERM
    assert "stopped after step 4; go on with:" in capsys.readouterr().err

    again, other = tiny_run(resume=True, max_steps=9)
    assert torch.equal(other.weight, layer.weight)
    assert again.start == 4 and next(iter(again.steps())) == 4
    assert again.averages.take() == {"seg": 1.5}


def test_the_best_scores_choose_best(tiny_run):
    run, layer = tiny_run(max_steps=3, val_interval=1)
    picture = np.zeros((4, 4, 3), np.uint8)
    for step in run.steps():
        run.validated({"dice": (0.5, 0.7, 0.6)[step]}, picture, layer.state_dict())
    best = load_checkpoint(run.folder / "best.pt")
    assert (best["step"], best["val"], run.best) == (2, {"dice": 0.7}, {"dice": 0.7, "step": 2})
    run.log.close()


LISTS = {"labelled": ["a", "b"], "unlabelled": ["u"], "val": ["c", "d"], "test": ["e"]}
CONTENTS = {"labelled": {"a": "1", "b": "2"}, "val": {"c": "3", "d": "4"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lists": LISTS | {"labelled": ["b"]}}, "labelled: a then, not now"),
        ({"lists": LISTS | {"test": ["e", "f"]}}, "test: f now, not then"),
        ({"lists": LISTS | {"labelled": ["b", "a"]}}, "labelled: another order"),
        (
            {"contents": CONTENTS | {"val": {"c": "3", "d": "5"}}},
            "val: another image or label of d",
        ),
        ({"teacher": nn.Linear(1, 1)}, r"teacher: weights with the digest \w+ then, \w+ now"),
        # these change nothing that was trained on
        ({"lists": LISTS | {"val": ["d", "c"]}}, ""),
        ({"lists": LISTS | {"unlabelled": ["v"]}}, ""),
        ({"contents": {}}, ""),
    ],
)
def test_what_is_given_by_reference_is_compared_by_content(tiny_run, change, message):
    given = {"lists": LISTS, "contents": CONTENTS, "teacher": nn.Linear(1, 1)}
    run, layer = tiny_run(max_steps=2, **given)
    next(iter(run.steps()))
    run.save(layer.state_dict())
    run.end()
    tiny_run(resume=True, max_steps=2, **given)
    if not message:
        tiny_run(resume=True, max_steps=2, **given | change)
        return
    with pytest.raises(CheckpointError, match=f"cannot resume with other data.*{message}"):
        tiny_run(resume=True, max_steps=2, **given | change)


def test_names_of_an_earlier_run_may_be_composed_otherwise(tiny_run):
    apart, whole = (
        LISTS | {"val": [unicodedata.normalize(form, "Müller")]} for form in ("NFD", "NFC")
    )
    assert apart != whole
    run, layer = tiny_run(max_steps=2, lists=apart, contents={})
    next(iter(run.steps()))
    run.save(layer.state_dict())
    run.end()
    tiny_run(resume=True, max_steps=2, lists=whole, contents=CONTENTS)


def test_the_lock_is_taken_again_where_its_file_was_removed(tiny_run):
    run, layer = tiny_run(max_steps=2)
    words = run.lock.path.read_text()
    assert re.match(rf"process {os.getpid()} on host \S+ since 2\d{{3}}-\d\d-\d\d ", words)
    run.lock.path.unlink()
    next(iter(run.steps()))
    run.save(layer.state_dict())
    assert run.lock.path.read_text().startswith(f"process {os.getpid()} ")
    run.end()
    assert not run.lock.path.exists()


def test_agreement_is_kept_and_chooses_nothing(tiny_run, capsys):
    run, layer = tiny_run(max_steps=3, val_interval=1, save_interval=2)
    picture = np.zeros((4, 4, 3), np.uint8)
    for step in run.steps():
        agreement = {"dice": (0.1, 0.2, 0.9)[step]}
        run.validated({"dice": (0.5, 0.7, 0.6)[step]}, picture, layer.state_dict(), agreement)
        if run.saves:
            run.save(layer.state_dict())
    best, last = (load_checkpoint(run.folder / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], best["agreement"], last["agreement"]) == (2, {"dice": 0.2}, agreement)
    run.end()

    run, layer = tiny_run(max_steps=2, val_interval=1, tag="without")
    for _ in run.steps():
        run.validated({}, None, layer.state_dict(), agreement)
        run.save(layer.state_dict())
    run.end()
    assert "nothing was validated; the result is" in capsys.readouterr().out
    assert not (run.folder / "best.pt").exists() and (run.folder / "last.pt").exists()
    kinds = [
        json.loads(line)["kind"] for line in (run.folder / "log.jsonl").read_text().splitlines()
    ]
    assert set(kinds) == {"agreement"}
