"""The surroundings of one training: its settings, processes, device, folder, signals, log,
checkpoints, and what is due at a step.

    run = Run(cfg, args, networks)         # ends the script where nothing is to do
    run.open(report)                       # makes the folder
    run.describe(...)                      # into every checkpoint
    run.keep(method=method, optimizer=optimizer, scaler=scaler)  # back from last.pt on --resume
    for step in run.steps():               # ends on a signal; run.logs, run.validates, run.saves
        ...
    return run.end()

A `Run` never calls the loop of a script: the loop asks it.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from utils import figures, initial, plugins
from utils.checkpoint import (
    FULL,
    PREVIOUS,
    CheckpointError,
    DiskError,
    Lock,
    atomic_save,
    code_version,
    digest,
    load_checkpoint,
    load_last,
    load_network_weights,
    remove_temporary,
    save_last,
    write_text,
    writing,
)
from utils.config import (
    AMP,
    NSD_TOLERANCE,
    OF_FORMAT,
    SELECTIONS,
    ConfigError,
    Count,
    Given,
    Natural,
    NotNegative,
    Positive,
    check_nested,
    check_run_names,
    check_unused,
    check_values,
    class_tolerances,
    escaped,
    from_flag,
    plain_name,
    read_yaml,
    trying,
)
from utils.diagnosis import findings
from utils.distributed import join_world
from utils.header import Pace, header, teacher_words
from utils.modes import keep_freed_memory, rng_state, seed_everything, set_rng_state
from utils.numerics import StepWatch, use_deterministic
from utils.runlog import LOGGERS, Averages, RunLog, SilentLog, read_log, require_logger, start_wandb
from utils.schedules import OPTIMIZERS, SCHEDULES, build_optimizer
from utils.scripts import lasting_streams, system_message

LOCK = "run.lock"  # in the run folder while a process trains there
# Slurm sends SIGUSR1 before a time limit, if asked to; a terminal SIGHUP when it is closed
STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")

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
        "init_checkpoint",
        "memory_gb",
        "eval_batch",
        "window_batch",
        "diagnose_interval",
        "logger",
        "skip_nonfinite",
        "patient_pattern",
        "absent_classes",
        "nsd_tolerance",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of all training scripts, with their ranges and choices (utils/config.py).

    A script's Config adds keys and says in class attributes: `pluggable`, key -> contract of the
    class of the user's own that can stand there (utils/plugins.py); `recipes`, the names that
    `recipe` can have, and `not_in_recipes`, the keys that a recipe cannot set; `method_pairs`, the
    names that can follow a method's in `method_args` (kd@resunet-unet), None for no such entries;
    `set_aside`, keys of other scripts, and `other_names`, methods and networks of theirs in
    `recipe` and `method_args`.
    """

    method_pairs = None  # of the class, not a key

    # Data
    dataset: str  # name of the data set: names the run folder
    data_root: str
    max_steps: Count  # optimiser updates
    split_dir: str = ""  # folder with train.txt, val.txt, test.txt
    # group 1 is the patient in a name; "": the usual conventions (dataloaders/lists.py)
    patient_pattern: Annotated[str, OF_FORMAT] = ""
    # classes that the list which is trained on may lack
    absent_classes: Annotated[tuple[str, ...], OF_FORMAT] = ()
    workers: Natural = 4  # loader processes of each stream of batches; 0 loads in the main one
    # of NSD in tests, one or {class: tolerance}: mm, or voxels where these have no size
    nsd_tolerance: float | dict = NSD_TOLERANCE
    # Networks and method
    network_args: dict = dataclasses.field(default_factory=dict)  # {network: {argument: value}}
    method_args: dict = dataclasses.field(default_factory=dict)  # {method: {argument: value}}
    recipe: dict = dataclasses.field(default_factory=dict)  # {name: {key: value}}, of that alone
    # weights to start from: a checkpoint, its run folder or, of nnunet, a results folder
    init_checkpoint: str = ""
    freeze: str = ""  # encoder: keep its initial weights and batch norm statistics
    # Optimisation
    optimizer: Annotated[str, OPTIMIZERS] = "sgd"
    lr: Positive = 0.01
    min_lr: NotNegative = 0.0
    schedule: Annotated[str, SCHEDULES] = "poly"
    # length that the schedule is made for, if not max_steps; of 'step': between two falls
    schedule_steps: Natural = 0
    momentum: NotNegative = 0.9  # of sgd
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    grad_clip: NotNegative = 0.0  # largest gradient norm; 0: no clipping
    amp: Annotated[str, AMP] = "off"
    # steps that may be left out where a loss or gradient is not finite; 0: stop
    skip_nonfinite: Natural = 0
    # deterministic algorithms; utils/numerics.py says what they cannot guarantee
    deterministic: bool = False
    compile: bool = False  # torch.compile of the networks
    channels_last: bool = True  # memory order of weights and activations
    # Validation, output
    val_interval: Count = 500  # steps
    # clean batches from which batch norms get the statistics they are tested with; 0: the running
    bn_batches: Natural = 20
    # val | test: the list that chooses best.pt; test is recorded and shown in every table
    select_on: Annotated[str, SELECTIONS] = "val"
    log_interval: Count = 20  # steps
    save_interval: Count = 500  # steps
    # steps between measurements of each term's gradient, under 1 % of the time; 0: none
    diagnose_interval: Natural = 100
    logger: Annotated[str, LOGGERS] = ""  # beside log.jsonl and TensorBoard
    seed: Natural = 0
    device: str = "auto"
    runs_dir: str = "runs"
    tag: str = ""  # told apart from other runs of the same cell

    set_aside = ()
    other_names = ()

    @classmethod
    def adapted(cls, given: Given) -> list[str]:
        """Take out of `given`, in place, what a file has for other training scripts, since one file
        can serve all; -> notes about it. The command line must be of this script. One number as
        `patch_size` becomes all of its sides.
        """
        _all_sides(cls, given)
        dropped = [key for key in cls.set_aside if key in given and not from_flag(given[key])]
        for key in dropped:
            del given[key]
        for key in ("recipe", "method_args"):
            value, source = given.get(key, (None, ""))
            if not isinstance(value, dict) or from_flag(given[key]):
                continue
            own = {k: v for k, v in value.items() if str(k).split("@")[0] not in cls.other_names}
            given[key] = (own, source)
            dropped += [f"{key} of {name}" for name in value if name not in own]
        if not dropped:
            return []
        return [f"note: {', '.join(dropped)}: for other training scripts, not used here"]

    def lr_at(self, step: int, lr: float) -> float:
        """The learning rate of a step (0-based) that was `lr` at the start."""
        length = self.schedule_steps or self.max_steps
        return SCHEDULES[self.schedule](step, lr, length, self.min_lr)

    def make_optimizer(self, parameters: Iterable[nn.Parameter] | Iterable[dict]) -> Optimizer:
        return build_optimizer(
            self.optimizer, parameters, self.lr, self.momentum, self.weight_decay, self.nesterov
        )

    @property
    def recipe_name(self) -> str:
        """The entry of `recipe` that is for this run."""
        return self.method

    @property
    def val_start(self) -> int:
        """First step at which to validate; a key of scripts that want one."""
        return 0

    @property
    def idle_keys(self) -> tuple[str, ...]:
        """Keys that the method has no use for."""
        return ()

    @property
    def trained_network(self) -> str:
        return self.network

    @property
    def method_keys(self) -> tuple[str, ...]:
        """Keys of `method_args` that concern this run, the later the stronger."""
        return (self.method,)

    @property
    def method_arguments(self) -> dict:
        """`method_args` of this run."""
        return self.arguments_of(self.method_keys)

    def arguments_of(self, keys: Iterable[str]) -> dict:
        """Those under some keys of `method_args`, the later the stronger."""
        given = [self.method_args.get(key) or {} for key in keys]
        return {name: value for arguments in given for name, value in arguments.items()}

    def network_arguments(self, name: str) -> dict:
        return self.network_args.get(name, {})

    def checked(self) -> Self:
        """The same with arguments as their types; ConfigError for what could only fail later.

        Of arguments only those that concern this run stay: an edit elsewhere in the file must not
        keep it from resuming.
        """
        cfg = self._converted()._completed()
        require_logger(cfg.logger)
        check_values(cfg)
        check_run_names(cfg)
        class_tolerances(cfg.nsd_tolerance, cfg.class_names)
        cfg._check()
        cfg.dataset_arguments()
        cfg._try_out()
        of_network = {k: v for k, v in cfg.network_args.items() if k == cfg.trained_network}
        of_method = {k: v for k, v in cfg.method_args.items() if k in cfg.method_keys}
        return dataclasses.replace(cfg, network_args=of_network, method_args=of_method)

    def _converted(self) -> Self:
        networks = self.pluggable.get("network") or self.pluggable["student"]
        method = self.pluggable["method"]
        return dataclasses.replace(
            self,
            recipe={},
            network_args=check_nested(
                "network_args", self.network_args, networks.registry, networks.takes
            ),
            method_args=check_nested(
                "method_args", self.method_args, method.registry, method.takes, self.method_pairs
            ),
        )

    def _completed(self) -> Self:
        """With what the data set's own files tell in place of what is left out."""
        return self

    def _check(self) -> None:
        """ConfigError for values that do not go together."""
        if self.optimizer != "sgd":
            check_unused(self, ("momentum", "nesterov"), f"optimizer '{self.optimizer}'")
        if self.schedule == "constant":
            check_unused(self, ("schedule_steps", "min_lr"), "schedule 'constant'")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov: needs a momentum above 0")
        if self.freeze:
            networks = (self.pluggable.get("network") or self.pluggable["student"]).registry
            network = networks[self.trained_network]
            initial.check_freezable(self.freeze, self.trained_network, network)
        if self.freeze and not self.init_checkpoint:
            raise ConfigError(
                f"freeze: {self.freeze} would keep random weights; name those to start from with "
                "--opts init_checkpoint=FILE"
            )

    def _try_out(self) -> None:
        """Build networks and method without memory: what does not fit shows before the data."""

    def _check_patch(self, name: str, arguments: Mapping[str, Any]) -> None:
        """ConfigError unless the network of this name and these arguments can take the patches."""
        networks = (self.pluggable.get("network") or self.pluggable["student"]).registry
        stride = networks[name].stride
        strides = (stride,) * len(self.patch_size)
        if hasattr(networks[name], "multiples"):  # whose strides are among the arguments
            with trying(f"network_args: {name}"):
                strides = networks[name].multiples(**arguments)
        if any(side % step for side, step in zip(self.patch_size, strides)):
            shown = strides[0] if len(set(strides)) == 1 else list(strides)
            raise ConfigError(
                f"patch_size: {list(self.patch_size)} must be multiples of {shown} for {name}"
            )


def _all_sides(schema: type[Settings], given: Given) -> None:
    """Put a `patch_size` that is one number, for a square or a cube, as a list into `given`;
    ConfigError for a list of another length than the script's.
    """
    hint = typing.get_type_hints(schema).get("patch_size")
    if hint is None or "patch_size" not in given:
        return
    value, source = given["patch_size"]
    dims = len(typing.get_args(hint))
    if type(value) is int:
        given["patch_size"] = ([value] * dims, source)
    elif isinstance(value, (list, tuple)) and len(value) != dims:
        raise ConfigError(
            f"{source}: 'patch_size' must be a list of {dims} values, or one number for all sides, "
            f"got {list(value)}"
        )


class Run:
    """One training, seen from one of its processes.

    `world`, the processes; `device`; `folder`; `log`; `watch`, of steps that are not finite;
    `averages`, what a record logs; `start`, steps that were done before; in the loop `logs`,
    `validates`, `saves`: what is due at the end of this step.
    """

    def __init__(self, cfg: Settings, args: Any, networks: str) -> None:
        """networks: how they show in the name of the folder. Ends the script (SystemExit) where
        the folder is only asked for, or holds imported weights.
        """
        self.cfg, self.args, self.networks = cfg, args, networks
        self.folder = run_folder(
            cfg.runs_dir, cfg.dataset, cfg.method, networks, cfg.seed, cfg.preset, cfg.tag
        )
        if isinstance(args.resume, str) and self.folder.resolve() != Path(args.resume).resolve():
            raise ConfigError(
                f"{args.resume}: its config.yaml names the run folder {self.folder}; start in the "
                "folder where the training was started, and move the run back if it was moved"
            )
        if args.show_run:
            print(self.folder)
            raise SystemExit(0)
        if not (self.folder / "last.pt").exists() and (self.folder / "best.pt").exists():
            if "imported" in load_checkpoint(self.folder / "best.pt"):
                print(
                    f"nothing to do: {self.folder} holds imported weights; remove it to train anew"
                )
                raise SystemExit(0)
        self.resumes = bool(args.resume) and _has_run(self.folder)
        starts = cfg.init_checkpoint and not self.resumes
        self.initial = initial.read_initial(cfg) if starts else None
        self.world, name = join_world(cfg.device)
        self.lock = Lock(self.folder / LOCK)
        if self.lock.path.exists():  # rather than after the data were read
            self._own_folder()
            self.lock.release()
        self.device = resolve_device(name)
        if self.device.type == "cpu":
            keep_freed_memory()
        if cfg.amp == "bf16" and self.device.type == "cpu":
            self.note(
                "note: bf16 on a CPU: convolutions over grids of one or two voxels along an axis "
                "run in float32, since those in bfloat16 have wrong gradients"
            )
        if cfg.deterministic:
            use_deterministic(self.device, cfg.compile, quiet=not self.world.main)
        self.start, self.best = 0, {"dice": -1.0, "step": -1}
        self.averages = Averages()
        self.contents: Mapping = {}
        self.logs = self.validates = self.saves = self._stops = False

    def note(self, text: str) -> None:
        """Print on standard error, once for all processes."""
        if self.world.main:
            print(escaped(text), file=sys.stderr)

    def placed(self, module: nn.Module, memory: torch.memory_format) -> nn.Module:
        """A module on the device and, if the settings say so, in this memory order, for training:
        its batch norms are those of all processes.
        """
        memory = memory if self.cfg.channels_last else torch.contiguous_format
        return self.world.synchronised(module.to(self.device, memory_format=memory), self.device)

    def begin(self, *networks: nn.Module) -> None:
        """Give the network that is trained, and copies of it that a method keeps, the weights of
        `init_checkpoint`, and freeze their part `freeze`. After `placed`, before the optimiser.
        """
        if self.initial is not None:
            self.note(initial.load_initial(networks, self.initial, self.cfg.class_names))
        if self.cfg.freeze:
            self.note(initial.freeze(networks, self.cfg.freeze))

    def seed_apart(self) -> None:
        """Other random numbers in each process from here on: of dropout, boxes, sampled losses."""
        if self.world.rank:
            seed_everything(self.cfg.seed + 10**6 * self.world.rank)

    def open(self, report: Any) -> None:
        """Print the warnings of a report on the data and make the folder, in the first process;
        ConfigError for a run that is there and is not resumed, or has other settings.
        """
        self.contents = report.contents
        if self.world.main:
            for warning in report.spoken_warnings():
                print(escaped(warning), file=sys.stderr)
            self._own_folder()
            open_run(self.folder, self.cfg, self.resumes)

    def _own_folder(self) -> None:
        """Take the lock on the folder, again if it was removed under way; ConfigError while another
        process trains in it.
        """
        if not self.world.main or self.lock.holds():
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            owner = self.lock.take()
        if owner is not None:
            raise ConfigError(
                f"{self.folder}: in use by {owner}; wait for that run, stop it, or name another "
                f"with --opts tag=NAME; if that process is gone, with its host, remove {LOCK} there"
            )

    def describe(
        self,
        kind: str,
        network: str,
        in_channels: int,
        num_classes: int,
        splits: Mapping,
        teacher: nn.Module | None = None,
        teacher_scores: Mapping[str, float] | None = None,
    ) -> None:
        """What every checkpoint says of itself. splits: list -> its cases. teacher_scores: on the
        validation cases, if they are known, for the header.
        """
        cfg = self.cfg
        if self.initial is not None:
            initial.seen_before(self.initial, cfg.dataset, splits)
        self.teacher, self.teacher_scores = teacher, teacher_scores
        self.described = {
            "kind": kind,
            "network": {
                "name": network,
                "in_channels": in_channels,
                "num_classes": num_classes,
                "arguments": dict(cfg.network_arguments(network)),
            },
            "class_names": list(cfg.class_names),
            "config": dataclasses.asdict(cfg),
            "dataset": cfg.dataset_arguments(),
            "cases": {split: [case.name for case in cases] for split, cases in splits.items()},
            "contents": self.contents,
            "teacher": digest(teacher.state_dict()) if teacher is not None else "",
            "code": code_version(),
            "plugins": self.args.plugins,
            "selected_on": cfg.select_on,
        }

    def keep(self, **parts: Any) -> None:
        """What last.pt holds the state of, by name, and takes it back from on --resume.

        Modules are watched for gradients that are not finite; None has an empty state; one part is
        the `scaler`. Prints the header, opens the log and takes signals from here on.
        """
        self.parts = parts
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        self.watch = StepWatch(
            self.folder, modules, parts["scaler"], self.world, self.cfg.skip_nonfinite
        )
        if self.resumes:
            self._restore()
        self.log: RunLog | SilentLog = SilentLog()
        if self.world.main:
            service, values = None, dataclasses.asdict(self.cfg)
            if self.cfg.logger:
                service = start_wandb(self.folder, values, self.start > 0)
            self.log = RunLog(self.folder, self.start, service)
        self._introduce()
        self.signal = StopSignal()

    def _introduce(self) -> None:
        """Print what is trained, on what, where, and how to watch it."""
        if not self.world.main or self.start >= self.cfg.max_steps:
            return
        about = header(
            self.cfg,
            self.described,
            self.folder,
            self.device,
            self.world.size,
            self.parts,
            self.teacher,
            self.teacher_scores,
        )
        if self.start:
            about.append(f"goes on from step {self.start:,} of {self.cfg.max_steps:,}")
        print(escaped("\n".join(about)), flush=True)

    def teacher_validated(self, scores: Mapping[str, float]) -> None:
        """Log the teacher's scores on the validation cases; print them if the header did not."""
        self.log.scalars(0, "teacher", scores)
        if self.world.main and self.teacher_scores is None:
            found = teacher_words(self.cfg.teacher, self.teacher, scores)
            print(escaped(f"{'teacher':8} {found}"), flush=True)

    def _restore(self) -> None:
        state, warning = load_last(self.folder)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        plugins.check_same(state.get("plugins", {}), self.args.plugins, str(self.folder))
        self._check_references(state)
        now = code_version()
        if state.get("code") != now:
            print(
                f"warning: {self.folder} was trained by the code {state.get('code')}, this is "
                f"{now}: where defaults or forms of a method differ, the run changes from here on",
                file=sys.stderr,
            )
        state.setdefault("student", state["weights"])  # as students were once kept
        for name, part in self.parts.items():
            if name not in state:
                raise CheckpointError(f"{self.folder}: last.pt lacks '{name}'; start anew")
            stored = state[name]
            if isinstance(part, nn.Module):
                load_network_weights(part, stored, str(self.folder))
            elif part is not None:
                part.load_state_dict(stored)
        set_rng_state(state["rng"], self.world.rank)
        self.watch.load_state_dict(state.get("watch", {}))
        if "totals" in state:  # how distillation once kept them: one count for all names
            counts = {name: torch.tensor(state["counted"]) for name in state["totals"]}
            state["averages"] = {"sums": state["totals"], "counts": counts}
        self.averages.load_state_dict(state["averages"])
        self.start, self.best = state["step"], state["best"]
        self._look_for_best()

    def _look_for_best(self) -> None:
        """Say so if the best checkpoint was lost, and let later validations choose another;
        CheckpointError if there are none.
        """
        if self.best["step"] < 0:
            return
        path = self.folder / "best.pt"
        try:
            step = load_checkpoint(path).get("step")
            if type(step) is int and step >= self.best["step"]:
                return  # one that is newer than last.pt is made again
            problem = f"{path}: is of step {step}"
        except CheckpointError as error:
            problem = str(error).partition("; restore it")[0]
        lost = f"the best checkpoint, Dice {self.best['dice']:.4f} at step {self.best['step']}"
        if self.start >= self.cfg.max_steps:
            raise CheckpointError(
                f"{problem}. It was {lost}, and all {self.start} steps are done: restore it, test "
                "last.pt, go on with a larger max_steps, or remove the folder and train again"
            )
        self.best = {"dice": -1.0, "step": -1}
        self.note(
            f"warning: {problem}. It was {lost}; best.pt is now chosen among the validations from "
            f"step {self.start} on"
        )

    def _check_references(self, state: Mapping) -> None:
        """CheckpointError if what the run is given by the name of a file, lists, cases and teacher,
        is not what a checkpoint was trained on.
        """
        now, differ = self.described, []
        unlabelled = self.cfg.method != "supervised" and getattr(self.cfg, "unlabelled_batch", 0)
        for split in ("labelled", "unlabelled", "val", "test"):
            if split != "unlabelled" or unlabelled:
                before = {key: state.get(key, {}).get(split) for key in ("cases", "contents")}
                if before["cases"] is not None:  # as they were once written
                    before["cases"] = [
                        unicodedata.normalize("NFC", name) for name in before["cases"]
                    ]
                after = {key: now[key].get(split) for key in before}
                trained = split in ("labelled", "unlabelled")
                differ += [f"{split}: {text}" for text in _differences(before, after, trained)]
        if state.get("teacher", now["teacher"]) != now["teacher"]:
            differ.append(
                f"teacher: weights with the digest {state['teacher'][:12]} then, "
                f"{now['teacher'][:12]} now"
            )
        if differ:
            raise CheckpointError(
                f"{self.folder}: cannot resume with other data or another teacher "
                f"({'; '.join(differ)}); restore them, or start another run with --opts tag=NAME"
            )

    def steps(self) -> Iterator[int]:
        """The steps that are left, 0-based, with a progress bar; a signal ends them after a step
        that saves.
        """
        cfg, main = self.cfg, self.world.main
        self.bar = tqdm(
            range(self.start, cfg.max_steps),
            initial=self.start,
            total=cfg.max_steps,
            desc=f"{cfg.method} {self.networks}",
            unit="step",
            disable=not main,
        )
        self._show_progress()
        pace = Pace(cfg.max_steps - self.start, self._validations_left(), resumed=self.start > 0)
        for step in self.bar:
            began = time.perf_counter()
            self.step, self.done = step, step + 1
            last = self.done == cfg.max_steps
            stops = self.world.any(bool(self.signal))
            self.validates = self._validates_after(self.done)
            self.saves = last or stops or self.done % cfg.save_interval == 0
            self.logs = last or self.done % cfg.log_interval == 0
            self._saved, self.measured = False, {}
            yield step
            estimate = pace.took(time.perf_counter() - began, self.validates, self.saves)
            if estimate and main:
                self.bar.write(estimate)
            if self._saved:  # validation takes a while
                stops = stops or self.world.any(bool(self.signal))
            if stops and not last:
                self._stops = True
                self.bar.close()
                return

    def _validates_after(self, done: int) -> bool:
        """Whether a validation is due when `done` steps are."""
        cfg = self.cfg
        due = done >= cfg.val_start and done % cfg.val_interval == 0
        return due or done == cfg.max_steps

    def _validations_left(self) -> int:
        """How many validations are due from `start` on."""
        cfg = self.cfg
        first = max(self.start, cfg.val_start - 1)  # steps after which none of them is due
        regular = max(cfg.max_steps // cfg.val_interval - first // cfg.val_interval, 0)
        last_is_regular = first < cfg.max_steps and cfg.max_steps % cfg.val_interval == 0
        return regular if last_is_regular else regular + 1

    def _show_progress(self, loss: float | None = None) -> None:
        """Loss and best score beside the progress bar."""
        best = f"best {100 * self.best['dice']:.1f} at {self.best['step']}"
        shown = [f"loss {loss:.3f}"] if loss is not None else []
        if self.best["step"] >= 0:
            shown.append(best)
        self.bar.set_postfix_str(", ".join(shown))

    @property
    def settles(self) -> bool:
        """Whether this step must be known to be good, since something is written after it."""
        return self.logs or self.validates or self.saves

    def record(self, terms: Mapping[str, Tensor], **more: float) -> None:
        """Log the means since the last record, and the sum `loss` of the means of these terms."""
        means = self.world.means(self.averages.take())
        total = sum(means.get(name, math.nan) for name in terms)  # NaN if all steps were left out
        values = {"loss": total, **means, **more, **self.watch.report()}
        self.log.scalars(self.step, "train", values)
        self._show_progress(total)

    def part(self, cases: Sequence) -> Iterator:
        """The cases that this process validates on, with a progress bar."""
        mine, quiet = self.world.part(cases), not self.world.main
        return tqdm(mine, desc="validating", unit="case", leave=False, disable=quiet)

    def validated(
        self,
        scores: Mapping[str, float],
        picture: np.ndarray | None,
        weights: Mapping[str, Tensor],
        agreement: Mapping[str, float] | None = None,
    ) -> None:
        """Log scores and picture; weights whose Dice is the highest so far become best.pt.

        scores: empty where there was nothing to validate on. agreement: with a teacher, which is
        logged and kept beside the weights and chooses nothing.
        """
        also = {"agreement": dict(agreement)} if agreement else {}
        self.measured = also
        if agreement:
            self.log.scalars(self.step, "agreement", agreement)
        if not scores:
            return
        self.log.scalars(self.step, "val", scores)
        self.log.image(self.step, "val/image, label, prediction", picture)
        if scores["dice"] > self.best["dice"]:
            self.best = {"dice": scores["dice"], "step": self.done}
            if self.world.main:
                self._own_folder()
                chosen = {"weights": weights, "step": self.done, "val": scores}
                atomic_save({**self.described, **chosen, **also}, self.folder / "best.pt")

    def show(self, kind: str, pictures: Mapping[str, tuple], num_classes: int) -> None:
        """Log what a method shows of its last batch: name -> (image or None, ids or None)."""
        if pictures:
            pairs = [figures.as_arrays(*pair) for pair in pictures.values()]
            tag = f"{kind}/{' | '.join(pictures)}"
            self.log.image(self.step, tag, figures.views(pairs, num_classes))

    def save(self, weights: Mapping[str, Tensor]) -> None:
        """Write last.pt. weights: of the network that is deployed, as it would be."""
        self._saved = True
        random_states = self.world.gathered(rng_state())  # all processes, or the others would wait
        if not self.world.main:
            return
        self._own_folder()
        parts = {
            name: {} if part is None else part.state_dict() for name, part in self.parts.items()
        }
        save_last(
            {
                **self.described,
                **parts,
                "weights": weights,
                "rng": random_states,
                "step": self.done,
                "best": self.best,
                "averages": self.averages.state_dict(),
                "watch": self.watch.state_dict(),
                **self.measured,
            },
            self.folder,
        )

    def end(self) -> int:
        """Close the log, say what came out or how to go on -> the exit code."""
        self.log.close()
        if self._stops:
            self.lock.release()
            self.world.leave()
            words = [*self.world.launcher, *sys.argv]
            if not self.args.resume:
                words.append("--resume")
            self.note(f"\nstopped after step {self.done}; go on with: {shlex.join(words)}")
            return self.signal.exit_code
        if self.world.main:
            if self.start >= self.cfg.max_steps:
                print(f"nothing to do: {self.folder} has all {self.cfg.max_steps} steps")
            for finding in findings(read_log(self.folder / "log.jsonl")):
                print(f"warning: {finding}", file=sys.stderr)
            dice, step = self.best["dice"], self.best["step"]
            if step < 0:
                print(f"nothing was validated; the result is {self.folder / 'last.pt'}")
            else:
                print(f"best validation Dice {dice:.4f} at step {step}; results in {self.folder}")
        self.lock.release()
        self.world.leave()
        return 0


def _differences(before: Mapping, after: Mapping, ordered: bool) -> list[str]:
    """What of a list is not as it was, in words. before, after: `cases`, its names, and `contents`,
    name -> digest; None where that is not known. ordered: whether the order of names matters.
    """
    if before["cases"] is None or after["cases"] is None:
        return []
    found = []
    gone = [name for name in before["cases"] if name not in set(after["cases"])]
    new = [name for name in after["cases"] if name not in set(before["cases"])]
    if gone:
        found.append(f"{named(gone)} then, not now")
    if new:
        found.append(f"{named(new)} now, not then")
    if ordered and not found and before["cases"] != after["cases"]:
        found.append("another order")
    digests, present = before["contents"] or {}, after["contents"] or {}
    changed = [name for name in digests if present.get(name, digests[name]) != digests[name]]
    if changed:
        found.append(f"another image or label of {named(changed)}")
    return found


def named(names: Sequence[str]) -> str:
    """Names in a message, the first ten of them."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _has_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("last.pt", PREVIOUS))


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
        if not plain_name(name):
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


def open_run(folder: Path, config: Any, resume: bool) -> None:
    """Make the folder and write config.yaml; ConfigError if a run is there already and `resume`
    does not fit it.
    """
    values = {key: plain(value) for key, value in dataclasses.asdict(config).items()}
    path = folder / "config.yaml"
    if not resume and _has_run(folder):
        ways = "go on with --resume, remove the folder"
        if path.exists() and (differ := _differing(config, values, stored_config(path))):
            ways = f"its {', '.join(differ)} differ; remove the folder"
        raise ConfigError(
            f"{folder}: holds a run already; {ways}, or name another with --opts tag=NAME"
        )
    if resume and not path.exists():
        raise ConfigError(
            f"{folder}: has a checkpoint but no config.yaml, so it cannot be told whether this is "
            "its configuration; "
            f"restore config.yaml, or remove the folder and start again"
        )
    if resume:
        before = stored_config(path)
        refused = _differing(config, values, before)
        if refused:
            before = plain(defaults(type(config))) | before
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


def _differing(config: Any, now: Mapping, then: Mapping) -> list[str]:
    """Keys that keep a run with the values `then` from being resumed with those of `now`."""
    # Keys that did not exist when the run began had what is their default now.
    then = plain(defaults(type(config))) | then
    keys = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    return [key for key in keys if key not in RESUMABLE]


def stored_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run; ConfigError if it is empty, cut or something else."""
    try:
        values = read_yaml(path)
        if not path.read_bytes().endswith(b"\n"):
            raise ConfigError(f"{path}: ends within a line")
    except ConfigError as error:
        raise ConfigError(
            f"{error}: this is no whole configuration of a run; restore it, or remove the folder "
            "and start again"
        ) from error
    return values


def defaults(schema: type) -> dict[str, Any]:
    """Key -> default of a dataclass, of the keys that have one."""
    fields, missing = dataclasses.fields(schema), dataclasses.MISSING
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not missing}
    return {f.name: f.default for f in fields if f.default is not missing} | made


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
    """Turns SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a flag that the training loop looks at after
    each step. SIGHUP stays ignored where nohup has said so.

    A second SIGINT stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is None:
                continue
            # nohup: the training is meant to outlive its terminal
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._note)

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
    # not os.getppid(), which is the fork server where there is one
    parent = multiprocessing.parent_process()
    number = parent.pid if parent is not None else os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != number:
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
        with lasting_streams():
            return main()
    except (ConfigError, CheckpointError, FloatingPointError, *expected) as problem:
        return escaped(f"error: {problem}")
    except DiskError as problem:
        return escaped(
            f"error: {problem}; checkpoints written before are intact: make room or mend the "
            "folder, then go on with --resume"
        )
    except ConnectionError as error:
        message = _broken_loader(error)
        if message is None:
            raise
        return f"error: {_dead_loader(message)}"
    except OSError as error:
        message = system_message(error)
        if message is None:
            raise
        return escaped(f"error: {message}; what was saved is intact")
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


def _broken_loader(error: ConnectionError) -> str | None:
    """Torch's message on the loader process whose connection broke; None for other connections.

    A loader that dies while its batch is read breaks the connection some moments before it counts
    as dead: torch then passes on the bare error, and names the process once it has ended.
    """
    try:
        calls = traceback.extract_tb(error.__traceback__)
        if not any(call.filename == torch.utils.data.dataloader.__file__ for call in calls):
            return None
        for _ in range(50):
            torch._C._error_if_any_worker_fails()
            time.sleep(0.1)
    except RuntimeError as dead:
        return str(dead)
    return f"DataLoader worker (pid unknown): {error}"


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
