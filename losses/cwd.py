"""CWD: each channel of the logits as a distribution over the voxels, and the student imitates it.

Paper: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, eq. 4:

    L = weight * tau^2 / (B K)
        * sum_{b,k} KL( softmax_v(z_T / tau) || softmax_v(z_S / tau) ),    tau 4, weight 1

Overlapping regions (multi-label): a channel is one region, so the spatial softmax stays meaningful;
it is the default, with weight 0.1, as in the reference. `mode='bernoulli'` compares each voxel's
[p, 1 - p] instead, tau^2 times the mean over all elements. (The reference's unused sigmoid branch
is not a divergence, it can be negative; it is not offered.)

Both presets are the same.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from losses.kd import PRESETS, bernoulli_kl, check_choice, check_positive, check_weights


def channel_wise_kl(student_logits: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """tau^2 KL between distributions over voxels, mean over B and K; logits (B, K, *spatial),
    scalar float32.

    Gradient to the student only.
    """
    log_p = F.log_softmax(student_logits.float().flatten(0, 1).flatten(1) / tau, dim=1)
    log_q = F.log_softmax(teacher_logits.detach().float().flatten(0, 1).flatten(1) / tau, dim=1)
    return tau**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class CWD(nn.Module):
    """The term `cwd`. weight: None means 1 for multi-class and 0.1 for multi-label data."""

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        weight: float | None = None,
        tau: float = 4.0,
        mode: str = "spatial",
    ) -> None:
        super().__init__()
        check_choice("cwd", "preset", preset, PRESETS)
        check_choice("cwd", "mode", mode, ("spatial", "bernoulli") if multilabel else ("spatial",))
        check_positive("cwd", tau=tau)
        check_weights("cwd", weight=weight)
        self.student_taps = self.teacher_taps = ()
        self.weight = weight if weight is not None else (0.1 if multilabel else 1.0)
        self.divergence = channel_wise_kl if mode == "spatial" else bernoulli_kl
        self.tau = tau

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        return {"cwd": self.weight * self.divergence(student.logits, teacher.logits, self.tau)}
