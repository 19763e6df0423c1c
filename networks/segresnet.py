"""SegResNet, the pre-activation residual teacher (T2): group norm, additive skips, trilinear
upsampling.

Source: MONAI's SegResNet (Myronenko, arXiv:1810.11654, without the autoencoder branch), as the
ACF-BCKD teacher uses it (4,701,118 parameters for one input channel and 14 classes at the default
width). Only the forward pass is ours, because taps are needed; layers and state-dict names are
MONAI's, which are those of released checkpoints.
"""

import math
from collections.abc import Sequence

from monai.networks import nets
from torch import Tensor

from networks.blocks import check_input, check_widths
from networks.output import SegOutput


class SegResNet(nets.SegResNet):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    8.

    `blocks_down` and `blocks_up` are residual blocks per stage. Where `num_groups` does not divide
    `init_filters`, the group norms use the greatest common divisor of the two, so that narrow
    networks can be built.
    """

    dims = 3
    stride = 8
    encoder_parts = ("convInit", "down_layers")
    unused_keys: tuple[str, ...] = ()
    alias_keys: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        init_filters: int = 16,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        num_groups: int = 8,
    ) -> None:
        if len(blocks_down) != 4 or len(blocks_up) != 3 or blocks_up[-1] < 1:
            raise ValueError(
                "segresnet: expected 4 entries in blocks_down and 3 in blocks_up, the last of "
                "them at least 1, "
                f"got {tuple(blocks_down)} and {tuple(blocks_up)}"
            )
        check_widths("segresnet", [init_filters, num_groups], 2)
        super().__init__(
            spatial_dims=3,
            init_filters=init_filters,
            in_channels=in_channels,
            out_channels=num_classes,
            norm=("GROUP", {"num_groups": math.gcd(num_groups, init_filters)}),
            blocks_down=tuple(blocks_down),
            blocks_up=tuple(blocks_up),
        )
        self.num_classes = num_classes
        c = init_filters
        self.feature_channels = {
            "stage1": c,
            "stage2": 2 * c,
            "stage3": 4 * c,
            "stage4": 8 * c,
            "stage5": 4 * c,
            "stage6": 2 * c,
            "stage7": c,
            "penultimate": c,
            "decoder": c,
            "acf": c,
            "residual": c,
            "corrected": c,
            "hooked_residual": c,
        }

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("segresnet", image, self.in_channels, self.stride)
        # No tap is changed later: MONAI's in-place ReLUs all act on the fresh output of a group
        # norm.
        down1 = self.down_layers[0](self.convInit(image))
        down2 = self.down_layers[1](down1)
        down3 = self.down_layers[2](down2)
        bottom = self.down_layers[3](down3)
        up1 = self.up_layers[0](self.up_samples[0](bottom) + down3)
        up2 = self.up_layers[1](self.up_samples[1](up1) + down2)
        # The last block is unrolled: MONAI adds its input in place, so a hook on `conv2` sees f(X)
        # + X, not f(X).
        *earlier, last = self.up_layers[2]
        block_input = self.up_samples[2](up2) + down1
        for block in earlier:
            block_input = block(block_input)
        residual = last.conv1(last.act(last.norm1(block_input)))
        residual = last.conv2(last.act(last.norm2(residual)))
        corrected = residual + block_input
        logits = self.conv_final(corrected)
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
                "stage7": corrected,
                "penultimate": corrected,
                "decoder": corrected,
                "acf": corrected,
                "residual": residual,
                "corrected": corrected,
                # What the released ACF-BCKD code took for the residual: MONAI's in-place sum had
                # overwritten it.
                "hooked_residual": corrected,
            },
        )
