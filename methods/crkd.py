"""CRKD: cross reliable knowledge distillation between an image-perturbed and a feature-perturbed
view.

The released code has the losses (losses/crkd.py) and the configurations, not the training; the flow
below is that of the method's figure. For labelled images x_l with labels y_l, and weak and strong
views x_w, x_s of unlabelled images:

    1. pseudo-label and confidence of x_w, without gradient:  y_u, c_u;   V = [c_u >= threshold]
    2. symmetric CutMix: pairs of unlabelled images exchange one box in x_w, x_s, y_u and c_u alike
    3. P_l, F_l = net(x_l)
    4. P_s, F_s = net(x_s mixed)                          image-perturbed view
    5. P_fp, F_fp = net(x_w mixed), encoder channels dropped   feature-perturbed view
    6. M = [CE(P_s, y_u) < CE(P_fp, y_u)]: which view teaches the other

    L = L_sup + w_p(t) pseudo_weight L_pseudo
        + w(t) (lec LEC + csd CSD + ckd_pixel CPKD + ckd_feature CFKD)
    L_sup = 0.5 (CE + Dice);   L_pseudo = mean of S(P_s) and S(P_fp) against y_u where V
    w(t) = consistency ramp(t / ramp_length);   w_p(t) = ramp((t - warmup) / pseudo_ramp)
    ramp(x) = exp(-5 (1 - min(x, 1))^2),   t in [0, 1]

What the figure leaves open is an argument below, with its alternatives; scripts/ablation_crkd.sh
compares them.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.consistency import (
    ce_dice_loss,
    cross_entropy_loss,
    cross_entropy_map,
    dice_loss,
    sigmoid_rampup,
)
from losses.crkd import (
    ProjectionHead,
    class_semantic_distillation,
    comparison_mask,
    cross_distillation,
    low_entropy_consistency,
    pseudo_label,
    symmetric_cutmix,
)
from losses.incomplete import certain_label
from losses.kd import check_choice, check_positive, check_weights, takes_options
from methods.base import Method, pseudo_label_report, require_method
from utils.modes import ema_decay, ema_update, evaluating, statistics_kept

CHOICES = {
    "pseudo_loss": ("ce_dice", "ce", "dice", "none"),
    "pseudo_mode": ("eval", "train", "joint"),
    "statistics": ("all", "clean"),
    "lec_distance": ("kl", "l1"),
    "feature_space": ("raw", "projected"),
    "fp_input": ("mixed", "weak"),
    "ema_for": ("labels", "evaluation", "both"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Decisions that the figure leaves open. Settings of a configuration like the others.

    pseudo_loss: of the pseudo-labels: cross-entropy and Dice by halves, one of them, or none.
    dice_background, dice_average: count the background, average the classes instead of summing them
    (UniMatch's Dice has both); dice_absent: count classes that the pseudo-labels of the batch lack,
    which pushes them to nothing.
    pseudo_mode: pass that makes them: 'train' mode by itself; 'joint', a part of the labelled pass;
    'eval' mode, whose running statistics lag behind the weights.
    statistics: whether the running statistics of batch norm follow 'all' passes or only those of
    'clean' images (labelled, and weak ones in the modes 'train' and 'joint'). The perturbed views
    have other statistics, and the network is used on clean images.
    lec_beta, lec_distance, csd_tau, csd_use_tp, csd_threshold, temperature, feature_tau,
    detach_better: see losses/crkd.py; None follows the preset. lec_masked: LEC where V holds only.
    csd_pool: average-pool the features by this factor first.
    feature_space: CFKD on the 'raw' features or on their 'projected' ones (memory: 256 channels per
    voxel).
    fp_input: the feature-perturbed view sees the 'mixed' weak image, or the 'weak' one, whose
    content then differs from the other view's (and, in the pasted boxes, from the pseudo-labels,
    which are mixed either way).
    ema_for: what the moving average serves, pseudo-'labels', 'evaluation' or 'both'.
    """

    pseudo_loss: str = "ce_dice"
    dice_background: bool = False
    dice_average: bool = False
    dice_absent: bool = True
    pseudo_mode: str = "train"
    statistics: str = "clean"
    lec_beta: float = 1.0
    lec_distance: str = "kl"
    lec_masked: bool = False
    csd_tau: float | None = None
    csd_use_tp: bool | None = None
    csd_threshold: float | None = None
    csd_pool: int = 1
    projection_channels: int = 256
    temperature: float = 1.0
    feature_tau: float | None = None
    detach_better: bool | None = None
    feature_space: str = "raw"
    fp_input: str = "mixed"
    ema_for: str = "labels"


@takes_options(Options)
class CRKD(Method):
    """The terms `sup`, `pseudo_s`, `pseudo_fp`, `lec`, `csd`, `ckd_pixel`, `ckd_feature`; a term of
    weight 0 is not computed.

    threshold: lowest confidence of a pseudo-label that counts.
    pseudo_weight, pseudo_ramp: weight of the pseudo-label loss, and the fraction of the training
    over which it rises. warmup: fraction of the training on labels only.
    consistency, ramp_length: largest w(t), and the fraction of the training at which it is reached.
    lec, csd, ckd_pixel, ckd_feature: relative weights. csd_samples: anchors, and rows of each view.
    cutmix_prob: of a pair; perturb: probability of dropping an encoder channel.
    ema_decay: of a moving average of the weights, 0 for none. options: see `Options`.
    """

    incomplete = True

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        threshold: float = 0.8,
        pseudo_weight: float = 0.5,
        pseudo_ramp: float = 0.2,
        warmup: float = 0.0,
        consistency: float = 0.1,
        ramp_length: float = 2 / 3,
        lec: float = 1.0,
        csd: float = 1.0,
        csd_samples: int = 256,
        ckd_pixel: float = 1.0,
        ckd_feature: float = 1.0,
        cutmix_prob: float = 0.5,
        perturb: float = 0.5,
        ema_decay: float = 0.0,
        **options,
    ) -> None:
        super().__init__(make_network, max_steps)
        self.options = option = Options(**options)
        require_method("crkd", self.network, "perturb", "unet2d" if self.dims == 2 else "vnet")
        for name, allowed in CHOICES.items():
            check_choice("crkd", name, getattr(option, name), allowed)
        positive = ("csd_pool", "temperature", "projection_channels", "csd_tau", "feature_tau")
        given = {name: getattr(option, name) for name in positive}
        check_positive("crkd", **{name: v for name, v in given.items() if v is not None})
        self.weights = {"lec": lec, "csd": csd, "ckd_pixel": ckd_pixel, "ckd_feature": ckd_feature}
        check_weights(
            "crkd",
            pseudo_weight=pseudo_weight,
            consistency=consistency,
            lec_beta=option.lec_beta,
            **self.weights,
        )
        if csd_samples < self.num_classes:
            raise ValueError(
                f"crkd: csd_samples must be at least 1 for each of the {self.num_classes} classes, "
                f"got {csd_samples}"
            )
        fractions = {
            "threshold": threshold,
            "pseudo_ramp": pseudo_ramp,
            "warmup": warmup,
            "ramp_length": ramp_length,
            "cutmix_prob": cutmix_prob,
            "perturb": perturb,
            "ema_decay": ema_decay,
        }
        for name, value in fractions.items():
            if not 0 <= value <= 1 or (value == 1 and name in ("perturb", "ema_decay", "warmup")):
                raise ValueError(
                    f"crkd: {name} must lie in [0, 1], below 1 if it leaves nothing, got {value}"
                )
        if ema_decay and option.pseudo_mode == "joint" and option.ema_for != "evaluation":
            raise ValueError(
                "crkd: pseudo_mode 'joint' labels with the trained network; an average needs "
                "another mode"
            )
        self.threshold, self.pseudo_weight = threshold, pseudo_weight
        self.pseudo_ramp, self.warmup = pseudo_ramp, warmup
        self.consistency, self.ramp_length = consistency, ramp_length
        self.cutmix_prob, self.perturb, self.ema_decay = cutmix_prob, perturb, ema_decay
        released = preset == "as_released"
        self.dice = {
            "background": option.dice_background,
            "average": option.dice_average,
            "absent": option.dice_absent,
        }
        self.csd = {
            "samples": csd_samples,
            "tau": (1.0 if released else 0.1) if option.csd_tau is None else option.csd_tau,
            "threshold": option.csd_threshold,
            "use_tp": not released if option.csd_use_tp is None else option.csd_use_tp,
            "preset": preset,
        }
        self.ckd = {
            "temperature": option.temperature,
            "feature_tau": option.feature_tau,
            "detach_better": option.detach_better,
            "preset": preset,
        }
        self.head = ProjectionHead(
            self.network.feature_channels["decoder"], option.projection_channels, dims=self.dims
        )
        # A copy, not a second draw: at first the average is the network.
        self.average = copy.deepcopy(self.network).requires_grad_(False) if ema_decay else None

    @property
    def evaluated(self) -> nn.Module:
        return self.average if self.ema_decay and self.options.ema_for != "labels" else self.network

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        progress = step / self.max_steps
        image_l, label_l = labelled["image"], labelled["label"][:, 0].long()
        annotated = labelled.get("annotated")  # of labels that are not complete
        if progress < self.warmup:
            self.monitor, self.pictures = {}, {}
            return {"sup": ce_dice_loss(self.network(image_l), label_l, annotated=annotated)}
        weak, strong = unlabelled["weak"], unlabelled["strong0"]

        # 1, 3: labelled pass and pseudo-labels
        if self.options.pseudo_mode == "joint":
            both = self.network(torch.cat([image_l, weak]), return_features=True)
            logits_l, feature_l = (
                both.logits[: len(image_l)],
                both.features["decoder"][: len(image_l)],
            )
            pred_u, conf_u = pseudo_label(both.logits[len(image_l) :])
        else:
            pred_u, conf_u = self._pseudo_labels(weak)
            labelled_out = self.network(image_l, return_features=True)
            logits_l, feature_l = labelled_out.logits, labelled_out.features["decoder"]
        with torch.no_grad():
            report = pseudo_label_report(
                pred_u, conf_u >= self.threshold, unlabelled["label"], self.num_classes
            )

        # 2, 4, 5: the two views of the mixed images
        mixed_weak, mixed_strong, pred_u, conf_u = symmetric_cutmix(
            weak, strong, pred_u, conf_u, self.cutmix_prob
        )
        with (
            statistics_kept(self.network)
            if self.options.statistics == "clean"
            else contextlib.nullcontext()
        ):
            out_s = self.network(mixed_strong, return_features=True)
            seen = mixed_weak if self.options.fp_input == "mixed" else weak
            out_fp = self.network(seen, return_features=True, perturb=self.perturb)
        feature_s, feature_fp = out_s.features["decoder"], out_fp.features["decoder"]
        valid = conf_u >= self.threshold

        # 6 and the losses
        terms = {"sup": ce_dice_loss(logits_l, label_l, annotated=annotated)}
        pseudo = self.pseudo_weight * sigmoid_rampup(progress - self.warmup, self.pseudo_ramp)
        if self.options.pseudo_loss != "none" and self.pseudo_weight:
            terms["pseudo_s"] = 0.5 * pseudo * self._pseudo(out_s.logits, pred_u, valid)
            terms["pseudo_fp"] = 0.5 * pseudo * self._pseudo(out_fp.logits, pred_u, valid)
        ramp = self.consistency * sigmoid_rampup(progress, self.ramp_length)
        weight = {name: ramp * value for name, value in self.weights.items() if value}
        if "lec" in weight:
            counted = valid if self.options.lec_masked else None
            terms["lec"] = weight["lec"] * low_entropy_consistency(
                out_s.logits,
                out_fp.logits,
                mask=counted,
                beta=self.options.lec_beta,
                distance=self.options.lec_distance,
            )
        if "csd" in weight:
            features = [self._pooled(feature) for feature in (feature_l, feature_s, feature_fp)]
            terms["csd"] = weight["csd"] * class_semantic_distillation(
                *features,
                _ids(logits_l, 1),
                label_l if annotated is None else certain_label(label_l, annotated),
                pred_u,
                conf_u,
                self.num_classes,
                head=self.head,
                **self.csd,
            )
        if "ckd_pixel" in weight or "ckd_feature" in weight:
            with torch.no_grad():
                ce = [cross_entropy_map(out.logits, pred_u) for out in (out_s, out_fp)]
                s_better = comparison_mask(*ce)
            if self.options.feature_space == "projected" and "ckd_feature" in weight:
                feature_s, feature_fp = self.head(feature_s), self.head(feature_fp)
            cross = cross_distillation(
                out_s.logits, out_fp.logits, feature_s, feature_fp, s_better, valid, **self.ckd
            )
            for kind in ("pixel", "feature"):
                if f"ckd_{kind}" in weight:
                    both_ways = cross[f"{kind}_s_to_fp"] + cross[f"{kind}_fp_to_s"]
                    terms[f"ckd_{kind}"] = weight[f"ckd_{kind}"] * both_ways
            report["s_better"] = (s_better & valid).sum() / valid.sum()

        self.monitor = report
        self.pictures = {
            "weak, truth": (weak[0], unlabelled["label"][0, 0]),
            "mixed weak, pseudo-label": (mixed_weak[0], pred_u[0]),
            "mixed strong, its prediction": (mixed_strong[0], _ids(out_s.logits[0], 0)),
            "feature-perturbed prediction": (seen[0], _ids(out_fp.logits[0], 0)),
        }
        return terms

    def after_step(self, step: int) -> None:
        if self.average is not None:
            ema_update(self.average, self.network, ema_decay(step, self.ema_decay))

    @torch.no_grad()
    def _pseudo_labels(self, weak: Tensor) -> tuple[Tensor, Tensor]:
        labeller = (
            self.average
            if self.ema_decay and self.options.ema_for != "evaluation"
            else self.network
        )
        if self.options.pseudo_mode == "eval":
            with evaluating(labeller):
                return pseudo_label(labeller(weak))
        # An average keeps the statistics that ema_update gives it.
        with (
            statistics_kept(labeller) if labeller is not self.network else contextlib.nullcontext()
        ):
            return pseudo_label(labeller(weak))

    def _pseudo(self, logits: Tensor, pred: Tensor, valid: Tensor) -> Tensor:
        if self.options.pseudo_loss == "ce":
            return cross_entropy_loss(logits, pred, valid)
        if self.options.pseudo_loss == "dice":
            return dice_loss(logits, pred, mask=valid, **self.dice)
        return ce_dice_loss(logits, pred, mask=valid, **self.dice)

    def _pooled(self, feature: Tensor) -> Tensor:
        if self.options.csd_pool == 1:
            return feature
        pool = nn.functional.avg_pool2d if self.dims == 2 else nn.functional.avg_pool3d
        return pool(feature, self.options.csd_pool)


def _ids(logits: Tensor, dim: int) -> Tensor:
    """Class ids; `max` because `argmax` over an axis that is not the last is many times slower on a
    CPU.
    """
    return logits.detach().max(dim).indices
