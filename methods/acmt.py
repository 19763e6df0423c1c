"""AC-MT: a mean teacher whose consistency counts at ambiguous voxels alone.

Paper: Xu et al., "Ambiguity-selective consistency regularization for mean-teacher semi-supervised
medical image segmentation", Medical Image Analysis 2023; the authors' code. The teacher, a moving
average of the student, sees the unlabelled image with noise clamp(0.1 N(0, 1), -0.2, 0.2); both are
in training mode:

    L = 1/2 [CE + D](P_l, y) + w(t) sum A (p_student - p_teacher)^2 / (sum A + 1e-16)
    w(t) = consistency exp(-5 (1 - min(t / ramp_length, 1))^2)
    D the mean Dice loss of all classes

A, over voxels (and all classes), is by `strategy`, with t in [0, 1] and
ramp(t) = exp(-5 (1 - t)^2):

    entropy     entropy of the student / log C >= 0.75 + 0.20 ramp(t): the least certain voxels
    mc_dropout  entropy of the mean of 8 noisy dropout passes >= (0.75 + 0.15 ramp(t)) log C
    prototype   the student's class is not that of the nearer prototype; prototypes are means of the
                teacher's last but one decoder map over the voxels of which 10 dropout passes are
                certain, weighted by confidence; adds the student's entropy at the other voxels.
                Background and foreground, for two classes only
    confident   confident learning (Northcutt et al., 2021; prune by class and by noise rate, both)
                finds the voxels at which the student's class is an error by the teacher's
                probabilities; all voxels where it cannot

In 'clean' the dropout passes leave running statistics alone.

Presets: 'as_released' averages parameters only, the statistics of batch norm following all passes
of a network; counts the ramp of w(t) in units of 150 steps, 40 of them; and differs in two
strategies. mc_dropout: the passes are the student's, and A is counted once for all classes.
prototype: the passes are without noise; certainty is asked of each logit on its own, and voxels
that are not certainly foreground are background; the classes and their probabilities are those of
one more pass without noise, the teacher's first; each sample has prototypes of its own (0 for a
class without voxels); maps are enlarged without aligned corners. 'clean' averages the statistics
too, counts in fractions of the training, makes all passes with the teacher and counts A once for
each class. The entropy term has one form, a mean over the other voxels in nats.
"""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.consistency import SUP_LOSSES, sigmoid_rampup, supervised_loss
from losses.kd import (
    check_choice,
    check_fractions,
    check_not_negative,
    check_positive,
    check_weights,
)
from losses.taps import readable
from methods.base import Method, pseudo_label_report
from methods.mlrpl import entropy_map
from utils.modes import ema_decay, ema_update, statistics_kept

STRATEGIES = ("entropy", "mc_dropout", "prototype", "confident")
MC_PASSES = {"mc_dropout": 8, "prototype": 10}
MIN_MEMBERS = 5  # confident learning leaves smaller classes alone


class ACMT(Method):
    """The terms `sup`, `consistency` and, with the strategy 'prototype', `entropy`.

    ema_decay: of the teacher, after a warm-up of 1 - 1 / (step + 1). noise: standard deviation,
    clamped at twice it.
    consistency, ramp_length: largest w(t) and the fraction of the training at which it is reached.
    entropy_weight: of the entropy term relative to the consistency term.
    sup_loss: on the labelled images, 'own' or CRKD's 'ce_dice', with the Dice of the foreground
    instead of D.
    """

    strong_views = 0
    incomplete = True

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        strategy: str = "entropy",
        ema_decay: float = 0.99,
        noise: float = 0.1,
        consistency: float = 0.1,
        ramp_length: float = 0.75,
        entropy_weight: float = 1.0,
        sup_loss: str = "own",
    ) -> None:
        super().__init__(make_network, max_steps)
        check_choice("acmt", "strategy", strategy, STRATEGIES)
        check_choice("acmt", "sup_loss", sup_loss, SUP_LOSSES)
        check_fractions("acmt", ema_decay=ema_decay)
        check_not_negative("acmt", ramp_length=ramp_length)  # above 1: longer than the training
        check_positive("acmt", noise=noise)
        check_weights("acmt", consistency=consistency, entropy_weight=entropy_weight)
        if strategy == "prototype" and self.num_classes != 2:
            raise ValueError(
                f"acmt: strategy 'prototype' is for two classes, these data have {self.num_classes}"
            )
        if strategy == "prototype" and "stage6" not in self.network.feature_channels:
            raise ValueError(
                "acmt: strategy 'prototype' needs a network with the features 'stage6', such as "
                "vnet"
            )
        self.strategy, self.decay, self.noise, self.consistency = (
            strategy,
            ema_decay,
            noise,
            consistency,
        )
        self.ramp_length, self.entropy_weight = ramp_length, entropy_weight
        self.sup_loss = sup_loss
        self.released = preset == "as_released"
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image_l, label_l, weak = (
            labelled["image"],
            labelled["label"][:, 0].long(),
            unlabelled["weak"],
        )
        logits = self.network(torch.cat([image_l, weak]))
        logits_l, logits_u = logits[: len(image_l)], logits[len(image_l) :]
        student = logits_u.float().softmax(1)
        with torch.no_grad(), self._statistics(self.teacher):
            plain = None
            if self.released and self.strategy == "prototype":
                # The released code makes this pass first, and running statistics follow the order.
                plain = self.teacher(weak).float().softmax(1)
            teacher = self.teacher(self._noisy(weak)).float().softmax(1)
            ambiguous = self._ambiguous(
                student.detach(), teacher, weak, step / self.max_steps, plain
            )

        squared = (student - teacher).square()
        counted = 1 if self.released and self.strategy == "mc_dropout" else self.num_classes
        consistency = (squared * ambiguous[:, None]).sum() / (counted * ambiguous.sum() + 1e-16)
        weight = self.weight_at(step)
        own = {"background": True, "average": True, "annotated": labelled.get("annotated")}
        sup = supervised_loss(logits_l, label_l, self.sup_loss, **own)
        terms = {"sup": sup, "consistency": weight * consistency}
        if self.strategy == "prototype":
            sure = ~ambiguous
            entropy = entropy_map(student).where(sure, 0.0).sum() / sure.sum().clamp(min=1)
            terms["entropy"] = weight * self.entropy_weight * entropy
        pred = teacher.argmax(1)
        self.monitor = pseudo_label_report(pred, ~ambiguous, unlabelled["label"], self.num_classes)
        self.pictures = {
            "weak, truth": (weak[0], unlabelled["label"][0, 0]),
            "teacher": (weak[0], pred[0]),
            "student": (weak[0], student[0].detach().argmax(0)),
            "ambiguous": (weak[0], ambiguous[0].long()),
        }
        return terms

    def after_step(self, step: int) -> None:
        ema_update(
            self.teacher, self.network, ema_decay(step, self.decay), buffers=not self.released
        )

    def weight_at(self, step: int) -> float:
        if self.released:
            return self.consistency * sigmoid_rampup(step // 150, 40)
        return self.consistency * sigmoid_rampup(step / self.max_steps, self.ramp_length)

    def _noisy(self, image: Tensor) -> Tensor:
        return image + (self.noise * torch.randn_like(image)).clamp(-2 * self.noise, 2 * self.noise)

    def _statistics(self, network: nn.Module) -> contextlib.AbstractContextManager:
        """Keeps the running statistics inside the block; the released code lets them move."""
        return contextlib.nullcontext() if self.released else statistics_kept(network)

    def _passes(self, network: nn.Module, image: Tensor, count: int, noisy: bool = True):
        """Outputs of `count` passes with dropout, of the image with noise or without."""
        with self._statistics(network):
            for _ in range(count):
                yield network(self._noisy(image) if noisy else image, return_features=True)

    def _ambiguous(
        self,
        student: Tensor,
        teacher: Tensor,
        weak: Tensor,
        progress: float,
        plain: Tensor | None = None,
    ) -> Tensor:
        """A as a mask (B, *spatial), bool.

        student, teacher: probabilities (B, C, *spatial), the teacher's with noise; plain: those of
        the teacher without noise, which the released prototypes need.
        """
        ramp, nats = sigmoid_rampup(progress, 1.0), math.log(self.num_classes)
        if self.strategy == "entropy":
            return entropy_map(student) / nats >= 0.75 + 0.20 * ramp
        if self.strategy == "mc_dropout":
            network = self.network if self.released else self.teacher
            outputs = self._passes(network, weak, MC_PASSES["mc_dropout"])
            mean = sum(out.logits.float().softmax(1) for out in outputs) / MC_PASSES["mc_dropout"]
            return entropy_map(mean) >= (0.75 + 0.15 * ramp) * nats
        if self.strategy == "confident":
            return label_errors(teacher, student.argmax(1))
        count = MC_PASSES["prototype"]
        outputs = list(self._passes(self.teacher, weak, count, noisy=not self.released))
        # The released code takes the spread of sigmoid(logit / 2), which is less than that of the
        # softmax.
        spread = torch.stack([(out.logits.float() / 2).sigmoid() for out in outputs]).std(0)
        feature = sum(out.features["stage6"].float() for out in outputs) / count
        if self.released:
            return far_from_own_prototype(feature, plain, spread < 0.1, student.argmax(1))
        probs = torch.stack([out.logits.float().softmax(1) for out in outputs]).mean(0)
        return far_from_prototype(feature, probs, spread.amax(1) < 0.1, student.argmax(1))


def far_from_prototype(feature: Tensor, probs: Tensor, certain: Tensor, pred: Tensor) -> Tensor:
    """Where the nearer of the two class prototypes is not that of `pred`; bool (B, *spatial).

    feature (B, c, *grid) is brought to full size; a prototype is the mean feature of the certain
    voxels whose largest of `probs` (B, 2, *spatial) is that class, weighted by it, over the batch.
    Distances are Euclidean. Nothing is far where a class has no certain voxel.
    """
    feature = _enlarged(feature, pred, align_corners=True)
    weights = probs * (certain[:, None] & _of_class(probs.argmax(1)))
    axes = [0, *range(2, feature.ndim)]
    known = weights.sum(axes).gt(0).all()
    return (_nearer_prototype(feature, weights, axes, 0.0) != pred) & known


def far_from_own_prototype(feature: Tensor, probs: Tensor, certain: Tensor, pred: Tensor) -> Tensor:
    """The released form of `far_from_prototype`; bool (B, *spatial).

    certain: of each class, (B, 2, *spatial). Where the probability of a class is not certain it
    counts as 0; a voxel is foreground where that leaves more of the foreground, and background
    elsewhere. A prototype is the mean over a sample, weighted by the probability of its class, with
    1e-5 added to the sum of the weights, so that of a class without voxels is 0.
    """
    feature = _enlarged(feature, pred, align_corners=False)
    kept = probs.where(certain, 0.0)
    weights = probs * _of_class((kept[:, 1] > kept[:, 0]).long())
    axes = list(range(2, feature.ndim))
    return _nearer_prototype(feature, weights, axes, 1e-5) != pred


def _enlarged(feature: Tensor, pred: Tensor, align_corners: bool) -> Tensor:
    mode = "bilinear" if feature.ndim == 4 else "trilinear"
    size = tuple(pred.shape[1:])
    return F.interpolate(feature, size=size, mode=mode, align_corners=align_corners)


def _of_class(label: Tensor) -> Tensor:
    """(B, *spatial) of ids 0 and 1 -> (B, 2, *spatial) bool."""
    return torch.stack([label == 0, label == 1], 1)


def _nearer_prototype(feature: Tensor, weights: Tensor, axes: list[int], eps: float) -> Tensor:
    """Which of two prototypes is nearer, 0 or 1, (B, *spatial); 0 where they are equally near.

    A prototype is the mean of `feature` (B, c, *spatial) over `axes`, weighted by its channel of
    `weights` (B, 2, *spatial); eps is added to the sum of the weights.
    """
    distances = []
    for k in range(2):
        weight = weights[:, k : k + 1]
        total = weight.sum(axes, keepdim=True) + eps
        prototype = (feature * weight).sum(axes, keepdim=True) / total
        distances.append((feature - prototype).square().sum(1))
    return (distances[1] < distances[0]).long()


def label_errors(probs: Tensor, given: Tensor) -> Tensor:
    """Confident learning: where the given labels (B, *spatial) are errors by `probs` (B, C,
    *spatial); bool.

    Counts each voxel of given class i whose probability of class j is at least the mean
    self-confidence of class j as evidence that j is true (the largest such j), scales that table to
    the class sizes, and marks the voxels that both rules choose: by class, the least self-confident
    of each given class; by noise rate, for each pair (i, j) those with the largest margin p_j -
    p_i. What the probabilities agree with is no error, and a given class of five voxels or fewer is
    left alone. All is marked if a class is absent from `given`: consistency then counts everywhere.
    """
    num_classes = probs.shape[1]
    p, labels = probs.movedim(1, -1).reshape(-1, num_classes), given.flatten()
    if not readable(labels):
        return _label_errors_fixed(p, labels).view_as(given)
    sizes = torch.bincount(labels, minlength=num_classes)
    if (sizes == 0).any():
        return torch.ones_like(given, dtype=torch.bool)
    own = p.gather(1, labels[:, None])[:, 0]
    thresholds = torch.stack([own[labels == k].mean() for k in range(num_classes)])
    passing = p >= thresholds - 1e-6  # a class whose voxels are all alike passes its own mean
    believed = p.masked_fill(~passing, -1.0).argmax(1)
    counted = passing.any(1)
    joint = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=p.device)
    joint.index_put_(
        (labels[counted], believed[counted]),
        torch.ones((), dtype=torch.float64, device=p.device),
        True,
    )
    joint.diagonal().clamp_(min=1)
    joint = joint / joint.sum(1, keepdim=True) * sizes[:, None]

    by_class, by_rate = (torch.zeros_like(labels, dtype=torch.bool) for _ in range(2))
    for i in range(num_classes):
        members = (labels == i).nonzero()[:, 0]
        if len(members) <= MIN_MEMBERS:
            continue
        wrong = int((joint[i].sum() - joint[i, i]).round())
        by_class[members[own[members].argsort()[:wrong]]] = True
        for j in range(num_classes):
            if j != i:
                margin = p[members, j] - p[members, i]
                by_rate[members[margin.argsort(descending=True)[: int(joint[i, j].round())]]] = True
    return (by_class & by_rate & (p.argmax(1) != labels)).view_as(given)


def _label_errors_fixed(p: Tensor, labels: Tensor) -> Tensor:
    """`label_errors` of rows p (V, C) and labels (V,), bool (V,), with shapes that depend on V and
    C alone.

    For GPUs, which would have to be waited for to learn how many voxels are of a class, or are
    wrong. On a CPU it takes longer, because it sorts all voxels for each class.
    """
    num_classes = p.shape[1]
    ids = torch.arange(num_classes, device=p.device)
    member = labels[:, None] == ids
    sizes = member.sum(0)
    own = p.gather(1, labels[:, None])[:, 0]
    thresholds = own[:, None].where(member, 0.0).sum(0) / sizes.clamp(min=1)
    passing = p >= thresholds - 1e-6
    believed = p.masked_fill(~passing, -1.0).argmax(1)
    joint = torch.zeros(num_classes**2, dtype=torch.float64, device=p.device)
    joint = joint.index_add_(0, labels * num_classes + believed, passing.any(1).double()).view(
        num_classes, -1
    )
    joint.diagonal().clamp_(min=1)
    joint = joint / joint.sum(1, keepdim=True) * sizes[:, None]

    last = sizes.cumsum(0)

    def rank(key: Tensor) -> Tensor:
        """Place of each voxel among those of its label by ascending `key`, from 0."""
        order = key.argsort()
        order = order[labels[order].argsort(stable=True)]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return place - (last - sizes)[labels]

    by_class = rank(own) < (joint.sum(1) - joint.diagonal()).round()[labels]
    by_rate = torch.zeros_like(by_class)
    for j in range(num_classes):
        by_rate |= (labels != j) & (rank(own - p[:, j]) < joint[:, j].round()[labels])
    errors = by_class & by_rate & (sizes > MIN_MEMBERS)[labels] & (p.argmax(1) != labels)
    return errors | (sizes == 0).any()
