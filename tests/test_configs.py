"""Every configuration loads and fits: keys, networks, method arguments, schedules of the papers,
disjoint lists.
"""

import functools
import itertools
import sys
from pathlib import Path

import pytest
import yaml

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from dataloaders import build_dataset
from dataloaders.lists import read_split
from losses import KD_METHODS, build_kd
from methods import SSL_METHODS, build_method
from networks import NETWORKS, build_network
from utils.config import load_config

ROOT = Path(__file__).resolve().parents[1]


def is_semi(path):
    """Whether it is one of the semi-supervised scripts."""
    return "labelled" in yaml.safe_load(path.read_text(encoding="utf-8"))


ALL = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path.stem for path in ALL if not is_semi(path)]
SEMI = [path.stem for path in ALL if is_semi(path)]
FAMILIES = [("btcv", "word"), ("spleen", "pancreas"), ("demo_btcv", "demo_word")]
SIZES = {"btcv": (24, 6, 0), "hippocampus": (128, 30, 50), "mouse_brain": (13, 2, 5)}


def load(name, monkeypatch, *flags):
    """The configuration as its training script resolves it."""
    script = train_3d_distill
    if name in SEMI:
        script = train_3d_crkd if len(read_yaml(name)["patch_size"]) == 3 else train_2d_crkd
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--config", f"configs/{name}.yaml", *flags])
    return script.parse_args()[1]


def read_yaml(name):
    return yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))


def test_the_expected_ones_are_there():
    real = {"btcv", "word", "brats21", "hippocampus", "mouse_brain", "spleen", "pancreas"}
    assert real | {"demo_btcv", "demo_word", "demo_brats21"} <= set(CONFIGS)
    real = {"acdc", "la", "isic2018", "kvasir"}
    assert real | {f"demo_{name}" for name in real} | {
        "acdc_small",
        "la_small",
        "la_medium",
    } == set(SEMI)


@pytest.mark.parametrize("name", CONFIGS)
def test_loads_and_describes_its_data_set(name, monkeypatch):
    cfg = load(name, monkeypatch)
    assert cfg.dataset == name  # so that run folders are told apart
    dataset = build_dataset(**cfg.dataset_arguments())
    assert dataset.num_classes == len(cfg.class_names)
    assert cfg.val_start <= cfg.max_steps
    assert cfg.val_interval <= cfg.max_steps


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_and_methods_take_their_arguments(name, monkeypatch):
    cfg = load(name, monkeypatch)
    assert set(cfg.network_args) | set(cfg.recipe) <= set(NETWORKS)
    for network in cfg.recipe:
        load(name, monkeypatch, "--method", "supervised", "--student", network)
    classes = len(cfg.class_names)
    channels = {}
    for network in NETWORKS:
        arguments = cfg.network_args.get(network, {})
        channels[network] = build_network(
            network, cfg.in_channels, classes, **arguments
        ).feature_channels
    for key in cfg.method_args:
        method, _, pair = key.partition("@")
        teacher, _, student = pair.partition("-")
        assert method in KD_METHODS
        assert not teacher or teacher in NETWORKS
        assert not student or student in NETWORKS
    multilabel = cfg.format == "brats"
    pairs = (("resunet", "unet"), ("segresnet", "lcovnet"))
    for method, (teacher, student) in itertools.product(KD_METHODS, pairs):
        flags = ("--method", method, "--teacher", teacher, "--student", student)
        arguments = load(name, monkeypatch, *flags).method_arguments
        if method == "cirkd":  # its default queues take seconds to fill
            arguments |= {"pixel_queue": 200, "region_queue": 100}
        build_kd(
            method,
            channels[student],
            channels[teacher],
            classes,
            multilabel=multilabel,
            **arguments,
        )


def methods_of(name):
    dims = len(read_yaml(name)["patch_size"])
    return [method for method, cls in SSL_METHODS.items() if dims in cls.dimensions]


@pytest.mark.parametrize("name", SEMI)
def test_semi_supervised_ones_build_their_data_set_and_every_method(name, monkeypatch):
    for method in methods_of(name):
        cfg = load(name, monkeypatch, "--method", method)
        assert cfg.dataset == name  # so that run folders are told apart
        assert cfg.val_interval <= cfg.max_steps
        dataset = build_dataset(**cfg.dataset_arguments())
        assert (dataset.num_classes, dataset.dims) == (len(cfg.class_names), len(cfg.patch_size))
        arguments = cfg.network_args.get(cfg.network, {})
        make = functools.partial(
            build_network, cfg.network, dataset.in_channels, dataset.num_classes, **arguments
        )
        built = build_method(
            method, make, max_steps=cfg.max_steps, **cfg.method_args.get(method, {})
        )
        assert built.dims == len(cfg.patch_size)


# Section 5.1 of the recipe; steps are epochs of the unlabelled images.
@pytest.mark.parametrize(
    "name, side, batch, steps, threshold",
    [
        ("acdc", (256, 256), 12, 30000, 0.8),
        ("isic2018", (320, 320), 12, 24600, 0.95),
        ("kvasir", (320, 320), 12, None, 0.95),
        ("la", (112, 112, 80), 2, 9000, 0.75),
    ],
)
def test_recipes_of_crkd(name, side, batch, steps, threshold, monkeypatch):
    cfg = load(name, monkeypatch)
    assert (cfg.method, cfg.patch_size) == ("crkd", side)
    assert cfg.labelled_batch == cfg.unlabelled_batch == batch
    assert steps is None or cfg.max_steps == steps
    assert cfg.method_args["crkd"]["threshold"] == threshold
    assert (cfg.lr, cfg.momentum, cfg.weight_decay, cfg.optimizer, cfg.schedule) == (
        0.01,
        0.9,
        1e-4,
        "sgd",
        "poly",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_same_keys(family):
    first, second = map(read_yaml, family)
    # WORD and the demonstrations use the lists in their JSON; a minimum rate, a recipe or a
    # schedule may be stated.
    optional = {"split_dir", "min_lr", "method_args", "recipe"}
    assert first.keys() - optional == second.keys() - optional


@pytest.mark.parametrize("real", ["btcv", "word", "brats21"])
def test_demonstrations_have_the_classes_of_the_real_ones(real):
    demo = load_config(train_3d_distill.Config, ROOT / f"configs/demo_{real}.yaml")
    cfg = load_config(train_3d_distill.Config, ROOT / f"configs/{real}.yaml")
    assert (demo.class_names, demo.format, demo.in_channels) == (
        cfg.class_names,
        cfg.format,
        cfg.in_channels,
    )
    assert demo.max_steps <= 1000
    assert max(demo.patch_size) <= 48


@pytest.mark.parametrize(
    "folder", sorted(path.name for path in (ROOT / "splits").iterdir() if path.is_dir())
)
def test_lists_are_disjoint(folder):
    lists = {
        name: read_split(ROOT / "splits" / folder, name) or [] for name in ("train", "val", "test")
    }
    names = [name for chosen in lists.values() for name in chosen]
    assert len(names) == len(set(names))
    if folder in SIZES:
        assert tuple(map(len, lists.values())) == SIZES[folder]


# Total steps, lowest learning rate, first validation, interval: section 3 of the recipe, epochs
# times steps per epoch.
@pytest.mark.parametrize(
    "name, flags, expected",
    [
        ("btcv", (), (1000 * 24, 0.0, 200 * 24, 50 * 24)),
        (
            "btcv",
            ("--method", "supervised", "--student", "resunet"),
            (1000 * 24, 0.0, 200 * 24, 50 * 24),
        ),
        ("word", (), (300 * 100, 1e-6, 100 * 100, 25 * 100)),
        ("brats21", (), (50 * 251, 1e-4, 0, 5 * 251)),
        ("brats21", ("--method", "supervised", "--student", "unet"), (50 * 251, 1e-4, 0, 5 * 251)),
        (
            "brats21",
            ("--method", "supervised", "--student", "resunet"),
            (100 * 251, 0.0, 0, 10 * 251),
        ),
        (
            "brats21",
            ("--method", "supervised", "--student", "segresnet"),
            (100 * 251, 0.0, 0, 10 * 251),
        ),
    ],
)
def test_recipes_of_the_paper(name, flags, expected, monkeypatch):
    cfg = load(name, monkeypatch, *flags)
    assert (cfg.max_steps, cfg.min_lr, cfg.val_start, cfg.val_interval) == expected
    assert (cfg.lr, cfg.momentum, cfg.weight_decay, cfg.grad_clip) == (0.01, 0.9, 5e-4, 0.0)
    assert cfg.cases_per_batch * cfg.crops_per_case == 4
    assert cfg.patch_size == (96, 96, 96)


# Boundary schedule, per epoch: weight max(floor, 1 - epoch * fall).
@pytest.mark.parametrize(
    "name, teacher, student, floor, fall, epochs",
    [
        *(
            ("btcv", "resunet", student, 0.001, 0.001, 1000)
            for student in ("unet", "espnetv2", "lcovnet")
        ),
        *(
            ("btcv", "segresnet", student, 0.5, 0.0005, 1000)
            for student in ("unet", "espnetv2", "mobile_unet")
        ),
        ("btcv", "segresnet", "lcovnet", 0.001, 0.001, 1000),
        *(("word", teacher, "unet", 0.5, 0.0015, 300) for teacher in ("resunet", "segresnet")),
        *(("brats21", teacher, "lcovnet", 0.5, 0.01, 50) for teacher in ("resunet", "segresnet")),
    ],
)
def test_boundary_schedules_of_the_paper(name, teacher, student, floor, fall, epochs, monkeypatch):
    arguments = load(name, monkeypatch, "--teacher", teacher, "--student", student).method_arguments
    assert arguments["floor"] == floor
    assert arguments["decay"] == pytest.approx(fall * epochs)
