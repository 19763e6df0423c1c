"""Files that are written whole or not at all, and what is said when the disk does not take them."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}


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
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
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


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8 text."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def remove_temporary(folder: Path) -> None:
    """Delete what `write_whole` left in `folder` when its process was killed. A folder has one
    writer at a time.
    """
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


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
