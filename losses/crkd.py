"""CRKD: cross reliable knowledge distillation between an image-perturbed and a feature-perturbed
view.

Paper: "Semi-supervised Medical Image Segmentation via Cross Reliable Knowledge Distillation".
Source: the loss functions of the CRKD repository's history; its training script was never released.
P_s are the logits of the strongly augmented image, P_fp those of the weak image whose encoder
features lose channels; both images have been mixed by the same symmetric CutMix, so the views show
the same content.

    LEC   low-entropy consistency        both views are drawn to their confidence-weighted mean
    CSD   class semantic distillation    labelled features are anchors, unlabelled ones their
                                         contrast
    CKD   cross distillation             at each voxel the view that fits the pseudo-label better
                                         teaches the other

Presets. 'clean', the default, mends three things that 'as_released' reproduces: the mean row of a
class in CSD is not of unit length; CKD divides the cosine by 0.07 before it is taken from 1, which
makes that term negative; and in CKD's feature term neither view is held constant, so that the two
directions are one function. In either, an empty selection gives a 0 that has a graph, labels are
mixed without arithmetic, and the boxes of 3D CutMix lie on the axes that their extents were drawn
for.

Random draws come from the `generator` argument, or from torch's global one without it. All
arithmetic is float32.

How many voxels stand for a class is known on the device alone, and asking makes the host wait. On
other devices than the CPU, CSD therefore computes with shapes that do not depend on it:
`_of_fixed_shape`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from losses.consistency import without_channel
from losses.incomplete import UNKNOWN
from losses.kd import PRESETS, check_choice, check_positive, unit_vectors
from losses.taps import moved, readable, resize_nearest


def pseudo_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C, *spatial) -> class ids (B, *spatial) int64 and their probabilities float32; no
    gradient.
    """
    confidence, label = logits.detach().float().softmax(1).max(1)
    return label, confidence


# --- low-entropy consistency ---


def low_entropy_consistency(
    logits_s: Tensor,
    logits_fp: Tensor,
    beta: float = 1.0,
    distance: str = "kl",
    mask: Tensor | None = None,
) -> Tensor:
    """LEC: weighted distance of the two class distributions to their weighted mean, averaged over
    voxels.

    logits: (B, C, *spatial). Weight of a view at a voxel: exp(-entropy) * (largest
    probability)^beta, normalised over the two views. distance: 'kl' or 'l1', of each view to the
    mean. mask (B, *spatial): voxels that count, all without one; the mean over none is 0. Scalar
    float32, gradient to both logits, through weights and mean alike. The KL form is a generalised
    Jensen-Shannon divergence: between 0 (equal views) and ln 2.
    """
    check_choice("low_entropy_consistency", "distance", distance, ("kl", "l1"))
    eps = 1e-8
    probs = [logits.float().softmax(1) for logits in (logits_s, logits_fp)]
    logs = [(p + eps).log() for p in probs]
    # exp(sum p log p) is exp(-entropy).
    raw = [(p * log).sum(1).exp() * p.amax(1).pow(beta) for p, log in zip(probs, logs)]
    total = raw[0] + raw[1] + eps
    weights = [r / total for r in raw]
    mean = weights[0].unsqueeze(1) * probs[0] + weights[1].unsqueeze(1) * probs[1]
    if distance == "kl":
        log_mean = (mean + eps).log()
        distances = [(p * (log - log_mean)).sum(1) for p, log in zip(probs, logs)]
    else:
        distances = [(p - mean).abs().sum(1) for p in probs]
    per_voxel = weights[0] * distances[0] + weights[1] * distances[1]
    per_voxel = per_voxel / (weights[0] + weights[1] + eps)
    return (
        per_voxel.mean()
        if mask is None
        else _masked_mean(per_voxel, without_channel(mask, logits_s).bool())
    )


# --- class semantic distillation ---


class ProjectionHead(nn.Module):
    """Pointwise layers to unit vectors of `channels`: (B, in_channels, *spatial) maps, or rows (N,
    in_channels).

    Rows go through the same layers as the voxels of a map: batch norm then takes its statistics
    over the rows, of which `counted` (N,) bool may leave some out.
    num_layers: pointwise convolutions, all but the last with batch norm and ReLU. dims: 2 or 3, the
    kernels' rank only; names and shapes are those of released checkpoints. Output float32.
    """

    def __init__(
        self, in_channels: int = 16, channels: int = 256, num_layers: int = 3, dims: int = 3
    ) -> None:
        super().__init__()
        check_choice("projection head", "dims", dims, (2, 3))
        check_positive("projection head", num_layers=num_layers)
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        layers: list[nn.Module] = []
        for k in range(num_layers - 1):
            layers += [
                conv(channels if k else in_channels, channels, 1),
                norm(channels),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.final_conv = conv(channels if num_layers > 1 else in_channels, channels, 1)
        self.dims = dims

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        if x.ndim == 2:
            # N voxels of one image
            as_map = x.T.reshape(1, x.shape[1], x.shape[0], *[1] * (self.dims - 1))
            return self.forward(as_map, counted)[0].flatten(1).T
        for layer in self.layers:
            partial = (
                counted is not None
                and layer.training
                and isinstance(layer, nn.modules.batchnorm._BatchNorm)
            )
            x = _norm_by(layer, x, counted) if partial else layer(x)
        return F.normalize(self.final_conv(x).float(), dim=1, eps=1e-12)


def _norm_by(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, counted: Tensor) -> Tensor:
    """`norm` in training of the map x (1, C, N, ...) of N voxels, with the statistics of the
    `counted` (N,) bool alone.

    Over those of all processes if it is a SyncBatchNorm. Without any, running statistics stay as
    they are.
    """
    weight = counted.to(x.dtype)
    rows = x.flatten(2)[0]  # (C, N)
    sums = torch.cat([rows @ weight, weight.sum()[None]])
    synchronised = isinstance(norm, nn.SyncBatchNorm)
    if synchronised:
        from torch.distributed.nn.functional import all_reduce  # not every build of torch has it

        sums = all_reduce(sums, group=norm.process_group)
    count = sums[-1].detach()
    mean = sums[:-1] / count.clamp(min=1)
    centred = rows - mean[:, None]
    squares = centred.square() @ weight
    if synchronised:
        squares = all_reduce(squares, group=norm.process_group)
    var = squares / count.clamp(min=1)
    if norm.track_running_stats:
        with torch.no_grad():
            some = count > 0
            norm.num_batches_tracked += some
            momentum = norm.momentum * some
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(squares / (count - 1).clamp(min=1), momentum)
    scaled = centred * (var + norm.eps).rsqrt()[:, None] * norm.weight[:, None] + norm.bias[:, None]
    return scaled.view_as(x)


def class_semantic_distillation(
    features_l: Tensor,
    features_s: Tensor,
    features_fp: Tensor,
    pred_l: Tensor,
    label_l: Tensor,
    pred_u: Tensor,
    conf_u: Tensor,
    num_classes: int,
    head: nn.Module | None = None,
    samples: int = 256,
    tau: float = 0.1,
    threshold: float | None = None,
    use_tp: bool = True,
    split_streams: bool = True,
    preset: str = "clean",
    normalise_mean: bool | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """CSD: supervised contrastive loss, labelled rows as anchors against unlabelled rows of both
    views.

    features: (B, c, *grid) of the labelled batch and of the two unlabelled views. head: module (N,
    c) -> (N, d) unit rows that projects the sampled rows, all in one call, on a GPU with a mask
    (N,) of those that count as its second argument; None if the features are projected already.
    pred_l, label_l: ids of the labelled batch; pred_u, conf_u: pseudo-label and its confidence, at
    any resolution (ids are resized to the grid by nearest neighbour, confidences linearly).
    samples: rows per stream, shared out equally among the classes (the last one takes the
    remainder), drawn with replacement; a class with fewer rows has each of them repeated. Each
    class also adds the mean of its rows.
    threshold: lowest confidence of an unlabelled row; None takes the mean confidence of the batch.
    use_tp: anchors only where prediction and label agree; else wherever the label is not UNKNOWN.
    split_streams: the rows of a class are divided at random between the two views, so that no voxel
    occurs in both. tau: temperature.
    normalise_mean: unit length for the means; None follows the preset (True if clean).
    Mean over the anchors, scalar float32, gradient to all features and the head. 0 with a graph if
    a side is empty.

    With a `head` only sampled rows are projected, which keeps the memory independent of the grid.
    The mean of a class is then that of its projected samples, not of all its voxels.
    """
    check_choice("class_semantic_distillation", "preset", preset, PRESETS)
    check_positive("class_semantic_distillation", samples=samples, tau=tau)
    if samples < num_classes:
        raise ValueError(
            f"class_semantic_distillation: samples must be at least num_classes = {num_classes}, "
            f"got {samples}"
        )
    if normalise_mean is None:
        normalise_mean = preset == "clean"
    grid = features_l.shape[2:]
    with torch.no_grad():
        pred_l, label_l, pred_u = (
            _on_grid(ids, features_l.ndim, grid) for ids in (pred_l, label_l, pred_u)
        )
        conf_u = _on_grid(conf_u, features_l.ndim, grid, linear=True)
        reliable = conf_u >= (conf_u.mean() if threshold is None else threshold)
        # UNKNOWN is no prediction's class
        correct = (pred_l == label_l) if use_tp else label_l != UNKNOWN

        masks = [(pred_l == k) & correct for k in range(num_classes)]
        masks += [(pred_u == k) & reliable for k in range(num_classes)]
        share = [
            samples // num_classes + (samples % num_classes if k == num_classes - 1 else 0)
            for k in range(num_classes)
        ]
    features = (features_l, features_s, features_fp)
    if not readable(masks[0]):
        sides = torch.stack(masks[:num_classes]), torch.stack(masks[num_classes:])
        with torch.autocast(features_l.device.type, enabled=False):
            return _of_fixed_shape(
                features, *sides, share, head, tau, split_streams, normalise_mean, generator
            )

    with torch.no_grad():
        # Which voxels of which stream stand for which class: (stream, class, indices of all its
        # voxels, the candidates among them as positions, None for all, rows wanted).
        groups = []
        indices = _indices(masks)
        for k, (anchors, contrast) in enumerate(zip(indices[:num_classes], indices[num_classes:])):
            wanted = share[k]
            first = second = None
            if split_streams:
                order = _permutation(len(contrast), generator)
                first, second = order[: len(order) // 2], order[len(order) // 2 :]
            for stream, (rows, positions) in enumerate(
                ((anchors, None), (contrast, first), (contrast, second))
            ):
                if len(rows if positions is None else positions):
                    groups.append((stream, k, rows, positions, wanted))
        groups.sort(key=lambda group: group[0])
        drawn = [
            _draw(rows, positions, wanted, generator) for _, _, rows, positions, wanted in groups
        ]

    streams = {stream for stream, *_ in groups}
    if 0 not in streams or not streams & {1, 2}:
        # An empty slice is a 0 in whose graph every input, and the head for DDP's sake, takes part.
        inputs = [*features, *(head.parameters() if head is not None else ())]
        return sum(tensor[:0].sum(dtype=torch.float32) for tensor in inputs)

    with torch.autocast(features_l.device.type, enabled=False):
        # One gather per stream: the gradient of each is a tensor of the size of the whole feature
        # map.
        of_stream = [
            [index for (s, *_), index in zip(groups, drawn) if s == stream]
            for stream in sorted(streams)
        ]
        rows = torch.cat(
            [_rows(features[s], torch.cat(index)) for s, index in zip(sorted(streams), of_stream)]
        )
        rows = (rows if head is None else head(rows)).split([len(index) for index in drawn])
        vectors: dict[bool, list[Tensor]] = {True: [], False: []}
        classes: dict[bool, list[int]] = {True: [], False: []}
        for (stream, k, members, positions, wanted), row in zip(groups, rows):
            members = row if head is not None else _rows(features[stream], _at(members, positions))
            mean = members.mean(0, keepdim=True)
            if normalise_mean:
                mean = unit_vectors(mean, dim=1)
            repeated = row.repeat(-(-wanted // len(row)), 1)[:wanted]
            vectors[stream == 0] += [repeated, mean]
            classes[stream == 0] += [k] * (wanted + 1)
        return _contrast(
            torch.cat(vectors[True]),
            torch.cat(vectors[False]),
            torch.tensor(classes[True]),
            torch.tensor(classes[False]),
            tau,
        )


def _contrast(
    anchors: Tensor, contrast: Tensor, anchor_class: Tensor, contrast_class: Tensor, tau: float
) -> Tensor:
    """Mean over anchors (n, d) of -log softmax(similarities / tau) at the contrast rows (m, d) of
    the same class.
    """
    return _contrasts(anchors @ contrast.T / tau, anchor_class[:, None] == contrast_class).mean()


def _contrasts(similarities: Tensor, positive: Tensor) -> Tensor:
    """-log softmax of each row (n, m), mean over its positives; (n,). An anchor without positives
    contributes 0.
    """
    log_p = similarities.log_softmax(1)
    return -(log_p.where(positive, 0.0).sum(1) / positive.sum(1).clamp(min=1))


def _of_fixed_shape(
    features: tuple[Tensor, Tensor, Tensor],
    anchors: Tensor,
    contrast: Tensor,
    share: Sequence[int],
    head: nn.Module | None,
    tau: float,
    split_streams: bool,
    normalise_mean: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """`class_semantic_distillation` without a question to the device: shapes that depend on shapes
    alone.

    anchors, contrast: bool (K, voxels of the batch), which voxels stand for which class; share:
    rows wanted of each. Every class of every stream has as many rows as the largest share, whether
    it has voxels or not; what is too many gets no weight.
    """
    device, num_classes, width = anchors.device, len(share), max(share)
    with torch.no_grad():
        members = [
            _members_first(anchors, False, generator),
            _members_first(contrast, split_streams, generator),
        ]
        of_class, total = contrast.sum(1), anchors.sum(1)
        half = of_class // 2 if split_streams else of_class
        # (3, K, 1)
        counts = torch.stack([total, half, of_class - half if split_streams else of_class])[
            ..., None
        ]
        start = torch.stack(
            [torch.zeros_like(half), torch.zeros_like(half), half if split_streams else 0 * half]
        )
        place = torch.arange(width, device=device)
        wanted = torch.full((num_classes, 1), share[0], device=device)
        wanted[-1] = share[-1]
        # With replacement where there are enough, else each in turn.
        drawn = (_rand((3, num_classes, width), generator, device, torch.float64) * counts).long()
        position = (
            torch.where(counts >= wanted, drawn, place % counts.clamp(min=1)) + start[..., None]
        )
        index = [members[min(s, 1)].gather(1, position[s]).flatten() for s in range(3)]
        present = counts > 0
        usable = present[0].any() & present[1:].any()
        # (3, K, width): no row that repeats another
        distinct = usable & (place < torch.minimum(counts, wanted))
        valid = present & (place < wanted)

    rows = torch.cat([_rows(feature, i) for feature, i in zip(features, index)])
    rows = (rows if head is None else head(rows, distinct.flatten())).unflatten(
        0, (3, num_classes, width)
    )
    if head is not None:
        weight = distinct.to(rows.dtype)
        mean = (rows * weight[..., None]).sum(2) / weight.sum(2, keepdim=True).clamp(min=1)
    else:
        mean = torch.stack(
            [
                _means(feature, members[min(s, 1)], start[s], counts[s, :, 0])
                for s, feature in enumerate(features)
            ]
        )
    if normalise_mean:
        mean = unit_vectors(mean, dim=2)
    vectors = torch.cat([rows, mean[:, :, None]], dim=2)
    valid = torch.cat([valid, present], dim=2)
    classes = torch.arange(num_classes, device=device)[:, None].expand(valid.shape)
    (valid_a, valid_c), (class_a, class_c) = (
        (t[0].flatten(), t[1:].flatten()) for t in (valid, classes)
    )
    similarities = vectors[0].flatten(0, 1) @ vectors[1:].flatten(0, 2).T / tau
    # where nothing is usable none is masked: all of them would give NaN
    similarities = similarities.masked_fill(~valid_c & usable, -math.inf)
    losses = _contrasts(similarities, (class_a[:, None] == class_c) & valid_c)
    counted = valid_a & usable
    return losses.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def _members_first(masks: Tensor, shuffled: bool, generator: torch.Generator | None) -> Tensor:
    """Indices (K, N) int64 of the True entries of each mask (K, N), in order or shuffled, then of
    all others.
    """
    keys = (
        _rand(masks.shape, generator, masks.device)
        if shuffled
        else masks.new_zeros(masks.shape, dtype=torch.uint8)
    )
    return keys.masked_fill(~masks, 1).argsort(dim=1, stable=True)


def _means(feature: Tensor, members: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Mean vector (K, C) of a map (B, C, *grid) over members[k, start[k] : start[k] + count[k]] of
    each class k.
    """
    place = torch.arange(members.shape[1], device=members.device) - start[:, None]
    weight = torch.zeros(members.shape, dtype=torch.float32, device=members.device)
    weight.scatter_(1, members, ((place >= 0) & (place < count[:, None])).float())
    weight = weight / count.clamp(min=1)[:, None]
    feature = feature.float().flatten(2)
    return torch.einsum("kbv,bcv->kc", weight.unflatten(1, (len(feature), -1)), feature)


def _on_grid(values: Tensor, ndim: int, grid: torch.Size, linear: bool = False) -> Tensor:
    """A map (B, 1, *spatial) or (B, *spatial) on `grid`, flattened to (B * voxels,); ids int64 or
    floats.
    """
    values = (values if values.ndim == ndim else values[:, None]).float()
    if linear and values.shape[2:] != grid:
        # The reference aligns the corners in 2D and does not in 3D.
        mode = {"mode": "bilinear", "align_corners": True} if ndim == 4 else {"mode": "trilinear"}
        values = F.interpolate(values, size=tuple(grid), **mode)
    values = resize_nearest(values, grid).flatten()
    return values if linear else values.long()


def _rows(feature: Tensor, index: Tensor) -> Tensor:
    """Vectors (n, C) float32 of (B, C, *grid) at flat indices (n,) over batch and voxels; no copy
    of the whole map.
    """
    voxels = feature[0, 0].numel()
    return feature.flatten(2)[index // voxels, :, index % voxels].float()


def _indices(masks: Sequence[Tensor]) -> list[Tensor]:
    """Indices (n,) int64 of the True entries of each mask (N,), for the CPU: their number is a
    shape.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    return [mask.nonzero_static(size=count)[:, 0] for mask, count in zip(masks, counts)]


def _draw(
    rows: Tensor, positions: Tensor | None, wanted: int, generator: torch.Generator | None
) -> Tensor:
    """`wanted` entries of rows[positions] with replacement, or all of them if there are fewer; None
    for all `rows`.
    """
    count = len(rows if positions is None else positions)
    if count >= wanted:
        drawn = _integers(count, wanted, generator)
        positions = drawn if positions is None else positions[drawn]
    return _at(rows, positions)


def _at(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[moved(positions, rows.device)]


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _rand(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform in [0, 1) on `device`, drawn there unless the generator is of another."""
    source = device if generator is None else generator.device
    return moved(torch.rand(tuple(shape), generator=generator, device=source, dtype=dtype), device)


def _integers(high: int, count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(high, (count,), generator=generator, device=_device(generator))


def _permutation(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator, device=_device(generator))


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    draw = torch.rand((), dtype=torch.float64, generator=generator, device=_device(generator))
    return low + (high - low) * draw.item()


# --- cross distillation ---


def comparison_mask(ce_s: Tensor, ce_fp: Tensor) -> Tensor:
    """M = [ce_s < ce_fp], bool: where the image-perturbed view fits the pseudo-label better;
    equality counts as not.
    """
    return ce_s < ce_fp


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=1)


def _divergence(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """T^2 q (log q - log p), q of the teacher and p of the student; gradient to p only."""
    divergence = F.kl_div(log_p, log_q.detach(), reduction="none", log_target=True)
    return divergence if temperature == 1 else temperature**2 * divergence


class _MutualCosine(torch.autograd.Function):
    """Cosine of two vectors per voxel, with the gradient to each only where it learns.

    a, b: (B, c, *grid) float32; a_learns, b_learns: (B, *grid) bool. Returns (B, *grid). A vector
    of norm below `eps` counts as 0 and gets no gradient (`unit_vectors`). Written out because the
    maps have c channels at full resolution: autograd would keep and rewrite a dozen of them, here
    the inputs are all that is kept.
    """

    @staticmethod
    def forward(ctx, a, b, a_learns, b_learns, eps=1e-6):
        norms = [x.square().sum(1).sqrt_() for x in (a, b)]
        inverse_a, inverse_b = (
            torch.where(norm < eps, 0.0, 1.0 / norm.clamp_min(eps)) for norm in norms
        )
        cosine = (a * b).sum(1).mul_(inverse_a).mul_(inverse_b)
        ctx.save_for_backward(a, b, a_learns, b_learns, inverse_a, inverse_b, cosine)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, a_learns, b_learns, inverse_a, inverse_b, cosine = ctx.saved_tensors

        def gradient(own, other, inverse, other_inverse, learns):
            # d cosine / d own = (other / |other| - cosine own / |own|) / |own|
            scaled = grad.where(learns, 0.0) * inverse
            result = other * (scaled * other_inverse).unsqueeze(1)
            return result.addcmul_(own, (scaled * cosine * inverse).unsqueeze(1), value=-1)

        to_a = gradient(a, b, inverse_a, inverse_b, a_learns) if ctx.needs_input_grad[0] else None
        to_b = gradient(b, a, inverse_b, inverse_a, b_learns) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None, None


def cross_distillation(
    logits_s: Tensor,
    logits_fp: Tensor,
    features_s: Tensor,
    features_fp: Tensor,
    s_better: Tensor,
    valid: Tensor,
    temperature: float = 1.0,
    preset: str = "clean",
    feature_tau: float | None = None,
    detach_better: bool | None = None,
) -> dict[str, Tensor]:
    """CKD: unweighted terms `pixel_s_to_fp`, `pixel_fp_to_s`, `feature_s_to_fp`, `feature_fp_to_s`
    (teacher first).

    logits: (B, C, *spatial). features: (B, c, *grid). s_better: M of `comparison_mask`; valid: V,
    confidence above its threshold; both (B, *spatial) or (B, 1, *spatial), bool or 0/1. View s
    teaches where M and V hold, view fp where V holds alone. Each term is a mean over the voxels
    where its teacher teaches, and 0 with a graph if there are none. Pixel terms: T^2 / C KL(teacher
    || student), gradient to the student only. Feature terms: 1 - cosine / feature_tau, masks
    resized to the grid by nearest neighbour.
    feature_tau: None follows the preset, 1 if clean (terms in [0, 2]), 0.07 as released.
    detach_better: hold the teaching view's feature constant; None follows the preset, True if
    clean.
    """
    check_choice("cross_distillation", "preset", preset, PRESETS)
    if feature_tau is None:
        feature_tau = 1.0 if preset == "clean" else 0.07
    if detach_better is None:
        detach_better = preset == "clean"
    check_positive("cross_distillation", temperature=temperature, feature_tau=feature_tau)
    s_better, valid = (without_channel(mask, logits_s).bool() for mask in (s_better, valid))
    masks = {"s_to_fp": s_better & valid, "fp_to_s": ~s_better & valid}
    log_probs = {"s": _log_probs(logits_s, temperature), "fp": _log_probs(logits_fp, temperature)}
    terms = {}
    for direction, mask in masks.items():
        teacher, student = direction.split("_to_")
        divergence = _divergence(log_probs[student], log_probs[teacher], temperature).mean(1)
        terms[f"pixel_{direction}"] = _masked_mean(divergence, mask)

    grid = features_s.shape[2:]
    if masks["s_to_fp"].shape[1:] != grid:
        masks = {
            name: resize_nearest(mask[:, None].float(), grid)[:, 0] > 0
            for name, mask in masks.items()
        }
    learns = {"s": masks["fp_to_s"], "fp": masks["s_to_fp"]}
    if not detach_better:
        learns = dict.fromkeys(learns, learns["s"] | learns["fp"])
    cosine = _MutualCosine.apply(features_s.float(), features_fp.float(), learns["s"], learns["fp"])
    distance = 1.0 - cosine / feature_tau
    return terms | {
        f"feature_{direction}": _masked_mean(distance, mask) for direction, mask in masks.items()
    }


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


# --- symmetric CutMix ---


def draw_box(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    fraction: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    reject: bool = False,
) -> tuple[slice, ...]:
    """A random box inside a 2D or 3D `shape`, one slice per axis, none empty.

    fraction: range of the box's share of the image; ratio: range of its proportions r; both
    uniform. 2D: extents sqrt(a r) and sqrt(a / r) for area a, r drawn among the values that fit
    (where none of the range fits, the nearest that does). 3D: (v / r)^(1/3), (v r)^(1/3), v^(1/3)
    for volume v, each clipped to its axis. Position uniform among those inside.
    reject: UniMatch's rule. The first corner is uniform over the whole image, and proportions and
    corner are drawn again, the size is not, until the box lies inside. So long boxes are rarer, and
    the middle of the image is covered more often.
    """
    if len(shape) not in (2, 3):
        raise ValueError(f"draw_box: the shape must have 2 or 3 axes, got {tuple(shape)}")
    size = math.prod(shape) * _uniform(*fraction, generator)
    while True:
        extents = _box_extents(shape, size, ratio, generator)
        rooms = [side if reject else side - n + 1 for side, n in zip(shape, extents)]
        starts = [int(_integers(room, 1, generator)) for room in rooms]
        stops = [start + n for start, n in zip(starts, extents)]
        if all(stop <= side for stop, side in zip(stops, shape)):
            return tuple(slice(*ends) for ends in zip(starts, stops))


def _box_extents(
    shape: Sequence[int], size: float, ratio: tuple[float, float], generator: torch.Generator | None
) -> list[int]:
    """Extents of a box of `size` pixels or voxels, with proportions drawn from `ratio`; see
    `draw_box`.
    """
    if len(shape) == 2:
        height, width = shape
        # Extents are rounded down, so they fit as long as they stay below the side plus one.
        fits = (size / (width + 1) ** 2, (height + 1) ** 2 / size)
        low, high = (min(max(bound, fits[0]), fits[1]) for bound in ratio)
        r = _uniform(low, high, generator)
        wanted = (math.sqrt(size * r), math.sqrt(size / r))
    else:
        r = _uniform(*ratio, generator)
        wanted = ((size / r) ** (1 / 3), (size * r) ** (1 / 3), size ** (1 / 3))
    return [min(max(int(extent), 1), side) for side, extent in zip(shape, wanted)]


def draw_boxes(
    batch: int, shape: Sequence[int], prob: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Mask (batch, *shape) bool on the CPU: for each sample, with probability `prob`, a box of its
    own (`draw_box`), in 2D by UniMatch's rule.
    """
    mask = torch.zeros(batch, *shape, dtype=torch.bool)
    for sample in mask:
        if _uniform(0.0, 1.0, generator) < prob:
            sample[draw_box(shape, generator, reject=len(shape) == 2)] = True
    return mask


def draw_exchange(
    batch: int, shape: Sequence[int], prob: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Which samples exchange which box: partner indices (batch,) int64 and mask (batch, *shape)
    bool, on the CPU.

    The batch is paired at random (an odd one out is its own partner); each pair exchanges one box
    with probability `prob`, the same for both members. `shape`: the spatial sizes.
    """
    partner = torch.arange(batch)
    mask = torch.zeros(batch, *shape, dtype=torch.bool)
    order = _permutation(batch, generator).tolist()
    for a, b in zip(order[::2], order[1::2]):
        partner[a], partner[b] = b, a
        if _uniform(0.0, 1.0, generator) < prob:
            box = draw_box(shape, generator)
            mask[(a, *box)] = mask[(b, *box)] = True
    return partner, mask


def exchange(values: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, *spatial) or (B, C, *spatial) of any dtype, with those of the partner where
    `mask` (B, *spatial).
    """
    partner, mask = moved(partner, values.device), moved(mask, values.device)
    if values.ndim == mask.ndim + 1:
        mask = mask[:, None]
    return torch.where(mask, values[partner], values)


def symmetric_cutmix(
    weak: Tensor,
    strong: Tensor,
    pred: Tensor,
    conf: Tensor,
    prob: float = 0.5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exchange boxes within random pairs of the unlabelled batch; the same boxes for all four
    tensors.

    weak, strong: the two views (B, C, *spatial), 2D or 3D, of the same geometry. pred, conf:
    pseudo-label and its confidence (`pseudo_label`), (B, *spatial) or (B, 1, *spatial). Returns the
    four mixed: new tensors of the same dtypes and shapes. prob: probability that a pair is mixed.
    """
    partner, mask = (
        moved(t, weak.device) for t in draw_exchange(len(weak), weak.shape[2:], prob, generator)
    )
    mixed = (exchange(values, partner, mask) for values in (weak, strong, pred, conf))
    return tuple(mixed)
