"""Sliding-window prediction of whole volumes."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy import ndimage
from torch import Tensor, nn

AMP_MODES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Autocast context for `amp` in 'off', 'bf16', 'fp16'."""
    if amp not in AMP_MODES:
        raise ValueError(f"amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    dtype = AMP_MODES[amp]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode that it had."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    stride: Sequence[int] | None = None,
    window_batch: int = 4,
    amp: str = "off",
    tta: bool = False,
    probabilities: bool = False,
) -> Tensor:
    """Logits (K, H, W, D), float32, of one image (C, H, W, D), on the image's device.

    Windows of `patch_size` that overlap by the fraction `overlap` are averaged with equal weight (the papers'
    protocol); a volume smaller than a window is padded with zeros, so any size can be segmented. stride: voxels from
    one window to the next along each axis, in place of `overlap`; the last window ends where the volume does. The
    network runs where its weights are. tta: mean over the eight mirrored copies. probabilities: average the softmax of
    the windows instead of the logits (the protocol of the left-atrium tables) and return that.
    """
    device = next(network.parameters()).device
    if stride is not None:
        if len(stride) != len(patch_size) or any(not 0 < s <= p for s, p in zip(stride, patch_size)):
            raise ValueError(f"stride {tuple(stride)} must lie in 1 .. patch_size {tuple(patch_size)} along each axis")
        # MONAI steps by int(side * (1 - overlap)); half a voxel more keeps that from being rounded down.
        overlap = tuple(max(0.0, 1 - (s + 0.5) / p) for s, p in zip(stride, patch_size))

    def forward(window: Tensor) -> Tensor:
        with autocast(device, amp):
            logits = network(window.contiguous()).float()
        return logits.softmax(1) if probabilities else logits

    def windows(volume: Tensor) -> Tensor:
        return sliding_window_inference(
            volume, tuple(patch_size), window_batch, forward, overlap=overlap, mode="constant",
            padding_mode="constant", sw_device=device, device=volume.device,
        )  # fmt: skip

    with _evaluating(network):
        volume = image[None]
        if not tta:
            return windows(volume)[0]
        total = None
        for code in range(8):
            axes = [axis + 2 for axis in range(3) if code >> axis & 1]
            logits = windows(volume.flip(axes)).flip(axes) if axes else windows(volume)
            total = logits if total is None else total.add_(logits)
        return total[0] / 8


@torch.inference_mode()
def predict_slices(network: nn.Module, slices: Tensor, *, batch: int = 16, amp: str = "off") -> Tensor:
    """Ids (N, H, W) uint8 on the CPU of images (N, C, H, W), whose sides the network's stride divides."""
    device = next(network.parameters()).device
    with _evaluating(network):
        ids = []
        for part in slices.split(batch):
            with autocast(device, amp):
                logits = network(part.to(device))
            ids.append(logits.argmax(1).to(torch.uint8).cpu())
    return torch.cat(ids)


def to_labels(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Logits (K, *spatial) -> ids (*spatial) uint8 by argmax, or regions (K, *spatial) uint8 by sigmoid >= 0.5."""
    return (logits >= 0).to(torch.uint8) if multilabel else logits.argmax(0).to(torch.uint8)


def largest_component(ids: np.ndarray) -> np.ndarray:
    """Ids (*spatial) with 0 everywhere but in the largest component of the foreground; voxels touch by corners too."""
    components, count = ndimage.label(ids > 0, structure=np.ones((3,) * ids.ndim))
    if count < 2:
        return ids
    sizes = np.bincount(components.ravel())[1:]
    return np.where(components == 1 + sizes.argmax(), ids, 0).astype(ids.dtype)
