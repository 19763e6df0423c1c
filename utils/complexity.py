"""What a network costs: parameters, multiply-adds, latency and peak memory of one forward pass."""

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(net: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, buffers not counted; a parameter that two modules share counts once."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable_only)


def count_macs(net: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-adds of all (transposed) convolutions in one evaluation pass on an input of
    `input_shape` (B, C, ...).

    Convention of the ACF-BCKD tables: a convolution costs numel(output) * C_in / groups * kernel
    volume, a transposed one numel(input) * C_out / groups * kernel volume; biases, norms,
    activations and resizing cost nothing. Shapes alone are computed (meta device), so the size does
    not matter for the time.
    """
    shapes_only = copy.deepcopy(net).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shapes_only(torch.empty(tuple(input_shape), device="meta"))
    # The counter reports floating-point operations, two per multiply-add. Other operations it knows
    # (matrix products) are left out, as the convention says.
    convolutions = {torch.ops.aten.convolution, torch.ops.aten._convolution}
    return (
        sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in convolutions) // 2
    )


def measure_latency(
    net: nn.Module, input_shape: Sequence[int], repeats: int = 5, threads: int | None = None
) -> float:
    """Median time in ms of one evaluation pass on random input of `input_shape`, on the device that
    holds `net`.

    One pass before the timed ones pays for lazy initialisation. `threads` applies to the CPU and is
    restored after, as is the training mode of every module.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    device = next(net.parameters()).device
    image = torch.randn(tuple(input_shape), device=device)
    was_training = [module for module in net.modules() if module.training]
    threads_before = torch.get_num_threads()
    times = []
    try:
        torch.set_num_threads(threads or threads_before)
        net.eval()
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                net(image)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # kernels run on after the call returns
                times.append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads_before)
        for module in was_training:
            module.training = True
    return statistics.median(times[1:])


def peak_memory(
    make_network: Callable[[], nn.Module],
    input_shape: Sequence[int],
    threads: int | None = None,
    whole: bool = False,
) -> float:
    """MiB by which one evaluation pass raises the peak resident memory of a fresh process above
    input and weights.
    whole: above input and an idle process, so that weights count, and whatever `make_network` loads
    to run them.

    `make_network` builds the network there, so it must be picklable, say `functools.partial(UNet,
    1, 14)`. The figure is what the operating system saw: it includes the convolution library's
    scratch space and its one-off set-up (tens of MiB), so it varies by computer. Linux only; on a
    GPU use `torch.cuda.max_memory_allocated`.
    """
    if not Path("/proc/self/status").exists():
        raise RuntimeError(
            "peak_memory reads /proc/self/status, which this system lacks; it works on Linux only"
        )
    # a forked process could inherit a lock held by an OpenMP thread
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_forward_once, args=(make_network, tuple(input_shape), threads, whole, sender)
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(
            "the process that measures memory ended without an answer; its message is above"
        ) from error
    finally:
        process.join()


def _forward_once(
    make_network: Callable[[], nn.Module],
    input_shape: tuple[int, ...],
    threads: int | None,
    whole: bool,
    sender: Connection,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    image = torch.randn(input_shape)
    idle = _resident_mib("VmRSS")
    net = make_network().eval()
    before = idle if whole else _resident_mib("VmRSS")
    with torch.no_grad():
        net(image)
    sender.send(max(0.0, _resident_mib("VmHWM") - before))


def _resident_mib(field: str) -> float:
    """Resident memory of this process in MiB: now (`VmRSS`) or its peak (`VmHWM`).

    Not `getrusage`: its peak carries over from the parent process.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def saved_bytes(net: nn.Module, input_shape: Sequence[int]) -> int:
    """Bytes that a forward pass in training keeps for the backward one, without the parameters;
    float32.

    Counted on the meta device from what autograd saves, each memory once, so no memory and hardly
    any time is needed. Losses, gradients, optimiser states and scratch space come on top.
    """
    shapes_only = copy.deepcopy(net).to("meta").train().requires_grad_(True)
    parameters = {p.untyped_storage()._cdata for p in shapes_only.parameters()}
    # holds the storages, so that none is counted under the address of another that is gone
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shapes_only(torch.empty(tuple(input_shape), device="meta"))
    return sum(storage.nbytes() for storage in kept.values())
