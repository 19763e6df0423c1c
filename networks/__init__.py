"""Networks by name. To add one: a file with a class like `UNet`, and a line in NETWORKS."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.registry import Registry, lazily

if TYPE_CHECKING:
    from torch import nn

NETWORKS = Registry(
    {
        # teachers
        "resunet": "networks.resunet:ResUNet",
        "segresnet": "networks.segresnet:SegResNet",
        # students
        "unet": "networks.unet:UNet",
        "espnetv2": "networks.espnetv2:ESPNetV2",
        "mobile_unet": "networks.mobile_unet:MobileUNet",
        "lcovnet": "networks.lcovnet:LCOVNet",
        # both: a trained nnU-Net as a teacher, one of its architecture as a student
        "nnunet": "networks.nnunet:NnUNet",
        # semi-supervised
        "unet2d": "networks.unet2d:UNet2D",
        "vnet": "networks.vnet:VNet",
        "vnet_dual": "networks.vnet_dual:DualVNet",
        "vnet_lefed": "networks.vnet_dual:LeFeDNet",
    }
)

__all__ = [
    "NETWORKS",
    "SegOutput",
    "build_network",
    "check_network",
    "described_network",
    "init_weights",
]
__getattr__ = lazily(__name__, {"SegOutput": "networks.output", "init_weights": "networks.blocks"})


def build_network(name: str, in_channels: int, num_classes: int, /, **arguments) -> "nn.Module":
    """The network `name` with PyTorch's default weights. Unknown names and arguments raise
    ValueError. `arguments` may be of any name, `name` too.
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


def described_network(described: Mapping[str, Any], weights: Mapping, source: str) -> "nn.Module":
    """The network that a checkpoint describes, with its weights. CheckpointError, which begins with
    `source`, for what does not go together: sizes are compared before memory is taken for them.
    """
    import torch

    from utils.checkpoint import check_network_weights, describing, load_network_weights
    from utils.plugins import is_plugged_in

    def build() -> "nn.Module":
        return build_network(
            described["name"],
            described["in_channels"],
            described["num_classes"],
            **described["arguments"],
        )

    with describing(source):
        # the user's own need not be ones that can be built without memory
        if not is_plugged_in(NETWORKS[described["name"]]):
            with torch.device("meta"):
                check_network_weights(build(), weights, source)
        network = build()
    load_network_weights(network, weights, source)
    return network


def check_network(
    name: str,
    in_channels: int,
    num_classes: int,
    size: Sequence[int] = (),
    batch: int = 1,
    /,
    **arguments,
) -> dict[str, int]:
    """Build the network as a trial; -> its `feature_channels`. Takes no memory, unless a `size` is
    given.

    size: also run it on images (batch, in_channels, *size). ValueError, or what the network raises,
    where it cannot be built, cannot take such images, or does not return what it promises.
    """
    import torch  # names and arguments are checked without it

    from networks.output import SegOutput

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
