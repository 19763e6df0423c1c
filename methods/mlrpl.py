"""MLRPL: two decoders learn from each other's pseudo-labels where the other is surer and agrees
with its prototypes.

Paper: "Mutual learning with reliable pseudo label for semi-supervised medical image segmentation",
Medical Image Analysis 2024; the authors' code. For student i and teacher j, over labelled and
unlabelled voxels alike, entropies H and the teacher's class prototypes (mean feature of the voxels
that it gives to a class, in each sample, unit length):

    m_ij = [H_i > H_j],     r_j = mean_k [1 - (cos(f_j, prototype_k) - p_jk)^2]
    L_ij = sum CE(P_i, argmax p_j) r_j m_ij / (sum m_ij + 1e-6)
    L = 1/2 sum_i Dice(P_i, y) + w(t) sum_{i != j} L_ij
    w(t) = weight exp(-5 (1 - min(t / ramp_length, 1))^2)

Dice is of the foreground, without squares: 1 - (2 sum p y + 1e-8) / (sum p + sum y + 1e-8). The
factor r m has no gradient.

Presets. 'as_released' counts the ramp in units of 150 steps, 40 of them, whatever the training's
length; 'clean' in fractions of the training (0.4, which is the same for the released 15,000 steps).
Network: `vnet_dual`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.consistency import cross_entropy_map, sigmoid_rampup
from losses.incomplete import labelled_part
from losses.kd import check_not_negative, check_weights, class_masks, unit_vectors
from methods.base import Method, pseudo_label_report, require_method


def entropy_map(probs: Tensor) -> Tensor:
    """-sum p log(p + 1e-6) in nats; (B, C, *spatial) -> (B, *spatial)."""
    return -(probs * (probs + 1e-6).log()).sum(1)


def prototype_reliability(feature: Tensor, probs: Tensor) -> Tensor:
    """mean_k [1 - (cos(f, prototype_k) - p_k)^2]: (B, c, *spatial) and (B, C, *spatial) -> (B,
    voxels) float32.

    A class that no voxel of a sample is given to has the zero vector for a prototype, hence
    similarity 0.
    """
    feature, probs = feature.float().flatten(2), probs.float().flatten(2)
    members = torch.zeros_like(probs).scatter_(1, probs.argmax(1, keepdim=True), 1.0)
    prototypes = feature @ members.transpose(1, 2) / (members.sum(2)[:, None] + 1e-6)  # (B, c, C)
    similarity = unit_vectors(prototypes, 1).transpose(1, 2) @ unit_vectors(feature, 1)
    return 1.0 - (similarity - probs).square().mean(1)


def mutual_loss(student_logits: Tensor, teacher_logits: Tensor, teacher_feature: Tensor) -> Tensor:
    """L_ij above; logits (B, C, *spatial), feature (B, c, *spatial); scalar, gradient to the
    student only.
    """
    with torch.no_grad():
        student, teacher = student_logits.float().softmax(1), teacher_logits.float().softmax(1)
        surer = (entropy_map(student) > entropy_map(teacher)).float()
        weight = surer * prototype_reliability(teacher_feature, teacher).view_as(surer)
    loss = cross_entropy_map(student_logits, teacher_logits.argmax(1))
    return (loss * weight).sum() / (surer.sum() + 1e-6)


def linear_dice(logits: Tensor, label: Tensor, annotated: Tensor | None = None) -> Tensor:
    """Sum over the foreground classes of 1 - (2 sum p y + 1e-8) / (sum p + sum y + 1e-8); sums over
    the batch too. annotated: of labels (B, 1, *spatial) that are not complete
    (losses/incomplete.py).
    """
    known = None
    if annotated is not None:
        logits, label, known = labelled_part(logits, label, annotated)
    probs = logits.float().softmax(1)[:, 1:]
    target = class_masks(label, logits.shape[1])[:, 1:].float()
    if known is not None:
        probs, target = probs.where(known, 0.0), target.where(known, 0.0)
    axes = [0, *range(2, logits.ndim)]
    overlap, total = (probs * target).sum(axes), probs.sum(axes) + target.sum(axes)
    return (1.0 - (2.0 * overlap + 1e-8) / (total + 1e-8)).sum()


class MLRPL(Method):
    """The terms `sup` and `mutual`. weight: largest w(t); ramp_length: fraction of the training at
    which it is reached.
    """

    strong_views = 0
    incomplete = True
    dimensions = (3,)

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        weight: float = 1.0,
        ramp_length: float = 0.4,
    ) -> None:
        super().__init__(make_network, max_steps)
        require_method("mlrpl", self.network, "both", "vnet_dual")
        check_weights("mlrpl", weight=weight)
        check_not_negative("mlrpl", ramp_length=ramp_length)
        self.weight, self.ramp_length, self.preset = weight, ramp_length, preset

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image_l, label_l = labelled["image"], labelled["label"]
        count = len(image_l)
        (first, first_feature), (second, second_feature) = self.network.both(
            torch.cat([image_l, unlabelled["weak"]])
        )
        annotated = labelled.get("annotated")
        of_both = [linear_dice(logits[:count], label_l, annotated) for logits in (first, second)]
        sup = 0.5 * sum(of_both)
        mutual = mutual_loss(first, second, second_feature) + mutual_loss(
            second, first, first_feature
        )
        pred, other = (logits[count:].detach().argmax(1) for logits in (first, second))
        self.monitor = pseudo_label_report(
            pred, pred == other, unlabelled["label"], self.num_classes
        )
        self.pictures = {
            "weak, truth": (unlabelled["weak"][0], unlabelled["label"][0, 0]),
            "first decoder": (unlabelled["weak"][0], pred[0]),
            "second decoder": (unlabelled["weak"][0], other[0]),
        }
        return {"sup": sup, "mutual": self.weight_at(step) * mutual}

    def weight_at(self, step: int) -> float:
        if self.preset == "as_released":
            return self.weight * sigmoid_rampup(step // 150, 40)
        return self.weight * sigmoid_rampup(step / self.max_steps, self.ramp_length)
