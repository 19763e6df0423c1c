"""Files that are written whole or not at all, locks, and checkpoints, which hold tensors and plain
Python values only.

Checkpoints, tables and JSON files may come from others: what they say is judged before it is used,
and nothing of them is run.

A checkpoint is written to a temporary file, flushed to disk and moved into place, so a reader sees
the old one or the new one, never half of one. `save_last` also keeps the one before. A checkpoint
is a zip file, whose CRC-32 of every record is checked on loading (torch.load itself does not look
at them).
"""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from utils.config import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}
LARGEST_COUNT = 10_000_000  # plain values of a checkpoint
DEEPEST = 40
ATTEMPTS = 20  # of taking a lock whose file others keep removing
PREVIOUS = "last.previous.pt"
DAMAGED = "last.damaged.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or does not fit; the message names the file and
    the fix.
    """


class TableError(ValueError):
    """A table or JSON file that cannot be read; the message names the file."""


class DiskError(OSError):
    """A file that could not be written; the message names the file and the reason."""


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
        number = cause.errno
        if number is None and re.fullmatch(r"\d+ requested and \d+ written", str(cause)):
            number = errno.ENOSPC  # as NumPy says it
        reason = FULL.get(number, cause.strerror or str(cause))
        with contextlib.suppress(OSError):
            reason += (
                f", {shutil.disk_usage(path.parent).free / 2**20:.1f} MB are free"
                if number in FULL
                else ""
            )
        raise DiskError(f"{path}: cannot be written ({reason})") from error


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
        if path.exists() and not path.is_file():  # a pipe or device, such as /dev/stdout
            path.write_bytes(_bytes_of(write))
            return
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


def _bytes_of(write: Callable[[IO[bytes]], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def write_text(path: Path, text: str) -> None:
    """`write_whole` of UTF-8 text."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """`write_whole` of CSV. A text that a spreadsheet would take for a formula (=, +, - or @ in
    front, and no number) gets an apostrophe in front, which `read_table` takes away.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows([_disarmed(value) for value in row] for row in rows)
    write_text(path, text.getvalue())


def read_table(path: Path, whole: bool = True) -> list[list[str]]:
    """The rows of a CSV file, as they were given to `write_table`; an empty list for an empty file.
    TableError if it cannot be read.

    whole: a last line without an end is an error, since a number may have lost digits; else that
    line is left out.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        kept = text[: text.rfind("\n") + 1]
        if whole and kept != text:
            raise ValueError("it ends within a line")
        check_plain_texts(text.replace("\r", "").replace("\n", ""))
        rows = list(csv.reader(io.StringIO(kept, newline="")))
    except (OSError, ValueError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise TableError(f"{path}: damaged or not a table of this project ({reason})") from error
    return [[re.sub(r"^'(?='*[=+\-@\t\r])", "", cell) for cell in row] for row in rows]


def _disarmed(value: Any) -> Any:
    if not isinstance(value, str) or not re.match(r"'*[=+\-@\t\r]", value) or value == "-":
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, whose texts can be shown on a terminal; TableError if there is no
    such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        check_plain_texts(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TableError(f"{path}: damaged or not a file of this project ({reason})") from error
    return content


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
    has locks. Where there are none, a warning says so, once for each file, it counts as taken, and
    `works` is False.
    """

    _warned: ClassVar[set[Path]] = set()  # files of which this process has said so

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
        for _ in range(ATTEMPTS):
            self._close()  # nothing is open, or what is gone: its last owner removed it meanwhile
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
                self._warn(error)
            # some network file systems give a file another number each time it is looked up
            if not self.works or self.holds():
                break
        if not shared:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            text = f"process {os.getpid()} on host {socket.gethostname()} since {since}\n"
            os.truncate(self._descriptor, 0)
            os.write(self._descriptor, text.encode())
        return None

    def _warn(self, error: OSError) -> None:
        if self.path not in self._warned:
            self._warned.add(self.path)
            print(
                f"warning: {self.path}: cannot be locked ({error.strerror}), so nothing keeps "
                "another process from writing here at the same time",
                file=sys.stderr,
            )

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
        """Drop it and remove its file, which stays where others may share it, or where it cannot be
        removed (Windows keeps files that are open): it does no harm. Nothing to do where it is not
        taken.
        """
        if self._descriptor is None:
            return
        if self.holds() and not self._shared:
            with contextlib.suppress(OSError):
                self.path.unlink()
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
    """Read a checkpoint without running any code that it might carry, and without taking more
    memory than it has bytes; CheckpointError if that is impossible.
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
        size = check_archive(path)
        content = torch.load(path, map_location=device, weights_only=True)
        _check_content(content, size)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain values, so loading it could "
            "run code; "
            f"checkpoints of other programs are converted by tools/import_checkpoint.py"
        ) from error
    # a file that was made to do harm can make the reader raise anything
    except Exception as error:
        raise CheckpointError(
            damaged % (" ".join(str(error).split())[:200] or type(error).__name__)
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got {type(content).__name__}")
    if isinstance(content.get("dataset"), dict):
        content["dataset"].pop("allow_outside", None)  # the user's to say, never a file's
    return content


def check_archive(path: Path) -> int:
    """Bytes of the parts of a zip file of torch.save, whose checksums are right; BadZipFile for
    others.

    Nothing is unpacked: a part that is smaller in the file than it says it is (a few kB can stand
    for terabytes), or that shares its bytes with another, is refused by the table of contents.
    """
    with zipfile.ZipFile(path) as archive:
        total = 0
        for part in archive.infolist():
            total += part.file_size
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise zipfile.BadZipFile(
                    f"its part {part.filename} is compressed, {part.compress_size} bytes that "
                    f"unpack to {part.file_size}, which torch.save never does"
                )
        if total > path.stat().st_size:
            raise zipfile.BadZipFile(f"its parts have {total} bytes, more than the file itself")
        wrong = archive.testzip()
    if wrong is not None:
        raise zipfile.BadZipFile(f"the checksum of its part {wrong} is wrong")
    return total


def _check_content(content: Any, size: int) -> None:
    """ValueError for values that are more than `size` bytes can hold: tensors larger than their
    data, lists that hold themselves or each other a thousand times; and for texts that no script of
    ours writes and that a terminal would obey.
    """
    stored: dict[int, int] = {}  # address -> bytes of what tensors share
    counted: dict[int, int] = {}  # id -> values in it, those that it holds twice counted twice

    def count(value: Any, inside: tuple[int, ...]) -> int:
        if isinstance(value, str):
            check_plain_texts(value)
        if isinstance(value, torch.Tensor):
            if value.is_meta or value.numel() * value.element_size() > size:
                raise ValueError(f"a tensor {tuple(value.shape)} is larger than the file")
            storage = value.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
        if not isinstance(value, (dict, list, tuple, set)):
            return 1
        if id(value) in inside or len(inside) > DEEPEST:
            raise ValueError("a value that contains itself, or is nested too deeply")
        if id(value) not in counted:
            items = [*value, *value.values()] if isinstance(value, dict) else value
            counted[id(value)] = 1 + sum(count(item, (*inside, id(value))) for item in items)
        if counted[id(value)] > LARGEST_COUNT:
            raise ValueError(f"more than {LARGEST_COUNT} values")
        return counted[id(value)]

    count(content, ())
    if sum(stored.values()) > size:
        raise ValueError(f"its tensors have {sum(stored.values())} bytes, the file {size}")


def check_plain_texts(value: Any) -> None:
    """ValueError for a text, also of a key, that is not `printable`."""
    if isinstance(value, str) and not printable(value):
        raise ValueError(f"a text with control characters: {value[:80]!r}")
    items = [*value, *value.values()] if isinstance(value, dict) else value
    if isinstance(value, (dict, list)):
        for item in items:
            check_plain_texts(item)


@contextlib.contextmanager
def describing(source: str | Path) -> Iterator[None]:
    """Around the use of what a checkpoint or a description says of itself: a value that is missing,
    or of another kind, becomes a CheckpointError.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        if isinstance(error, ValueError) and type(error) is not ValueError:
            raise  # it says itself what is wrong
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source}: does not describe a network and its data as the training scripts do "
            f"({type(error).__name__}: {reason})"
        ) from error


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


def tool_arguments(
    checkpoint: dict[str, Any],
    source: str | Path,
    root: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """`dataset_arguments` for tools that read a case or two: where the checkpoint names a cache
    elsewhere, preprocessed cases go to the folder `cache` of the working directory.
    """
    if not cache_dir and not _below(checkpoint["dataset"].get("cache_dir", "")):
        cache_dir = "cache"
    return dataset_arguments(checkpoint, source, root, cache_dir)


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


class Placeholder:
    """Stands for any object of a foreign checkpoint that is not wanted."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What released checkpoints name beside tensors; `getattr` is how their log buffers store references
# to methods.
_IGNORED = (
    "builtins.getattr",
    "__builtin__.getattr",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        f"numpy.dtypes.{kind}DType"
        for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "Bool")
    ),
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
)


def load_foreign(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of another program; CheckpointError if it is damaged or asks for
    code to be run. What such files hold beside tensors and plain values becomes a `Placeholder`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with torch.serialization.safe_globals([(Placeholder, name) for name in _IGNORED]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: refused, reading it would run or build "
            f"{found[1] if found else 'an unknown object'}, which a "
            f"checkpoint does not need; nothing was executed. Get the file from its authors again"
        ) from error
    except Exception as error:  # a file that was made to do harm can make the reader raise anything
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint "
            f"({str(error).splitlines()[0] if str(error) else error!r}); "
            f"download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary with 'state_dict', got {type(content).__name__}"
        )
    return content


def load_network_weights(
    network: torch.nn.Module, state: dict[str, torch.Tensor], source: str
) -> None:
    """Load `state` strictly; CheckpointError that lists what does not fit."""
    check_network_weights(network, state, source)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{source}: the weights do not fit the network ({reason})") from error


def check_network_weights(
    network: torch.nn.Module, state: dict[str, torch.Tensor], source: str
) -> None:
    """CheckpointError unless `state` has the names and shapes of the network, which may be on the
    meta device.
    """
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{source}: expected weights, a dictionary of tensors")
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
