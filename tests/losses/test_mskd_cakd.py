import numpy as np
import pytest
import torch

from losses.mskd_cakd import MSKDCAKD, class_affinity_distance, tempered_logits
from tests.losses import reference as ref

STUDENT = {"decoder": (3, (4, 2, 2))}
TEACHER = {"decoder": (5, (8, 4, 2))}
FLAT = {"decoder": (3, (8, 6))}


def slow_mskd(multilabel=False, min_norm=0.1):
    def length(feature, grid):
        lengths = np.zeros((len(feature), 1, *feature.shape[2:]))
        for b, v, column in ref.columns(feature):
            lengths.reshape(len(feature), -1)[b, v] = max(np.sqrt(np.sum(column**2)), min_norm)
        return ref.nearest(lengths, grid).reshape(len(feature), -1)

    def affinity(logits, b):
        squash = ref.sigmoid if multilabel else ref.softmax
        # (V, C)
        probs = np.array(
            [squash(column) for sample, _, column in ref.columns(logits) if sample == b]
        )
        classes = probs.shape[1]
        return [[sum(probs[:, i] * probs[:, j]) for i in range(classes)] for j in range(classes)]

    def slow(student, teacher, label):
        grid, losses, cosines = student.logits.shape[2:], [], []
        ours, theirs = (
            length(student.features["decoder"], grid),
            length(teacher.features["decoder"], grid),
        )
        for (b, v, s), (_, _, t) in zip(ref.columns(student.logits), ref.columns(teacher.logits)):
            if multilabel:
                p, q = ref.sigmoid(s / ours[b, v]), ref.sigmoid(t / theirs[b, v])
                losses.append(-np.mean(q * np.log(p) + (1 - q) * np.log(1 - p)))
            else:
                p, q = ref.softmax(s / ours[b, v]), ref.softmax(t / theirs[b, v])
                losses.append(-np.sum(q * np.log(p)))
        for b in range(len(student.logits)):
            for a, c in zip(affinity(student.logits, b), affinity(teacher.logits, b)):
                cosines.append(np.dot(a, c) / np.linalg.norm(a) / np.linalg.norm(c))
        return {"mskd_affinity": 1 - np.mean(cosines), "mskd_norm": np.mean(losses)}

    return slow


def make(student=STUDENT, teacher=TEACHER, **arguments):
    return MSKDCAKD(ref.channels(student), ref.channels(teacher), 4, **arguments)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_equals_slow_reference(preset, multilabel):
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=TEACHER
    )
    ref.check_values(
        make(preset=preset, multilabel=multilabel), case, slow_mskd(multilabel), entries=3
    )


def test_2d_and_another_shortest_length_equal_slow_reference():
    case = ref.make_case(spatial=(8, 6), student_taps=FLAT, teacher_taps=FLAT)
    ref.check_values(make(FLAT, FLAT, min_norm=1.5), case, slow_mskd(min_norm=1.5), entries=3)


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
    ref.check_doubling(
        build, case, {f"{name}_weight": (1.0, f"mskd_{name}") for name in ("affinity", "norm")}
    )


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_student_like_its_teacher_has_no_affinity_loss_and_a_stationary_norm_loss(multilabel):
    case = ref.make_case(
        multilabel=multilabel, student_taps=FLAT, teacher_taps=FLAT, spatial=(8, 6)
    )
    twin = ref.same_as_teacher(case)
    terms = ref.evaluate(make(FLAT, FLAT, multilabel=multilabel), twin)
    assert abs(terms["mskd_affinity"].item()) < 1e-6
    gradient = torch.autograd.grad(terms["mskd_norm"], twin.student.logits)[0]
    assert gradient.abs().max() < 1e-7


def test_the_logarithm_of_a_softmax_is_its_own_log_softmax():
    """Why the released form of the norm term needs no preset."""
    logits = 5 * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    once = logits.log_softmax(1)
    torch.testing.assert_close(once.log_softmax(1), once)


def test_affinity_of_two_hard_maps_by_hand():
    """Four voxels, two classes: P P^T / V is diag(3, 1) / 4, with one voxel moved diag(2, 2) / 4:
    equal columns.
    """
    probs = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    moved = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]])
    assert class_affinity_distance(probs, moved).item() == pytest.approx(0.0, abs=1e-6)
    even = torch.full((1, 2, 4), 0.5)  # every column is (1, 1) / 4: 45 degrees from both
    assert class_affinity_distance(probs, even).item() == pytest.approx(1 - 0.5**0.5, abs=1e-6)


def test_voxels_without_a_feature_keep_bounded_logits():
    logits = torch.full((1, 2, 2, 2), 3.0)
    assert tempered_logits(logits, torch.zeros(1, 4, 2, 2)).max() == pytest.approx(30.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="decoder of the student"):
        MSKDCAKD({"stage1": 2}, {"decoder": 2}, 4)
    with pytest.raises(ValueError, match="decoder of the teacher"):
        MSKDCAKD({"decoder": 2}, {"stage1": 2}, 4)
    with pytest.raises(ValueError, match="min_norm"):
        make(min_norm=0)
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
