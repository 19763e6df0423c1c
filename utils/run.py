"""Run folders, devices, and stopping on a signal."""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from utils.checkpoint import (
    FULL,
    PREVIOUS,
    CheckpointError,
    DiskError,
    remove_temporary,
    write_text,
)
from utils.config import ConfigError

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")  # Slurm sends SIGUSR1 before a time limit, if asked to

# Keys that may differ when a run is resumed: they change neither the data nor the arithmetic of a
# step already taken. max_steps is among them: from the resumed step on, schedules follow the new
# length.
RESUMABLE = frozenset(
    {
        "data_root",
        "cache_dir",
        "runs_dir",
        "device",
        "workers",
        "log_interval",
        "save_interval",
        "val_interval",
        "val_start",
        "max_steps",
        "teacher_checkpoint",
        "memory_gb",
        "eval_batch",
        "window_batch",
        "diagnose_interval",
        "logger",
        "skip_nonfinite",
        "patient_pattern",
        "absent_classes",
    }
)


SELECTIONS = ("val", "test")  # lists that may choose the best checkpoint


def no_selection(select_on: str, source: str) -> str:
    """What to do where the list that should choose the best checkpoint has no case."""
    if select_on == "test":
        return (
            f"select_on: test, but {source} has no test list; choose on validation with "
            "--select-on val"
        )
    return (
        f"select_on: val, but {source} has no validation list, and there is nothing to validate "
        "on; make one of "
        "training cases, or choose the best checkpoint on the cases that are reported with "
        "--select-on test, which "
        f"the checkpoint records and every table shows"
    )


def run_folder(
    runs_dir: str, dataset: str, method: str, networks: str, seed: int, preset: str, tag: str
) -> Path:
    """runs/<dataset>/<method>/<teacher>-<student>/seed<k>; another preset than 'clean' and a tag
    show in the names.

    ConfigError for a name that is no plain folder name: a run writes nowhere but in its own folder.
    """
    for key, name in {
        "dataset": dataset,
        "method": method,
        "networks": networks,
        "tag": tag or "-",
    }.items():
        if name in ("", ".", "..") or any(c in "/\\" or ord(c) < 32 or ord(c) == 127 for c in name):
            raise ConfigError(
                f"{key}: {name!r} names a folder of the run; expected a plain name, without slashes"
            )
    method = method if preset == "clean" or method == "supervised" else f"{method}-{preset}"
    return (
        Path(runs_dir)
        / dataset
        / method
        / networks
        / (f"seed{seed}-{tag}" if tag else f"seed{seed}")
    )


def parse_labelled(text: str) -> int | float:
    """'3' -> 3 units; '0.05' and '5%' -> 0.05, a share; 'all' -> 1.0. ValueError for anything
    else.
    """
    if text == "all":
        return 1.0
    value = float(text.removesuffix("%"))
    if text.endswith("%"):
        if not 0 < value <= 100:
            raise ValueError(f"a share of labels lies above 0 % and at most at 100 %, got {text}")
        return value / 100
    if not 0 < value < math.inf or (value > 1 and not value.is_integer()):
        raise ValueError(f"labels are a number of units or a share above 0 and up to 1, got {text}")
    return int(value) if value > 1 or text.isdecimal() else value


def labelled_name(labelled: int | float | None) -> str:
    """How a number or share of labelled units shows in the name of a run folder: '3', '5%',
    'all'.
    """
    if labelled is None or (isinstance(labelled, float) and labelled == 1):
        return "all"
    return f"{labelled:g}" if labelled >= 1 else f"{100 * labelled:g}%"


def open_run(folder: Path, config: Any, resume: bool) -> None:
    """Make the folder and write config.yaml; ConfigError if a run is there already and `resume`
    does not fit it.
    """
    values = {key: plain(value) for key, value in dataclasses.asdict(config).items()}
    path = folder / "config.yaml"
    if not resume and any((folder / name).exists() for name in ("last.pt", PREVIOUS)):
        raise ConfigError(
            f"{folder}: holds a run already; go on with --resume, remove the folder, or name "
            "another with "
            f"--opts tag=NAME"
        )
    if resume and not path.exists():
        raise ConfigError(
            f"{folder}: has a checkpoint but no config.yaml, so it cannot be told whether this is "
            "its configuration; "
            f"restore config.yaml, or remove the folder and start again"
        )
    if resume:
        # Keys that did not exist when the run began had what is their default now.
        fields = dataclasses.fields(config)
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        defaults |= {
            f.name: f.default_factory()
            for f in fields
            if f.default_factory is not dataclasses.MISSING
        }
        before = plain(defaults) | yaml.safe_load(path.read_text(encoding="utf-8"))
        differ = sorted(k for k in values.keys() | before.keys() if values.get(k) != before.get(k))
        refused = [key for key in differ if key not in RESUMABLE]
        if refused:
            shown = "; ".join(
                f"{key}: {before.get(key)!r} then, {values.get(key)!r} now" for key in refused
            )
            raise ConfigError(
                f"{folder}: cannot resume with another configuration ({shown}); only these may "
                "differ: "
                f"{', '.join(sorted(RESUMABLE))}"
            )
    remove_temporary(folder)
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what YAML gives back."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def resolve_device(name: str) -> torch.device:
    """'auto' takes a GPU if there is one; ConfigError for a device that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"--device {name}: not usable here ({reason}); use --device cpu"
        ) from error
    return device


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that the training loop looks at after each
    step.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        for name in STOPPING:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __bool__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + (self.received or 0)


def leave_signals_to_parent(worker: int) -> None:
    """Of a loader process (worker_init_fn): a signal to stop is the training process's to act on.

    Schedulers signal all processes of a job, and a terminal all of its foreground. A loader that
    died of it would take the training down before it has saved. SIGTERM from the training process
    itself still ends the loader.
    """
    for name in STOPPING:
        if hasattr(signal, name) and not (name == "SIGTERM" and hasattr(signal, "sigwaitinfo")):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def run_script(main: Callable[[], int], *expected: type[Exception]) -> int | str:
    """What a training script hands to sys.exit: main's exit code or, for errors that have a cause
    outside of the code, one line that says what to do. Other errors keep their traceback.

    expected: further errors whose message is such a line.
    """
    hook = threading.excepthook

    # TensorBoard's thread: RunLog says it in one line
    def quiet(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError) or arguments.exc_value.errno not in FULL:
            hook(arguments)

    threading.excepthook = quiet
    try:
        return main()
    except (ConfigError, CheckpointError, DiskError, FloatingPointError, *expected) as problem:
        return f"error: {problem}"
    except torch.OutOfMemoryError as error:
        return f"error: {_full_gpu(str(error))}"
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        return f"error: {_dead_loader(str(error))}"
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved is intact, go on with --resume", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        threading.excepthook = hook


def _full_gpu(message: str) -> str:
    # how much was asked for, is free and is in use
    said = ". ".join(" ".join(message.split()).split(". ")[:4])
    return (
        f"the GPU has too little memory ({said}). In a training step: fewer patches "
        "(cases_per_batch, crops_per_case; "
        "labelled_batch, unlabelled_batch), smaller ones (patch_size) or --amp bf16. In "
        "validation: a smaller "
        "window_batch or eval_batch, with which --resume goes on, as it does once other programs "
        "have left the GPU"
    )


def _dead_loader(message: str) -> str:
    """Why a loader process most likely died, and what to do; `message` is torch's."""
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm")
        message += f"; /dev/shm has {shared.free / 2**20:.0f} of {shared.total / 2**20:.0f} MB free"
    return (
        f"a loader process died ({' '.join(message.split())}). Most likely the machine ran out of "
        "memory (Killed) or "
        "of shared memory (Bus error; containers: --shm-size=8g). Use fewer with --opts "
        "workers=1, none with "
        "workers=0, or less memory_gb where the configuration has it; what was saved is intact, "
        "go on with --resume"
    )
