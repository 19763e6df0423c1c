"""Networks of MONAI bundles: what is loaded, and what is refused without being run."""

import json
import os
import pickle

import pytest
import torch
import yaml
from monai.networks import nets

from networks.monai_bundle import described, is_bundle, load_monai, read_bundle
from utils.checkpoint import CheckpointError
from utils.config import ConfigError

CLASSES = ("background", "organ", "lesion")
UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "norm": "batch",
}
SEGRESNET = {
    "_target_": "monai.networks.nets.SegResNet",
    "spatial_dims": 3,
    "init_filters": 8,
    "in_channels": 1,
    "out_channels": 3,
    "dropout_prob": 0.2,
    "blocks_down": [1, 1],
    "blocks_up": [1],
}


def write_bundle(folder, defined=UNET, kind="json", key="network_def", weights=None, **more):
    """A bundle as MONAI's own are written, with code in other places -> its folder, its network."""
    arguments = {k: value for k, value in defined.items() if k != "_target_"}
    torch.manual_seed(0)
    network = getattr(nets, str(defined["_target_"]).split(".")[-1])(**arguments)
    content = {"imports": ["$import os"], "device": "$torch.device('cpu')", key: defined}
    content |= {"network": "$@network_def.to(@device)"} if key == "network_def" else {}
    write_config(folder, content, kind)
    (folder / "models").mkdir()
    torch.save(network.state_dict() if weights is None else weights, folder / "models/model.pt")
    return folder, network


def write_config(folder, content, kind="json"):
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) if kind == "json" else yaml.safe_dump(content)
    (folder / f"configs/inference.{kind}").write_text(text)


@pytest.mark.parametrize(
    "defined, kind, key, size",
    [
        (UNET, "json", "network_def", (16, 16, 8)),
        (SEGRESNET, "yaml", "network", (8, 16, 16)),
        (UNET | {"_target_": "monai.networks.nets.unet.UNet"}, "yml", "network_def", (8, 8, 8)),
    ],
)
def test_a_bundle_gives_the_logits_of_its_network(tmp_path, defined, kind, key, size):
    folder, network = write_bundle(tmp_path / "b", defined, kind, key)
    assert is_bundle(str(folder)) and not is_bundle(str(tmp_path))
    image = torch.randn(2, 1, *size)
    for name in (folder, folder / f"configs/inference.{kind}"):
        bundle = read_bundle(str(name))
        teacher = load_monai(bundle, 1, CLASSES, size)
        output = teacher(image, return_features=True)
        assert torch.equal(output.logits, network.eval()(image)) and not output.features
        assert torch.equal(teacher(image), output.logits)
        assert not any(p.requires_grad for p in teacher.parameters())
    count = sum(p.numel() for p in network.parameters())
    said = described(bundle, teacher)
    assert f"{count:,} parameters, 1 channel(s), 3 classes; logits alone" in said
    assert "\n" not in said and str(folder / "models/model.pt") in said
    # under a name, and in several processes, as others save it
    inside = {"model": {f"module.{k}": v for k, v in network.state_dict().items()}}
    torch.save(inside, folder / "models/model.pt")
    assert torch.equal(load_monai(bundle, 1, CLASSES, size)(image), output.logits)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"_target_": "os.system"}, "no network of monai.networks.nets"),
        ({"_target_": "builtins.eval"}, "no network of monai.networks.nets"),
        ({"_target_": "monai.networks.nets.unet.os"}, "no network of monai.networks.nets"),
        ({"_target_": "monai.bundle.run"}, "no network of monai.networks.nets"),
        ({"_target_": "nn"}, "no network of monai.networks.nets"),
        ({"_target_": "torch.nn.Linear"}, "no network of monai.networks.nets"),
        ({"_target_": "resnet.UNet"}, "no network of monai.networks.nets"),
        ({"_target_": "$import os"}, "_target_: '$import os' is an expression, which is code"),
        ({"channels": ["$__import__('os').mkdir('made')", 8]}, "channels.0: "),
        ({"norm": "@other"}, "norm: '@other' is a reference"),
        ({"norm": "%other.json"}, "norm: '%other.json' is a macro"),
        ({"$import os": 1}, "is an expression"),
        ({"act": {"_target_": "os.mkdir", "path": "made"}}, "act: makes another object"),
        ({"_requires_": ["$import os"]}, "_requires_.0: "),
        ({"_mode_": "callable"}, "UNet has no argument _mode_"),
        ({"width": 3}, "UNet has no argument width"),
        ({"_target_": "HoVerNet", "pretrained_url": "https://x"}, "HoVerNet has no argument"),
    ],
)
def test_a_definition_that_is_more_than_values_is_refused(tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    folder, _ = write_bundle(tmp_path / "b")
    write_config(folder, {"network_def": UNET | change})
    with pytest.raises(CheckpointError) as refused:
        read_bundle(str(folder))
    assert expected in str(refused.value)
    assert f"{folder / 'configs/inference.json'}, network_def" in str(refused.value)
    assert not (tmp_path / "made").exists()


def test_other_files_are_refused(tmp_path):
    folder, network = write_bundle(tmp_path / "b")
    bundle, size = read_bundle(str(folder)), (8, 8, 8)
    for content, expected in (
        ({"network_def": "$import os"}, "is an expression, which is code"),
        ({"network_def": [1]}, "expected a mapping with _target_"),
        ({"imports": []}, "defines no network"),
        ([1], "expected a mapping"),
        (
            {"network_def": {"_target_": "HoVerNet", "pretrained_url": "https://x"}},
            "would fetch weights from elsewhere (pretrained_url)",
        ),
    ):
        write_config(folder, content)
        with pytest.raises(CheckpointError) as refused:
            read_bundle(str(folder))
        assert expected in str(refused.value)
    (folder / "configs/inference.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_bundle(str(folder))
    for sizes, expected in (
        ((2, CLASSES, size), r"does not take a patch of 2 channel"),
        (
            (1, CLASSES[:2], size),
            r"makes \(1, 3, 8, 8, 8\) of a patch .*expected \(1, 2, 8, 8, 8\)",
        ),
        ((1, CLASSES, (9, 8, 8)), r"makes \(1, 3, 10, 8, 8\)"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            load_monai(bundle, *sizes)
    weights = folder / "models/model.pt"
    state = network.state_dict()
    first = next(iter(state))
    for content, expected in (
        ({**state, first: Bomb(tmp_path / "made")}, "refused, reading it would run"),
        ({k: v for k, v in state.items() if k != first}, f"{first} is missing"),
        ({**state, "odd": torch.zeros(1)}, "odd is unknown to UNet"),
        ({**state, first: torch.zeros(2, 2)}, rf"{first} is \[2, 2\], expected \["),
        ({**state, first: state[first] / 0}, "not finite"),
        ({"epoch": 3}, "holds no weights"),
    ):
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=expected):
            load_monai(bundle, 1, CLASSES, size)
    weights.write_bytes(pickle.dumps(Bomb(tmp_path / "made")))
    with pytest.raises(CheckpointError):
        load_monai(bundle, 1, CLASSES, size)
    assert not (tmp_path / "made").exists()
    write_config(folder, {"network_def": UNET})
    for name in ("model.pt", "model.ts"):
        weights.unlink(missing_ok=True)
        torch.jit.script(torch.nn.ReLU()).save(str(folder / "models" / name))
        with pytest.raises(CheckpointError, match=f"{name}: TorchScript is code"):
            read_bundle(str(folder))
    (folder / "models/model.ts").unlink()
    with pytest.raises(CheckpointError, match=r"model\.pt: no such file"):
        read_bundle(str(folder))
    write_config(folder, {"network_def": UNET | {"spatial_dims": "three"}})
    torch.save(state, weights)
    with pytest.raises((ConfigError, CheckpointError), match="UNet"):
        load_monai(read_bundle(str(folder)), 1, CLASSES, size)
