"""Files that are written whole or not at all, locks, and checkpoints, which hold tensors and plain
Python values only.

A checkpoint is written to a temporary file, flushed to disk and moved into place, so a reader sees
the old one or the new one, never half of one. `save_last` also keeps the one before. A checkpoint
is a zip file, whose CRC-32 of every record is checked on loading (torch.load itself does not look
at them).
"""

import contextlib
import errno
import hashlib
import os
import pickle
import secrets
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}
PREVIOUS = "last.previous.pt"
DAMAGED = "last.damaged.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or does not fit; the message names the file and
    the fix.
    """


class DiskError(OSError):
    """A file that could not be written; the message names the file, the reason and what is still
    intact.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around all that writes to `path`: what the system refuses becomes a DiskError."""
    try:
        yield
    except DiskError:
        raise
    except (OSError, RuntimeError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        reason = FULL.get(cause.errno, cause.strerror or str(cause))
        with contextlib.suppress(OSError):
            reason += (
                f", {shutil.disk_usage(path.parent).free / 2**20:.1f} MB are free"
                if cause.errno in FULL
                else ""
            )
        raise DiskError(
            f"{path}: cannot be written ({reason}); checkpoints written before are intact: make "
            "room or mend the "
            f"folder, then go on with --resume"
        ) from error


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError that an error is or came from; torch.save hides one behind a RuntimeError of its
    own.
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_whole(
    path: Path, write: Callable[[IO[bytes]], object], previous: Path | None = None
) -> None:
    """Call `write` with a temporary file beside `path`, flush that to the disk, and move it into
    place.

    A reader sees the old file or the new one, never half of one. previous: where the file that
    stood at `path` goes once the new one is safe on disk; a process that is killed between the two
    moves leaves `previous` alone.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = unused_name(path.parent, f"{path.name}.", ".tmp")
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def unused_name(folder: Path, before: str = "", after: str = "") -> Path:
    """A name in `folder` that no other process takes. Two containers can share a process number."""
    return folder / f"{before}{secrets.token_hex(4)}{after}"


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8 text."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def remove_temporary(folder: Path) -> None:
    """Delete what `write_whole` left in `folder` when its process was killed. A folder has one
    writer at a time.
    """
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


class Lock:
    """A lock on a file, which the system drops when its process ends, in whatever way.

    Others read in the file which process holds it, on which host and since when. Forked processes
    do not inherit it. It holds between machines and containers as far as their shared file system
    has locks. Where there are none, a warning says so, it counts as taken, and `works` is False.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.works = path, True
        self._descriptor: int | None = None
        self._shared = False

    def take(self, shared: bool = False, wait: bool = False) -> str | None:
        """Take it -> None or, where another process holds it, that process in words. OSError if its
        file cannot be made.

        shared: with others that share it. wait: until it is free.
        """
        self._shared = shared
        while True:
            self._descriptor = self._opened()
            try:
                self._lock(wait)
            except (BlockingIOError, PermissionError):
                time.sleep(0.1)  # who has just taken it may not have written its name yet
                owner = os.pread(self._descriptor, 500, 0).decode("utf-8", "replace").strip()
                self._close()
                return owner or "another process"
            except OSError as error:
                self.works = False
                print(
                    f"warning: {self.path}: cannot be locked ({error.strerror}), so nothing keeps "
                    "another process from writing here at the same time",
                    file=sys.stderr,
                )
            if self.holds():
                break
            self._close()  # its last owner removed it meanwhile
        if not shared:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            text = f"process {os.getpid()} on host {socket.gethostname()} since {since}\n"
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, text.encode())
        return None

    def _opened(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except PermissionError:
            if not self._shared:
                raise
            return os.open(self.path, os.O_RDONLY)  # of another user, which is enough to share it

    def _lock(self, wait: bool) -> None:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no such locks")
        how = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
        fcntl.lockf(self._descriptor, how if wait else how | fcntl.LOCK_NB)

    def holds(self) -> bool:
        """Whether it is taken, and its file still stands where others look for it."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Drop it and remove its file, which stays where others may share it; nothing to do where
        it is not taken.
        """
        if self._descriptor is None:
            return
        if self.holds() and not self._shared:
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = _close


def _sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut; where folders cannot be opened (Windows),
    nothing to do.
    """
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_save(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write `content` to `path`, whole or not at all; DiskError if the disk does not take it.

    previous: where the file that stood at `path` goes once the new one is safe on disk.
    """
    _check_plain(content, path.name)
    write_whole(path, lambda file: torch.save(content, file), previous)


def _check_plain(value: Any, where: str) -> None:
    """TypeError for anything that safe loading would refuse later, such as a NumPy scalar."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not (
        isinstance(value, torch.Tensor) or type(value) in (int, float, str, bool, bytes, type(None))
    ):
        raise TypeError(
            f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only"
        )


def save_last(content: dict[str, Any], folder: Path) -> None:
    """Write `last.pt` in `folder`; the one that was there becomes `last.previous.pt`."""
    atomic_save(content, folder / "last.pt", previous=folder / PREVIOUS)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it might carry; CheckpointError if that is
    impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    damaged = (
        f"{path}: damaged or not a checkpoint (%s); restore it, or resume from the previous one"
    )
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("not in torch.save's format")
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {wrong} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values, so loading it could "
            "run code; "
            f"checkpoints of other programs are converted by tools/import_checkpoint.py"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        TypeError,
    ) as error:
        raise CheckpointError(
            damaged % (" ".join(str(error).split())[:200] or type(error).__name__)
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    if isinstance(content.get("dataset"), dict):
        content["dataset"].pop("allow_outside", None)  # the user's to say, never a file's
    return content


def dataset_arguments(
    checkpoint: dict[str, Any],
    source: str | Path,
    root: str | None = None,
    cache_dir: str | None = None,
    allow_outside: bool = False,
) -> dict[str, Any]:
    """How the data set of a run is built again: what the checkpoint holds, with `root` and
    `cache_dir` where given.

    The checkpoint may come from others. Its data root is read, nothing outside of it, and nothing
    is written to an absolute folder or above the working directory, unless the user says so:
    CheckpointError. A folder of lists that lies there is left out; the checkpoint names its cases
    itself.
    """
    given = {"root": root, "cache_dir": cache_dir}
    arguments = checkpoint["dataset"] | {key: value for key, value in given.items() if value}
    arguments["allow_outside"] = allow_outside
    if allow_outside:
        return arguments
    if not cache_dir and not _below(arguments.get("cache_dir", "")):
        raise CheckpointError(
            f"{source}: would have preprocessed cases written to {arguments['cache_dir']}; name a "
            "folder with "
            f"--cache-dir, or allow this one with --allow-outside"
        )
    lists = arguments.get("split_dir", "")
    inner = os.path.relpath(lists, arguments["root"]) if lists else ""
    if not _below(lists) and not _below(inner):
        arguments["split_dir"] = ""
    return arguments


def _below(path: str) -> bool:
    """Whether a path, as it is written, stays in the folder that it is relative to."""
    return not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] != os.pardir


def load_last(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], str | None]:
    """The newest readable checkpoint of a run, and a warning if that was not `last.pt`.

    An unreadable `last.pt` is set aside as `last.damaged.pt`: the next save would otherwise make it
    the previous one, in place of the readable one.
    """
    problems = []
    for name in ("last.pt", PREVIOUS):
        try:
            content = load_checkpoint(folder / name, device)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if not problems:
            return content, None
        # it is missing if there was none, or another process of the run was faster
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / "last.pt", folder / DAMAGED)
        kept = f", the damaged one is now {DAMAGED}" if (folder / DAMAGED).exists() else ""
        return (
            content,
            f"{problems[0]}; going on from {folder / name}, step {content.get('step')}{kept}",
        )
    raise CheckpointError(f"cannot resume: {'; '.join(problems)}; start without --resume")


def load_network_weights(
    network: torch.nn.Module, state: dict[str, torch.Tensor], source: str
) -> None:
    """Load `state` strictly; CheckpointError that lists what does not fit."""
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{source}: the weights do not fit the network ({len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(shapes)} of other shape "
            f"{shapes[:3]})"
        )
    network.load_state_dict(state)


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a state dict's names and bytes: equal digests mean bit-identical weights."""
    result = hashlib.sha256()
    for key in sorted(state):
        result.update(key.encode())
        result.update(
            state[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()


def code_version() -> str:
    """The commit this code stands at, with '+' if files differ from it; 'unknown' outside a git
    checkout.
    """
    root = Path(__file__).resolve().parent.parent
    try:
        run = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"
