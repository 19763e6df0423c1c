"""U-Net, the plain student: seven convolution blocks, three downsamplings, no residual units.

Source: the ACF-BCKD student "U-Net tiny" (1,961,012 parameters for one input channel and 14 classes
at the default width). State-dict names are those of released checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from networks.blocks import check_input, check_widths, conv_unit, up_unit
from networks.output import SegOutput


class UNet(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    8.
    """

    dims = 3
    stride = 8
    encoder_parts = ("down_layer1", "down_layer2", "down_layer3", "bottom_layer")

    def __init__(
        self, in_channels: int, num_classes: int, channels: Sequence[int] = (32, 64, 128, 256)
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = check_widths("unet", channels, 4)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {
            "stage1": c1,
            "stage2": c2,
            "stage3": c3,
            "stage4": c4,
            "stage5": c2,
            "stage6": c1,
            "stage7": num_classes,
            "penultimate": 2 * c1,
            "decoder": c1,
            "acf": c1,
        }
        self.down_layer1 = conv_unit(in_channels, c1, stride=2)
        self.down_layer2 = conv_unit(c1, c2, stride=2)
        self.down_layer3 = conv_unit(c2, c3, stride=2)
        self.bottom_layer = conv_unit(c3, c4)
        self.up_layer1 = up_unit(c4 + c3, c2)
        self.up_layer2 = up_unit(2 * c2, c1)
        self.up_layer3 = up_unit(2 * c1, num_classes, conv_only=True)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("unet", image, self.in_channels, self.stride)
        down1 = self.down_layer1(image)
        down2 = self.down_layer2(down1)
        down3 = self.down_layer3(down2)
        bottom = self.bottom_layer(down3)
        up1 = self.up_layer1(torch.cat([bottom, down3], dim=1))
        # Attention correction works on the transposed convolution's output before its norm and
        # activation.
        acf = self.up_layer2.conv(torch.cat([up1, down2], dim=1))
        up2 = self.up_layer2.adn(acf)
        penultimate = torch.cat([up2, down1], dim=1)
        logits = self.up_layer3(penultimate)
        if not return_features:
            return logits
        return SegOutput(
            logits,
            {
                "stage1": down1,
                "stage2": down2,
                "stage3": down3,
                "stage4": bottom,
                "stage5": up1,
                "stage6": up2,
                "stage7": logits,
                "penultimate": penultimate,
                "decoder": up2,
                "acf": acf,
            },
        )
