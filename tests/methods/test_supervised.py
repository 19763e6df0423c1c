"""The labelled images alone."""

import pytest
import torch

from methods.supervised import Supervised
from networks.unet2d import UNet2D
from networks.vnet import VNet


def make(dims):
    torch.manual_seed(dims)
    if dims == 2:
        network = UNet2D(1, 3, channels=(2, 4, 4, 8, 8), dropout=(0.0,) * 5)
    else:
        network = VNet(1, 3, n_filters=2, dropout=0.0)
    grid = (32,) * 2 if dims == 2 else (16,) * 3
    labelled = {
        "image": torch.randn(2, 1, *grid),
        "label": torch.randint(0, 3, (2, 1, *grid), dtype=torch.uint8),
    }
    return Supervised(lambda: network, max_steps=10), labelled


def slow_loss(logits, label):
    p, y = logits.double().softmax(1), label[:, 0].long()
    loss = 0.5 * -p.gather(1, y[:, None]).log().mean()
    for k in (1, 2):
        one = (y == k).double()
        loss = loss + 0.5 * (
            1 - (2 * (p[:, k] * one).sum() + 1e-5) / ((p[:, k] ** 2).sum() + one.sum() + 1e-5)
        )
    return loss


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("step", [0, 9])
def test_the_term_is_half_cross_entropy_and_half_summed_foreground_dice(dims, step):
    method, labelled = make(dims)
    terms = method.loss(labelled, None, step)
    assert list(terms) == ["sup"] and terms["sup"].shape == ()
    torch.testing.assert_close(
        terms["sup"].double(), slow_loss(method.network(labelled["image"]), labelled["label"])
    )
    terms["sup"].backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


def test_it_asks_for_no_unlabelled_images():
    assert Supervised.uses_unlabelled is False and Supervised.strong_views == 0


def test_the_trained_network_is_the_evaluated_one_and_nothing_is_averaged():
    method, _ = make(2)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.after_step(3)
    assert method.evaluated is method.network
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert {key.split(".")[0] for key in before} == {"network"}


@pytest.mark.parametrize("dims", [2, 3])
def test_pictures_are_of_the_first_image_and_have_no_gradient(dims):
    method, labelled = make(dims)
    method.loss(labelled, None, 0)
    image, truth = method.pictures["labelled"]
    nothing, prediction = method.pictures["prediction"]
    assert torch.equal(image, labelled["image"][0]) and torch.equal(truth, labelled["label"][0, 0])
    assert nothing is None and not prediction.requires_grad
    assert torch.equal(prediction, method.network(labelled["image"])[0].argmax(0))
    assert method.monitor == {}
