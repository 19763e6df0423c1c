import math

import numpy as np
import pytest
import torch

from losses.cwd import CWD, channel_wise_kl
from tests.losses import reference as ref


def slow_cwd(weight, tau=4.0, mode="spatial"):
    def slow(student, teacher, label):
        batch, k = student.logits.shape[:2]
        total = 0.0
        for b in range(batch):
            for c in range(k):
                s, t = student.logits[b, c].ravel() / tau, teacher.logits[b, c].ravel() / tau
                if mode == "spatial":
                    total += ref.kl(ref.softmax(t), ref.softmax(s))
                else:
                    total += np.mean(
                        [ref.binary_kl(ref.sigmoid(y), ref.sigmoid(x)) for x, y in zip(s, t)]
                    )
        return {"cwd": weight * tau**2 * total / (batch * k)}

    return slow


def make(**arguments):
    return CWD({}, {}, 4, **arguments)


SETTINGS = [
    ({}, slow_cwd(1.0)),
    ({"preset": "as_released"}, slow_cwd(1.0)),
    ({"tau": 1.0, "weight": 2.5}, slow_cwd(2.5, 1.0)),
    ({"multilabel": True}, slow_cwd(0.1)),
    ({"multilabel": True, "preset": "as_released"}, slow_cwd(0.1)),
    ({"multilabel": True, "mode": "bernoulli"}, slow_cwd(0.1, mode="bernoulli")),
]


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
@pytest.mark.parametrize("arguments, slow", SETTINGS)
def test_equals_slow_reference(arguments, slow, spatial):
    case = ref.make_case(spatial=spatial, multilabel=arguments.get("multilabel", False))
    ref.check_values(make(**arguments), case, slow)


@pytest.mark.parametrize(
    "arguments", [{}, {"multilabel": True}, {"multilabel": True, "mode": "bernoulli"}]
)
def test_contract(arguments):
    case = ref.make_case(multilabel=arguments.get("multilabel", False))
    module = make(**arguments)
    ref.check_teacher_constant(module, case)
    ref.check_range(module, case)
    ref.check_batch_invariance(module, case)
    default = 0.1 if arguments else 1.0
    ref.check_doubling(lambda **more: make(**arguments, **more), case, {"weight": (default, "cwd")})
    assert abs(ref.evaluate(module, ref.same_as_teacher(case))["cwd"].item()) < 1e-6


def test_hand_value_and_blindness_to_a_shift_of_a_channel():
    # One channel of two voxels: teacher [0.8, 0.2], student [0.5, 0.5].
    teacher = torch.tensor([math.log(4.0), 0.0]).view(1, 1, 1, 2)
    expected = math.log(2) + 0.8 * math.log(0.8) + 0.2 * math.log(0.2)
    assert channel_wise_kl(torch.zeros(1, 1, 1, 2), teacher, 1.0).item() == pytest.approx(
        expected, rel=1e-5
    )
    assert channel_wise_kl(torch.full((1, 1, 1, 2), 7.0), teacher, 1.0).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode"):
        make(mode="bernoulli")
    with pytest.raises(ValueError, match="mode"):
        make(multilabel=True, mode="channel")
    with pytest.raises(ValueError, match="tau"):
        make(tau=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
