"""LeFeD: the disagreement of two decoders is fed back to the encoder, three updates of each batch.

Paper: Zeng et al., "LeFeD: Learn from the Discrepancies for Semi-supervised Medical Image
Segmentation"; authors' code. The first update of a batch runs without feedback, each later one with
that of the update before:

    feedback_k = lambda (stage_k of decoder 2 - stage_k of decoder 1)
                 (lambda 1e-3, no gradient, for the five stages)
    L = sum_{j=1,2} D(P_j, y) + 0.8 d_1 + 0.6 d_2 + 0.4 d_3 + 0.2 d_4 + 0.1 d_5
        + mean (p_1 - p_2)^2

with D the foreground Dice loss (squared denominators, eps 1e-5), d_k that of the k-th side output,
the first finest, and the mean over labelled and unlabelled samples, classes and voxels. Both
presets are the same. Network: `vnet_lefed`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.consistency import dice_loss
from losses.kd import check_positive, check_weights
from methods.base import Method, pseudo_label_report, require_method

SIDE_WEIGHTS = (0.1, 0.2, 0.4, 0.6, 0.8)  # of the side outputs, coarsest first


class LeFeD(Method):
    """The terms `sup`, `side`, `consistency`. feedback: lambda; rounds: updates of each batch."""

    strong_views = 0
    incomplete = True
    dimensions = (3,)

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        max_steps: int,
        preset: str = "clean",
        feedback: float = 1e-3,
        rounds: int = 3,
        consistency: float = 1.0,
    ) -> None:
        super().__init__(make_network, max_steps)
        require_method("lefed", self.network, "all", "vnet_lefed")
        check_positive("lefed", feedback=feedback, rounds=rounds)
        check_weights("lefed", consistency=consistency)
        self.scale, self.updates, self.consistency = feedback, rounds, consistency
        # both start anew with each batch, so that no checkpoint needs them
        self._round, self._feedback = 0, []

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image_l, label_l = labelled["image"], labelled["label"]
        known = {"annotated": labelled.get("annotated")}  # of labels that are not complete
        count = len(image_l)
        out = self.network.all(
            torch.cat([image_l, unlabelled["weak"]]), self._feedback if self._round else []
        )
        first, second = out["logits"]
        self._feedback = [self.scale * (b - a).detach() for a, b in zip(*out["stages"])]
        self._round = (self._round + 1) % self.updates

        sides = [
            weight * dice_loss(side[:count], label_l, **known)
            for weight, side in zip(SIDE_WEIGHTS, out["sides"])
        ]
        difference = first.float().softmax(1) - second.float().softmax(1)
        pred, other = (logits[count:].detach().argmax(1) for logits in (first, second))
        self.monitor = pseudo_label_report(
            pred, pred == other, unlabelled["label"], self.num_classes
        )
        self.pictures = {
            "weak, truth": (unlabelled["weak"][0], unlabelled["label"][0, 0]),
            "first decoder": (unlabelled["weak"][0], pred[0]),
            "second decoder": (unlabelled["weak"][0], other[0]),
        }
        of_both = [dice_loss(logits[:count], label_l, **known) for logits in (first, second)]
        return {
            "sup": sum(of_both),
            "side": sum(sides),
            "consistency": self.consistency * difference.square().mean(),
        }
