"""Modes of networks: evaluation, statistics of batch norm, and making them without values."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
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
    """Batch norms inside the block normalise by the batch, as in training, and leave their running
    statistics alone.

    For perturbed views: their statistics are not those of the clean images that the network will be
    used on.
    """
    norms = running_norms(network)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def statistics_estimated(
    network: nn.Module,
    see_images: Callable[[], None],
    average: Callable[[list[Tensor]], None] = lambda _: None,
) -> Iterator[None]:
    """Inside the block the running statistics of batch norms are those of clean images under the
    present weights; afterwards they are what they were.

    Running statistics are a moving average over the weights of many steps and lag behind the
    present ones (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3). Each layer
    gets the mean over the batches of the batch's mean and unbiased variance, with everything else
    of the network in evaluation mode. Layers that see no image keep theirs. see_images: calls the
    network on each batch; not called where there is no batch norm. average: replaces the tensors of
    a list by their means over all processes, each of which sees images of its own.
    """
    norms = running_norms(network)
    if not norms:
        yield
        return
    before = [
        (norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone())
        for norm in norms
    ]
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(network), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
            with _training(norms):
                see_images()
        for norm, statistics in zip(norms, before):
            if not norm.num_batches_tracked:
                _set_statistics(norm, statistics)
        average([values for norm in norms for values in (norm.running_mean, norm.running_var)])
        yield
    finally:
        for norm, momentum, statistics in zip(norms, momenta, before):
            norm.momentum = momentum
            _set_statistics(norm, statistics)


def _set_statistics(norm: nn.Module, values: tuple[Tensor, Tensor, Tensor]) -> None:
    for own, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), values):
        own.copy_(value)


@contextlib.contextmanager
def _training(modules: list[nn.Module]) -> Iterator[None]:
    """Training mode of some modules of a network that is in evaluation mode."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def running_norms(network: nn.Module) -> list[nn.Module]:
    """The batch norms of a network that keep running statistics."""
    return [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]


class _Uninitialised(TorchFunctionMode):
    """Leaves normal_ out: on the meta device it would load half of torch's compiler, for
    nothing.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.normal_ else func(*args, **kwargs or {})


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Modules that are made inside have shapes but no values: a trial of their arguments costs next
    to nothing.
    """
    with torch.device("meta"), _Uninitialised():
        yield
