"""Shares of several processes, averages over them, and that one process is left alone."""

import importlib
import math
import os
import socket
import sys
import weakref

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from dataloaders.samplers import DrawSampler
from utils.config import ConfigError
from utils.distributed import World, join_world


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world, device = join_world("cpu")
    assert world == World() and world.main and device == "cpu"
    parameter = nn.Parameter(torch.ones(2))
    world.average_gradients([parameter])
    assert parameter.grad is None
    norm = nn.BatchNorm2d(1)
    assert world.synchronised(norm, torch.device("cuda")) is norm
    assert (
        world.gathered(3) == [3]
        and world.merged([1, 2]) == [1, 2]
        and world.part("abc") == list("abc")
    )
    assert world.means({"a": math.nan})["a"] != world.means({"a": 1.0})["a"]
    assert world.any(True) and not world.any(False) and world.launcher == ["python"]
    with world.main_first():
        world.wait()
    world.leave()


def test_shares():
    worlds = [World(rank, 3) for rank in range(3)]
    assert [world.part(range(7)) for world in worlds] == [[0, 3, 6], [1, 4], [2, 5]]
    assert {world.share(12, "batch") for world in worlds} == {4}
    assert [world.main for world in worlds] == [True, False, False]
    assert worlds[0].launcher == ["torchrun", "--nproc_per_node=3"]
    with pytest.raises(
        ConfigError, match="batch: 4 cannot be shared by 3 processes; make it a multiple"
    ):
        worlds[1].share(4, "batch")


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_processes_share_the_draws_of_one(size):
    """Batch by batch, the parts in the order of the processes are the batch of one process."""
    whole = list(DrawSampler(5, 7, 12, 36, stream=1))
    parts = [list(DrawSampler(5, 7, 12, 36, 1, 6, rank, size)) for rank in range(size)]
    assert (
        {len(part) for part in parts}
        == {len(DrawSampler(5, 7, 12, 36, 1, 6, 0, size))}
        == {24 // size}
    )
    each = 6 // size
    again = [draw for k in range(4) for part in parts for draw in part[k * each : (k + 1) * each]]
    assert again == whole


@pytest.mark.parametrize("start, batch, size", [(0, 4, 3), (2, 4, 2)])
def test_draws_that_cannot_be_shared(start, batch, size):
    with pytest.raises(ValueError, match="cannot share batches"):
        DrawSampler(5, 7, start, 36, 0, batch, 0, size)


def join(rank, port):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    return join_world("cpu")


def process(rank, port, folder):
    world, device = join(rank, port)
    assert world == World(rank, 2, rank) and device == "cpu"
    assert world.gathered({"x": torch.tensor(rank)}) == [
        {"x": torch.tensor(0)},
        {"x": torch.tensor(1)},
    ]
    assert world.merged(world.part([10, 11, 12])) == [10, 11, 12]
    means = world.means({"a": float(rank), "b": math.nan if rank else 4.0, "c": math.nan})
    assert means["a"] == 0.5 and means["b"] == 4.0 and math.isnan(means["c"])
    assert world.any(rank == 1) and not world.any(False)

    first, second, unused = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (5,), (1,)))
    first.grad, second.grad = torch.full((2, 3), float(rank)), torch.arange(5.0) * (1 - rank)
    if rank:
        unused.grad = torch.ones(1)
    world.average_gradients([first, second, unused])
    assert torch.equal(first.grad, torch.full((2, 3), 0.5))
    assert torch.equal(second.grad, torch.arange(5.0) / 2) and unused.grad.item() == 0.5

    norm = nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm2d(2))
    norm[0].running_mean += rank
    world.average_statistics(norm)
    assert torch.equal(norm[0].running_mean, torch.full((2,), 0.5))
    with world.main_first():
        if rank:
            assert (folder / "made").exists()
        else:
            (folder / "made").touch()
    world.leave()


def late_import(rank, port):
    assert "torch._dynamo" not in sys.modules
    world, _ = join(rank, port)
    group = weakref.ref(torch.distributed.group.WORLD)
    # the first optimiser and the counter of operations import it too
    importlib.import_module("torch._dynamo")
    assert world.any(rank == 1) and group() is not None
    world.leave()
    assert group() is None, (
        "the process group outlives its destruction: its threads can abort the process at its end"
    )


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes(tmp_path, port):
    mp.spawn(process, args=(port, tmp_path), nprocs=2)


def test_nothing_of_the_group_is_left(port):
    mp.spawn(late_import, args=(port,), nprocs=2)
