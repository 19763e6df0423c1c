"""Exact squared Euclidean distance transforms of binary masks, in voxels.

Three paths with the same values: on the CPU a compiled separable transform, one mask per thread; on
a GPU a Triton kernel (losses/distance_gpu.py); where Triton is missing or does not work, and on
other devices, a separable min-plus transform in plain torch. The latter two handle all masks at
once and never leave the device.
"""

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from utils.compiled import compiled


def boundary_distance_squared(mask: Tensor, *more: Tensor) -> Tensor:
    """Squared distance of every voxel to the nearest voxel of the other kind: EDT(m)^2 + EDT(not
    m)^2.

    mask: (N, *spatial) bool, spatial 2D or 3D, unit spacing. Returns float32 of the same shape, no
    gradient.
    more: further masks of that shape; the fields of all are summed.
    A mask that is all False or all True has no boundary; its field is 0 (the convention of
    Hausdorff-DT losses).
    """
    with torch.no_grad():
        if mask.device.type == "cpu":
            return _with_numba(mask, *more)
        if mask.device.type == "cuda":
            with torch.cuda.device(mask.device):  # where Triton launches
                transform = _gpu_transform()
                return sum((transform(m) for m in more), transform(mask))
        return sum(
            (separable_boundary_distance_squared(m) for m in more),
            separable_boundary_distance_squared(mask),
        )


@functools.cache
def _gpu_transform() -> Callable[[Tensor], Tensor]:
    """The Triton kernel, or plain torch where that fails on a small mask: it needs Triton and a C
    compiler.
    """
    torch.cuda.synchronize()  # an error of something before is not Triton's
    try:
        from losses.distance_gpu import triton_boundary_distance_squared

        triton_boundary_distance_squared(torch.zeros(1, 2, 2, 2, dtype=torch.bool, device="cuda"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind: an import, a compiler, a driver
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            "distance transforms run in plain torch, many times as slow as the Triton kernel, "
            "which fails here "
            f"({type(error).__name__}: {reason}); it needs the package triton and a C compiler",
            stacklevel=2,
        )
        return separable_boundary_distance_squared
    return triton_boundary_distance_squared


def _with_numba(*masks: Tensor) -> Tensor:
    field = torch.zeros(masks[0].shape, dtype=torch.float32)
    grid = (*[1] * (4 - field.ndim), *field.shape[1:])  # a 2D mask is one plane
    stacks = [mask.contiguous().numpy() for mask in masks]

    def add_fields(index: int) -> None:
        target = field[index].view(grid).numpy()
        for stack in stacks:
            _add_field(stack[index].reshape(grid), target)

    # the compiled code runs outside Python's lock
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(add_fields, range(len(field))))
    return field


@compiled
def _add_field(mask, field):
    """Add the squared distances of one bool `mask` (X, Y, Z) to the float32 `field`; 0 if all
    voxels are of a kind.

    One axis after the other. Along the last, every line that has a voxel of the searched kind gets
    finite distances everywhere; so only such lines, and then such planes, are candidates along the
    other two axes, and a small object costs little. Those two axes are worked through in whole
    lines, which compilers turn into vector instructions.
    """
    num_x, num_y, num_z = mask.shape
    squares = np.empty((num_x, num_y, num_z), np.int32)  # within a plane of constant x
    sources = np.empty((max(num_x, num_y), num_z), np.int32)
    best = np.empty(num_z, np.int32)
    rows, planes = np.empty(num_y, np.int64), np.empty(num_x, np.int64)
    for kind in (True, False):  # distances to True fill the False voxels, and the other way round
        num_planes = 0
        for x in range(num_x):
            num_rows = 0
            for y in range(num_y):
                line = mask[x, y]
                count = 0
                for z in range(num_z):
                    count += line[z] == kind
                if count == 0:
                    continue
                row = sources[num_rows]
                rows[num_rows] = y
                num_rows += 1
                if count == num_z:
                    row[:] = 0
                    continue
                distance = num_z
                for z in range(num_z):
                    distance = 0 if line[z] == kind else distance + 1
                    row[z] = distance
                distance = num_z
                for z in range(num_z - 1, -1, -1):
                    distance = min(row[z], distance + 1)
                    row[z] = distance * distance
            if num_rows:
                planes[num_planes] = x
                num_planes += 1
                for y in range(num_y):
                    _nearest(sources, rows, num_rows, y, squares[x, y])
        for y in range(num_y):
            for index in range(num_planes):
                sources[index] = squares[planes[index], y]
            for x in range(num_x if num_planes else 0):
                _nearest(sources, planes, num_planes, x, best)
                target = field[x, y]
                for z in range(num_z):
                    target[z] += best[z]


@njit(nogil=True)
def _nearest(sources, places, count, at, best):
    """best[z] = min over the first `count` i of sources[i, z] + (places[i] - at)^2; places ascend.

    The nearest places come first; the search ends where the offset alone exceeds every minimum
    found.
    """
    best[:] = np.int32(1 << 30)
    above = 0
    while above < count and places[above] < at:
        above += 1
    below = above - 1
    while below >= 0 or above < count:
        if above >= count or (below >= 0 and at - places[below] <= places[above] - at):
            index = below
            below -= 1
        else:
            index = above
            above += 1
        cost = np.int32((places[index] - at) ** 2)
        source = sources[index]
        worst = np.int32(0)
        for z in range(best.shape[0]):
            value = min(np.int32(source[z] + cost), best[z])
            best[z] = value
            worst = max(worst, value)
        ahead = 1 << 60  # squared offset of the next place
        if below >= 0:
            ahead = (at - places[below]) ** 2
        if above < count:
            ahead = min(ahead, (places[above] - at) ** 2)
        if ahead >= worst:
            break


def separable_boundary_distance_squared(mask: Tensor) -> Tensor:
    """As `boundary_distance_squared`, in plain torch on any device; O(side) shifted minima per
    axis, exact.
    """
    spatial = mask.shape[1:]
    # Larger than any squared distance, and small enough for float32 to hold every sum below
    # exactly.
    far = float(sum(size * size for size in spatial) + 1)
    # 0 on the voxels that are searched for
    distance = torch.stack([mask, ~mask]).to(torch.float32).mul_(far)
    for axis in range(2, distance.ndim):
        nearest = distance.clone()
        size = distance.shape[axis]
        for offset in range(1, size):
            kept = size - offset
            cost = float(offset * offset)
            ahead, behind = nearest.narrow(axis, 0, kept), nearest.narrow(axis, offset, kept)
            torch.minimum(ahead, distance.narrow(axis, offset, kept) + cost, out=ahead)
            torch.minimum(behind, distance.narrow(axis, 0, kept) + cost, out=behind)
        distance = nearest
    field = distance.sum(0)  # at each voxel one of the two is 0
    flat = mask.flatten(1)
    bounded = flat.any(1) & ~flat.all(1)
    return field * bounded.view(-1, *[1] * len(spatial))
