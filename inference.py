"""Sliding-window prediction of whole volumes."""

import contextlib
from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

AMP_MODES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Autocast context for `amp` in 'off', 'bf16', 'fp16'."""
    if amp not in AMP_MODES:
        raise ValueError(f"amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    dtype = AMP_MODES[amp]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    window_batch: int = 4,
    amp: str = "off",
    tta: bool = False,
) -> Tensor:
    """Logits (K, H, W, D), float32, of one image (C, H, W, D), on the image's device.

    Windows of `patch_size` that overlap by the fraction `overlap` are averaged with equal weight (the papers'
    protocol); a volume smaller than a window is padded with zeros, so any size can be segmented. The network runs where
    its weights are. tta: mean over the eight mirrored copies.
    """
    device = next(network.parameters()).device

    def forward(window: Tensor) -> Tensor:
        with autocast(device, amp):
            return network(window.contiguous()).float()

    def windows(volume: Tensor) -> Tensor:
        return sliding_window_inference(
            volume, tuple(patch_size), window_batch, forward, overlap=overlap, mode="constant",
            padding_mode="constant", sw_device=device, device=volume.device,
        )  # fmt: skip

    was_training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        volume = image[None]
        if not tta:
            return windows(volume)[0]
        total = None
        for code in range(8):
            axes = [axis + 2 for axis in range(3) if code >> axis & 1]
            logits = windows(volume.flip(axes)).flip(axes) if axes else windows(volume)
            total = logits if total is None else total.add_(logits)
        return total[0] / 8
    finally:
        for module in was_training:
            module.training = True


def to_labels(logits: Tensor, multilabel: bool = False) -> Tensor:
    """Logits (K, *spatial) -> ids (*spatial) uint8 by argmax, or regions (K, *spatial) uint8 by sigmoid >= 0.5."""
    return (logits >= 0).to(torch.uint8) if multilabel else logits.argmax(0).to(torch.uint8)
