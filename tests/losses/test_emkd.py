import itertools

import numpy as np
import pytest
import torch

from losses import emkd
from losses.emkd import EMKD, importance_map
from tests.losses import reference as ref

STUDENT = {"stage1": (3, (4, 4, 2)), "stage3": (4, (2, 2, 2))}
TEACHER = {"stage1": (5, (8, 8, 4)), "stage3": (6, (2, 2, 2))}
FLAT = {"stage1": (3, (4, 6)), "stage3": (2, (4, 3))}


def slow_emkd(multilabel=False):
    def unit_map(sample):
        energy = np.array([np.mean(sample[:, v] ** 4) for v in range(sample.shape[1])])
        return energy / np.sqrt(np.sum(energy**2))

    def cosines(feature, maps, classes):
        vectors = []
        for k in classes:
            inside = maps[:, k].ravel() if multilabel else maps.ravel() == k
            rows = np.array([column for _, _, column in ref.columns(feature)])
            vectors.append(rows[inside.astype(bool)].mean(0))
        return [
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in itertools.combinations(vectors, 2)
        ]

    def slow(student, teacher, label):
        kd = []
        for (_, _, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            if multilabel:
                kd.append(
                    sum(ref.binary_kl(ref.sigmoid(y / 4), ref.sigmoid(x / 4)) for x, y in zip(s, t))
                )
            else:
                kd.append(ref.kl(ref.softmax(t / 4), ref.softmax(s / 4)))
        importance, region = 0.0, 0.0
        for tap, ours in student.features.items():
            grid = ours.shape[2:]
            theirs, maps = (
                ref.nearest(teacher.features[tap], grid),
                ref.nearest(label.astype(int), grid),
            )
            for a, b in zip(ours, theirs):
                difference = unit_map(a.reshape(len(a), -1)) - unit_map(b.reshape(len(b), -1))
                importance += np.sum(difference**2) / len(ours)
            classes = [
                k for k in range(4) if (maps[:, k].any() if multilabel else (maps == k).any())
            ]
            pairs = zip(cosines(ours, maps, classes), cosines(theirs, maps, classes))
            region += np.mean([(x - y) ** 2 for x, y in pairs])
        return {
            "emkd_prediction": 0.1 * 16 * np.mean(kd),
            "emkd_importance": 0.9 * importance,
            "emkd_region": 0.9 * region,
        }

    return slow


def make(student=STUDENT, teacher=TEACHER, **arguments):
    return EMKD(ref.channels(student), ref.channels(teacher), 4, **arguments)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_equals_slow_reference(preset, multilabel):
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=TEACHER
    )
    ref.check_values(
        make(preset=preset, multilabel=multilabel), case, slow_emkd(multilabel), entries=3
    )


def test_2d_equals_slow_reference():
    case = ref.make_case(spatial=(8, 6), student_taps=FLAT, teacher_taps=FLAT)
    ref.check_values(make(FLAT, FLAT), case, slow_emkd(), entries=3)


@pytest.mark.parametrize("multilabel", [False, True])
def test_contract(multilabel):
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=TEACHER
    )

    def build(**more):
        return make(multilabel=multilabel, **more)

    ref.check_teacher_constant(build(), case)
    ref.check_range(build(), case)
    ref.check_batch_invariance(build(), case)
    weights = {f"{name}_weight": (0.9, f"emkd_{name}") for name in ("importance", "region")}
    ref.check_doubling(build, case, {"prediction_weight": (0.1, "emkd_prediction"), **weights})
    twin = ref.same_as_teacher(
        ref.make_case(multilabel=multilabel, student_taps=TEACHER, teacher_taps=TEACHER)
    )
    terms = ref.evaluate(make(TEACHER, multilabel=multilabel), twin)
    assert all(abs(term.item()) < 1e-6 for term in terms.values())


def test_one_class_alone_has_no_relations_but_a_graph():
    case = ref.make_case(student_taps=STUDENT, teacher_taps=TEACHER)
    term = ref.evaluate(make(), case._replace(label=torch.zeros_like(case.label)))["emkd_region"]
    assert term.item() == 0.0 and term.requires_grad


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2, 3), (1,), ()])
def test_absent_classes_get_no_weight_where_they_cannot_be_left_out(
    multilabel, present, monkeypatch
):
    """The form for GPUs, which must not be asked which classes there are."""
    if not (present or multilabel):
        present = (3,)
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=TEACHER
    )
    if multilabel:
        label = case.label * torch.tensor([k in present for k in range(4)]).view(1, 4, 1, 1, 1)
    else:
        label = torch.tensor(present)[case.label.long() % len(present)]
    case = case._replace(label=label.to(case.label.dtype))
    found = []
    for host in (True, False):
        monkeypatch.setattr(emkd, "readable", lambda values, host=host: host)
        term = ref.evaluate(make(multilabel=multilabel), case)["emkd_region"]
        leaves = list(case.student.features.values())
        found.append([term, *torch.autograd.grad(term, leaves)])
    assert (found[0][0] > 0) == (len(present) > 1)
    torch.testing.assert_close(found[1], found[0])


def test_importance_is_blind_to_scale():
    feature = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(importance_map(feature * 1e8), importance_map(feature))


def test_bad_arguments():
    with pytest.raises(ValueError, match="stage3 of the student"):
        EMKD({"stage1": 2}, {"stage1": 2, "stage3": 2}, 4)
    with pytest.raises(ValueError, match="stage1 of the teacher"):
        EMKD({"stage1": 2, "stage3": 2}, {"stage3": 2}, 4)
    with pytest.raises(ValueError, match="taps"):
        make(taps=[])
    with pytest.raises(ValueError, match="tau"):
        make(tau=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
