"""Two processes on the CPU (gloo): equal to one where there are no batch statistics, and running
for all scripts.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.scripts.conftest import CONFIG, ROOT, make_workspace, train
from tests.scripts.test_train_crkd import make_site
from utils.checkpoint import digest, load_checkpoint

pytestmark = pytest.mark.slow


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments, cwd, processes=2, ok=True):
    result = subprocess.run(
        [*TORCHRUN, f"--nproc_per_node={processes}", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=ENVIRONMENT,
    )
    assert (result.returncode == 0) is ok, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A workspace with batches of two cases with two crops each, and a teacher."""
    folder = make_workspace(tmp_path_factory.mktemp("distributed"))
    (folder / "tiny.yaml").write_text(CONFIG.replace("cases_per_batch: 1", "cases_per_batch: 2"))
    train("--method", "supervised", "--student", "resunet", "--opts", "max_steps=1", cwd=folder)
    return folder


def trained(site, *flags, processes, tag):
    """Run folder of a training with so many processes."""
    script, opts = (
        str(ROOT / "train_3d_distill.py"),
        ("--opts", f"tag={tag}", "diagnose_interval=2"),
    )
    arguments = ("--config", "tiny.yaml", *flags)
    if processes == 1:
        train(*flags, *opts, cwd=site)
    else:
        torchrun(script, *arguments, *opts, cwd=site, processes=processes)
    return site / train(*flags, *opts, "--show-run", cwd=site).stdout.strip()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch", ["by_case", "by_crop"])
@pytest.mark.parametrize(
    "flags", [("--method", "supervised"), ("--method", "kd"), ("--method", "cwd")]
)
def test_two_processes_equal_one(site, flags, batch):
    """Batch, gradients, logs, validation and weights are those of one process, where no loss or
    network looks at the whole batch.
    """
    flags = (*flags, "--student", "unet")
    tag = f"{batch}{len(flags)}"
    config = (
        CONFIG.replace("cases_per_batch: 1", "cases_per_batch: 2") if batch == "by_case" else CONFIG
    )
    (site / "tiny.yaml").write_text(config)
    one = trained(site, *flags, processes=1, tag=f"one-{tag}")
    two = trained(site, *flags, processes=2, tag=f"two-{tag}")
    first, second = (load_checkpoint(folder / "last.pt") for folder in (one, two))
    tolerance = 1e-5
    for name, value in first["weights"].items():
        torch.testing.assert_close(
            second["weights"][name], value, rtol=tolerance, atol=tolerance, msg=name
        )
    for expected, found in zip(log_of(one), log_of(two), strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, rel=100 * tolerance, abs=tolerance, nan_ok=True)
    assert len(second["rng"]) == 2 and len(first["rng"]) == 1


def test_two_processes_share_labelled_and_unlabelled_patches(site):
    (site / "tiny.yaml").write_text(CONFIG.replace("cases_per_batch: 1", "cases_per_batch: 2"))
    flags = ("--method", "kd", "--student", "unet", "--labelled", "2")
    one = trained(site, *flags, processes=1, tag="one")
    two = trained(site, *flags, processes=2, tag="two")
    first, second = (load_checkpoint(folder / "last.pt") for folder in (one, two))
    for name, value in first["weights"].items():
        torch.testing.assert_close(second["weights"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    agreed = [[e for e in log_of(run) if e["kind"] == "agreement"] for run in (one, two)]
    for expected, found in zip(*agreed, strict=True):
        assert found.pop("kind") == expected.pop("kind")
        assert found == pytest.approx(expected, abs=1e-3)


def test_a_resumed_run_of_two_processes_equals_an_uninterrupted_one(site):
    flags = ("--method", "kd", "--student", "espnetv2")  # with batch norm and dropout
    (site / "tiny.yaml").write_text(CONFIG.replace("[16, 16, 16]", "[32, 32, 32]"))
    run = trained(site, *flags, processes=2, tag="whole")
    whole, log = load_checkpoint(run / "last.pt"), (run / "log.jsonl").read_text()
    (run / "last.previous.pt").replace(run / "last.pt")
    assert load_checkpoint(run / "last.pt")["step"] == 2
    script = str(ROOT / "train_3d_distill.py")
    opts = ("--opts", "tag=whole", "diagnose_interval=2")
    torchrun(script, "--config", "tiny.yaml", *flags, "--resume", *opts, cwd=site)
    again = load_checkpoint(run / "last.pt")
    assert again["step"] == 4 and digest(again["weights"]) == digest(whole["weights"])
    assert (run / "log.jsonl").read_text() == log


def test_a_signal_to_torchrun_saves_and_stops_all_processes(site):
    flags = ("--method", "supervised", "--student", "unet")
    never = ("val_interval=100000", "save_interval=100000")
    opts = ("--opts", "tag=stopped", "max_steps=100000", "log_interval=1", *never)
    script = str(ROOT / "train_3d_distill.py")
    run = site / train(*flags, *opts, "--show-run", cwd=site).stdout.strip()
    process = subprocess.Popen(
        [*TORCHRUN, "--nproc_per_node=2", script, "--config", "tiny.yaml", *flags, *opts],
        cwd=site,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text().count("\n"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    step = load_checkpoint(run / "last.pt")["step"]
    assert f"stopped after step {step}; go on with: torchrun --nproc_per_node=2 {script}" in stderr
    assert len(log_of(run)) == step


def test_tests_are_shared_by_two_processes(site):
    run = trained(site, "--method", "supervised", "--student", "unet", processes=1, tag="scored")
    scores = []
    for processes in (1, 2):
        out = site / f"out{processes}"
        torchrun(
            str(ROOT / "test_3d.py"),
            "--ckpt",
            str(run / "best.pt"),
            "--out",
            str(out),
            cwd=site,
            processes=processes,
        )
        scores.append((out / "metrics.csv").read_text())
        assert len(list((out / "predictions").iterdir())) == len(
            {line.split(",")[1] for line in scores[0].split()[1:]}
        )
    assert scores[0] == scores[1]


def test_a_batch_that_cannot_be_shared_is_an_error(site):
    result = torchrun(
        str(ROOT / "train_3d_distill.py"),
        "--config",
        "tiny.yaml",
        "--method",
        "supervised",
        "--student",
        "unet",
        "--opts",
        "cases_per_batch=1",
        "crops_per_case=3",
        "tag=odd",
        cwd=site,
        ok=False,
    )
    assert "crops_per_case: 3 cannot be shared by 2 processes; make it a multiple" in result.stderr


@pytest.mark.parametrize(
    "kind, method", [("acdc", "crkd"), ("acdc", "unimatch"), ("la", "lefed"), ("la", "acmt")]
)
def test_few_labels_train_and_are_scored_in_two_processes(tmp_path, kind, method):
    """Batch statistics are those of each process, so weights differ from one process; both
    processes hold the same.
    """
    site = make_site(tmp_path, kind)
    dims = site.kind.dims
    site.replace("max_steps: 4", "max_steps: 2")
    site.replace("labelled_batch: 2\nunlabelled_batch: 2", "labelled_batch: 4\nunlabelled_batch: 4")
    flags = ("--config", "tiny.yaml", "--method", method)
    torchrun(str(ROOT / f"train_{dims}d_crkd.py"), *flags, cwd=site.folder)
    state = load_checkpoint(site.run_folder(method) / "last.pt")
    assert state["step"] == 2 and len(state["rng"]) == 2
    assert all(torch.isfinite(value).all() for value in state["weights"].values())
    torchrun(
        str(ROOT / f"test_{dims}d.py"),
        "--ckpt",
        str(site.run_folder(method) / "best.pt"),
        cwd=site.folder,
    )
    shared = (site.run_folder(method) / "metrics.csv").read_text()
    site.score(site.run_folder(method))
    assert (site.run_folder(method) / "metrics.csv").read_text() == shared
