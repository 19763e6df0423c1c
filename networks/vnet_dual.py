"""V-Nets with one encoder and two decoders, which differ in how they upsample: the networks of
MLRPL and of LeFeD.

Source: the two-decoder V-Net of MLRPL (12,347,716 parameters for one input channel and two classes)
and the network of LeFeD (12,348,718: five side outputs more). Blocks are those of networks/vnet.py;
state-dict names are as released. The first decoder, by transposed convolutions, gives the
prediction; the second is for training. Called on an image alone, either network is a segmentation
network like any other.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from networks.blocks import check_input, check_widths
from networks.output import SegOutput
from networks.vnet import UPSAMPLINGS, Decoder, Encoder
from utils.modes import compile_parts


class DualVNet(nn.Module):
    """MLRPL: `(B, in_channels, H, W, D)` -> logits of the first decoder; `both` gives those of
    both.

    n_filters, dropout: as VNet. upsample: of the second decoder, 'nearest' in MLRPL.
    """

    dims = 3
    stride = 16
    encoder_parts = ("encoder",)
    unused_keys: tuple[str, ...] = ()
    alias_keys: tuple[tuple[str, str], ...] = ()
    compile = compile_parts

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        n_filters: int = 16,
        dropout: float = 0.5,
        upsample: str = "nearest",
    ) -> None:
        super().__init__()
        if upsample not in UPSAMPLINGS:
            raise ValueError(
                f"vnet_dual: upsample must be one of {', '.join(UPSAMPLINGS)}, got {upsample!r}"
            )
        (n,) = check_widths("vnet_dual", [n_filters], 1)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {"stage7": n, "penultimate": n, "decoder": n, "acf": n}
        self.encoder = Encoder(in_channels, n, dropout)
        self.decoder1 = Decoder(num_classes, n, dropout, "transposed")
        self.decoder2 = Decoder(num_classes, n, dropout, upsample)

    def both(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(logits, last map after its dropout) of the first and of the second decoder."""
        check_input("vnet_dual", image, self.in_channels, self.stride)
        features = self.encoder(image)
        return [
            decoder.classify(decoder(features)[-1]) for decoder in (self.decoder1, self.decoder2)
        ]

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("vnet_dual", image, self.in_channels, self.stride)
        logits, last = self.decoder1.classify(self.decoder1(self.encoder(image))[-1])
        if not return_features:
            return logits
        return SegOutput(logits, dict.fromkeys(("stage7", "penultimate", "decoder", "acf"), last))


class SideOutputs(nn.Module):
    """1x1x1 convolutions of the five decoder stages, from 1/16 of the grid to the full one,
    enlarged to full size.
    """

    def __init__(self, num_classes: int, n_filters: int) -> None:
        super().__init__()
        self.side5 = nn.Conv3d(16 * n_filters, num_classes, 1)
        self.side4 = nn.Conv3d(8 * n_filters, num_classes, 1)
        self.side3 = nn.Conv3d(4 * n_filters, num_classes, 1)
        self.side2 = nn.Conv3d(2 * n_filters, num_classes, 1)
        self.side1 = nn.Conv3d(n_filters, num_classes, 1)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Logits at full size, coarsest stage first. Each is doubled again and again, as released:
        that is not the same as one interpolation.
        """
        logits = []
        for level, (side, stage) in enumerate(
            zip((self.side5, self.side4, self.side3, self.side2, self.side1), stages)
        ):
            x = side(stage)
            for _ in range(4 - level):
                x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)
            logits.append(x)
        return logits


class LeFeDNet(nn.Module):
    """LeFeD: the second decoder's skips are gated by the first one's stages, and the difference of
    the two decoders' stages is fed back to the encoder. `(B, in_channels, H, W, D)` -> logits of
    the first decoder.

    A decoder's stages are its input and its four upsampled maps before the skips join them:
    channels 16, 8, 4, 2 and 1 times n_filters. dropout: of the last maps; encoder_dropout: of the
    deepest encoder map.
    """

    dims = 3
    stride = 16
    encoder_parts = ("encoder",)
    unused_keys: tuple[str, ...] = ()
    alias_keys: tuple[tuple[str, str], ...] = ()
    compile = compile_parts

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        n_filters: int = 16,
        dropout: float = 0.5,
        encoder_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        (n,) = check_widths("vnet_lefed", [n_filters], 1)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {"stage7": n, "penultimate": n, "decoder": n, "acf": n}
        self.encoder = Encoder(in_channels, n, encoder_dropout)
        self.decoder1 = Decoder(num_classes, n, dropout, "transposed")
        self.decoder2 = Decoder(num_classes, n, dropout, "trilinear")
        self.sideconv1 = SideOutputs(num_classes, n)

    def encode(self, image: Tensor, feedback: Sequence[Tensor] = ()) -> list[Tensor]:
        """Five encoder maps; `feedback`: what is added to them, deepest first, or nothing."""
        check_input("vnet_lefed", image, self.in_channels, self.stride)
        e = self.encoder
        extra = list(reversed(feedback)) if feedback else [0.0] * 5
        x1 = e.block_one(image) + extra[0]
        x2 = e.block_two(e.block_one_dw(x1)) + extra[1]
        x3 = e.block_three(e.block_two_dw(x2)) + extra[2]
        x4 = e.block_four(e.block_three_dw(x3)) + extra[3]
        x5 = e.block_five(e.block_four_dw(x4)) + extra[4]
        return [x1, x2, x3, x4, F.dropout3d(x5, e.dropout, self.training)]

    def all(self, image: Tensor, feedback: Sequence[Tensor] = ()) -> dict[str, list[Tensor]]:
        """`logits` of both decoders, their `stages` (deepest first) and the `sides` of the first
        (coarsest first).
        """
        features = self.encode(image, feedback)
        logits1, stages1, _ = decode_gated(self.decoder1, features)
        gates = [stage.detach().sigmoid() for stage in stages1]
        logits2, stages2, _ = decode_gated(self.decoder2, features, gates)
        return {
            "logits": [logits1, logits2],
            "stages": [stages1, stages2],
            "sides": self.sideconv1(stages1),
        }

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        logits, _, last = decode_gated(self.decoder1, self.encode(image))
        if not return_features:
            return logits
        return SegOutput(logits, dict.fromkeys(("stage7", "penultimate", "decoder", "acf"), last))


def decode_gated(
    decoder: Decoder, features: Sequence[Tensor], gates: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Logits, stages and last map of a V-Net decoder.

    gates: factors in 0..1 for each stage, deepest first: the deepest map x becomes x + x * gate,
    each skip skip * gate.
    """
    x1, x2, x3, x4, x5 = features
    if gates:
        x5, x4, x3, x2, x1 = (
            x5 + x5 * gates[0],
            x4 * gates[1],
            x3 * gates[2],
            x2 * gates[3],
            x1 * gates[4],
        )
    u5 = decoder.block_five_up(x5)
    u6 = decoder.block_six_up(decoder.block_six(u5 + x4))
    u7 = decoder.block_seven_up(decoder.block_seven(u6 + x3))
    u8 = decoder.block_eight_up(decoder.block_eight(u7 + x2))
    logits, last = decoder.classify(decoder.block_nine(u8 + x1))
    return logits, [x5, u5, u6, u7, u8], last
