"""Counts against the published table, a hand count, and sanity of the two measurements."""

import functools

import pytest
import torch
from torch import nn

from networks.espnetv2 import ESPNetV2
from networks.lcovnet import LCOVNet
from networks.mobile_unet import MobileUNet
from networks.resunet import ResUNet
from networks.segresnet import SegResNet
from networks.unet import UNet
from utils.complexity import count_macs, count_parameters, measure_latency, peak_memory, saved_bytes


# Published convolution GMACs of one sample at 96 x 96 x 96: BTCV, WORD, BraTS. The tolerance is
# above half a digit, because one of them, Mobile U-Net's 2.2114979, was published as 2.212.
@pytest.mark.parametrize(
    "cls, published",
    [
        (ResUNet, (88.612, 91.980, 81.087)),
        (SegResNet, (61.450, 61.493, 62.441)),
        (UNet, (8.122, 8.695, 6.306)),
        (ESPNetV2, (0.854, 0.923, 0.752)),
        (MobileUNet, (2.348, 2.390, 2.212)),
        (LCOVNet, (10.978, 11.021, 10.950)),
    ],
)
def test_macs_are_the_published_ones(cls, published):
    for (in_channels, num_classes), gmacs in zip([(1, 14), (1, 17), (4, 3)], published):
        with torch.device("meta"):
            net = cls(in_channels, num_classes)
        assert count_macs(net, (1, in_channels, 96, 96, 96)) / 1e9 == pytest.approx(
            gmacs, abs=0.0006
        )


def test_macs_by_hand():
    net = nn.Sequential(
        # 6 x 4^3 outputs, 2 inputs each, 27 taps
        nn.Conv3d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm3d(6),
        # 6 x 4^3 inputs, 4 outputs each, 64 taps
        nn.ConvTranspose3d(6, 8, 4, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 512, 3),  # left out by the convention
    )
    by_hand = 6 * 64 * 2 * 27 + 6 * 64 * 4 * 64
    assert count_macs(net, (1, 4, 8, 8, 8)) == by_hand
    assert count_macs(net, (3, 4, 8, 8, 8)) == 3 * by_hand


def test_counting_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    count_macs(net, (1, 1, 8, 8, 8))
    measure_latency(net, (1, 1, 8, 8, 8), repeats=1)
    assert net.training and net[1].training
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_count_parameters():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net[0].bias.requires_grad_(False)
    assert count_parameters(net) == 12 + 4 + 8
    assert count_parameters(net, trainable_only=True) == 12 + 8


def test_latency_is_positive_and_restores_threads():
    threads = torch.get_num_threads()
    assert measure_latency(nn.Conv3d(1, 2, 3), (1, 1, 8, 8, 8), repeats=2, threads=1) > 0
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="repeats"):
        measure_latency(nn.Conv3d(1, 2, 3), (1, 1, 8, 8, 8), repeats=0)


@pytest.mark.slow
def test_peak_memory_of_a_known_allocation():
    # Two maps of 64 MiB live at once; a fresh process that imports torch takes seconds to start.
    make = functools.partial(nn.Sequential, nn.Softplus(), nn.Softplus())
    assert peak_memory(make, (1, 16, 1024, 1024), threads=1) == pytest.approx(128, abs=30)


def test_saved_bytes_are_what_autograd_keeps():
    """A convolution keeps its input, a ReLU its output; weights do not count, nor does the input
    twice.
    """
    voxels = 8**3
    net = torch.nn.Sequential(
        torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(3, 1, 1)
    )
    assert saved_bytes(net, (2, 2, 8, 8, 8)) == 4 * 2 * voxels * (2 + 3)
    double = torch.nn.Sequential(net, torch.nn.Sigmoid())
    assert saved_bytes(double, (2, 2, 8, 8, 8)) == 4 * 2 * voxels * (2 + 3 + 1)
