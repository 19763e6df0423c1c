"""Labels that are not complete: voxels that nobody labelled, and cases of which some classes were
not annotated.

A voxel that nobody labelled holds UNKNOWN in the label, of regions in every channel. Which of the K
classes, or regions, the label of each sample tells is `annotated` (B, K) bool; the background is
always among them. Where the label of sample b says background, the voxel may belong to one of the
classes U_b that were not annotated. So segmentation terms compare the label with

    p~_0 = p_0 + sum_{k in U_b} p_k,    p~_k = p_k for the annotated k > 0

at labelled voxels alone, and without a Dice term of U_b. p~ is the softmax of `merged_logits`.
Regions have no background: those of U_b are left out.

Distillation terms that need no label see all voxels. For those that take one, the teacher says
which class of U_b, or the background, stands where the label says background (`completed`);
unlabelled voxels are left out.

Source of p~: Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ
segmentation", Medical Image Analysis 2021 (the marginal loss).
"""

import torch
from torch import Tensor

UNKNOWN = 255  # in labels: nobody labelled the voxel (dataloaders/cases.py marks them)


def known_voxels(label: Tensor) -> tuple[Tensor, Tensor]:
    """The label with 0 in place of UNKNOWN, and where it is known, bool; both of its shape."""
    known = label != UNKNOWN
    return label.masked_fill(~known, 0), known


def masked_mean(values: Tensor, known: Tensor | None) -> Tensor:
    """Mean of `values` where `known`, bool of their shape; 0 with a graph where nothing is. None:
    of all.
    """
    if known is None:
        return values.mean()
    return values.where(known, 0.0).sum() / known.sum().clamp(min=1)


def per_voxel(flags: Tensor, ndim: int) -> Tensor:
    """Flags (B, K) of samples and classes in the shape of a tensor of `ndim` axes."""
    return flags.view(*flags.shape, *[1] * (ndim - 2))


def merged_logits(logits: Tensor, annotated: Tensor) -> Tensor:
    """Logits (B, K, *spatial) float32 whose softmax is p~: those of classes that are not annotated
    are -inf.
    """
    logits, missing = logits.float(), ~annotated
    in_background = missing.clone()
    in_background[:, 0] = True
    inside = logits.masked_fill(~per_voxel(in_background, logits.ndim), -torch.inf)
    others = logits.masked_fill(per_voxel(missing, logits.ndim), -torch.inf)
    return torch.cat([inside.logsumexp(1, keepdim=True), others[:, 1:]], dim=1)


def labelled_part(
    logits: Tensor, label: Tensor, annotated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What losses of complete labels take: merged logits, ids without UNKNOWN, and the mask of the
    voxels that count; ids of any dtype and shape, the mask of the same.
    """
    ids, known = known_voxels(label)
    return merged_logits(logits, annotated), ids, known


def certain_label(ids: Tensor, annotated: Tensor) -> Tensor:
    """Ids (B, *spatial) with UNKNOWN also where they say background of a sample that has classes
    without annotation: what terms take that need the class itself, and have no teacher to ask.
    """
    partial = ~annotated.all(1)
    return ids.masked_fill((ids == 0) & partial.view(-1, *[1] * (ids.ndim - 1)), UNKNOWN)


def completed(
    label: Tensor, teacher_logits: Tensor, annotated: Tensor, multilabel: bool, fill: bool = False
) -> Tensor:
    """The label with what was not annotated as the teacher sees it; of the label's shape and dtype.

    Classes: label (B, 1, *spatial); where it says background, the likeliest for the teacher (B, K,
    *spatial) of the background and the classes that are not annotated. Regions: label (B, K,
    *spatial); those that are not annotated, where the teacher's sigmoid is at least 0.5. UNKNOWN
    stays, or with `fill` becomes the teacher's own prediction.
    """
    unknown = label == UNKNOWN
    if multilabel:
        predicted = (teacher_logits >= 0).to(label.dtype)
        result = torch.where(unknown | per_voxel(annotated, label.ndim), label, predicted)
    else:
        closed = annotated.clone()
        closed[:, 0] = False
        rest = teacher_logits.masked_fill(per_voxel(closed, label.ndim), -torch.inf)
        result = torch.where(label == 0, _likeliest(rest, label), label)
        predicted = _likeliest(teacher_logits, label) if fill else None
    return torch.where(unknown, predicted, result) if fill else result


def _likeliest(logits: Tensor, label: Tensor) -> Tensor:
    return logits.max(1, keepdim=True).indices.to(label.dtype)
