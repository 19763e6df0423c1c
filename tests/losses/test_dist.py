import numpy as np
import pytest
import torch

from losses.dist import DIST, pearson, pearson_of_sums
from tests.losses import reference as ref


def slow_dist(tau=4.0, inter_weight=1.0, intra_weight=1.0, multilabel=False):
    def correlation(x, y):
        return np.corrcoef(x, y)[0, 1]

    def slow(student, teacher, label):
        squash = ref.sigmoid if multilabel else ref.softmax
        ours = np.array([squash(x / tau) for _, _, x in ref.columns(student.logits)])
        theirs = np.array([squash(x / tau) for _, _, x in ref.columns(teacher.logits)])
        intra = np.mean([correlation(ours[:, c], theirs[:, c]) for c in range(ours.shape[1])])
        if multilabel:
            rows = [correlation([*p, *(1 - p)], [*q, *(1 - q)]) for p, q in zip(ours, theirs)]
        else:
            rows = [correlation(p, q) for p, q in zip(ours, theirs)]
        return {
            "dist_inter": inter_weight * tau**2 * (1 - np.mean(rows)),
            "dist_intra": intra_weight * tau**2 * (1 - intra),
        }

    return slow


def make(**arguments):
    return DIST({}, {}, 4, **arguments)


SETTINGS = [
    ({}, {}),
    ({"preset": "as_released"}, {}),
    ({"tau": 1.0, "inter_weight": 2.0, "intra_weight": 0.5}, {"tau": 1.0, "inter_weight": 2.0, "intra_weight": 0.5}),
    ({"multilabel": True}, {"multilabel": True}),
]


@pytest.mark.parametrize("spatial", [(4, 3, 2), (5, 4)])
@pytest.mark.parametrize("arguments, meaning", SETTINGS)
def test_equals_slow_reference(arguments, meaning, spatial):
    case = ref.make_case(spatial=spatial, multilabel=arguments.get("multilabel", False))
    ref.check_values(make(**arguments), case, slow_dist(**meaning))


@pytest.mark.parametrize("multilabel", [False, True])
def test_contract(multilabel):
    case = ref.make_case(multilabel=multilabel)

    def build(**more):
        return make(multilabel=multilabel, **more)

    ref.check_teacher_constant(build(), case)
    ref.check_range(build(), case)
    ref.check_batch_invariance(build(), case)
    ref.check_doubling(
        build,
        case,
        {"weight": (1.0, "dist"), "inter_weight": (1.0, "dist_inter"), "intra_weight": (1.0, "dist_intra")},
    )
    twin = ref.evaluate(build(), ref.same_as_teacher(case))
    assert all(abs(term.item()) < 1e-4 for term in twin.values())


def test_correlation_is_blind_to_scale_and_shift_and_0_for_constants():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pearson(x, 3 * x + 2, 1), torch.ones(3))
    torch.testing.assert_close(pearson(x, -x, 1), -torch.ones(3))
    assert pearson(x, torch.ones(3, 50), 1).abs().max() < 1e-6


def test_one_region_learns_from_its_column():
    case = ref.make_case(num_classes=1, multilabel=True)
    terms = ref.evaluate(DIST({}, {}, 1, multilabel=True), case)
    (gradient,) = torch.autograd.grad(terms["dist_intra"], case.student.logits)
    assert gradient.abs().max() > 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="no multi-label form"):
        make(multilabel=True, preset="as_released")
    with pytest.raises(ValueError, match="tau"):
        make(tau=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")


def test_pearson_of_sums_is_pearson_whatever_the_shift():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 50, generator=rng).double()
    y += x
    x[2] = 0.0  # constant
    for shift in (0.0, 3.0):
        a, b = x + shift, y - shift
        sums = torch.stack([part.sum(1) for part in (a, b, a * a, b * b, a * b)])
        torch.testing.assert_close(pearson_of_sums(sums, 50), pearson(x, y, dim=1), rtol=1e-6, atol=1e-9)
