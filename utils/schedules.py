"""Learning-rate schedules as pure functions of the step."""

from torch.optim import Optimizer


def poly_lr(step: int, lr: float, max_steps: int, min_lr: float = 0.0, power: float = 0.9) -> float:
    """(lr - min_lr) (1 - step / (max_steps - 1))^power + min_lr; the last step runs at exactly min_lr."""
    remaining = 1.0 - min(step / max(max_steps - 1, 1), 1.0)
    return (lr - min_lr) * remaining**power + min_lr


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
