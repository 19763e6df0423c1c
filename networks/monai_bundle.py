"""A network from a MONAI bundle as a teacher: its class, its arguments and its weights, and nothing
else of the bundle.

    BUNDLE/configs/inference.json (or .yaml, .yml)   "network_def": {"_target_": "UNet", ...}
    BUNDLE/models/model.pt                           its weights

A bundle's configuration is code: MONAI evaluates texts that begin with `$` and follows references
that begin with `@`. Here the definition of the network must be a class of monai.networks.nets with
plain values, and the rest of the file is not looked at.
"""

import dataclasses
import importlib
import inspect
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.output import SegOutput
from utils.checkpoint import CheckpointError, load_foreign
from utils.config import ConfigError, parse_yaml, trying

SUFFIXES = (".json", ".yaml", ".yml")
KEYS = ("network_def", "network")
NETS = "monai.networks.nets"
TARGET = re.compile(rf"(?:{re.escape(NETS)}\.)?(?:(\w+)\.)?([A-Za-z]\w*)")
INSIDE = ("model", "state_dict", "model_state_dict", "network")  # where a file keeps the weights
LARGEST_FILE = 4 * 2**20  # bytes of a configuration


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a bundle says of its network. place: the file and key, for messages."""

    place: str
    network: type[nn.Module]
    arguments: dict[str, Any]
    weights: Path


class MonaiTeacher(nn.Module):
    """A network of MONAI as ours: `(B, C, H, W, D)` -> logits `(B, K, H, W, D)`, without taps."""

    dims = 3
    feature_channels: dict[str, int] = {}  # noqa: RUF012 - none, whatever the network

    def __init__(self, network: nn.Module, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.network, self.in_channels, self.num_classes = network, in_channels, num_classes

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        logits = self.network(image)
        return SegOutput(logits, {}) if return_features else logits


def is_bundle(name: str) -> bool:
    """Whether a path is that of a bundle: its folder, or a configuration file in it."""
    path = Path(name)
    return path.suffix in SUFFIXES or (path / "configs").is_dir()


def read_bundle(name: str) -> Bundle:
    """The network of a bundle, named by its folder or by a file of its `configs`; CheckpointError
    for what is missing or is no plain definition of a network of MONAI. Nothing of it is run.
    """
    given = Path(name)
    folder, places = given, [given / "configs" / f"inference{suffix}" for suffix in SUFFIXES]
    if given.suffix in SUFFIXES:
        folder, places = given.parent.parent, [given]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{name}: no MONAI bundle; expected configs/inference.json or .yaml in it"
        )
    content = _read(path)
    key = next((key for key in KEYS if key in content), "")
    if not key:
        raise CheckpointError(f"{path}: defines no network; expected {' or '.join(KEYS)}")
    place, defined = f"{path}, {key}", content[key]
    _check_plain(defined, place, [])
    if not isinstance(defined, dict) or not isinstance(defined.get("_target_"), str):
        raise CheckpointError(f"{place}: expected a mapping with _target_, got {defined!r:.80}")
    arguments = {k: value for k, value in defined.items() if k not in ("_target_", "_desc_")}
    network = _class_of(defined["_target_"], place)
    _check_arguments(network, arguments, place)
    return Bundle(place, network, arguments, _weights_of(folder))


def load_monai(
    bundle: Bundle, in_channels: int, class_names: Sequence[str], patch_size: Sequence[int]
) -> MonaiTeacher:
    """The frozen network with its weights, after a pass over one patch; CheckpointError where it
    does not take such images or give a channel for each class.
    """
    state, name = _state_of(bundle.weights), bundle.network.__name__
    _check_fits(_shapes(bundle) or state, state, bundle)
    with trying(f"{bundle.place}: {name}"):
        network = bundle.network(**bundle.arguments)
    _check_fits(network.state_dict(), state, bundle)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    size = f"a patch of {in_channels} channel(s), {list(patch_size)}"
    try:
        with torch.no_grad():
            output = network(torch.zeros(1, in_channels, *patch_size))
    except Exception as error:  # MONAI's networks raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{bundle.place}: {name} does not take {size} ({reason}); set in_channels and "
            "patch_size as it was trained"
        ) from error
    expected = (1, len(class_names), *patch_size)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != expected:
        raise CheckpointError(
            f"{bundle.place}: {name} makes {found} of {size}, expected {expected}: one channel for "
            f"each of {', '.join(class_names)}"
        )
    return MonaiTeacher(network, in_channels, len(class_names)).eval()


def described(bundle: Bundle, teacher: MonaiTeacher) -> str:
    """What was loaded, in one line."""
    count = sum(p.numel() for p in teacher.parameters())
    return (
        f"{bundle.network.__name__} of {bundle.place}, weights {bundle.weights}: {count:,} "
        f"parameters, {teacher.in_channels} channel(s), {teacher.num_classes} classes; logits "
        "alone, no feature maps. How it expects images to be prepared is not read"
    )


def _shapes(bundle: Bundle) -> dict[str, Tensor] | None:
    """The state dict without values, so that no memory is taken for a network that the file does
    not hold; None for a class that cannot be made so.
    """
    try:
        with torch.device("meta"):
            return bundle.network(**bundle.arguments).state_dict()
    except Exception:  # MONAI's networks raise anything
        return None


def _check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], bundle: Bundle) -> None:
    """CheckpointError that names what of the weights is not as the network has it."""
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown to {bundle.network.__name__}" for key in state if key not in own]
    wrong += [
        f"{key} is {list(state[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{bundle.weights}: does not fit {bundle.place} ({'; '.join(wrong[:5])}{more})"
        )


def _read(path: Path) -> dict:
    """A configuration as plain values."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _check_plain(value: Any, place: str, inside: list[str]) -> None:
    """CheckpointError for a value that MONAI would not take literally."""
    where = ": ".join([place, ".".join(inside)]) if inside else place
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, place, inside)
            _check_plain(item, place, [*inside, str(key)])
        if inside and "_target_" in value:
            raise CheckpointError(f"{where}: makes another object ({value['_target_']!r}); refused")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, place, [*inside, str(index)])
    elif isinstance(value, str):
        kinds = {"$": "an expression, which is code", "@": "a reference", "%": "a macro"}
        kind = next((text for sign, text in kinds.items() if sign in value), "")
        if kind:
            raise CheckpointError(
                f"{where}: {value!r:.80} is {kind}; refused, nothing was run. Only plain values "
                "are taken: write the value itself"
            )
    elif type(value) not in (int, float, bool, type(None)):
        raise CheckpointError(f"{where}: {value!r:.80} is no plain value")


def _class_of(target: str, place: str) -> type[nn.Module]:
    """The class that `_target_` names; the only module that is imported is MONAI's own."""
    match = TARGET.fullmatch(target)
    found = None
    if match:
        nets = importlib.import_module(NETS)
        found = getattr(nets, match[2], None)
    inside = inspect.isclass(found) and found.__module__.startswith(f"{NETS}.")
    same = inside and match[1] in (None, found.__module__.rpartition(".")[2])
    if not same or not issubclass(found, nn.Module):
        raise CheckpointError(
            f"{place}: _target_ {target!r:.80} is no network of {NETS}; refused, nothing was run"
        )
    return found


def _check_arguments(network: type, arguments: dict[str, Any], place: str) -> None:
    """CheckpointError for arguments that the class does not have or that fetch something."""
    parameters = inspect.signature(network).parameters
    for key, value in arguments.items():
        if key not in parameters or parameters[key].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            raise CheckpointError(
                f"{place}: {network.__name__} has no argument {key} ({value!r:.40}); it takes "
                f"{', '.join(parameters)}"
            )
    for key, parameter in parameters.items():
        if "pretrained" in key and arguments.get(key, parameter.default):
            raise CheckpointError(
                f"{place}: {network.__name__} would fetch weights from elsewhere ({key}); refused; "
                f"set {key} to false"
            )


def _weights_of(folder: Path) -> Path:
    path = folder / "models" / "model.pt"
    script = folder / "models" / "model.ts"
    if path.is_file() and not _is_script(path):
        return path
    if path.is_file() or script.is_file():
        raise CheckpointError(
            f"{path if path.is_file() else script}: TorchScript is code, which reading it would "
            "run; refused. Get the weights, models/model.pt, from the bundle's authors"
        )
    raise CheckpointError(f"{path}: no such file; expected the weights of the bundle")


def _is_script(path: Path) -> bool:
    """Whether a file is TorchScript, whatever its name."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_of(path: Path) -> dict[str, Tensor]:
    """The weights in a file: tensors by name, or a mapping that holds them under a usual name."""
    content = load_foreign(path)
    for key in INSIDE:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{path}: holds no weights; expected tensors by name, or these under "
            f"{', '.join(INSIDE)}"
        )
    if not all(torch.isfinite(value).all() for value in content.values()):
        raise CheckpointError(f"{path}: has weights that are not finite")
    return {str(key).removeprefix("module."): value for key, value in content.items()}
