"""Overlays of label maps on slices, for logs and for pictures of results.

`views` gives bare pictures, voxel by voxel. `panel`, `compared` and `planes` give what people look
at: enlarged pictures with captions, a title, Dice where it is known, and a legend.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")  # no display on servers

SIDE = 480  # pixels that the longer side of a small picture is enlarged to, about
LOGGED = 240  # the same for the pictures of a log, of which there are many


def palette(num_classes: int) -> np.ndarray:
    """RGB in [0, 1] for ids 0..num_classes-1, (num_classes, 3); 0 is black. Colour-blind safe for
    few classes.
    """
    # Okabe and Ito's seven colours first, then those of Tol's muted scheme that differ from them.
    okabe = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
    muted = ["#882255", "#DDCC77", "#332288", "#CC6677", "#44AA99", "#999933", "#DDDDDD"]
    colours = [matplotlib.colors.to_rgb(c) for c in okabe + muted]
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
    image: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    alpha: float = 0.45,
    side: int = 0,
    aspect: float = 1.0,
) -> np.ndarray:
    """Grey axial RAS slice (H, W) of any range with label (H, W) in colour -> (h, w, 3) uint8, (W,
    H, 3) unless it is enlarged.

    Shown as radiologists do: the patient's right on the left, front up. The class borders are drawn
    opaque, so that thin structures stay visible. side, aspect: see `enlarged`.
    """
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None].repeat(3, -1)
    grey, label = (np.rot90(each)[:, ::-1] for each in (grey, label))
    return _coloured(grey, label, num_classes, alpha, enlarged(grey.shape, side, aspect))


def enlarged(shape: Sequence[int], side: int, aspect: float = 1.0) -> tuple[int, int]:
    """Height and width to show a picture (H, W, ...) at: both a whole multiple of the pixels, so
    that the longer is about `side` or more; but the height also by `aspect`, the height of a pixel
    over its width. side: 0 does not enlarge.
    """
    height, width = shape[0] * aspect, shape[1]
    factor = max(1, round(side / max(height, width)))
    return max(1, round(height * factor)), width * factor


def _coloured(
    shown: np.ndarray,
    ids: np.ndarray,
    num_classes: int,
    alpha: float,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Colours (H, W, 3) in [0, 1] with the classes of ids (H, W) over them, uint8: a tint of
    `alpha` inside, and an opaque outline.

    The outline lies on the pixels of a class that touch another one by a side, so it is closed.
    size: (h, w) to show them at, by default their own. The image becomes smooth; the ids keep their
    edges, and the outline has two pixels of the display.
    """
    thickness = 1
    if size is not None and size != ids.shape:
        picture = Image.fromarray((shown * 255).round().astype(np.uint8))
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        shown = np.asarray(picture) / 255
        rows = np.arange(size[0]) * ids.shape[0] // size[0]
        columns = np.arange(size[1]) * ids.shape[1] // size[1]
        ids = ids[rows][:, columns]
        thickness = 2
    outline = np.zeros(ids.shape, bool)
    for step in range(1, thickness + 1):
        around = np.pad(ids, step, mode="edge")
        inner = slice(step, -step)
        outline |= ids != around[: -2 * step, inner]
        outline |= ids != around[2 * step :, inner]
        outline |= ids != around[inner, : -2 * step]
        outline |= ids != around[inner, 2 * step :]
    weight = np.where(ids > 0, np.where(outline, 1.0, alpha), 0.0)[..., None]
    mixed = shown * (1 - weight) + palette(num_classes)[ids] * weight
    return (mixed * 255).round().astype(np.uint8)


def fullest_slice(label: np.ndarray, axis: int = 2) -> int:
    """Index along `axis` of the slice with the most classes, and among those the most labelled
    voxels; the middle one where nothing is labelled.
    """
    moved = np.moveaxis(label, axis, 0)
    if not label.any():
        return len(moved) // 2
    score = [(len(np.unique(s)), np.count_nonzero(s)) for s in moved]
    return max(range(len(score)), key=score.__getitem__)


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Pictures of one height in a row with a white gap."""
    bar = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (picture, bar)]
    return np.concatenate(row[:-1], axis=1)


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
        pictures.append(view(image, ids, num_classes))
    return side_by_side(pictures)


def view(image: np.ndarray, ids: np.ndarray | None, num_classes: int, side: int = 0) -> np.ndarray:
    """One picture (C, H, W) with the classes of ids (H, W) over it, (h, w, 3) uint8; ids of no
    class are shown as background. side: see `enlarged`.
    """
    ids = np.zeros(image.shape[1:], int) if ids is None else ids.astype(int)
    ids = np.where(ids < num_classes, ids, 0)  # of images without a label
    low, high = (0.0, 1.0) if len(image) == 3 else np.percentile(image, [0.5, 99.5])
    shown = np.clip((np.moveaxis(image[:3], 0, -1) - low) / max(high - low, 1e-6), 0, 1)
    if shown.shape[-1] == 1:
        shown = shown.repeat(3, -1)
    return _coloured(shown, ids, num_classes, 0.3, enlarged(ids.shape, side))


# --- pictures for people ---


def panel(
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    names: Sequence[str],
    case: str = "",
    dice: Sequence[float] = (),
    side: int = LOGGED,
) -> np.ndarray:
    """A RAS scan (C, H, W, D), of which the first channel is shown, with its label and prediction
    (ids, or regions (K, H, W, D)) at the fullest slice, as a `sheet`; ids of no class are shown as
    background.

    names: of the ids 1, 2, ... dice: of the prediction, for each class; NaN is left out.
    """
    ids = [regions_to_ids(v) if v.ndim == 4 else v for v in (label, prediction)]
    ids = [np.where(volume <= len(names), volume, 0) for volume in ids]
    z = fullest_slice(ids[0])
    grey, shown = np.array(image[0][..., z]), [volume[..., z] for volume in ids]
    layers = [np.zeros_like(shown[0]), *shown]
    pictures = [overlay(grey, each, len(names) + 1, side=side) for each in layers]
    captions = ["image", "ground truth", "prediction" + _dice_text(dice)]
    return sheet(pictures, captions, _titled(case, z), named_classes(shown, names))


def compared(
    image: np.ndarray,
    label: np.ndarray | None,
    prediction: np.ndarray,
    names: Sequence[str],
    case: str = "",
    dice: Sequence[float] = (),
    side: int = LOGGED,
) -> np.ndarray:
    """An image (C, H, W) or (C, H, W, D), with its label, if it has one, and with a prediction, as
    a `sheet`; a volume at the fullest slice of the first of these. names, dice: as in `panel`.
    """
    layers = {"image": None, "ground truth": label, "prediction" + _dice_text(dice): prediction}
    layers = {name: ids for name, ids in layers.items() if name == "image" or ids is not None}
    ids, z = list(layers.values())[1:], None
    if image.ndim == 4:
        z = fullest_slice(ids[0].astype(int))
        image, ids = image[..., z], [volume[..., z] for volume in ids]
    ids = [np.where(each <= len(names), each, 0) for each in ids]
    pictures = [view(image, each, len(names) + 1, side) for each in (None, *ids)]
    return sheet(pictures, list(layers), _titled(case, z), named_classes(ids, names))


def planes(
    image: np.ndarray,
    ids: np.ndarray,
    spacing: Sequence[float],
    names: Mapping[int, str],
    case: str = "",
) -> np.ndarray:
    """A RAS scan (H, W, D) and its segmentation in three planes as a `sheet`, each at its fullest
    slice.

    spacing: of the voxels, in mm. names: of the ids; others are shown as background.
    """
    ids = np.where(np.isin(ids, [k for k in names if k > 0]), ids, 0)
    count = max(names, default=0) + 1
    pictures, captions = [], []
    for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        place = fullest_slice(ids, axis)
        across, up = (size for other, size in enumerate(spacing) if other != axis)
        layer = np.take(ids, place, axis)
        grey = np.take(image, place, axis)
        pictures.append(overlay(grey, layer, count, 0.3, SIDE, float(up / across)))
        captions.append(f"{name}, slice {place}")
    found = [int(k) for k in np.unique(ids) if k > 0]
    return sheet(pictures, captions, case, {k: names[k] for k in found})


def as_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume (H, W, D) turned to the axes RAS, and the size of its voxels then, in mm. affine:
    voxel to RAS+ in mm.
    """
    axes = nib.orientations.io_orientation(affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    turned = [sizes[np.flatnonzero(axes[:, 0] == axis)[0]] for axis in range(3)]
    return nib.orientations.apply_orientation(volume, axes), np.array(turned)


def shown_range(image: np.ndarray, dataset) -> np.ndarray:
    """An image as the network of `dataset` sees it: within its window, if it has one."""
    if getattr(dataset, "intensity", "") == "window":
        return np.clip(image, *dataset.window)
    return image


def named_classes(layers: Sequence[np.ndarray], names: Sequence[str]) -> dict[int, str]:
    """Id -> name of the classes 1, 2, ... that occur in maps of ids."""
    found = {int(k) for layer in layers for k in np.unique(layer)}
    return {k: name for k, name in enumerate(names, 1) if k in found}


def _titled(case: str, z: int | None) -> str:
    return case if z is None else f"{case}, slice {z}".removeprefix(", ")


def _dice_text(dice: Sequence[float]) -> str:
    known = [value for value in dice if value is not None and not np.isnan(value)]
    return f"\nDice of the case {100 * np.mean(known):.1f} %" if known else ""


def sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    title: str = "",
    classes: Mapping[int, str] | None = None,
) -> np.ndarray:
    """Pictures (h, w, 3) uint8 in a row, each under its caption, on white: above them a title,
    below them a legend of the classes, id -> name. uint8 (h, w, 3).
    """
    widths = [picture.shape[1] for picture in pictures]
    size = max(13, round(max(widths) / 34))  # of the letters: large pictures are shown smaller
    font, gap = _font(size), size // 2
    line = round(1.3 * size)
    width = sum(widths) + gap * (len(pictures) + 1)
    titles = _wrapped(title, _font(size, "-Bold"), width - 2 * gap)
    wrapped = [_wrapped(text, font, w) for text, w in zip(captions, widths)]
    legend = _legend_places(classes or {}, font, width, gap, line)
    above = gap + line * len(titles) + line * max(map(len, wrapped)) + gap
    below = above + max(picture.shape[0] for picture in pictures) + gap
    height = below + (legend[-1][2] + line + gap if legend else 0)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for number, text in enumerate(titles):
        draw.text((gap, gap + number * line), text, "black", _font(size, "-Bold"))
    left = gap
    for picture, lines in zip(pictures, wrapped):
        top = above - gap // 2 - line * len(lines)
        for number, text in enumerate(lines):
            draw.text((left, top + number * line), text, "black", font)
        page.paste(Image.fromarray(picture), (left, above))
        left += picture.shape[1] + gap
    colours = (palette(max(classes or {}, default=0) + 1) * 255).round().astype(int)
    for k, x, y, text in legend:
        box = (x, below + y + size // 8, x + size, below + y + size + size // 8)
        draw.rectangle(box, tuple(map(int, colours[k])), "black")
        draw.text((x + size + gap, below + y), text, "black", font)
    return np.asarray(page)


def _font(size: int, weight: str = "") -> ImageFont.FreeTypeFont:
    """The font that Matplotlib brings along, which has the letters of most European languages."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(str(folder / f"DejaVuSans{weight}.ttf"), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines that fit the width; a word that does not fit is cut."""
    lines = []
    for paragraph in text.split("\n") if text else []:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = _cut(longer, font, width)
        lines.append(line)
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _legend_places(
    classes: Mapping[int, str], font: ImageFont.FreeTypeFont, width: int, gap: int, line: int
) -> list[tuple[int, int, int, str]]:
    """(id, x, y, text) of each class: in rows from the left that fit the width."""
    places = []
    x, y = gap, 0
    for k, name in classes.items():
        text = _cut(name, font, width - 4 * gap - line)
        needed = round(line + gap + font.getlength(text) + 2 * gap)
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((k, x, y, text))
        x += needed
    return places
