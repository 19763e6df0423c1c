"""Networks by name. To add one: a file with a class like `UNet`, and a line in NETWORKS."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from networks.blocks import init_weights
from networks.espnetv2 import ESPNetV2
from networks.lcovnet import LCOVNet
from networks.mobile_unet import MobileUNet
from networks.output import SegOutput
from networks.resunet import ResUNet
from networks.segresnet import SegResNet
from networks.unet import UNet
from networks.unet2d import UNet2D
from networks.vnet import VNet
from networks.vnet_dual import DualVNet, LeFeDNet

NETWORKS: dict[str, type[nn.Module]] = {
    # teachers
    "resunet": ResUNet,
    "segresnet": SegResNet,
    # students
    "unet": UNet,
    "espnetv2": ESPNetV2,
    "mobile_unet": MobileUNet,
    "lcovnet": LCOVNet,
    # semi-supervised
    "unet2d": UNet2D,
    "vnet": VNet,
    "vnet_dual": DualVNet,
    "vnet_lefed": LeFeDNet,
}

__all__ = ["NETWORKS", "SegOutput", "build_network", "check_network", "init_weights"]


def build_network(name: str, in_channels: int, num_classes: int, **arguments) -> nn.Module:
    """The network `name` with PyTorch's default weights. Unknown names and arguments raise
    ValueError.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown network '{name}'; choose from {', '.join(sorted(NETWORKS))}")
    accepted = list(inspect.signature(NETWORKS[name]).parameters)
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        raise ValueError(
            f"network '{name}' has no argument {', '.join(unknown)}; it takes "
            f"{', '.join(accepted[2:])}"
        )
    return NETWORKS[name](in_channels=in_channels, num_classes=num_classes, **arguments)


def check_network(
    name: str,
    in_channels: int,
    num_classes: int,
    size: Sequence[int] = (),
    batch: int = 1,
    **arguments,
) -> dict[str, int]:
    """Build the network as a trial; -> its `feature_channels`. Takes no memory, unless a `size` is
    given.

    size: also run it on images (batch, in_channels, *size). ValueError, or what the network raises,
    where it cannot be built, cannot take such images, or does not return what it promises.
    """
    with torch.device("cpu" if size else "meta"):
        network = build_network(name, in_channels, num_classes, **arguments)
    channels = getattr(network, "feature_channels", None)
    if not isinstance(channels, dict):
        raise ValueError(
            f"{name}: lacks `feature_channels`, a dict of tap: channels, such as networks/unet.py "
            "has"
        )
    if not size:
        return channels
    with torch.no_grad():
        output = network(torch.zeros(batch, in_channels, *size), return_features=True)
    if not isinstance(output, SegOutput):
        kind = type(output).__name__
        raise ValueError(
            f"{name}: forward(image, return_features=True) must return networks.SegOutput, got "
            f"{kind}"
        )
    if tuple(output.logits.shape) != (batch, num_classes, *size):
        raise ValueError(
            f"{name}: logits of images of {tuple(size)} have the shape "
            f"{tuple(output.logits.shape)}, expected "
            f"{(batch, num_classes, *size)}"
        )
    found = {tap: feature.shape[1] for tap, feature in output.features.items()}
    if found != channels:
        raise ValueError(
            f"{name}: its features have the channels {found}, but feature_channels says {channels}"
        )
    return channels
