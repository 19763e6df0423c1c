"""The 2D U-Net and the V-Net against the released semi-supervised networks: names, counts, outputs,
taps, perturbation.

Digests, counts and output statistics were taken from the networks released with SSL4MIS, UniMatch,
CrossMatch and CRKD.
"""

import hashlib
import re

import network_checks as checks
import numpy as np
import pytest
import torch
from torch import nn

from networks.blocks import check_input, drop_channels
from networks.unet2d import UNet2D
from networks.vnet import VNet

# Arguments, parameters, digest of the released state dict.
RELEASED = [
    (
        UNet2D,
        (1, 4),
        {},
        1813764,
        "dcbba7bc3602a1aa5ac6971f8377e6429949599e7f069862bc9028da2166944d",
    ),
    (
        UNet2D,
        (3, 2),
        {},
        1813762,
        "a7ff8187d54db15720e9813387ba22be396e952d900c0471f097f34741fb7407",
    ),
    (
        UNet2D,
        (1, 4),
        {"released_layout": True},
        1850884,
        "f737e79af080e078015c13b35de9b9488a535bd987b3aa5053c69e39089d0dd3",
    ),
    (
        UNet2D,
        (3, 2),
        {"released_layout": True},
        1850882,
        "cadd8cc5456dc01b2cefdbbce2e0cbfbb011b91530531f2865289f7eca9f042c",
    ),
    (VNet, (1, 2), {}, 9448866, "d9d0a820b08fda01d99ef64992497868dba554f7d06e8f745f6f15db98f3bcdf"),
]
PLAIN_VNET_DIGEST = "67fd3e3776f80424639d52b1d17cad7718f7a803b7e899eb39fed2f603770652"

STAGE_DIVISORS = {
    "stage1": 2,
    "stage2": 4,
    "stage3": 8,
    "stage4": 16,
    "stage5": 4,
    "stage6": 2,
    "stage7": 1,
    "penultimate": 1,
    "decoder": 1,
    "acf": 1,
}


def small(cls, in_channels=2, num_classes=3, **arguments):
    width = {"channels": (4, 6, 8, 10, 12)} if cls is UNet2D else {"n_filters": 4}
    return cls(in_channels, num_classes, **width, **arguments)


def image_for(net, side=32, batch=2):
    return torch.randn(batch, net.in_channels, *[side] * (2 if isinstance(net, UNet2D) else 3))


def strong_fill(net: nn.Module, names: list[str]) -> nn.Module:
    """The i-th of the sorted released `names` gets RandomState(i).randn, scaled so that deep layers
    matter.

    names: released name of each tensor, in the order of the state dict.
    """
    ranks = {name: i for i, name in enumerate(sorted(names))}
    filled = {}
    for (key, tensor), name in zip(net.state_dict().items(), names):
        noise = np.asarray(np.random.RandomState(ranks[name]).randn(*tensor.shape))
        if not tensor.is_floating_point():
            noise = np.zeros(tensor.shape)
        elif tensor.ndim > 1:
            noise = noise * np.sqrt(2 / np.prod(tensor.shape[1:]))
        elif key.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif key.endswith("running_var"):
            noise = 1 + 0.1 * np.abs(noise)
        else:
            noise = 0.1 * noise
        filled[key] = torch.from_numpy(noise).to(tensor.dtype)
    net.load_state_dict(filled)
    return net.eval()


def plain_names(net: VNet) -> list[str]:
    return [key.split(".", 1)[1] for key in net.state_dict()]


@pytest.mark.parametrize("cls, sizes, arguments, count, digest", RELEASED)
def test_counts_and_names_are_the_released_ones(cls, sizes, arguments, count, digest):
    with torch.device("meta"):
        net = cls(*sizes, **arguments)
    assert sum(p.numel() for p in net.parameters()) == count
    assert checks.digest(net) == digest


def test_unused_keys_are_what_the_released_layout_adds():
    with torch.device("meta"):
        plain, released = UNet2D(1, 4).state_dict(), UNet2D(1, 4, released_layout=True).state_dict()
    kept = [
        key
        for key in released
        if not any(re.search(pattern, key) for pattern in UNet2D.unused_keys)
    ]
    assert kept == list(plain) and len(released) == len(plain) + 2


def test_vnet_alias_keys_lead_from_the_plain_names_to_ours():
    with torch.device("meta"):
        net = VNet(1, 2)
    state = net.state_dict()
    lines = [
        f"{name}:{'x'.join(map(str, t.shape))}" for name, t in zip(plain_names(net), state.values())
    ]
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == PLAIN_VNET_DIGEST
    for start in (plain_names(net), list(state)):  # our own names stay as they are
        for pattern, replacement in VNet.alias_keys:
            start = [re.sub(pattern, replacement, key) for key in start]
        assert start == list(state)


@pytest.mark.parametrize(
    "cls, sizes, arguments, aliased, mean, std",
    [
        (UNet2D, (1, 4), {}, False, 0.5277683734893799, 0.6203475594520569),
        (UNet2D, (3, 2), {"released_layout": True}, False, 0.7359142303466797, 1.5856029987335205),
        (VNet, (1, 2), {}, False, 0.4632466435432434, 1.7861781120300293),
        (VNet, (1, 2), {}, True, 2.704634666442871, 1.6774095296859741),
    ],
)
def test_output_statistics(cls, sizes, arguments, aliased, mean, std):
    net = cls(*sizes, **arguments)
    strong_fill(net, plain_names(net) if aliased else list(net.state_dict()))
    shape = (1, sizes[0], 64, 64) if cls is UNet2D else (1, 1, 32, 32, 32)
    with torch.no_grad():
        logits = net(torch.from_numpy(np.random.RandomState(123).randn(*shape)).float()).double()
    assert logits.mean().item() == pytest.approx(mean, rel=1e-5)
    assert logits.std(unbiased=False).item() == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize(
    "cls, size",
    [(UNet2D, (48, 80)), (UNet2D, (16, 112)), (VNet, (16, 48, 32)), (VNet, (32, 16, 16))],
)
def test_taps(cls, size):
    checks.check_taps(small(cls), size, STAGE_DIVISORS)


@pytest.mark.parametrize("cls", [UNet2D, VNet])
def test_taps_are_the_maps_that_they_are_named_after(cls):
    net = small(cls).eval()
    if cls is UNet2D:
        names = (
            "encoder.down1",
            "encoder.down4",
            "decoder.up2",
            "decoder.up3",
            "decoder.up4",
            "decoder.up4",
        )
    else:
        encoder, decoder = (
            ("block_two", "block_five"),
            ("block_seven", "block_eight", "block_nine", "block_nine"),
        )
        names = [f"encoder.{name}" for name in encoder] + [f"decoder.{name}" for name in decoder]
    sources = dict(zip(("stage1", "stage4", "stage5", "stage6", "stage7", "decoder"), names))
    copies = {}
    for tap, name in sources.items():
        net.get_submodule(name).register_forward_hook(
            lambda _, args, out, tap=tap: copies.update({tap: out.detach().clone()})
        )
    with torch.no_grad():
        features = net(image_for(net), return_features=True).features
    for tap, copy in copies.items():
        assert torch.equal(features[tap], copy), tap


@pytest.mark.parametrize("cls", [UNet2D, VNet])
def test_encode_then_decode_equals_forward(cls):
    net = small(cls).eval()
    image = image_for(net)
    with torch.no_grad():
        features = net.encode(image)
        output = net.decode(features)
        assert len(features) == 5
        assert torch.equal(output.logits, net(image))
        # One pass over a concatenation equals one pass each, which is what methods with several
        # copies rely on.
        dropped = drop_channels(features, 0.5)
        both = net.decode([torch.cat(pair) for pair in zip(features, dropped)])
        torch.testing.assert_close(both.logits[:2], output.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            both.logits[2:], net.decode(dropped).logits, rtol=1e-4, atol=1e-5
        )
        assert both.features["decoder"].shape[0] == 4


@pytest.mark.parametrize("cls", [UNet2D, VNet])
@pytest.mark.parametrize("training", [False, True])
def test_perturb_drops_channels_in_either_mode(cls, training):
    torch.manual_seed(0)
    net = small(cls, dropout=(0.0,) * 5 if cls is UNet2D else 0.0).train(training)
    image = image_for(net)
    with torch.no_grad():
        clean = net.encode(image)
        seen = []
        net.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.manual_seed(0)
        first = net(image, return_features=True, perturb=0.5)
        torch.manual_seed(0)
        again = net(image, perturb=0.5)
        other = net(image, perturb=0.5)
    assert torch.equal(first.logits, again)
    assert not torch.equal(first.logits, other)
    dropped = [0, 0]
    for before, after in zip(clean, seen[0]):
        gone = after.flatten(2).abs().amax(2) == 0
        scaled = torch.where(gone[(...,) + (None,) * (before.ndim - 2)], 0.0, 2.0 * before)
        torch.testing.assert_close(after, scaled, rtol=1e-5, atol=1e-5)
        dropped = [total + int(part) for total, part in zip(dropped, (gone.sum(), (~gone).sum()))]
        assert not torch.equal(gone[0], gone[1]) or before.shape[1] < 6  # samples draw on their own
    assert min(dropped) > 0.25 * sum(dropped)
    assert torch.equal(first.features["stage4"], seen[0][4])


@pytest.mark.parametrize("cls", [UNet2D, VNet])
def test_without_perturbation_evaluation_is_deterministic_and_training_is_not(cls):
    net = small(cls)
    image = image_for(net)
    with torch.no_grad():
        net.eval()
        assert torch.equal(net(image), net(image))
        state = torch.random.get_rng_state()
        net(image)
        assert torch.equal(torch.random.get_rng_state(), state)
        net.train()
        assert not torch.equal(net(image), net(image))


def test_drop_channels_of_probability_one_and_zero():
    features = [torch.ones(1, 3, 4, 4), torch.ones(1, 3, 2, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(drop_channels(features, 0.0), features))
    assert all(not feature.any() for feature in drop_channels(features, 1.0))


@pytest.mark.parametrize(
    "cls, arguments", [(UNet2D, {"released_layout": True}), (UNet2D, {}), (VNet, {})]
)
@pytest.mark.parametrize("perturb", [0.0, 0.2])
def test_every_parameter_gets_a_gradient(cls, arguments, perturb):
    net = small(cls, **arguments).train()
    net(image_for(net), perturb=perturb).square().mean().backward()
    for name, parameter in net.named_parameters():
        unused = any(re.search(pattern, name) for pattern in net.unused_keys)
        assert (parameter.grad is None) == unused, name
        assert unused or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("cls", [UNet2D, VNet])
def test_bad_input_is_refused(cls):
    net = small(cls)
    good = image_for(net, side=16)
    with pytest.raises(ValueError, match="multiple of 16"):
        net(good[..., :8])
    with pytest.raises(ValueError, match="in_channels"):
        net(good[:, :1])
    with pytest.raises(
        ValueError, match=r"\(B, 2, H, W\)" if cls is UNet2D else r"\(B, 2, H, W, D\)"
    ):
        net(good[0])


def test_check_input_takes_three_axes_unless_told_otherwise():
    check_input("net", torch.zeros(1, 1, 8, 8, 8), 1, 8)
    check_input("net", torch.zeros(1, 1, 8, 8), 1, 8, dims=2)
    with pytest.raises(ValueError, match="H, W, D"):
        check_input("net", torch.zeros(1, 1, 8, 8), 1, 8)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="five"):
        UNet2D(1, 2, channels=(4, 8, 16))
    with pytest.raises(ValueError, match="upsample"):
        VNet(1, 2, upsample="bicubic")


@pytest.mark.parametrize(
    "upsample, conv, norm", [("transposed", 0, 1), ("trilinear", 1, 2), ("nearest", 1, 2)]
)
def test_vnet_upsamplings(upsample, conv, norm):
    net = small(VNet, upsample=upsample).eval()
    kernel = 2 if upsample == "transposed" else 3
    state = net.state_dict()
    for name in ("block_five_up", "block_six_up", "block_seven_up", "block_eight_up"):
        assert state[f"decoder.{name}.conv.{conv}.weight"].shape[2:] == (kernel,) * 3
        assert f"decoder.{name}.conv.{norm}.running_mean" in state
    assert net(image_for(net, side=16)).shape == (2, 3, 16, 16, 16)


def test_vnet_feature_lies_before_the_last_dropout_unless_asked_for():
    torch.manual_seed(0)
    before, after = small(VNet), small(VNet, feature_after_dropout=True)
    after.load_state_dict(before.state_dict())
    image = image_for(before, side=16, batch=8)
    for net, dead_channels in ((before, False), (after, True)):
        seen = []
        net.train().decoder.out_conv.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            feature = net(image, return_features=True).features["decoder"]
        assert torch.equal(feature, seen[0]) == dead_channels
        assert bool((feature.flatten(2).abs().amax(2) == 0).any()) == dead_channels
        with torch.no_grad():
            output = net.decode(net.encode(image), last_dropout=False)
        assert torch.equal(output.features["decoder"], seen[1])


def test_vnet_dropout_acts_on_the_deepest_map():
    net = small(VNet)
    seen = []
    net.encoder.block_five.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    with torch.no_grad():
        deepest = net.train().encode(image_for(net, batch=4))[4]
        dropped = deepest.flatten(2).abs().amax(2) == 0
        assert 0.2 < dropped.float().mean() < 0.8
        torch.testing.assert_close(
            deepest, torch.where(dropped[..., None, None, None], 0.0, 2.0 * seen[0])
        )
        assert torch.equal(net.eval().encode(image_for(net))[4], seen[1])


@pytest.mark.parametrize("cls", [UNet2D, VNet])
def test_runs_in_half_precision(cls):
    net = small(cls)
    # Not 32: oneDNN's weight gradient of a bfloat16 Conv3d on 2x2x2 voxels is at times NaN (torch
    # 2.13).
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(image_for(net, side=48), return_features=True, perturb=0.5)
    assert torch.isfinite(output.logits.float()).all()
    output.logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
