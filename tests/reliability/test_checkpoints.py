"""Checkpoints that are damaged, hostile or do not fit on the disk, and runs that go on longer or
otherwise.
"""

import functools
import json
import os
import pickle
import random
import zipfile

import pytest
import torch

from tests.reliability.faults import full_disk, full_log, limit_file_size
from tests.reliability.harness import FULL, run
from tests.reliability.test_kill import differences, state_of
from utils.checkpoint import (
    DAMAGED,
    PREVIOUS,
    CheckpointError,
    DiskError,
    load_checkpoint,
    load_last,
    save_last,
)
from utils.schedules import poly_lr

ONE_OF_EACH_SCRIPT = ("supervised", "crkd", "lefed")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Damage


def saved(folder):
    """A checkpoint with tensors and plain values, and its bytes."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{k}.weight": torch.randn(7, 11 + k, generator=generator) for k in range(5)}
    for step in (1, 2):
        save_last(
            {"weights": weights, "step": step, "best": {"dice": 0.5}, "names": ["a", "b"]}, folder
        )
    return folder / "last.pt", (folder / "last.pt").read_bytes()


def same_or_refused(path, content) -> bool:
    """Whether it is refused; AssertionError if it loads as something else."""
    try:
        loaded = load_checkpoint(path)
    except CheckpointError:
        return True
    assert not differences(loaded, content)
    return False


def test_torch_itself_does_not_see_a_flipped_bit(tmp_path):
    """Why load_checkpoint looks at the checksums."""
    path, data = saved(tmp_path)
    content = load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        record = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    at = data.index(content["weights"]["layer0.weight"].numpy().tobytes())
    assert record.header_offset < at
    path.write_bytes(data[: at + 5] + bytes([data[at + 5] ^ 1]) + data[at + 6 :])
    assert differences(torch.load(path, weights_only=True), content) == ["/weights/layer0.weight"]
    with pytest.raises(
        CheckpointError, match=r"last\.pt: damaged .*checksum of its part .*data/0 is wrong"
    ):
        load_checkpoint(path)


def test_no_flipped_bit_and_no_lost_end_goes_unnoticed(tmp_path):
    path, data = saved(tmp_path)
    content, chance = load_checkpoint(path), random.Random(0)
    flips = [(chance.randrange(len(data)), 1 << chance.randrange(8)) for _ in range(600)]
    refused = 0
    for at, bit in flips:
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        refused += same_or_refused(path, content)
    # What is not refused lies in padding and dates between the records, and changes nothing.
    stored = sum(value.numel() * 4 for value in content["weights"].values())
    assert refused / len(flips) > stored / len(data)
    for size in chance.sample(range(len(data)), 100):
        path.write_bytes(data[:size])
        assert same_or_refused(path, content)
    for at in chance.sample(range(len(data) - 64), 100):  # a block that the disk lost
        path.write_bytes(data[:at] + bytes(64) + data[at + 64 :])
        same_or_refused(path, content)


def test_a_damaged_last_is_set_aside_so_that_it_never_replaces_the_good_one(tmp_path):
    path, data = saved(tmp_path)
    path.write_bytes(data[:-200])
    content, warning = load_last(tmp_path)
    assert (
        content["step"] == 1
        and "step 1" in warning
        and f"the damaged one is now {DAMAGED}" in warning
    )
    assert (tmp_path / DAMAGED).read_bytes() == data[:-200]
    save_last({"step": 2}, tmp_path)
    assert (
        load_checkpoint(tmp_path / "last.pt")["step"],
        load_checkpoint(tmp_path / PREVIOUS)["step"],
    ) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_SCRIPT)
def test_a_run_with_a_damaged_last_goes_on_from_the_previous_one(site, name):
    place = site(name)
    assert place.run().code == 0
    whole = state_of(place.folder)
    data = bytearray((place.folder / "last.pt").read_bytes())
    value = next(v for v in whole["last.pt"]["weights"].values() if v.numel() > 8)
    data[data.index(value.contiguous().numpy().tobytes())] ^= 16
    (place.folder / "last.pt").write_bytes(data)
    ended = place.run("--resume")
    assert ended.code == 0, ended.text
    assert (
        "warning:" in ended.text
        and f"going on from {place.cell.folder}/{PREVIOUS}, step 4" in ended.text
    )
    assert not differences(state_of(place.folder), whole)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused_by_training_and_test(site):
    place = site("acf_bckd")
    trap = place.path / "trap"
    folder = place.path / "runs/tiny/supervised/resunet/seed0"
    torch.save({"weights": Trap(trap), "network": {}}, folder / "best.pt")
    for ended in (
        place.run(),
        run("test_3d.py", "--ckpt", str(folder / "best.pt"), cwd=place.path),
    ):
        assert ended.code == 1
        assert (
            "best.pt: refused" in ended.text
            and "could run code" in ended.text
            and "Traceback" not in ended.text
        )
    (folder / "best.pt").write_bytes(pickle.dumps(Trap(trap)))
    assert "not in torch.save's format" in place.run().text
    assert not trap.exists()


@pytest.mark.slow
def test_a_lost_best_checkpoint_is_noticed(site):
    """With steps left, another is chosen among them; with none left there is nothing to choose."""
    place = site("supervised")
    assert place.run("max_steps=4").code == 0
    (place.folder / "best.pt").write_bytes(b"x")
    ended = place.run("--resume", "max_steps=4")
    assert ended.code == 1 and "all 4 steps are done" in ended.text
    assert f"error: {place.cell.folder}/best.pt: damaged" in ended.text
    (place.folder / "best.pt").unlink()
    ended = place.run("--resume", "max_steps=6")
    assert ended.code == 0 and "best.pt: no such checkpoint. It was the best" in ended.text
    assert load_checkpoint(place.folder / "best.pt")["step"] == 6


# Disks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, file",
    [
        (name, file)
        for name in ONE_OF_EACH_SCRIPT
        for file in ("last.pt", "best.pt", "log.jsonl", "config.yaml")
        if FULL or file == "last.pt" or name == "crkd"
    ],
)
def test_a_full_disk_stops_the_run_in_one_line_and_keeps_the_checkpoint(site, name, file):
    """last.pt at its second write, so that there is one to keep; the log at its third line, after
    the first save.
    """
    place = site(name)
    trap = (
        functools.partial(full_log, 3)
        if file == "log.jsonl"
        else functools.partial(full_disk, file, 2 if file == "last.pt" else 1)
    )
    ended = place.run(prepare=trap)
    assert ended.code == 1
    said = ended.text.strip().splitlines()[-1]
    assert said.startswith(
        f"error: {place.cell.folder}/{file}: cannot be written (the disk is full, "
    ), ended.text
    assert (
        "MB are free); checkpoints written before are intact" in said
        and "Traceback" not in ended.text
    )
    if file in ("last.pt", "log.jsonl"):
        assert load_checkpoint(place.folder / "last.pt")["step"] == 2
    else:
        assert not (place.folder / file).exists()
    assert not list(place.folder.glob("*.tmp"))
    straight = site(name, "straight")
    assert straight.run().code == 0 and place.run("--resume").code == 0
    assert not differences(state_of(place.folder), state_of(straight.folder))


@pytest.mark.slow
def test_a_limit_of_the_system_itself(site):
    """RLIMIT_FSIZE: the kernel, not a trap, refuses the bytes of a checkpoint, in the middle of
    torch.save.
    """
    place = site("supervised")
    assert place.run("max_steps=2").code == 0
    size = (place.folder / "last.pt").stat().st_size
    before = load_checkpoint(place.folder / "last.pt")
    ended = place.run("--resume", prepare=functools.partial(limit_file_size, size // 2))
    assert ended.code == 1 and "Traceback" not in ended.text, ended.text
    assert "cannot be written (the file is too big" in ended.text.strip().splitlines()[-1]
    assert not differences(load_checkpoint(place.folder / "last.pt"), before)
    assert before["step"] == 2 and place.run("--resume").code == 0


def test_a_write_that_is_refused_names_the_file_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DiskError, match=r"last\.pt: cannot be written \((Not a directory|File exists)"
    ):
        save_last({"step": 1}, tmp_path / "file")


# Other configurations, longer runs


@pytest.mark.slow
def test_resuming_with_another_configuration_names_what_differs_and_what_may(site):
    place = site("supervised")
    assert place.run("max_steps=2").code == 0
    before = state_of_config(place)
    ended = place.run("--resume", "max_steps=2", "lr=0.5", "momentum=0.8", "log_interval=1")
    assert ended.code == 1
    assert (
        "lr: 0.01 then, 0.5 now; momentum: 0.9 then, 0.8 now" in ended.text
        and "log_interval: " not in ended.text
    )
    assert (
        "only these may differ: " in ended.text
        and "max_steps" in ended.text.split("only these may differ")[1]
    )
    assert state_of_config(place) == before


def state_of_config(place) -> str:
    return (place.folder / "config.yaml").read_text()


@pytest.mark.slow
def test_a_finished_run_goes_on_as_if_planned_longer_from_there(site):
    """The learning rate of each step is that of the length that the run had when the step was
    made.
    """
    place = site("supervised")
    assert place.run("max_steps=2", "log_interval=1").code == 0
    assert "has all 2 steps" in place.run("--resume", "max_steps=2", "log_interval=1").text
    assert place.run("--resume", "max_steps=4", "log_interval=1").code == 0
    rates = [entry["lr"] for entry in lines(place.folder) if entry["kind"] == "train"]
    assert rates == [poly_lr(step, 0.01, 2 if step < 2 else 4) for step in range(4)]
    assert rates[1] == 0 != rates[2]  # the short plan had come to its end
    assert load_checkpoint(place.folder / "last.pt")["config"]["max_steps"] == 4


@pytest.mark.slow
def test_with_nothing_that_depends_on_the_length_the_longer_run_is_the_same(site):
    """A constant learning rate, and a method without ramps: data order, random numbers and log go
    on unchanged.
    """
    straight, extended = site("crkd", "straight"), site("crkd", "extended")
    for place, length in ((straight, 6), (extended, 2), (extended, 6)):
        ended = place.run(
            "--resume", "--method", "supervised", "schedule=constant", f"max_steps={length}"
        )
        assert ended.code == 0, ended.text
    folder = "runs/heart/supervised/unet2d-2/seed0"
    assert not differences(state_of(straight.path / folder), state_of(extended.path / folder))


@pytest.mark.slow
def test_a_length_that_is_already_exceeded_changes_nothing(site):
    place = site("supervised")
    assert place.run("max_steps=4").code == 0
    before = state_of(place.folder)
    ended = place.run("--resume", "max_steps=2")
    assert ended.code == 0 and "nothing to do" in ended.text
    after = state_of(place.folder)
    assert not differences(before["last.pt"], after["last.pt"]) and before["log"] == after["log"]
