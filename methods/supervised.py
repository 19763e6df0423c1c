"""Supervised: the labelled images alone; with few labels the lower bound, with all labels the upper
bound.

    L = 0.5 (CE + sum of the foreground Dice losses)          the supervised part of CRKD
"""

from collections.abc import Callable

from torch import Tensor, nn

from losses.consistency import ce_dice_loss
from methods.base import Method


class Supervised(Method):
    """The term `sup`. It has no presets: the released scripts differ in that they never return to
    training mode after the first validation, which is a fault of the loop.
    """

    uses_unlabelled = False
    strong_views = 0
    incomplete = True

    def __init__(
        self, make_network: Callable[[], nn.Module], max_steps: int, preset: str = "clean"
    ) -> None:
        super().__init__(make_network, max_steps)

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        image, label = labelled["image"], labelled["label"]
        logits = self.network(image)
        self.pictures = {
            "labelled": (image[0], label[0, 0]),
            "prediction": (None, logits[0].detach().argmax(0)),
        }
        return {"sup": ce_dice_loss(logits, label, annotated=labelled.get("annotated"))}
