import numpy as np
import pytest
import torch

from losses.at import AT
from tests.losses import reference as ref

STUDENT = {
    "stage1": (3, (4, 4, 2)),
    "stage2": (5, (2, 2, 1)),
    "stage4": (2, (4, 2, 2)),
    "decoder": (3, (4, 4, 2)),
}
TEACHER = {
    "stage1": (4, (8, 8, 4)),
    "stage2": (5, (2, 2, 1)),
    "stage7": (2, (4, 4, 2)),
    "decoder": (6, (4, 4, 2)),
}
FLAT = {"stage3": (3, (5, 4))}, {"stage3": (2, (10, 8))}


def slow_at(taps, weight=200.0, reduction="mean"):
    def unit_map(feature):
        energy = np.array([np.mean(vector**2) for _, _, vector in ref.columns(feature)]).reshape(
            len(feature), -1
        )
        return [row / np.sqrt(np.sum(row**2)) for row in energy]

    def slow(student, teacher, label):
        total = 0.0
        for tap in taps:
            grid = student.features[tap].shape[2:]
            ours, theirs = (
                unit_map(student.features[tap]),
                unit_map(ref.nearest(teacher.features[tap], grid)),
            )
            for a, b in zip(ours, theirs):
                total += np.sum((a - b) ** 2) / len(ours) / (a.size if reduction == "mean" else 1)
        return {"at": weight * total}

    return slow


def make(student=STUDENT, teacher=TEACHER, **arguments):
    return AT(ref.channels(student), ref.channels(teacher), 4, **arguments)


@pytest.mark.parametrize("preset", ["clean", "as_released"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_equals_slow_reference_on_the_common_stages(preset, multilabel):
    case = ref.make_case(multilabel=multilabel, student_taps=STUDENT, teacher_taps=TEACHER)
    module = make(preset=preset, multilabel=multilabel)
    assert module.student_taps == module.teacher_taps == ("stage1", "stage2")
    ref.check_values(module, case, slow_at(["stage1", "stage2"]))


def test_one_stage_sum_and_2d():
    case = ref.make_case(student_taps=STUDENT, teacher_taps=TEACHER)
    module = make(taps=["decoder"], weight=3.0, reduction="sum")
    ref.check_values(module, case, slow_at(["decoder"], 3.0, "sum"))
    student, teacher = FLAT
    case = ref.make_case(spatial=(5, 4), student_taps=student, teacher_taps=teacher)
    ref.check_values(make(student, teacher), case, slow_at(["stage3"]))


def test_contract():
    case = ref.make_case(student_taps=STUDENT, teacher_taps=TEACHER)
    ref.check_teacher_constant(make(), case)
    ref.check_range(make(), case)
    ref.check_batch_invariance(make(), case)
    ref.check_doubling(make, case, {"weight": (200.0, "at")})


def test_zero_at_the_teacher_and_blind_to_scale():
    case = ref.make_case(student_taps=TEACHER, teacher_taps=TEACHER)
    module = make(TEACHER, TEACHER)
    assert module.student_taps == ("stage1", "stage2", "stage7")
    assert ref.evaluate(module, ref.same_as_teacher(case))["at"].item() == 0.0
    scaled = case._replace(student=ref.apply(case, lambda x: 3.0 * x).student)
    torch.testing.assert_close(ref.evaluate(module, scaled)["at"], ref.evaluate(module, case)["at"])


def test_hand_value():
    # Energies (1, 0) and (0, 1): squared distance 2 over 2 voxels.
    student, teacher = torch.tensor([[[[1.0], [0.0]]]]), torch.tensor([[[[0.0], [5.0]]]])
    module = AT({"stage1": 1}, {"stage1": 1}, 2, weight=7.0)
    case = ref.Case(
        ref.Output(None, {"stage1": student}), ref.Output(None, {"stage1": teacher}), None
    )
    assert ref.evaluate(module, case)["at"].item() == pytest.approx(7.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="no taps to compare"):
        AT({"stage1": 2}, {"stage2": 2}, 4)
    with pytest.raises(ValueError, match="stage7 of the student"):
        make(taps=["stage7"])
    with pytest.raises(ValueError, match="stage4 of the teacher"):
        make(taps=["stage4"])
    with pytest.raises(ValueError, match="reduction"):
        make(reduction="voxel")
    with pytest.raises(ValueError, match="preset"):
        make(preset="other")
