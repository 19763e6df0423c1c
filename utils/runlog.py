"""The log of a run: one JSON object per line in log.jsonl, the same scalars in TensorBoard and
other places.

Kinds of lines: `train`, means since the line before; `val`; `teacher`, the teacher's scores on the
validation cases; `diagnosis`, see utils/diagnosis.py.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint import write_text, writing
from utils.trackers import Tracker


class RunLog:
    """Writes `log.jsonl` and TensorBoard events in `folder`; on resume, lines from `start_step` on
    are dropped first.

    tracker: takes the same scalars to a service (utils/trackers.py). log.jsonl holds no wall-clock
    time, so that two equal runs write equal logs.
    """

    def __init__(self, folder: Path, start_step: int = 0, tracker: Tracker | None = None) -> None:
        self.tracker = tracker
        self.path = folder / "log.jsonl"
        kept = []
        if start_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # a line cut off by a crash
                    break
                if entry["step"] < start_step:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))
        with writing(self.path):
            # nothing is left in a buffer if a write fails
            self.file = self.path.open("ab", buffering=0)
        with self._board():
            self.board = SummaryWriter(str(folder), purge_step=start_step if start_step else None)

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line {"step", "kind", ...values}; NaN becomes null. TensorBoard tags are
        kind/name.
        """
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
                self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.tracker is not None:
            self.tracker.scalars(step, {f"{kind}/{name}": value for name, value in values.items()})

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Add an RGB picture (H, W, 3) uint8 to TensorBoard."""
        with self._board():
            self.board.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        with self._board():
            self.board.close()
        if self.tracker is not None:
            self.tracker.close()

    def _board(self) -> contextlib.AbstractContextManager:
        """Events are written by a thread, whose failure shows at the next event."""
        return writing(self.path.with_name("TensorBoard events"))


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; one that a crash cut off, and what follows it, is left out. No file
    gives no lines.
    """
    entries: list[dict] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


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
