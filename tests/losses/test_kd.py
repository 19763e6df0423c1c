import math

import numpy as np
import pytest
import torch

from losses.kd import KD, bernoulli_kl_map, region_masks, softmax_kl
from tests.losses import reference as ref


def slow_kd(mode, weight=10.0, tau=1.0, reduction="mean"):
    def slow(student, teacher, label):
        total, voxels, k = 0.0, 0, student.logits.shape[1]
        for (_, _, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            voxels += 1
            if mode == "kl":
                total += tau**2 * ref.kl(ref.softmax(t / tau), ref.softmax(s / tau))
            elif mode == "bernoulli_kl":
                total += tau**2 * sum(
                    ref.binary_kl(ref.sigmoid(b / tau), ref.sigmoid(a / tau)) for a, b in zip(s, t)
                )
            else:
                total += sum((ref.sigmoid(a) - ref.sigmoid(b)) ** 2 for a, b in zip(s, t))
        return {"kd": weight * total / voxels / (k if reduction == "mean" else 1)}

    return slow


def make(multilabel=False, **arguments):
    return KD({}, {}, 4, multilabel=multilabel, **arguments)


SETTINGS = [
    ({}, "kl"),
    ({"preset": "as_released"}, "mse_sigmoid"),
    ({"preset": "as_released", "mode": "kl"}, "kl"),
    ({"multilabel": True}, "mse_sigmoid"),
    ({"multilabel": True, "preset": "as_released"}, "mse_sigmoid"),
    ({"multilabel": True, "mode": "bernoulli_kl"}, "bernoulli_kl"),
]


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
@pytest.mark.parametrize("arguments, mode", SETTINGS)
def test_equals_slow_reference(arguments, mode, spatial):
    case = ref.make_case(spatial=spatial, multilabel=arguments.get("multilabel", False))
    ref.check_values(make(**arguments), case, slow_kd(mode))


@pytest.mark.parametrize("mode", ["kl", "bernoulli_kl", "mse_sigmoid"])
def test_temperature_and_voxel_reduction(mode):
    module = make(
        multilabel=mode == "bernoulli_kl", mode=mode, tau=3.0, reduction="voxel", weight=2.0
    )
    ref.check_values(module, ref.make_case(seed=3), slow_kd(mode, 2.0, 3.0, "voxel"))


@pytest.mark.parametrize("arguments, mode", SETTINGS)
def test_contract(arguments, mode):
    case = ref.make_case(multilabel=arguments.get("multilabel", False))
    module = make(**arguments)
    assert module.student_taps == module.teacher_taps == ()
    ref.check_teacher_constant(module, case)
    ref.check_range(module, case)
    ref.check_batch_invariance(module, case)
    ref.check_doubling(lambda **more: make(**arguments, **more), case, {"weight": (10.0, "kd")})
    assert abs(ref.evaluate(module, ref.same_as_teacher(case))["kd"].item()) < 1e-6


def test_hand_value():
    # Teacher [0.8, 0.2], student [0.5, 0.5]: KL = ln 2 - H(0.8).
    teacher = torch.tensor([math.log(4.0), 0.0]).view(1, 2, 1, 1)
    expected = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    assert softmax_kl(torch.zeros(1, 2, 1, 1), teacher, reduction="voxel").item() == pytest.approx(
        expected, rel=1e-6
    )
    assert softmax_kl(torch.zeros(1, 2, 1, 1), teacher).item() == pytest.approx(
        expected / 2, rel=1e-6
    )
    binary = bernoulli_kl_map(torch.zeros(1), torch.tensor([math.log(4.0)]))
    assert binary.item() == pytest.approx(expected, rel=1e-6)


def test_divergence_of_opposite_certainties_is_their_distance():
    far = bernoulli_kl_map(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert far.item() == pytest.approx(1e4)


def test_region_masks_accept_any_dtype_and_check_channels():
    label = torch.tensor([[[[0, 1]], [[1, 1]]]])
    for dtype in (torch.bool, torch.uint8, torch.float32):
        np.testing.assert_array_equal(
            region_masks(label.to(dtype), 2).numpy(), label.bool().numpy()
        )
    with pytest.raises(ValueError, match="one channel per region"):
        region_masks(label, 3)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"preset": "other"}, "preset"),
        ({"mode": "bernoulli_kl"}, "mode"),
        ({"multilabel": True, "mode": "kl"}, "mode"),
        ({"reduction": "sum"}, "reduction"),
        ({"tau": 0.0}, "tau"),
    ],
)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        make(**arguments)
