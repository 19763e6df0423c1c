import math

import numpy as np
import pytest
import torch

from losses.nkd import NKD
from tests.losses import reference as ref


def slow_nkd(weight=1.0, gamma=1.5, tau=1.0):
    def slow(student, teacher, label):
        ids = label.astype(int).reshape(len(label), -1)
        target, rest = [], []
        for (b, v, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            k = ids[b, v]
            target.append(-ref.softmax(t)[k] * np.log(ref.softmax(s)[k]))
            q, p = ref.softmax(np.delete(t, k) / tau), ref.softmax(np.delete(s, k) / tau)
            rest.append(-np.sum(q * np.log(p)))
        return {
            "nkd_target": weight * np.mean(target),
            "nkd_nontarget": weight * gamma * tau**2 * np.mean(rest),
        }

    return slow


def slow_multilabel(student, teacher, label):
    losses = []
    for s, t, y in zip(student.logits.ravel(), teacher.logits.ravel(), label.ravel()):
        p, q = (ref.sigmoid(s), ref.sigmoid(t)) if y else (1 - ref.sigmoid(s), 1 - ref.sigmoid(t))
        losses.append(-q * np.log(p))
    return {"nkd_target": np.mean(losses)}


def make(num_classes=4, **arguments):
    return NKD({}, {}, num_classes, **arguments)


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
@pytest.mark.parametrize("preset", ["clean", "as_released"])
def test_equals_slow_reference(preset, spatial):
    case = ref.make_case(spatial=spatial)
    ref.check_values(make(preset=preset), case, slow_nkd())
    arguments = {"weight": 3.0, "gamma": 0.5, "tau": 2.0}
    ref.check_values(make(preset=preset, **arguments), case, slow_nkd(**arguments))


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
def test_multilabel_equals_slow_reference(spatial):
    ref.check_values(
        make(multilabel=True), ref.make_case(spatial=spatial, multilabel=True), slow_multilabel
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_contract(multilabel):
    case = ref.make_case(multilabel=multilabel)
    module = make(multilabel=multilabel)
    ref.check_teacher_constant(module, case)
    ref.check_range(module, case)
    ref.check_batch_invariance(module, case)
    ref.check_doubling(
        lambda **more: make(multilabel=multilabel, **more), case, {"weight": (1.0, "nkd")}
    )


def test_gamma_scales_the_other_classes_only():
    ref.check_doubling(make, ref.make_case(), {"gamma": (1.5, "nkd_nontarget")})


def test_known_value_where_student_equals_teacher():
    case = ref.apply(ref.make_case(), torch.zeros_like)
    terms = ref.evaluate(make(), case)
    assert terms["nkd_target"].item() == pytest.approx(math.log(4) / 4, rel=1e-6)
    assert terms["nkd_nontarget"].item() == pytest.approx(1.5 * math.log(3), rel=1e-6)
    assert ref.evaluate(
        make(multilabel=True), ref.apply(ref.make_case(multilabel=True), torch.zeros_like)
    )["nkd_target"].item() == pytest.approx(math.log(2) / 2, rel=1e-6)


def test_two_classes_are_the_binary_problem():
    # Logits (0, z) and a sigmoid of z say the same.
    binary = ref.make_case(num_classes=1, multilabel=True)
    pad = ref.apply(binary, lambda x: torch.cat([torch.zeros_like(x), x], dim=1))._replace(
        label=binary.label.float()
    )
    two = ref.evaluate(make(2), pad)
    assert two["nkd_nontarget"].item() == 0.0
    torch.testing.assert_close(
        two["nkd_target"], ref.evaluate(make(1, multilabel=True), binary)["nkd_target"]
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="tau"):
        make(tau=-1.0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
    with pytest.raises(ValueError, match="no multi-label form"):
        make(multilabel=True, preset="as_released")
    with pytest.raises(ValueError, match="one channel per region"):
        ref.evaluate(make(multilabel=True), ref.make_case())
