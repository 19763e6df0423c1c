"""Trainings that are killed at random moments, some of them inside the writing of a checkpoint, end
bit for bit as if nothing had happened: weights, method, optimiser, random state, best score, both
checkpoints and the log.

KILLS=20 sets how often each training is killed (the default is that of the quick subset); the
moments come from a seed.
"""

import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
import yaml

from tests.reliability.conftest import CELLS, Site
from tests.reliability.faults import PHASES, kill_in_save
from tests.reliability.harness import FULL, ROOT
from utils.checkpoint import PREVIOUS, load_checkpoint, load_last

KILLS = int(os.environ.get("KILLS", "2"))
# Of the quick subset: each method once, loader processes where a method of each script has them
QUICK = {("supervised", 2), ("acf_bckd", 0), ("cirkd", 2), ("crkd", 2), ("acmt", 0), ("lefed", 0)}
CHOSEN = [
    (name, workers) for name in CELLS for workers in (0, 2) if FULL or (name, workers) in QUICK
]


def state_of(folder: Path) -> dict:
    """All that a run leaves and that must not depend on how often it was killed.

    `workers` and the version of the code, which names the commit, may differ by themselves.
    """
    state = {name: load_checkpoint(folder / name) for name in ("last.pt", PREVIOUS, "best.pt")}
    for content in state.values():
        del content["config"]["workers"], content["code"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["workers"]
    return state | {"log": (folder / "log.jsonl").read_text(), "config": config}


def differences(first, second, where: str = "") -> list[str]:
    """Paths to what is not equal, tensors to the last bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [
            found
            for key in first
            for found in differences(first[key], second[key], f"{where}/{key}")
        ]
    if (
        isinstance(first, list | tuple)
        and type(first) is type(second)
        and len(first) == len(second)
    ):
        return [
            found
            for k in range(len(first))
            for found in differences(first[k], second[k], f"{where}/{k}")
        ]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        same = (
            same and first.contiguous().numpy().tobytes() == second.contiguous().numpy().tobytes()
        )
        return [] if same else [where]
    return [] if type(first) is type(second) and first == second else [where]


def assert_same(folder: Path, reference: dict) -> None:
    assert not differences(state_of(folder), reference)
    assert not list(folder.glob("*.tmp")), "what a killed process left is cleaned up"


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory):
    """name -> the state of an uninterrupted run without loader processes, and its duration in
    seconds.
    """
    made: dict[str, tuple[dict, float]] = {}

    def of(name: str) -> tuple[dict, float]:
        if name not in made:
            path = tmp_path_factory.mktemp("reference") / "site"
            shutil.copytree(prepared(CELLS[name].data), path)
            site = Site(path, CELLS[name])
            begin = time.monotonic()
            ended = site.run("workers=0")
            assert ended.code == 0, ended.text
            made[name] = state_of(site.folder), time.monotonic() - begin
        return made[name]

    return of


def test_the_comparison_sees_one_bit():
    def state(zero=0.0, number=0.1):
        return {"a": [torch.tensor([1.0, zero]), 1], "b": {"c": number}}

    assert differences(state(), state()) == []
    assert differences(state(), state(zero=-0.0)) == ["/a/0"]
    assert differences(state(), state(number=0.1 + 2**-56)) == ["/b/c"]
    assert differences(state(), state() | {"d": 0}) == [""]


@pytest.mark.slow
@pytest.mark.parametrize("name, workers", CHOSEN)
def test_killed_at_random_moments(site, reference, name, workers):
    expected, seconds = reference(name)
    moments = random.Random(zlib.crc32(f"{name} {workers}".encode()))
    place, killed, in_write = site(name), 0, 0
    while killed < KILLS:
        writes = killed % 2 == 1  # every other one inside a write
        trap = (
            functools.partial(kill_in_save, moments.choice(PHASES), moments.randint(1, 4))
            if writes
            else None
        )
        child = place.start("--resume", f"workers={workers}", prepare=trap)
        if not writes:
            child.process.join(moments.uniform(0, 1.2 * seconds))
            if child.alive:
                child.signal(signal.SIGKILL)
        ended = child.wait()
        if ended.code == -signal.SIGKILL:
            killed, in_write = killed + 1, in_write + writes
            continue
        # the run ended before its kill; the kills that are left fall on another run
        assert ended.code == 0, ended.text
        assert_same(place.folder, expected)
        shutil.rmtree(place.folder)
    ended = place.run("--resume", f"workers={workers}")
    assert ended.code == 0, ended.text
    assert_same(place.folder, expected)
    assert in_write == KILLS // 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, phase",
    [
        *(("last.pt", phase) for phase in PHASES),
        *(("best.pt", phase) for phase in ("half", "synced", "moved", "after")),
    ],
)
def test_killed_at_each_step_of_a_write(site, reference, file, phase):
    """The second write of last.pt, when there is something to lose, and the first of best.pt. A
    best.pt that is newer than last.pt, as after best.pt/after, is made again.
    """
    expected, _ = reference("supervised")
    number = 2 if file == "last.pt" else 1  # a score need not improve twice
    place = site("supervised")
    ended = place.run(prepare=functools.partial(kill_in_save, phase, number, file))
    assert ended.code == -signal.SIGKILL, ended.text
    left = {path.name for path in place.folder.iterdir() if path.suffix in (".pt", ".tmp")}
    assert any(name.endswith(".tmp") for name in left) == (
        phase in ("half", "written", "synced", "between")
    )
    if (file, phase) == ("last.pt", "between"):
        assert "last.pt" not in left and PREVIOUS in left
    ended = place.run("--resume")
    assert ended.code == 0, ended.text
    if (file, phase) == ("last.pt", "between"):
        assert "last.pt: no such checkpoint; going on from" in ended.text and "step 2" in ended.text
    assert_same(place.folder, expected)


@pytest.mark.slow
def test_a_real_process_is_killed(site, reference):
    """Nothing of the harness: an interpreter of its own, killed as soon as it has saved once."""
    expected, _ = reference("supervised")
    place = site("supervised")
    command = [
        sys.executable,
        str(ROOT / place.cell.script),
        "--config",
        "tiny.yaml",
        *place.cell.flags,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (place.path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*command, "--opts", "max_steps=6", "workers=2"],
            cwd=place.path,
            stdout=output,
            stderr=output,
            env=environment,
        )
        while not (place.folder / "last.pt").exists():
            assert process.poll() is None, (place.path / "output.txt").read_text()
            time.sleep(0.002)
        process.kill()
        process.wait(60)
    assert load_checkpoint(place.folder / "last.pt")["step"] < 6
    ended = place.run("--resume", "workers=2")
    assert ended.code == 0, ended.text
    assert_same(place.folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["supervised", "crkd", "lefed"])
def test_a_folder_has_one_writer_until_its_process_ends(site, name):
    place = site(name)
    child = place.start("max_steps=100000", "workers=2", "save_interval=2", "val_interval=100000")
    child.wait_for(lambda: (place.folder / "run.lock").exists())
    early = place.run("lr=0.5")  # there is nothing to resume yet
    child.wait_for(lambda: (place.folder / "last.pt").exists())
    refused = [early, place.run("lr=0.5"), place.run("--resume", "max_steps=100000")]
    for ended in refused:
        assert ended.code == 1, ended.text
    for ended in (refused[0], refused[2]):
        said = (
            rf"in use by process {child.process.pid} on host {socket.gethostname()} since 2\d{{3}}-"
        )
        assert re.search(said, ended.text), ended.text
    assert child.alive
    before = yaml.safe_load((place.folder / "config.yaml").read_text())
    assert before["lr"] != 0.5
    child.signal(signal.SIGKILL)
    child.wait()
    step = load_last(place.folder)[0]["step"]  # killed anywhere, maybe between two moves
    again = place.run("--resume", f"max_steps={step + 1}")
    assert again.code == 0, again.text
    assert not (place.folder / "run.lock").exists()
