"""Checkpoints that survive a crash and hold tensors and plain Python values only.

A checkpoint is written to a temporary file, flushed to disk and moved into place, so a reader sees the old one or the
new one, never half of one. `save_last` also keeps the one before.
"""

import hashlib
import os
import pickle
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

PREVIOUS = "last.previous.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or does not fit; the message names the file and the fix."""


def atomic_save(content: dict[str, Any], path: Path) -> None:
    """Write `content` to `path` by way of a temporary file in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_last(content: dict[str, Any], folder: Path) -> None:
    """Write `last.pt` in `folder`; the one that was there becomes `last.previous.pt`."""
    last = folder / "last.pt"
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    atomic_save(content, last)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it might carry; CheckpointError if that is impossible."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values ({str(error).splitlines()[0]}); "
            f"checkpoints of other programs are converted by tools/import_checkpoint.py"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({str(error).splitlines()[0]}); "
            f"restore it, or resume from the previous one"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def load_last(folder: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Any], str | None]:
    """The newest readable checkpoint of a run, and a warning if that was not `last.pt`."""
    problems = []
    for name in ("last.pt", PREVIOUS):
        try:
            content = load_checkpoint(folder / name, device)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return content, f"{problems[0]}; going on from {folder / name}" if problems else None
    raise CheckpointError(f"cannot resume: {'; '.join(problems)}; start without --resume")


def load_network_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load `state` strictly; CheckpointError that lists what does not fit."""
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape
    ]  # fmt: skip
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{source}: the weights do not fit the network ({len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of other shape {shapes[:3]})"
        )
    network.load_state_dict(state)


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict's names and bytes: equal digests mean bit-identical weights."""
    result = hashlib.sha256()
    for key in sorted(state):
        result.update(key.encode())
        result.update(state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def code_version() -> str:
    """The commit this code stands at, with '+' if files differ from it; 'unknown' outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"
