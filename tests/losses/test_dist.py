import numpy as np
import pytest
import torch

from losses import voxelwise
from losses.dist import DIST, relations
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
    (
        {"tau": 1.0, "inter_weight": 2.0, "intra_weight": 0.5},
        {"tau": 1.0, "inter_weight": 2.0, "intra_weight": 0.5},
    ),
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
        {
            "weight": (1.0, "dist"),
            "inter_weight": (1.0, "dist_inter"),
            "intra_weight": (1.0, "dist_intra"),
        },
    )
    twin = ref.evaluate(build(), ref.same_as_teacher(case))
    assert all(abs(term.item()) < 1e-4 for term in twin.values())


def test_correlation_is_blind_to_the_scale_of_the_deviations():
    """Half the deviations from uniform are as good as all of them, mirrored ones the worst."""
    teacher = torch.randn(2, 4, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    probs = teacher.softmax(1)
    for factor, expected in ((0.5, 0.0), (-0.2, 2.0)):
        student = (0.25 + factor * (probs - 0.25)).log()
        for term in relations(student, teacher, 1.0):
            assert abs(term.item() - expected) < 1e-5


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_constants_correlate_with_nothing(side, multilabel):
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 5, 4, 3, generator=rng)
    student = torch.zeros_like(student) if side != "teacher" else student
    teacher = torch.zeros_like(teacher) if side != "student" else teacher
    student.requires_grad_()
    terms = relations(student, teacher, 4.0, multilabel)
    assert [term.item() for term in terms] == pytest.approx([16.0, 16.0])
    (gradient,) = torch.autograd.grad(sum(terms), student)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("multilabel", [False, True])
def test_chunks_change_nothing(multilabel, monkeypatch):
    """Moments of chunks add up, also where the mean of a class is far from what it is in other
    chunks.
    """
    case = ref.make_case(spatial=(6, 5, 4), multilabel=multilabel)
    case.student.logits.data[:, 1, :3] += 6
    loss = make(multilabel=multilabel)
    found = []
    for elements in (1 << 18, 40):
        monkeypatch.setattr(voxelwise, "CHUNK_ELEMENTS", elements)
        terms = ref.evaluate(loss, case)
        found.append(
            [*terms.values(), *torch.autograd.grad(sum(terms.values()), case.student.logits)]
        )
    for whole, parts in zip(*found):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


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
