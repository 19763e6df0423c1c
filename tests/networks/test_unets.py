"""U-Net and ResU-Net against the released networks: names, counts, outputs, taps."""

import network_checks as checks
import pytest
import torch

from networks.resunet import ResUNet
from networks.unet import UNet

NETS = [UNet, ResUNet]

# Parameters, digest of the state dict.
RELEASED = {
    (ResUNet, "btcv"): (
        18992149,
        "3aa07c9be94096004da65203e44baf2bd8fa9353e6177c5c73e983536052cd7f",
    ),
    (ResUNet, "word"): (
        19005034,
        "d863e9c60c270e0585141c66e4586305572e5bd3c94147e541f0e7e198e3d712",
    ),
    (ResUNet, "brats"): (
        18959430,
        "147d833dc02fd1d68f2d928187d5dd960e4e919019de9ac1d232362b61490361",
    ),
    (UNet, "btcv"): (1961012, "27a867bf082944e75806a26e03dbd818e49dca1942c2aac2d959a28e8b70746b"),
    (UNet, "word"): (1966199, "8b6a2d62568b4c01d908d5cf7df991b44d4fa1c7e94ff095f785562f7e0d32df"),
    (UNet, "brats"): (1944585, "b3fef245397f3d063114a1978ee8e805a249161712e566035f62cbaf5125a803"),
}

STAGE_DIVISORS = {
    "stage1": 2,
    "stage2": 4,
    "stage3": 8,
    "stage4": 8,
    "stage5": 4,
    "stage6": 2,
    "stage7": 1,
}
DIVISORS = {
    UNet: STAGE_DIVISORS | {"penultimate": 2, "decoder": 2, "acf": 2},
    ResUNet: STAGE_DIVISORS
    | {"penultimate": 2, "decoder": 2, "acf": 2, "residual": 2, "corrected": 2},
}

STAGE_SOURCES = {
    "stage1": "down_layer1:out",
    "stage2": "down_layer2:out",
    "stage3": "down_layer3:out",
    "stage4": "bottom_layer:out",
    "stage5": "up_layer1:out",
    "stage7": "up_layer3:out",
    "penultimate": "up_layer3:in",
}
SOURCES = {
    UNet: STAGE_SOURCES
    | {"stage6": "up_layer2.adn:out", "decoder": "up_layer2.adn:out", "acf": "up_layer2.conv:out"},
    ResUNet: STAGE_SOURCES | {"residual": "up_layer2.1.conv:out"},
}


def small(cls, in_channels=2, num_classes=3):
    return cls(in_channels, num_classes, channels=(4, 8, 12, 16))


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("dataset", checks.DATASETS)
def test_counts_and_names_are_the_released_ones(cls, dataset):
    count, digest = RELEASED[cls, dataset]
    with torch.device("meta"):
        net = cls(*checks.DATASETS[dataset])
    assert sum(p.numel() for p in net.parameters()) == count
    assert checks.digest(net) == digest


@pytest.mark.parametrize(
    "cls, mean, std",
    [
        (UNet, 0.005314219821914934, 0.13590238091454357),
        (ResUNet, 0.12900398999095777, 6.144159727062774),
    ],
)
def test_output_statistics(cls, mean, std):
    checks.check_statistics(cls(1, 14), mean, std)


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("size", [(32, 32, 32), (24, 40, 16)])
def test_taps(cls, size):
    checks.check_taps(small(cls), size, DIVISORS[cls])


@pytest.mark.parametrize("cls", NETS)
def test_taps_keep_their_values(cls):
    checks.check_taps_keep_their_values(small(cls), SOURCES[cls])


@pytest.mark.parametrize("cls", NETS)
def test_every_parameter_gets_a_gradient(cls):
    checks.check_gradients(small(cls))


@pytest.mark.parametrize("cls", NETS)
def test_bad_input_is_refused(cls):
    checks.check_rejects_bad_input(small(cls))


def test_resunet_residual_and_corrected_differ_by_the_block_input():
    net = small(ResUNet).eval()
    seen = []
    net.up_layer2[0].register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    with torch.no_grad():
        features = net(torch.randn(1, 2, 16, 16, 16), return_features=True).features
    assert features["residual"].data_ptr() != features["corrected"].data_ptr()
    assert seen[0].abs().max() > 0.1
    torch.testing.assert_close(
        features["corrected"] - features["residual"], seen[0], rtol=1e-5, atol=1e-5
    )
