"""Several processes train one network: each takes its share of every batch, and gradients are
averaged.

Started by torchrun, which sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process and
every function here does nothing. Batch sizes of a configuration are those of all processes
together, so that the number of processes changes neither the data order nor the meaning of a run.

Gradients are averaged after the backward pass, in few large pieces, rather than by
DistributedDataParallel: a step may run the network several times and in parts, and adapters of a
loss train along with it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.config import ConfigError

# Its functions have the process group of the moment of their import as a default argument. PyTorch
# imports it late, in the middle of a run, and would keep a group alive beyond its destruction: its
# threads then meet the interpreter's end, which now and then aborts the process after all its work
# is done. Imported here, before any group, it keeps none.
if dist.is_available():
    import torch.distributed.nn.functional

BUCKET = 32 * 2**20  # bytes of gradients that are averaged at once


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them: `rank` of `size`, `local_rank` on its
    machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def launcher(self) -> list[str]:
        """The words that start a script in as many processes on one machine."""
        return ["python"] if self.size == 1 else ["torchrun", f"--nproc_per_node={self.size}"]

    def part(self, items: Sequence) -> list:
        """Every size-th item, from this process's own place on; `merged` puts what comes of them in
        order again.
        """
        return list(items[self.rank :: self.size])

    def share(self, count: int, name: str) -> int:
        """A batch size of all processes -> that of each; ConfigError if it cannot be shared."""
        if count % self.size:
            raise ConfigError(
                f"{name}: {count} cannot be shared by {self.size} processes; make it a multiple"
            )
        return count // self.size

    def gathered(self, value: Any) -> list:
        """The values of all processes by rank, in all of them; tensors arrive on the CPU."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, _on_cpu(value))
        return values

    def merged(self, results: Sequence) -> list:
        """Lists that came of `part`, of all processes, in the order of the whole."""
        lists = self.gathered(list(results))
        return [
            values[k] for k in range(max(map(len, lists))) for values in lists if k < len(values)
        ]

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """Mean of each number over the processes in which it is not NaN."""
        if self.size == 1:
            return values
        every = self.gathered(values)
        known = {
            name: [v[name] for v in every if v.get(name) == v.get(name) and name in v]
            for name in values
        }
        return {
            name: sum(found) / len(found) if found else float("nan")
            for name, found in known.items()
        }

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Nothing waits for a GPU."""
        if self.size == 1:
            return flag
        total = torch.tensor([float(flag)])  # on the CPU
        dist.all_reduce(total)
        return bool(total.item())

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the main process, then in the others, which find its files."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each gradient by its mean over the processes; a parameter without one counts as
        zero.
        """
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() * g.element_size() for g in bucket) >= BUCKET:
                self.average(bucket)
                bucket = []
        self.average(bucket)

    def average_statistics(self, module: nn.Module) -> None:
        """Average the running means and variances of batch norms, so that all processes evaluate
        one network. Those of frozen norms are the same, to the last bit, and stay so.
        """
        if self.size == 1:
            return
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        norms = [m for m in norms if not getattr(m, "frozen", False)]
        self.average([s for m in norms for s in (m.running_mean, m.running_var) if s is not None])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, all in one message."""
        if not tensors or self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))

    def synchronised(self, module: nn.Module, device: torch.device) -> nn.Module:
        """On GPUs, batch norms that take their statistics over the batch of all processes. CPUs
        have none.
        """
        if self.size == 1 or device.type != "cuda":
            return module
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def leave(self) -> None:
        """Wait for the others and close the connections."""
        if self.size > 1 and dist.is_initialized():
            self.wait()
            dist.destroy_process_group()


def smallest_share(batch: int, device: str) -> int:
    """Items of a batch that batch norms see together, at least: all on GPUs, where they are
    synchronised, on CPUs those of one process. device: as given by the user.
    """
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return batch
    return max(1, batch // int(os.environ.get("WORLD_SIZE", "1")))


def join_world(device: str) -> tuple[World, str]:
    """Join the processes that torchrun started, if it did; -> the world, and the device of this
    process.

    device: as given by the user; 'auto' and 'cuda' mean the GPU of this process's local rank where
    there are GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(), device
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return world, device


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(item) for item in value)
    return value
