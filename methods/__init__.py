"""Semi-supervised methods by name. To add one: a file with a class like `CRKD`, and a line in
SSL_METHODS.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from losses import PRESETS
from utils.registry import Registry, lazily

if TYPE_CHECKING:
    from torch import nn

    from methods.base import Method

SSL_METHODS = Registry(
    {
        "supervised": "methods.supervised:Supervised",
        "crkd": "methods.crkd:CRKD",
        "unimatch": "methods.unimatch:UniMatch",
        "crossmatch": "methods.crossmatch:CrossMatch",
        "acmt": "methods.acmt:ACMT",
        "mlrpl": "methods.mlrpl:MLRPL",
        "lefed": "methods.lefed:LeFeD",
    }
)

__all__ = ["PRESETS", "SSL_METHODS", "Method", "build_method"]
__getattr__ = lazily(__name__, {"Method": "methods.base"})


def build_method(
    name: str,
    make_network: "Callable[[], nn.Module]",
    /,
    *,
    max_steps: int,
    preset: str = "clean",
    **method_args,
) -> "Method":
    """The method `name`: networks, losses and their state.

    make_network: makes the segmentation network, called once for each that the method trains.
    max_steps: length of the training in steps, for ramps. preset: 'clean', or 'as_released' for the
    arithmetic of the released code. Raises ValueError for an unknown name, preset or argument.
    """
    if name not in SSL_METHODS:
        raise ValueError(f"unknown method '{name}'; choose from {', '.join(sorted(SSL_METHODS))}")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset '{preset}'; choose from {', '.join(PRESETS)}")
    accepted = list(inspect.signature(SSL_METHODS[name]).parameters)
    unknown = [key for key in method_args if key not in accepted]
    if unknown:
        known = ", ".join(accepted[3:]) or "none"
        raise ValueError(f"method '{name}' has no argument {', '.join(unknown)}; it takes {known}")
    return SSL_METHODS[name](make_network, max_steps=max_steps, preset=preset, **method_args)
