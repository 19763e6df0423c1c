"""Semi-supervised methods by name. To add one: a file with a class like `CRKD`, and a line in
SSL_METHODS.
"""

import inspect
from collections.abc import Callable

from torch import nn

from losses import PRESETS
from methods.acmt import ACMT
from methods.base import Method
from methods.crkd import CRKD
from methods.crossmatch import CrossMatch
from methods.lefed import LeFeD
from methods.mlrpl import MLRPL
from methods.supervised import Supervised
from methods.unimatch import UniMatch

SSL_METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "crkd": CRKD,
    "unimatch": UniMatch,
    "crossmatch": CrossMatch,
    "acmt": ACMT,
    "mlrpl": MLRPL,
    "lefed": LeFeD,
}

__all__ = ["PRESETS", "SSL_METHODS", "Method", "build_method"]


def build_method(
    name: str,
    make_network: Callable[[], nn.Module],
    *,
    max_steps: int,
    preset: str = "clean",
    **method_args,
) -> Method:
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
