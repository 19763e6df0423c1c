"""Mobile U-Net, a student of inverted residual blocks (MobileNetV2) with additive skips.

Source: the 3D Mobile U-Net among the ACF-BCKD students (13,652,924 parameters in use for one input
channel and 14 classes; four fifths of them in the first decoder block). State-dict names are those
of released checkpoints.
"""

from torch import Tensor, nn

from networks.blocks import check_input
from networks.output import SegOutput


class InvertedResidual(nn.Module):
    """`(B, in_channels, ...)` -> `(B, out_channels, ...)`: widen 1x1x1, depthwise 3x3x3, project
    1x1x1.

    Stride 1 adds the input, through a 1x1x1 convolution where the widths differ. Stride 2 halves
    the grid, or doubles it if `transposed` (4x4x4 transposed depthwise convolution), and adds
    nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 6,
        transposed: bool = False,
        allocate_unused: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        if transposed:
            depthwise = nn.ConvTranspose3d(
                hidden, hidden, 4, stride=stride, padding=1, groups=hidden, bias=False
            )
        else:
            depthwise = nn.Conv3d(
                hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False
            )
        # ReLU6 in place acts on a norm's output, never on a tap, and saves one map of the widest
        # grid.
        self.conv = nn.Sequential(
            nn.Conv3d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm3d(hidden),
            nn.ReLU6(inplace=True),
            depthwise,
            nn.BatchNorm3d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv3d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm3d(out_channels),
        )
        self.add_input = stride == 1
        self.project_input = stride == 1 and in_channels != out_channels
        if self.project_input or allocate_unused:
            self.conv1x1 = nn.Conv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.add_input:
            return self.conv(x)
        return self.conv(x) + (self.conv1x1(x) if self.project_input else x)


class MobileUNet(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    32.

    `width` scales every channel count, rounded to a multiple of 4, at least 4. `allocate_unused`
    adds the 18 shortcut convolutions that released checkpoints hold and no forward pass uses.
    """

    dims = 3
    stride = 32
    encoder_parts = (
        "conv3x3",
        *(f"irb_bottleneck{number}" for number in range(1, 8)),
        "conv1x1_encode",
    )
    unused_keys = (
        r"^irb_bottleneck[2346]\.\d+\.conv1x1\.weight$",
        r"^irb_bottleneck5\.[12]\.conv1x1\.weight$",
        r"^D_irb[1-4]\.0\.conv1x1\.weight$",
    )
    alias_keys: tuple[tuple[str, str], ...] = ()

    def __init__(
        self, in_channels: int, num_classes: int, width: float = 1.0, allocate_unused: bool = False
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"mobile_unet: width must be positive, got {width}")
        stem, c1, c2, c3, c4, c5, c6, c7, deep = (
            max(4, 4 * int(width * c / 4 + 0.5)) for c in (32, 16, 24, 32, 64, 96, 160, 320, 1280)
        )
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {
            "stage1": c1,
            "stage2": c2,
            "stage3": c3,
            "stage4": c7,
            "stage5": c2,
            "stage6": c1,
            "stage7": c1,
            "penultimate": c1,
            "decoder": c1,
            "acf": c1,
        }

        def stage(
            in_channels: int, out_channels: int, repeats: int, stride: int, expansion: int = 6
        ) -> nn.Sequential:
            first = InvertedResidual(
                in_channels, out_channels, stride, expansion, allocate_unused=allocate_unused
            )
            rest = (
                InvertedResidual(
                    out_channels, out_channels, 1, expansion, allocate_unused=allocate_unused
                )
                for _ in range(repeats - 1)
            )
            return nn.Sequential(first, *rest)

        def up_stage(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(
                InvertedResidual(
                    in_channels, out_channels, 2, transposed=True, allocate_unused=allocate_unused
                )
            )

        self.conv3x3 = nn.Sequential(
            nn.Conv3d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels),
            nn.BatchNorm3d(in_channels),
            nn.ReLU6(inplace=True),
            nn.Conv3d(in_channels, stem, 1),
        )
        self.irb_bottleneck1 = stage(stem, c1, repeats=1, stride=1, expansion=1)
        self.irb_bottleneck2 = stage(c1, c2, repeats=2, stride=2)
        self.irb_bottleneck3 = stage(c2, c3, repeats=3, stride=2)
        self.irb_bottleneck4 = stage(c3, c4, repeats=4, stride=2)
        self.irb_bottleneck5 = stage(c4, c5, repeats=3, stride=1)
        self.irb_bottleneck6 = stage(c5, c6, repeats=3, stride=2)
        self.irb_bottleneck7 = stage(c6, c7, repeats=1, stride=1)
        self.conv1x1_encode = nn.Conv3d(c7, deep, 1)
        self.D_irb1 = up_stage(deep, c5)
        self.D_irb2 = up_stage(c5, c3)
        self.D_irb3 = up_stage(c3, c2)
        self.D_irb4 = up_stage(c2, c1)
        self.DConv4x4 = nn.ConvTranspose3d(c1, c1, 4, stride=2, padding=1, groups=c1, bias=False)
        self.conv1x1_decode = nn.Conv3d(c1, num_classes, 1)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("mobile_unet", image, self.in_channels, self.stride)
        encode1 = self.irb_bottleneck1(self.conv3x3(image))
        encode2 = self.irb_bottleneck2(encode1)
        encode3 = self.irb_bottleneck3(encode2)
        encode5 = self.irb_bottleneck5(self.irb_bottleneck4(encode3))
        bottom = self.irb_bottleneck7(self.irb_bottleneck6(encode5))
        decode1 = self.D_irb1(self.conv1x1_encode(bottom)) + encode5
        decode2 = self.D_irb2(decode1) + encode3
        decode3 = self.D_irb3(decode2) + encode2
        decode4 = self.D_irb4(decode3) + encode1
        full = self.DConv4x4(decode4)
        logits = self.conv1x1_decode(full)
        if not return_features:
            return logits
        return SegOutput(
            logits,
            {
                "stage1": encode1,
                "stage2": encode2,
                "stage3": encode3,
                "stage4": bottom,
                "stage5": decode3,
                "stage6": decode4,
                "stage7": full,
                "penultimate": full,
                "decoder": full,
                "acf": full,
            },
        )
