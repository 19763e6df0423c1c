"""The V-Nets with two decoders, of MLRPL and LeFeD: names, counts and outputs as released;
feedback, gates and sides.

Digests, counts and output statistics were taken from the released networks.
"""

import network_checks as checks
import numpy as np
import pytest
import torch
from test_ssl_networks import strong_fill

from networks import build_network, init_weights
from networks.vnet_dual import DualVNet, LeFeDNet, SideOutputs, decode_gated

# Network, parameters, digest of the released state dict.
RELEASED = [
    (DualVNet, 12347716, "bede990dd3ae183ae49dcab8b14812ac4493d8fd269213fc350c419c54618dd4"),
    (LeFeDNet, 12348718, "e32895f559c17cffcd31fe9db449bc603825ddda3c4d44335d6fcd44092906a2"),
]
# Mean and standard deviation of the released outputs with the weights of `strong_fill`.
OUTPUTS = {
    DualVNet: {
        "out1": (0.3615323007106781, 1.5360695123672485),
        "out2": (-0.08162808418273926, 1.665547251701355),
    },
    LeFeDNet: {
        "out1": (0.3615323007106781, 1.5360695123672485),
        "out2": (-0.06260871887207031, 0.9646779298782349),
        "side5": (0.04528041183948517, 0.04996844008564949),
        "side4": (0.024464137852191925, 0.17458593845367432),
        "side3": (-0.03481503203511238, 0.07323409616947174),
        "side2": (-0.006557781249284744, 0.1220514252781868),
        "side1": (-0.16823050379753113, 0.4477192461490631),
    },
}
NETWORKS = [DualVNet, LeFeDNet]
TAPS = ("stage7", "penultimate", "decoder", "acf")
STAGES = ("one", "two", "three", "four", "five")


def small(cls, **arguments):
    """Tiny, in evaluation mode, with statistics that no layer leaves unchanged."""
    torch.manual_seed(3)
    net = init_weights(cls(2, 3, n_filters=2, **arguments))
    for buffer_name, buffer in net.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(
                0.2 * torch.randn_like(buffer)
                if "mean" in buffer_name
                else 0.3 + torch.rand_like(buffer)
            )
    return net.eval()


def image_for(batch=2, size=(16, 16, 16), seed=0):
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(seed))


def maps(batch=2, side=16, channels=2, seed=1):
    """Random maps of the shapes of a decoder's stages, deepest first."""
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels * 2**k, *[side // 2**k] * 3, generator=rng)
        for k in (4, 3, 2, 1, 0)
    ]


def both_logits(net, image):
    return (
        net.all(image)["logits"]
        if isinstance(net, LeFeDNet)
        else [logits for logits, _ in net.both(image)]
    )


def slow_decode(decoder, features, gates=None):
    """The gated decoder, level by level: logits and stages, deepest first."""
    skips, x = list(features[:4]), features[4]
    if gates is not None:
        x = x * (1 + gates[0])
    stages = [x]
    for level, (up, block) in enumerate(
        [("five_up", "six"), ("six_up", "seven"), ("seven_up", "eight"), ("eight_up", "nine")],
        start=1,
    ):
        up_map = getattr(decoder, f"block_{up}")(x)
        stages.append(up_map)
        skip = skips[4 - level]
        x = getattr(decoder, f"block_{block}")(
            up_map + (skip if gates is None else skip * gates[level])
        )
    return decoder.out_conv(x), stages


@pytest.mark.parametrize("cls, count, digest", RELEASED)
def test_counts_and_names_are_the_released_ones(cls, count, digest):
    with torch.device("meta"):
        net = cls(1, 2)
    assert sum(p.numel() for p in net.parameters()) == count
    assert checks.digest(net) == digest


@pytest.mark.parametrize("cls", NETWORKS)
def test_output_statistics_are_the_released_ones(cls):
    net = cls(1, 2)
    strong_fill(net, list(net.state_dict()))
    with torch.no_grad():
        if cls is LeFeDNet:
            found = net.all(checks.golden_image())
            outputs = dict(zip(OUTPUTS[cls], found["logits"] + found["sides"]))
        else:
            outputs = dict(
                zip(OUTPUTS[cls], [logits for logits, _ in net.both(checks.golden_image())])
            )
    for name, (mean, std) in OUTPUTS[cls].items():
        assert outputs[name].shape == (1, 2, 32, 32, 32)
        assert outputs[name].double().mean().item() == pytest.approx(mean, rel=1e-5), name
        assert outputs[name].double().std(unbiased=False).item() == pytest.approx(std, rel=1e-5), (
            name
        )


@pytest.mark.parametrize("name, cls", [("vnet_dual", DualVNet), ("vnet_lefed", LeFeDNet)])
def test_they_are_built_by_name_and_have_three_axes(name, cls):
    net = build_network(name, 2, 3, n_filters=2)
    assert type(net) is cls
    assert (net.in_channels, net.num_classes, net.dims, net.stride) == (2, 3, 3, 16)


@pytest.mark.parametrize("cls", NETWORKS)
@pytest.mark.parametrize("size", [(16, 16, 16), (16, 48, 32)])
def test_taps(cls, size):
    net = small(cls)
    checks.check_taps(net, size, dict.fromkeys(TAPS, 1))
    with torch.no_grad():
        logits, features = net(image_for(size=size), return_features=True)
        assert torch.equal(net.decoder1.out_conv(features["decoder"]), logits)


@pytest.mark.parametrize("cls", NETWORKS)
def test_forward_is_the_first_decoder(cls):
    net, image = small(cls), image_for(size=(16, 32, 16))
    with torch.no_grad():
        first, second = both_logits(net, image)
        assert first.shape == second.shape == (2, 3, 16, 32, 16)
        assert torch.equal(net(image), first)
        assert not torch.allclose(first, second, atol=1e-2)


def test_both_gives_the_map_that_each_classifier_saw():
    net, image = small(DualVNet), image_for()
    features = net.encoder(image)
    for (logits, last), decoder in zip(net.both(image), (net.decoder1, net.decoder2)):
        expected, _ = slow_decode(decoder, features)
        torch.testing.assert_close(logits, expected)
        assert last.shape == (2, 2, 16, 16, 16)
        assert torch.equal(decoder.out_conv(last), logits)


@pytest.mark.parametrize(
    "cls, arguments, second",
    [
        (DualVNet, {}, "nearest"),
        (DualVNet, {"upsample": "trilinear"}, "trilinear"),
        (LeFeDNet, {}, "trilinear"),
    ],
)
def test_the_decoders_differ_in_their_upsampling(cls, arguments, second):
    net = small(cls, **arguments)
    for name in ("five", "six", "seven", "eight"):
        first = net.decoder1.get_submodule(f"block_{name}_up.conv.0")
        assert isinstance(first, torch.nn.ConvTranspose3d) and first.stride == (2, 2, 2)
        upsample = net.decoder2.get_submodule(f"block_{name}_up.conv.0")
        assert (upsample.mode, upsample.align_corners) == (
            second,
            True if second == "trilinear" else None,
        )


def test_encode_without_feedback_is_the_plain_encoder():
    net, image = small(LeFeDNet), image_for()
    with torch.no_grad():
        for ours, plain in zip(net.encode(image), net.encoder(image), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("index", range(5))
def test_feedback_is_added_to_one_map_and_reaches_all_deeper_ones(index):
    net, image = small(LeFeDNet), image_for()
    feedback = [extra if k == index else torch.zeros_like(extra) for k, extra in enumerate(maps())]
    level = 4 - index
    with torch.no_grad():
        plain, found = net.encode(image), net.encode(image, feedback)
        for k in range(level):
            assert torch.equal(found[k], plain[k])
        x = plain[level] + feedback[index]
        torch.testing.assert_close(found[level], x)
        for k in range(level + 1, 5):
            x = net.encoder.get_submodule(f"block_{STAGES[k - 1]}_dw")(x)
            x = net.encoder.get_submodule(f"block_{STAGES[k]}")(x)
            torch.testing.assert_close(found[k], x)
            assert not torch.allclose(found[k], plain[k])


def test_all_feedback_together_equals_encoding_stage_by_stage():
    net, image, feedback = small(LeFeDNet), image_for(), maps()
    with torch.no_grad():
        found, x = net.encode(image, feedback), image
        for k, name in enumerate(STAGES):
            x = net.encoder.get_submodule(f"block_{name}")(x) + feedback[4 - k]
            torch.testing.assert_close(found[k], x)
            x = net.encoder.get_submodule(f"block_{name}_dw")(x) if k < 4 else x


def test_feedback_is_added_before_the_dropout_of_the_deepest_map():
    net = small(LeFeDNet, encoder_dropout=0.5).train()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm3d):
            norm.eval()
    feedback = [
        10.0 + torch.zeros_like(extra) if k == 0 else torch.zeros_like(extra)
        for k, extra in enumerate(maps())
    ]
    with torch.no_grad():
        deepest = net.encode(image_for(), feedback)[4]
    dead = deepest.flatten(2).abs().amax(2) == 0
    assert 0 < dead.sum() < dead.numel()
    assert (deepest[~dead] >= 20.0).all()


def test_feedback_changes_both_decoders_and_is_needed_by_neither():
    net, image = small(LeFeDNet), image_for()
    with torch.no_grad():
        plain, fed = net.all(image), net.all(image, maps())
    for before, after in zip(plain["logits"], fed["logits"]):
        assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_the_decoder_equals_a_second_implementation_with_gates_and_without(gated):
    net = small(LeFeDNet)
    features = list(reversed(maps()))
    gates = [stage.sigmoid() for stage in maps(seed=5)] if gated else []
    for decoder in (net.decoder1, net.decoder2):
        with torch.no_grad():
            logits, stages, last = decode_gated(decoder, features, gates)
            expected, expected_stages = slow_decode(decoder, features, gates or None)
        torch.testing.assert_close(logits, expected)
        assert torch.equal(decoder.out_conv(last), logits)
        for ours, other in zip(stages, expected_stages, strict=True):
            torch.testing.assert_close(ours, other)


def test_the_second_decoder_is_gated_by_the_sigmoid_of_the_stages_of_the_first():
    net, image, feedback = (
        small(LeFeDNet).double(),
        image_for().double(),
        [extra.double() for extra in maps()],
    )
    with torch.no_grad():
        out = net.all(image, feedback)
        features = net.encode(image, feedback)
        logits1, stages1 = slow_decode(net.decoder1, features)
        logits2, stages2 = slow_decode(
            net.decoder2, features, [1 / (1 + torch.exp(-stage)) for stage in stages1]
        )
    for ours, expected in zip(out["logits"], (logits1, logits2), strict=True):
        torch.testing.assert_close(ours, expected)
    assert len(out["stages"]) == 2
    for ours, expected in zip(
        [*out["stages"][0], *out["stages"][1]], [*stages1, *stages2], strict=True
    ):
        torch.testing.assert_close(ours, expected)
    assert [stage.shape[1] for stage in stages1] == [32, 16, 8, 4, 2]
    assert [stage.shape[2] for stage in stages1] == [1, 2, 4, 8, 16]


def test_no_gradient_passes_through_the_gates():
    net = small(LeFeDNet)
    net.all(image_for())["logits"][1].square().sum().backward()
    assert all(p.grad is None for p in [*net.decoder1.parameters(), *net.sideconv1.parameters()])
    assert all(p.grad is not None for p in [*net.encoder.parameters(), *net.decoder2.parameters()])


def doubled(array):
    """Each spatial axis of (B, C, H, W, D) twice as long, linear, corners aligned."""
    for axis in (2, 3, 4):
        size = array.shape[axis]
        positions = np.linspace(0, size - 1, 2 * size)
        array = np.apply_along_axis(
            lambda row, at=positions: np.interp(at, np.arange(len(row)), row), axis, array
        )
    return array


def test_side_outputs_are_doubled_to_full_size_one_step_at_a_time():
    torch.manual_seed(0)
    sides, stages = SideOutputs(3, 2).double(), [stage.double() for stage in maps(batch=1)]
    with torch.no_grad():
        found = sides(stages)
    convs = (sides.side5, sides.side4, sides.side3, sides.side2, sides.side1)
    for level, (ours, conv, stage) in enumerate(zip(found, convs, stages, strict=True)):
        assert ours.shape == (1, 3, 16, 16, 16)
        weight, bias = conv.weight.detach().numpy()[:, :, 0, 0, 0], conv.bias.detach().numpy()
        expected = np.einsum("kc,bchwd->bkhwd", weight, stage.numpy()) + bias[:, None, None, None]
        for _ in range(4 - level):
            expected = doubled(expected)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)
    at_once = torch.nn.functional.interpolate(
        sides.side3(stages[2]), (16,) * 3, mode="trilinear", align_corners=True
    )
    assert not torch.allclose(at_once, found[2], atol=1e-3)


def test_the_sides_are_those_of_the_first_decoder():
    net = small(LeFeDNet)
    with torch.no_grad():
        out = net.all(image_for(size=(16, 32, 16)))
        expected = net.sideconv1(out["stages"][0])
    assert len(out["sides"]) == 5
    for side, other in zip(out["sides"], expected):
        assert side.shape == (2, 3, 16, 32, 16) and torch.equal(side, other)


@pytest.mark.parametrize("cls", NETWORKS)
def test_dropout_acts_in_training_only(cls):
    net, image = small(cls), image_for()
    with torch.no_grad():
        state = torch.random.get_rng_state()
        assert torch.equal(net(image), net(image))
        first, again = both_logits(net, image), both_logits(net, image)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert torch.equal(torch.random.get_rng_state(), state)
        net.train()
        assert not torch.equal(net(image), net(image))
        assert all(
            not torch.equal(a, b) for a, b in zip(both_logits(net, image), both_logits(net, image))
        )


@pytest.mark.parametrize("cls", NETWORKS)
def test_without_dropout_training_is_deterministic(cls):
    net = small(cls, dropout=0.0, **({"encoder_dropout": 0.0} if cls is LeFeDNet else {})).train()
    with torch.no_grad():
        first, again = both_logits(net, image_for()), both_logits(net, image_for())
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("cls, rate", [(DualVNet, 0.5), (LeFeDNet, 0.3)])
def test_the_deepest_map_loses_the_released_share_of_channels(cls, rate):
    torch.manual_seed(0)
    net = cls(2, 3, n_filters=4).train()
    seen = []
    net.encoder.block_five.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    with torch.no_grad():
        image = image_for(batch=6)
        deepest = (net.encode if cls is LeFeDNet else net.encoder)(image)[4]
    alive = seen[0].flatten(2).abs().amax(2) > 0
    gone = (deepest.flatten(2).abs().amax(2) == 0) & alive
    assert gone.sum() / alive.sum() == pytest.approx(rate, abs=0.1)
    kept = torch.where(gone[..., None, None, None], 0.0, seen[0] / (1 - rate))
    torch.testing.assert_close(deepest, kept)


@pytest.mark.parametrize("cls", NETWORKS)
def test_every_parameter_learns_from_both_decoders_and_the_sides(cls):
    net = small(cls).train()
    if cls is LeFeDNet:
        out = net.all(image_for())
        outputs = out["logits"] + out["sides"]
    else:
        outputs = [logits for logits, _ in net.both(image_for())]
    sum(output.square().mean() for output in outputs).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("cls", NETWORKS)
def test_calling_the_network_leaves_the_second_decoder_alone(cls):
    net = small(cls).train()
    before = {name: value.clone() for name, value in net.decoder2.state_dict().items()}
    net(image_for()).square().mean().backward()
    assert all(p.grad is None for p in net.decoder2.parameters())
    assert all(p.grad is not None for p in [*net.encoder.parameters(), *net.decoder1.parameters()])
    assert all(
        torch.equal(value, before[name]) for name, value in net.decoder2.state_dict().items()
    )


@pytest.mark.parametrize("cls, name", [(DualVNet, "both"), (LeFeDNet, "all"), (LeFeDNet, "encode")])
def test_bad_input_is_refused(cls, name):
    net = small(cls)
    for call in (net, getattr(net, name)):
        with pytest.raises(ValueError, match="multiple of 16"):
            call(torch.zeros(1, 2, 16, 24, 16))
        with pytest.raises(ValueError, match="in_channels"):
            call(torch.zeros(1, 1, 16, 16, 16))
        with pytest.raises(ValueError, match=r"\(B, 2, H, W, D\)"):
            call(torch.zeros(1, 2, 16, 16))
