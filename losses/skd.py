"""SKD: the teacher's class probabilities per voxel, and its similarities between coarse regions of
the feature map.

Paper: Liu et al., "Structured Knowledge Distillation for Dense Prediction", TPAMI 2020 (CVPR 2019),
pixel-wise and pair-wise terms; the adversarial holistic term is left out, as in the reference.

    L_pixel = -mean_{b,v} sum_c softmax(z_T)_c log softmax(z_S)_c        weight 10
    L_pair  = mean_b mean_{i,j} ( <x_i, x_j>_T - <x_i, x_j>_S )^2        weight 1

x_i are the columns of the max-pooled `penultimate` tap (2 nodes per axis: 8 in 3D), divided by
their norm over the channels. As in the authors' code the norm is a constant for the gradient.

Overlapping regions (multi-label): the pixel term is the binary cross-entropy with the teacher's
sigmoids, mean over all elements; the pair term is unchanged.

Presets. 'clean' averages the pixel term over batch and voxels and pools each feature map to the
same number of nodes. 'as_released' divides the pixel term by the voxels of one sample, so it grows
with the batch; on multi-label data it is mean_v,c of +q p, whose sign is wrong (it pushes the
student's probabilities to 0); and both maps are pooled with the kernel of the teacher's grid, so a
student map of half that size becomes one node that is compared with all 8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.kd import PRESETS, check_choice, check_positive, check_weights
from losses.taps import require_taps


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities, mean over B and voxels; logits (B, K,
    *spatial), float32.
    """
    probs = teacher_logits.detach().float().softmax(1)
    return F.cross_entropy(student_logits.float(), probs)


def pool_nodes(feature: Tensor, nodes: int, kernel_grid: torch.Size | None = None) -> Tensor:
    """Max-pool (B, C, *spatial) to `nodes` per axis and flatten: (B, C, N) float32.

    kernel_grid: take the pooling kernel of that grid instead of the feature's own (partial windows
    kept); the number of nodes then depends on both grids.
    """
    spatial = feature.shape[2:]
    if kernel_grid is None:
        adaptive = F.adaptive_max_pool3d if len(spatial) == 3 else F.adaptive_max_pool2d
        return adaptive(feature.float(), tuple(min(nodes, size) for size in spatial)).flatten(2)
    kernel = [
        min(size, max(1, grid // nodes)) for size, grid in zip(spatial, kernel_grid, strict=True)
    ]
    pool = F.max_pool3d if len(spatial) == 3 else F.max_pool2d
    return pool(feature.float(), kernel, kernel, ceil_mode=True).flatten(2)


def node_similarity(nodes: Tensor) -> Tensor:
    """(B, C, N) float32 -> (B, N, N) inner products of the nodes over their norms, which are
    constants here.
    """
    norm = torch.linalg.vector_norm(nodes.detach(), dim=1, keepdim=True) + 1e-8
    unit = nodes / norm
    with torch.autocast(unit.device.type, enabled=False):
        return unit.transpose(1, 2) @ unit


def pair_wise(student_nodes: Tensor, teacher_nodes: Tensor) -> Tensor:
    """Sum of squared differences of the similarities over N_T^2 and B; nodes (B, C, N), scalar
    float32.

    N may differ only where one side has a single node, which is then compared with every pair of
    the other. Gradient to the student only.
    """
    student, teacher = node_similarity(student_nodes), node_similarity(teacher_nodes.detach())
    counts = {student.shape[1], teacher.shape[1]}
    if len(counts) > 1 and 1 not in counts:
        raise ValueError(
            f"skd: the pooled maps have {student.shape[1]} (student) and {teacher.shape[1]} "
            "(teacher) nodes, which "
            "cannot be compared; preset 'clean' pools both to the same number"
        )
    return (teacher - student).square().sum() / (teacher.shape[1] ** 2 * teacher.shape[0])


class SKD(nn.Module):
    """The terms `skd_pixel` and `skd_pair`. nodes: pooled nodes per axis; 2 is the reference's
    scale 0.5.
    """

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        pixel_weight: float = 10.0,
        pair_weight: float = 1.0,
        nodes: int = 2,
    ) -> None:
        super().__init__()
        check_choice("skd", "preset", preset, PRESETS)
        check_positive("skd", nodes=nodes)
        check_weights("skd", pixel_weight=pixel_weight, pair_weight=pair_weight)
        self.student_taps = self.teacher_taps = ("penultimate",)
        require_taps("skd", "student", student_channels, self.student_taps)
        require_taps("skd", "teacher", teacher_channels, self.teacher_taps)
        self.multilabel, self.legacy = multilabel, preset == "as_released"
        self.pixel_weight, self.pair_weight, self.nodes = pixel_weight, pair_weight, nodes

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        student_logits, teacher_logits = student.logits, teacher.logits.detach()
        if not self.multilabel:
            pixel = soft_cross_entropy(student_logits, teacher_logits)
        elif self.legacy:
            pixel = (student_logits.float().sigmoid() * teacher_logits.float().sigmoid()).mean()
        else:
            pixel = F.binary_cross_entropy_with_logits(
                student_logits.float(), teacher_logits.float().sigmoid()
            )
        if self.legacy:
            pixel = pixel * student_logits.shape[0]
        student_feature, teacher_feature = (
            student.features["penultimate"],
            teacher.features["penultimate"].detach(),
        )
        kernel_grid = teacher_feature.shape[2:] if self.legacy else None
        pair = pair_wise(
            pool_nodes(student_feature, self.nodes, kernel_grid),
            pool_nodes(teacher_feature, self.nodes, kernel_grid),
        )
        return {"skd_pixel": self.pixel_weight * pixel, "skd_pair": self.pair_weight * pair}
