"""Optimisers by name, and learning-rate schedules as pure functions of the step."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer

OPTIMIZERS = ("sgd", "adamw")


def poly_lr(step: int, lr: float, max_steps: int, min_lr: float = 0.0, power: float = 0.9) -> float:
    """(lr - min_lr) (1 - step / (max_steps - 1))^power + min_lr; the last step runs at exactly
    min_lr.
    """
    remaining = 1.0 - min(step / max(max_steps - 1, 1), 1.0)
    return (lr - min_lr) * remaining**power + min_lr


def poly_lr_open(
    step: int, lr: float, max_steps: int, min_lr: float = 0.0, power: float = 0.9
) -> float:
    """(lr - min_lr) (1 - step / max_steps)^power + min_lr: as `poly_lr`, but the last step stays
    above min_lr.

    The form of the semi-supervised recipes (SSL4MIS).
    """
    return (lr - min_lr) * (1.0 - min(step / max_steps, 1.0)) ** power + min_lr


def constant_lr(step: int, lr: float, max_steps: int, min_lr: float = 0.0) -> float:
    """lr at every step."""
    return lr


def step_lr(step: int, lr: float, max_steps: int, min_lr: float = 0.0) -> float:
    """lr times 0.1 after each `max_steps` steps, not below min_lr."""
    return max(lr * 0.1 ** (step // max_steps), min_lr)


# (step, lr, max_steps, min_lr) -> learning rate
SCHEDULES: dict[str, Callable[[int, float, int, float], float]] = {
    "poly": poly_lr_open,
    "poly_closed": poly_lr,
    "constant": constant_lr,
    "step": step_lr,
}


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> Optimizer:
    """SGD with momentum, or AdamW (which has no use for momentum and nesterov).

    parameters: in a list, or in groups {"params": list}.
    """
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )
