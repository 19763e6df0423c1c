"""V-Net of the semi-supervised left-atrium literature: four strided convolutions down, additive
skips.

Source: the `VNet` of UA-MT, SSL4MIS, AC-MT and CrossMatch and the `VNet_CRKD` of CRKD, which are
one network with two sets of names: 9,448,866 parameters for one input channel and two classes.
State-dict names are those of `VNet_CRKD`; `alias_keys` turns the others into them. The three
decoders are those of the multi-decoder networks of MC-Net's family.

Departures from the released code: the `decoder` tap of `VNet_CRKD` is taken after the last dropout,
so that two passes have different channels zeroed and their cosine is noise; here before it, or
after it with `feature_after_dropout`. The dropout that perturbs the features is an argument of each
call.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from networks.blocks import check_input, check_widths, drop_channels
from networks.output import SegOutput
from utils.modes import compile_parts

UPSAMPLINGS = ("transposed", "trilinear", "nearest")


class ConvBlock(nn.Module):
    """`repeats` times convolution 3x3x3, batch norm, ReLU."""

    def __init__(self, repeats: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(repeats):
            layers += [
                nn.Conv3d(out_channels if k else in_channels, out_channels, 3, padding=1),
                nn.BatchNorm3d(out_channels),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Down(nn.Module):
    """Convolution 2x2x2 of stride 2, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 2, stride=2),
            nn.BatchNorm3d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Double each axis, by a transposed convolution or by interpolation and a convolution; batch
    norm, ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, upsample: str) -> None:
        super().__init__()
        if upsample == "transposed":
            layers = [nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2)]
        else:
            align = {"align_corners": True} if upsample == "trilinear" else {}
            layers = [
                nn.Upsample(scale_factor=2, mode=upsample, **align),
                nn.Conv3d(in_channels, out_channels, 3, padding=1),
            ]
        self.conv = nn.Sequential(*layers, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Encoder(nn.Module):
    """`(B, in_channels, H, W, D)` -> five maps on the grids of H, H/2, .. H/16; channel dropout on
    the last.
    """

    def __init__(self, in_channels: int, n_filters: int, dropout: float) -> None:
        super().__init__()
        n = n_filters
        self.dropout = dropout
        self.block_one = ConvBlock(1, in_channels, n)
        self.block_one_dw = Down(n, 2 * n)
        self.block_two = ConvBlock(2, 2 * n, 2 * n)
        self.block_two_dw = Down(2 * n, 4 * n)
        self.block_three = ConvBlock(3, 4 * n, 4 * n)
        self.block_three_dw = Down(4 * n, 8 * n)
        self.block_four = ConvBlock(3, 8 * n, 8 * n)
        self.block_four_dw = Down(8 * n, 16 * n)
        self.block_five = ConvBlock(3, 16 * n, 16 * n)

    def forward(self, image: Tensor) -> list[Tensor]:
        x1 = self.block_one(image)
        x2 = self.block_two(self.block_one_dw(x1))
        x3 = self.block_three(self.block_two_dw(x2))
        x4 = self.block_four(self.block_three_dw(x3))
        x5 = self.block_five(self.block_four_dw(x4))
        return [x1, x2, x3, x4, F.dropout3d(x5, self.dropout, self.training)]


class Decoder(nn.Module):
    """The encoder's five maps -> the outputs of the four decoder blocks, on the grids of H/8, H/4,
    H/2 and H.

    The classifier `out_conv` is applied by `classify`, after the last dropout.
    """

    def __init__(self, num_classes: int, n_filters: int, dropout: float, upsample: str) -> None:
        super().__init__()
        n = n_filters
        self.dropout = dropout
        self.block_five_up = Up(16 * n, 8 * n, upsample)
        self.block_six = ConvBlock(3, 8 * n, 8 * n)
        self.block_six_up = Up(8 * n, 4 * n, upsample)
        self.block_seven = ConvBlock(3, 4 * n, 4 * n)
        self.block_seven_up = Up(4 * n, 2 * n, upsample)
        self.block_eight = ConvBlock(2, 2 * n, 2 * n)
        self.block_eight_up = Up(2 * n, n, upsample)
        self.block_nine = ConvBlock(1, n, n)
        self.out_conv = nn.Conv3d(n, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        x1, x2, x3, x4, x5 = features
        x6 = self.block_six(self.block_five_up(x5) + x4)
        x7 = self.block_seven(self.block_six_up(x6) + x3)
        x8 = self.block_eight(self.block_seven_up(x7) + x2)
        return [x6, x7, x8, self.block_nine(self.block_eight_up(x8) + x1)]

    def classify(self, x9: Tensor, last_dropout: bool = True) -> tuple[Tensor, Tensor]:
        """Last decoder map -> logits, and the map after the dropout that they were computed
        from.
        """
        dropped = F.dropout3d(x9, self.dropout, self.training and last_dropout)
        return self.out_conv(dropped), dropped


class VNet(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    16.

    n_filters: channels at full resolution, doubled at each of the four halvings. dropout:
    probability with which the channels of the deepest and of the last map are zeroed in training
    mode; 0 for none. upsample: 'transposed' convolution, or 'trilinear' or 'nearest' interpolation
    and a 3x3x3 convolution. feature_after_dropout: take the tap `decoder` (and `stage7`,
    `penultimate`, `acf`) after the last dropout, as released.
    """

    dims = 3
    stride = 16
    encoder_parts = ("encoder",)
    unused_keys: tuple[str, ...] = ()
    alias_keys = (
        (r"^(block_(?:(?:one|two|three|four)(?:_dw)?|five)\.)", r"encoder.\1"),
        (r"^(block_(?:five_up|(?:six|seven|eight)(?:_up)?|nine)\.|out_conv\.)", r"decoder.\1"),
    )
    compile = compile_parts

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        n_filters: int = 16,
        dropout: float = 0.5,
        upsample: str = "transposed",
        feature_after_dropout: bool = False,
    ) -> None:
        super().__init__()
        if upsample not in UPSAMPLINGS:
            raise ValueError(
                f"vnet: upsample must be one of {', '.join(UPSAMPLINGS)}, got {upsample!r}"
            )
        (n,) = check_widths("vnet", [n_filters], 1)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_after_dropout = feature_after_dropout
        self.feature_channels = {
            "stage1": 2 * n,
            "stage2": 4 * n,
            "stage3": 8 * n,
            "stage4": 16 * n,
            "stage5": 4 * n,
            "stage6": 2 * n,
            "stage7": n,
            "penultimate": n,
            "decoder": n,
            "acf": n,
        }
        self.encoder = Encoder(in_channels, n, dropout)
        self.decoder = Decoder(num_classes, n, dropout, upsample)

    drop = staticmethod(drop_channels)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Image -> the five encoder maps, largest grid first; the last one after its dropout."""
        check_input("vnet", image, self.in_channels, self.stride)
        return self.encoder(image)

    def decode(self, features: Sequence[Tensor], last_dropout: bool = True) -> SegOutput:
        """Five encoder maps, of any batch size (so of several perturbed copies at once) -> logits
        and all taps.

        last_dropout: False leaves out the dropout before the classifier, as CrossMatch's perturbed
        passes do.
        """
        _, x7, x8, x9 = self.decoder(features)
        logits, dropped = self.decoder.classify(x9, last_dropout)
        last = dropped if self.feature_after_dropout else x9
        return SegOutput(
            logits,
            {
                "stage1": features[1],
                "stage2": features[2],
                "stage3": features[3],
                "stage4": features[4],
                "stage5": x7,
                "stage6": x8,
                "stage7": last,
                "penultimate": last,
                "decoder": last,
                "acf": last,
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
