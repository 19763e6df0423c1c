"""Draw the figures of docs/methods.md: data flow of ACF-BCKD and of CRKD, boundary weights on a
generated scan.

    python docs/figures/draw.py  # writes acf_bckd.png, crkd.png, boundary.png beside itself
    python docs/figures/draw.py --out somewhere --only boundary

The boundary weights are those of losses/acf_bckd.py, computed on one phantom of
tools/phantoms/scans.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from scipy import ndimage

from losses.acf_bckd import boundary_shells
from losses.distance import boundary_distance_squared
from tools.phantoms.scans import btcv_phantom
from utils.figures import overlay

# Okabe and Ito's colours, told apart under every colour-vision deficiency.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#4d4d4d"
FILL = {BLUE: "#dceaf4", ORANGE: "#fdf1d6", GREEN: "#daf0e8", VERMILION: "#fbe5d8", GREY: "#eeeeee"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent,
        help="folder; default: that of this script",
    )
    parser.add_argument(
        "--only", nargs="+", choices=tuple(FIGURES), default=list(FIGURES), help="default: all"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        figure = FIGURES[name]()
        # Without the date and version that savefig would store, equal figures are equal files.
        figure.savefig(args.out / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)
        print(args.out / f"{name}.png")
    return 0


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A blank page whose data coordinates are inches."""
    figure = plt.figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.6, height: float = 0.62
) -> None:
    """A box centred at (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=FILL[colour],
            edgecolor=colour,
            linewidth=1.4,
            zorder=2,
        )
    )
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center",
        fontsize=9.5,
        color="black",
        zorder=3,
        linespacing=1.25,
    )


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = GREY,
    text: str = "",
    bend: float = 0.0,
    dashed: bool = False,
    offset: tuple[float, float] = (0.0, 0.12),
) -> None:
    """An arrow; dashed where no gradient flows back."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=colour,
            linewidth=1.3,
            zorder=1,
            linestyle=(0, (4, 2.5)) if dashed else "-",
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=1,
        )
    )
    if text:
        middle = [(a + b) / 2 + o for a, b, o in zip(start, end, offset)]
        axes.text(*middle, text, ha="center", va="center", fontsize=8.5, color=GREY)


def legend(axes: Axes, x: float, y: float) -> None:
    arrow(axes, (x, y), (x + 0.6, y))
    axes.text(x + 0.7, y, "gradient flows back", va="center", fontsize=8.5, color=GREY)
    arrow(axes, (x + 2.3, y), (x + 2.9, y), dashed=True)
    axes.text(x + 3.0, y, "constant", va="center", fontsize=8.5, color=GREY)


def acf_bckd() -> plt.Figure:
    figure, axes = canvas(10.4, 5.0)
    box(axes, 0.95, 2.5, "image patch", GREY, 1.4)
    # The teacher above, the student below, what joins them between
    box(axes, 2.9, 4.3, "teacher\n(frozen)", BLUE, 1.5)
    box(axes, 2.9, 0.7, "student", ORANGE, 1.5)
    arrow(axes, (0.95, 2.82), (2.13, 4.3), dashed=True, bend=-0.25)
    arrow(axes, (0.95, 2.18), (2.13, 0.7), bend=0.25)
    box(axes, 5.0, 4.3, "last residual block\n$f(X)$   and   $f(X)+X$", BLUE, 2.0)
    box(axes, 5.0, 0.7, "last decoder\nfeature  $F_S$", ORANGE, 1.6)
    box(axes, 7.3, 4.3, "logits  $z_T$", BLUE, 1.3)
    box(axes, 7.3, 0.7, "logits  $z_S$", ORANGE, 1.3)
    for y, colour in ((4.3, BLUE), (0.7, ORANGE)):
        dashed = y > 2
        arrow(axes, (3.65, y), (4.0 if dashed else 4.2, y), colour, dashed=dashed)
        arrow(axes, (6.0 if dashed else 5.8, y), (6.65, y), colour, dashed=dashed)
    box(axes, 5.0, 1.75, "attention  $A$", ORANGE, 1.5, 0.5)
    arrow(axes, (5.0, 1.01), (5.0, 1.5), ORANGE)
    box(axes, 4.2, 2.95, "AFD\n$A\\odot F_S$  ~  $f(X)+X$", VERMILION, 1.75)
    box(axes, 6.05, 2.95, "CFD\nconv$(A)$  ~  $f(X)$", VERMILION, 1.6)
    arrow(axes, (4.75, 2.0), (4.3, 2.64), ORANGE)
    arrow(axes, (5.25, 2.0), (5.9, 2.64), ORANGE)
    arrow(axes, (4.6, 3.99), (4.3, 3.26), BLUE, dashed=True)
    arrow(axes, (5.4, 3.99), (5.9, 3.26), BLUE, dashed=True)
    box(axes, 7.75, 2.95, "HBD\non label boundaries", VERMILION, 1.55)
    box(axes, 9.4, 2.95, "SBD\nby distance", VERMILION, 1.3)
    arrow(axes, (7.4, 3.99), (7.65, 3.26), BLUE, dashed=True)
    arrow(axes, (7.95, 4.2), (9.3, 3.26), BLUE, dashed=True, bend=-0.1)
    arrow(axes, (7.4, 1.01), (7.65, 2.64), ORANGE)
    arrow(axes, (7.95, 0.85), (9.3, 2.64), ORANGE, bend=0.2)
    box(axes, 9.4, 0.7, "$L_{seg}$", VERMILION, 1.0)
    arrow(axes, (7.95, 0.7), (8.9, 0.7), ORANGE)
    box(axes, 8.3, 2.0, "label", GREEN, 0.7, 0.4)
    arrow(axes, (8.25, 2.2), (8.05, 2.64), GREEN, dashed=True)
    arrow(axes, (8.5, 1.8), (9.2, 1.01), GREEN, dashed=True)
    axes.text(9.25, 4.35, "$\\alpha(t)$ HBD + $(1-\\alpha(t))$ SBD", ha="center", fontsize=9.5)
    legend(axes, 0.3, 0.16)
    return figure


def crkd() -> plt.Figure:
    figure, axes = canvas(10.4, 5.6)
    rows = {"l": 4.9, "s": 3.0, "fp": 1.1}
    box(axes, 0.95, rows["l"], "labelled\n$x_l$,  $y_l$", GREEN, 1.35)
    box(axes, 0.95, rows["s"], "strong view\n$x_s$", GREY, 1.35)
    box(axes, 0.95, rows["fp"], "weak view\n$x_w$", GREY, 1.35)
    box(axes, 2.75, 2.05, "symmetric\nCutMix", GREY, 1.3)
    arrow(axes, (1.63, rows["s"]), (2.4, 2.36), dashed=True)
    arrow(axes, (1.63, rows["fp"]), (2.4, 1.74), dashed=True)
    for name, y in rows.items():
        text = {"l": "network", "s": "network", "fp": "network, encoder\nchannels dropped"}[name]
        box(axes, 4.75, y, text, ORANGE, 1.55)
        box(axes, 6.65, y, f"$P_{{{name}}}$,  $F_{{{name}}}$", ORANGE, 1.2)
        arrow(axes, (5.53, y), (6.05, y), ORANGE)
    for low, high in ((rows["fp"], rows["s"]), (rows["s"], rows["l"])):
        axes.plot(
            [4.75, 4.75],
            [low + 0.31, high - 0.31],
            color=ORANGE,
            linewidth=1.2,
            linestyle=":",
            zorder=1,
        )
    axes.text(4.85, 3.95, "the same weights", va="center", fontsize=8.5, color=GREY)
    arrow(axes, (1.63, rows["l"]), (3.97, rows["l"]), dashed=True)
    arrow(axes, (3.1, 2.36), (3.97, rows["s"]), dashed=True)
    arrow(axes, (3.1, 1.74), (3.97, rows["fp"]), dashed=True)
    box(axes, 2.75, 0.3, "pseudo-label  $y_u$, confidence\n$c_u$  (no gradient)", BLUE, 2.3, 0.5)
    arrow(axes, (0.95, 0.79), (1.6, 0.3), BLUE, dashed=True, bend=0.3)
    arrow(axes, (2.75, 0.55), (2.75, 1.74), BLUE, dashed=True)
    box(axes, 8.9, rows["l"], "$L_{sup}$:  CE + Dice with $y_l$", VERMILION, 2.3, 0.5)
    box(axes, 8.9, 4.0, "CSD:  $F_l$ anchors,\n$F_s$, $F_{fp}$ contrast", VERMILION, 2.3)
    box(axes, 8.9, 3.0, "LEC:  $P_s$, $P_{fp}$ to their\nconfident mean", VERMILION, 2.3)
    box(axes, 8.9, 2.05, "CKD:  the better view\nteaches the other", VERMILION, 2.3)
    box(axes, 8.9, 1.1, "$L_{pseudo}$:  CE + Dice\nwith $y_u$ where confident", VERMILION, 2.3)
    for start, end in (
        ((7.25, 4.9), (7.75, 4.9)),
        ((7.25, 4.8), (7.75, 4.1)),
        ((7.25, 3.15), (7.75, 3.9)),
        ((7.25, 3.0), (7.75, 3.0)),
        ((7.25, 2.9), (7.75, 2.2)),
        ((7.25, 1.3), (7.75, 2.8)),
        ((7.25, 1.2), (7.75, 1.95)),
        ((7.25, 1.1), (7.75, 1.1)),
        ((7.25, 2.8), (7.75, 1.3)),
        ((7.25, 1.38), (7.75, 3.8)),
    ):
        arrow(axes, start, end, ORANGE)
    arrow(axes, (3.9, 0.3), (8.9, 0.79), BLUE, dashed=True, bend=0.12)
    legend(axes, 5.9, 5.42)
    return figure


def boundary() -> plt.Figure:
    """One slice: image and label, HBD's weight of a voxel, SBD's squared distances for a label with
    a fault.
    """
    image, label = btcv_phantom(0)
    ids = torch.from_numpy(label.astype(np.int64))
    masks = torch.stack([ids == k for k in range(14)])  # (K, H, W, D)
    shells = boundary_shells(masks[None])[0].float()
    weight = (shells / shells.sum((1, 2, 3), keepdim=True).clamp(min=1)).sum(0).numpy() / len(masks)
    liver = label == 6
    student = ndimage.binary_dilation(ndimage.binary_erosion(liver, iterations=3), iterations=1)
    field = boundary_distance_squared(
        torch.from_numpy(liver)[None], torch.from_numpy(student)[None]
    )[0].numpy()
    at = int(liver.sum((0, 1)).argmax())

    def shown(volume: np.ndarray) -> np.ndarray:
        return np.rot90(volume[:, :, at])[:, ::-1]  # as utils.figures.overlay

    image = np.clip((image + 175) / 425, 0, 1)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11.5, 3.3), layout="constrained", facecolor="white"
    )
    left.imshow(overlay(image[:, :, at], label[:, :, at], 14))
    left.set_title("generated scan and label\n", fontsize=10)
    middle.imshow(shown(image), cmap="gray")
    drawn = middle.imshow(np.ma.masked_equal(shown(weight), 0), cmap="viridis", norm=LogNorm())
    middle.set_title(
        "HBD: weight of a voxel, the sum over\nits boundaries of $1 / (K\\,|\\partial_k|)$",
        fontsize=10,
    )
    figure.colorbar(drawn, ax=middle, shrink=0.75)
    drawn = right.imshow(shown(field), cmap="cividis", norm=LogNorm(vmin=1))
    right.contour(shown(liver), [0.5], colors="white", linewidths=1.2)
    right.contour(shown(student), [0.5], colors=ORANGE, linewidths=1.2, linestyles="--")
    right.set_title(
        "SBD, liver: $D(P>0.5)^2 + D(G)^2$ in voxels²\n(white: teacher, dashed: student)",
        fontsize=10,
    )
    figure.colorbar(drawn, ax=right, shrink=0.75)
    for axes in (left, middle, right):
        axes.set_axis_off()
    return figure


FIGURES = {"acf_bckd": acf_bckd, "crkd": crkd, "boundary": boundary}

if __name__ == "__main__":
    sys.exit(main())
