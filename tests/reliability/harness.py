"""Scripts run in forked children of one warm process, so that killing one does not cost an
interpreter start.

The children are processes of their own, from parsing the arguments to the exit code, and can be
killed at any moment; only the imports are shared. The fork server is the standard library's.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.scripts.conftest import ROOT

FULL = os.environ.get("RELIABILITY") == "full"  # sh scripts/test_reliability.sh
SCRIPTS = ("train_3d_distill.py", "train_3d_crkd.py", "train_2d_crkd.py")


class Ended(NamedTuple):
    code: int  # negative: the signal that ended it
    text: str  # of standard output and error


class Child:
    """A script under way. prepare: called in the child first, to lay traps; a function of a module,
    or a partial.
    """

    def __init__(
        self, script: str, *arguments: str, cwd: Path, prepare: Callable[[], None] | None = None
    ) -> None:
        self.output = cwd / f"output-{time.monotonic_ns()}.txt"
        self.process = _server().Process(
            target=_child, args=(script, arguments, cwd, self.output, prepare)
        )
        self.process.start()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: int, group: bool = False) -> None:
        """To the script alone, or to its loader processes too."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, timeout: float = 120) -> Ended:
        self.process.join(timeout)
        if self.alive:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"no end after {timeout} s; so far: {self.text()[-2000:]}")
        ended = Ended(self.process.exitcode, self.text())
        self.process.close()
        return ended

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60) -> None:
        """Until the condition holds; AssertionError if the script has ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.alive and time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.002)

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def run(script: str, *arguments: str, cwd: Path, prepare=None, timeout: float = 120) -> Ended:
    return Child(script, *arguments, cwd=cwd, prepare=prepare).wait(timeout)


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """The fork server, with all that the scripts import. Children inherit its environment."""
    os.environ["OMP_NUM_THREADS"] = "1"
    # the server's sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    scripts = [script.removesuffix(".py") for script in SCRIPTS]
    # what torch imports when it is first used, in seconds
    late = ("torch._dynamo", "torch.utils.tensorboard")
    context.set_forkserver_preload([*scripts, "test_3d", *late, "tests.reliability.faults"])
    return context


def _child(script: str, arguments: tuple[str, ...], cwd: Path, output: Path, prepare) -> None:
    # how loader processes start, as outside of the harness
    multiprocessing.set_start_method("fork", force=True)
    os.setsid()  # a group of its own, to be signalled as a whole
    os.chdir(cwd)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )
    if prepare is not None:
        prepare()
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
