"""Distillation methods by name. To add one: a file with a module like `ACFBCKD`, and a line in
KD_METHODS.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from utils.config import ConfigError, check_names
from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

KD_METHODS = Registry(
    {
        "acf_bckd": "losses.acf_bckd:ACFBCKD",
        "kd": "losses.kd:KD",
        "at": "losses.at:AT",
        "nkd": "losses.nkd:NKD",
        "skd": "losses.skd:SKD",
        "ifvd": "losses.ifvd:IFVD",
        "cwd": "losses.cwd:CWD",
        "dist": "losses.dist:DIST",
        "dkd": "losses.dkd:DKD",
        "cirkd": "losses.cirkd:CIRKD",
        "emkd": "losses.emkd:EMKD",
        "mskd_cakd": "losses.mskd_cakd:MSKDCAKD",
    }
)

PRESETS = ("clean", "as_released")

__all__ = ["KD_METHODS", "PRESETS", "build_kd", "methods_in"]


def methods_in(name: str) -> list[str]:
    """The methods of 'kd' or of several at once, 'kd+cwd', in alphabetical order, so that 'cwd+kd'
    is the same; ConfigError for one that is unknown or there twice.
    """
    methods = name.split("+")
    if len(methods) == 1:
        return methods
    if "supervised" in methods:
        raise ConfigError(
            f"method: '{name}': 'supervised' is training without a teacher and joins no method; "
            "the segmentation loss is part of every distillation, so leave 'supervised' out"
        )
    check_names("method", methods, KD_METHODS)
    twice = sorted({method for method in methods if methods.count(method) > 1})
    if twice:
        raise ConfigError(
            f"method: '{name}' has {', '.join(twice)} twice; for more of a method raise its "
            "weights in method_args"
        )
    return sorted(methods)


def build_kd(
    name: str,
    student_channels: Mapping[str, int],
    teacher_channels: Mapping[str, int],
    num_classes: int,
    /,
    *,
    multilabel: bool = False,
    preset: str = "clean",
    incomplete: bool = False,
    **method_args,
) -> "nn.Module":
    """The distillation module `name`, called as `kd(student, teacher, label, progress) -> {term:
    weighted scalar}`.

    student_channels, teacher_channels: `net.feature_channels` of the two networks, to size adapters
    and check taps.
    num_classes: channels of the logits, background included (for multi-label data: the number of
    regions).
    multilabel: regions may overlap; probabilities are sigmoids and labels are `(B, num_classes,
    *spatial)`.
    preset: 'clean', or 'as_released' for the arithmetic of the released reference code.
    incomplete: labels may hold UNKNOWN (losses/incomplete.py). A class that has the attribute
    `incomplete` leaves such voxels out where it is True, as it then is in the module; others must
    be given labels without them.
    Of several methods, 'kd+cwd', `method_args` has those of each under its name.
    Raises ValueError for an unknown name, preset or argument, and for a tap that a network lacks.
    """
    methods = methods_in(name)
    if len(methods) > 1:
        from losses.combined import Combined  # needs torch, the names above do not

        check_names(f"method {name}", method_args, methods)
        how = {"multilabel": multilabel, "preset": preset, "incomplete": incomplete}
        taps = student_channels, teacher_channels
        built = {
            method: build_kd(method, *taps, num_classes, **how, **method_args.get(method, {}))
            for method in methods
        }
        return Combined(built, multilabel)
    if name not in KD_METHODS:
        raise ValueError(f"unknown method '{name}'; choose from {', '.join(sorted(KD_METHODS))}")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset '{preset}'; choose from {', '.join(PRESETS)}")
    accepted = list(inspect.signature(KD_METHODS[name]).parameters)
    unknown = [key for key in method_args if key not in accepted]
    if unknown:
        raise ValueError(
            f"method '{name}' has no argument {', '.join(unknown)}; it takes "
            f"{', '.join(accepted[5:])}"
        )
    module = KD_METHODS[name](
        student_channels=dict(student_channels),
        teacher_channels=dict(teacher_channels),
        num_classes=num_classes,
        multilabel=multilabel,
        preset=preset,
        **method_args,
    )
    if incomplete and hasattr(module, "incomplete"):
        module.incomplete = True
    return module
