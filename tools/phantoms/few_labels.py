"""Generated images for the semi-supervised demos and tests: ACDC, LA, ISIC-2018 and Kvasir-SEG in
kind.

No patient data. As in tools/phantoms/scans.py structures are signed distances (negative inside)
painted one over the other. Cases differ in place, size, orientation, contrast and texture, and
unlabelled structures share intensities with labelled ones (vessels and chambers with the atrium,
liver and muscle with the myocardium, freckles and hair with the lesion, folds with the polyp), so
that intensity alone does not tell the class.

`seed` is anything that `np.random.default_rng` takes; the tools pass the pair (seed, case).
"""

import numpy as np
from scipy import ndimage

from tools.phantoms.scans import Canvas, smooth_noise, smooth_union

ACDC_LABELS = {"right_ventricle": 1, "myocardium": 2, "left_ventricle": 3}
FRAMES = ("frame01", "frame02")  # end of diastole, end of systole
ACDC_FIELD = (300.0, 250.0)  # mm, rows and columns
ACDC_STEP = 9.0  # mm between slices
LA_FIELD = (109.0, 89.0, 55.0)  # mm: left-right, front-back, up-down


def noise2d(rng, shape, grain):
    """Smooth random field (H, W) with zero mean and unit standard deviation; `grain` in pixels."""
    return smooth_noise(rng, (*shape, 1), (1, 1, 1), grain)[..., 0]


def cover(distance, softness=1.0):
    """How much of a pixel lies inside, 0..1; the edge is `softness` wide."""
    return np.clip(0.5 - distance / softness, 0, 1)


def blend(image, amount, value):
    """`image` with `value` painted over it by `amount` (broadcast)."""
    return image + amount * (value - image)


# ACDC


class Heart:
    """One patient: everything random is drawn here, so that both frames show the same anatomy.

    Arrays are (H, W, S); t runs from 0 at the valves to 1 at the apex; mm throughout.
    """

    def __init__(self, rng, shape):
        slices, height, width = shape
        self.shape = (height, width, slices)
        self.pixel = max(ACDC_FIELD[0] / height, ACDC_FIELD[1] / width)
        spacing = (self.pixel, self.pixel, ACDC_STEP)
        rows, columns = ((np.arange(n) - (n - 1) / 2) * self.pixel for n in (height, width))
        warp = [smooth_noise(rng, self.shape, spacing, 80.0) for _ in range(2)]
        self.y = rows[:, None, None] + 3.0 * warp[0]
        self.x = columns[None, :, None] + 3.0 * warp[1]
        first, last = rng.uniform(-0.02, 0.06), rng.uniform(0.9, 1.0)
        self.t = np.linspace(first, last, slices)[None, None, :]
        self.lumps, self.grain = (
            smooth_noise(rng, self.shape, spacing, scale) for scale in (25.0, 7.0)
        )
        self.coil, self.swell = (
            smooth_noise(rng, self.shape, spacing, scale) for scale in (160.0, 70.0)
        )
        self.noise = rng.standard_normal((2, 2, *self.shape), np.float32)
        self.centre = rng.uniform(-14, 14, 2) + (-14, 4)  # row, column
        self.drift = rng.uniform((-4, 8), (10, 22))  # row, column, from base to apex
        # from the left ventricle to the right one; 180 is left
        self.turn = np.radians(rng.uniform(150, 205))
        self.radius = rng.uniform(19, 28)  # of the left cavity, end of diastole
        self.wall = rng.uniform(7.0, 10.5)
        # radius of the left cavity at the end of systole, as a share
        self.ejection = rng.uniform(0.62, 0.8)
        self.oval = rng.uniform(-0.07, 0.07, 2)
        # half axes of the right ventricle: outwards, along the septum
        self.right = rng.uniform((26, 38), (33, 46))
        self.papillary = rng.uniform(-0.4, 0.4, 2) + (0.9, -1.7)  # angles
        self.papillary_size = rng.uniform(3.0, 5.0, 2)
        self.fat = rng.uniform(8, 20)
        self.body = rng.uniform((140, 100), (160, 118))
        self.diaphragm = rng.uniform(38, 62)
        self.stomach = rng.uniform((70, 20), (105, 60))
        self.level = {
            "fat": rng.uniform(0.7, 0.95),
            "muscle": rng.uniform(0.14, 0.2),
            "lung": rng.uniform(0.02, 0.05),
            "blood": rng.uniform(0.45, 0.68),
            "myocardium": rng.uniform(0.17, 0.25),
            "liver": rng.uniform(0.2, 0.3),
            "stomach": rng.uniform(0.3, 0.6),
        }
        self.vessels = [
            (*rng.uniform((-110, -70), (20, 90)), rng.uniform(1.2, 3.5), rng.uniform(-1.2, 1.2, 2))
            for _ in range(30)
        ]

    def disc(self, row, column, semi, angle=0.0):
        """First-order distance to an ellipse with half axes `semi` along and across the direction
        `angle`.
        """
        dy, dx = self.y - row, self.x - column
        along, across = (
            np.cos(angle) * dx - np.sin(angle) * dy,
            np.sin(angle) * dx + np.cos(angle) * dy,
        )
        a, b = (np.maximum(s, 0.3) for s in semi)
        radius = np.hypot(along / a, across / b)
        slope = np.hypot(along / a**2, across / b**2)
        return np.where(
            np.minimum(*semi) > 0.3, radius * (radius - 1) / np.maximum(slope, 1e-4), 60.0
        )

    def chest(self):
        """Everything around the heart, shared by both frames."""
        level, p = self.level, self.pixel
        image = np.zeros(self.shape)
        body = self.disc(12, 0, self.body[::-1]) + 2 * self.swell
        image = blend(image, cover(body, p), 0.3)
        image = blend(image, cover(body + 2.5, p), level["fat"] + 0.04 * self.grain)
        # Fat is thick in front, and the wall below it is muscle with ribs, cut obliquely.
        wall = (
            body + self.fat * (1 + 0.2 * self.swell) * (0.8 - 0.4 * self.y / 150) + 0.6 * self.lumps
        )
        image = blend(image, cover(wall, p), level["muscle"] + 0.02 * self.grain)
        around = np.arctan2(self.y - 12, self.x)
        rib = (
            np.hypot((around * 9 + 2.2 * self.t * 6) % (2 * np.pi) - np.pi, (wall + 7) / 2.2) - 1.4
        )
        image = blend(image, cover(rib, 0.5), 0.4)
        cavity = wall + 14
        image = blend(image, cover(cavity, p), level["lung"])
        for row, column, size, slant in self.vessels:
            z = (self.t - 0.5) * 40
            vessel = self.disc(
                row + slant[0] * z, column + slant[1] * z, (size, 1.4 * size), slant[0]
            )
            image = blend(image, cover(np.maximum(vessel, cavity + 1), p), 0.25)
        # Below the diaphragm, which rises towards the apex: liver on the left, stomach and spleen
        # on the right.
        dome = self.diaphragm - 34 * self.t - 22 * np.cos(self.x / 55) + 3 * self.lumps
        abdomen = np.maximum(dome - self.y, cavity)
        image = blend(image, cover(abdomen, p), level["liver"] + 0.015 * self.grain)
        for row, column, size, slant in self.vessels[:10]:
            vessel = self.disc(
                row + 130 + 20 * slant[0] * self.t, column - 50, (size, 2 * size), slant[1]
            )
            image = blend(image, cover(np.maximum(vessel, abdomen + 4), p), level["blood"])
        depth = np.abs(self.x - 10 - 4 * self.lumps) - 2.5
        image = blend(image, cover(np.maximum(depth, abdomen + 3), p), level["fat"] * 0.8)
        row, column = self.stomach
        stomach = np.maximum(self.disc(row - 30 * self.t, column, (34, 24)), abdomen + 2)
        image = blend(image, cover(stomach, p), level["muscle"])
        image = blend(image, cover(stomach + 4, p), level["stomach"] + 0.1 * self.lumps)
        spine = np.maximum(self.disc(115, -8, (22, 19)), wall + 4)
        image = blend(image, cover(spine, p), 0.3 + 0.03 * self.grain)
        aorta = self.disc(88, 18, (11, 11))
        return blend(image, cover(aorta, p), 0.9 * level["blood"])

    def paint(self, chest, frame):
        """One frame -> image (S, H, W) float32 in 0..1, label (S, H, W) uint8."""
        level, p, systole = self.level, self.pixel, frame == 1
        label = np.zeros(self.shape, np.uint8)
        t = self.t - (0.09 if systole else 0.0)  # the valves move towards the apex
        row, column = (c + d * t for c, d in zip(self.centre, self.drift))
        taper = np.sqrt(np.clip(1 - np.clip(t, 0, 2) ** 2.4, 0, 1))
        cavity = self.radius * taper * (self.ejection if systole else 1.0)
        cavity = np.where(systole & (t > 0.8), cavity - 3 * (t - 0.8) / 0.1, cavity)
        # The muscle keeps its volume: outer radius from the area of the wall in diastole.
        outer = self.radius * taper + self.wall * (0.45 + 0.55 * taper)
        if systole:
            outer = 0.98 * np.sqrt(
                np.clip(outer**2 - (self.radius * taper) ** 2 + np.maximum(cavity, 0) ** 2, 4, None)
            )
        angle = np.arctan2(self.row_from(row), self.x - column)
        oval = 1 + self.oval[0] * np.cos(2 * angle) + self.oval[1] * np.cos(3 * angle)
        distance = np.hypot(self.y - row, self.x - column)
        epicardium = np.where(t < 1.03, distance - outer * oval, 60.0)
        endocardium = np.where(cavity > 1.5, distance - cavity * oval + 0.5 * self.grain, 60.0)
        squeeze = 0.7 if systole else 1.0
        size = np.sqrt(np.clip(1 - np.clip(t / 0.93, 0, 2) ** 2.2, 0, 1))
        reach = outer * 0.82
        crescent = (
            self.disc(
                row - reach * np.sin(self.turn),
                column + reach * np.cos(self.turn),
                (self.right[0] * squeeze * size, self.right[1] * (0.5 + 0.5 * squeeze) * size),
                self.turn,
            )
            + 1.2 * self.lumps
        )
        right = np.maximum(crescent, -epicardium)

        sac = smooth_union(epicardium, crescent, 12) - 6 - 2 * self.lumps
        image = blend(chest, cover(sac, p), 0.75 * level["fat"] * (0.75 + 0.2 * self.lumps))
        image = blend(image, cover(crescent - 2.5, p), level["myocardium"])
        image = blend(
            image, cover(right, p), level["blood"] * (0.9 + 0.07 * self.grain + 0.05 * self.lumps)
        )
        image = blend(image, cover(epicardium, p), level["myocardium"] * (1 + 0.06 * self.grain))
        image = blend(
            image,
            cover(endocardium, p),
            level["blood"] * (1 + 0.05 * self.grain + 0.06 * self.lumps),
        )
        for where, bulk in zip(self.papillary, self.papillary_size):
            place = 0.62 * np.maximum(cavity, 0)
            muscle = self.disc(
                row - place * np.sin(where),
                column + place * np.cos(where),
                (bulk, 0.8 * bulk),
                where,
            )
            muscle = np.where((t > 0.2) & (t < 0.8) & (cavity > 7), muscle, 60.0)
            image = blend(image, cover(muscle, p), 1.1 * level["myocardium"])
        # Above the valves lie the atria and the outflow tract: blood without a label.
        above = np.broadcast_to(t < 0, self.shape)
        atria = np.minimum(
            self.disc(row, column, (24, 20)), self.disc(row + 6, column - 34, (20, 26))
        )
        image[above] = blend(
            blend(chest, cover(sac, p), level["fat"] * 0.5), cover(atria, p), level["blood"]
        )[above]
        for mask, name in (
            (right, "right_ventricle"),
            (epicardium, "myocardium"),
            (endocardium, "left_ventricle"),
        ):
            label[(mask < 0) & ~above] = ACDC_LABELS[name]

        image = ndimage.gaussian_filter(image, (0.5, 0.5, 0))
        image *= np.exp(0.18 * self.coil - 0.003 * self.y)  # the receiving coil lies on the chest
        noise = 0.018 * self.noise[frame]
        image = np.hypot(image + noise[0], noise[1])
        image = np.minimum(image, np.quantile(image, 0.998))
        image = (image - image.min()) / (image.max() - image.min())
        return np.moveaxis(image, -1, 0).astype(np.float32), np.ascontiguousarray(
            np.moveaxis(label, -1, 0)
        )

    def row_from(self, row):
        """Rows upwards from `row`."""
        return -(self.y - row)


def acdc_phantom(seed, shape=(9, 144, 120)):
    """Short-axis cine MRI of one patient at both ends of the heart beat; the field of view is
    fitted to `shape`.

    shape: slices from base to apex, rows, columns.
    Returns {frame01: (image, label), frame02: ...}: image (S, H, W) float32 scaled to 0..1 over the
    volume, label (S, H, W) uint8 with 1 right ventricle, 2 myocardium, 3 left ventricle, papillary
    muscles counted as cavity.
    """
    heart = Heart(np.random.default_rng(seed), shape)
    chest = heart.chest()
    return {name: heart.paint(chest, frame) for frame, name in enumerate(FRAMES)}


# LA


def la_phantom(seed, shape=(96, 80, 56)):
    """Late-enhancement MRI of the left atrium, cropped around it as the public files are; fitted to
    `shape`.

    Axes: 0 towards the patient's right, 1 forwards, 2 upwards.
    Returns image (H, W, D) float32, z-scored, and label (H, W, D) uint8: atrium with the roots of
    the veins and the appendage. Veins beyond their roots, the other chambers and the great vessels
    have nearly the same intensity.
    """
    rng = np.random.default_rng(seed)
    voxel = max(extent / n for extent, n in zip(LA_FIELD, shape))
    c = Canvas(
        rng, shape, (voxel,) * 3, (0, 0, 0), rng.uniform(0.93, 1.07, 3), wobble=2.0, background=0.0
    )
    blood = rng.uniform(1.6, 2.4)
    c.image[:] = 0.75 + 0.25 * c.lumps + 0.1 * c.grain  # fat and connective tissue
    for side in (1, -1):
        lung = c.ellipsoid((side * rng.uniform(54, 62), -8, 8), (26, 40, 60))
        c.paint(lung + 2 * c.lumps, 0.12 + 0.04 * c.grain)
    c.paint(c.ellipsoid((8, -52, 0), (19, 17, 60)), 0.6 + 0.1 * c.grain)  # vertebra

    shift = rng.normal(0, 2.0, 3)
    semi = rng.uniform((25, 15, 15), (32, 20, 20))
    body = c.ellipsoid(np.add((0, -6, -2), shift), semi, rng.uniform(-12, 12, 3), margin=20)
    body = smooth_union(body, c.ellipsoid(np.add((4, 2, -8), shift), 0.7 * semi), 8) + 0.8 * c.lumps
    roots, veins = body, np.full(shape, 60.0, np.float32)
    for side in (1, -1):
        for height in (7, -6):
            start = np.add((side * 0.55 * semi[0], -10, 0.6 * height), shift)
            end = np.add(
                (side * 50, -22 + rng.normal(0, 4), 2.2 * height + rng.normal(0, 3)), shift
            )
            middle = (start + end) / 2 + rng.normal(0, 2, 3)
            tube = c.tube(
                [start, middle, end], [7.5, rng.uniform(5, 6.5), rng.uniform(3.5, 5)], margin=14
            )
            veins = np.minimum(veins, tube)
            # Readers cut the veins a centimetre or so from the body.
            cut = side * (c.x - np.float32(shift[0])) - np.float32(semi[0] + rng.uniform(1, 7))
            roots = smooth_union(roots, np.maximum(tube, cut), 4)
    tip = np.add((-38 + rng.normal(0, 3), 20 + rng.normal(0, 3), 6), shift)
    appendage = c.tube(
        [np.add((-0.7 * semi[0], 2, 2), shift), np.add((-31, 9, 5), shift), tip],
        [6, 6.5, 3],
        margin=14,
    )
    atrium = smooth_union(roots, appendage + 0.7 * c.grain, 4)

    others = [
        (c.ellipsoid((30, 20, -8), rng.uniform((16, 15, 22), (21, 19, 28))), 0.97),  # right atrium
        (c.tube([(34, 4, -40), (32, 6, 0), (31, 7, 40)], [9, 8, 8]), 1.0),  # caval veins
        # ascending aorta
        (c.tube([(6, 23, -12), (9, 25, 12), (14, 28, 40)], rng.uniform(10, 13)), 0.95),
        # descending aorta
        (c.tube([(-24, -34, -40), (-23, -33, 0), (-22, -32, 40)], rng.uniform(8, 10.5)), 0.95),
        # pulmonary artery
        (c.tube([(-8, 32, 14), (-10, 16, 24), (16, -2, 26)], rng.uniform(7, 9.5)), 1.02),
        (c.ellipsoid((-20, 32, -20), (19, 20, 17)), 0.95),  # left ventricle
    ]
    c.paint(others[-1][0] - 8, 0.45 * blood * (1 + 0.1 * c.grain))  # its muscle
    for distance, share in others:
        c.paint(distance - 2, 0.5 * blood)
        c.paint(distance, blood * share * (1 + 0.05 * c.lumps))
    c.paint(np.minimum(atrium, veins) - 2.2, 0.5 * blood)
    # Scar in the wall takes up contrast: patches brighter than the blood.
    scar = smooth_noise(rng, shape, c.spacing, 14.0)
    c.paint(np.maximum(np.abs(atrium - 1.0) - 1.2, (1.0 - scar) * 4), 1.35 * blood)
    c.paint(veins, blood)
    c.paint(atrium, blood * (1 + 0.04 * c.lumps), 1)
    c.paint(c.tube([(-4, -32, -40), (-2, -31, 0), (2, -32, 40)], 4.5), 0.7)  # oesophagus

    image = ndimage.gaussian_filter(c.image, 0.5)
    image *= np.exp(0.12 * smooth_noise(rng, shape, c.spacing, 70.0))
    noise = rng.uniform(0.12, 0.2) * blood / 2 * rng.standard_normal((2, *shape), np.float32)
    image = np.hypot(image + noise[0], noise[1])
    # One piece: the thinnest vein roots can break on coarse grids.
    pieces, count = ndimage.label(c.label)
    if count > 1:
        c.label[pieces != 1 + np.argmax(np.bincount(pieces.ravel())[1:])] = 0
    return ((image - image.mean()) / image.std()).astype(np.float32), c.label


# ISIC and Kvasir


def outline(rng, shape, centre, radius, ragged):
    """Distance in pixels, about, to an irregular closed outline; and the angle and relative radius
    of each pixel.

    ragged: how far the outline wanders, as a share of the radius.
    """
    rows, columns = np.meshgrid(*map(np.arange, shape), indexing="ij")
    stretch, turn = rng.uniform(0.75, 1.0), rng.uniform(0, np.pi)
    dy, dx = rows - centre[0], columns - centre[1]
    along, across = (
        np.cos(turn) * dx + np.sin(turn) * dy,
        (np.cos(turn) * dy - np.sin(turn) * dx) / stretch,
    )
    angle, distance = np.arctan2(across, along), np.hypot(along, across)
    edge = 1 + sum(
        rng.normal(0, 0.16 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7)
    )
    edge = radius * np.maximum(edge, 0.4)
    wander = ragged * radius * noise2d(rng, shape, 0.4 * radius + 2) if ragged else 0.0
    return distance - edge + wander, angle, distance / edge


def one_piece(mask):
    """The largest connected part of a mask, holes filled; uint8."""
    pieces, count = ndimage.label(mask)
    if count > 1:
        mask = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return ndimage.binary_fill_holes(mask).astype(np.uint8)


def strands(rng, shape, count, bend):
    """Distance in pixels to `count` curved lines that cross the image."""
    size = np.array(shape)
    marks = np.zeros(shape, bool)
    along = np.linspace(0, 1, 4 * max(shape))[:, None]
    for _ in range(count):
        start = rng.uniform(-0.1, 1.1, 2) * size
        heading = rng.uniform(0, 2 * np.pi)
        end = start + rng.uniform(0.3, 1.0) * max(shape) * np.array(
            [np.sin(heading), np.cos(heading)]
        )
        middle = (start + end) / 2 + rng.normal(0, bend * max(shape), 2)
        points = (1 - along) ** 2 * start + 2 * along * (1 - along) * middle + along**2 * end
        points = np.rint(points).astype(int)
        points = points[((points >= 0) & (points < size)).all(1)]
        marks[tuple(points.T)] = True
    if not marks.any():
        return np.full(shape, 1e3)
    return ndimage.distance_transform_edt(~marks)


def to_uint8(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def isic_phantom(seed, shape=(240, 320)):
    """Dermoscopic photograph of a pigmented lesion with hair, vignette and freckles.

    Returns image (H, W, 3) uint8 and mask (H, W) uint8 with 1 inside the lesion.
    """
    rng = np.random.default_rng(seed)
    size = min(shape)
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    skins = np.array(
        [(226, 178, 158), (206, 150, 132), (236, 196, 178), (188, 136, 112), (214, 160, 150)]
    )
    skin = skins[rng.integers(len(skins))] + rng.normal(0, 8, 3)
    fine, mid, broad = (
        noise2d(rng, shape, grain) for grain in (0.012 * size + 1, 0.06 * size, 0.4 * size)
    )
    lines = np.exp(-((noise2d(rng, shape, 0.035 * size) / 0.12) ** 2))  # furrows of the skin
    shade = 1 + 0.015 * fine + 0.015 * mid + 0.04 * broad - 0.03 * lines
    image = skin * shade[..., None] + 2 * broad[..., None] * np.array([1.0, -0.4, -0.2])
    for _ in range(rng.integers(0, 7)):
        spot, _, _ = outline(
            rng, shape, rng.uniform(0, 1, 2) * shape, rng.uniform(0.008, 0.025) * size, 0
        )
        image = blend(image, 0.5 * cover(spot, 3)[..., None], skin * 0.6)

    centre = (0.5 + rng.uniform(-0.12, 0.12, 2)) * shape
    lesion, _, inside = outline(
        rng, shape, centre, rng.uniform(0.14, 0.34) * size, rng.uniform(0.02, 0.1)
    )
    brown = skin * rng.uniform((0.5, 0.42, 0.38), (0.72, 0.62, 0.6))
    dark, red = brown * rng.uniform(0.45, 0.7), brown * (1.15, 0.8, 0.8)
    colour = blend(brown, cover(noise2d(rng, shape, 0.12 * size) - 0.3, 1.0)[..., None] * 0.5, red)
    patches = noise2d(rng, shape, 0.15 * size) + 0.8 * (1 - inside)
    colour = blend(colour, cover(0.7 - patches, 0.7)[..., None] * 0.8, dark)
    network = np.exp(-((noise2d(rng, shape, 0.03 * size) / 0.25) ** 2))
    colour = colour * (1 - rng.uniform(0.05, 0.22) * network + 0.03 * fine)[..., None]
    softness = rng.uniform(0.01, 0.07) * size + 1
    opacity = rng.uniform(0.75, 1.0)
    image = blend(image, opacity * cover(lesion, softness)[..., None], colour)

    hair = strands(
        rng, shape, rng.integers(0, 4) if rng.random() < 0.5 else rng.integers(8, 28), 0.08
    )
    thickness = rng.uniform(0.002, 0.006) * size
    image = blend(
        image,
        0.85 * cover(hair - thickness, 1.2)[..., None],
        np.array([52, 36, 32]) * rng.uniform(0.6, 1.6),
    )
    for _ in range(rng.integers(0, 6)):  # bubbles of the contact fluid
        bubble, _, _ = outline(
            rng, shape, rng.uniform(0, 1, 2) * shape, rng.uniform(0.01, 0.03) * size, 0
        )
        image = blend(image, 0.35 * cover(np.abs(bubble) - 0.5, 2)[..., None], 245.0)
    radius = np.hypot(rows, columns)
    image = image * (1 - rng.uniform(0.05, 0.3) * np.clip(radius - 0.4, 0, None) ** 2)[..., None]
    if rng.random() < 0.3:  # the tube of the dermatoscope
        aspect = shape[1] / shape[0]
        tube = np.hypot(rows, columns * aspect) - rng.uniform(1.15, 1.45)
        image = blend(image, cover(tube * -1, 0.06)[..., None], 12.0)
    image = ndimage.gaussian_filter(image, (0.5, 0.5, 0)) + rng.normal(0, 2.0, (*shape, 3))
    return to_uint8(image), one_piece(lesion < 0)


def kvasir_phantom(seed, shape=(256, 300)):
    """Endoscopic view of a bowel with folds, highlights and black corners, and one polyp.

    Returns image (H, W, 3) uint8 and mask (H, W) uint8 with 1 inside the polyp.
    """
    rng = np.random.default_rng(seed)
    size = min(shape)
    rows, columns = np.meshgrid(*map(np.arange, shape), indexing="ij")
    lumen = rng.uniform(0.1, 0.9, 2) * shape
    away = np.hypot(rows - lumen[0], columns - lumen[1]) / size
    warped = away + 0.05 * noise2d(rng, shape, 0.5 * size) + 0.02 * noise2d(rng, shape, 0.15 * size)
    # Folds are rings around the lumen: lit on the near side, in shadow behind the crest.
    phase = (warped / rng.uniform(0.2, 0.34) + rng.uniform()) % 1
    relief = np.exp(-(((phase - 0.62) / 0.16) ** 2)) - 1.3 * np.exp(-(((phase - 0.88) / 0.07) ** 2))
    relief *= np.clip(0.6 + 0.7 * noise2d(rng, shape, 0.5 * size), 0, 1.3)
    light = (
        1 - rng.uniform(0.6, 0.9) * np.exp(-((away / rng.uniform(0.18, 0.32)) ** 2)) + 0.17 * relief
    )
    light += 0.06 * noise2d(rng, shape, 0.35 * size) + 0.015 * noise2d(rng, shape, 0.02 * size)
    mucosa = rng.uniform((186, 92, 66), (222, 136, 108)) * rng.normal(1, 0.03)
    tint = noise2d(rng, shape, 0.25 * size)[..., None] * np.array([3.0, 7.0, 6.0])
    vessels = np.exp(-((noise2d(rng, shape, 0.13 * size) / 0.07) ** 2)) * np.clip(
        noise2d(rng, shape, 0.4 * size), 0, 1
    )
    image = (mucosa + tint) * light[..., None] - vessels[..., None] * np.array([14.0, 26.0, 20.0])

    centre = rng.uniform(0.3, 0.7, 2) * shape
    radius = rng.uniform(0.1, 0.27) * size
    polyp, angle, inside = outline(rng, shape, centre, radius, rng.uniform(0.01, 0.06))
    sun = rng.uniform(0, 2 * np.pi)
    shadow = cover(polyp - 0.12 * radius * (1 - np.cos(angle - sun)) - 2, 0.25 * radius)
    image = image * (1 - 0.35 * shadow)[..., None]
    height = np.sqrt(np.clip(1 - np.clip(inside, 0, 1) ** 2, 0, 1))
    bumps = noise2d(rng, shape, 0.3 * radius + 2) + 0.4 * noise2d(rng, shape, 0.04 * size)
    lit = 0.72 + 0.34 * height + 0.13 * inside * np.cos(angle - sun) + 0.05 * bumps
    hue = rng.uniform((0.95, 0.75, 0.75), (1.12, 1.1, 1.15))  # from red to pale
    image = blend(image, cover(polyp, 3)[..., None], mucosa * hue * lit[..., None] + 0.6 * tint)

    gloss = noise2d(rng, shape, 0.035 * size) + 0.7 * noise2d(rng, shape, 0.15 * size)
    gloss += 0.35 * height * (polyp < 0) + 0.3 * relief
    spots = cover(rng.uniform(2.5, 3.1) - gloss, 0.35)
    spots = np.maximum(spots, 0.5 * ndimage.gaussian_filter(spots, 2.0))
    image = blend(image, spots[..., None], np.array([252.0, 246.0, 238.0]))
    image = ndimage.gaussian_filter(image, (0.7, 0.7, 0)) + rng.normal(0, 1.8, (*shape, 3))
    # The picture is an octagon on black; its corners are cut by different amounts.
    y, x = rows / shape[0], columns / shape[1]
    cut = rng.uniform(0.1, 0.24, 4)
    corners = (x + y - cut[0], 1 - x + y - cut[1], x + 1 - y - cut[2], 2 - x - y - cut[3])
    margin = np.minimum.reduce([*corners, x - 0.02, 0.985 - x, y - 0.02, 0.98 - y])
    image = blend(image, cover(margin * size, 2)[..., None], rng.uniform(2, 10))
    if rng.random() < 0.3:  # the guide's picture of the instrument in the lower left corner
        image[
            int(0.68 * shape[0]) : int(0.97 * shape[0]), int(0.03 * shape[1]) : int(0.3 * shape[1])
        ] = (18, 74, 30)
        polyp = np.where((y > 0.68) & (x < 0.3), 1.0, polyp)
    return to_uint8(image), one_piece((polyp < 0) & (margin > 0))
