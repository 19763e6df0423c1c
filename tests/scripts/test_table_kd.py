"""The list of published cells: how many, teachers first, and every command is one that the training
script takes.
"""

import os
import re
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
    lines = [line.partition(" && ") for line in run.stdout.splitlines()]
    return [training for training, _, _ in lines], [test for _, _, test in lines]


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


def test_rows_of_other_data_sets(monkeypatch):
    """Those that were asked for, at the protocol of the file, and the teacher's own settings."""
    monkeypatch.chdir(ROOT)
    rows = ("--teachers", "resunet", "--students", "unet espnetv2", "--methods")
    rows += ("dist+acf_bckd acf_bckd", "--teacher-settings", "lr=0.05 max_steps=7")
    trainings, _ = dry_run("--datasets", "hippocampus mouse_brain", *rows, "--", "workers=0")
    found = [parse(training, monkeypatch)[1] for training in trainings]
    for name in ("hippocampus", "mouse_brain"):
        own = [cfg for cfg in found if cfg.dataset == name]
        assert [(cfg.method, cfg.student, cfg.lr, cfg.max_steps) for cfg in own] == [
            ("supervised", "resunet", 0.05, 7),
            ("acf_bckd+dist", "unet", 0.01, 3000),
            ("acf_bckd", "unet", 0.01, 3000),
            ("acf_bckd", "espnetv2", 0.01, 3000),
            ("supervised", "unet", 0.01, 3000),
            ("supervised", "espnetv2", 0.01, 3000),
        ]
        assert {(cfg.workers, cfg.distill_warmup) for cfg in own} == {(0, 0)}
    assert [cfg.student for cfg in found[:2]] == ["resunet"] * 2  # before any student
    whole, _ = dry_run("--datasets", "mouse_brain", "--students", "unet")
    assert len(whole) == 2 + 2 * 10 + 1


def workplace(folder, python):
    """The scripts, with a shell script in place of Python."""
    for name in ("scripts", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    for name in ("table_kd.sh", "table_ssl.sh", "setup.sh", "words.sh"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    for name in ("requirements.txt", "requirements-lock.txt"):
        shutil.copy(ROOT / name, folder)
    needed = ("requirements.txt", "requirements.txt", "requirements-lock.txt")
    stamp = b"".join((ROOT / name).read_bytes() for name in needed)
    (folder / ".venv/installed-requirements.txt").write_bytes(stamp)
    executable(folder / ".venv/bin/python", python)
    return folder


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


def test_two_at_a_time_and_a_cell_that_fails(tmp_path):
    """The other students are run, the end of its output is shown, and the script fails in the end;
    without a teacher there is nothing to run.
    """
    python = """case "$*" in
*--show-run*) echo run ;;
*"--method dist "*) echo diverged; exit 1 ;;
*) echo "$OMP_NUM_THREADS $*" >> calls ;;
esac
"""
    arguments = ["--datasets", "btcv", "--teachers", "resunet", "--students", "unet"]
    arguments += ["--methods", "dist kd+cwd kd", "--jobs", "2"]
    done = subprocess.run(
        ["sh", "scripts/table_kd.sh", *arguments],
        cwd=workplace(tmp_path, python),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": ""},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: some cells failed, see above\n"
    assert "diverged" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    trained = [call.split("--method ")[1].split()[0] for call in calls if "--method" in call]
    assert trained[0] == "supervised"
    assert sorted(trained) == ["kd", "kd+cwd", "supervised", "supervised"]
    assert sum("test_3d.py" in call for call in calls) == 4
    assert {call.split()[0] for call in calls} == {"1"}
    assert calls[-1].endswith("tools/results_table.py --layout kd")
    (tmp_path / "calls").unlink()
    executable(tmp_path / ".venv/bin/python", "echo $* >> calls; exit 1\n")
    done = subprocess.run(
        ["sh", "scripts/table_kd.sh", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "error: a teacher failed, see above\n")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_the_array_job_of_the_documents(tmp_path):
    """Students wait for the first array; a cell that is stopped before its time limit goes back
    into the queue, and is not tested.
    """
    document = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", document, re.M | re.S)
    (commands,) = (block for block in blocks if "table.sbatch" in block)
    workplace(tmp_path, "")
    # runs the first and the last task of an array
    stand_ins = {
        "sbatch": """echo "$@" >> submitted
for word in "$@"; do
    case $word in --array=1-*) last=${word#--array=1-} last=${last%%%*} ;; esac
    file=$word
done
for task in 1 "$last"; do
    SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task sh table.sbatch "$file" > /dev/null || true
done
echo 7
""",
        "srun": 'exec "$@"\n',
        "scontrol": 'echo "$@" >> queue\n',
        "python": """case "$*" in
*--show-run*) echo run ;;
*"--method kd "*) exit 143 ;;
*) echo "$@" >> calls ;;
esac
""",
    }
    for name, text in stand_ins.items():
        executable(tmp_path / "bin" / name, text)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, env=environment, check=True)
    alone, taught = (tmp_path / "submitted").read_text().splitlines()
    assert "--array=1-18 " in alone and "--array=1-64" in taught
    assert "--dependency=afterok:7" in taught and "dependency" not in alone
    assert (tmp_path / "queue").read_text() == "requeue 7_64\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["train_3d_distill.py", "test_3d.py"] * 3
    assert all("--resume" in call for call in calls[::2])


@pytest.mark.parametrize(
    "script, only",
    [
        ("table_kd.sh", "btcv.* supervised .*--student resunet"),
        ("table_ssl.sh", "acdc.* 3 .*crkd "),
    ],
)
def test_settings_reach_the_scripts_as_they_were_typed(script, only, tmp_path):
    """No shell reads them a second time: an apostrophe is one, and what follows it is not run."""
    workplace(tmp_path, 'printf "[%s]" "$@" >> calls; echo >> calls\n')
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
    "arguments",
    [
        ["--only", "nothing-like-it"],
        ["--preset", "old"],
        ["--sedes", "1"],
        ["--seeds"],
        ["--jobs", "0"],
        ["--methods", "kd supervised"],
        ["--", "tag=two\nlines"],
    ],
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
