"""Modes of networks: evaluation, batch norm that does not remember, and making them without values."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode that it had."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms inside the block normalise by the batch, as in training, and leave their running statistics alone.

    For perturbed views: their statistics are not those of the clean images that the network will be used on.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Uninitialised(TorchFunctionMode):
    """Leaves normal_ out: on the meta device it would load half of torch's compiler, for nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.normal_ else func(*args, **kwargs or {})


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules that are made inside have shapes but no values: a trial of their arguments costs next to nothing."""
    with torch.device("meta"), _Uninitialised():
        yield
