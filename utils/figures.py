"""Overlays of label maps on slices, for logs and for pictures of results."""

from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on servers


def palette(num_classes: int) -> np.ndarray:
    """RGB in [0, 1] for ids 0..num_classes-1, (num_classes, 3); 0 is black. Colour-blind safe for
    few classes.
    """
    # Okabe and Ito's eight colours first, then the paler half of tab20.
    okabe = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    colours = [matplotlib.colors.to_rgb(c) for c in okabe]
    colours += [tuple(c[:3]) for c in matplotlib.colormaps["tab20"](np.linspace(0, 1, 20))]
    repeated = [colours[i % len(colours)] for i in range(max(num_classes - 1, 0))]
    return np.array([(0.0, 0.0, 0.0), *repeated])


def regions_to_ids(regions: np.ndarray) -> np.ndarray:
    """Overlapping regions (K, *spatial), 0 or 1 (others count as 0), -> one id per voxel for
    display; smaller regions are painted over larger.
    """
    regions = np.asarray(regions) == 1
    ids = np.zeros(regions.shape[1:], np.uint8)
    for k in np.argsort([-np.count_nonzero(region) for region in regions]):
        ids[regions[k]] = k + 1
    return ids


def overlay(
    image: np.ndarray, label: np.ndarray, num_classes: int, alpha: float = 0.45
) -> np.ndarray:
    """Grey axial RAS slice (H, W) of any range with label (H, W) in colour -> (W, H, 3) uint8.

    Shown as radiologists do: the patient's right on the left, front up. The class borders are drawn
    opaque, so that thin structures stay visible.
    """
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, -1)
    mixed = _coloured(grey, label, num_classes, alpha)
    return np.rot90(mixed)[:, ::-1]


def _coloured(shown: np.ndarray, ids: np.ndarray, num_classes: int, alpha: float) -> np.ndarray:
    """Colours (H, W, 3) in [0, 1] with the classes of ids (H, W) over them, uint8: a tint of
    `alpha` inside, and an opaque outline.

    The outline lies on the pixels of a class that touch another one by a side, so it is closed.
    """
    around = np.pad(ids, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    outline = np.any([ids != neighbour for neighbour in neighbours], axis=0)
    weight = np.where(ids > 0, np.where(outline, 1.0, alpha), 0.0)[..., None]
    mixed = shown * (1 - weight) + palette(num_classes)[ids] * weight
    return (mixed * 255).round().astype(np.uint8)


def fullest_slice(label: np.ndarray, axis: int = 2) -> int:
    """Index along `axis` of the slice with the most classes, and among those the most labelled
    voxels.
    """
    moved = np.moveaxis(label, axis, 0)
    score = [(len(np.unique(s)), np.count_nonzero(s)) for s in moved]
    return max(range(len(score)), key=score.__getitem__)


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Pictures of one height in a row with a white gap."""
    bar = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, bar)]
    return np.concatenate(row[:-1], axis=1)


def panel(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, num_classes: int
) -> np.ndarray:
    """Image (H, W, D), label and prediction (ids, or regions (K, H, W, D)) side by side at the
    fullest slice, uint8; ids of no class are shown as background.
    """
    label, prediction = (regions_to_ids(v) if v.ndim == 4 else v for v in (label, prediction))
    label = np.where(label < num_classes, label, 0)
    z = fullest_slice(label)
    slices = (np.zeros_like(label[..., z]), label[..., z], prediction[..., z])
    return side_by_side([overlay(image[..., z], s, num_classes) for s in slices])


def as_arrays(image, ids) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Two tensors, or None in place of one, as arrays for `views`."""
    return tuple(
        None if value is None else value.detach().float().cpu().numpy() for value in (image, ids)
    )


def views(
    pairs: Sequence[tuple[np.ndarray | None, np.ndarray | None]], num_classes: int
) -> np.ndarray:
    """Pictures of (image (C, H, W) or (C, H, W, D), ids (H, W) or (H, W, D) or None) in a row,
    uint8 (h, w, 3).

    One channel is shown grey, three as colours; classes by their borders and a tint. All volumes
    show one slice, the fullest of the first ids. Without an image the ids lie on black.
    """
    labels = [ids for _, ids in pairs if ids is not None]
    z = fullest_slice(labels[0].astype(int)) if labels and labels[0].ndim == 3 else None
    pictures = []
    for image, ids in pairs:
        if image is None:
            image = np.zeros((1, *ids.shape))  # black
        if image.ndim == 4:
            middle = image.shape[-1] // 2 if z is None else z
            image, ids = image[..., middle], None if ids is None else ids[..., middle]
        ids = np.zeros(image.shape[1:], int) if ids is None else ids.astype(int)
        ids = np.where(ids < num_classes, ids, 0)  # of images without a label
        low, high = (0.0, 1.0) if len(image) == 3 else np.percentile(image, [0.5, 99.5])
        shown = np.clip((np.moveaxis(image[:3], 0, -1) - low) / max(high - low, 1e-6), 0, 1)
        pictures.append(_coloured(shown, ids, num_classes, 0.3))
    return side_by_side(pictures)


def compared(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, num_classes: int
) -> np.ndarray:
    """`views` of an image, of it with its label, and of it with a prediction."""
    return views([(image, ids) for ids in (None, label, prediction)], num_classes)
