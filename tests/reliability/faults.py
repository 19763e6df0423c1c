"""Traps that a child of the harness lays for itself before it runs a script."""

import errno
import io
import json
import os
import resource
import signal
from pathlib import Path

import dataloaders.samplers
import utils.checkpoint
import utils.distributed

PHASES = ("before", "half", "written", "synced", "between", "moved", "after")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(phase: str, number: int, name: str = "") -> None:
    """Kill this process in its `number`-th (from 1) write of a checkpoint, counted by files of that
    `name` if given.

    before: nothing written; half: half of the bytes; written: all, not yet flushed to the disk;
    synced: flushed, not yet moved; between: the old last.pt moved away, the new one not yet in its
    place; moved: in place, the folder not yet flushed; after: all done.
    """
    real, seen = utils.checkpoint.write_whole, [0]

    def write_whole(path, write, previous=None):
        counted = path.suffix == ".pt" and path.name == (name or path.name)
        seen[0] += counted
        if not counted or seen[0] != number:
            return real(path, write, previous)
        if phase == "before":
            die()
        if phase == "half":
            whole = io.BytesIO()
            write(whole)

            def write(file):
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                die()

        replace, fsync, moves = os.replace, os.fsync, []

        def replacing(source, target):
            replace(source, target)
            moves.append(target)
            if (Path(target) == path and phase == "moved") or (
                Path(target) == previous and phase == "between"
            ):
                die()

        def syncing(descriptor):
            if phase == "written":
                die()
            fsync(descriptor)
            if phase == "synced":
                die()

        utils.checkpoint.os.replace, utils.checkpoint.os.fsync = replacing, syncing
        real(path, write, previous)
        die()  # 'after', and 'between' where there was no previous file

    utils.checkpoint.write_whole = write_whole


def full_disk(name: str, number: int) -> None:
    """From the `number`-th write of the file of that name on, the disk takes half of what it is
    given and is full.
    """
    real, seen = utils.checkpoint.write_whole, [0]

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

    def write_whole(path, write, previous=None):
        seen[0] += path.name == name
        full = path.name == name and seen[0] >= number
        return real(path, (lambda file: write(Full(file))) if full else write, previous)

    utils.checkpoint.write_whole = write_whole


def full_log(number: int) -> None:
    """The `number`-th line of the log meets a full disk."""
    from utils.runlog import RunLog

    real, seen = RunLog.scalars, [0]

    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self):
            pass

    def scalars(self, *arguments):
        seen[0] += 1
        if seen[0] == number:
            self.file.write(b'{"step": ')
            self.file.close()
            self.file = Full()
        real(self, *arguments)

    RunLog.scalars = scalars


def limit_file_size(size: int) -> None:
    """The system itself refuses files of more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_in_loader(draw: int, how: str) -> None:
    """The loader process that makes the sample of this draw ends: 'exit', or by the signal of that
    name.
    """
    real = dataloaders.samplers.PatchDataset.__getitem__

    def getitem(self, item):
        if item[0] == draw:
            if how == "exit":
                os._exit(1)
            os.kill(os.getpid(), getattr(signal, how))
        return real(self, item)

    dataloaders.samplers.PatchDataset.__getitem__ = getitem


def resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch_memory(module: str, name: str, out: Path) -> None:
    """Append the resident memory to `out` (JSON lines) at each call of that function, or method of
    a class.
    """
    import importlib

    owner = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def noted(*arguments, **named):
        with out.open("a") as file:
            file.write(json.dumps(resident()) + "\n")
        return real(*arguments, **named)

    setattr(owner, last, noted)


def poison_batch(*draws: int) -> None:
    """The first image of these draws of labelled data has a NaN in it."""
    real = dataloaders.samplers.PatchDataset.__getitem__

    def getitem(self, item):
        sample = real(self, item)
        if item[0] in draws and self.stream == 0:
            sample["image"][0].view(-1)[0] = float("nan")
        return sample

    dataloaders.samplers.PatchDataset.__getitem__ = getitem


def poison_gradient(*updates: int) -> None:
    """One number of one gradient is infinite in these updates, while the loss is finite."""
    real, seen = utils.distributed.World.average_gradients, [-1]

    def average_gradients(self, parameters):
        real(self, parameters)
        seen[0] += 1
        if seen[0] in updates:
            next(p.grad for p in parameters if p.grad is not None).view(-1)[0] = float("inf")

    utils.distributed.World.average_gradients = average_gradients
