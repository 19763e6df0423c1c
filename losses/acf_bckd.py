"""ACF-BCKD: attention correction feature and boundary constraint knowledge distillation.

Paper: "Attention Correction Feature and Boundary Constraint Knowledge Distillation for Efficient
Medical Image Segmentation"; its released code.
Total: L = L_seg + L_AFD + L_CFD + a L_HBD + (1 - a) L_SBD, where a falls with training.

- AFD: attention distance between the attended student map and the teacher block's output f(X) + X.
- CFD: attention distance between a projection of the student's attention and the teacher's
  correction f(X).
- HBD: divergence from the teacher on the label's boundary shells, class by class.
- SBD: log Hausdorff distance-transform loss between the student's probabilities and the teacher's
  prediction.

Deviations from the released code (preset 'clean'): with SegResNet the correction is the true
residual branch, where the reference, through an in-place addition, compares with the block output
twice; preset 'as_released' does the same as the reference (`correction_source='output'`). The
schedule is a function of progress, so resuming cannot restart it. SBD is skipped while its weight
is 0. An empty boundary is skipped by its size, not by the sum of its indices.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from losses.distance import boundary_distance_squared
from losses.incomplete import UNKNOWN
from losses.kd import check_choice, check_not_negative, check_weights, region_masks, takes_options
from losses.taps import attention_energy, class_map, energy_distance, require_taps, resize_nearest
from losses.voxelwise import voxel_chunks, voxel_sums


def hard_boundary_weight(progress: float, floor: float = 0.001, decay: float = 1.0) -> float:
    """Weight a of the hard boundary term: max(floor, 1 - decay * progress); the soft term gets 1 -
    a.

    progress: step / max_steps in [0, 1]. decay: the fall over the whole training (the paper's gamma
    per epoch times the number of epochs: 1.0 and floor 0.001 on BTCV, 0.45 and 0.5 on WORD, 0.5 and
    0.5 on BraTS21).
    """
    return max(floor, 1.0 - decay * progress)


def boundary_shells(foreground: Tensor, border: str = "count") -> Tensor:
    """Voxels that have both foreground and background among their neighbours (26 in 3D, 8 in 2D,
    centre left out).

    foreground: (B, C, *spatial) bool. Returns the same shape, bool: a two-sided shell, one voxel on
    either side.
    border: 'count' treats the outside of the patch as background (the paper's code), so a class
    that is cut by the patch has a boundary there; 'ignore' repeats the border voxels instead, so it
    has none.
    """
    shells = []
    for group in foreground.split(BITS, dim=1):
        bits = torch.zeros_like(group[:, 0], dtype=torch.int32)
        for index in range(group.shape[1]):
            bits |= group[:, index].to(torch.int32) << index
        shells.append(_unpack(shell_bits(bits, border)[:, None], group.shape[1], dim=1))
    return torch.cat(shells, dim=1)


BITS = 30  # classes whose membership one int32 holds


def shell_bits(bits: Tensor, border: str = "count", unknown: Tensor | None = None) -> Tensor:
    """The shells of up to `BITS` classes at once: bit c of a voxel says whether it lies on the
    shell of class c.

    bits: (B, *spatial) int32, bit c set where class c is. A class has a shell where some neighbour
    has its bit (or) but not all have it (and). border as in `boundary_shells`. unknown: like
    `bits`, bit c set where nobody knows; such a voxel lies on no shell, and is no neighbour.
    """
    framed = _framed(bits, border)
    some = _neighbours(torch.bitwise_or, framed)
    if unknown is None:
        return some & ~_neighbours(torch.bitwise_and, framed)
    every = _neighbours(torch.bitwise_and, framed | _framed(unknown, border))
    return some & ~every & ~unknown


def _framed(bits: Tensor, border: str) -> Tensor:
    """With one voxel more on every side: no class, or the border voxels again."""
    if border == "ignore":
        for axis in range(1, bits.ndim):
            size = bits.shape[axis]
            bits = torch.cat(
                [bits.narrow(axis, 0, 1), bits, bits.narrow(axis, size - 1, 1)], dim=axis
            )
        return bits
    return F.pad(bits, [1, 1] * (bits.ndim - 1))


def _neighbours(combine: Callable[[Tensor, Tensor], Tensor], bits: Tensor) -> Tensor:
    """The bits of the neighbours of each voxel, combined; of framed `bits`, without the frame."""
    # Axis by axis: `block` is the window with its centre, `around` the window without it.
    around, block = None, bits
    for axis in range(bits.ndim - 1, 0, -1):
        size = block.shape[axis] - 2
        before, middle, after = (block.narrow(axis, start, size) for start in range(3))
        sides = combine(before, after)
        around = sides if around is None else combine(sides, around.narrow(axis, 1, size))
        block = combine(sides, middle) if axis > 1 else None
    return around


def _unpack(bits: Tensor, count: int, dim: int) -> Tensor:
    """Bits 0 .. count - 1 of int32 `bits`, spread along `dim`, which has the size 1; bool."""
    places = torch.arange(count, dtype=torch.int32, device=bits.device)
    return (bits >> places.view(-1, *[1] * (bits.ndim - 1 - dim))) & 1 == 1


def hard_boundary_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    label: Tensor,
    multilabel: bool = False,
    reduction: str = "mean",
    border: str = "count",
    label_classes: int | None = None,
    incomplete: bool = False,
) -> Tensor:
    """HBD: sum over samples and classes of the mean divergence on that class's boundary shell
    (paper, hard boundary).

    logits: (B, K, *spatial). label: (B, 1, *spatial) ids, or (B, K, *spatial) regions if
    `multilabel`. Divergence per voxel: KL(teacher || student) of the softmax, or the summed squared
    difference of sigmoids.
    reduction: 'mean' also divides by K (the reference's scaling), 'voxel' does not. Empty shells
    contribute 0.
    label_classes: number of class ids whose shells count, K by default. incomplete: voxels of the
    label may be UNKNOWN, see `shell_bits`. Gradient to the student only.
    """
    num_classes = student_logits.shape[1]
    counted = num_classes if label_classes is None or multilabel else label_classes
    groups = []  # of classes: (bits of the shells, number of classes)
    for first in range(0, counted, BITS):
        size = min(BITS, counted - first)
        bits = _membership(label, first, size, multilabel)
        unknown = None
        if incomplete:
            unknown = -(label == UNKNOWN)[:, 0].to(torch.int32)  # all bits, or none
            if multilabel:
                unknown = _membership(label == UNKNOWN, first, size, multilabel)
        groups.append((shell_bits(bits, border, unknown).flatten(1), size))
    samples, weights = [], []
    for sample in range(len(label)):
        bits = [(group[sample], size) for group, size in groups]
        # Few voxels lie on a shell, and a CPU works on those alone. Elsewhere finding them would be
        # a wait.
        if label.device.type == "cpu":
            voxels = sum(part != 0 for part, _ in bits).nonzero()[:, 0]
            bits = [(part[voxels], size) for part, size in bits]
        else:
            voxels = torch.arange(bits[0][0].numel(), device=label.device)
        # (C, n)
        shells = torch.cat([_unpack(part[None], size, dim=0) for part, size in bits]).float()
        per_class = 1.0 / shells.sum(1).clamp(min=1)
        # One divergence map serves all shells: a voxel weighs the sum of 1/size over the shells
        # that it lies on.
        samples.append(voxels)
        weights.append((shells * per_class[:, None]).sum(0))
    student = _Gather.apply(student_logits, *samples).float()
    teacher = _Gather.apply(teacher_logits.detach(), *samples).float()
    if multilabel:
        divergence = (student.sigmoid() - teacher.sigmoid()).square().sum(0)
    else:
        teacher_log_probs = F.log_softmax(teacher, dim=0)
        divergence = (
            teacher_log_probs.exp() * (teacher_log_probs - F.log_softmax(student, dim=0))
        ).sum(0)
    loss = (divergence * torch.cat(weights)).sum()
    return loss / num_classes if reduction == "mean" else loss


def _membership(label: Tensor, first: int, count: int, multilabel: bool) -> Tensor:
    """(B, *spatial) int32 with bit c set where the label has class (or region) first + c, c below
    `count`.
    """
    if multilabel:
        regions = label[:, first : first + count]
        regions = region_masks(regions, regions.shape[1]).to(torch.int32)
        return sum(region << index for index, region in enumerate(regions.unbind(1)))
    ids = class_map(label) - first
    inside = (ids >= 0) & (ids < count)
    return (inside.to(torch.int32) << ids.clamp(0, count - 1).to(torch.int32)).to(torch.int32)


class _Gather(torch.autograd.Function):
    """Columns of (B, K, *spatial): the voxels `places[b]` (distinct) of every sample b, side by
    side: (K, n).

    Indexing would do, but its gradient has to reckon with repeated voxels and makes a full map per
    sample.
    """

    @staticmethod
    def forward(ctx, values, *places):
        ctx.shape = values.shape
        ctx.save_for_backward(*places)
        return torch.cat(
            [sample.flatten(1)[:, place] for sample, place in zip(values, places, strict=True)],
            dim=1,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        places = ctx.saved_tensors
        gradient = grad.new_zeros(ctx.shape)
        parts = grad.split([len(place) for place in places], dim=1)
        for sample, place, part in zip(gradient, places, parts, strict=True):
            sample.flatten(1)[:, place] = part
        return gradient, *[None] * len(places)


def soft_boundary_loss(
    student_logits: Tensor, teacher_logits: Tensor, multilabel: bool = False, absent: str = "count"
) -> Tensor:
    """SBD: log(1 + H), H = mean over channels, samples and voxels of (P - G)^2 (D(P > 0.5)^2 +
    D(G)^2).

    logits: (B, K, *spatial). P: student probabilities; G: the teacher's own prediction, one-hot
    argmax (background channel left out) or sigmoid >= 0.5. D: distance to the mask's boundary in
    voxels, constant for the gradient.
    absent: of a class that the student is above 0.5 nowhere in a sample only D(G) is left, so that
    leaving it out can cost less than finding it badly. 'count' keeps it (the paper's code), 'skip'
    takes it out of that sample's sum and of the mean; where nothing is left the loss is 0.
    Source: paper, soft boundary; Karimi and Salcudean, TMI 2019 (Hausdorff distance-transform
    loss).
    """
    teacher_logits = teacher_logits.detach()
    batch, channels, *spatial = student_logits.shape
    regions = channels if multilabel else channels - 1

    def probabilities(logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if multilabel else logits.float().softmax(1)[:, 1:]

    student_mask = torch.empty(
        batch, regions, *spatial, dtype=torch.bool, device=student_logits.device
    )
    target = torch.empty_like(student_mask)
    ids = torch.arange(1, channels, device=student_logits.device)[:, None]
    with torch.no_grad():
        for sample, voxels in voxel_chunks(student_logits):
            student, teacher = (
                x[sample].flatten(1)[None, :, voxels] for x in (student_logits, teacher_logits)
            )
            student_mask[sample].flatten(1)[:, voxels] = probabilities(student)[0] > 0.5
            # sigmoid >= 0.5
            chosen = teacher[0] >= 0 if multilabel else teacher[0].argmax(0) == ids
            target[sample].flatten(1)[:, voxels] = chosen
    field = boundary_distance_squared(student_mask.flatten(0, 1), target.flatten(0, 1)).view(
        target.shape
    )
    elements = target.numel()
    if absent == "skip":
        present = student_mask.flatten(2).any(2)  # (B, regions)
        field = field * present.view(batch, regions, *[1] * len(spatial))
        # a tensor: asking how many there are would make the host wait for a GPU
        elements = present.sum().clamp(min=1) * field[0, 0].numel()

    def total(student: Tensor, target: Tensor, field: Tensor) -> Tensor:
        return ((probabilities(student) - target.float()).square() * field).sum()[None]

    return torch.log1p(voxel_sums(total, student_logits, target, field)[0] / elements)


class _OneChannelConv(torch.autograd.Function):
    """Same-size convolution of (B, 1, H, W, D) with a (1, 1, k, k, k) kernel, k odd; float32, first
    derivative only.

    Convolution libraries take ten times as long for the gradient of such a kernel as for the
    output, on a CPU.
    """

    @staticmethod
    def forward(ctx, image, kernel):
        ctx.save_for_backward(image, kernel)
        return F.conv3d(image, kernel, padding=kernel.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        image, kernel = ctx.saved_tensors
        size = kernel.shape[-1]
        half = size // 2
        grad_kernel = torch.zeros(size * size, size)
        for planes, slope in zip(image[:, 0], grad[:, 0], strict=True):
            # Plane by plane a matrix product: k x k shifts of the image by k shifted planes of the
            # gradient.
            # (H, W * D, k)
            windows = F.pad(slope.flatten(1), (0, 0, half, half)).unfold(0, size, 1)
            for plane, window in zip(planes, windows, strict=True):
                shifts = F.unfold(plane[None, None], size, padding=half)[0]  # (k * k, W * D)
                grad_kernel.addmm_(shifts, window)
        grad_kernel = grad_kernel.flip(1).T.reshape(kernel.shape)
        return F.conv3d(grad, kernel.flip(2, 3, 4), padding=half), grad_kernel


class Attention(nn.Module):
    """Channel gate times spatial gate, both hard sigmoids; (B, C, H, W, D) -> (B, C, H, W, D) in
    [0, 1].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels)
        self.ch_attn = nn.Sequential(
            nn.AdaptiveAvgPool3d(1),
            _named_conv(channels, hidden, 1),
            _named_conv(hidden, channels, 1),
        )
        self.sp_attn = _named_conv(1, 1, 7)

    def gates(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors, (B, C, 1, 1, 1) and (B, 1, H, W, D)."""
        pool, squeeze, excite = self.ch_attn
        channel = F.hardsigmoid(excite(F.relu(squeeze(pool(feature)))))
        mean = feature.mean(1, keepdim=True)
        if feature.device.type == "cpu":
            conv = self.sp_attn.conv
            with torch.autocast("cpu", enabled=False):
                spatial = _OneChannelConv.apply(mean.float(), conv.weight) + conv.bias
        else:
            spatial = self.sp_attn(mean)
        return channel, F.hardsigmoid(spatial)

    def forward(self, feature: Tensor) -> Tensor:
        channel, spatial = self.gates(feature)
        return channel * spatial


def hidden_channels(channels: int) -> int:
    """channels // 16 rounded to a multiple of 8, at least 8, and never more than 10 % below
    (MobileNet's rule).
    """
    wanted = channels // 16
    rounded = max(8, (wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def _named_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    # The nested name `conv` is that of released checkpoints.
    conv = nn.Conv3d(in_channels, out_channels, kernel, padding=kernel // 2)
    return nn.Sequential(OrderedDict(conv=conv))


class AttentionCorrection(nn.Module):
    """AFD and CFD: learnable attention on the student's `acf` tap against the teacher's block
    (paper, AFD/CFD).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = Attention(channels)
        self.convertor2 = nn.Conv3d(channels, channels, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        feature: Tensor,
        teacher_feature: Tensor,
        teacher_correction: Tensor,
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor]:
        """feature (B, C, *grid), teacher maps (B, C', *grid') -> (AFD, CFD) distances, unweighted
        scalars.
        """
        channel, spatial = self.attn.gates(feature)
        with torch.autocast(feature.device.type, enabled=False):
            # The distances see channel means of squares only. Of an outer product these are sums
            # over the channels times the squared spatial gate, so neither the attention nor its
            # projection is made in full.
            channel, squared, gate = (
                channel.flatten(1).float(),
                feature.float().square(),
                spatial[:, 0].float(),
            )
            attended = gate.square() * torch.einsum(
                "bc,bcxyz->bxyz", channel.square() / channel.shape[1], squared
            )
            slope = F.linear(channel, self.convertor2.weight.flatten(1).float())
            offset = self.convertor2.bias.float().expand_as(slope)
            second, first, zeroth = (
                (a * b).mean(1).view(-1, 1, 1, 1)
                for a, b in ((slope, slope), (2 * slope, offset), (offset, offset))
            )
            correction = (gate * second + first) * gate + zeroth
        size = teacher_feature.shape[2:]
        attended, correction = (
            resize_nearest(energy[:, None], size)[:, 0] for energy in (attended, correction)
        )
        return (
            energy_distance(attended, attention_energy(teacher_feature), reduction),
            energy_distance(correction, attention_energy(teacher_correction), reduction),
        )


CHOICES = {
    "feature_reduction": ("mean", "sum"),
    "boundary_reduction": ("mean", "voxel"),
    "border": ("count", "ignore"),
    "correction_source": (None, "residual", "output"),
    "sbd_absent": ("count", "skip"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Decisions beside the weights. Settings of a configuration like the others.

    feature_reduction: 'mean' over voxels (the paper's scale, whose strength depends on the grid) or
    'sum'.
    boundary_reduction, border, label_classes: see `hard_boundary_loss`.
    correction_source: 'residual' or 'output'; None follows the preset.
    sbd_absent: 'count' or 'skip', see `soft_boundary_loss`.
    """

    feature_reduction: str = "mean"
    boundary_reduction: str = "mean"
    border: str = "count"
    label_classes: int | None = None
    correction_source: str | None = None
    sbd_absent: str = "count"


@takes_options(Options)
class ACFBCKD(nn.Module):
    """All four terms with the schedule; terms `afd`, `cfd`, `hbd`, `sbd`, each weighted.

    afd, cfd: weights of the feature terms. hbd, sbd: factors on the scheduled boundary weights. A
    weight of 0 leaves the term out. floor, decay: see `hard_boundary_weight`. options: see
    `Options`.
    """

    student_taps = ("acf",)
    incomplete = False

    def __init__(
        self,
        student_channels: dict[str, int],
        teacher_channels: dict[str, int],
        num_classes: int,
        multilabel: bool = False,
        preset: str = "clean",
        afd: float = 25000.0,
        cfd: float = 25000.0,
        hbd: float = 1.0,
        sbd: float = 1.0,
        floor: float = 0.001,
        decay: float = 1.0,
        **options,
    ) -> None:
        super().__init__()
        self.options = option = Options(**options)
        for name, allowed in CHOICES.items():
            check_choice("acf_bckd", name, getattr(option, name), allowed)
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"acf_bckd: floor must lie in [0, 1], got {floor}")
        check_weights("acf_bckd", afd=afd, cfd=cfd, hbd=hbd, sbd=sbd)
        check_not_negative("acf_bckd", decay=decay)
        if option.label_classes is not None and not 1 <= option.label_classes <= num_classes:
            raise ValueError(
                f"acf_bckd: label_classes must lie in 1..{num_classes}, got {option.label_classes}"
            )
        if option.correction_source is None:
            # A network in whose reference hook the sum had overwritten f(X) says so by a
            # `hooked_residual` tap.
            hooked = preset == "as_released" and "hooked_residual" in teacher_channels
            self.correction_tap = "hooked_residual" if hooked else "residual"
        else:
            taps = {"residual": "residual", "output": "corrected"}
            self.correction_tap = taps[option.correction_source]
        self.teacher_taps = tuple({"corrected": None, self.correction_tap: None})
        if not (afd or cfd):
            self.student_taps = self.teacher_taps = ()
        require_taps("acf_bckd", "student", student_channels, self.student_taps)
        require_taps("acf_bckd", "teacher", teacher_channels, self.teacher_taps)
        self.num_classes, self.multilabel = num_classes, multilabel
        self.afd, self.cfd, self.hbd, self.sbd = afd, cfd, hbd, sbd
        self.floor, self.decay = floor, decay
        self.features = AttentionCorrection(student_channels["acf"]) if afd or cfd else None

    def forward(self, student, teacher, label: Tensor, progress: float) -> dict[str, Tensor]:
        alpha = hard_boundary_weight(progress, self.floor, self.decay)
        zero = student.logits.new_zeros((), dtype=torch.float32)
        terms = {"afd": zero, "cfd": zero, "hbd": zero, "sbd": zero}
        if self.features is not None:
            afd, cfd = self.features(
                student.features["acf"],
                teacher.features["corrected"],
                teacher.features[self.correction_tap],
                self.options.feature_reduction,
            )
            terms["afd"], terms["cfd"] = self.afd * afd, self.cfd * cfd
        if self.hbd * alpha > 0:
            terms["hbd"] = (self.hbd * alpha) * hard_boundary_loss(
                student.logits,
                teacher.logits,
                label,
                self.multilabel,
                self.options.boundary_reduction,
                self.options.border,
                self.options.label_classes,
                self.incomplete,
            )
        if self.sbd * (1.0 - alpha) > 0:
            terms["sbd"] = (self.sbd * (1.0 - alpha)) * soft_boundary_loss(
                student.logits, teacher.logits, self.multilabel, self.options.sbd_absent
            )
        return terms
