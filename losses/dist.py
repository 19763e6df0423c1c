"""DIST: correlation, not equality, with the teacher: between the classes of a voxel and between the
voxels of a class.

Paper: Huang et al., "Knowledge Distillation from a Stronger Teacher", NeurIPS 2022, eq. 7-10. With
P and Q the (M, K) matrices of the student's and teacher's softmax at tau over all M = B V voxels of
the batch, and rho Pearson's r:

    L = tau^2 [ inter_weight (1 - mean_rows rho)
                + intra_weight (1 - mean_columns rho) ],    tau 4, weights 1

Overlapping regions (multi-label; neither paper nor reference has a form): the columns are the
regions' sigmoids at tau. A row holds [p, 1 - p] of every region: its mean is 1/2 whatever the
student says, so rho is the cosine between the vectors p - 1/2 (within one region alone it would be
a sign, without gradient: data of one region get that from the columns only).

Deviation: the reference ignores its loss weight; here it counts (the value in use is 1).
'as_released' equals 'clean' on multi-class data and is refused on multi-label data.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from losses.kd import PRESETS, check_choice, check_positive, check_weights
from losses.voxelwise import voxel_chunks

# a row or column whose deviations have a smaller norm is constant: correlation 0, no gradient
EPS = 1e-6


def relations(
    student_logits: Tensor, teacher_logits: Tensor, tau: float, multilabel: bool = False
) -> tuple[Tensor, Tensor]:
    """tau^2 (1 - mean r) over rows (inter-class) and over columns (intra-class); unweighted scalars
    float32.

    logits: (B, K, *spatial). Gradient to the student only, first derivative only.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        return _Relations.apply(student_logits, teacher_logits.detach(), tau, multilabel)


def _probabilities(logits: Tensor, tau: float, multilabel: bool) -> Tensor:
    scaled = logits.float() / tau
    return scaled.sigmoid() if multilabel else scaled.softmax(0)


def _rows(probs: Tensor, multilabel: bool) -> tuple[Tensor, Tensor]:
    """Deviations (K, n) of probabilities from the mean of their row over its norm, and 1 / norm
    (n,); 0 if constant.

    The mean is 1 / K, as they sum to 1. A row [p, 1 - p] has the mean 1/2, and its second half adds
    nothing new.
    """
    deviations = probs - (0.5 if multilabel else 1 / len(probs))
    # vector_norm takes ten times as long along a first axis, on a CPU
    norm = deviations.square().sum(0).sqrt()
    inverse = torch.where(norm < EPS, 0.0, 1.0 / norm.clamp_min(EPS))
    return deviations.mul_(inverse), inverse


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, (K, n) and (K, n) -> (K,), without a map of products."""
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


class _Relations(torch.autograd.Function):
    """Both relations in one pass and their gradients in another; on the CPU chunk by chunk
    (losses/voxelwise.py).

    Autograd would keep, or make again, some twenty maps of the size of the logits.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, tau, multilabel):
        channels = student_logits.shape[1]
        count = student_logits.numel() // channels
        inter = student_logits.new_zeros((), dtype=torch.float64)
        means = student_logits.new_zeros((2, channels), dtype=torch.float64)
        # about the means: xx, yy, xy
        moments = student_logits.new_zeros((3, channels), dtype=torch.float64)
        seen = 0
        for sample, voxels in voxel_chunks(student_logits):
            x, y = (
                _probabilities(logits[sample].flatten(1)[:, voxels], tau, multilabel)
                for logits in (student_logits, teacher_logits)
            )
            inter += (_rows(x, multilabel)[0] * _rows(y, multilabel)[0]).sum()
            # Moments about the chunk's own means lose no digits; Chan's rule adds them to those so
            # far.
            n, own = x.shape[1], torch.stack([x.mean(1), y.mean(1)])
            x -= own[0][:, None]
            y -= own[1][:, None]
            step = own.double() - means
            moments += torch.stack([_dot(x, x), _dot(y, y), _dot(x, y)]).double()
            moments += torch.stack([step[0] ** 2, step[1] ** 2, step[0] * step[1]]) * (
                seen * n / (seen + n)
            )
            means += step * (n / (seen + n))
            seen += n
        xx, yy, xy = moments
        constant = (xx < EPS**2) | (yy < EPS**2)
        norm = (xx * yy).sqrt().masked_fill(constant, 1.0)
        r = (xy / norm).masked_fill(constant, 0.0)
        # d r / d x = (y - mean) * along + (x - mean) * across
        along = (1 / norm).masked_fill(constant, 0.0)
        across = (-r / xx.masked_fill(constant, 1.0)).masked_fill(constant, 0.0)
        ctx.save_for_backward(
            student_logits, teacher_logits, means.float(), torch.stack([along, across]).float()
        )
        ctx.tau, ctx.multilabel, ctx.count = tau, multilabel, count
        return (tau**2 * (1 - inter / count)).float(), (tau**2 * (1 - r.mean())).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_inter, grad_intra):
        student_logits, teacher_logits, means, slopes = ctx.saved_tensors
        tau, multilabel, channels = ctx.tau, ctx.multilabel, student_logits.shape[1]
        # Factors of d r: the loss has -tau^2 / number of rows or columns, the softmax 1 / tau.
        row_factor = grad_inter * (-tau / ctx.count)
        along, across = (slopes * (grad_intra * (-tau / channels)))[..., None]
        offset = along * means[1][:, None] + across * means[0][:, None]
        gradient = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        for sample, voxels in voxel_chunks(student_logits):
            x, y = (
                _probabilities(logits[sample].flatten(1)[:, voxels], tau, multilabel)
                for logits in (student_logits, teacher_logits)
            )
            slope = (along * y).addcmul_(across, x).sub_(offset)
            u, inverse = _rows(x, multilabel)
            v, _ = _rows(y, multilabel)
            r = (u * v).sum(0)
            slope.addcmul_(v.sub_(u.mul_(r)), inverse * row_factor)
            if multilabel:
                part = slope.mul_(x).mul_(1 - x)
            else:
                slope.mul_(x)
                part = slope.sub_(x.mul_(slope.sum(0)))
            gradient[sample].flatten(1)[:, voxels] = part
        return gradient, None, None, None


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
            raise ValueError(
                "dist: the reference has no multi-label form to be 'as_released'; use preset "
                "'clean'"
            )
        self.student_taps = self.teacher_taps = ()
        self.multilabel, self.tau = multilabel, tau
        self.inter_weight, self.intra_weight = weight * inter_weight, weight * intra_weight

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        inter, intra = relations(student.logits, teacher.logits, self.tau, self.multilabel)
        return {"dist_inter": self.inter_weight * inter, "dist_intra": self.intra_weight * intra}
