"""Modes of networks, their moving averages, random states, and what becomes of freed memory."""

import contextlib
import ctypes
import platform
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8

# Modes of networks


@contextlib.contextmanager
def evaluating(network: nn.Module | Callable) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode that it had. A plain
    function, such as one that runs an exported model, has no modes.
    """
    if not isinstance(network, nn.Module):
        yield
        return
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
            # A compiled network would be compiled again, in pieces, for norms without momentum.
            with _training(norms), torch.compiler.set_stance("force_eager"):
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
    """The batch norms of a network that keep running statistics, but for frozen ones
    (utils/initial.py), whose statistics stay.
    """
    return [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.track_running_stats
        and not getattr(m, "frozen", False)
    ]


# Parts of networks that methods call rather than the whole
PARTS = ("encode", "decode", "both", "all")


def compile_parts(network: nn.Module, *args, **kwargs) -> None:
    """`torch.compile` of a network's forward pass and of each of `PARTS` that it has, in place, so
    that whatever of it a step runs is compiled. Further arguments: torch.compile's.
    """
    nn.Module.compile(network, *args, **kwargs)
    for name in PARTS:
        if hasattr(network, name):
            setattr(network, name, torch.compile(getattr(network, name), *args, **kwargs))


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


def copied(network: nn.Module) -> dict[str, Tensor]:
    """The state dict, which what happens to the network later does not change."""
    return {name: value.clone() for name, value in network.state_dict().items()}


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device; the copy from pinned memory is not waited for."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# Random states


def seed_everything(seed: int) -> None:
    """Seed torch on all devices: weights and stochastic losses draw from nothing else (data have
    own generators).
    """
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Torch's random states as tensors; weight initialisation and stochastic losses draw from no
    other.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(states: list[dict], rank: int = 0) -> None:
    """Restore what `rng_state` returned in the process `rank`, of the list of all processes.

    A process that is not in the list keeps its state; a different number of GPUs keeps that of the
    GPUs.
    """
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# Moving averages of networks


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


# Freed memory


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation; -> whether it does so now.

    glibc hands large blocks back to the system at once. On a CPU a training step frees and takes
    gigabytes, and the system clears each page anew: almost half of the time of a step of 4 patches
    of 96³ (benchmarks/distill_step.py with --give-back). The process then holds on to its peak of
    memory, which a training comes to in every step anyway. Call it before other threads allocate.
    Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}  # -1: never give back
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
