import math

import numpy as np
import pytest
import torch

from losses.skd import SKD, pool_nodes
from tests.losses import reference as ref

TAP = "penultimate"
STUDENT, TEACHER = {TAP: (3, (4, 4, 2))}, {TAP: (5, (4, 4, 2))}
LARGE = {TAP: (5, (8, 8, 4))}  # twice the student's grid
FLAT = {TAP: (3, (4, 6))}, {TAP: (2, (8, 4))}


def slow_pool(feature, kernel):
    """Max over windows of `kernel`, partial ones at the end included: (B, C, nodes)."""
    starts = [range(0, size, k) for size, k in zip(feature.shape[2:], kernel)]
    nodes = []
    for corner in np.array(np.meshgrid(*starts, indexing="ij")).reshape(len(kernel), -1).T:
        window = feature[(..., *(slice(c, c + k) for c, k in zip(corner, kernel)))]
        nodes.append(window.reshape(*feature.shape[:2], -1).max(2))
    return np.stack(nodes, axis=2)


def slow_skd(frozen, legacy=False, multilabel=False):
    """`frozen`: the unchanged student, whose norms are the constants of the pair term."""

    def similarity(feature, constant, kernel):
        nodes, norms = (
            slow_pool(feature, kernel),
            np.linalg.norm(slow_pool(constant, kernel), axis=1),
        )
        n = nodes.shape[2]
        return [
            np.array(
                [
                    [sample[:, i] @ sample[:, j] / norm[i] / norm[j] for j in range(n)]
                    for i in range(n)
                ]
            )
            for sample, norm in zip(nodes, norms)
        ]

    def slow(student, teacher, label):
        batch, k = student.logits.shape[:2]
        voxels = student.logits[0, 0].size
        pixel = 0.0
        for (_, _, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            if not multilabel:
                pixel -= np.sum(ref.softmax(t) * np.log(ref.softmax(s)))
            elif legacy:
                pixel += np.sum(ref.sigmoid(t) * ref.sigmoid(s)) / k
            else:
                p, q = ref.sigmoid(s), ref.sigmoid(t)
                pixel -= np.sum(q * np.log(p) + (1 - q) * np.log(1 - p)) / k
        pixel /= voxels * (1 if legacy else batch)

        teacher_kernel = [size // 2 for size in teacher.features[TAP].shape[2:]]
        kernel = (
            teacher_kernel if legacy else [size // 2 for size in student.features[TAP].shape[2:]]
        )
        ours = similarity(student.features[TAP], frozen.features[TAP], kernel)
        theirs = similarity(teacher.features[TAP], teacher.features[TAP], teacher_kernel)
        pair = sum(np.sum((a - b) ** 2) / len(b) ** 2 for a, b in zip(ours, theirs)) / batch
        return {"skd_pixel": 10 * pixel, "skd_pair": pair}

    return slow


def make(student=STUDENT, teacher=TEACHER, **arguments):
    return SKD(ref.channels(student), ref.channels(teacher), 4, **arguments)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("teacher", [TEACHER, LARGE])
def test_equals_slow_reference(preset, multilabel, teacher):
    case = ref.make_case(multilabel=multilabel, student_taps=STUDENT, teacher_taps=teacher)
    slow = slow_skd(ref.as_arrays(case.student), preset == "as_released", multilabel)
    ref.check_values(make(teacher=teacher, preset=preset, multilabel=multilabel), case, slow)


def test_2d_equals_slow_reference():
    student, teacher = FLAT
    case = ref.make_case(spatial=(5, 4), student_taps=student, teacher_taps=teacher)
    ref.check_values(make(student, teacher), case, slow_skd(ref.as_arrays(case.student)))


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_contract(preset, multilabel):
    case = ref.make_case(multilabel=multilabel, student_taps=STUDENT, teacher_taps=LARGE)

    def build(**more):
        return make(teacher=LARGE, preset=preset, multilabel=multilabel, **more)

    ref.check_teacher_constant(build(), case)
    ref.check_range(build(), case)
    ref.check_doubling(
        build, case, {"pixel_weight": (10.0, "skd_pixel"), "pair_weight": (1.0, "skd_pair")}
    )
    if preset == "clean":
        ref.check_batch_invariance(build(), case)


def test_released_pixel_term_grows_with_the_batch():
    case = ref.make_case(student_taps=STUDENT, teacher_taps=TEACHER)
    clean, released = (
        ref.evaluate(make(preset=preset), case) for preset in ("clean", "as_released")
    )
    torch.testing.assert_close(released["skd_pixel"], 2 * clean["skd_pixel"])
    torch.testing.assert_close(released["skd_pair"], clean["skd_pair"])


def test_released_multilabel_term_pushes_probabilities_down():
    case = ref.make_case(multilabel=True, student_taps=STUDENT, teacher_taps=TEACHER)
    for preset, sign in (("as_released", 1.0), ("clean", -1.0)):
        certain = case._replace(teacher=ref.apply(case, lambda x: torch.full_like(x, 9.0)).teacher)
        pixel = ref.evaluate(make(preset=preset, multilabel=True), certain)["skd_pixel"]
        (gradient,) = torch.autograd.grad(pixel, case.student.logits)
        assert (sign * gradient > 0).all()


def test_known_value_where_student_equals_teacher():
    case = ref.same_as_teacher(ref.make_case(student_taps=TEACHER, teacher_taps=TEACHER))
    terms = ref.evaluate(make(TEACHER), case)
    assert terms["skd_pair"].item() == 0.0
    flat = ref.apply(case, torch.zeros_like)
    assert ref.evaluate(make(TEACHER), flat)["skd_pixel"].item() == pytest.approx(
        10 * math.log(4), rel=1e-6
    )


def test_odd_grids_have_the_same_number_of_nodes():
    sizes = {
        pool_nodes(torch.randn(1, 2, *grid), 2).shape[2]
        for grid in [(5, 7, 9), (6, 6, 6), (3, 2, 10)]
    }
    assert sizes == {8}
    assert pool_nodes(torch.randn(1, 2, 1, 5), 2).shape[2] == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="penultimate of the student"):
        SKD({"decoder": 2}, {TAP: 2}, 4)
    with pytest.raises(ValueError, match="penultimate of the teacher"):
        SKD({TAP: 2}, {}, 4)
    with pytest.raises(ValueError, match="nodes"):
        make(nodes=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
    case = ref.make_case(student_taps=LARGE, teacher_taps=STUDENT)
    with pytest.raises(ValueError, match="cannot be compared"):
        ref.evaluate(make(LARGE, STUDENT, preset="as_released"), case)
