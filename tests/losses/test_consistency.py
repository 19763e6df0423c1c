import math

import numpy as np
import pytest
import torch

from losses.consistency import (
    ce_dice_loss,
    cross_entropy_loss,
    cross_entropy_map,
    dice_loss,
    sigmoid_rampup,
    supervised_loss,
    without_channel,
)
from tests.losses import reference as ref

GRIDS = [(5, 4), (4, 3, 2)]
FORMS = [
    {},
    {"background": True, "average": True},
    {"background": True, "average": True, "eps": 1e-4},
    {"average": True, "eps": 0.5},
]


def slow_cross_entropy(logits, label, mask):
    label, mask = label.reshape(len(logits), -1), mask.reshape(len(logits), -1)
    values = [-np.log(ref.softmax(x)[label[b, v]]) for b, v, x in ref.columns(logits) if mask[b, v]]
    return sum(values) / max(len(values), 1)


def slow_dice(logits, label, mask, background=False, average=False, eps=1e-5):
    label, mask = label.reshape(len(logits), -1), mask.reshape(len(logits), -1)
    counted = range(0 if background else 1, logits.shape[1])
    losses = []
    for k in counted:
        overlap = total = 0.0
        for b, v, x in ref.columns(logits):
            if mask[b, v]:
                p, y = ref.softmax(x)[k], float(label[b, v] == k)
                overlap += p * y
                total += p * p + y * y
        losses.append(1 - (2 * overlap + eps) / (total + eps))
    return sum(losses) / (len(losses) if average else 1)


def check_gradients(slow, array, gradient, entries=6):
    """The central differences of `slow(array)`, float64, at a few entries and at the largest
    gradient.
    """
    flat, gradient = array.reshape(-1), gradient.reshape(-1)
    scale = gradient.abs().max().item()
    step = 1e-4
    for index in [
        int(gradient.abs().argmax()),
        *np.random.default_rng(3).choice(flat.size, entries, replace=False),
    ]:
        before, sums = flat[index], []
        for delta in (step, -step):
            flat[index] = before + delta
            sums.append(slow(array))
        flat[index] = before
        assert (
            abs(gradient[index].item() - (sums[0] - sums[1]) / (2 * step)) <= 2e-4 * scale + 1e-7
        ), index


def make(grid, classes=4, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(batch, classes, *grid, generator=rng)
    label = torch.randint(0, classes, (batch, *grid), generator=rng)
    mask = torch.rand(batch, *grid, generator=rng) < 0.6
    return logits, label, mask


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_slow_reference(grid, form, classes, masked):
    logits, label, mask = make(grid, classes)
    if not masked:
        mask = torch.ones_like(mask)
    array, ids, valid = logits.double().numpy(), label.numpy(), mask.numpy()

    def slow(x):
        return 0.5 * (slow_cross_entropy(x, ids, valid) + slow_dice(x, ids, valid, **form))

    logits.requires_grad_()
    loss = ce_dice_loss(logits, label[:, None], mask=mask if masked else None, **form)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow(array), rel=1e-5)
    dice = dice_loss(logits, label, mask=mask, **form)
    assert dice.item() == pytest.approx(slow_dice(array, ids, valid, **form), rel=1e-5)
    loss.backward()
    check_gradients(slow, array, logits.grad)


def test_forms_of_label_and_mask_are_one():
    logits, label, mask = make((4, 3, 2))
    expected = ce_dice_loss(logits, label, mask=mask)
    for ids in (label, label[:, None], label.float()[:, None], label.to(torch.uint8)):
        for valid in (mask, mask[:, None], mask.float()):
            assert torch.equal(ce_dice_loss(logits, ids, mask=valid), expected)


def test_mask_equals_leaving_the_voxels_out():
    logits, label, mask = make((6, 5), batch=1)
    kept = [
        logits.flatten(2)[:, :, mask.flatten()][..., None],
        label.flatten()[mask.flatten()][None, :, None],
    ]
    for form in FORMS:
        torch.testing.assert_close(
            ce_dice_loss(logits, label, mask=mask, **form), ce_dice_loss(*kept, **form)
        )


def test_known_values():
    # One half everywhere, half of the voxels foreground: overlap n/4, squares n/4, label n/2.
    logits, label = torch.zeros(1, 2, 8, 8), (torch.arange(64) % 2).view(1, 8, 8)
    assert cross_entropy_loss(logits, label).item() == pytest.approx(math.log(2))
    assert dice_loss(logits, label).item() == pytest.approx(1 - 2 * 16 / (16 + 32), abs=1e-6)
    # A perfect prediction, and one that has every voxel wrong.
    perfect = 50.0 * torch.nn.functional.one_hot(label, 2).movedim(-1, 1).float()
    assert ce_dice_loss(perfect, label).item() == pytest.approx(0.0, abs=1e-6)
    assert dice_loss(-perfect, label, background=True).item() == pytest.approx(2.0, abs=1e-5)
    assert dice_loss(-perfect, label, background=True, average=True).item() == pytest.approx(
        1.0, abs=1e-5
    )


def test_absent_classes():
    logits, label = torch.full((1, 3, 4, 4), -50.0), torch.zeros(1, 4, 4)
    logits[:, 0] = 50.0
    assert dice_loss(logits, label).item() == pytest.approx(0.0, abs=1e-6)
    logits[:, 1] = 150.0  # class 1 predicted everywhere and nowhere present
    assert dice_loss(logits, label).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_empty_mask_gives_zero_with_a_graph(form):
    logits, label, mask = make((5, 4))
    logits.requires_grad_()
    loss = ce_dice_loss(logits, label, mask=torch.zeros_like(mask), **form)
    assert loss.item() == 0.0
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(
    "change", [lambda x: x.half(), lambda x: x.bfloat16(), lambda x: (1e4 * x.sign()).half()]
)
def test_half_precision_is_finite(change):
    logits, label, mask = make((4, 3, 2))
    logits = change(logits).requires_grad_()
    loss = ce_dice_loss(logits, label, mask=mask)
    loss.backward()
    assert (
        loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ce_dice_loss(logits.detach().float(), label, mask=mask)
    torch.testing.assert_close(mixed, loss.detach(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_map_is_unreduced():
    logits, label, mask = make((4, 3, 2))
    values = cross_entropy_map(logits, label)
    assert values.shape == label.shape
    torch.testing.assert_close(values[mask].mean(), cross_entropy_loss(logits, label, mask))


def test_maps_of_other_sizes_are_refused():
    logits = torch.zeros(2, 3, 4, 5)
    assert without_channel(torch.zeros(2, 1, 4, 5), logits).shape == (2, 4, 5)
    for shape in [(2, 3, 4, 5), (2, 5, 4), (1, 1, 4, 5), (2, 4, 5, 1)]:
        with pytest.raises(ValueError, match="one channel"):
            without_channel(torch.zeros(shape), logits)


def test_sigmoid_rampup():
    assert sigmoid_rampup(0, 200) == pytest.approx(math.exp(-5))
    assert sigmoid_rampup(20, 40) == pytest.approx(math.exp(-1.25))
    assert sigmoid_rampup(40, 40) == sigmoid_rampup(500, 40) == 1.0
    assert sigmoid_rampup(-3, 40) == sigmoid_rampup(0, 40)
    assert sigmoid_rampup(0, 0) == 1.0
    assert sigmoid_rampup(0.3, 0.6) == pytest.approx(sigmoid_rampup(300, 600))
    values = [sigmoid_rampup(t, 50) for t in range(60)]
    assert values == sorted(values)


def slow_present_dice(logits, label, mask, background, average):
    """As slow_dice, without the classes that no counted voxel of the label has."""
    flat, counted = label.reshape(len(logits), -1), mask.reshape(len(logits), -1)
    losses = []
    for k in range(0 if background else 1, logits.shape[1]):
        overlap = total = present = 0.0
        for b, v, x in ref.columns(logits):
            if counted[b, v]:
                p, y = ref.softmax(x)[k], float(flat[b, v] == k)
                overlap, total, present = overlap + p * y, total + p * p + y * y, present + y
        if present:
            losses.append(1 - (2 * overlap + 1e-5) / (total + 1e-5))
    return sum(losses) / (max(len(losses), 1) if average else 1)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("removed", [[], [1], [0, 2], [1, 2, 3]])
def test_dice_of_the_present_classes_equals_slow_reference(grid, background, average, removed):
    logits, label, mask = make(grid)
    for k in removed:  # elsewhere than where it counts it may stay
        mask &= label != k
    array, ids, valid = logits.double().numpy(), label.numpy(), mask.numpy()
    form = {"background": background, "average": average}
    logits.requires_grad_()
    loss = dice_loss(logits, label, mask=mask, absent=False, **form)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_present_dice(array, ids, valid, **form), rel=1e-5)
    loss.backward()
    check_gradients(lambda x: slow_present_dice(x, ids, valid, **form), array, logits.grad)


@pytest.mark.parametrize("average", [False, True])
def test_dice_of_the_present_classes_is_plain_dice_where_all_are_present(average):
    logits, label, mask = make((5, 4))
    assert label[mask].unique().numel() == 4
    for form in ({}, {"mask": mask}):
        plain = dice_loss(logits, label, average=average, **form)
        torch.testing.assert_close(
            dice_loss(logits, label, average=average, absent=False, **form), plain
        )


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dice_without_a_present_class_is_zero_with_a_graph(average, masked):
    logits, label, mask = make((5, 4))
    logits.requires_grad_()
    mask = mask & (label == 0) if masked else None
    label = label if masked else torch.zeros_like(label)
    loss = dice_loss(logits, label, average=average, mask=mask, absent=False)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_an_absent_class_is_pushed_down_only_where_it_counts():
    logits, label = torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4)
    gradients = {}
    for absent in (True, False):
        leaf = logits.clone().requires_grad_()
        ce_dice_loss(leaf, label, absent=absent).backward()
        gradients[absent] = leaf.grad
    # Without it only the two others' own terms act on class 2: as on class 0, from which the label
    # does not differ.
    assert torch.equal(gradients[False][:, 2], gradients[False][:, 0])
    assert (gradients[True][:, 2] > gradients[True][:, 0]).all()


@pytest.mark.parametrize("average", [False, True])
def test_ce_dice_hands_the_absent_classes_on(average):
    logits, label, mask = make((5, 4))
    mask &= label != 2
    form = {"average": average, "absent": False}
    expected = 0.5 * (
        cross_entropy_loss(logits, label, mask) + dice_loss(logits, label, mask=mask, **form)
    )
    torch.testing.assert_close(ce_dice_loss(logits, label, mask=mask, **form), expected)


@pytest.mark.parametrize("weight, own", [(0.5, FORMS[2]), (1.0, FORMS[1])])
def test_the_supervised_loss_is_the_own_one_or_that_of_the_labels_alone(weight, own):
    logits, label, mask = make((5, 4))
    arrays = logits.double().numpy(), label.numpy(), np.ones_like(mask)
    entropy = slow_cross_entropy(*arrays)
    expected = {
        "own": weight * (entropy + slow_dice(*arrays, **own)) / 2,
        "ce_dice": (entropy + slow_dice(*arrays)) / 2,
    }
    for sup_loss, value in expected.items():
        found = supervised_loss(logits, label, sup_loss, weight, **own)
        assert found.item() == pytest.approx(value, rel=1e-5)
