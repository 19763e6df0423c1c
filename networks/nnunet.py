"""The U-Nets of nnU-Net v2, plain and residual: teachers from an nnU-Net's results folder, and
students that can go back into one.

State-dict names are those of nnU-Net's checkpoints, less the aliases that these have (`alias_keys`)
and the heads of deep supervision below the last one. Isensee et al., Nature Methods 18 (2021), and
"nnU-Net Revisited", MICCAI 2024 (the residual encoder). What is read from a results folder:
utils/nnunet.py.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from networks.blocks import check_input
from networks.output import SegOutput

NORMS = {"InstanceNorm3d": nn.InstanceNorm3d, "BatchNorm3d": nn.BatchNorm3d}
NONLINEARITIES = {
    "LeakyReLU": nn.LeakyReLU,
    "ReLU": nn.ReLU,
    "ELU": nn.ELU,
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
}
ARGUMENTS = ("eps", "affine", "momentum", "negative_slope", "alpha")
# More than any planner of nnU-Net chooses: a file from elsewhere must not fill the memory
MOST_STAGES, MOST_BLOCKS, MOST_FEATURES, LARGEST_KERNEL, LARGEST_STRIDE = 10, 16, 2048, 9, 8


class ConvUnit(nn.Module):
    """Convolution, dropout, norm, nonlinearity. make_norm: channels -> norm, or None; the same for
    the others.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        bias: bool,
        parts: "Parts",
        dropout: float = 0.0,
        activated: bool = True,
    ) -> None:
        super().__init__()
        padding = [(side - 1) // 2 for side in kernel]
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.dropout = nn.Dropout3d(dropout) if dropout else None
        self.norm = parts.norm(out_channels)
        self.nonlin = parts.nonlinearity() if activated else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.dropout is not None:
            x = self.dropout(x)
        x = self.norm(x)
        return x if self.nonlin is None else self.nonlin(x)


class Parts:
    """Norms and nonlinearities of one network."""

    def __init__(self, norm: str, norm_args: Mapping, nonlin: str, nonlin_args: Mapping) -> None:
        if norm not in NORMS:
            raise ValueError(f"nnunet: norm '{norm}' is not one of {', '.join(NORMS)}")
        if nonlin not in NONLINEARITIES:
            known = ", ".join(NONLINEARITIES)
            raise ValueError(f"nnunet: nonlinearity '{nonlin}' is not one of {known}")
        for key, value in {**norm_args, **nonlin_args}.items():
            if key not in ARGUMENTS or type(value) not in (int, float, bool):
                raise ValueError(
                    f"nnunet: {key}={value!r} of norm or nonlinearity; known are numbers for "
                    f"{', '.join(ARGUMENTS)} (YAML reads 1e-5 as text: 1.0e-5)"
                )
        self.names = norm, nonlin
        self.norm_args, self.nonlin_args = dict(norm_args), dict(nonlin_args)

    def norm(self, channels: int) -> nn.Module:
        return NORMS[self.names[0]](channels, **self.norm_args)

    def nonlinearity(self) -> nn.Module:
        return NONLINEARITIES[self.names[1]](**self.nonlin_args)


class Stack(nn.Module):
    """Convolution units in a row; the first one has the stride and changes the channels."""

    def __init__(
        self,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        bias: bool,
        parts: Parts,
        dropout: float,
    ) -> None:
        super().__init__()
        units = []
        for number in range(count):
            first = number == 0
            units.append(
                ConvUnit(
                    in_channels if first else out_channels,
                    out_channels,
                    kernel,
                    stride if first else (1, 1, 1),
                    bias,
                    parts,
                    dropout,
                )
            )
        self.convs = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolution units f(X), and X on the grid and with the channels of f(X); the nonlinearity
    follows their sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        bias: bool,
        parts: Parts,
        dropout: float,
    ) -> None:
        super().__init__()
        one = (1, 1, 1)
        self.conv1 = ConvUnit(in_channels, out_channels, kernel, stride, bias, parts, dropout)
        self.conv2 = ConvUnit(out_channels, out_channels, kernel, one, bias, parts, activated=False)
        self.nonlin2 = parts.nonlinearity()
        skip: list[nn.Module] = []
        if tuple(stride) != one:
            skip.append(nn.AvgPool3d(tuple(stride), tuple(stride)))
        if in_channels != out_channels:
            skip.append(
                ConvUnit(in_channels, out_channels, one, one, False, parts, activated=False)
            )
        self.skip = nn.Sequential(*skip)

    def parts_of_sum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(X) and f(X) + X, both before the last nonlinearity."""
        residual = self.conv2(self.conv1(x))
        return residual, residual + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.parts_of_sum(x)[1])


class ResidualStage(nn.Module):
    """Residual blocks in a row; the first one has the stride and changes the channels."""

    def __init__(self, blocks: Sequence[ResidualBlock]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Encoder(nn.Module):
    """Stages from fine to coarse, and the `stem` of a residual encoder."""

    def __init__(self, stages: Sequence[nn.Module], stem: nn.Module | None) -> None:
        super().__init__()
        if stem is not None:
            self.stem = stem
        self.stages = nn.ModuleList(stages)


class Decoder(nn.Module):
    """Stages from coarse to fine, each after a transposed convolution, and the last one's head."""

    def __init__(
        self, transposed: Sequence[nn.Module], stages: Sequence[nn.Module], head: nn.Module
    ) -> None:
        super().__init__()
        self.transpconvs = nn.ModuleList(transposed)
        self.stages = nn.ModuleList(stages)
        # nnU-Net has a head at every scale and numbers them as the stages
        self.seg_layers = nn.ModuleDict({str(len(stages) - 1): head})

    @property
    def head(self) -> nn.Module:
        return self.seg_layers[str(len(self.stages) - 1)]


class NnUNet(nn.Module):
    """`(B, in_channels, H, W, D)` -> logits `(B, num_classes, H, W, D)`; sides must be multiples of
    the products of the strides.

    encoder: 'plain' (PlainConvUNet) or 'residual' (ResidualEncoderUNet). features_per_stage,
    kernel_sizes, strides: of the stages, fine to coarse; kernels and strides in nnU-Net's order of
    axes, one number stands for all three. blocks_per_stage: convolutions, or residual blocks;
    convs_per_stage_decoder: convolutions, coarse to fine. axes: which axis of the image is each of
    nnU-Net's; its files are read as z, y, x.
    """

    dims = 3
    stride = 8  # of the default; `multiples` has it of others
    encoder_parts = ("encoder",)
    unused_keys: tuple[str, ...] = ()
    alias_keys = (
        (r"^decoder\.encoder\.", "encoder."),
        (r"\.all_modules\.0\.", ".conv."),
        (r"\.all_modules\.[12]\.", ".norm."),  # 2 where dropout stands between
    )

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        encoder: str = "plain",
        features_per_stage: Sequence[int] = (32, 64, 128, 256),
        kernel_sizes: Sequence = (3, 3, 3, 3),
        strides: Sequence = (1, 2, 2, 2),
        blocks_per_stage: Sequence[int] = (2, 2, 2, 2),
        convs_per_stage_decoder: Sequence[int] = (2, 2, 2),
        conv_bias: bool = True,
        norm: str = "InstanceNorm3d",
        norm_args: dict | None = None,
        nonlin: str = "LeakyReLU",
        nonlin_args: dict | None = None,
        dropout: float = 0.0,
        stem_channels: int = 0,
        axes: Sequence[int] = (2, 1, 0),
    ) -> None:
        super().__init__()
        if encoder not in ("plain", "residual"):
            raise ValueError(f"nnunet: encoder must be plain or residual, got '{encoder}'")
        if sorted(axes) != [0, 1, 2]:
            raise ValueError(f"nnunet: axes must name 0, 1 and 2, got {list(axes)}")
        features, depth = tuple(features_per_stage), len(features_per_stage)
        kernels, steps = [triple(k) for k in kernel_sizes], [triple(s) for s in strides]
        blocks, convs = tuple(blocks_per_stage), tuple(convs_per_stage_decoder)
        _check_sizes(depth, features, kernels, steps, blocks, convs)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"nnunet: dropout must lie in [0, 1), got {dropout}")
        if not 0 <= stem_channels <= MOST_FEATURES:
            raise ValueError(f"nnunet: stem_channels must lie in 0..{MOST_FEATURES}")
        parts = Parts(
            norm,
            {"eps": 1e-5, "affine": True} if norm_args is None else norm_args,
            nonlin,
            {} if nonlin_args is None else nonlin_args,
        )
        self.in_channels, self.num_classes, self.axes = in_channels, num_classes, tuple(axes)
        self.sides = self.multiples(strides=strides, axes=axes)
        self.back = tuple(self.axes.index(k) for k in range(3))

        rest = conv_bias, parts, dropout
        stages: list[nn.Module] = []
        stem, before = None, in_channels
        if encoder == "residual":
            before = stem_channels or features[0]
            stem = Stack(1, in_channels, before, kernels[0], (1, 1, 1), *rest)
        for width, kernel, step, count in zip(features, kernels, steps, blocks):
            if encoder == "residual":
                first = ResidualBlock(before, width, kernel, step, *rest)
                others = [
                    ResidualBlock(width, width, kernel, (1, 1, 1), *rest) for _ in range(count - 1)
                ]
                stages.append(ResidualStage([first, *others]))
            else:
                stages.append(nn.Sequential(Stack(count, before, width, kernel, step, *rest)))
            before = width
        self.encoder = Encoder(stages, stem)

        transposed, upper = [], []
        for number, count in enumerate(convs):
            level = depth - 2 - number  # the encoder's stage on the same grid
            below, width, step = features[level + 1], features[level], steps[level + 1]
            transposed.append(nn.ConvTranspose3d(below, width, step, step, bias=conv_bias))
            upper.append(Stack(count, 2 * width, width, kernels[level], (1, 1, 1), *rest))
        head = nn.Conv3d(features[0], num_classes, 1)
        self.decoder = Decoder(transposed, upper, head)
        self.feature_channels = self._taps(features, encoder == "residual")

    @staticmethod
    def multiples(
        strides: Sequence = (1, 2, 2, 2), axes: Sequence[int] = (2, 1, 0), **_
    ) -> tuple[int, int, int]:
        """What each side of an image must be a multiple of, for these arguments of a network."""
        products = [math.prod(triple(step)[k] for step in strides) for k in range(3)]
        return tuple(products[list(axes).index(k)] for k in range(3))

    @staticmethod
    def _taps(features: Sequence[int], residual: bool) -> dict[str, int]:
        levels = _levels(len(features))
        channels = {tap: features[level] for tap, (_, level) in levels.items()}
        channels |= {"penultimate": 2 * features[0], "decoder": features[0]}
        channels["acf"] = channels["stage6"]
        if residual:
            channels |= {"residual": features[-1], "corrected": features[-1]}
        return channels

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        check_input("nnunet", image, self.in_channels, self.sides)
        x = image.permute(0, 1, *(2 + axis for axis in self.axes))
        if hasattr(self.encoder, "stem"):
            x = self.encoder.stem(x)
        down, pair = [], {}
        for number, stage in enumerate(self.encoder.stages):
            last = number == len(self.encoder.stages) - 1
            if last and return_features and isinstance(stage, ResidualStage):
                # The last block is unrolled: attention correction needs f(X) and f(X) + X.
                x = stage.blocks[:-1](x)
                residual, corrected = stage.blocks[-1].parts_of_sum(x)
                pair = {"residual": residual, "corrected": corrected}
                x = stage.blocks[-1].nonlin2(corrected)
            else:
                x = stage(x)
            down.append(x)
        up, penultimate = {}, x
        for number, stage in enumerate(self.decoder.stages):
            level = len(down) - 2 - number
            penultimate = torch.cat([self.decoder.transpconvs[number](x), down[level]], dim=1)
            x = up[level] = stage(penultimate)
        logits = self._restored(self.decoder.head(x))
        if not return_features:
            return logits
        features = {}
        for tap, (side, level) in _levels(len(down)).items():
            features[tap] = down[level] if side == "down" else up[level]
        features |= {"penultimate": penultimate, "decoder": x, "acf": features["stage6"]} | pair
        return SegOutput(logits, {tap: self._restored(value) for tap, value in features.items()})

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`own_weights` of a checkpoint of nnU-Net."""
        return own_weights(state, self)

    def _restored(self, x: Tensor) -> Tensor:
        """A map in nnU-Net's order of axes -> in that of the image."""
        return x.permute(0, 1, *(2 + axis for axis in self.back))


class NnUNetTeacher(nn.Module):
    """Networks of one plan, one from each fold: their logits averaged, the features of the first.

    outputs: which of a network's outputs is each class of the student. mirror_axes: axes of the
    image along which nnU-Net averages mirrored predictions; () for none.
    """

    dims = 3

    def __init__(
        self, folds: Sequence[NnUNet], outputs: Sequence[int], mirror_axes: Sequence[int]
    ) -> None:
        super().__init__()
        self.folds = nn.ModuleList(folds)
        self.outputs, self.mirror_axes = list(outputs), tuple(mirror_axes)
        self.in_channels, self.num_classes = folds[0].in_channels, len(self.outputs)
        self.feature_channels = folds[0].feature_channels

    def forward(self, image: Tensor, return_features: bool = False) -> Tensor | SegOutput:
        first = self.folds[0](image, return_features=return_features)
        total = first.logits if return_features else first
        for network in self.folds[1:]:
            total = total + network(image)
        logits = total / len(self.folds)
        if self.outputs != list(range(logits.shape[1])):
            logits = logits[:, self.outputs]
        return SegOutput(logits, first.features) if return_features else logits


def triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    """One number for all axes, or three; ValueError."""
    numbers = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(numbers) != 3 or not all(type(number) is int for number in numbers):
        raise ValueError(f"nnunet: expected a whole number or three of them, got {value!r}")
    return numbers


def own_weights(state: Mapping[str, Tensor], network: NnUNet) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of `network`: without aliases, wrappers' prefixes
    and the other heads of deep supervision. ValueError where an alias differs from its tensor.
    """
    found: dict[str, Tensor] = {}
    heads = len(network.decoder.stages) - 1
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("_orig_mod.")
        for pattern, replacement in network.alias_keys:
            name = re.sub(pattern, replacement, name)
        if name in found and not torch.equal(found[name], value):
            raise ValueError(f"{key} and {name} should be one tensor under two names, but differ")
        found[name] = value
    lower = re.compile(r"^decoder\.seg_layers\.(\d+)\.")
    return {
        name: value
        for name, value in found.items()
        if not (match := lower.match(name)) or int(match[1]) >= heads
    }


def nnunet_weights(network: NnUNet) -> dict[str, Tensor]:
    """The tensors of `network` under all the names that nnU-Net's strict loading wants: the reverse
    of `own_weights`.

    The heads of deep supervision below the last one, which prediction does not use and `network`
    does not have, are zero.
    """
    aliases = {}
    for name, layer in network.named_modules():
        if isinstance(layer, ConvUnit):
            aliases[f"{name}.conv."] = f"{name}.all_modules.0."
            place = 1 if layer.dropout is None else 2
            aliases[f"{name}.norm."] = f"{name}.all_modules.{place}."
    found: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        names = [key]
        for own, alias in aliases.items():
            if key.startswith(own):
                names.append(alias + key.removeprefix(own))
        for name in names:
            found[name] = value
            if name.startswith("encoder."):
                found[f"decoder.{name}"] = value
    for number, transposed in enumerate(network.decoder.transpconvs):
        key = f"decoder.seg_layers.{number}"
        if f"{key}.weight" not in found:
            shape = network.num_classes, transposed.out_channels, 1, 1, 1
            found[f"{key}.weight"] = torch.zeros(shape)
            found[f"{key}.bias"] = torch.zeros(network.num_classes)
    return found


def _levels(depth: int) -> dict[str, tuple[str, int]]:
    """Tap -> encoder ('down') or decoder ('up'), and the stage, counted from the finest.

    Taps of the other networks are at 1/2, 1/4 and 1/8 of the image, the bottleneck, 1/4, 1/2 and
    the image's own grid; these are the same where all strides are 2.
    """
    coarse, upper = depth - 1, depth - 2
    return {
        "stage1": ("down", min(1, coarse)),
        "stage2": ("down", min(2, coarse)),
        "stage3": ("down", min(3, coarse)),
        "stage4": ("down", coarse),
        "stage5": ("up", min(2, upper)),
        "stage6": ("up", min(1, upper)),
        "stage7": ("up", 0),
    }


def _check_sizes(
    depth: int,
    features: Sequence[int],
    kernels: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    blocks: Sequence[int],
    convs: Sequence[int],
) -> None:
    """ValueError unless lists have one entry for each stage, within what nnU-Net's planners use."""
    if not 2 <= depth <= MOST_STAGES:
        raise ValueError(f"nnunet: expected 2 to {MOST_STAGES} stages, got {depth}")
    lengths = {
        "kernel_sizes": (kernels, depth),
        "strides": (strides, depth),
        "blocks_per_stage": (blocks, depth),
        "convs_per_stage_decoder": (convs, depth - 1),
    }
    for name, (values, expected) in lengths.items():
        if len(values) != expected:
            raise ValueError(f"nnunet: {name} has {len(values)} entries, expected {expected}")
    limits = {
        "features_per_stage": (features, MOST_FEATURES),
        "blocks_per_stage": (blocks, MOST_BLOCKS),
        "convs_per_stage_decoder": (convs, MOST_BLOCKS),
        "kernel_sizes": ([side for kernel in kernels for side in kernel], LARGEST_KERNEL),
        "strides": ([side for stride in strides for side in stride], LARGEST_STRIDE),
    }
    for name, (values, most) in limits.items():
        if not all(type(value) is int and 1 <= value <= most for value in values):
            raise ValueError(f"nnunet: {name} must be whole numbers in 1..{most}, got {values}")
    if any(side % 2 == 0 for kernel in kernels for side in kernel):
        raise ValueError(f"nnunet: kernel_sizes must be odd, got {kernels}")
