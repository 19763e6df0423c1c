"""Sliding-window prediction against a plain loop over windows."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from inference import AMP_MODES, autocast, predict_logits, to_labels


class Net(nn.Module):
    """Two output channels; not equivariant to flips, and every voxel's result depends on where the window lies."""

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
    torch.testing.assert_close(found, predict_logits(network, image, patch_size=(8, 8, 8)), rtol=1e-5, atol=1e-5)


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
    assert ids.dtype == torch.uint8 and ids.shape == (3, 1, 1) and ids.flatten().tolist() == [1, 2, 0]
    regions = to_labels(logits, multilabel=True)
    assert regions.dtype == torch.uint8 and regions.shape == logits.shape
    assert regions.flatten(1).tolist() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]  # sigmoid(0) = 0.5 counts
