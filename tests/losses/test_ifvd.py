import numpy as np
import pytest
import torch

from losses.ifvd import IFVD, centre_similarity
from tests.losses import reference as ref

TAP = "decoder"
STUDENT, TEACHER = {TAP: (3, (4, 4, 2))}, {TAP: (5, (4, 4, 2))}
LARGE = {TAP: (5, (8, 8, 4))}
FLAT = {TAP: (3, (4, 6))}, {TAP: (2, (8, 3))}


def cosine_to_centre(feature, classes, count):
    """(C, V) features and V classes -> V cosines, 0 for the classes from `count` on."""
    centres = {}
    for k in set(classes):
        members = [feature[:, v] for v in range(len(classes)) if classes[v] == k]
        centres[k] = sum(members) / (len(members) + 1e-6)
    result = []
    for v, k in enumerate(classes):
        x, y = feature[:, v], centres[k]
        result.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y) if k < count else 0.0)
    return np.array(result)


def slow_ifvd(mode="kl", count=4, multilabel=False, voxel=False):
    def slow(student, teacher, label):
        kd, k = 0.0, student.logits.shape[1]
        pairs = list(zip(ref.columns(student.logits), ref.columns(teacher.logits)))
        for (_, _, s), (_, _, t) in pairs:
            mse = sum((ref.sigmoid(s) - ref.sigmoid(t)) ** 2)
            kd += ref.kl(ref.softmax(t), ref.softmax(s)) if mode == "kl" else mse
        kd /= len(pairs) * (1 if voxel else k)

        grid = student.features[TAP].shape[2:]
        theirs = ref.nearest(teacher.features[TAP], grid)
        ours, maps = student.features[TAP], ref.nearest(label.astype(int), grid)
        errors = []
        for b in range(len(ours)):
            for channel in maps[b]:  # one map of ids, or one of 0 and 1 for each region
                arguments = list(channel.ravel()), 2 if multilabel else count
                a = cosine_to_centre(ours[b].reshape(ours.shape[1], -1), *arguments)
                c = cosine_to_centre(theirs[b].reshape(theirs.shape[1], -1), *arguments)
                errors.append((a - c) ** 2)
        return {"ifvd_kd": 10 * kd, "ifvd": 200 * np.mean(errors)}

    return slow


def make(student=STUDENT, teacher=TEACHER, **arguments):
    return IFVD(ref.channels(student), ref.channels(teacher), 4, **arguments)


SETTINGS = [
    ({}, {}),
    ({"reduction": "voxel"}, {"voxel": True}),
    ({"preset": "as_released"}, {"mode": "mse"}),
    ({"num_label_classes": 3}, {"count": 3}),
    ({"multilabel": True}, {"mode": "mse", "multilabel": True}),
]


@pytest.mark.parametrize("arguments, meaning", SETTINGS)
@pytest.mark.parametrize("teacher", [TEACHER, LARGE])
def test_equals_slow_reference(arguments, meaning, teacher):
    multilabel = arguments.get("multilabel", False)
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=teacher
    )
    ref.check_values(make(teacher=teacher, **arguments), case, slow_ifvd(**meaning), entries=3)


def test_2d_equals_slow_reference():
    student, teacher = FLAT
    case = ref.make_case(spatial=(8, 6), student_taps=student, teacher_taps=teacher)
    ref.check_values(make(student, teacher), case, slow_ifvd())


@pytest.mark.parametrize("arguments, meaning", SETTINGS)
def test_contract(arguments, meaning):
    multilabel = arguments.get("multilabel", False)
    case = ref.make_case(
        spatial=(8, 4, 2), multilabel=multilabel, student_taps=STUDENT, teacher_taps=LARGE
    )

    def build(**more):
        return make(teacher=LARGE, **arguments, **more)

    ref.check_teacher_constant(build(), case)
    ref.check_range(build(), case)
    ref.check_batch_invariance(build(), case)
    plain = ref.evaluate(build(), case)
    doubled = ref.evaluate(build(weight=400.0, kd_weight=30.0), case)
    torch.testing.assert_close(doubled["ifvd"], 2 * plain["ifvd"])
    torch.testing.assert_close(doubled["ifvd_kd"], 3 * plain["ifvd_kd"])
    twin = ref.same_as_teacher(
        ref.make_case(multilabel=multilabel, student_taps=TEACHER, teacher_taps=TEACHER)
    )
    assert all(
        abs(term.item()) < 1e-6 for term in ref.evaluate(make(TEACHER, **arguments), twin).values()
    )


def test_hand_values_of_the_cosine():
    # Class 0: (1, 0) and (0, 1), centre (1/2, 1/2), so both have 1/sqrt(2). Class 1 alone: 1. Class
    # 5: left out.
    feature = torch.tensor([[[1.0, 0.0, 3.0, 2.0], [0.0, 1.0, 4.0, 2.0]]])
    cosine = centre_similarity(feature, torch.tensor([[0, 0, 1, 5]]), 2)
    np.testing.assert_allclose(cosine[0].numpy(), [0.5**0.5, 0.5**0.5, 1.0, 0.0], rtol=1e-5)


def test_gradient_flows_through_the_centres():
    feature = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cosine = centre_similarity(feature, torch.zeros(1, 4, dtype=torch.long), 1)
    (gradient,) = torch.autograd.grad(cosine[0, 0], feature)
    assert gradient[0, :, 1].abs().max() > 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="decoder of the student"):
        IFVD({"penultimate": 2}, {TAP: 2}, 4)
    with pytest.raises(ValueError, match="decoder of the teacher"):
        IFVD({TAP: 2}, {}, 4)
    for count in (0, 5):
        with pytest.raises(ValueError, match="num_label_classes"):
            make(num_label_classes=count)
    with pytest.raises(ValueError, match="num_label_classes"):
        make(multilabel=True, num_label_classes=2)
    with pytest.raises(ValueError, match="no gradient"):
        make(multilabel=True, preset="as_released")
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
    with pytest.raises(ValueError, match="reduction"):
        make(reduction="sum")
