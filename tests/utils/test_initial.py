"""Weights that a training starts from, and frozen encoders."""

import copy
from types import SimpleNamespace

import pytest
import torch

from networks import NETWORKS, build_network
from networks.nnunet import NnUNet
from tests.nnunet_folders import LABELS, plan_arguments, write_results
from utils import initial
from utils.checkpoint import CheckpointError, atomic_save, load_checkpoint
from utils.config import ConfigError
from utils.modes import statistics_estimated

SMALL = {
    "resunet": {"channels": [4, 4, 8, 8]},
    "segresnet": {"init_filters": 4},
    "unet": {"channels": [2, 4, 4, 8]},
    "espnetv2": {"channels": [16, 32, 48, 64]},
    "mobile_unet": {"width": 0.25},
    "lcovnet": {"channels": [4, 6, 8, 12, 16]},
    "nnunet": {"features_per_stage": [4, 4, 8, 8], "norm": "BatchNorm3d"},
    "unet2d": {"channels": [4, 4, 8, 8, 8]},
    "vnet": {"n_filters": 4},
    "vnet_dual": {"n_filters": 4},
    "vnet_lefed": {"n_filters": 4},
}


def settings(name, path, classes=("background", "organ", "lesion"), in_channels=1, **arguments):
    """What `read_initial` asks of a configuration."""
    arguments = SMALL[name] | arguments
    return SimpleNamespace(
        trained_network=name,
        class_names=classes,
        channels=in_channels,
        init_checkpoint=str(path),
        pluggable={"student": SimpleNamespace(registry=NETWORKS)},
        network_arguments=lambda _: arguments,
    )


def write_checkpoint(path, name="unet", classes=("background", "organ", "lesion"), **more):
    torch.manual_seed(1)
    network = build_network(name, 1, len(classes), **SMALL[name])
    described = {"name": name, "in_channels": 1, "num_classes": len(classes)}
    described["arguments"] = SMALL[name]
    content = {"network": described, "weights": network.state_dict(), "class_names": list(classes)}
    atomic_save(content | more, path)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_the_encoder_is_what_the_coarsest_features_depend_on(name):
    torch.manual_seed(0)
    network = build_network(name, 1, 3, **SMALL[name]).train()
    size = (32,) * network.dims
    image = torch.randn(2, 1, *size)
    if name.startswith(("unet2d", "vnet")):
        given = network.encode(image) if hasattr(network, "encode") else network.encoder(image)
        coarse = given[-1]
    else:
        coarse = network(image, return_features=True).features["stage4"]
    coarse.square().sum().backward()
    reached = {key for key, value in network.named_parameters() if value.grad is not None}
    network.zero_grad()
    twin = copy.deepcopy(network)
    said = initial.freeze([network, twin], "encoder")
    frozen = {key for key, value in network.named_parameters() if not value.requires_grad}
    if name == "mobile_unet":  # its encoder ends behind that tap, with one more convolution
        reached |= {"conv1x1_encode.weight", "conv1x1_encode.bias"}
    assert frozen and frozen == reached
    count = sum(p.numel() for key, p in network.named_parameters() if key in frozen)
    assert f" {count:,} of {sum(p.numel() for p in network.parameters()):,} parameters" in said

    before = copy.deepcopy(network.state_dict())
    for each in (network, twin):
        each.train()  # as methods do at every step
        output = each(image)
        output = output[0] if isinstance(output, tuple) else output
        output.square().sum().backward()
        torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
        inside = [each.get_submodule(part) for part in network.encoder_parts]
        assert not any(module.training for part in inside for module in part.modules())
        assert each.training
    # as a validation does
    with statistics_estimated(network, lambda: network(image)):
        assert all(
            torch.equal(value, before[key])
            for key, value in network.state_dict().items()
            if key.startswith(tuple(f"{part}." for part in network.encoder_parts))
        )
    changed = {key for key, value in network.state_dict().items() if (value != before[key]).any()}
    assert changed
    assert not any(key.startswith(f"{part}.") for key in changed for part in network.encoder_parts)


def test_weights_are_those_of_the_file_and_only_another_head_is_made_anew(tmp_path):
    path = tmp_path / "best.pt"
    source = write_checkpoint(path).state_dict()
    for place in (path, tmp_path):
        found = initial.read_initial(settings("unet", place))
        network = build_network("unet", 1, 3, **SMALL["unet"])
        said = initial.load_initial([network], found, ("background", "organ", "lesion"))
        assert all(torch.equal(v, source[k]) for k, v in network.state_dict().items())
        assert str(path) in said and "head" not in said
    assert "now a, b, c" in initial.load_initial([network], found, ("a", "b", "c"))
    classes = ("background", "organ", "lesion", "vessel")
    found = initial.read_initial(settings("unet", path, classes))
    torch.manual_seed(2)
    network = build_network("unet", 1, 4, **SMALL["unet"])
    fresh = copy.deepcopy(network.state_dict())
    said = initial.load_initial([network], found, classes)
    assert "its head for 3 classes is left out, one for 4 is made anew" in said
    for key, value in network.state_dict().items():
        expected = source[key] if source[key].shape == value.shape else fresh[key]
        assert torch.equal(value, expected), key
        # by shape alone: nothing but the last layer has the classes
        assert (source[key].shape == value.shape) or key.startswith("up_layer3")


def test_an_nnunet_gives_its_weights_in_the_order_of_the_classes(tmp_path):
    folder = write_results(tmp_path, plan_arguments(), folds=("0", "1"))
    names = list(LABELS)
    plan = plan_arguments() | {"norm": "InstanceNorm3d"}
    torch.manual_seed(1)
    source = NnUNet(1, 3, **plan).state_dict()  # of fold 1
    order = [0, 2, 1]
    checkpoint = folder / "fold_1/checkpoint_final.pth"
    found = initial.read_initial(
        settings("nnunet", checkpoint, tuple(names[k] for k in order), **plan)
    )
    for key, value in source.items():
        expected = value[order] if "seg_layers" in key else value
        assert torch.equal(found.weights[key], expected), key
    whole = initial.read_initial(settings("nnunet", folder, tuple(names), **plan))
    assert whole.source.endswith("fold_0/checkpoint_final.pth")
    turned = settings("nnunet", folder, tuple(names), **plan | {"axes": [0, 1, 2]})
    with pytest.raises(CheckpointError, match=r"something else \(axes: "):
        initial.read_initial(turned)
    with pytest.raises(CheckpointError, match="are for nnunet, not for unet"):
        initial.read_initial(settings("unet", folder, tuple(names)))


def test_what_does_not_fit_is_refused_with_its_layers(tmp_path):
    path = tmp_path / "best.pt"
    write_checkpoint(path)
    for cfg, expected in (
        (settings("resunet", path), "of the network unet, this run trains resunet"),
        (settings("unet", path, in_channels=2), r"down_layer1\.\S+ is \[2, 1, .*expected \[2, 2, "),
        (settings("unet", path, channels=[2, 4, 4, 12]), "bottom_layer"),
        (settings("unet", tmp_path / "none.pt"), "no such checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            initial.read_initial(cfg)
    content = load_checkpoint(path)
    first = next(iter(content["weights"]))
    lost = {k: v for k, v in content["weights"].items() if k != first} | {"odd": torch.zeros(1)}
    atomic_save(content | {"weights": lost}, path)
    with pytest.raises(CheckpointError, match=f"{first} is missing; odd is unknown here"):
        initial.read_initial(settings("unet", path))
    atomic_save(content | {"cases": ["a"]}, path)
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        initial.read_initial(settings("unet", path))
    atomic_save({"state_dict": lost}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of a training of this project"):
        initial.read_initial(settings("unet", path))
    with pytest.raises(ConfigError, match="unknown part 'decoder'; known: encoder"):
        initial.check_freezable("decoder", "unet", NETWORKS["unet"])
    with pytest.raises(ConfigError, match="Linear names no encoder"):
        initial.check_freezable("encoder", "Linear", torch.nn.Linear)


def test_weights_that_saw_the_validation_cases_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    write_checkpoint(path, cases={"labelled": ["a", "b"]}, config={"dataset": "liver"})
    found = initial.read_initial(settings("unet", path))
    splits = {"labelled": [SimpleNamespace(name="c")], "val": [SimpleNamespace(name="b")]}
    initial.seen_before(found, "spleen", splits)
    with pytest.raises(CheckpointError, match="was trained on b of this run's list val"):
        initial.seen_before(found, "liver", splits)
