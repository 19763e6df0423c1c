"""What a semi-supervised method is to the training scripts, and what it reports about its
pseudo-labels.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from losses.incomplete import UNKNOWN
from utils.modes import compile_parts


class Method(nn.Module):
    """A network under training with its losses; parameters and buffers are the state that a
    checkpoint keeps.

    Class attributes say what a step needs: `uses_unlabelled`; `strong_views`, the number of strong
    views of each unlabelled image; `mixes`, a second, independent batch of unlabelled images to
    paste from; `updates`, how many losses and optimiser updates are made of one batch;
    `incomplete`, whether `loss` can take labels that are not complete. After each
    `loss`, `monitor` holds scalars to log (fractions of voxels, or NaN) and `pictures` what the
    first images of the batch look like: name -> (image or None, ids or None), without gradient.
    """

    uses_unlabelled = True
    strong_views = 1
    mixes = False
    updates = 1
    incomplete = False
    dimensions = (2, 3)  # of the networks that it is for

    def __init__(self, make_network: Callable[[], nn.Module], max_steps: int) -> None:
        super().__init__()
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}")
        self.network = make_network()
        self.num_classes = self.network.num_classes
        self.dims = getattr(self.network, "dims", 3)
        self.max_steps = max_steps
        self.monitor: dict[str, Tensor] = {}
        self.pictures: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated, saved and deployed."""
        return self.network

    @property
    def networks(self) -> list[nn.Module]:
        """The network that is trained, then copies of it."""
        own = type(self.network)
        copies = [child for child in self.children() if isinstance(child, own)]
        return [self.network, *(copy for copy in copies if copy is not self.network)]

    def compile(self, *args, **kwargs) -> None:
        """`torch.compile` of the networks that a step runs, in place, with its arguments: of each
        the whole and the parts that methods call.
        """
        for network in self.networks:
            compile_parts(network, *args, **kwargs)

    def loss(self, labelled: dict, unlabelled: dict | None, step: int) -> dict[str, Tensor]:
        """Weighted scalar terms of one step; their sum is minimised.

        labelled: `image` (B, C, *spatial) float32, `label` (B, 1, *spatial) and, if labels are not
        complete, `annotated` (B, K), see losses/incomplete.py. unlabelled: `weak` and
        `strong0`, `strong1`, ... like image, all of one geometry, and `label`, for `monitor` alone,
        UNKNOWN where there is none; if `mixes`, the same of other images under `mix_weak`,
        `mix_strong0`, ...; None if `uses_unlabelled` is False. step: 0-based.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser update: moving averages."""


def require_method(name: str, network: nn.Module, needed: str, usual: str) -> None:
    """Raise ValueError if the network lacks a method of this name, or its forward an argument of
    this name.
    """
    if not hasattr(network, needed) and needed not in inspect.signature(network.forward).parameters:
        raise ValueError(
            f"{name}: needs a network with '{needed}', such as {usual}; set network: {usual}"
        )


@torch.no_grad()
def pseudo_label_report(
    pred: Tensor, valid: Tensor, label: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """How good pseudo-labels are: pred (B, *spatial) ids, valid bool, label (B, 1, *spatial) the
    truth, for logging; voxels whose truth is UNKNOWN are compared with nothing, and are not counted
    but in images that have no label at all.

    `mask_ratio`: share of valid voxels; `pseudo_accuracy`: of those, share that is right;
    `pseudo_foreground` and `true_foreground`: shares of all voxels; `recall_k`: of the voxels of
    class k, share that is valid and right. NaN where nothing is counted.
    """
    truth = label[:, 0].long()
    right, known = pred == truth, truth != UNKNOWN
    without = ~known.flatten(1).any(1)
    counted = known | without.view(-1, *[1] * (known.ndim - 1))
    report = {
        "mask_ratio": (valid & counted).float().mean() / counted.float().mean(),
        "pseudo_accuracy": (right & valid).sum() / (valid & known).sum(),
        "pseudo_foreground": ((pred > 0) & counted).float().mean() / counted.float().mean(),
        "true_foreground": ((truth > 0) & known).float().mean() / known.float().mean(),
    }
    for k in range(1, num_classes):
        of_class = truth == k
        report[f"recall_{k}"] = (right & valid & of_class).sum() / of_class.sum()
    return report
