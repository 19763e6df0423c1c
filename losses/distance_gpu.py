"""The separable distance transform of losses/distance.py as a Triton kernel. Triton comes with
PyTorch's GPU builds.

Shifted minima in plain torch read and write every map twice per offset, hundreds of times in all;
the kernel keeps the minima in registers and writes a map once per axis. Importing this module fails
where Triton is missing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES, LINES = 32, 64  # of a tile: voxels along the axis, and lines beside each other


@triton.jit
def _lower_envelope(
    source,
    target,
    length,
    inner,
    lines,
    wanted,
    FIRST: tl.constexpr,
    PLACES: tl.constexpr,
    LINES: tl.constexpr,
):
    """target[v] = min over u of source[u] + (v - u)^2 along every line of `length` voxels, `inner`
    apart.

    FIRST: `source` is the mask as bytes, and stands for 0 where it is `wanted`, for infinity
    elsewhere.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    inside = line < lines
    begin = line // inner * (length * inner) + line % inner
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    best = tl.full([PLACES, LINES], float("inf"), tl.float32)
    for u in range(length):
        if FIRST:
            row = tl.where(
                tl.load(source + begin + u * inner, mask=inside, other=0) == wanted,
                0.0,
                float("inf"),
            )
        else:
            row = tl.load(source + begin + u * inner, mask=inside, other=0.0)
        offset = (place - u).to(tl.float32)
        best = tl.minimum(best, row[None, :] + (offset * offset)[:, None])
    where = begin[None, :] + place.to(tl.int64)[:, None] * inner
    tl.store(target + where, best, mask=inside[None, :] & (place < length)[:, None])


def triton_boundary_distance_squared(mask: Tensor) -> Tensor:
    """As `boundary_distance_squared` of losses/distance.py, for a mask (N, *spatial) bool on the
    current GPU.
    """
    mask = mask.contiguous()
    source, field = mask.view(torch.uint8), None
    for wanted in (1, 0):  # distances to True fill the False voxels, and the other way round
        nearest, inner = source, mask.numel() // len(mask) if len(mask) else 1
        for axis, length in enumerate(mask.shape[1:]):
            inner //= length
            lines = mask.numel() // length
            result = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
            grid = (triton.cdiv(lines, LINES), triton.cdiv(length, PLACES))
            _lower_envelope[grid](
                nearest,
                result,
                length,
                inner,
                lines,
                wanted,
                FIRST=axis == 0,
                PLACES=PLACES,
                LINES=LINES,
            )
            nearest = result
        # Without a voxel of the kind all distances are infinite: there is no boundary, and the
        # field is 0.
        nearest = torch.where(nearest.isinf(), 0.0, nearest)
        field = nearest if field is None else field.add_(nearest)
    return field
