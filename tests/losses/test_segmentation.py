"""Dice + cross-entropy and Dice against loops over samples, classes and voxels."""

import math

import numpy as np
import pytest
import torch

from losses.segmentation import SegmentationLoss
from tests.losses import reference as ref


def slow_dice(probs, target):
    """Mean over samples and channels of 1 - (2 sum p g + 1e-5) / (sum p + sum g + 1e-5); arrays (B,
    K, *spatial).
    """
    losses = []
    for sample_p, sample_g in zip(probs, target):
        for p, g in zip(sample_p, sample_g):
            both = sum(a * b for a, b in zip(p.ravel(), g.ravel()))
            losses.append(1 - (2 * both + 1e-5) / (p.sum() + g.sum() + 1e-5))
    return float(np.mean(losses))


def slow_loss(logits, label, multilabel):
    if multilabel:
        return slow_dice(ref.sigmoid(logits), label.astype(float))
    probs, target, entropy = np.zeros_like(logits), np.zeros_like(logits), []
    flat_p, flat_g = (a.reshape(*a.shape[:2], -1) for a in (probs, target))
    ids = label.reshape(len(label), -1).astype(int)
    for b, v, column in ref.columns(logits):
        flat_p[b, :, v] = ref.softmax(column)
        flat_g[b, ids[b, v], v] = 1
        entropy.append(-math.log(flat_p[b, ids[b, v], v]))
    return slow_dice(probs, target) + float(np.mean(entropy))


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
def test_equals_slow_loops(spatial, multilabel):
    case = ref.make_case(spatial=spatial, multilabel=multilabel)
    logits = case.student.logits
    value = SegmentationLoss(multilabel)(logits, case.label)
    assert value.shape == ()
    array = logits.detach().double().numpy()
    assert value.item() == pytest.approx(slow_loss(array, case.label.numpy(), multilabel), rel=1e-5)

    (gradient,) = torch.autograd.grad(value, logits)
    flat, step = array.reshape(-1), 1e-4
    for index in (0, int(gradient.abs().argmax()), flat.size - 1):
        sums = []
        for delta in (step, -step):
            changed = flat.copy()
            changed[index] += delta
            sums.append(slow_loss(changed.reshape(array.shape), case.label.numpy(), multilabel))
        assert gradient.reshape(-1)[index].item() == pytest.approx(
            (sums[0] - sums[1]) / (2 * step), rel=1e-3, abs=1e-7
        )


def test_hand_value_multi_class():
    # Equal logits: p = 1/2 everywhere. One voxel of class 0, one of class 1: each Dice is 2 * 0.5 /
    # (1 + 1).
    value = SegmentationLoss()(
        torch.zeros(1, 2, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    )
    assert value.item() == pytest.approx(0.5 + math.log(2), abs=1e-5)


def test_hand_value_multi_label():
    # p = 1/2: Dice losses 1 - 2 * 1 / (1 + 2) for the full region and 1 - 1e-5 / (1 + 1e-5) for the
    # empty one.
    label = torch.tensor([[[True, True], [False, False]]]).view(1, 2, 1, 1, 2)
    assert SegmentationLoss(True)(torch.zeros(1, 2, 1, 1, 2), label).item() == pytest.approx(
        (1 / 3 + 1) / 2, abs=2e-5
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_near_zero_at_a_sure_and_right_prediction(multilabel):
    case = ref.make_case(multilabel=multilabel, spatial=(8, 8, 4))
    target = case.label.float()
    if not multilabel:
        target = torch.nn.functional.one_hot(case.label[:, 0].long(), 4).movedim(-1, 1).float()
    assert SegmentationLoss(multilabel)(60 * target - 30, case.label).item() == pytest.approx(
        0.0, abs=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multilabel", [False, True])
def test_half_precision(multilabel, dtype):
    case = ref.make_case(multilabel=multilabel)
    loss = SegmentationLoss(multilabel)
    logits = case.student.logits.detach().to(dtype)
    value = loss(logits, case.label)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), case.label))
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(loss(logits, case.label), value, rtol=1e-5, atol=1e-6)
    extreme = (1e4 * logits.float()).to(dtype).requires_grad_()
    loss(extreme, case.label).backward()
    assert torch.isfinite(loss(extreme, case.label)) and torch.isfinite(extreme.grad).all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_batch_invariance(multilabel):
    case = ref.make_case(multilabel=multilabel)
    loss, logits, label = SegmentationLoss(multilabel), case.student.logits[:1], case.label[:1]
    torch.testing.assert_close(
        loss(logits.repeat(3, 1, 1, 1, 1), label.repeat(3, 1, 1, 1, 1)), loss(logits, label)
    )
