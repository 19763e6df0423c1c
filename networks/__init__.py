"""Networks by name. To add one: a file with a class like `UNet`, and a line in NETWORKS."""

import inspect

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

__all__ = ["NETWORKS", "SegOutput", "build_network", "init_weights"]


def build_network(name: str, in_channels: int, num_classes: int, **arguments) -> nn.Module:
    """The network `name` with PyTorch's default weights. Unknown names and arguments raise ValueError."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network '{name}'; choose from {', '.join(sorted(NETWORKS))}")
    accepted = list(inspect.signature(NETWORKS[name]).parameters)
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        raise ValueError(f"network '{name}' has no argument {', '.join(unknown)}; it takes {', '.join(accepted[2:])}")
    return NETWORKS[name](in_channels=in_channels, num_classes=num_classes, **arguments)
