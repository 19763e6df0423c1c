"""How scripts begin and end: output that nobody reads any more stops nothing, and an error whose
cause lies outside of the code is one line.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from utils.checkpoint import FULL, CheckpointError, DiskError, TableError
from utils.config import ConfigError, escaped


class LastingStream:
    """A stream whose reader may go away: a closed terminal, `| head`, a full disk. What cannot be
    written from then on goes nowhere, since no text is worth a training. `full`: why, if its disk
    took no more; else "".
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.full = stream, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Let the file descriptor lead nowhere: what is still in the buffer leaves it with the next
        flush, that of the interpreter's end at the latest.
        """
        self.full = FULL.get(error.errno, self.full)
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Standard output, which is given, and error as `LastingStream`; one that is closed from the
    start is the system's null device.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        streams = []
        for stream in before:
            if stream is None:
                stream = opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            streams.append(LastingStream(stream))
        sys.stdout, sys.stderr = streams
        try:
            yield streams[0]
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before


def system_message(error: OSError) -> str | None:
    """What the file system refused, in one line with the file's name; None for other errors."""
    if error.filename is not None and error.strerror:
        names = [name for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(map(os.fsdecode, names))}: {error.strerror}"
    if error.errno in FULL:
        return f"a file cannot be written: {FULL[error.errno]}"
    return None


def run_tool(main: Callable[[], int | None], *expected: type[Exception]) -> int | str | None:
    """What scripts other than trainings hand to sys.exit: main's exit code or, for errors whose
    cause lies outside of the code, one line that says what to do. Other errors keep their
    traceback.

    expected: further errors whose message is such a line.
    """
    with lasting_streams() as output:
        code = _code_of(main, expected)
    if not code and output.full:  # of a table, say, that was to be kept
        return f"error: standard output is cut: {output.full}; files that were written are whole"
    return code


def _code_of(
    main: Callable[[], int | None], expected: tuple[type[Exception], ...]
) -> int | str | None:
    """What `run_tool` gives for all but lost output."""
    try:
        return main()
    except (ConfigError, CheckpointError, TableError, *expected) as problem:
        return escaped(f"error: {problem}")
    except DiskError as problem:
        return escaped(f"error: {problem}; make room or mend the folder, then run it again")
    except OSError as error:
        message = system_message(error)
        if message is None:
            raise
        return escaped(f"error: {message}")
    except KeyboardInterrupt:
        print("\ninterrupted; files that were written are whole", file=sys.stderr)
        return 128 + signal.SIGINT
