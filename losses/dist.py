"""DIST: correlation, not equality, with the teacher: between the classes of a voxel and between the voxels of a class.

Paper: Huang et al., "Knowledge Distillation from a Stronger Teacher", NeurIPS 2022, eq. 7-10. With P and Q the (M, K)
matrices of the student's and teacher's softmax at tau over all M = B V voxels of the batch, and rho Pearson's r:

    L = tau^2 [ inter_weight (1 - mean_rows rho) + intra_weight (1 - mean_columns rho) ],    tau 4, weights 1

Overlapping regions (multi-label; neither paper nor reference has a form): the columns are the regions' sigmoids at tau.
A row holds [p, 1 - p] of every region: its mean is 1/2 whatever the student says, so rho is the cosine between the
vectors p - 1/2 (within one region alone it would be a sign, without gradient: data of one region get that from the
columns only).

Deviation: the reference ignores its loss weight; here it counts (the value in use is 1). 'as_released' equals 'clean'
on multi-class data and is refused on multi-label data.
"""

import torch
from torch import Tensor, nn

from losses.kd import PRESETS, check_choice, check_positive, check_weights, unit_vectors
from losses.voxelwise import voxel_sums


def pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson's r of float32 x and y along `dim`, 0 where one is constant; shape without `dim`."""
    x = unit_vectors(x - x.mean(dim, keepdim=True), dim)
    y = unit_vectors(y - y.mean(dim, keepdim=True), dim)
    return (x * y).sum(dim)


def pearson_of_sums(sums: Tensor, count: int, eps: float = 1e-6) -> Tensor:
    """Pearson's r from (5, K) sums of x, y, x^2, y^2 and x y over `count` voxels, 0 where one is constant; (K,).

    Exact for any shift of x and y, but float32 needs them to be shifted by nearly their means.
    """
    sum_x, sum_y, sum_xx, sum_yy, sum_xy = sums
    norm_xx, norm_yy = sum_xx - sum_x.square() / count, sum_yy - sum_y.square() / count
    constant = (norm_xx < eps**2) | (norm_yy < eps**2)
    norms = norm_xx.masked_fill(constant, 1.0).sqrt() * norm_yy.masked_fill(constant, 1.0).sqrt()
    return ((sum_xy - sum_x * sum_y / count) / norms).masked_fill(constant, 0.0)


def relations(
    student_logits: Tensor, teacher_logits: Tensor, tau: float, multilabel: bool = False
) -> tuple[Tensor, Tensor]:
    """tau^2 (1 - mean r) over rows (inter-class) and over columns (intra-class); unweighted scalars float32.

    logits: (B, K, *spatial). Gradient to the student only.
    """

    def probabilities(logits: Tensor) -> Tensor:
        scaled = logits.float() / tau
        return scaled.sigmoid() if multilabel else scaled.softmax(1)

    def column_sums(logits: Tensor) -> Tensor:
        return probabilities(logits).flatten(2).sum((0, 2))

    count = student_logits.numel() // student_logits.shape[1]
    with torch.no_grad():
        means = [voxel_sums(column_sums, logits) / count for logits in (student_logits, teacher_logits)]

    def totals(student: Tensor, teacher: Tensor) -> Tensor:
        x, y = probabilities(student).flatten(2), probabilities(teacher).flatten(2)
        rows = [torch.cat([p, 1 - p], dim=1) for p in (x, y)] if multilabel else [x, y]
        inter = pearson(*rows, dim=1).sum()
        x, y = x - means[0][:, None], y - means[1][:, None]
        moments = [product.sum((0, 2)) for product in (x, y, x * x, y * y, x * y)]
        return torch.cat([inter[None], *moments])

    sums = voxel_sums(totals, student_logits, teacher_logits)
    inter, intra = sums[0] / count, pearson_of_sums(sums[1:].view(5, -1), count).mean()
    return tau**2 * (1 - inter), tau**2 * (1 - intra)


class DIST(nn.Module):
    """The terms `dist_inter` and `dist_intra`; `weight` scales both."""

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        tau: float = 4.0,
    ) -> None:
        super().__init__()
        check_choice("dist", "preset", preset, PRESETS)
        check_positive("dist", tau=tau)
        check_weights("dist", weight=weight, inter_weight=inter_weight, intra_weight=intra_weight)
        if multilabel and preset == "as_released":
            raise ValueError("dist: the reference has no multi-label form to be 'as_released'; use preset 'clean'")
        self.student_taps = self.teacher_taps = ()
        self.multilabel, self.tau = multilabel, tau
        self.inter_weight, self.intra_weight = weight * inter_weight, weight * intra_weight

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        inter, intra = relations(student.logits, teacher.logits, self.tau, self.multilabel)
        return {"dist_inter": self.inter_weight * inter, "dist_intra": self.intra_weight * intra}
