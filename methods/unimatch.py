"""UniMatch: two strong views and a feature-perturbed one learn from the pseudo-label of the weak
view.

Paper: Yang et al., "Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic
Segmentation", CVPR 2023; here the authors' medical form (ACDC). With D the mean Dice loss of all
classes over the trusted pixels V:

    L = 1/2 { 1/2 [CE(P_l, y) + D(P_l, y)] + 1/4 D(P_s1, y_1; V_1) + 1/4 D(P_s2, y_2; V_2)
              + 1/2 D(P_fp, y_w; V_w) }

P_l, P_w and P_fp come from one pass over labelled and weak images, P_s1 and P_s2 from one over the
strong views, into each of which a box of another unlabelled image is pasted (CutMix), with that
image's pseudo-label. 3D: the same, with boxes and channel dropout in 3D. A box of 2D has an area of
2 to 40 % of the image and proportions of 0.3 to 1 / 0.3; proportions and place are drawn again
until it lies inside (`draw_box` in losses/crkd.py).

Presets: 'as_released' decodes perturbed features of the labelled images too, which no term uses,
but whose statistics batch norm sees; 'clean' leaves them out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.consistency import SUP_LOSSES, dice_loss, supervised_loss
from losses.crkd import draw_boxes, pseudo_label
from losses.kd import check_choice, check_fractions
from losses.taps import moved
from methods.base import Method, pseudo_label_report, require_method
from utils.modes import evaluating

DICE = {"background": True, "average": True}  # all classes, averaged, eps 1e-5


def unimatch_terms(
    logits_l: Tensor,
    label_l: Tensor,
    logits_s: tuple[Tensor, Tensor],
    targets_s: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    logits_fp: Tensor,
    target_w: tuple[Tensor, Tensor],
    threshold: float,
    sup_loss: str = "own",
    annotated: Tensor | None = None,
) -> dict[str, Tensor]:
    """The four weighted terms. A target is (ids, confidence), both (B, *spatial); logits (B, C,
    *spatial). sup_loss, annotated: as in `supervised_loss`.
    """
    (pred1, conf1), (pred2, conf2), (pred_w, conf_w) = *targets_s, target_w
    return {
        "sup": supervised_loss(logits_l, label_l, sup_loss, 0.5, annotated, **DICE),
        "strong1": 0.125 * dice_loss(logits_s[0], pred1, mask=conf1 >= threshold, **DICE),
        "strong2": 0.125 * dice_loss(logits_s[1], pred2, mask=conf2 >= threshold, **DICE),
        "perturbed": 0.25 * dice_loss(logits_fp, pred_w, mask=conf_w >= threshold, **DICE),
    }


class UniMatch(Method):
    """The terms `sup`, `strong1`, `strong2`, `perturbed`.

    threshold: lowest confidence of a pseudo-label. cutmix_prob: of a box in a strong view. perturb:
    probability of dropping an encoder channel. sup_loss: on the labelled images, 'own' or CRKD's
    'ce_dice', 1/2 (CE + Dice of the foreground) instead of 1/4 (CE + D).
    """

    strong_views = 2
    mixes = True
    incomplete = True

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        threshold: float = 0.95,
        cutmix_prob: float = 0.5,
        perturb: float = 0.5,
        sup_loss: str = "own",
    ) -> None:
        super().__init__(make_network, max_steps)
        require_method("unimatch", self.network, "drop", "unet2d" if self.dims == 2 else "vnet")
        check_fractions("unimatch", threshold=threshold, cutmix_prob=cutmix_prob, perturb=perturb)
        check_choice("unimatch", "sup_loss", sup_loss, SUP_LOSSES)
        self.sup_loss = sup_loss
        self.preset, self.threshold, self.cutmix_prob, self.perturb = (
            preset,
            threshold,
            cutmix_prob,
            perturb,
        )

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image_l, label_l, weak = (
            labelled["image"],
            labelled["label"][:, 0].long(),
            unlabelled["weak"],
        )
        count, shape = len(image_l), weak.shape[2:]
        with torch.no_grad(), evaluating(self.network):
            pred_mix, conf_mix = pseudo_label(self.network(unlabelled["mix_weak"]))
        boxes = [
            moved(draw_boxes(len(weak), shape, self.cutmix_prob), weak.device) for _ in range(2)
        ]
        strong = [
            torch.where(box[:, None], unlabelled[f"mix_strong{k}"], unlabelled[f"strong{k}"])
            for k, box in enumerate(boxes)
        ]

        features = self.network.encode(torch.cat([image_l, weak]))
        perturbed = (
            features if self.preset == "as_released" else [feature[count:] for feature in features]
        )
        perturbed = self.network.drop(perturbed, self.perturb)
        logits = self.network.decode([torch.cat(pair) for pair in zip(features, perturbed)]).logits
        logits_l, logits_w, logits_fp = (
            logits[:count],
            logits[count : count + len(weak)],
            logits[-len(weak) :],
        )
        logits_s = self.network(torch.cat(strong)).chunk(2)

        pred_w, conf_w = pseudo_label(logits_w)
        targets = [
            (torch.where(box, pred_mix, pred_w), torch.where(box, conf_mix, conf_w))
            for box in boxes
        ]
        self.monitor = pseudo_label_report(
            pred_w, conf_w >= self.threshold, unlabelled["label"], self.num_classes
        )
        self.pictures = {
            "weak, truth": (weak[0], unlabelled["label"][0, 0]),
            "weak, pseudo-label": (weak[0], pred_w[0]),
            "strong 1, its prediction": (strong[0][0], logits_s[0][0].detach().argmax(0)),
            "strong 2, its prediction": (strong[1][0], logits_s[1][0].detach().argmax(0)),
        }
        return unimatch_terms(
            logits_l,
            label_l,
            logits_s,
            targets,
            logits_fp,
            (pred_w, conf_w),
            self.threshold,
            self.sup_loss,
            labelled.get("annotated"),
        )
