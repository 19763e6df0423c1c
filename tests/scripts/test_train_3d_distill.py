"""The training script as a user runs it: every method, exact resume, and errors before the first
step.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from losses import KD_METHODS
from tests.scripts.conftest import CONFIG, ROOT, run, train
from utils.checkpoint import atomic_save, digest, load_checkpoint
from utils.schedules import poly_lr

TEACHER = ("--method", "supervised", "--student", "resunet")


def weights(folder: Path, name: str = "last.pt") -> str:
    return digest(load_checkpoint(folder / name)["weights"])


def test_teacher_then_distilled_student_then_test(workspace):
    train(*TEACHER, cwd=workspace)
    out = train("--teacher", "resunet", cwd=workspace)
    folder = workspace / "runs/tiny/acf_bckd/resunet-unet/seed0"
    assert str(folder.relative_to(workspace)) in out.stdout
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    # The teacher was validated on the same cases when it was trained: its scores are read, not
    # measured again.
    teacher = load_checkpoint(workspace / "runs/tiny/supervised/resunet/seed0/best.pt")
    assert log.pop(0) == {"step": 0, "kind": "teacher", **teacher["val"]}
    assert [(e["step"], e["kind"]) for e in log] == [
        (1, "train"),
        (1, "val"),
        (3, "train"),
        (3, "val"),
    ]
    assert {"seg", "afd", "cfd", "hbd", "sbd", "lr", "loss"} <= log[0].keys()
    assert log[0]["loss"] == pytest.approx(
        sum(log[0][k] for k in ("seg", "afd", "cfd", "hbd", "sbd")), rel=1e-5
    )
    assert {"dice", "ball", "box"} <= log[1].keys()
    assert any(p.name.startswith("events.out") for p in folder.iterdir())
    # The deployed student carries none of the method's adapters.
    plain = train(
        "--method", "supervised", "--student", "unet", "--show-run", cwd=workspace
    ).stdout.strip()
    train("--method", "supervised", "--student", "unet", cwd=workspace)
    keys = load_checkpoint(folder / "best.pt")["weights"].keys()
    assert keys == load_checkpoint(workspace / plain / "best.pt")["weights"].keys()

    tested = run(
        "test_3d.py", "--ckpt", str(folder / "best.pt"), "--overlays", "--published", cwd=workspace
    )
    assert "results in" in tested.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["split"] == "test"
    assert summary["selected_on_reported"] is False
    assert summary["parameters"] == sum(
        v.numel() for v in load_checkpoint(folder / "best.pt")["weights"].values()
    )
    stored = nib.load(folder / "predictions/case6.nii.gz")
    original = nib.load(workspace / "data/labelsTr/case6.nii.gz")
    assert stored.shape == original.shape
    assert np.allclose(stored.affine, original.affine)
    assert (folder / "overlays/case6.png").stat().st_size > 0
    # The native score is that of the file that was written, against the file that was given.
    p, g = np.asarray(stored.dataobj), np.asarray(original.dataobj)
    expected = [
        2 * ((p == k) & (g == k)).sum() / max((p == k).sum() + (g == k).sum(), 1) for k in (1, 2)
    ]
    got = [summary["native"]["classes"][name]["dice"] for name in ("ball", "box")]
    assert got == pytest.approx(expected)
    table = run("tools/results_table.py", str(folder), cwd=workspace).stdout
    assert "unet <- resunet, acf_bckd" in table
    picture = run("tools/figure.py", str(folder), "--out", "figure.png", cwd=workspace)
    assert "figure.png" in picture.stdout
    assert (workspace / "figure.png").stat().st_size > 5000


def test_distillation_warms_up(workspace):
    """With hardly any step of the weights, the terms of step k are those of a run without warm-up
    times k / 2, with 2 of the 4 steps given as a number or as a share.
    """
    train(*TEACHER, cwd=workspace)
    logs = {}
    for warmup in ("0", "2", "0.5"):
        options = ("lr=1e-12", "log_interval=1", f"distill_warmup={warmup}", f"tag=w{warmup}")
        train("--teacher", "resunet", "--opts", *options, cwd=workspace)
        lines = (
            (workspace / f"runs/tiny/acf_bckd/resunet-unet/seed0-w{warmup}/log.jsonl")
            .read_text()
            .splitlines()
        )
        logs[warmup] = [entry for entry in map(json.loads, lines) if entry["kind"] == "train"]
    assert logs["0.5"] == logs["2"]
    for plain, warm, share in zip(logs["0"], logs["2"], (0, 0.5, 1, 1), strict=True):
        assert warm["seg"] == pytest.approx(plain["seg"], rel=1e-5)
        for term in ("afd", "cfd", "hbd", "sbd"):
            assert warm[term] == pytest.approx(share * plain[term], rel=1e-5), (plain["step"], term)
    assert all(entry["afd"] > 0 for entry in logs["0"])


def test_rate_of_the_methods_own_parameters(workspace):
    """With a rate of next to nothing the attention stays what it was; the student learns, and
    resumes exactly.
    """
    train(*TEACHER, cwd=workspace)
    options = ("--teacher", "resunet", "--opts", "method_lr=1e-12")
    base = workspace / "runs/tiny/acf_bckd/resunet-unet"
    train(*options, "max_steps=2", "val_interval=1", "tag=short", cwd=workspace)
    train(*options, "tag=frozen", cwd=workspace)
    train("--teacher", "resunet", "--opts", "tag=usual", cwd=workspace)
    short, frozen, usual = (
        load_checkpoint(base / f"seed0-{tag}/last.pt") for tag in ("short", "frozen", "usual")
    )
    assert short["method"].keys() == frozen["method"].keys() and frozen["method"]
    moved = {}
    for name, value in frozen["method"].items():
        assert np.allclose(value, short["method"][name], atol=1e-7), name
        moved[name] = not np.allclose(value, usual["method"][name], atol=1e-7)
    assert any(moved.values())
    assert digest(frozen["weights"]) != digest(short["weights"])

    # A resumed run goes on with both rates and both momenta.
    options = ("--teacher", "resunet", "--opts", "method_lr=0.05")
    train(*options, "tag=straight", cwd=workspace)
    stop_after(2, options, workspace, base / "seed0-broken")
    train("--resume", *options, "tag=broken", cwd=workspace)
    straight, broken = (
        load_checkpoint(base / f"seed0-{tag}/last.pt") for tag in ("straight", "broken")
    )
    for part in ("weights", "method"):
        assert digest(straight[part]) == digest(broken[part])
    kept, lost = (part["optimizer"]["state"] for part in (straight, broken))
    assert kept.keys() == lost.keys() and kept
    assert all(np.array_equal(kept[k]["momentum_buffer"], lost[k]["momentum_buffer"]) for k in kept)


class Monitored(nn.Module):
    """A term, and a number that is not one: the step's progress, or NaN at the start."""

    def __init__(self, student_channels, teacher_channels, num_classes, multilabel, preset):
        super().__init__()
        self.monitor = {}

    def forward(self, student, teacher, label, progress):
        self.monitor = {"progress": torch.tensor(progress or math.nan)}
        return {"match": (student.logits - teacher.logits).square().mean()}


def test_a_method_reports_numbers_that_are_no_part_of_the_loss(workspace, monkeypatch):
    monkeypatch.setitem(KD_METHODS, "monitored", Monitored)
    train(*TEACHER, cwd=workspace)
    train("--method", "monitored", cwd=workspace)
    log = workspace / "runs/tiny/monitored/resunet-unet/seed0/log.jsonl"
    first, second = [e for e in map(json.loads, log.read_text().splitlines()) if "seg" in e]
    assert (first["progress"], second["progress"]) == (0.25, 0.625)
    for entry in (first, second):
        assert entry["loss"] == pytest.approx(entry["seg"] + entry["match"], rel=1e-6)


def test_optimiser_and_schedule_are_those_of_the_registries(workspace):
    supervised = ("--method", "supervised", "--student", "unet", "--opts", "log_interval=1")
    base = workspace / "runs/tiny/supervised/unet"
    rates = {}
    for options in (("min_lr=1e-3",), ("schedule=poly", "min_lr=1e-3"), ("schedule=constant",)):
        tag = f"r{len(rates)}"
        train(*supervised, *options, f"tag={tag}", cwd=workspace)
        entries = map(json.loads, (base / f"seed0-{tag}/log.jsonl").read_text().splitlines())
        rates[tag] = [entry["lr"] for entry in entries if entry["kind"] == "train"]
    assert rates["r0"] == [poly_lr(step, 0.01, 4, 1e-3) for step in range(4)]
    assert rates["r0"][-1] == 1e-3 < rates["r1"][-1]
    assert rates["r2"] == [0.01] * 4

    train(*TEACHER, cwd=workspace)
    options = ("optimizer=adamw", "method_lr=0.001", "schedule=step", "schedule_steps=3")
    train("--teacher", "resunet", "--opts", *options, cwd=workspace)
    state = load_checkpoint(workspace / "runs/tiny/acf_bckd/resunet-unet/seed0/last.pt")
    student, method = state["optimizer"]["param_groups"]
    assert "betas" in student and student["weight_decay"] == 5e-4
    assert (student["lr"], method["lr"]) == pytest.approx((1e-3, 1e-4))
    idle = train(*supervised, "optimizer=adamw", "momentum=0.5", cwd=workspace, ok=False)
    assert "momentum: optimizer 'adamw' does not use this key" in idle.stderr


def test_settings_that_do_nothing_are_noted(workspace):
    train(*TEACHER, cwd=workspace)
    out = train(
        "--teacher",
        "resunet",
        "--method",
        "kd",
        "--opts",
        "method_lr=0.1",
        "distill_warmup=9",
        cwd=workspace,
    )
    assert "note: kd has no parameters of its own: method_lr does nothing" in out.stderr
    assert "note: with max_steps 4 the terms do not reach their weights" in out.stderr
    out = train(*TEACHER, "--opts", "distill_warmup=9", "tag=noted", cwd=workspace)
    assert "note: --method supervised does not use distill_warmup" in out.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resume_is_bit_identical(workspace, workers):
    train(*TEACHER, cwd=workspace)
    options = ("--teacher", "resunet", "--opts", f"workers={workers}")
    train(*options, "tag=straight", cwd=workspace)
    # The first half is stopped by the signal that a scheduler sends; the second goes on from what
    # it saved.
    base = workspace / "runs/tiny/acf_bckd/resunet-unet"
    stop_after(2, options, workspace, base / "seed0-broken")
    halfway = load_checkpoint(base / "seed0-broken/last.pt")["step"]
    assert 0 < halfway < 4
    train("--resume", *options, "tag=broken", cwd=workspace)
    straight, broken = (
        load_checkpoint(base / name / "last.pt") for name in ("seed0-straight", "seed0-broken")
    )
    assert digest(straight["weights"]) == digest(broken["weights"])
    assert digest(straight["method"]) == digest(broken["method"])
    assert straight["best"] == broken["best"]
    logs = [(base / name / "log.jsonl").read_text() for name in ("seed0-straight", "seed0-broken")]
    assert logs[0] == logs[1]


def test_a_student_with_batch_norm_is_saved_with_clean_statistics(workspace):
    """What goes on training keeps the running statistics, and resuming is exact."""
    config = CONFIG.replace("[16, 16, 16]", "[32, 32, 32]")
    config += "  lcovnet: {channels: [2, 2, 4, 4, 4]}\n"
    (workspace / "tiny.yaml").write_text(config)
    flags = ("--method", "supervised", "--student", "lcovnet")
    train(*flags, "--opts", "max_steps=3", "tag=whole", cwd=workspace)
    train(*flags, "--opts", "max_steps=3", "tag=again", "save_interval=1", cwd=workspace)
    whole, again = (
        workspace / f"runs/tiny/supervised/lcovnet/seed0-{tag}" for tag in ("whole", "again")
    )
    last = load_checkpoint(whole / "last.pt")
    differ = {key for key, v in last["student"].items() if not torch.equal(last["weights"][key], v)}
    assert differ and all("running" in key or "num_batches" in key for key in differ)
    (again / "last.previous.pt").replace(again / "last.pt")
    train(*flags, "--opts", "max_steps=3", "tag=again", "--resume", cwd=workspace)
    resumed = load_checkpoint(again / "last.pt")
    for part in ("student", "weights"):
        assert digest(resumed[part]) == digest(last[part])


def test_the_command_of_the_readme_without_data(tmp_path):
    """A real process: accepted as printed, and a helpful message instead of a traceback."""
    command = [
        sys.executable,
        "train_3d_distill.py",
        "--config",
        "configs/btcv.yaml",
        "--teacher",
        "resunet",
    ]
    result = subprocess.run(
        [*command, "--opts", f"data_root={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "dataset_0.json: no such data list" in result.stderr and "Traceback" not in result.stderr


def stop_after(step: int, options: tuple[str, ...], workspace: Path, folder: Path) -> None:
    """Start a training and send SIGTERM as soon as it has logged `step` steps; it must save and say
    how to go on.
    """
    command = [
        sys.executable,
        str(ROOT / "train_3d_distill.py"),
        "--config",
        "tiny.yaml",
        *options,
        "tag=broken",
    ]
    process = subprocess.Popen(
        command,
        cwd=workspace,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and f'"step": {step - 1}' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "--resume" in errors


@pytest.mark.parametrize(
    "script", ["train_3d_distill", "train_3d_crkd", "train_2d_crkd", "test_3d", "test_2d"]
)
@pytest.mark.parametrize("flags, says", [(["--help"], "usage:"), (["--confg", "x"], "error: ")])
def test_help_and_mistyped_flags_are_answered_without_torch(script, flags, says):
    heavy = ("torch", "monai", *(("numpy",) if script.startswith("train") else ()))
    program = f"""import runpy, sys
sys.argv = ["{script}.py", *{flags}]
try:
    runpy.run_path("{script}.py", run_name="__main__")
finally:
    print("heavy:", [name for name in {heavy} if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "heavy: []" in result.stdout
    assert says in result.stdout + result.stderr and "Traceback" not in result.stderr


def test_a_run_from_before_means_were_kept_by_name_goes_on(workspace):
    """Its last.pt has `totals` and `counted`, and of a network alone no `student`."""
    options = ("--method", "supervised", "--student", "unet", "--opts", "schedule=constant")
    train(*options, "log_interval=1", "tag=straight", cwd=workspace)
    train(*options, "max_steps=2", "tag=old", cwd=workspace)
    base = workspace / "runs/tiny/supervised/unet"
    state = load_checkpoint(base / "seed0-old/last.pt")
    del state["averages"], state["student"], state["watch"]
    totals = {"totals": {"seg": torch.tensor(3.0)}, "counted": 2}
    atomic_save(state | totals, base / "seed0-old/last.pt")
    train("--resume", *options, "log_interval=3", "tag=old", cwd=workspace)
    straight, old = (
        [json.loads(line) for line in (base / f"seed0-{tag}/log.jsonl").read_text().splitlines()]
        for tag in ("straight", "old")
    )
    (third,) = [entry["seg"] for entry in straight if entry["step"] == 2]
    (mean,) = [entry["seg"] for entry in old if entry["step"] == 2]
    assert mean == pytest.approx((3.0 + third) / 3, rel=1e-6)


def test_same_seed_same_weights_other_seed_other_weights(workspace):
    supervised = ("--method", "supervised", "--student", "unet")
    for tag, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train(*supervised, "--seed", seed, "--opts", f"tag={tag}", "max_steps=2", cwd=workspace)
    base = workspace / "runs/tiny/supervised/unet"
    assert weights(base / "seed0-a") == weights(base / "seed0-b") != weights(base / "seed1-c")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast(workspace, amp):
    train(
        "--method",
        "supervised",
        "--student",
        "unet",
        "--opts",
        f"amp={amp}",
        "max_steps=2",
        cwd=workspace,
    )


def test_run_folder_is_not_overwritten_and_not_resumed_with_other_settings(workspace):
    supervised = ("--method", "supervised", "--student", "unet", "--opts")
    train(*supervised, "max_steps=2", cwd=workspace)
    again = train(*supervised, "max_steps=2", cwd=workspace, ok=False)
    assert again.returncode != 0
    assert "--resume" in again.stderr and "tag=" in again.stderr
    changed = train("--resume", *supervised, "max_steps=2", "lr=0.5", cwd=workspace, ok=False)
    assert "lr: 0.01 then, 0.5 now" in changed.stderr
    longer = train("--resume", *supervised, "max_steps=4", cwd=workspace)
    assert "nothing to do" not in longer.stdout
    folder = "runs/tiny/supervised/unet/seed0"
    assert load_checkpoint(workspace / folder / "last.pt")["step"] == 4
    # the folder alone says everything
    script = "train_3d_distill.py"
    run(script, "--resume", folder, "--opts", "max_steps=5", cwd=workspace)
    assert load_checkpoint(workspace / folder / "last.pt")["step"] == 5
    (workspace / folder).rename(workspace / "moved")
    moved = run(script, "--resume", "moved", cwd=workspace, ok=False).stderr
    assert f"moved: its config.yaml names the run folder {folder}" in moved
    both = run(script, "--config", "tiny.yaml", "--resume", "moved", cwd=workspace, ok=False)
    assert "give one of --config FILE and --resume RUNFOLDER" in both.stderr


def test_a_change_that_concerns_other_runs_does_not_keep_one_from_resuming(workspace):
    supervised = ("--method", "supervised", "--student", "unet", "--opts", "max_steps=2")
    train(*supervised, cwd=workspace)
    config = workspace / "tiny.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("resunet: {channels: [4, 4, 8, 8]}", "resunet: {channels: [4, 8, 8, 8]}")
    )
    assert "nothing to do" in train("--resume", *supervised, cwd=workspace).stdout
    config.write_text(
        text.replace("unet: {channels: [2, 4, 4, 8]}", "unet: {channels: [2, 4, 8, 8]}")
    )
    assert "network_args" in train("--resume", *supervised, cwd=workspace, ok=False).stderr


def test_missing_teacher_names_the_command_that_makes_it(workspace):
    result = train("--teacher", "resunet", cwd=workspace, ok=False)
    assert "--method supervised --student resunet" in result.stderr
    assert "Traceback" not in result.stderr


def test_teacher_of_other_classes_is_refused(workspace):
    config = workspace / "tiny.yaml"
    train(*TEACHER, "--opts", "max_steps=1", cwd=workspace)
    config.write_text(
        config.read_text().replace("[background, ball, box]", "[background, ball, box, cone]")
    )
    result = train("--teacher", "resunet", cwd=workspace, ok=False)
    assert "num_classes 3 instead of 4" in result.stderr


@pytest.mark.parametrize(
    "option, expected",
    [
        ("max_step=4", "did you mean 'max_steps'"),
        ("max_steps=many", "must be an integer"),
        ("patch_size=[16,16]", "list of 3 values, or one number for all sides"),
        ("patch_size=20", "patch_size: [20, 20, 20] must be multiples of 8"),
        ("patch_size=[16,16,20]", "multiples of 8"),
        ("student=unett", "unknown value 'unett'"),
        ("format=mds", "format: unknown value 'mds'; choose from msd"),
        ("student=unet2d", "unknown value 'unet2d'"),  # of two dimensions
        ("flip_prob=1.5", "--opts flip_prob=1.5: flip_prob: must lie in [0, 1], got 1.5"),
        (
            "method_args={acf_bckd: {flor: 1}}",
            "method_args: acf_bckd: unknown argument 'flor'; did you mean 'floor'?",
        ),
        ("data_root=nowhere", "nowhere: no such folder"),
        (
            "network_args={unet: {chanels: [1]}}",
            "network_args: unet: unknown argument 'chanels'; did you mean 'channels'?",
        ),
        ("lr=.nan", "finite"),
        ("amp=half", "unknown value 'half'"),
        ("device=cuda:7", "not usable"),
    ],
)
def test_configuration_errors(workspace, option, expected):
    if "method_args" in option:
        train(*TEACHER, "--opts", "max_steps=1", cwd=workspace)
    key = option.split("=")[0]
    method = () if key in ("method_args",) else ("--method", "supervised")
    result = train(*method, "--opts", option, cwd=workspace, ok=False)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def _damage(path: Path, change) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(*change(np.array(image.dataobj), image.affine)), path)


def _with_voxel(values: np.ndarray, value: float) -> np.ndarray:
    values = values.copy()
    values[3, 3, 3] = value
    return values


BAD_DATA = {
    "nan": ("imagesTr", lambda v, a: (_with_voxel(v, np.nan), a), "NaN"),
    "constant": ("imagesTr", lambda v, a: (np.zeros_like(v), a), "constant image"),
    "shape": ("labelsTr", lambda v, a: (v[:-1], a), "must be on one grid"),
    "affine": ("labelsTr", lambda v, a: (v, a + np.eye(4) * [[5], [0], [0], [0]]), "affine"),
    "ids": ("labelsTr", lambda v, a: (_with_voxel(v, 9), a), "label ids [9]; expected only 0..2"),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_scans_stop_before_training_and_name_the_file(workspace, fault):
    folder, change, expected = BAD_DATA[fault]
    _damage(workspace / "data" / folder / "case2.nii.gz", change)
    result = train("--method", "supervised", cwd=workspace, ok=False)
    assert expected in result.stderr and "case2" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(workspace.glob("runs/**/last.pt"))


def test_truncated_scan(workspace):
    path = workspace / "data/imagesTr/case2.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    result = train("--method", "supervised", cwd=workspace, ok=False)
    assert "case2" in result.stderr and "truncated" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "fault, expected", [("twice", "in both"), ("copy", "two names"), ("empty", "empty")]
)
def test_bad_lists(workspace, fault, expected):
    path = workspace / "data/dataset_0.json"
    lists = json.loads(path.read_text())
    if fault == "twice":
        lists["test"].append(lists["training"][0])
    elif fault == "copy":
        for folder in ("imagesTr", "labelsTr"):
            source = workspace / f"data/{folder}/case0.nii.gz"
            (workspace / f"data/{folder}/other.nii.gz").write_bytes(source.read_bytes())
        lists["test"].append({"image": "imagesTr/other.nii.gz", "label": "labelsTr/other.nii.gz"})
    else:
        lists["validation"] = []
    path.write_text(json.dumps(lists))
    result = train("--method", "supervised", cwd=workspace, ok=False)
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_teacher_fits_the_lists_and_the_preprocessing_of_its_student(workspace):
    """And a fold that goes by a tag has the teacher of that tag."""
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=1", cwd=workspace)
    for part, names in {"train": "34560", "val": "1", "test": "2"}.items():
        (workspace / "fold1").mkdir(exist_ok=True)
        lines = [f"case{number}" for number in names]
        (workspace / "fold1" / f"{part}.txt").write_text("\n".join(lines))
    fold = ("--opts", "max_steps=1", "split_dir=fold1", "tag=fold1")
    student = ("--method", "kd", "--student", "unet")
    refused = train(*student, *fold, cwd=workspace, ok=False)
    assert refused.returncode == 1
    assert "validated or tested on: case1 (val); case2 (test)" in refused.stderr
    assert not (workspace / "runs/tiny/kd").exists()
    train("--method", "supervised", "--student", "resunet", *fold, cwd=workspace)
    train(*student, *fold, cwd=workspace)
    folder = workspace / "runs/tiny/kd/resunet-unet/seed0-fold1"
    teacher = load_checkpoint(workspace / "runs/tiny/supervised/resunet/seed0-fold1/best.pt")
    assert load_checkpoint(folder / "last.pt")["teacher"] == digest(teacher["weights"])
    other = train(*student, "--opts", "window=[0,50]", cwd=workspace, ok=False)
    assert "window: [0.0, 100.0] in the teacher's run, [0.0, 50.0] here" in other.stderr


@pytest.mark.slow
def test_a_list_that_was_edited_is_not_resumed(workspace):
    alone = ("--method", "supervised", "--student", "unet", "--opts")
    train(*alone, "max_steps=1", cwd=workspace)
    path = workspace / "data" / "dataset_0.json"
    lists = json.loads(path.read_text())
    lists["training"][0], lists["test"][0] = lists["test"][0], lists["training"][0]
    path.write_text(json.dumps(lists))
    refused = train("--resume", *alone, "max_steps=2", cwd=workspace, ok=False)
    assert refused.returncode == 1
    for words in ("labelled: case0 then, not now", "test: case0 now, not then"):
        assert words in refused.stderr


@pytest.mark.slow
def test_loader_processes_that_start_anew_load_the_same(workspace):
    """With a data format and a network of the user's own, whose files they run again."""
    (workspace / "mine.py").write_text(OWN)
    own = ("--student", "mine.py:Small", "--opts", "format=mine.py:Inverted", "max_steps=2")
    code = (
        "import multiprocessing, runpy, sys\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method(sys.argv[1])\n"
        "    sys.argv = sys.argv[2:]\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (workspace / "start.py").write_text(code)
    found = {}
    for method, workers in (("fork", 0), ("spawn", 1), ("forkserver", 1)):
        words = [sys.executable, "start.py", method, str(ROOT / "train_3d_distill.py")]
        words += ["--config", "tiny.yaml", "--method", "supervised", *own]
        words += [f"tag={method}", f"workers={workers}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        found[method] = weights(workspace / f"runs/tiny/supervised/Small/seed0-{method}")
    assert len(set(found.values())) == 1


OWN = """
from torch import nn
from dataloaders.msd import MSDDataset
from networks import SegOutput


class Inverted(MSDDataset):
    def preprocess(self, case):
        sample = super().preprocess(case)
        return sample | {"image": 1.0 - sample["image"]}


class Small(nn.Module):
    stride = 1

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.feature_channels = {"decoder": in_channels}
        self.conv = nn.Conv3d(in_channels, num_classes, 3, padding=1)

    def forward(self, image, return_features=False):
        logits = self.conv(image)
        return SegOutput(logits, {"decoder": image}) if return_features else logits
"""
