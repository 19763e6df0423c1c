"""Fine-tuning: the weights that a training starts from, and parts that it leaves as they are.

init_checkpoint=FILE  a checkpoint of this project, its run folder or, for the network nnunet,
                      the results folder of an nnU-Net or a fold's checkpoint in it
freeze=encoder        the modules that a network names in `encoder_parts`
"""

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import plugins
from utils.checkpoint import CheckpointError, describing, load_checkpoint
from utils.config import ConfigError, trying

# Arguments of the network nnunet that may differ although all weights have the same shapes
SHAPELESS = ("axes", "strides", "norm", "norm_args", "nonlin", "nonlin_args")


@dataclasses.dataclass(frozen=True)
class Initial:
    """Weights to start from. source: the file, for messages. classes: their names, in the order of
    the head. trained_on: (data set, names of the cases that they were trained on).
    """

    source: str
    network: str
    weights: dict[str, Tensor]
    classes: tuple[str, ...]
    num_classes: int
    arguments: dict[str, Any]
    trained_on: tuple[str, frozenset[str]] = ("", frozenset())


def read_initial(cfg: Any) -> Initial:
    """What `init_checkpoint` of a configuration names, which fits the network that is trained;
    CheckpointError for what does not. The heads of other numbers of classes are not in it.
    """
    name, classes = cfg.trained_network, tuple(cfg.class_names)
    make = (cfg.pluggable.get("network") or cfg.pluggable["student"]).registry[name]
    arguments = cfg.network_arguments(name)
    with trying(f"network_args: {name}"):
        network = _shapes(make, cfg.channels, len(classes), arguments)
    path = Path(cfg.init_checkpoint)
    if path.suffix == ".pth" or (path / "plans.json").is_file():
        found = _of_nnunet(path, name, network, classes)
    else:
        found = _of_run(path)
    if found.network != name:
        raise CheckpointError(
            f"{found.source}: holds weights of the network {found.network}, this run trains {name}"
        )
    if name == "nnunet":
        _check_arguments(found, make, arguments)
    kept = dict(found.weights)
    if found.num_classes != len(classes):
        with trying(f"{found.source}: its network"):
            other = _shapes(make, cfg.channels, found.num_classes, arguments)
        for key in _heads(network, other):
            kept.pop(key, None)
    _check_layers(network, kept, found)
    return dataclasses.replace(found, weights=kept)


def load_initial(networks: Sequence[nn.Module], initial: Initial, classes: Sequence[str]) -> str:
    """Put the weights into the networks, which are copies of one; -> what happened, in words."""
    for network in networks:
        network.load_state_dict({**network.state_dict(), **initial.weights})
    text = f"note: starts from {initial.source} ({len(initial.weights)} tensors)"
    if initial.num_classes != len(classes):
        text += (
            f"; its head for {initial.num_classes} classes is left out, one for {len(classes)} is "
            "made anew"
        )
    elif initial.classes and initial.classes != tuple(classes):
        text += (
            f"; its head is kept, although its classes were {', '.join(initial.classes)} and are "
            f"now {', '.join(classes)}"
        )
    return text


def check_freezable(part: str, name: str, network: type) -> None:
    """ConfigError unless the class of the network `name` says what its `part` is."""
    if part not in ("", "encoder"):
        raise ConfigError(f"freeze: unknown part '{part}'; known: encoder")
    if part and not getattr(network, "encoder_parts", ()):
        raise ConfigError(
            f"freeze: {name} names no encoder; give its class an attribute encoder_parts, the "
            "names of its modules that are the encoder, as networks/unet.py has"
        )


def freeze(networks: Sequence[nn.Module], part: str) -> str:
    """Keep a part of each network as it is, the first being the one that is trained; -> which
    modules and how many parameters, in words.

    Its parameters get no gradient. It stays in evaluation mode, whatever mode its network is put
    into: batch norms keep their statistics and normalise by them, and nothing is dropped out.
    """
    names = networks[0].encoder_parts
    for network in networks:
        for name in names:
            frozen = network.get_submodule(name).requires_grad_(False).eval()
            for module in frozen.modules():
                module.frozen = True  # for utils.modes.running_norms
            frozen.train = types.MethodType(_stay, frozen)
    parts = [networks[0].get_submodule(name) for name in names]
    count = sum(p.numel() for module in parts for p in module.parameters())
    every = sum(p.numel() for p in networks[0].parameters())
    return (
        f"note: frozen: the {part} ({', '.join(names)}), {count:,} of {every:,} parameters, with "
        "its batch norm statistics"
    )


def seen_before(initial: Initial, dataset: str, splits: Mapping[str, Sequence]) -> None:
    """CheckpointError where the weights were trained on cases of this data set that the run is
    validated or tested on. splits: list -> its cases.
    """
    before, trained = initial.trained_on
    for split in ("val", "test"):
        seen = sorted(case.name for case in splits.get(split, ()) if case.name in trained)
        if seen and before == dataset:
            more = f" and {len(seen) - 10} more" if len(seen) > 10 else ""
            raise CheckpointError(
                f"{initial.source}: was trained on {', '.join(seen[:10])}{more} of this run's list "
                f"{split}, so its scores would say nothing; start from weights of these lists"
            )


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train`: the mode does not change."""
    return module


def _shapes(make: type, channels: int, classes: int, arguments: Mapping) -> nn.Module:
    """A network without values; of the user's own, which need not be made so, with some."""
    with torch.device("cpu" if plugins.is_plugged_in(make) else "meta"):
        return make(in_channels=channels, num_classes=classes, **arguments)


def _heads(network: nn.Module, other: nn.Module) -> list[str]:
    """The tensors whose shapes depend on the number of classes, in which the two differ."""
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    return [key for key, value in network.state_dict().items() if value.shape != shapes.get(key)]


def _of_run(path: Path) -> Initial:
    """Of a checkpoint of this project or of a run folder: its best.pt or, without one, last.pt."""
    if path.is_dir():
        path = next((path / n for n in ("best.pt", "last.pt") if (path / n).is_file()), path)
    content = load_checkpoint(path)
    described, weights = content.get("network"), content.get("weights")
    whole = isinstance(described, dict) and {"name", "num_classes", "arguments"} <= set(described)
    tensors = isinstance(weights, dict) and all(isinstance(v, Tensor) for v in weights.values())
    if not whole or not tensors:
        raise CheckpointError(
            f"{path}: no checkpoint of a training of this project, which has 'network' and "
            "'weights'; tools/import_checkpoint.py makes one of released weights"
        )
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise CheckpointError(f"{path}: has weights that are not finite")
    with describing(path):
        lists, config = content.get("cases", {}), content.get("config", {})
        cases = [*lists.get("labelled", ()), *lists.get("train", ()), *lists.get("unlabelled", ())]
        return Initial(
            source=str(path),
            network=str(described["name"]),
            weights=weights,
            classes=tuple(content.get("class_names", ())),
            num_classes=int(described["num_classes"]),
            arguments=dict(described["arguments"]),
            trained_on=(str(config.get("dataset", "")), frozenset(cases)),
        )


def _of_nnunet(path: Path, name: str, network: nn.Module, classes: Sequence[str]) -> Initial:
    """Of a results folder of nnU-Net, its first fold, or of a fold's checkpoint."""
    from utils import nnunet  # builds on utils/run.py, which imports this module

    if name != "nnunet":
        raise CheckpointError(f"{path}: weights of an nnU-Net are for nnunet, not for {name}")
    inside = path.suffix == ".pth"
    results = nnunet.read_results(path.parent.parent if inside else path)
    fold = path.parent.name.removeprefix("fold_") if inside else results.chosen(())[0]
    if inside:
        results = dataclasses.replace(results, folds={fold: path})
    weights, _ = nnunet.load_fold(results, fold)
    own, source = tuple(results.classes), str(results.folds[fold])
    try:
        weights = network.renamed(weights)
    except ValueError as problem:
        raise CheckpointError(f"{source}: {problem}") from problem
    if sorted(own) == sorted(classes):  # the head in the order of the configuration
        order = results.outputs(classes, source)
        shapes = network.state_dict()
        for key in [key for key in weights if key.startswith("decoder.seg_layers.")]:
            if key in shapes and weights[key].shape == shapes[key].shape:
                weights[key] = weights[key][order]
        own = tuple(classes)
    return Initial(source, "nnunet", weights, own, len(own), results.network)


def _check_arguments(found: Initial, make: type, arguments: Mapping) -> None:
    """CheckpointError where networks of the same shapes would compute something else."""
    usual = {key: entry.default for key, entry in inspect.signature(make).parameters.items()}
    usual |= {"norm_args": {"eps": 1e-5, "affine": True}, "nonlin_args": {}}
    wrong = []
    for key in SHAPELESS:
        before = found.arguments.get(key, usual[key])
        now = arguments.get(key, usual[key])
        if _listed(before) != _listed(now):
            wrong.append(f"{key}: {before} in the file, {now} here")
    if wrong:
        raise CheckpointError(
            f"{found.source}: its network computes something else ({'; '.join(wrong)}); set "
            "network_args of nnunet as tools/new_config.py --nnunet does"
        )


def _listed(value: Any) -> Any:
    """Tuples as lists, and one number of a stride as three."""
    if isinstance(value, (list, tuple)):
        return [[item] * 3 if type(item) is int else _listed(item) for item in value]
    return value


def _check_layers(network: nn.Module, weights: Mapping[str, Tensor], found: Initial) -> None:
    """CheckpointError that names the layers that are missing, unknown or of another shape."""
    own = network.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in found.weights]
    wrong += [f"{key} is unknown here" for key in weights if key not in own]
    wrong += [
        f"{key} is {list(weights[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{found.source}: does not fit {found.network} as it is here ({'; '.join(wrong[:8])}"
            f"{more}); set in_channels and network_args as they were there"
        )
