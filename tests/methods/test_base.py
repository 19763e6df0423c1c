"""Methods by name, what they refuse, and the report about pseudo-labels."""

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from losses.incomplete import UNKNOWN
from methods import PRESETS, SSL_METHODS, Method, build_method
from methods.base import pseudo_label_report
from networks.unet2d import UNet2D
from networks.vnet import ConvBlock, VNet
from networks.vnet_dual import DualVNet, LeFeDNet

# networks of the methods that need more than any other has
OWN_NETWORKS = {"mlrpl": DualVNet, "lefed": LeFeDNet}


def make_network():
    return UNet2D(1, 3, channels=(2, 4, 4, 8, 8), dropout=(0.0,) * 5)


@pytest.mark.parametrize("name", SSL_METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_method_is_built_by_name(name, preset):
    own = OWN_NETWORKS.get(name)
    make = (lambda: own(1, 3, n_filters=2)) if own else make_network
    method = build_method(name, make, max_steps=7, preset=preset)
    assert type(method) is SSL_METHODS[name] and isinstance(method, Method)
    assert (method.max_steps, method.num_classes, method.monitor, method.pictures) == (7, 3, {}, {})
    assert isinstance(method.evaluated, nn.Module)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown method 'crdk'; choose from .*crkd.*supervised"):
        build_method("crdk", make_network, max_steps=7)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'dirty'; choose from clean, as_released"):
        build_method("crkd", make_network, max_steps=7, preset="dirty")


def test_an_unknown_argument_lists_what_the_method_takes():
    with pytest.raises(
        ValueError,
        match=r"'crkd' has no argument treshold; it takes threshold, pseudo_weight,.*ema_for",
    ):
        build_method("crkd", make_network, max_steps=7, treshold=0.5)
    with pytest.raises(ValueError, match="'supervised' has no argument lec, csd; it takes none"):
        build_method("supervised", make_network, max_steps=7, lec=1.0, csd=1.0)
    with pytest.raises(ValueError) as caught:
        build_method("crkd", make_network, max_steps=7, treshold=0.5)
    assert not any(name in str(caught.value) for name in ("make_network", "max_steps", "preset"))


@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_a_network_that_lacks_what_the_method_calls_is_refused(name):
    with pytest.raises(
        ValueError, match=f"{name}: needs a network with '.*', such as vnet_.*; set network: vnet_"
    ):
        build_method(name, make_network, max_steps=7)


def test_method_arguments_arrive():
    assert build_method("crkd", make_network, max_steps=7, threshold=0.25).threshold == 0.25


@pytest.mark.parametrize("steps", [0, -3])
def test_a_training_has_at_least_one_step(steps):
    with pytest.raises(ValueError, match=f"max_steps must be at least 1, got {steps}"):
        build_method("supervised", make_network, max_steps=steps)


def test_the_network_is_made_once():
    made = []

    def counting():
        made.append(make_network())
        return made[-1]

    method = build_method("crkd", counting, max_steps=7, ema_decay=0.9)
    assert len(made) == 1 and method.network is made[0]


@pytest.mark.parametrize("grid", [(7, 6), (5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_report_equals_counting_voxel_by_voxel(grid, dtype):
    rng = np.random.default_rng(len(grid))
    pred, truth = rng.integers(0, 4, (2, *grid)), rng.integers(0, 4, (2, *grid))
    valid = rng.random((2, *grid)) < 0.6
    report = pseudo_label_report(
        torch.from_numpy(pred),
        torch.from_numpy(valid),
        torch.from_numpy(truth)[:, None].to(dtype),
        4,
    )
    counts = dict.fromkeys(["valid", "valid_right", "pred_fg", "true_fg"], 0)
    of_class, found = [0] * 4, [0] * 4
    for p, v, y in zip(pred.ravel(), valid.ravel(), truth.ravel()):
        counts["valid"] += v
        counts["valid_right"] += v and p == y
        counts["pred_fg"] += p != 0
        counts["true_fg"] += y != 0
        of_class[y] += 1
        found[y] += v and p == y
    expected = {
        "mask_ratio": counts["valid"] / pred.size,
        "pseudo_accuracy": counts["valid_right"] / counts["valid"],
        "pseudo_foreground": counts["pred_fg"] / pred.size,
        "true_foreground": counts["true_fg"] / pred.size,
        **{f"recall_{k}": found[k] / of_class[k] for k in (1, 2, 3)},
    }
    assert report.keys() == expected.keys()
    assert {key: value.item() for key, value in report.items()} == pytest.approx(expected, rel=1e-6)


def test_report_is_nan_where_nothing_is_counted():
    pred, label = torch.zeros(1, 4, 4, dtype=torch.long), torch.zeros(1, 1, 4, 4)
    label[..., 0] = 1
    report = pseudo_label_report(pred, torch.zeros(1, 4, 4, dtype=torch.bool), label, 3)
    assert math.isnan(report["pseudo_accuracy"]) and math.isnan(report["recall_2"])
    assert (report["mask_ratio"], report["recall_1"], report["pseudo_foreground"]) == (0, 0, 0)
    assert report["true_foreground"] == 0.25


@pytest.mark.parametrize("name", SSL_METHODS)
def test_labels_that_tell_nothing_teach_nothing(name):
    """Where nobody labelled a voxel, and where only the background was annotated, so that every
    class may be behind it, the terms of the labels are 0; where all is told, they are the usual.
    """
    torch.manual_seed(4)  # of a network that predicts every class somewhere
    own = OWN_NETWORKS.get(name)
    network = own(1, 3, n_filters=2) if own else make_network()
    shape = (2, 1, *([16] * 3 if own else [16, 16]))
    image, truth = torch.randn(shape), torch.randint(0, 3, shape).to(torch.uint8)
    views = ("weak", "strong0", "strong1", "mix_weak", "mix_strong0", "mix_strong1")
    unlabelled = {view: torch.randn(shape) for view in views} | {"label": truth}

    def of_labels(label, annotated):
        torch.manual_seed(1)
        method = build_method(name, lambda: copy.deepcopy(network), max_steps=7)
        batch = {"image": image, "label": label}
        batch |= {} if annotated is None else {"annotated": annotated}
        terms = method.loss(batch, unlabelled, 3)
        sum(terms.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
        return torch.stack([terms[key].detach() for key in ("sup", "side", "csd") if key in terms])

    told = torch.ones(2, 3, dtype=torch.bool)
    ordinary = of_labels(truth, None)
    assert (ordinary > 0).all()
    torch.testing.assert_close(of_labels(truth, told), ordinary)
    unknown = torch.full_like(truth, UNKNOWN)
    background = told.clone()
    background[:, 1:] = False
    for nothing in ((unknown, told), (torch.zeros_like(truth), background)):
        assert of_labels(*nothing).abs().max() < 1e-6
    assert SSL_METHODS[name].incomplete and not Method.incomplete


def test_the_report_leaves_out_voxels_that_nobody_labelled():
    rng = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 3, (2, 1, 8, 8), generator=rng) for _ in range(2))
    valid = torch.rand(2, 8, 8, generator=rng) < 0.6
    marked = label.clone()
    marked[:, :, :5] = UNKNOWN
    found = pseudo_label_report(pred[:, 0], valid, marked, 3)
    expected = pseudo_label_report(pred[:, 0, 5:], valid[:, 5:], label[:, :, 5:], 3)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", SSL_METHODS)
def test_no_network_runs_outside_of_what_compile_made(name):
    """Once compiled, no step comes through the Python code of a block."""
    torch._dynamo.reset()
    own = OWN_NETWORKS.get(name, VNet)
    method = build_method(name, lambda: own(1, 2, n_filters=2), max_steps=10).train()
    image = torch.rand(2, 1, 16, 16, 16)
    label = torch.zeros(2, 1, 16, 16, 16, dtype=torch.uint8)
    keys = ("weak", "strong0", "strong1", "mix_weak", "mix_strong0", "mix_strong1")
    unlabelled = dict.fromkeys(keys, image) | {"label": label, "mix_label": label}
    entered = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code is ConvBlock.forward.__code__:
            entered.append(frame)

    def step():
        method.loss({"image": image, "label": label}, unlabelled, 5)

    def blocks_entered():
        entered.clear()
        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
        return len(entered)

    assert blocks_entered() > 0
    method.compile(backend="eager")
    step()
    step()  # meets other modes of the norms
    assert blocks_entered() == 0
