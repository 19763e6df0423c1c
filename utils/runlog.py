"""The log of a run: one JSON object per line in log.jsonl, the same scalars in TensorBoard and, by
--logger wandb, in Weights & Biases, which copies TensorBoard's events.

wandb is no requirement: it is imported when it is asked for. Its environment variables hold:
WANDB_MODE=offline, WANDB_PROJECT, ... A resumed run goes on under the same identifier, kept in
tracker.json of the run folder.

Kinds of lines: `train`, means since the line before; `val`; `teacher`, the teacher's scores on the
validation cases; `diagnosis`, see utils/diagnosis.py.
"""

import contextlib
import importlib
import importlib.util
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint import TableError, check_plain_texts, read_json, write_text, writing
from utils.config import ConfigError

LOGGERS = ("", "wandb")
# names in a line of the log that are the scripts' own
OWN = ("step", "kind", "loss", "lr", "skipped", "loss_scale")
# kind of line -> its group in TensorBoard, but for the loss and the mean Dice
BOARD_GROUPS = {
    "train": "z_terms",
    "val": "val_classes",
    "teacher": "val_teacher",
    "agreement": "val_with_teacher",
    "diagnosis": "z_diagnosis",
}


def require_logger(name: str) -> None:
    """ConfigError if what `--logger` names is not to be had; '' needs nothing."""
    if name == "mlflow":
        raise ConfigError(
            "logger: mlflow is no longer supported; take --logger wandb, or log.jsonl and the "
            "TensorBoard events, which every run has"
        )
    if name and name in LOGGERS and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"logger: {name} is not installed here; install it with 'python -m pip install "
            f"{name}', or go without --logger (log.jsonl and TensorBoard are always written)"
        )


def start_wandb(folder: Path, config: Mapping[str, Any], resumed: bool) -> Any:
    """A wandb run that copies the TensorBoard events of writers made after it; ConfigError where it
    does not start. Its name is the path of `folder` under runs_dir: acdc/crkd/unet2d-3/seed0.
    """
    path = folder / "tracker.json"
    known = {}
    with contextlib.suppress(TableError):  # without it, the service begins another run
        known = read_json(path)
    before = known.get("wandb") if resumed else None
    identifier = before or secrets.token_hex(4)
    try:
        run = importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT") or config["dataset"],
            name=folder.resolve().relative_to(Path(config["runs_dir"]).resolve()).as_posix(),
            id=identifier,
            resume="allow" if before else None,
            dir=str(folder),
            config=dict(config),
            sync_tensorboard=True,
        )
    except Exception as error:  # whatever the service reports: no account, no network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"logger: wandb does not start ({reason}); WANDB_MODE=offline records without network "
            "or account"
        ) from error
    write_text(path, json.dumps(known | {"wandb": identifier}))
    return run


def board_tag(kind: str, name: str) -> str:
    """The TensorBoard tag of a value of the log.

    TensorBoard sorts groups by name and opens the first two. So the loss and the mean Dice are
    alone with what the scripts themselves log, as `train/loss` and `val/dice`, and all other groups
    have names that sort after these two.
    """
    if (kind == "train" and name in OWN) or (kind == "val" and name == "dice"):
        return f"{kind}/{name}"
    return f"{BOARD_GROUPS.get(kind, kind)}/{name}"


class RunLog:
    """Writes `log.jsonl` and TensorBoard events in `folder`; on resume, lines from `start_step` on
    are dropped first.

    service: of `start_wandb`, finished with the log. log.jsonl holds no wall-clock time, so that
    two equal runs write equal logs.
    """

    def __init__(self, folder: Path, start_step: int = 0, service: Any = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of import, for training alone

        self.service = service
        self.path = folder / "log.jsonl"
        kept, damaged = [], 0
        if start_step:
            lines = _lines(self.path)
            entries = _entries(lines)
            damaged = entries[:-1].count(None)  # a crash may cut the last
            for line, entry in zip(lines, entries):
                if entry and entry["step"] < start_step:
                    kept.append(line.decode("utf-8") + "\n")
        if damaged:
            print(
                f"warning: {self.path}: {damaged} line(s) cannot be read and are left out",
                file=sys.stderr,
            )
        write_text(self.path, "".join(kept))
        with writing(self.path):
            # nothing is left in a buffer if a write fails
            self.file = self.path.open("ab", buffering=0)
        with self._board():
            self.board = SummaryWriter(str(folder), purge_step=start_step if start_step else None)

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line {"step", "kind", ...values}; NaN becomes null. TensorBoard tags: `board_tag`."""
        clean = {name: (value if math.isfinite(value) else None) for name, value in values.items()}
        line = memoryview(
            (json.dumps({"step": step, "kind": kind, **clean}) + "\n").encode("utf-8")
        )
        with writing(self.path):
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())  # a checkpoint is never newer than the log on the disk
        with self._board():
            for name, value in values.items():
                self.board.add_scalar(board_tag(kind, name), value, step)

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add an RGB picture (H, W, 3) uint8 to TensorBoard."""
        with self._board():
            self.board.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        with self._board():
            self.board.close()
        if self.service is None:
            return
        try:
            self.service.finish()
        except Exception as error:  # a service may fail in any way, and the training is done
            print(f"warning: wandb did not finish ({error})", file=sys.stderr)

    def _board(self) -> contextlib.AbstractContextManager:
        """Events are written by a thread, whose failure shows at the next event."""
        return writing(self.path.with_name("TensorBoard events"))


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; those that a crash cut off, or that are no lines of a log, are left
    out. No file gives no lines.
    """
    return [entry for entry in _entries(_lines(path)) if entry is not None]


def _lines(path: Path) -> list[bytes]:
    """Of a log, at least one; the last is without its end, so empty in a log that is whole."""
    return path.read_bytes().split(b"\n") if path.is_file() else [b""]


def _entries(lines: Iterable[bytes]) -> list[dict[str, Any] | None]:
    """What the lines of a log say; None in the place of what is no line of a log."""
    plain: set[str] = set()  # lines repeat the same few texts: each is looked at once
    return [_entry(line, plain) for line in lines]


def _entry(line: bytes, plain: set[str]) -> dict[str, Any] | None:
    """What a line of a log says: `step`, `kind`, and names with finite numbers or null. None for
    anything else.

    plain: texts that were found to have no control characters; more are added.
    """
    try:
        entry = json.loads(line)
        if type(entry["step"]) is not int or type(entry["kind"]) is not str:
            return None
        for name, value in entry.items():
            if name not in plain:
                check_plain_texts(name)
                plain.add(name)
            if value is None or name in ("step", "kind"):
                continue
            if isinstance(value, str) or not math.isfinite(value):
                return None
        if entry["kind"] not in plain:
            check_plain_texts(entry["kind"])
            plain.add(entry["kind"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return None
    return entry


def check_terms(
    terms: Mapping[str, Any], monitor: Mapping[str, Any], others: Iterable[str] = ()
) -> None:
    """ConfigError for a term of a method's loss, or a number that it reports, whose name would
    overwrite another. others: names of terms that the script adds itself.
    """
    taken = [*OWN, *others]
    for kind, names in (("term of its loss", terms), ("number of its monitor", monitor)):
        for name in names:
            if not isinstance(name, str) or not name or name in taken:
                raise ConfigError(
                    f"method: a {kind} is called {name!r}; expected text other than "
                    f"{', '.join(taken)}, which the log has for something else; rename it"
                )
        taken += names


class SilentLog:
    """Takes what RunLog takes and writes nothing: the log of all processes but the first."""

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        pass

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


class Averages:
    """Running means of scalar tensors between two lines of the log, each name over the steps that
    had it; NaN is left out. Nothing waits for the device until `take`.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            known = ~value.isnan()
            self.sums[name] = self.sums.get(name, 0.0) + value.where(known, 0.0)
            self.counts[name] = self.counts.get(name, 0) + known.long()

    def take(self) -> dict[str, float]:
        """The means since the last call; NaN for a name without a value."""
        means = {name: (value / self.counts[name]).item() for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
