"""Checkpoints that survive a crash and hold tensors and plain Python values only.

A checkpoint is written to a temporary file, flushed to disk and moved into place, so a reader sees the old one or the
new one, never half of one. `save_last` also keeps the one before.
"""

import hashlib
import os
import pickle
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch

PREVIOUS = "last.previous.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or does not fit; the message names the file and the fix."""


def atomic_save(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write `content` to `path` by way of a temporary file in the same folder.

    previous: where the file that stood at `path` goes once the new one is safe on disk.
    """
    _check_plain(content, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut; where folders cannot be opened (Windows), nothing to do."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_plain(value: Any, where: str) -> None:
    """TypeError for anything that safe loading would refuse later, such as a NumPy scalar."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not (isinstance(value, torch.Tensor) or type(value) in (int, float, str, bool, bytes, type(None))):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def save_last(content: dict[str, Any], folder: Path) -> None:
    """Write `last.pt` in `folder`; the one that was there becomes `last.previous.pt`."""
    atomic_save(content, folder / "last.pt", previous=folder / PREVIOUS)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it might carry; CheckpointError if that is impossible."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    damaged = f"{path}: damaged or not a checkpoint (%s); restore it, or resume from the previous one"
    if not zipfile.is_zipfile(path):
        raise CheckpointError(damaged % "not in torch.save's format")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values, so loading it could run code; "
            f"checkpoints of other programs are converted by tools/import_checkpoint.py"
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(damaged % (" ".join(str(error).split())[:200] or type(error).__name__)) from error
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
