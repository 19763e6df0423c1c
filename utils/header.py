"""What a training prints at its start, and how long it takes: the header of a run, and estimates
from the steps that were timed.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.complexity import count_parameters

WARM_UP = 5  # first steps, which also fill caches and compile
TIMED = 20  # steps after which the first estimate is printed


def header(
    cfg: Any,
    described: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    processes: int,
    parts: Mapping[str, Any],
    teacher: nn.Module | None = None,
    teacher_scores: Mapping[str, float] | None = None,
) -> list[str]:
    """The lines of a header, each a name and what there is to know of it.

    described: what checkpoints say of the run, `Run.describe`. parts: what it trains, `Run.keep`;
    the first module is the network, or the method that holds it as `network`.
    teacher_scores: on the validation cases, where they are known.
    """
    method = parts.get("method")
    trained = next(part for part in parts.values() if isinstance(part, nn.Module))
    network = getattr(trained, "network", trained)
    rows = [
        ("data", f"{cfg.dataset}, {case_counts(described['cases'], method)}"),
        ("network", f"{described['network']['name']}, {count_parameters(network):,} parameters"),
    ]
    if teacher is not None:
        rows.append(("teacher", teacher_words(cfg.teacher, teacher, teacher_scores)))
    preset = "" if cfg.preset == "clean" or cfg.method == "supervised" else f", {cfg.preset}"
    rows += [
        ("method", f"{cfg.method}{preset}, {cfg.max_steps:,} steps"),
        ("device", device_words(device, processes)),
        ("folder", str(folder)),
        ("watch", f"tensorboard --logdir {shlex.quote(str(folder))}"),
    ]
    return [f"{name:8} {text}" for name, text in rows]


def case_counts(cases: Mapping[str, list[str]], method: nn.Module | None) -> str:
    """How many cases each list has. method: one that has no use for unlabelled cases is told by its
    `uses_unlabelled`.
    """
    idle = not getattr(method, "uses_unlabelled", True)
    counts = []
    for split, names in cases.items():
        unused = " (not used)" if split == "unlabelled" and idle else ""
        if names:
            counts.append(f"{len(names)} {split}{unused}")
    return ", ".join(counts)


def teacher_words(name: str, teacher: nn.Module, scores: Mapping[str, float] | None) -> str:
    """The teacher, its parameters, and its validation Dice in percent where it is known."""
    text = f"{name}, {count_parameters(teacher):,} parameters"
    if scores is None:
        return text
    return f"{text}, validation Dice {100 * scores['dice']:.1f}"


def device_words(device: torch.device, processes: int) -> str:
    """The device of a process, the CPU threads of each, and how many processes there are."""
    count = torch.get_num_threads()
    threads = f"{count} CPU thread{'s' * (count > 1)}"
    name = "cpu"
    if device.type == "cuda":
        name = f"{device}, {torch.cuda.get_device_name(device)}"
    each = f", in each of {processes} processes" if processes > 1 else ""
    return f"{name}, {threads}{each}"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '2 h 10 min', '3 d 4 h': as exact as an estimate is."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


class Pace:
    """How long a training takes, from its own steps.

    left: steps from the first on; validations: how many of them validate.
    """

    def __init__(self, left: int, validations: int, resumed: bool) -> None:
        self.left, self.validations, self.resumed = left, validations, resumed
        self.seen = 0
        self.plain: list[float] = []
        self.validated: list[float] = []

    def took(self, seconds: float, validates: bool, saves: bool) -> str:
        """Note a step that is done; -> what to print, mostly ''.

        The first estimate comes after `TIMED` steps, a second one with the first validation after
        it, since nobody can know how long that takes before.
        """
        self.seen += 1
        if validates:
            self.validated.append(seconds)
        elif not saves and self.seen > WARM_UP:
            self.plain.append(seconds)
        ended = self.seen >= self.left
        known = len(self.plain) > 0 and not ended
        first_validation = validates and len(self.validated) == 1 and self.seen > TIMED
        if known and (self.seen == TIMED or first_validation):
            return self.estimate()
        return ""

    def estimate(self) -> str:
        """The time of all steps from the first on, in words."""
        # The median: a step that waited for a disk, or for another process, tells nothing.
        each = sorted(self.plain)[len(self.plain) // 2]
        which = (
            f"the {self.left:,} steps that were left" if self.resumed else f"{self.left:,} steps"
        )
        if not self.validations:
            return f"about {duration(each * self.left)} for {which}"
        if not self.validated:
            total = each * self.left
            return (
                f"about {duration(total)} for {which}, without {self.validations} validations, "
                "of which none was timed yet"
            )
        one = max(sum(self.validated) / len(self.validated) - each, 0.0)
        total = each * self.left + one * self.validations
        return (
            f"about {duration(total)} for {which}, with {self.validations} validations of "
            f"{duration(one)}"
        )
