"""What a network returns when its features are asked for."""

from typing import NamedTuple

from torch import Tensor


class SegOutput(NamedTuple):
    """Logits `(B, K, *spatial)` and the named feature taps, each `(B, C, *spatial_of_that_tap)`.

    Tap names are shared by all networks, so that every method works with every pair:
    `stage1` .. `stage7` (encoder, bottleneck and decoder outputs in order), `penultimate` (input of
    the last block), `decoder` (output of the last decoder stage before the classifier), `acf` (the
    student map that attention correction works on), `residual` and `corrected` (a teacher block's
    f(X), and f(X) + X: separate tensors), and, on SegResNet only, `hooked_residual` (what the
    reference code's hook captured as f(X); for preset 'as_released').
    """

    logits: Tensor
    features: dict[str, Tensor]
