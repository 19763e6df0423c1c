"""CrossMatch: image views and decoders under weak and strong channel dropout teach one another.

Source: the released code of CrossMatch (ACDC, LA). A plain pass and one beside the labelled images
label the images that will be pasted; then labelled and weak images are seen together, and both
strong views. All passes but the plain one decode a batch (A, B) four ways: A and B plain, and B
with its encoder channels dropped weakly (p = 0.25) and strongly (p = 0.75). With a Dice loss D on
trusted voxels, T_w the pseudo-label of the weak image's plain prediction, T_1 and T_2 the same with
the boxes that CutMix pasted into the strong views, and T_2^wk, T_2^st those of the weak image's
perturbed predictions, boxed like T_2:

    L_kd = (1 - eta)/4 [D(P_w^wk, T_w) + D(P_w^st, T_w) + D(P_s2^wk, T_2) + D(P_s2^st, T_2)]
           + eta/2 [D(P_s2^wk, T_2^wk) + D(P_s2^st, T_2^st)],        eta = 0.3
    L = 1/2 { 1/2 (CE + D)(P_l, y) + 1/4 D(P_s1, T_1) + 1/4 D(P_s2, T_2) + kd_weight L_kd }

2D (ACDC): D averages all classes, eps 1e-4; kd_weight 1/2; threshold 0.95. 3D (LA): D of the
foreground, eps 1e-5; kd_weight 1; threshold 0.75; no dropout before the classifier in the four-way
passes.

Presets: 'as_released' multiplies the threshold of 3D by a rising ramp and ln 2, (0.75 + 0.25 ramp)
ln 2, an entropy threshold put on a confidence, which lets nearly everything pass for two classes;
'clean' keeps 0.75.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.consistency import SUP_LOSSES, dice_loss, sigmoid_rampup, supervised_loss
from losses.crkd import draw_boxes, pseudo_label
from losses.kd import check_choice, check_fractions, check_weights
from losses.taps import moved
from methods.base import Method, pseudo_label_report, require_method
from utils.modes import evaluating

RAMP_LENGTH = 17000  # steps of the released left-atrium schedule
Target = tuple[Tensor, Tensor]  # ids and confidence, both (B, *spatial)


def crossmatch_terms(
    logits: dict[str, Tensor],
    label_l: Tensor,
    targets: dict[str, Target],
    threshold: float,
    dice: dict,
    eta: float,
    kd_weight: float,
    sup_loss: str = "own",
    annotated: Tensor | None = None,
) -> dict[str, Tensor]:
    """Weighted terms. logits: l, s1, s2, w_weak, w_strong, s2_weak, s2_strong; targets: w, s1, s2,
    s2_weak, s2_strong. sup_loss, annotated: as in `supervised_loss`.
    """

    def delta(name: str, target: str) -> Tensor:
        pred, conf = targets[target]
        return dice_loss(logits[name], pred, mask=conf >= threshold, **dice)

    views = (
        delta("w_weak", "w")
        + delta("w_strong", "w")
        + delta("s2_weak", "s2")
        + delta("s2_strong", "s2")
    )
    decoders = delta("s2_weak", "s2_weak") + delta("s2_strong", "s2_strong")
    return {
        "sup": supervised_loss(logits["l"], label_l, sup_loss, 0.5, annotated, **dice),
        "strong1": 0.125 * delta("s1", "s1"),
        "strong2": 0.125 * delta("s2", "s2"),
        "kd_views": 0.5 * kd_weight * (1 - eta) / 4 * views,
        "kd_decoders": 0.5 * kd_weight * eta / 2 * decoders,
    }


class CrossMatch(Method):
    """The terms `sup`, `strong1`, `strong2`, `kd_views`, `kd_decoders`.

    threshold, kd_weight: None takes those of the paper for 2D or 3D. perturb_weak, perturb_strong:
    probabilities of dropping an encoder channel. cutmix_prob: of a box in a strong view.
    pseudo_mode: mode of the network in the passes that label the pasted images, 'train' (since the
    authors' correction; dropout is a part of the method) or 'eval'.
    sup_loss: on the labelled images, 'own' or CRKD's 'ce_dice', 1/2 (CE + Dice of the foreground)
    instead of 1/4 (CE + D).
    """

    strong_views = 2
    mixes = True
    incomplete = True

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        threshold: float | None = None,
        eta: float = 0.3,
        kd_weight: float | None = None,
        perturb_weak: float = 0.25,
        perturb_strong: float = 0.75,
        cutmix_prob: float = 0.5,
        pseudo_mode: str = "train",
        sup_loss: str = "own",
    ) -> None:
        super().__init__(make_network, max_steps)
        require_method("crossmatch", self.network, "drop", "unet2d" if self.dims == 2 else "vnet")
        flat = self.dims == 2
        threshold = (0.95 if flat else 0.75) if threshold is None else threshold
        check_fractions(
            "crossmatch",
            threshold=threshold,
            eta=eta,
            perturb_weak=perturb_weak,
            perturb_strong=perturb_strong,
            cutmix_prob=cutmix_prob,
        )
        check_weights("crossmatch", kd_weight=kd_weight)
        check_choice("crossmatch", "pseudo_mode", pseudo_mode, ("train", "eval"))
        check_choice("crossmatch", "sup_loss", sup_loss, SUP_LOSSES)
        self.sup_loss = sup_loss
        self.threshold, self.eta = threshold, eta
        self.kd_weight = (0.5 if flat else 1.0) if kd_weight is None else kd_weight
        self.perturb_weak, self.perturb_strong, self.cutmix_prob = (
            perturb_weak,
            perturb_strong,
            cutmix_prob,
        )
        self.pseudo_mode = pseudo_mode
        self.entropy_threshold = preset == "as_released" and not flat
        self.dice = {"background": True, "average": True, "eps": 1e-4} if flat else {}
        last = "last_dropout" in inspect.signature(self.network.decode).parameters
        self.decoding = {"last_dropout": False} if last else {}

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image_l, label_l, weak = (
            labelled["image"],
            labelled["label"][:, 0].long(),
            unlabelled["weak"],
        )
        with torch.no_grad():
            if self.pseudo_mode == "eval":
                with evaluating(self.network):
                    mix = self._mix_targets(image_l, unlabelled["mix_weak"])
            else:
                mix = self._mix_targets(image_l, unlabelled["mix_weak"])
        boxes = [
            moved(draw_boxes(len(weak), weak.shape[2:], self.cutmix_prob), weak.device)
            for _ in range(2)
        ]
        strong = [
            torch.where(box[:, None], unlabelled[f"mix_strong{k}"], unlabelled[f"strong{k}"])
            for k, box in enumerate(boxes)
        ]
        logits = dict(zip(("l", "w", "w_weak", "w_strong"), self._four_ways(image_l, weak)))
        logits |= dict(zip(("s1", "s2", "s2_weak", "s2_strong"), self._four_ways(*strong)))

        own = {name: pseudo_label(logits[f"w{name}"]) for name in ("", "_weak", "_strong")}
        targets = {"w": own[""], "s1": _pasted(boxes[0], mix[""], own[""])}
        targets |= {f"s2{name}": _pasted(boxes[1], mix[name], own[name]) for name in own}
        threshold = self.threshold_at(step)
        pred, conf = own[""]
        self.monitor = pseudo_label_report(
            pred, conf >= threshold, unlabelled["label"], self.num_classes
        )
        self.pictures = {
            "weak, truth": (weak[0], unlabelled["label"][0, 0]),
            "weak, pseudo-label": (weak[0], pred[0]),
            "strong 1, its prediction": (strong[0][0], logits["s1"][0].detach().argmax(0)),
            "strong 2, its prediction": (strong[1][0], logits["s2"][0].detach().argmax(0)),
        }
        return crossmatch_terms(
            logits,
            label_l,
            targets,
            threshold,
            self.dice,
            self.eta,
            self.kd_weight,
            self.sup_loss,
            labelled.get("annotated"),
        )

    def threshold_at(self, step: int) -> float:
        """Lowest confidence at a step; the released ramp of 3D starts after the first step."""
        if not self.entropy_threshold or step == 0:
            return self.threshold
        ramp = sigmoid_rampup(step - 1, RAMP_LENGTH)
        return (self.threshold + (1 - self.threshold) * ramp) * math.log(2)

    def _mix_targets(self, image_l: Tensor, mix: Tensor) -> dict[str, Target]:
        """Pseudo-labels of the images that are pasted, by the plain network and by both perturbed
        decoders.
        """
        # The plain pass comes first, as in the released code: running statistics are those of the
        # last pass most of all.
        plain = self.network(mix)
        _, _, weakly, strongly = self._four_ways(image_l, mix)
        return {
            "": pseudo_label(plain),
            "_weak": pseudo_label(weakly),
            "_strong": pseudo_label(strongly),
        }

    def _four_ways(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Logits of `first` and `second`, and of `second` under weak and strong channel dropout;
        one pass.
        """
        count = len(first)
        features = self.network.encode(torch.cat([first, second]))
        own = [feature[count:] for feature in features]
        dropped = [self.network.drop(own, p) for p in (self.perturb_weak, self.perturb_strong)]
        logits = self.network.decode(
            [torch.cat(parts) for parts in zip(features, *dropped)], **self.decoding
        ).logits
        return logits.split([count, len(second), len(second), len(second)])


def _pasted(box: Tensor, source: Target, target: Target) -> Target:
    return tuple(torch.where(box, a, b) for a, b in zip(source, target))
