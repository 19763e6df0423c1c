"""Sums over voxels, taken chunk by chunk on the CPU: the same values and gradients, with far less
memory traffic.

A voxel-wise loss written in whole-tensor operations reads and writes every logit dozens of times. A
few thousand voxels at a time, all intermediate results stay in the processor's cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 18  # of the logits: 1 MB of float32, about a second-level cache


def voxel_chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """Sample and range of voxels of each chunk of (B, K, *spatial) logits; on a GPU a sample is one
    chunk.
    """
    voxels = logits[0, 0].numel()
    step = max(1, CHUNK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else voxels
    for sample in range(len(logits)):
        for start in range(0, voxels, step):
            yield sample, slice(start, min(start + step, voxels))


def voxel_sums(function: Callable[..., Tensor], logits: Tensor, *constants: Tensor) -> Tensor:
    """`function(logits, *constants)`, where that is a vector (T,) of sums over samples and voxels;
    (T,) float32.

    logits: (B, K, *spatial). constants: (B, C, *spatial), any dtype, no gradient. On the CPU the
    function gets chunks (1, K, n) and (1, C, n) and has a first derivative only; several sums are
    evaluated again in the backward pass.
    """
    constants = tuple(constant.detach() for constant in constants)
    if logits.device.type != "cpu":
        return function(logits, *constants)
    return _VoxelSums.apply(function, logits, *constants)


def _pick(tensor: Tensor, sample: int, voxels: slice) -> Tensor:
    return tensor[sample : sample + 1].flatten(2)[:, :, voxels].contiguous()


class _VoxelSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, logits, *constants):
        total, gradient = 0.0, None
        single = ctx.needs_input_grad[1]  # until a chunk shows that there are several sums
        for sample, voxels in voxel_chunks(logits):
            leaf, *others = (_pick(tensor, sample, voxels) for tensor in (logits, *constants))
            if single:
                leaf = leaf.float().requires_grad_()
            with torch.set_grad_enabled(single):
                sums = function(leaf, *others)
            single = single and sums.numel() == 1
            if single:
                # The gradient of one sum is known but for a factor: taking it now saves the second
                # evaluation.
                if gradient is None:
                    gradient = torch.empty(logits.shape, dtype=torch.float32)
                gradient[sample].flatten(1)[:, voxels] = torch.autograd.grad(sums, leaf)[0][0]
            total = total + sums.detach().double()
        ctx.single, ctx.function, ctx.dtype = single, function, logits.dtype
        ctx.save_for_backward(*([gradient] if single else [logits, *constants]))
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.single:
            (gradient,) = ctx.saved_tensors
            return None, (gradient * grad).to(ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 2)
        logits, *constants = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for sample, voxels in voxel_chunks(logits):
            with torch.enable_grad():
                leaf = _pick(logits.detach(), sample, voxels).requires_grad_()
                sums = ctx.function(
                    leaf, *(_pick(constant, sample, voxels) for constant in constants)
                )
            (part,) = torch.autograd.grad(sums, leaf, grad)
            gradient[sample].flatten(1)[:, voxels] = part[0]
        return None, gradient, *[None] * len(constants)
