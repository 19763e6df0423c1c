"""AT: the student's spatial attention maps imitate the teacher's, stage by stage.

Paper: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, eq. 2
(activation-based, p = 2):

    L = sum over stages of weight * mean_{b,v} ( Q(F_S) - Q(F_T) )^2,
        Q(F) = a / |a|_2,  a = mean_c F^2,  weight 200

The teacher map is brought to the student's grid by nearest neighbour. Labels are not used, so
multi-label data need nothing special. Both presets are the same.

Deviations. The paper sums over the voxels of a normalised map; the reference averages, so a stage
of 96^3 voxels counts 8 times less than one of 48^3. `reduction='mean'` keeps that, 'sum' is the
paper's form: there, use a weight that is smaller by the number of voxels (200 / 48^3 = 0.0018). The
reference's one-stage variant is `taps=['decoder']` with weight 25000.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from losses.kd import PRESETS, check_choice, check_weights
from losses.taps import attention_distance, require_taps, resize_nearest

STAGES = tuple(f"stage{i}" for i in range(1, 8))


def attention_transfer(
    student_feature: Tensor, teacher_feature: Tensor, reduction: str = "mean"
) -> Tensor:
    """Attention distance on the student's grid, unweighted scalar float32; gradient to the student
    only.

    student_feature (B, C, *grid), teacher_feature (B, C', *grid'). reduction: 'mean' or 'sum' over
    voxels.
    """
    teacher_feature = resize_nearest(teacher_feature.detach(), student_feature.shape[2:])
    return attention_distance(student_feature, teacher_feature, reduction)


class AT(nn.Module):
    """The term `at`, the sum over `taps`: by default every stage1 .. stage7 that both networks
    have.
    """

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float = 200.0,
        taps: Iterable[str] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_choice("at", "preset", preset, PRESETS)
        check_choice("at", "reduction", reduction, ("mean", "sum"))
        check_weights("at", weight=weight)
        if taps is None:
            taps = [tap for tap in STAGES if tap in student_channels and tap in teacher_channels]
        self.student_taps = self.teacher_taps = tuple(taps)
        if not self.student_taps:
            raise ValueError(
                "at: no taps to compare; the student offers "
                f"{', '.join(sorted(student_channels)) or 'none'}, the "
                f"teacher {', '.join(sorted(teacher_channels)) or 'none'}; both need one of stage1 "
                ".. stage7, or "
                "name a common tap in `taps`"
            )
        require_taps("at", "student", student_channels, self.student_taps)
        require_taps("at", "teacher", teacher_channels, self.teacher_taps)
        self.weight, self.reduction = weight, reduction

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        distances = [
            attention_transfer(student.features[tap], teacher.features[tap], self.reduction)
            for tap in self.student_taps
        ]
        return {"at": self.weight * sum(distances)}
