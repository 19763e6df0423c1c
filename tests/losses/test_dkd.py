import numpy as np
import pytest
import torch

from losses.dkd import DKD
from losses.kd import bernoulli_kl, softmax_kl
from tests.losses import reference as ref


def slow_dkd(weight=0.1, alpha=1.0, beta=8.0, tau=4.0):
    def slow(student, teacher, label):
        ids = label.astype(int).reshape(len(label), -1)
        target, rest = [], []
        for (b, v, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            k = ids[b, v]
            target.append(ref.binary_kl(ref.softmax(t / tau)[k], ref.softmax(s / tau)[k]))
            rest.append(
                ref.kl(ref.softmax(np.delete(t, k) / tau), ref.softmax(np.delete(s, k) / tau))
            )
        scale = weight * tau**2
        return {
            "dkd_target": scale * alpha * np.mean(target),
            "dkd_nontarget": scale * beta * np.mean(rest),
        }

    return slow


def slow_regions(student, teacher, label):
    inside, outside, tau = 0.0, 0.0, 4.0
    for s, t, y in zip(student.logits.ravel(), teacher.logits.ravel(), label.ravel()):
        divergence = tau**2 * ref.binary_kl(ref.sigmoid(t / tau), ref.sigmoid(s / tau))
        inside, outside = inside + divergence * y, outside + divergence * (not y)
    return {
        "dkd_target": 0.1 * inside / label.size,
        "dkd_nontarget": 0.1 * 8 * outside / label.size,
    }


def slow_regions_as_released(student, teacher, label):
    def mse(a, b):
        return np.mean((ref.sigmoid(a) - ref.sigmoid(b)) ** 2)

    mask = np.where(label, 0.0, 1.0)
    return {
        "dkd_target": mse(student.logits, teacher.logits),
        "dkd_nontarget": 8 * mse(student.logits * mask, teacher.logits * mask),
    }


def make(num_classes=4, **arguments):
    return DKD({}, {}, num_classes, **arguments)


CUSTOM = {"weight": 2.0, "alpha": 0.5, "beta": 3.0, "tau": 2.0}
SETTINGS = [
    ({}, slow_dkd()),
    ({"preset": "as_released"}, slow_dkd()),
    (CUSTOM, slow_dkd(**CUSTOM)),
    ({"multilabel": True}, slow_regions),
    ({"multilabel": True, "preset": "as_released"}, slow_regions_as_released),
]


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
@pytest.mark.parametrize("arguments, slow", SETTINGS)
def test_equals_slow_reference(arguments, slow, spatial):
    case = ref.make_case(spatial=spatial, multilabel=arguments.get("multilabel", False))
    ref.check_values(make(**arguments), case, slow)


# Share of the training done -> share of the weights: 20 of the authors' 240 epochs are a twelfth.
AUTHORS = {0: 0.0, 1 / 240: 1 / 20, 10 / 240: 1 / 2, 20 / 240: 1.0, 21 / 240: 1.0, 1: 1.0}
AT_ONCE = dict.fromkeys((0, 0.04, 1), 1.0)


@pytest.mark.parametrize(
    "arguments, slow, grown",
    [
        ({}, slow_dkd(), AUTHORS),
        ({"multilabel": True}, slow_regions, AUTHORS),
        ({"warmup": 0.5}, slow_dkd(), {0: 0.0, 0.1: 0.2, 0.5: 1.0, 0.9: 1.0}),
        ({"warmup": 0}, slow_dkd(), AT_ONCE),
        ({"preset": "as_released"}, slow_dkd(), AT_ONCE),
        ({"multilabel": True, "preset": "as_released"}, slow_regions_as_released, AT_ONCE),
    ],
)
def test_warm_up_equals_slow_reference(arguments, slow, grown):
    case = ref.make_case(multilabel=arguments.get("multilabel", False))
    expected = slow(ref.as_arrays(case.student), ref.as_arrays(case.teacher), case.label.numpy())
    module = make(**arguments)
    for progress, share in grown.items():
        terms = module(case.student, case.teacher, case.label, progress)
        for name, term in terms.items():
            assert term.item() == pytest.approx(share * expected[name], rel=2e-5), progress
        sum(terms.values()).backward()  # at the first step, too
    assert torch.isfinite(case.student.logits.grad).all()


@pytest.mark.parametrize("arguments, slow", SETTINGS)
def test_contract(arguments, slow):
    case = ref.make_case(multilabel=arguments.get("multilabel", False))
    module = make(**arguments)
    ref.check_teacher_constant(module, case)
    ref.check_range(module, case)
    ref.check_batch_invariance(module, case)
    twin = ref.evaluate(module, ref.same_as_teacher(case))
    assert all(abs(term.item()) < 1e-5 for term in twin.values())


@pytest.mark.parametrize(
    "arguments, weight",
    [({}, 0.1), ({"multilabel": True}, 0.1), ({"multilabel": True, "preset": "as_released"}, 1.0)],
)
def test_doubling_a_weight_doubles_its_term(arguments, weight):
    case = ref.make_case(multilabel=arguments.get("multilabel", False))
    weights = {
        "weight": (weight, "dkd"),
        "alpha": (1.0, "dkd_target"),
        "beta": (8.0, "dkd_nontarget"),
    }
    ref.check_doubling(lambda **more: make(**arguments, **more), case, weights)


def test_two_classes_have_no_other_classes_and_equal_plain_kd():
    case = ref.make_case(num_classes=2)
    terms = ref.evaluate(make(2, weight=1.0), case)
    assert abs(terms["dkd_nontarget"].item()) < 1e-6
    plain = softmax_kl(case.student.logits, case.teacher.logits, tau=4.0, reduction="voxel")
    torch.testing.assert_close(terms["dkd_target"], plain, rtol=1e-5, atol=1e-6)


def test_regions_with_equal_weights_are_plain_kd():
    case = ref.make_case(multilabel=True)
    terms = ref.evaluate(make(multilabel=True, weight=1.0, alpha=1.0, beta=1.0), case)
    torch.testing.assert_close(
        sum(terms.values()), bernoulli_kl(case.student.logits, case.teacher.logits, 4.0)
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="tau"):
        make(tau=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
    with pytest.raises(ValueError, match="warmup must lie in"):
        make(warmup=20)
    with pytest.raises(ValueError, match="one channel per region"):
        ref.evaluate(make(multilabel=True), ref.make_case())
