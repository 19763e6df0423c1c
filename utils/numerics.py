"""Losses and gradients that are not finite, fp16 loss scales that collapse, and deterministic
algorithms.
"""

import dataclasses
import math
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import atomic_save
from utils.distributed import World

SMALLEST_SCALE = 1.0  # 17 halvings below GradScaler's start: no scale keeps these gradients finite
AHEAD = 8  # steps that a GPU may be behind before its oldest verdict is waited for


@dataclasses.dataclass
class _Step:
    """What is known of a step until its verdict has arrived."""

    step: int
    bad: Tensor  # bool scalar, on its way to the host
    names: list[str]  # of the parameters with a gradient
    # largest absolute value of each gradient (names,), or None where they are not watched
    largest: Tensor | None
    terms: dict[str, Tensor]
    batch: Any
    cases: list[str]
    arrived: Any = None  # CUDA event

    def known(self, wait: bool) -> bool:
        # on the CPU, where it is known at once, or on a device without such events
        if self.arrived is None:
            return wait or self.bad.device.type == "cpu"
        if wait:
            self.arrived.synchronize()
        return self.arrived.query()


class StepWatch:
    """Stops a training whose loss or gradients are not finite, or leaves such steps out.

    modules: all that is trained, by name. allowed: steps that may be left out (`skip_nonfinite`).
    With 0, a GPU is never waited for: a verdict travels to the host beside the training and is
    looked at when it has arrived, at most `AHEAD` steps later, and always before anything is logged
    or saved. Leaving a step out needs its verdict at once, which costs one wait for each step.

    With fp16 the scaler leaves out steps whose scaled gradients overflow, as it should to find its
    scale; they are not counted here. A scale below 1 is an error.
    """

    def __init__(
        self,
        folder: Path,
        modules: Mapping[str, nn.Module],
        scaler: torch.amp.GradScaler,
        world: World,
        allowed: int,
    ) -> None:
        self.folder, self.scaler, self.world, self.allowed = folder, scaler, world, allowed
        self.modules = list(modules.values())
        named = {
            f"{key}.{name}": p
            for key, module in modules.items()
            for name, p in module.named_parameters()
        }
        self.trained = {name: p for name, p in named.items() if p.requires_grad}
        self.skipped, self.last_skipped = 0, -1
        self.pending: deque[_Step] = deque()
        self.buffers: list[Tensor] = []

    def before(self) -> None:
        """Call before the forward pass: a step left out must not leave its traces in running
        statistics and queues.
        """
        if self.allowed:
            self.buffers = [
                buffer.clone() for module in self.modules for buffer in module.buffers()
            ]

    def passes(
        self,
        step: int,
        terms: Mapping[str, Tensor],
        batch: Any,
        cases: Sequence[str],
        wait: bool = False,
    ) -> bool:
        """Call after the backward pass: whether the update may be made. FloatingPointError if the
        run must stop.

        terms: the summands of the loss. batch: nested dicts and lists of tensors, saved for
        inspection. wait: settle all steps so far, as before something is logged or saved.
        """
        found = self._look(step, terms, batch, cases)
        if self.allowed:
            if not self.world.any(found.known(wait=True) and bool(found.bad)):
                self._check_scale(found, wait)
                return True
            if step != self.last_skipped:  # of a method with several updates, the step counts once
                if self.skipped >= self.allowed:
                    self._stop(
                        found,
                        f"; {self.skipped} steps before were left out, as skip_nonfinite allows",
                    )
                self.skipped, self.last_skipped = self.skipped + 1, step
                count = f"{self.skipped} of {self.allowed}"
                print(f"\nwarning: {self._describe(found)}; left out ({count})", file=sys.stderr)
            for buffer, before in zip(
                (b for m in self.modules for b in m.buffers()), self.buffers, strict=True
            ):
                buffer.copy_(before)
            return False
        self.pending.append(found)
        while self.pending and self.pending[0].known(wait or len(self.pending) > AHEAD):
            oldest = self.pending.popleft()
            if bool(oldest.bad):
                self._stop(oldest)
        self._check_scale(found, wait)
        return True

    def report(self) -> dict[str, float]:
        """For the log: steps left out so far and the loss scale, where the run can have them."""
        skipped = {"skipped": float(self.skipped)} if self.allowed else {}
        return skipped | (
            {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """An empty state is that of a checkpoint from before steps could be left out."""
        self.skipped = state.get("skipped", 0)

    def _look(
        self, step: int, terms: Mapping[str, Tensor], batch: Any, cases: Sequence[str]
    ) -> _Step:
        terms = {name: value.detach() for name, value in terms.items()}
        finite = torch.isfinite(sum(terms.values()))
        largest = None
        names = [name for name, p in self.trained.items() if p.grad is not None]
        gradients = [self.trained[name].grad for name in names]
        if gradients and not self.scaler.is_enabled():
            # The largest absolute value is not finite if one value is not, and cannot overflow as a
            # sum could.
            largest = torch.stack(torch._foreach_norm(gradients, math.inf)).float()
            finite = finite & torch.isfinite(largest.amax())
        found = _Step(step, ~finite, names, largest, terms, batch, list(cases))
        if found.bad.device.type == "cuda":
            host = torch.empty_like(found.bad, device="cpu", pin_memory=True)
            host.copy_(found.bad, non_blocking=True)
            found.bad, found.arrived = host, torch.cuda.Event()
            found.arrived.record()
        return found

    def _check_scale(self, found: _Step, wait: bool) -> None:
        """Reading the scale waits for a GPU, so only where one waits anyway."""
        if wait and self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            path = self._save(found)
            raise FloatingPointError(
                f"step {found.step}: the fp16 loss scale fell to {self.scaler.get_scale():g}: "
                "gradients overflow at "
                f"any scale, and no step is made ({self._values(found)}; batch in {path}). Train "
                "with --amp bf16 or "
                f"--amp off, with a lower lr, or with grad_clip"
            )

    def _stop(self, found: _Step, more: str = "") -> None:
        path = self._save(found)
        raise FloatingPointError(
            f"{self._describe(found)}; batch, terms and names of such gradients in {path}{more}. "
            "Look at the cases, "
            "lower lr, set grad_clip, or go on with --resume --opts "
            f"skip_nonfinite={self.allowed + 10}"
        )

    def _save(self, found: _Step) -> Path:
        rank = f"_rank{self.world.rank}" if self.world.rank else ""
        path = self.folder / f"nonfinite_step{found.step}{rank}.pt"
        content = {
            "step": found.step,
            "cases": found.cases,
            "batch": _on_host(found.batch),
            "terms": {name: value.item() for name, value in found.terms.items()},
            "nonfinite_gradients": self._bad_names(found),
        }
        atomic_save(content, path)
        return path

    def _bad_names(self, found: _Step) -> list[str]:
        # fp16, where scaled gradients are those of this step, or those of a step after it
        if found.largest is None:
            return [
                n
                for n, p in self.trained.items()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
        return [
            name
            for name, value in zip(found.names, found.largest.tolist())
            if not math.isfinite(value)
        ]

    def _describe(self, found: _Step) -> str:
        if not all(math.isfinite(value.item()) for value in found.terms.values()):
            what = "the loss is not finite"
        else:
            names = self._bad_names(found)
            what = (
                f"{len(names)} gradients are not finite, the first that of "
                f"{names[0] if names else 'no parameter'},"
            )
        return f"step {found.step}: {what} ({self._values(found)}); cases {found.cases}"

    def _values(self, found: _Step) -> str:
        return ", ".join(f"{name} {value.item():.4g}" for name, value in found.terms.items())


def _on_host(value: Any) -> Any:
    """Tensors on the CPU, all the way down."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_host(item) for item in value]
    return value


# --deterministic

_OPERATION = re.compile(r"(\S+) does not have a deterministic implementation")


def use_deterministic(device: torch.device, compiled: bool = False, quiet: bool = False) -> None:
    """Make torch take deterministic algorithms, and say what that cannot guarantee. Call before the
    first GPU kernel.

    An operation without such an algorithm runs all the same; its name is printed once, when it is
    first met.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    warnings.filterwarnings("always", message=".*does not have a deterministic implementation")
    seen: set[str] = set()
    show = warnings.showwarning

    def once(message, category, *rest, **more) -> None:
        operation = _OPERATION.match(str(message))
        if operation is None:
            show(message, category, *rest, **more)
        elif operation[1] not in seen:
            seen.add(operation[1])
            print(
                f"\n--deterministic: {operation[1]} has no such form; runs may differ by it",
                file=sys.stderr,
            )

    warnings.showwarning = once
    where = (
        "GPU model, driver, CUDA and cuDNN versions"
        if device.type == "cuda"
        else "processor type, OMP_NUM_THREADS"
    )
    if not quiet:
        print(
            f"--deterministic: equal runs give equal bits with the same {where}, torch version and "
            "number of processes "
            f"alone{'; what torch.compile generates is outside of this' if compiled else ''}. "
            "Operations without a "
            f"deterministic form are named when they run",
            file=sys.stderr,
        )
