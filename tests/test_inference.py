"""Sliding-window prediction against a plain loop over windows."""

import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from inference import (
    AMP_MODES,
    _advance,
    _averages,
    _place_windows,
    autocast,
    fast_copy,
    fast_dtype,
    largest_component,
    predict_labels,
    predict_logits,
    predict_slices,
    to_labels,
)
from networks import NETWORKS, build_network, init_weights


class Net(nn.Module):
    """Two output channels; not equivariant to flips, and every voxel's result depends on where the
    window lies.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 2, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.sizes = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape))
        ramp = torch.linspace(-1, 1, image.shape[2]).view(1, 1, -1, 1, 1)
        return self.drop(self.conv(image) + ramp + image.mean((2, 3, 4), keepdim=True))


def starts(size, window, overlap):
    step = max(int(window * (1 - overlap)), 1)
    return sorted({min(start, size - window) for start in range(0, size - window + step, step)})


def slow_windows(network, image, patch_size, overlap):
    """Average over all windows of the zero-padded volume, accumulated in float64."""
    missing = [max(want - have, 0) for want, have in zip(patch_size, image.shape[1:])]
    before = [m // 2 for m in missing]
    volume = np.pad(image.numpy(), [(0, 0)] + [(b, m - b) for b, m in zip(before, missing)])
    total, count = np.zeros((2, *volume.shape[1:])), np.zeros(volume.shape[1:])
    axes = [starts(size, window, overlap) for size, window in zip(volume.shape[1:], patch_size)]
    for corner in itertools.product(*axes):
        place = tuple(slice(c, c + n) for c, n in zip(corner, patch_size))
        with torch.no_grad():
            logits = network(torch.from_numpy(volume[(None, slice(None), *place)].copy()))[0]
        total[(slice(None), *place)] += logits.double().numpy()
        count[place] += 1
    assert count.min() > 0
    kept = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:]))
    return (total / count)[(slice(None), *kept)]


def random_image(shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(8, 8, 8), (16, 9, 11), (3, 5, 8), (21, 4, 6), (1, 1, 1)])
def test_equals_a_loop_over_windows(shape, overlap):
    network, image = Net().eval(), random_image(shape)
    expected = slow_windows(network, image, (8, 6, 4), overlap)
    found = predict_logits(network, image, patch_size=(8, 6, 4), overlap=overlap)
    assert found.shape == (2, *shape) and found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert {size[2:] for size in network.sizes} == {(8, 6, 4)}


@pytest.mark.parametrize("window_batch", [1, 3, 100])
def test_window_batch_changes_nothing(window_batch):
    network, image = Net().eval(), random_image((13, 12, 9))
    found = predict_logits(network, image, patch_size=(8, 8, 8), window_batch=window_batch)
    assert max(size[0] for size in network.sizes) <= window_batch
    torch.testing.assert_close(
        found, predict_logits(network, image, patch_size=(8, 8, 8)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(8, 8, 8), (11, 7, 9)])
def test_tta_is_the_mean_over_flips(shape):
    network, image = Net().eval(), random_image(shape)
    plain = []
    for count in range(4):
        for axes in itertools.combinations((1, 2, 3), count):
            plain.append(predict_logits(network, image.flip(axes), patch_size=(8, 8, 8)).flip(axes))
    assert len(plain) == 8
    found = predict_logits(network, image, patch_size=(8, 8, 8), tta=True)
    torch.testing.assert_close(found, torch.stack(plain).mean(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain[0], atol=1e-3)  # the network does see the flips


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_prediction_is_in_eval_mode(training):
    network, image = Net().train(training), random_image((6, 6, 6))
    first, second = (predict_logits(network, image, patch_size=(4, 4, 4)) for _ in range(2))
    assert network.training is training and network.drop.training is training
    assert torch.equal(first, second)  # dropout was off


def test_mode_is_restored_after_an_error():
    network = Net().train()
    with pytest.raises(RuntimeError):
        predict_logits(network, torch.zeros(5, 4, 4, 4), patch_size=(4, 4, 4))
    assert network.training


def test_amp_runs_in_half_precision_and_returns_float32():
    network, image = nn.Conv3d(1, 2, 3, padding=1), random_image((6, 6, 6))
    exact = predict_logits(network, image, patch_size=(4, 4, 4))
    half = predict_logits(network, image, patch_size=(4, 4, 4), amp="bf16")
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0.03, atol=0.03)


def test_amp_names():
    assert set(AMP_MODES) == {"off", "bf16", "fp16"}
    with pytest.raises(ValueError, match="amp must be one of off, bf16, fp16, got 'half'"):
        autocast(torch.device("cpu"), "half")
    with pytest.raises(ValueError, match="'half'"):
        predict_logits(Net(), random_image((4, 4, 4)), patch_size=(4, 4, 4), amp="half")


def test_to_labels():
    logits = torch.tensor([[0.1, -1.0, 0.0], [0.3, -2.0, 0.0], [0.2, 5.0, -1.0]]).view(3, 3, 1, 1)
    ids = to_labels(logits)
    assert (
        ids.dtype == torch.uint8 and ids.shape == (3, 1, 1) and ids.flatten().tolist() == [1, 2, 0]
    )
    hard = torch.tensor(
        [
            [1.0, math.nan, 2.0, -math.inf],
            [1.0, 5.0, math.nan, -math.inf],
            [1.0, math.nan, 3.0, 0.0],
        ]
    )
    ties = torch.randint(0, 2, (5, 999), generator=torch.Generator().manual_seed(0)).float()
    for values in (hard, ties):
        # the first of equals, and NaN before numbers
        assert torch.equal(to_labels(values).long(), values.argmax(0))
    regions = to_labels(logits, multilabel=True)
    assert regions.dtype == torch.uint8 and regions.shape == logits.shape
    # sigmoid(0) = 0.5 counts
    assert regions.flatten(1).tolist() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]


# Windows by stride, averages of probabilities


def strided_starts(size, window, stride):
    count = math.ceil((size - window) / stride) + 1
    return [min(stride * i, size - window) for i in range(count)]


def slow_probabilities(network, image, patch_size, stride):
    """Softmax of every window added up and divided by the number of visits, without the zeros
    around small volumes.
    """
    missing = [max(window - size, 0) for window, size in zip(patch_size, image.shape[1:])]
    before = [m // 2 for m in missing]
    volume = np.pad(image.numpy(), [(0, 0)] + [(b, m - b) for b, m in zip(before, missing)])
    total, visits = np.zeros((2, *volume.shape[1:])), np.zeros(volume.shape[1:])
    axes = [strided_starts(*sizes) for sizes in zip(volume.shape[1:], patch_size, stride)]
    for corner in itertools.product(*axes):
        place = tuple(slice(start, start + window) for start, window in zip(corner, patch_size))
        with torch.no_grad():
            logits = network(torch.from_numpy(volume[(None, slice(None), *place)].copy()))
        total[(slice(None), *place)] += logits[0].double().softmax(0).numpy()
        visits[place] += 1
    kept = tuple(slice(b, b + size) for b, size in zip(before, image.shape[1:]))
    return (total / visits)[(slice(None), *kept)], math.prod(len(starts) for starts in axes)


STRIDED = [
    ((16, 16, 12), (16, 16, 12), (5, 5, 3)),  # one window
    ((31, 26, 13), (16, 16, 12), (5, 5, 3)),
    ((17, 16, 24), (16, 16, 12), (5, 5, 3)),
    ((31, 40, 13), (16, 16, 12), (16, 16, 12)),  # as far apart as they are large
    ((9, 11, 7), (8, 6, 4), (1, 1, 1)),
    ((10, 20, 7), (16, 8, 12), (5, 3, 4)),  # two axes shorter than the patch, by 6 and by 5
    ((3, 5, 2), (8, 6, 4), (3, 6, 1)),  # all of them
    ((1, 30, 8), (8, 8, 8), (7, 5, 8)),
    ((20, 17, 12), (16, 16, 8), (5, 5, 3)),
    ((13, 20, 7), (16, 16, 8), (5, 5, 3)),
]


@pytest.mark.parametrize("shape, patch_size, stride", STRIDED)
def test_probabilities_by_stride_equal_a_loop_over_windows(shape, patch_size, stride):
    network, image = Net().eval(), random_image(shape)
    expected, windows = slow_probabilities(network, image, patch_size, stride)
    network.sizes.clear()
    found = predict_logits(network, image, patch_size=patch_size, stride=stride, probabilities=True)
    assert found.shape == (2, *shape) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(to_labels(found).numpy(), expected.argmax(0))
    assert sum(size[0] for size in network.sizes) == windows


@pytest.mark.parametrize("patch", [8, 16, 80, 112])
def test_every_stride_up_to_the_patch_steps_by_exactly_that(patch):
    class Tag(nn.Module):
        """Notes where its windows begin; the image holds the position."""

        def __init__(self):
            super().__init__()
            self.anchor, self.seen = nn.Parameter(torch.zeros(1)), []

        def forward(self, window):
            self.seen += window[:, 0, 0, 0, 0].int().tolist()
            return window

    size = 2 * patch + 3
    image = torch.arange(size, dtype=torch.float32).view(1, size, 1, 1)
    for stride in range(1, patch + 1):
        network = Tag()
        predict_logits(
            network, image, patch_size=(patch, 1, 1), stride=(stride, 1, 1), window_batch=64
        )
        assert network.seen == strided_starts(size, patch, stride)


@pytest.mark.parametrize("shape", [(16, 9, 11), (3, 5, 2)])
def test_logits_by_stride_are_those_of_the_overlap_with_the_same_step(shape):
    network, image = Net().eval(), random_image(shape)
    by_stride = predict_logits(network, image, patch_size=(8, 6, 4), stride=(4, 3, 2))
    assert torch.equal(by_stride, predict_logits(network, image, patch_size=(8, 6, 4), overlap=0.5))


def test_probabilities_add_up_to_one_and_differ_from_the_softmax_of_mean_logits():
    network, image = Net().eval(), random_image((13, 12, 9))
    options = {"patch_size": (8, 8, 8), "stride": (3, 3, 3)}
    found = predict_logits(network, image, probabilities=True, **options)
    torch.testing.assert_close(found.sum(0), torch.ones(13, 12, 9), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        found, predict_logits(network, image, **options).softmax(0), atol=1e-4
    )


def test_tta_of_probabilities_is_the_mean_over_flips():
    network, image = Net().eval(), random_image((11, 7, 9))
    options = {"patch_size": (8, 8, 8), "stride": (3, 8, 5), "probabilities": True}
    plain = [
        predict_logits(network, image.flip(axes), **options).flip(axes)
        for count in range(4)
        for axes in itertools.combinations((1, 2, 3), count)
    ]
    found = predict_logits(network, image, tta=True, **options)
    torch.testing.assert_close(found, torch.stack(plain).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stride", [(0, 1, 1), (-1, 1, 1), (9, 1, 1), (1, 1, 5), (4, 4), (4, 4, 4, 4), ()]
)
def test_a_stride_that_leaves_gaps_or_has_other_axes_is_refused(stride):
    with pytest.raises(ValueError, match=r"stride .* must lie in 1 \.\. patch_size"):
        predict_logits(Net(), random_image((8, 8, 8)), patch_size=(8, 6, 4), stride=stride)


# Labels slab by slab, against the logits of the whole volume


LABELLED = [
    ((8, 8, 8), {}),
    ((16, 9, 11), {"overlap": 0.7}),
    ((9, 21, 4), {"overlap": 0.25, "window_batch": 3}),  # the slab moves along W
    # along D, by one voxel; H shorter than the window
    ((7, 6, 19), {"stride": (8, 6, 1), "window_batch": 5}),
    ((19, 5, 11), {"stride": (3, 5, 2), "probabilities": True}),
    ((3, 5, 2), {"stride": (3, 6, 1), "probabilities": True, "tta": True}),
    ((17, 5, 9), {"tta": True, "window_batch": 7}),
    ((10, 13, 5), {"multilabel": True}),
    ((11, 6, 13), {"multilabel": True, "tta": True, "stride": (5, 4, 3)}),
    ((1, 1, 1), {}),
]


@pytest.mark.parametrize("shape, options", LABELLED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_labels_are_those_of_the_logits(shape, options, memory_format):
    network, image = Net().eval().to(memory_format=memory_format), random_image(shape)
    multilabel = options.get("multilabel", False)
    plain = {key: value for key, value in options.items() if key != "multilabel"}
    logits = predict_logits(network, image, patch_size=(8, 6, 4), **plain)
    found = predict_labels(network, image, patch_size=(8, 6, 4), **options)
    assert found.dtype == torch.uint8 and found.shape == ((2, *shape) if multilabel else shape)
    # elsewhere rounding may decide
    certain = (logits if multilabel else logits[:1] - logits[1:]).abs() > 1e-5
    certain = certain if multilabel else certain[0]
    assert certain.float().mean() > 0.99
    assert torch.equal(found[certain], to_labels(logits, multilabel)[certain])


@pytest.mark.parametrize("fill", ["zeros", "voxel", "corner", "constant", "noise"])
def test_labels_of_hard_images_equal_a_loop_over_windows(fill):
    image = torch.zeros(1, 18, 11, 7)
    if fill == "voxel":
        image[0, 9, 5, 3] = 100.0
    elif fill == "corner":
        image[0, 17, 10, 6] = 100.0
    elif fill == "constant":
        image += 3.0
    elif fill == "noise":
        image = 1000 * random_image((18, 11, 7)) * (random_image((18, 11, 7)) > 1)
    network = Net().eval()
    expected = slow_windows(network, image, (8, 6, 4), 0.5)
    certain = np.abs(expected[0] - expected[1]) > 1e-3
    found = predict_labels(network, image, patch_size=(8, 6, 4)).numpy()
    assert np.array_equal(found[certain], expected.argmax(0)[certain]) and certain.mean() > 0.95


def test_a_class_that_never_wins_is_absent():
    network, image = nn.Conv3d(1, 3, 1), random_image((13, 9, 6))
    with torch.no_grad():
        network.bias.copy_(torch.tensor([100.0, 0.0, -100.0]))
    assert not predict_labels(network, image, patch_size=(8, 6, 4)).any()


def test_labels_keep_one_slab_of_logits():
    network, image, patch_size = Net().eval(), random_image((30, 9, 7)), (8, 6, 4)
    windows = _place_windows((30, 9, 7), patch_size, 0.5, None, False)
    with torch.no_grad():
        parts = [
            (begin, part.clone(), part.untyped_storage().nbytes())
            for begin, part in _averages(
                network, image, windows, patch_size, (8, 9, 7), 0, 4, "off", False
            )
        ]
    assert [begin for begin, _, _ in parts] == [0, 4, 8, 12, 16, 20, 22]
    assert {size for _, _, size in parts} == {4 * 2 * 8 * 9 * 7}
    whole = predict_logits(network, image, patch_size=patch_size)
    torch.testing.assert_close(
        torch.cat([part for _, part, _ in parts], 1), whole, rtol=1e-6, atol=1e-6
    )


def test_the_mode_is_restored_and_wrong_choices_are_refused():
    network, image = Net().train(), random_image((9, 8, 8))
    first, second = (predict_labels(network, image, patch_size=(4, 4, 4)) for _ in range(2))
    assert network.training and network.drop.training and torch.equal(first, second)
    with pytest.raises(ValueError, match="choose one of the two"):
        predict_labels(network, image, patch_size=(4, 4, 4), multilabel=True, probabilities=True)
    for function in (predict_labels, predict_logits):
        with pytest.raises(ValueError, match="three positive sides"):
            function(network, image, patch_size=(4, 4))
        with pytest.raises(ValueError, match="three positive sides"):
            function(network, image[0], patch_size=(4, 4, 4))
        with pytest.raises(ValueError, match="overlap must be"):
            function(network, image, patch_size=(4, 4, 4), overlap=1.0)
        with pytest.raises(RuntimeError):
            function(network, torch.zeros(5, 9, 8, 8), patch_size=(4, 4, 4))
    assert network.training


@pytest.mark.parametrize("length", [1, 2, 7, 8])
@pytest.mark.parametrize("dim", [1, 3])
def test_advance_moves_planes(length, dim):
    for count in range(1, length + 1):
        total = torch.randn(*(length if k == dim else 3 for k in range(4)))
        expected = torch.zeros_like(total)
        expected.narrow(dim, 0, length - count).copy_(total.narrow(dim, count, length - count))
        _advance(total, dim, count)
        assert torch.equal(total, expected)


@pytest.mark.parametrize("shape", [(16, 9, 11), (3, 5, 8), (21, 4, 6)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_logits_equal_those_of_monai(shape, overlap):
    network, image = Net().eval(), random_image(shape)
    with torch.no_grad():
        expected = sliding_window_inference(
            image[None], (8, 6, 4), 4, network, overlap=overlap, mode="constant"
        )[0]
    found = predict_logits(network, image, patch_size=(8, 6, 4), overlap=overlap)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Copies for prediction


VOLUMETRIC = sorted(name for name, network in NETWORKS.items() if getattr(network, "dims", 3) == 3)


@pytest.mark.parametrize("name", VOLUMETRIC)
def test_fast_copy_gives_the_logits_of_its_network(name):
    torch.manual_seed(0)
    network = build_network(name, 2, 3).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    image = torch.randn(1, 2, *[max(16, NETWORKS[name].stride)] * 3)
    exact, half = fast_copy(network, torch.float32), fast_copy(network)
    with torch.no_grad():
        found, rough = exact(image), half(image).float()
        expected = network.eval()(image)
    network.train()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert (rough - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert not exact.training and all(
        torch.equal(before[key], value) for key, value in network.state_dict().items()
    )
    for layer in half.modules():
        for parameter in layer.parameters(recurse=False):
            wide = isinstance(layer, nn.BatchNorm3d)
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_fast_copy_keeps_affine_instance_norms(dtype, tolerance):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, eps=0.1, affine=True), nn.Conv3d(4, 2, 1)
    ).eval()
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    image = torch.randn(3, 1, 9, 8, 7)
    expected, copied = network(image), fast_copy(network, dtype)
    assert isinstance(copied.network[1], nn.InstanceNorm3d) == (dtype == torch.float32)
    nn.init.zeros_(network[1].weight)  # the copy does not follow
    torch.testing.assert_close(copied(image).float(), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        fast_copy(network, torch.float64)


def test_fast_copy_of_one_channel_and_one_plane_reads_no_foreign_memory():
    code = """
import torch
from inference import fast_copy
torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1))
image = torch.randn(2, 1, 1, 5, 4)
torch.testing.assert_close(
    fast_copy(network)(image).float(), network(image), rtol=0.05, atol=0.05
)
"""
    garbage = {**os.environ, "MALLOC_PERTURB_": "165"}  # glibc fills fresh memory with it
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=garbage, cwd=Path(__file__).parents[1]
    )


@pytest.mark.parametrize("planes", [0, 1])
def test_fast_copy_on_images_that_are_almost_constant(planes):
    torch.manual_seed(0)
    network = init_weights(build_network("unet", 1, 3)).eval()
    image = torch.zeros(1, 1, 32, 32, 32)
    image[:, :, :planes] = torch.rand(1, 1, planes, 32, 32)
    with torch.no_grad():
        assert fast_copy(network)(image).isfinite().all()
        # without any contrast instance norm divides rounding errors by their spread, in any layout
        if planes:
            found, expected = fast_copy(network, torch.float32)(image), network(image)
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize(
    "options", [{"overlap": 0.5}, {"stride": (8, 16, 8), "probabilities": True, "tta": True}]
)
def test_a_fast_copy_predicts_like_its_network(options):
    network, image = (
        build_network("unet", 1, 3, channels=(4, 8, 8, 8)).eval(),
        random_image((21, 16, 13)),
    )
    options = {"patch_size": (16, 16, 8), **options}
    expected = predict_logits(network, image, **options)
    exact = predict_logits(fast_copy(network, torch.float32), image, **options)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)
    rough = predict_logits(fast_copy(network), image, **options)
    assert rough.dtype == torch.float32 and rough.is_contiguous()
    torch.testing.assert_close(rough, expected, rtol=0.05, atol=0.05)
    labels = predict_labels(fast_copy(network), image, **options)
    assert (labels == to_labels(rough)).float().mean() > 0.99


# Slices


class Net2d(nn.Module):
    """Three classes from two channels, with dropout and batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = (
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Dropout(0.5),
        )
        self.sizes = []

    def forward(self, image):
        self.sizes.append(len(image))
        return self.drop(self.norm(self.conv(image)))


def random_slices(count):
    return torch.randn(count, 2, 6, 5, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("batch", [1, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 7])
def test_slices_are_the_argmax_whatever_the_batch(count, batch):
    network, slices = Net2d().eval(), random_slices(count)
    with torch.no_grad():
        expected = network(slices).argmax(1)
    network.sizes.clear()
    found = predict_slices(network, slices, batch=batch)
    assert found.dtype == torch.uint8 and found.shape == (count, 6, 5)
    assert torch.equal(found.long(), expected)
    assert sum(network.sizes) == count and max(network.sizes) == min(batch, count)


@pytest.mark.parametrize("training", [True, False])
def test_slices_are_predicted_in_eval_mode_and_the_mode_is_restored(training):
    network, slices = Net2d().train(training), random_slices(4)
    network.norm.eval()
    before = network.norm.running_mean.clone()
    first, second = (predict_slices(network, slices, batch=2) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(network.norm.running_mean, before)
    assert (network.training, network.drop.training, network.norm.training) == (
        training,
        training,
        False,
    )


def test_mode_is_restored_after_an_error_in_slices():
    network = Net2d().train()
    with pytest.raises(RuntimeError):
        predict_slices(network, torch.zeros(2, 5, 6, 5))
    assert network.training and network.drop.training


def test_slices_by_autocast():
    network, slices = Net2d().eval(), random_slices(7)
    exact, half = predict_slices(network, slices), predict_slices(network, slices, amp="bf16")
    assert half.dtype == torch.uint8 and (exact == half).float().mean() > 0.9
    with pytest.raises(ValueError, match="'half'"):
        predict_slices(network, slices, amp="half")


# Largest component


def slow_components(ids):
    """Sets of foreground voxels that touch by faces, edges or corners."""
    left, components = set(map(tuple, np.argwhere(ids > 0))), []
    while left:
        front, component = [left.pop()], set()
        while front:
            point = front.pop()
            component.add(point)
            for step in itertools.product((-1, 0, 1), repeat=ids.ndim):
                other = tuple(a + b for a, b in zip(point, step))
                if other in left:
                    left.remove(other)
                    front.append(other)
        components.append(component)
    return components


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(9, 8, 7), (14, 12)])
def test_the_largest_component_equals_a_slow_search(shape, seed):
    rng = np.random.default_rng(seed)
    ids = (
        rng.integers(1, 4, shape) * (rng.random(shape) < (0.06 if len(shape) == 3 else 0.2))
    ).astype(np.uint8)
    components = slow_components(ids)
    largest = max(map(len, components))
    found = largest_component(ids)
    kept = set(map(tuple, np.argwhere(found)))
    assert len(components) > 1 and kept in components and len(kept) == largest
    assert np.array_equal(found[found > 0], ids[found > 0])
    assert found.dtype == ids.dtype and found.shape == ids.shape


def test_corners_connect():
    ids = np.zeros((5, 5, 5), np.uint8)
    ids[0, 0, 0] = ids[1, 1, 1] = ids[2, 2, 2] = 1
    ids[4, 4, 0] = ids[4, 4, 1] = 1
    expected = ids.copy()
    expected[4] = 0
    assert np.array_equal(largest_component(ids), expected)


def test_classes_that_touch_are_one_component():
    ids = np.zeros((6, 6), np.uint8)
    ids[0, :3], ids[1, 3:5], ids[4:, :2] = 1, 2, 3
    expected = ids.copy()
    expected[4:] = 0
    assert np.array_equal(largest_component(ids), expected)


@pytest.mark.parametrize("value", [0, 1])
def test_nothing_and_a_single_component_stay_as_they_are(value):
    ids = np.full((4, 4, 4), value, np.uint8)
    assert np.array_equal(largest_component(ids), np.full((4, 4, 4), value))


@pytest.mark.parametrize("bfloat16, tiles", [(False, False), (True, False), (False, True)])
def test_fast_copies_are_in_what_the_processor_computes_in(bfloat16, tiles, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert fast_dtype(torch.device("cpu")) == (
        torch.bfloat16 if bfloat16 or tiles else torch.float32
    )
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("grid", itertools.product((1, 2, 3), repeat=3))
def test_bf16_on_a_cpu_has_the_gradients_of_float32(grid, memory, transposed):
    """Where an axis is short, the processor's bfloat16 kernels read memory that nobody wrote."""
    torch.manual_seed(0)
    shape = (16, 8, 3, 3, 3) if transposed else (8, 16, 3, 3, 3)
    convolve = torch.conv_transpose3d if transposed else torch.conv3d
    values = [torch.randn(2, 16, *grid), torch.randn(shape)]
    values = [v.to(torch.bfloat16).float().contiguous(memory_format=memory) for v in values]
    for stride in (1, 2):
        kept = [value.clone().requires_grad_() for value in values]
        exact = convolve(*kept, None, stride, 1)
        arrives = torch.randn_like(exact).to(torch.bfloat16)
        expected = torch.autograd.grad(exact, kept, arrives.float())
        large = [torch.full((1 << e,), 1e30) for e in range(8, 18)]
        del large  # now in memory that the next allocations get
        with autocast(torch.device("cpu"), "bf16"):
            found = convolve(*kept, None, stride, 1)
        assert found.dtype == torch.bfloat16
        gradients = torch.autograd.grad(found, kept, arrives)
        for got, true in zip((found, *gradients), (exact, *expected)):
            error = (got.float() - true).abs().max()
            assert error <= 0.02 * true.abs().max()


def test_bf16_takes_float32_for_thin_grids_alone():
    thin, thick, weight = (
        torch.rand(1, 2, 2, 8, 8),
        torch.rand(1, 2, 8, 8, 8),
        torch.rand(3, 2, 1, 1, 1),
    )
    with autocast(torch.device("cpu"), "bf16"):
        found = [torch.conv3d(image, weight) for image in (thin, thick)]
    assert torch.equal(found[0], torch.conv3d(thin, weight).to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(found[1], torch.conv3d(thick, weight))
    # without a batch
    row, single = torch.rand(2, 7), torch.rand(3, 2, 1)
    with autocast(torch.device("cpu"), "bf16"):
        found = [torch.conv1d(row, single), torch.conv3d(thin[0], weight)]
        assert torch.equal(found[0], torch.conv1d(row[None], single)[0])
    assert torch.equal(found[1], torch.conv3d(thin[0], weight).to(torch.bfloat16))
