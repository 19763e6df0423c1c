"""Ends of scripts: readers that go away, and errors of one line."""

import errno
import io
import subprocess
import sys
import textwrap

import pytest

from tests.scripts.conftest import ROOT
from utils.checkpoint import CheckpointError, DiskError, write_text
from utils.config import escaped
from utils.scripts import LastingStream, lasting_streams, run_tool


def program(body, command, tmp_path):
    """What a shell command makes of a script whose main is `body`; PROGRAM stands for its call."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom utils.scripts import run_tool\n"
        f"def main():\n{textwrap.indent(textwrap.dedent(body), '    ')}\nsys.exit(run_tool(main))\n"
    )
    call = f"PYTHONPATH={ROOT} {sys.executable} {script}"
    command = command.replace("PROGRAM", call)
    return subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )


LONG = """
for k in range(20000):
    print("line", k)
    print("error", k, file=sys.stderr)
Path("done").write_text("whole")
return 3
"""


@pytest.mark.parametrize(
    "command",
    [
        "PROGRAM 2>&1 | head -n 1 > seen; exit ${PIPESTATUS[0]}",
        "PROGRAM > /dev/full 2> /dev/full; exit $?",
        "PROGRAM >&- 2>&-; exit $?",
    ],
    ids=["head", "full disk", "closed"],
)
def test_a_script_outlives_the_readers_of_its_output(command, tmp_path):
    done = program(LONG, command, tmp_path)
    assert (tmp_path / "done").read_text() == "whole"
    assert done.returncode == 3 and not done.stdout and not done.stderr


def test_streams_are_as_before_afterwards():
    before = sys.stdout, sys.stderr
    with lasting_streams():
        assert isinstance(sys.stdout, LastingStream) and isinstance(sys.stderr, LastingStream)
    assert (sys.stdout, sys.stderr) == before


class Gone(io.StringIO):
    def write(self, text):
        raise OSError(errno.EIO, "the terminal is closed")


def test_a_stream_without_a_descriptor_is_dropped_too():
    stream = LastingStream(Gone())
    assert stream.write("text") == 4
    stream.flush()


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (CheckpointError("best.pt: \x1b]0;x\x07 damaged"), r"error: best.pt: \x1b]0;x\x07 damaged"),
        (DiskError("a.csv: cannot be written (full)"), "error: a.csv: cannot be written (full); m"),
        (PermissionError(errno.EACCES, "Permission denied", "/ro/x"), "error: /ro/x: Permission d"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: a file cannot be written: the"),
    ],
)
def test_an_error_of_the_surroundings_is_one_line(error, line):
    assert run_tool(raising(error)).startswith(line)


def test_an_error_of_the_code_keeps_its_traceback():
    for error in (KeyError("x"), ConnectionResetError("peer")):
        with pytest.raises(type(error)):
            run_tool(raising(error))


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "folder").write_text("a file")
    message = run_tool(lambda: write_text(tmp_path / "folder" / "x.csv", "a"))
    assert message.startswith(f"error: {tmp_path}/folder/x.csv: cannot be written (")


def test_what_a_terminal_would_obey_is_spelt_out():
    assert escaped("a\x1b[31mb\x9bc\u202ed\ud800") == r"a\x1b[31mb\x9bc\u202ed\ud800"
    assert escaped("Überlänge 肝脏\n\tnext") == "Überlänge 肝脏\n\tnext"


def test_output_that_a_full_disk_cut_is_an_error(tmp_path):
    done = program("print('one line of a table')", "PROGRAM > /dev/full; exit $?", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output is cut: the disk is full")
    done = program("print('one line of a table')", "PROGRAM > table; exit $?", tmp_path)
    assert done.returncode == 0 and not done.stderr
