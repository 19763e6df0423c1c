"""LCOV-Net, a student of separated convolutions: 1x1x3, then 3x3x1, with a light attention gate
around them.

Source: the LCOV-Net variant among the ACF-BCKD students (812,848 parameters in use for one input
channel and 14 classes at the default width). It departs from the LCOV-Net release: first width 16,
last width 256, no convolution biases, no dropout, no deep supervision. State-dict names are those
of released checkpoints, see `alias_keys`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.blocks import check_input, check_widths
from networks.output import SegOutput


def _conv_norm_relu6(
    in_channels: int, out_channels: int, kernel: tuple[int, int, int], groups: int = 1
) -> nn.Sequential:
    """Convolution without bias that keeps the grid, batch norm, ReLU6 (in place on the norm's
    output: saves a map).
    """
    padding = tuple(k // 2 for k in kernel)
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, kernel, padding=padding, groups=groups, bias=False),
        nn.BatchNorm3d(out_channels),
        nn.ReLU6(inplace=True),
    )


class HalfPool(nn.Module):
    """`(B, C, H, W, D)` -> `(B, C, H/2, W/2, D/2)`, averaging 4x4x4 voxels, zeros outside counted;
    even sides.
    """

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 4:
            # PyTorch refuses sides below the kernel even where the padding makes up for it (input
            # sides of 16).
            return F.avg_pool3d(F.pad(x, (1,) * 6), 4, stride=2)
        return F.avg_pool3d(x, 4, stride=2, padding=1)


class AttentionBlock(nn.Module):
    """`(B, in_channels, H, W, D)` -> `(B, out_channels, H, W, D)`: a = 1x1x3(x), output 3x3x1(a) +
    gate(a) * a.

    The gate is computed at half resolution (sides must then be even), or with `bottleneck` at full
    resolution, where the 3x3x1 convolution is depthwise too.
    """

    def __init__(self, in_channels: int, out_channels: int, bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu6(in_channels, out_channels, (1, 1, 3))
        self.conv2_1 = _conv_norm_relu6(
            out_channels, out_channels, (3, 3, 1), groups=out_channels if bottleneck else 1
        )
        if bottleneck:
            # ReLU6 before the sigmoid keeps this gate in [0.5, 0.998]: so in the original, and in
            # its weights.
            self.conv2_2 = nn.Sequential(
                *_conv_norm_relu6(out_channels, out_channels, (1, 1, 1)), nn.Sigmoid()
            )
        else:
            self.conv2_2 = nn.Sequential(
                HalfPool(),
                nn.Conv3d(out_channels, out_channels, 1, bias=False),
                nn.BatchNorm3d(out_channels),
                nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
                nn.Sigmoid(),
            )

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x)
        return self.conv2_1(a) + self.conv2_2(a) * a


class Up(nn.Module):
    """`(B, in_channels, H, W, D)` -> `(B, out_channels, 2H, 2W, 2D)`: 1x1x1 convolution, then
    trilinear.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv_norm_relu6(in_channels, out_channels, (1, 1, 1))
        self.upsample = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.conv(x))


class LCOVNet(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    16.

    `allocate_unused` adds the three deep-supervision heads that released checkpoints hold and no
    forward pass uses.
    """

    dims = 3
    stride = 16
    encoder_parts = (
        *("Encode_block1", "Encode_block2", "Encode_block3", "Encode_block4"),
        "Encode_BottleNeck_block5",
    )
    unused_keys = (r"^segout[123]\.weight$",)
    # Released checkpoints hold each `Up` convolution under two names.
    alias_keys = ((r"^(up[1-4])\.conv1\.", r"\1.conv."),)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        allocate_unused: bool = False,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = check_widths("lcovnet", channels, 5)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {
            "stage1": c2,
            "stage2": c3,
            "stage3": c4,
            "stage4": c5,
            "stage5": c3,
            "stage6": c2,
            "stage7": c1,
            "penultimate": c1,
            "decoder": c1,
            "acf": c1,
        }
        self.Encode_block1 = AttentionBlock(in_channels, c1)
        self.Encode_block2 = AttentionBlock(c1, c2)
        self.Encode_block3 = AttentionBlock(c2, c3)
        self.Encode_block4 = AttentionBlock(c3, c4)
        self.Encode_BottleNeck_block5 = AttentionBlock(c4, c5, bottleneck=True)
        self.up1, self.Decode_block1 = Up(c5, c4), AttentionBlock(2 * c4, c4)
        self.up2, self.Decode_block2 = Up(c4, c3), AttentionBlock(2 * c3, c3)
        self.up3, self.Decode_block3 = Up(c3, c2), AttentionBlock(2 * c2, c2)
        self.up4, self.Decode_block4 = Up(c2, c1), AttentionBlock(2 * c1, c1)
        self.segout4 = nn.Conv3d(c1, num_classes, 1, bias=False)
        self.pool = nn.MaxPool3d(2)
        if allocate_unused:
            self.segout1 = nn.Conv3d(c4, num_classes, 1, bias=False)
            self.segout2 = nn.Conv3d(c3, num_classes, 1, bias=False)
            self.segout3 = nn.Conv3d(c2, num_classes, 1, bias=False)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("lcovnet", image, self.in_channels, self.stride)
        encode1 = self.Encode_block1(image)
        encode2 = self.Encode_block2(self.pool(encode1))
        encode3 = self.Encode_block3(self.pool(encode2))
        encode4 = self.Encode_block4(self.pool(encode3))
        bottom = self.Encode_BottleNeck_block5(self.pool(encode4))
        decode1 = self.Decode_block1(torch.cat([self.up1(bottom), encode4], dim=1))
        decode2 = self.Decode_block2(torch.cat([self.up2(decode1), encode3], dim=1))
        decode3 = self.Decode_block3(torch.cat([self.up3(decode2), encode2], dim=1))
        decode4 = self.Decode_block4(torch.cat([self.up4(decode3), encode1], dim=1))
        logits = self.segout4(decode4)
        if not return_features:
            return logits
        # The full-resolution first encoder and the 1/8 decoder block are left out, so that the
        # stages lie on the grids of the U-Net's (1/2, 1/4, 1/8, bottleneck, 1/4, 1/2, 1).
        return SegOutput(
            logits,
            {
                "stage1": encode2,
                "stage2": encode3,
                "stage3": encode4,
                "stage4": bottom,
                "stage5": decode2,
                "stage6": decode3,
                "stage7": decode4,
                "penultimate": decode4,
                "decoder": decode4,
                "acf": decode4,
            },
        )
