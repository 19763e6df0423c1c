"""The U-Nets of nnU-Net: names, taps, axes, what a checkpoint's aliases become, and what is
refused. That they compute what nnU-Net's own do: tests/test_nnunet.py.
"""

import network_checks as checks
import pytest
import torch

from losses import KD_METHODS, build_kd
from networks import build_network
from networks.nnunet import NnUNet, NnUNetTeacher, own_weights
from tests.nnunet_folders import with_aliases
from utils.checkpoint import load_network_weights

SMALL = {
    "features_per_stage": (4, 6, 8),
    "kernel_sizes": ((1, 3, 3), 3, 3),
    "strides": (1, (1, 2, 2), 2),
    "blocks_per_stage": (1, 2, 2),
    "convs_per_stage_decoder": (1, 2),
}


def small(encoder="plain", **changes):
    torch.manual_seed(0)
    return NnUNet(2, 3, encoder, **SMALL | changes)


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_default_taps_lie_where_those_of_the_other_networks_do(encoder):
    net = NnUNet(1, 3, encoder, features_per_stage=(4, 6, 8, 10))
    divisors = {f"stage{k}": size for k, size in enumerate((2, 4, 8, 8, 4, 2, 1), 1)}
    divisors |= {"penultimate": 1, "decoder": 1, "acf": 2}
    if encoder == "residual":
        divisors |= {"residual": 8, "corrected": 8}
    checks.check_taps(net, (16, 24, 32), divisors)
    checks.check_gradients(net)
    checks.check_rejects_bad_input(net)


def test_the_pair_is_the_sum_of_the_last_block_before_its_nonlinearity():
    net = small("residual").eval()
    image = torch.randn(1, 2, 16, 16, 16)
    block = net.encoder.stages[-1].blocks[-1]
    seen = {}
    block.conv2.register_forward_hook(lambda _, __, out: seen.update(residual=out.clone()))
    block.nonlin2.register_forward_pre_hook(lambda _, args: seen.update(corrected=args[0].clone()))
    features = net(image, return_features=True).features
    for tap, value in seen.items():
        assert torch.equal(features[tap], value.permute(0, 1, 4, 3, 2)), tap
    assert not torch.equal(features["residual"], features["corrected"])


def test_axes_are_those_of_the_image():
    """One network with its weights, told three orders of axes, sees three turned images alike."""
    image = torch.randn(1, 2, 8, 16, 16)  # in the network's order
    plain = small(axes=(0, 1, 2)).eval()
    assert plain.sides == (2, 4, 4)
    for axes in ((2, 1, 0), (1, 2, 0)):
        net = small(axes=axes).eval()
        back = [axes.index(k) for k in range(3)]
        turned = image.permute(0, 1, *(2 + k for k in back))
        assert net.sides == tuple((2, 4, 4)[k] for k in back)
        expected = plain(image).permute(0, 1, *(2 + k for k in back))
        assert torch.allclose(net(turned), expected, atol=1e-6)


@pytest.mark.parametrize("encoder", ["plain", "residual"])
def test_a_checkpoint_loads_without_its_aliases(encoder):
    net = small(encoder)
    full = with_aliases(net.state_dict())
    assert len(full) > 2 * len(net.state_dict())
    other = small(encoder, axes=(2, 0, 1))
    torch.nn.init.zeros_(other.decoder.head.weight)
    load_network_weights(other, own_weights({f"module.{k}": v for k, v in full.items()}, other), "")
    for key, value in other.state_dict().items():
        assert torch.equal(value, net.state_dict()[key])
    alias = next(key for key in full if "all_modules" in key)
    with pytest.raises(ValueError, match="differ"):
        own_weights(full | {alias: full[alias] + 1}, net)


def test_folds_are_averaged_and_classes_ordered():
    folds = [small(), small()]
    torch.nn.init.normal_(folds[1].decoder.head.weight)
    teacher = NnUNetTeacher(folds, [0, 2, 1], (0, 1)).eval()
    image = torch.randn(1, 2, 8, 8, 8)
    expected = ((folds[0](image) + folds[1](image)) / 2)[:, [0, 2, 1]]
    output = teacher(image, return_features=True)
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert torch.equal(teacher(image), output.logits)
    first = folds[0](image, return_features=True).features
    assert all(torch.equal(output.features[tap], first[tap]) for tap in first)
    assert teacher.mirror_axes == (0, 1)


@pytest.mark.parametrize("method", KD_METHODS)
@pytest.mark.parametrize("encoder", ["plain", "residual"])
@pytest.mark.parametrize("student", ["unet", "nnunet"])
def test_every_method_learns_from_it(method, encoder, student):
    teacher = NnUNet(1, 3, encoder, features_per_stage=(4, 6, 8, 8)).eval().requires_grad_(False)
    width = "channels" if student == "unet" else "features_per_stage"
    net = build_network(student, 1, 3, **{width: (4, 4, 6, 8)})
    arguments = {"pixel_queue": 200, "region_queue": 100} if method == "cirkd" else {}
    if method == "acf_bckd" and encoder == "plain":
        with pytest.raises(ValueError, match="corrected"):
            build_kd(method, net.feature_channels, teacher.feature_channels, 3)
        arguments = {"afd": 0.0, "cfd": 0.0}
    kd = build_kd(method, net.feature_channels, teacher.feature_channels, 3, **arguments)
    image, label = torch.randn(2, 1, 16, 16, 16), torch.randint(0, 3, (2, 1, 16, 16, 16))
    output = net(image, return_features=True)
    terms = kd(output, teacher(image, return_features=True), label, progress=0.5)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"encoder": "dense"}, "plain or residual"),
        ({"axes": (0, 0, 1)}, "must name 0, 1 and 2"),
        ({"features_per_stage": (4, 6)}, "kernel_sizes has 3 entries, expected 2"),
        ({"features_per_stage": (4, 6, 10**6)}, "features_per_stage must be"),
        ({"kernel_sizes": (3, 3, 2)}, "must be odd"),
        ({"kernel_sizes": (3, 3, (3, 3))}, "three of them"),
        ({"strides": (1, 2, 99)}, "strides must be"),
        ({"blocks_per_stage": (1, 1, 1000)}, "blocks_per_stage must be"),
        ({"norm": "LayerNorm"}, "norm 'LayerNorm'"),
        ({"norm_args": {"eps": "1e-5"}}, "YAML reads 1e-5 as text"),
        ({"nonlin": "Tanh"}, "nonlinearity 'Tanh'"),
        ({"dropout": 1.0}, "dropout"),
        ({"stem_channels": -1}, "stem_channels"),
    ],
)
def test_other_arguments_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        small(**arguments)
