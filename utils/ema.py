"""Exponential moving averages of networks."""

import torch
from torch import nn


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, decay: float, buffers: bool = True) -> None:
    """average <- decay * average + (1 - decay) * network, for parameters and floating-point
    buffers, in place.

    Buffers take part (batch norm statistics would otherwise stay those of the first step); counters
    are copied.
    buffers: False leaves the average's own alone, as released mean teachers do.
    """
    own, other = average.state_dict(), network.state_dict()
    if own.keys() != other.keys():
        raise ValueError("ema_update: the two networks differ in their tensors")
    kept = set() if buffers else {name for name, _ in average.named_buffers()}
    for name, value in own.items():
        if name in kept:
            continue
        if value.is_floating_point():
            value.lerp_(other[name], 1.0 - decay)
        else:
            value.copy_(other[name])


def ema_decay(step: int, decay: float) -> float:
    """min(1 - 1 / (step + 1), decay): 0 at step 0, so that the average starts at the network. Mean
    Teacher, 2017.
    """
    return min(1.0 - 1.0 / (step + 1), decay)
