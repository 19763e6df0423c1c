"""2D U-Net of the SSL4MIS lineage, the network of semi-supervised slices and images: four poolings,
bilinear decoder.

Source: the `UNet` of SSL4MIS and UniMatch and the `UNet_KD` of CRKD, which are one network:
1,813,764 parameters for one input channel and 4 classes. `UNet_KD` holds one more convolution,
which no forward pass uses (`released_layout`). State-dict names are those of released checkpoints.
Departures from the released forward passes: the dropout that perturbs the features is an argument
of each call, and features are returned only when asked for.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.blocks import check_input, check_widths, drop_channels
from networks.output import SegOutput
from utils.modes import compile_parts


class ConvBlock(nn.Module):
    """Convolution 3x3, batch norm, leaky ReLU, elementwise dropout, then the first three again."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_conv(x)


class Down(nn.Module):
    """Maximum over 2x2 windows, then a ConvBlock."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2), ConvBlock(in_channels, out_channels, dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Convolution 1x1 to the skip's width, bilinear upsampling by 2, ConvBlock on [skip,
    upsampled]; no dropout.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv = ConvBlock(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.conv1x1(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.conv(torch.cat([skip, x], dim=1))


class Encoder(nn.Module):
    """`(B, in_channels, H, W)` -> five maps on the grids of H, H/2, H/4, H/8 and H/16."""

    def __init__(self, in_channels: int, channels: Sequence[int], dropout: Sequence[float]) -> None:
        super().__init__()
        self.in_conv = ConvBlock(in_channels, channels[0], dropout[0])
        self.down1 = Down(channels[0], channels[1], dropout[1])
        self.down2 = Down(channels[1], channels[2], dropout[2])
        self.down3 = Down(channels[2], channels[3], dropout[3])
        self.down4 = Down(channels[3], channels[4], dropout[4])

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.in_conv(image)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            features.append(down(features[-1]))
        return features


class Decoder(nn.Module):
    """The encoder's five maps -> logits and the four decoder maps on the grids of H/8, H/4, H/2 and
    H.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], released_layout: bool) -> None:
        super().__init__()
        self.up1 = Up(channels[4], channels[3])
        self.up2 = Up(channels[3], channels[2])
        self.up3 = Up(channels[2], channels[1])
        self.up4 = Up(channels[1], channels[0])
        self.out_conv = nn.Conv2d(channels[0], num_classes, 3, padding=1)
        if released_layout:
            self.feats_conv_16 = nn.Conv2d(channels[0], channels[4], 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        *skips, x = features
        maps = []
        for up, skip in zip((self.up1, self.up2, self.up3, self.up4), reversed(skips)):
            x = up(x, skip)
            maps.append(x)
        return self.out_conv(x), maps


class UNet2D(nn.Module):
    """`(B, in_channels, H, W)` -> logits `(B, num_classes, H, W)`; sides must be multiples of 16.

    channels, dropout: width and dropout probability of the five encoder blocks. `released_layout`
    adds the convolution that released `UNet_KD` checkpoints hold and no forward pass uses; with it
    they load strictly.
    """

    dims = 2
    stride = 16
    encoder_parts = ("encoder",)
    unused_keys = (r"^decoder\.feats_conv_16\.(weight|bias)$",)
    alias_keys: tuple[tuple[str, str], ...] = ()
    compile = compile_parts

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
        released_layout: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != 5 or len(dropout) != 5:
            raise ValueError(
                f"unet2d: channels and dropout need one value for each of the five encoder blocks, "
                f"got {tuple(channels)} and {tuple(dropout)}"
            )
        c0, c1, c2, c3, c4 = check_widths("unet2d", channels, 5)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {
            "stage1": c1,
            "stage2": c2,
            "stage3": c3,
            "stage4": c4,
            "stage5": c2,
            "stage6": c1,
            "stage7": c0,
            "penultimate": c0,
            "decoder": c0,
            "acf": c0,
        }
        self.encoder = Encoder(in_channels, channels, dropout)
        self.decoder = Decoder(num_classes, channels, released_layout)

    drop = staticmethod(drop_channels)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Image -> the five encoder maps, largest grid first."""
        check_input("unet2d", image, self.in_channels, self.stride, dims=2)
        return self.encoder(image)

    def decode(self, features: Sequence[Tensor]) -> SegOutput:
        """Five encoder maps, of any batch size (so of several perturbed copies at once) -> logits
        and all taps.
        """
        logits, (_, up2, up3, up4) = self.decoder(features)
        return SegOutput(
            logits,
            {
                "stage1": features[1],
                "stage2": features[2],
                "stage3": features[3],
                "stage4": features[4],
                "stage5": up2,
                "stage6": up3,
                "stage7": up4,
                "penultimate": up4,
                "decoder": up4,
                "acf": up4,
            },
        )

    def forward(
        self, image: Tensor, return_features: bool = False, perturb: float = 0.0
    ) -> Tensor | SegOutput:
        """perturb: probability with which each channel of each encoder map is zeroed before the
        decoder, in training and evaluation mode alike; the taps `stage1` .. `stage4` are then the
        perturbed maps.
        """
        features = self.encode(image)
        output = self.decode(drop_channels(features, perturb) if perturb else features)
        return output if return_features else output.logits
