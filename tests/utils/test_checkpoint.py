"""Checkpoints through crashes, damage and bad faith."""

import csv
import os
import pickle
import stat
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import utils.checkpoint as checkpoint
from utils.checkpoint import (
    PREVIOUS,
    CheckpointError,
    Lock,
    TableError,
    atomic_save,
    digest,
    load_checkpoint,
    load_last,
    load_network_weights,
    read_json,
    read_table,
    save_last,
    write_table,
    write_text,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

CONTENT = {
    "weights": {"w": torch.arange(6.0).view(2, 3)},
    "step": 3,
    "names": ["a", "b"],
    "best": {"dice": 0.5},
}


def fail_halfway(content, file):
    file.write(b"half of a checkpoint")
    raise OSError("No space left on device")


def test_round_trip(tmp_path):
    atomic_save(CONTENT, tmp_path / "new" / "x.pt")
    loaded = load_checkpoint(tmp_path / "new" / "x.pt")
    assert torch.equal(loaded["weights"]["w"], CONTENT["weights"]["w"])
    assert loaded | {"weights": None} == CONTENT | {"weights": None}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.pt"]


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    atomic_save({"step": 1}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        atomic_save({"step": 2}, tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 1


@pytest.mark.parametrize(
    "content, where",
    [
        ({"best": {"dice": np.float64(0.5)}}, r"x\.pt\['best'\]\['dice'\] is a float64"),
        ({"scores": [1.0, np.zeros(2)]}, r"x\.pt\['scores'\]\[1\] is a ndarray"),
        ({"paths": (Path("a"),)}, r"x\.pt\['paths'\]\[0\] is a \w*Path"),
    ],
)
def test_what_safe_loading_would_refuse_is_not_saved(tmp_path, content, where):
    atomic_save({"step": 1}, tmp_path / "x.pt")
    with pytest.raises(TypeError, match=where):
        atomic_save(content, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 1


def test_the_file_is_complete_before_it_is_moved_into_place(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def spy(source, target):
        moved.append(load_checkpoint(source)["step"])
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", spy)
    atomic_save({"step": 4}, tmp_path / "x.pt")
    assert moved == [4]


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_last({"step": step}, tmp_path)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3
    assert load_checkpoint(tmp_path / PREVIOUS)["step"] == 2
    assert load_last(tmp_path)[0]["step"] == 3 and load_last(tmp_path)[1] is None
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_save_last_leaves_both(tmp_path, monkeypatch):
    for step in (1, 2):
        save_last({"step": step}, tmp_path)
    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        save_last({"step": 3}, tmp_path)
    assert load_last(tmp_path) == ({"step": 2}, None)
    assert load_checkpoint(tmp_path / PREVIOUS)["step"] == 1


DAMAGE = {
    "empty": lambda data: b"",
    "first byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but the end": lambda data: data[:-40],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"hello world\n",
    "page": lambda data: b"<html>Not Found</html>\n",
    "pickle mark": lambda data: b"\x80",
    "noise": lambda data: b"\x80\x02\x8a\x0a" + data[::-1],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_clear_error_and_resume_falls_back(tmp_path, kind):
    for step in (1, 2):
        save_last({"step": step, "w": torch.zeros(500)}, tmp_path)
    last = tmp_path / "last.pt"
    last.write_bytes(DAMAGE[kind](last.read_bytes()))
    with pytest.raises(CheckpointError, match=r"last\.pt: (damaged or not a checkpoint|refused)"):
        load_checkpoint(last)
    content, warning = load_last(tmp_path)
    assert content["step"] == 1
    assert str(last) in warning and f"going on from {tmp_path / PREVIOUS}" in warning


def test_a_missing_last_falls_back(tmp_path):
    for step in (1, 2):
        save_last({"step": step}, tmp_path)
    (tmp_path / "last.pt").unlink()
    content, warning = load_last(tmp_path)
    assert content["step"] == 1 and "last.pt: no such checkpoint" in warning


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"cannot resume: .*last\.pt: no such .*start without --resume"
    ):
        load_last(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, save):
    trap, path = tmp_path / "trap", tmp_path / "x.pt"
    save({"weights": Malicious(trap)}, path)
    with pytest.raises(
        CheckpointError, match=r"x\.pt: (refused, it holds more than tensors|.*not in torch.save)"
    ):
        load_checkpoint(path)
    assert not trap.exists()


def test_not_a_dictionary(tmp_path):
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary, got list"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("weight"), r"1 missing \['weight'\], 0 unexpected"),
        (
            lambda state: state.update(extra=torch.zeros(1)),
            r"0 missing \[\], 1 unexpected \['extra'\]",
        ),
        (lambda state: state.update(bias=torch.zeros(5)), r"bias: \(5,\) instead of \(2,\)"),
    ],
)
def test_weights_that_do_not_fit_are_listed(change, message):
    network = torch.nn.Linear(3, 2)
    before = digest(network.state_dict())
    state = {key: torch.ones_like(value) for key, value in network.state_dict().items()}
    load_network_weights(torch.nn.Linear(3, 2), state, "file.pt")
    change(state)
    with pytest.raises(
        CheckpointError, match=r"file\.pt: the weights do not fit the network.*" + message
    ):
        load_network_weights(network, state, "file.pt")
    assert digest(network.state_dict()) == before


def test_digest_sees_names_and_bits():
    state = {
        "a": torch.tensor([1.0, 2.0]),
        "b": torch.tensor(3),
        "c": torch.zeros(4, dtype=torch.bfloat16),
    }
    same = {key: state[key].clone() for key in ("c", "b", "a")}
    assert digest(state) == digest(same)
    nudged = state["a"].clone()
    nudged[1] = torch.nextafter(nudged[1], torch.tensor(9.0))
    assert digest({**state, "a": nudged}) != digest(state)
    assert digest({("z" if key == "a" else key): value for key, value in state.items()}) != digest(
        state
    )


def packed(path, name, data, compression=zipfile.ZIP_DEFLATED):
    """The checkpoint at `path` again, with one more part."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
        archive.writestr(name, data, compress_type=compression)


def test_nothing_is_unpacked_to_more_than_the_file_holds(tmp_path, monkeypatch):
    """A bomb of a few kB is refused by the sizes in its table of contents."""
    path = tmp_path / "x.pt"
    atomic_save(CONTENT, path)
    packed(path, "archive/data/99", bytes(10_000), zipfile.ZIP_STORED)
    assert load_checkpoint(path)["step"] == 3  # another part alone is no fault
    packed(path, "archive/data/100", bytes(50_000_000))

    def unpack(*arguments, **keywords):
        raise AssertionError("a part was read")

    monkeypatch.setattr(zipfile.ZipFile, "open", unpack)
    with pytest.raises(
        CheckpointError, match=r"x\.pt: damaged .*100 is compressed, .* to 50000000"
    ):
        load_checkpoint(path)


def shared(levels):
    """A list of 2^levels values, in a file of a few hundred bytes."""
    value = [1, 2]
    for _ in range(levels):
        value = [value, value]
    return value


def itself():
    value = [1]
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value, reason",
    [
        (lambda: torch.zeros(1).expand(10**12), "is larger than the file"),
        (lambda: torch.empty(10**12, device="meta"), "is larger than the file"),
        (lambda: shared(30), "more than 10000000 values"),
        (itself, "contains itself"),
        (lambda: {"\x1b]0;pwned\x07": 1}, "control characters"),
        (lambda: ["evil\u202egnp.exe"], "control characters"),
    ],
    ids=["expanded", "without data", "repeated", "cycle", "terminal", "direction"],
)
def test_content_that_no_script_writes_is_refused(tmp_path, value, reason):
    torch.save({"step": 1, "value": value()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"x\.pt: damaged or not a checkpoint \(.*{reason}"):
        load_checkpoint(tmp_path / "x.pt")


TEXTS = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "'=1", "''=1", "a=1", "-", "-1.5", "it's", ""]


def test_tables_hold_no_formulas_and_give_back_their_texts(tmp_path):
    path = tmp_path / "x.csv"
    write_table(path, [["case", "n"], *([text, k] for k, text in enumerate(TEXTS))])
    assert read_table(path)[1:] == [[text, str(k)] for k, text in enumerate(TEXTS)]
    with path.open(newline="") as file:
        shown = [row[0] for row in csv.reader(file)]
    assert shown[1:5] == ["'=1+1", "'+cmd", "'-2+3", "'@SUM(A1)"]
    assert shown[7:11] == ["a=1", "-", "-1.5", "it's"]  # numbers, and what is no formula


@pytest.mark.parametrize(
    "data, reason",
    [(b"a,b\r\n1,0.9", "ends within a line"), (b"a\xff\n", "decode"), (b"a\x1b[2J\n", "control")],
)
def test_a_damaged_table_is_named(tmp_path, data, reason):
    path = tmp_path / "metrics.csv"
    path.write_bytes(data)
    with pytest.raises(TableError, match=rf"metrics\.csv: damaged or not .*{reason}"):
        read_table(path)


@pytest.mark.parametrize("text", ["", '{"a": ', "[]", "[" * 100_000, '{"a": "\\u001b[2J"}'])
def test_a_damaged_json_file_is_named(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"summary\.json: damaged or not a file of this project"):
        read_json(path)


def test_devices_are_written_to_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)


def test_a_lock_holds_up_nothing_where_there_are_none(tmp_path, monkeypatch, capsys):
    """No locks, numbers of files that change, and files that cannot be removed while open."""
    monkeypatch.setattr(checkpoint.fcntl, "lockf", Mock(side_effect=OSError(37, "No locks")))
    for _ in range(3):
        lock = Lock(tmp_path / "lock")
        assert lock.take() is None and not lock.works
        lock.release()
    assert capsys.readouterr().err.count("cannot be locked (No locks)") == 1
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.os.path, "samestat", lambda one, other: False)
    lock = Lock(tmp_path / "lock")
    assert lock.take() is None and lock.take() is None
    lock.release()
    monkeypatch.undo()
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=PermissionError("in use")))
    assert lock.take() is None
    lock.release()
    assert lock.path.exists() and lock.take() is None
