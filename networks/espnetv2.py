"""ESPNetV2 in 3D, the smallest student: pyramids of dilated depthwise convolutions, input
reinforcement.

Source: the 3D ESPNetV2 (scale 1.0) among the ACF-BCKD students (284,214 parameters in use for one
input channel and 14 classes at the default width), after the 2D network (arXiv:1811.11431).
State-dict names are those of released checkpoints. Unlike the released code, the image is pooled a
fixed number of times per level instead of until its first side fits, so anisotropic inputs work and
no loop can run forever.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.blocks import check_input, check_widths
from networks.output import SegOutput

BRANCHES = 4  # parallel dilated convolutions of an EESP unit
PYRAMID_SCALES = (2.0, 1.5, 1.0, 0.5, 0.1)
PYRAMID_MIN_SIZE = 5  # voxels per side of a rescaled pyramid level


def _unit(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
    norm: bool = True,
    act: bool = True,
) -> nn.Sequential:
    """Convolution without bias, then batch norm and PReLU (a slope per channel). State dict: `conv
    bn act`.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv3d(
        in_channels,
        out_channels,
        kernel,
        stride,
        dilation * (kernel // 2),
        dilation,
        groups,
        bias=False,
    )
    if norm:
        layers["bn"] = nn.BatchNorm3d(out_channels)
    if act:
        layers["act"] = nn.PReLU(out_channels)
    return nn.Sequential(layers)


def _decoder_unit(
    in_channels: int, out_channels: int, kernel: int, groups: int = 1
) -> nn.Sequential:
    """The decoder's convolution, batch norm and PReLU. State dict: `cbr.0 cbr.1 cbr.2`."""
    conv = nn.Conv3d(
        in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(OrderedDict(cbr=nn.Sequential(conv, *_norm_act(out_channels))))


def _norm_act(channels: int) -> nn.Sequential:
    """Batch norm and PReLU. State dict: `0 1`."""
    return nn.Sequential(nn.BatchNorm3d(channels), nn.PReLU(channels))


def _double(x: Tensor) -> Tensor:
    """`(B, C, H, W, D)` -> `(B, C, 2H, 2W, 2D)`, trilinear between the corner voxels."""
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


def _half(image: Tensor) -> Tensor:
    """`(B, C, H, W, D)` -> `(B, C, H/2, W/2, D/2)`, averaging 3x3x3 voxels, zeros outside
    counted.
    """
    if min(image.shape[2:]) < 3:
        # PyTorch refuses sides below the kernel even where the padding makes up for it (input sides
        # of 16).
        return F.avg_pool3d(F.pad(image, (1,) * 6), 3, stride=2)
    return F.avg_pool3d(image, 3, stride=2, padding=1)


def dilations(receptive_field: int) -> tuple[int, ...]:
    """Dilations of an EESP unit's four 3x3x3 branches: extents 3, 5, 7, 9, those above the cap
    replaced by 3.
    """
    extents = sorted(k if k <= receptive_field else 3 for k in (3, 5, 7, 9))
    return tuple((k - 1) // 2 for k in extents)


class EESP(nn.Module):
    """Extremely efficient spatial pyramid. Stride 1: `x + f(x)`, activated, widths equal; stride 2:
    `f(x)` as is.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        receptive_field: int,
        allocate_unused: bool = False,
    ) -> None:
        super().__init__()
        n = out_channels // BRANCHES
        self.add_input = stride == 1
        self.proj_1x1 = _unit(in_channels, n, 1, groups=BRANCHES)
        self.spp_dw = nn.ModuleList(
            _unit(n, n, 3, stride, groups=n, dilation=d, norm=False, act=False)
            for d in dilations(receptive_field)
        )
        self.conv_1x1_exp = _unit(out_channels, out_channels, 1, groups=BRANCHES, act=False)
        self.br_after_cat = nn.Sequential(
            OrderedDict(bn=nn.BatchNorm3d(out_channels), act=nn.PReLU(out_channels))
        )
        if self.add_input or allocate_unused:
            self.module_act = nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.proj_1x1(x)
        branches = [self.spp_dw[0](reduced)]
        for depthwise in self.spp_dw[1:]:
            # Each branch adds the one of smaller extent: without that, large dilations leave a grid
            # pattern.
            branches.append(depthwise(reduced) + branches[-1])
        merged = self.conv_1x1_exp(self.br_after_cat(torch.cat(branches, dim=1)))
        return self.module_act(merged + x) if self.add_input else merged


class DownSampler(nn.Module):
    """`(B, in_channels, H, W, D)` -> `(B, out_channels, H/2, W/2, D/2)`: average pool beside a
    strided EESP unit, plus the image (already pooled to that grid).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        receptive_field: int,
        allocate_unused: bool = False,
    ) -> None:
        super().__init__()
        self.eesp = EESP(
            in_channels, out_channels - in_channels, 2, receptive_field, allocate_unused
        )
        self.inp_reinf = nn.Sequential(
            _unit(image_channels, image_channels, 3),
            _unit(image_channels, out_channels, 1, act=False),
        )
        self.act = nn.PReLU(out_channels)

    def forward(self, x: Tensor, pooled_image: Tensor) -> Tensor:
        down = torch.cat([_half(x), self.eesp(x)], dim=1)
        return self.act(down + self.inp_reinf(pooled_image))


class Encoder(nn.Module):
    """Image -> maps at 1/2, 1/4, 1/8 and 1/16 of its grid with `channels`."""

    def __init__(
        self, in_channels: int, channels: Sequence[int], allocate_unused: bool = False
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = channels
        self.level1 = _unit(in_channels, c1, 3, stride=2)
        self.level2_0 = DownSampler(c1, c2, in_channels, 13, allocate_unused)
        self.level3_0 = DownSampler(c2, c3, in_channels, 11, allocate_unused)
        self.level3 = nn.Sequential(*(EESP(c3, c3, 1, 9) for _ in range(3)))
        self.level4_0 = DownSampler(c3, c4, in_channels, 9, allocate_unused)
        self.level4 = nn.Sequential(*(EESP(c4, c4, 1, 7) for _ in range(7)))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image4 = _half(_half(image))
        image8 = _half(image4)
        image16 = _half(image8)
        encode1 = self.level1(image)
        encode2 = self.level2_0(encode1, image4)
        encode3 = self.level3(self.level3_0(encode2, image8))
        encode4 = self.level4(self.level4_0(encode3, image16))
        return encode1, encode2, encode3, encode4


class GatedConv(nn.Module):
    """Grouped 3x3x3 convolution of a skip map, each output channel scaled by a gate from the global
    average.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(
            nn.AdaptiveAvgPool3d(1),
            nn.Conv3d(in_channels, out_channels, 1, bias=False),
            nn.Sigmoid(),
        )
        self.expansion_layer = _decoder_unit(
            in_channels, out_channels, 3, groups=math.gcd(in_channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.expansion_layer(x) * self.wt_layer(x)


class PyramidPool(nn.Module):
    """`(B, in_channels, ...)` -> `(B, out_channels, ...)`: depthwise convolutions of a narrow map
    at five scales.

    `last` is the classifier: a bias, no norm or activation.
    """

    def __init__(
        self, in_channels: int, projection: int, out_channels: int, last: bool = False
    ) -> None:
        super().__init__()
        count = len(PYRAMID_SCALES)
        self.projection_layer = _decoder_unit(in_channels, projection, 1)
        self.stages = nn.ModuleList(
            nn.Conv3d(projection, projection, 3, padding=1, groups=projection, bias=False)
            for _ in PYRAMID_SCALES
        )
        self.merge_layer = nn.Sequential(
            nn.Sequential(OrderedDict(br=_norm_act(count * projection))),
            # brings the five scales of each channel together, one group each
            nn.ChannelShuffle(count),
            _decoder_unit(count * projection, projection, 3, groups=projection),
            nn.Conv3d(projection, out_channels, 1, bias=last),
        )
        self.br = nn.Identity() if last else nn.Sequential(OrderedDict(br=_norm_act(out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_layer(x)
        size = x.shape[2:]
        maps = []
        for scale, depthwise in zip(PYRAMID_SCALES, self.stages):
            target = [max(PYRAMID_MIN_SIZE, math.ceil(scale * side)) for side in size]
            if scale == 1:
                maps.append(depthwise(x))
            elif scale > 1:
                finer = F.interpolate(x, size=target, mode="trilinear", align_corners=True)
                maps.append(F.adaptive_avg_pool3d(depthwise(finer), size))
            else:
                coarser = depthwise(F.adaptive_avg_pool3d(x, target))
                maps.append(F.interpolate(coarser, size=size, mode="trilinear", align_corners=True))
        return self.br(self.merge_layer(torch.cat(maps, dim=1)))


class ESPNetV2(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    16.

    `channels` must be increasing multiples of 16. `projection` is the width inside the decoder's
    pyramids; None is the released rule min(num_classes // 2, 16), which leaves a single channel for
    three classes. `allocate_unused` adds the activations of strided units that released checkpoints
    hold and no forward pass uses.
    """

    dims = 3
    stride = 16
    encoder_parts = ("base_net",)
    unused_keys = (r"^base_net\.level[234]_0\.eesp\.module_act\.weight$",)
    alias_keys: tuple[tuple[str, str], ...] = ()

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        projection: int | None = None,
        allocate_unused: bool = False,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4 = check_widths("espnetv2", channels, 4)
        if not 0 < c1 < c2 < c3 < c4 or any(c % (BRANCHES * BRANCHES) for c in channels):
            raise ValueError(
                f"espnetv2: channels must be four increasing multiples of {BRANCHES * BRANCHES}, "
                f"got {tuple(channels)}"
            )
        p = max(1, min(num_classes // 2, 16)) if projection is None else projection
        check_widths("espnetv2", [p], 1)
        d1, d2, d3 = c2, (c1 + c2) // 2, c1
        self.in_channels, self.num_classes = in_channels, num_classes
        self.feature_channels = {
            "stage1": c1,
            "stage2": c2,
            "stage3": c3,
            "stage4": c4,
            "stage5": d3,
            "stage6": d3,
            "stage7": num_classes,
            "penultimate": d3,
            "decoder": d3,
            "acf": d3,
        }
        self.base_net = Encoder(in_channels, channels, allocate_unused)
        self.bu_dec_l1 = PyramidPool(c4, p, d1)
        self.bu_dec_l2 = PyramidPool(d1, p, d2)
        self.bu_dec_l3 = PyramidPool(d2, p, d3)
        self.bu_dec_l4 = PyramidPool(d3, p, num_classes, last=True)
        self.merge_enc_dec_l2 = GatedConv(c3, d1)
        self.merge_enc_dec_l3 = GatedConv(c2, d2)
        self.merge_enc_dec_l4 = GatedConv(c1, d3)
        self.bu_br_l2 = _norm_act(d1)
        self.bu_br_l3 = _norm_act(d2)
        self.bu_br_l4 = _norm_act(d3)

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("espnetv2", image, self.in_channels, self.stride)
        encode1, encode2, encode3, encode4 = self.base_net(image)
        decode1 = self.bu_dec_l1(encode4)
        decode2 = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(encode3) + _double(decode1)))
        decode3 = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(encode2) + _double(decode2)))
        merged = self.bu_br_l4(self.merge_enc_dec_l4(encode1) + _double(decode3))
        logits = F.interpolate(
            self.bu_dec_l4(merged), size=image.shape[2:], mode="trilinear", align_corners=True
        )
        if not return_features:
            return logits
        return SegOutput(
            logits,
            {
                "stage1": encode1,
                "stage2": encode2,
                "stage3": encode3,
                "stage4": encode4,
                "stage5": decode3,
                "stage6": merged,
                "stage7": logits,
                "penultimate": merged,
                "decoder": merged,
                "acf": merged,
            },
        )
