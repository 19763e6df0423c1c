"""The list of published cells: how many, teachers first, and every command is one that the training
script takes.
"""

import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import train_3d_distill

ROOT = Path(__file__).resolve().parents[2]


def dry_run(*arguments):
    """Training and test commands that the script prints."""
    run = subprocess.run(
        ["sh", "scripts/table_kd.sh", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    return lines[0::2], lines[1::2]


def parse(command, monkeypatch):
    """The configuration that the training script makes of a command."""
    words = shlex.split(command)
    assert words[:2] == ["python", "train_3d_distill.py"]
    monkeypatch.setattr(sys, "argv", [*words[1:], "--show-run"])
    return train_3d_distill.parse_args()


@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_cells(monkeypatch, preset):
    monkeypatch.chdir(ROOT)
    trainings, tests = dry_run("--preset", preset)
    assert len(trainings) == len(tests) == len(set(trainings)) == 82
    cells = []
    for training, test in zip(trainings, tests):
        args, cfg = parse(training, monkeypatch)
        assert args.resume
        cells.append((cfg.dataset, cfg.method, cfg.student))
        assert cfg.preset == ("clean" if cfg.method == "supervised" else preset)
        assert test == f'python test_3d.py --ckpt "$({training} --show-run)/best.pt" --published'
    assert [student for _, _, student in cells[:6]] == ["resunet", "segresnet"] * 3
    methods = Counter((dataset, method) for dataset, method, _ in cells)
    for dataset in ("btcv", "word", "brats21"):
        assert methods[dataset, "supervised"] == 6
        assert methods[dataset, "acf_bckd"] == 8
        rivals = sum(n for (name, method), n in methods.items() if name == dataset) - 14
        assert rivals == (4 if dataset == "brats21" else 18)


def test_released_class_counts(monkeypatch):
    monkeypatch.chdir(ROOT)
    trainings, _ = dry_run("--preset", "as_released", "--only", "word")
    wrong = {}
    for training in trainings:
        _, cfg = parse(training, monkeypatch)
        arguments = cfg.method_arguments
        count = arguments.get("label_classes", arguments.get("num_label_classes"))
        if count:
            wrong[cfg.method, cfg.teacher, cfg.student] = count
        if cfg.method == "acf_bckd":
            assert (arguments["floor"], arguments["decay"]) == (0.5, 0.45)
    assert wrong == {
        ("acf_bckd", "resunet", "mobile_unet"): 14,
        ("acf_bckd", "resunet", "lcovnet"): 14,
        ("ifvd", "resunet", "unet"): 14,
    }


def test_selection_seeds_and_settings(monkeypatch):
    monkeypatch.chdir(ROOT)
    only = ("--only", "btcv.* acf_bckd .*--student unet")
    trainings, _ = dry_run(*only, "--seeds", "0 1 2", "--", "workers=8", "device=cpu")
    found = [parse(training, monkeypatch)[1] for training in trainings]
    assert [cfg.seed for cfg in found] == [0, 1, 2] * 2
    assert {cfg.workers for cfg in found} == {8}
    assert {cfg.device for cfg in found} == {"cpu"}


@pytest.mark.parametrize(
    "script, only",
    [
        ("table_kd.sh", "btcv.* supervised .*--student resunet"),
        ("table_ssl.sh", "acdc.* 3 .*crkd "),
    ],
)
def test_settings_reach_the_scripts_as_they_were_typed(script, only, tmp_path):
    """No shell reads them a second time: an apostrophe is one, and what follows it is not run."""
    for folder in ("scripts", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (script, "setup.sh", "words.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-lock.txt"):
        shutil.copy(ROOT / name, tmp_path)
    needed = ("requirements.txt", "requirements.txt", "requirements-lock.txt")
    stamp = b"".join((ROOT / name).read_bytes() for name in needed)
    (tmp_path / ".venv/installed-requirements.txt").write_bytes(stamp)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\nprintf "[%s]" "$@" >> calls; echo >> calls\n')
    python.chmod(0o755)
    settings = [
        "data_root=/media/user's disk",
        "tag=x'; touch ran; echo '",
        "tag=$(touch ran) `touch ran`",
    ]
    command = ["sh", f"scripts/{script}", "--only", only, "--", *settings]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    training, shown = (tmp_path / "calls").read_text().splitlines()[:2]
    assert training.endswith("[--opts]" + "".join(f"[{setting}]" for setting in settings))
    assert shown == f"{training}[--show-run]"
    printed = next(line for line in done.stdout.splitlines() if line.startswith("== "))
    assert shlex.split(printed)[-3:] == settings
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing-like-it"], ["--preset", "old"], ["--sedes", "1"]]
)
def test_mistakes_are_errors(arguments):
    run = subprocess.run(
        ["sh", "scripts/table_kd.sh", "--dry-run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode
    assert run.stderr.startswith("error: ")
    assert not run.stdout
