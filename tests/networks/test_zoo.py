"""SegResNet, ESPNetV2, Mobile U-Net and LCOV-Net against the released networks: names, counts,
outputs, taps.
"""

import re

import network_checks as checks
import pytest
import torch
import torch.nn.functional as F

from networks.espnetv2 import ESPNetV2, _half, dilations
from networks.lcovnet import HalfPool, LCOVNet
from networks.mobile_unet import MobileUNet
from networks.segresnet import SegResNet

NETS = [SegResNet, ESPNetV2, MobileUNet, LCOVNet]

# Parameters in use, parameters as released, digest of the released state dict (LCOV-Net's without
# the alias names).
RELEASED = {
    (SegResNet, "btcv"): (
        4701118,
        4701118,
        "4cd3a2d202c611f0a989c17bcd92480b237378eda072284f29b859b068e06dda",
    ),
    (SegResNet, "word"): (
        4701169,
        4701169,
        "f9ee6c7cc5d01686080173aebb0acf42febaaadd81b07ed3dcbd2ac4b91638cd",
    ),
    (SegResNet, "brats"): (
        4702227,
        4702227,
        "96ee60cbf3ac362967033f0cd3247514ffae21eb4ee022d996f8350e05bd2e94",
    ),
    (ESPNetV2, "btcv"): (
        284214,
        284438,
        "4439ee6d85ced45ba20363fc703d9361928217893b964b2acf949136939889b1",
    ),
    (ESPNetV2, "word"): (
        285963,
        286187,
        "b58f18aa1c45018e1115d70df3c0fd7f9b0bb419448662c7a8233d9d8d6851ec",
    ),
    (ESPNetV2, "brats"): (
        279038,
        279262,
        "ebc2743e5a3664dfd64e55a7e2daee2f19a3bcccf823734f23276184fa4312be",
    ),
    (MobileUNet, "btcv"): (
        13652924,
        13883132,
        "93a24df7d14fd5fc3141c9500742b5a92130a42d5a9d7ae4a6cd09b69704b2dc",
    ),
    (MobileUNet, "word"): (
        13652975,
        13883183,
        "5c941a6908656de533fbb941bce79d86fa7f1d6f1b90ebae926462d5cfda63e2",
    ),
    (MobileUNet, "brats"): (
        13652923,
        13883131,
        "ed0852a97422bb6abda2e09c1e8e23cdf80d011906c607745db8299846642eb2",
    ),
    (LCOVNet, "btcv"): (
        812848,
        815984,
        "4e1df2c0945a74fa112182e4f5414e78bfc9e1be0d8fab59470309584cb10ee5",
    ),
    (LCOVNet, "word"): (
        812896,
        816704,
        "4151304c0ace2e325af2fcc38b9f2a64ae4a1bd145bb6c27a416af91badbbab2",
    ),
    (LCOVNet, "brats"): (
        812816,
        813488,
        "dc83d1d1c0cc8118e902f1415a7e364938e1fac27b76e417bd00400e7214b677",
    ),
}

SMALL = {
    SegResNet: {"init_filters": 4},
    ESPNetV2: {"channels": (16, 32, 48, 64)},
    MobileUNet: {"width": 0.25},
    LCOVNet: {"channels": (4, 6, 8, 12, 16)},
}

# Input side / tap side. SegResNet's first stage is at full resolution; the bottleneck's grid is the
# network's own.
DIVISORS = {
    SegResNet: {
        "stage1": 1,
        "stage2": 2,
        "stage3": 4,
        "stage4": 8,
        "stage5": 4,
        "stage6": 2,
        "stage7": 1,
        "penultimate": 1,
        "decoder": 1,
        "acf": 1,
        "residual": 1,
        "corrected": 1,
        "hooked_residual": 1,
    },
    ESPNetV2: {
        "stage1": 2,
        "stage2": 4,
        "stage3": 8,
        "stage4": 16,
        "stage5": 4,
        "stage6": 2,
        "stage7": 1,
        "penultimate": 2,
        "decoder": 2,
        "acf": 2,
    },
    MobileUNet: {
        "stage1": 2,
        "stage2": 4,
        "stage3": 8,
        "stage4": 32,
        "stage5": 4,
        "stage6": 2,
        "stage7": 1,
        "penultimate": 1,
        "decoder": 1,
        "acf": 1,
    },
    LCOVNet: {
        "stage1": 2,
        "stage2": 4,
        "stage3": 8,
        "stage4": 16,
        "stage5": 4,
        "stage6": 2,
        "stage7": 1,
        "penultimate": 1,
        "decoder": 1,
        "acf": 1,
    },
}

# The module and side where each tap lies. SegResNet's last block is unrolled, so its output is the
# next one's input.
SOURCES = {
    SegResNet: {
        "stage1": "down_layers.0:out",
        "stage2": "down_layers.1:out",
        "stage3": "down_layers.2:out",
        "stage4": "down_layers.3:out",
        "stage5": "up_layers.0:out",
        "stage6": "up_layers.1:out",
        "stage7": "conv_final:in",
        "penultimate": "conv_final:in",
        "decoder": "conv_final:in",
        "acf": "conv_final:in",
        "residual": "up_layers.2.0.conv2:out",
        "corrected": "conv_final:in",
        "hooked_residual": "conv_final:in",
    },
    ESPNetV2: {
        "stage1": "base_net.level1:out",
        "stage2": "base_net.level2_0:out",
        "stage3": "base_net.level3:out",
        "stage4": "base_net.level4:out",
        "stage5": "bu_dec_l3:out",
        "stage6": "bu_br_l4:out",
        "penultimate": "bu_dec_l4:in",
        "decoder": "bu_br_l4:out",
        "acf": "bu_br_l4:out",
    },
    MobileUNet: {
        "stage1": "irb_bottleneck1:out",
        "stage2": "irb_bottleneck2:out",
        "stage3": "irb_bottleneck3:out",
        "stage4": "conv1x1_encode:in",
        "stage5": "D_irb4:in",
        "stage6": "DConv4x4:in",
        "stage7": "DConv4x4:out",
        "penultimate": "conv1x1_decode:in",
        "decoder": "DConv4x4:out",
        "acf": "DConv4x4:out",
    },
    LCOVNet: {
        "stage1": "Encode_block2:out",
        "stage2": "Encode_block3:out",
        "stage3": "Encode_block4:out",
        "stage4": "Encode_BottleNeck_block5:out",
        "stage5": "Decode_block2:out",
        "stage6": "Decode_block3:out",
        "stage7": "Decode_block4:out",
        "penultimate": "segout4:in",
        "decoder": "Decode_block4:out",
        "acf": "Decode_block4:out",
    },
}


def small(cls, in_channels=2, num_classes=3, **arguments):
    return cls(in_channels, num_classes, **SMALL[cls], **arguments)


def complete(cls, in_channels, num_classes, **arguments):
    """The network with everything that released checkpoints hold."""
    if cls.unused_keys:
        arguments["allocate_unused"] = True
    return cls(in_channels, num_classes, **arguments)


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("dataset", checks.DATASETS)
def test_counts_and_names_are_the_released_ones(cls, dataset):
    used, total, digest = RELEASED[cls, dataset]
    with torch.device("meta"):
        net, released = cls(*checks.DATASETS[dataset]), complete(cls, *checks.DATASETS[dataset])
    assert sum(p.numel() for p in net.parameters()) == used
    assert sum(p.numel() for p in released.parameters()) == total
    assert checks.digest(released) == digest
    kept = [
        key
        for key in released.state_dict()
        if not any(re.search(pattern, key) for pattern in cls.unused_keys)
    ]
    assert sorted(kept) == sorted(net.state_dict())


def test_lcovnet_alias_keys_lead_to_registered_ones():
    (pattern, replacement) = LCOVNet.alias_keys[0]
    keys = set(small(LCOVNet).state_dict())
    for key in ("up1.conv1.0.weight", "up4.conv1.1.running_mean"):
        assert key not in keys
        assert re.sub(pattern, replacement, key) in keys
    untouched = "Encode_block1.conv1.0.weight"
    assert re.sub(pattern, replacement, untouched) == untouched


@pytest.mark.parametrize(
    "cls, mean, std",
    [
        (SegResNet, 0.03564156537524669, 0.47729966894790843),
        (ESPNetV2, 0.013822790965442408, 0.08453953736723993),
        (MobileUNet, 0.0056753582341672205, 0.1626389455712383),
        (LCOVNet, 0.007090596270312404, 0.06821245406103439),
    ],
)
def test_output_statistics(cls, mean, std):
    checks.check_statistics(cls(1, 14), mean, std)


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 3, 2)])
def test_taps(cls, factors):
    checks.check_taps(small(cls), tuple(cls.stride * factor for factor in factors), DIVISORS[cls])


def test_taps_of_the_original_widths():
    for cls in NETS:
        checks.check_taps(cls(1, 14), (32, 32, 32), DIVISORS[cls])


@pytest.mark.parametrize("cls", NETS)
def test_taps_keep_their_values(cls):
    checks.check_taps_keep_their_values(small(cls), SOURCES[cls])


def test_logits_follow_from_the_penultimate_tap():
    image = torch.randn(1, 2, 32, 64, 32)
    heads = {
        SegResNet: lambda net, x: net.conv_final(x),
        ESPNetV2: lambda net, x: F.interpolate(
            net.bu_dec_l4(x), image.shape[2:], mode="trilinear", align_corners=True
        ),
        MobileUNet: lambda net, x: net.conv1x1_decode(x),
        LCOVNet: lambda net, x: net.segout4(x),
    }
    for cls, head in heads.items():
        net = small(cls).eval()
        with torch.no_grad():
            logits, features = net(image, return_features=True)
            assert torch.equal(head(net, features["penultimate"]), logits), cls


@pytest.mark.parametrize("cls", NETS)
def test_every_parameter_gets_a_gradient(cls):
    checks.check_gradients(small(cls))


@pytest.mark.parametrize("cls", [ESPNetV2, MobileUNet, LCOVNet])
def test_unused_parameters_are_those_that_the_class_names(cls):
    checks.check_gradients(small(cls, allocate_unused=True), cls.unused_keys)


@pytest.mark.parametrize("cls", NETS)
def test_bad_input_is_refused(cls):
    checks.check_rejects_bad_input(small(cls))


def test_segresnet_residual_and_corrected_differ_by_the_block_input():
    for blocks_up in [(1, 1, 1), (1, 1, 2)]:
        net = small(SegResNet, blocks_up=blocks_up).eval()
        seen = []
        net.up_layers[2][-1].norm1.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].clone())
        )
        with torch.no_grad():
            features = net(torch.randn(1, 2, 16, 16, 16), return_features=True).features
        assert features["residual"].data_ptr() != features["corrected"].data_ptr()
        assert seen[0].abs().max() > 0.1
        torch.testing.assert_close(
            features["corrected"] - features["residual"], seen[0], rtol=1e-5, atol=1e-5
        )


def test_segresnet_equals_monai():
    net = checks.shape_fill(SegResNet(1, 5)).eval()
    image = checks.golden_image()
    with torch.no_grad():
        assert torch.equal(net(image), super(SegResNet, net).forward(image))


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="blocks_up"):
        SegResNet(1, 2, blocks_up=(1, 1))
    with pytest.raises(ValueError, match="multiples of 16"):
        ESPNetV2(1, 2, channels=(24, 32, 64, 128))
    with pytest.raises(ValueError, match="width"):
        MobileUNet(1, 2, width=0)


@pytest.mark.parametrize("num_classes, projection", [(14, 7), (17, 8), (3, 1), (1, 1), (100, 16)])
def test_espnetv2_projection_follows_the_released_rule(num_classes, projection):
    net = small(ESPNetV2, num_classes=num_classes)
    assert net.bu_dec_l1.stages[0].out_channels == projection
    assert (
        small(ESPNetV2, num_classes=num_classes, projection=5).bu_dec_l1.stages[0].out_channels == 5
    )


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 8, 4), (8, 6, 4)])
@pytest.mark.parametrize("pool, kernel", [(_half, 3), (HalfPool(), 4)])
def test_pooling_counts_zeros_outside_at_every_size(pool, kernel, size):
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    mean_filter = torch.full((1, 1, kernel, kernel, kernel), kernel**-3, dtype=torch.float64)
    torch.testing.assert_close(pool(x), F.conv3d(x, mean_filter, stride=2, padding=1))


def test_espnetv2_dilations():
    assert [dilations(cap) for cap in (13, 11, 9, 7)] == [(1, 2, 3, 4)] * 3 + [(1, 1, 2, 3)]


def test_mobile_unet_widths_are_multiples_of_four():
    assert MobileUNet(1, 2, width=0.1).feature_channels["stage1"] == 4
    assert MobileUNet(1, 2, width=0.5).feature_channels == {
        "stage1": 8,
        "stage2": 12,
        "stage3": 16,
        "stage4": 160,
        "stage5": 12,
        "stage6": 8,
        "stage7": 8,
        "penultimate": 8,
        "decoder": 8,
        "acf": 8,
    }
