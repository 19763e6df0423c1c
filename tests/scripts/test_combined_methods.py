"""Several methods in one training, as a user runs it."""

import json

import pytest
import torch

from tests.scripts.conftest import run, train
from utils.checkpoint import digest, load_checkpoint

TEACHER = ("--method", "supervised", "--student", "resunet")
QUEUES = (
    "method_args={cirkd: {pixel_queue: 200, region_queue: 100}, dist: {tau: 2.0}, kd: {tau: 3.0}}"
)
BAD = "method_args={ifvd: {weight: -1.0}}"
TERMS = {"afd", "cfd", "hbd", "sbd", "cirkd_pair", "cirkd_pixel", "cirkd_region", "cirkd_kd"}
TERMS |= {"dist_inter", "dist_intra"}


@pytest.mark.slow
def test_a_run_of_several_methods_learns_resumes_and_is_tabled(workspace):
    """Learnt attention, a memory with random draws and a loss of logits; in any order of names."""
    train(*TEACHER, cwd=workspace)
    options = (
        "--opts",
        "log_interval=1",
        "diagnose_interval=2",
        "save_interval=1",
        "min_lr=0.001",
        QUEUES,
    )
    train("--method", "dist+acf_bckd+cirkd", *options, cwd=workspace)
    base = workspace / "runs/tiny/acf_bckd+cirkd+dist/resunet-unet"
    straight = load_checkpoint(base / "seed0/last.pt")
    kept = straight["config"]["method_args"]
    assert kept.keys() == {"cirkd", "dist"}  # those of the run

    log = [json.loads(line) for line in (base / "seed0/log.jsonl").read_text().splitlines()]
    for entry in (entry for entry in log if entry["kind"] == "train"):
        assert entry.keys() == TERMS | {"step", "kind", "lr", "loss", "seg"}
        assert entry["loss"] == pytest.approx(sum(entry[t] for t in {*TERMS, "seg"}), rel=1e-5)
    measured = [entry for entry in log if entry["kind"] == "diagnosis"]
    assert len(measured) == 2
    assert all(f"grad_share/{term}" in measured[0] for term in {*TERMS, "seg"})

    # The same under another order of the names, and from a checkpoint of step 3
    (base / "seed0").rename(base / "whole")
    train("--method", "cirkd+dist+acf_bckd", *options, cwd=workspace)
    again, before = (load_checkpoint(base / f"seed0/last{k}.pt") for k in ("", ".previous"))
    (base / "seed0/last.previous.pt").replace(base / "seed0/last.pt")
    train("--method", "acf_bckd+cirkd+dist", "--resume", *options, cwd=workspace)
    resumed = load_checkpoint(base / "seed0/last.pt")
    assert (before["step"], resumed["step"]) == (3, 4)
    for part in ("weights", "method"):
        assert digest(straight[part]) == digest(again[part]) == digest(resumed[part])
    learnt = [
        name
        for name, value in resumed["method"].items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(before["method"][name]))
    ]
    for kind in (".acf_bckd.features", ".cirkd."):
        assert any(kind in name for name in learnt), kind

    run("test_3d.py", "--ckpt", str(base / "whole/best.pt"), "--no-predictions", cwd=workspace)
    table = run("tools/results_table.py", str(base / "whole"), cwd=workspace).stdout
    assert "unet <- resunet, acf_bckd+cirkd+dist" in table


@pytest.mark.parametrize(
    "method, message",
    [
        ("kd+dst", "error: --method: method: unknown name 'dst'; did you mean 'dist'?"),
        ("kd+cwd+kd", "error: --method: method: 'kd+cwd+kd' has kd twice"),
        ("supervised+kd", "error: --method: method: 'supervised+kd': 'supervised' is training"),
        ("kd+ifvd", "error: --opts {BAD}: method_args: ifvd+kd: ifvd: weight is a weight"),
    ],
)
def test_mistakes_are_errors_before_the_data_are_read(workspace, method, message):
    options = ("--opts", BAD, "data_root=nowhere")
    out = train("--method", method, *options, cwd=workspace, ok=False)
    assert out.returncode == 1
    assert out.stderr.startswith(message.replace("{BAD}", BAD))


def test_a_loss_of_the_users_own_joins(workspace):
    (workspace / "mine.py").write_text(
        "from losses.kd import KD\n\n\nclass Mine(KD):\n    monitor = {}\n"
    )
    train(*TEACHER, cwd=workspace)
    train("--method", "mine.py:Mine+kd", cwd=workspace)
    folder = workspace / "runs/tiny/Mine+kd/resunet-unet/seed0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [entry for entry in log if entry["kind"] == "train"][-1]
    assert last["Mine.kd"] == last["kd.kd"] > 0
    assert load_checkpoint(folder / "last.pt")["plugins"]["Mine"]["roles"] == ["method"]
