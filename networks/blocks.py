"""Building blocks, weight initialisation and input checks that several networks share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, ResidualUnit
from torch import Tensor, nn


def conv_unit(
    in_channels: int, out_channels: int, stride: int = 1, conv_only: bool = False
) -> Convolution:
    """3x3x3 convolution, then instance norm (no affine) and PReLU unless `conv_only`. State dict:
    `conv.*`, `adn.A`.
    """
    return Convolution(
        3, in_channels, out_channels, strides=stride, kernel_size=3, conv_only=conv_only
    )


def up_unit(in_channels: int, out_channels: int, conv_only: bool = False) -> Convolution:
    """3x3x3 transposed convolution that doubles each axis, then instance norm and PReLU unless
    `conv_only`.
    """
    return Convolution(
        3,
        in_channels,
        out_channels,
        strides=2,
        kernel_size=3,
        is_transposed=True,
        conv_only=conv_only,
    )


def residual_unit(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    subunits: int = 2,
    last_conv_only: bool = False,
) -> ResidualUnit:
    """`subunits` convolution units plus a residual path; no activation after the sum."""
    return ResidualUnit(
        3,
        in_channels,
        out_channels,
        strides=stride,
        subunits=subunits,
        last_conv_only=last_conv_only,
    )


def init_weights(module: nn.Module) -> nn.Module:
    """Initialise as the ACF-BCKD recipe does, in place: convolutions Kaiming-normal (fan out,
    ReLU), biases 0, batch norms 1 and 0. PReLU slopes and group norms keep their defaults. Draws
    from torch's global generator.

    With PyTorch's default initialisation the small students learn several times more slowly.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


def check_widths(name: str, widths: Sequence[int], count: int) -> Sequence[int]:
    """`widths`, the channels of the stages of network `name`; ValueError unless they are `count`
    positive numbers.
    """
    if len(widths) != count or min(widths) < 1:
        raise ValueError(
            f"{name}: expected {count} channel numbers of at least 1, got {list(widths)}"
        )
    return widths


def drop_channels(features: Sequence[Tensor], probability: float) -> list[Tensor]:
    """Zero whole channels of each map (B, C, *spatial), each with `probability`, and scale the rest
    by 1 / (1 - p).

    Every map and sample draws on its own. Active whatever mode a network is in. Draws from torch's
    global generator.
    """
    drop = {4: F.dropout2d, 5: F.dropout3d}
    return [drop[feature.ndim](feature, probability, training=True) for feature in features]


def check_input(
    name: str, image: Tensor, in_channels: int, stride: int | Sequence[int], dims: int = 3
) -> None:
    """Raise ValueError unless `image` is `(B, in_channels, H, W, D)` with every side a multiple of
    `stride`, or of its own number in it.

    dims: 3, or 2 for images `(B, in_channels, H, W)`.
    Under torch.compile or export the sizes are symbols, not numbers, so the check is left out
    there.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if image.ndim != dims + 2 or image.shape[1] != in_channels:
        raise ValueError(
            f"{name}: expected an image of shape (B, {in_channels}, {', '.join('HWD'[:dims])}), "
            "got "
            f"{tuple(image.shape)}; check in_channels in the configuration"
        )
    strides = (stride,) * dims if isinstance(stride, int) else tuple(stride)
    if any(size % step for size, step in zip(image.shape[2:], strides)):
        shown = strides[0] if len(set(strides)) == 1 else strides
        raise ValueError(
            f"{name}: every side of the input must be a multiple of {shown}, got "
            f"{tuple(image.shape[2:])}; "
            f"choose such a patch_size (sliding-window inference pads whole volumes by itself)"
        )
