"""Generated scans: abdominal CT with BTCV or WORD labels and brain MRI with BraTS labels, for demos
and tests.

No patient data. Every structure is a signed distance in mm (negative inside) in patient
coordinates, so that a case can be rendered at any voxel size; membership falls off over one voxel,
which gives partial volume. Structures are painted in order and later ones displace earlier ones, so
neighbours touch without gaps or overlaps. A smooth random deformation, per-organ jitter and
per-case contrasts make the cases differ; unlabelled bowel, muscle and vessels share their
intensities with organs, so that intensity alone does not tell the class.

Arrays are in RAS axis order: axis 0 grows towards the patient's right, axis 1 anterior, axis 2
superior. `seed` is anything that `np.random.default_rng` takes; the tools pass the pair
(seed, case).
"""

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

BTCV_LABELS = {
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_splenic_vein": 10,
    "pancreas": 11,
    "right_adrenal": 12,
    "left_adrenal": 13,
}
WORD_LABELS = {
    "liver": 1,
    "spleen": 2,
    "left_kidney": 3,
    "right_kidney": 4,
    "stomach": 5,
    "gallbladder": 6,
    "esophagus": 7,
    "pancreas": 8,
    "duodenum": 9,
    "colon": 10,
    "intestine": 11,
    "adrenal": 12,
    "rectum": 13,
    "bladder": 14,
    "left_femoral_head": 15,
    "right_femoral_head": 16,
}
BRATS_LABELS = {"necrotic_core": 1, "edema": 2, "enhancing": 3}
BRATS_MODALITIES = ("t1c", "t1n", "t2f", "t2w")

# Portal-venous phase, HU: (mean, standard deviation between cases).
CT_HU = {
    "spleen": (120, 7),
    "right_kidney": (170, 8),
    "left_kidney": (170, 8),
    "gallbladder": (10, 4),
    "esophagus": (50, 5),
    "liver": (110, 6),
    "stomach": (60, 5),
    "aorta": (150, 9),
    "inferior_vena_cava": (130, 8),
    "portal_splenic_vein": (150, 8),
    "pancreas": (90, 7),
    "right_adrenal": (75, 6),
    "left_adrenal": (75, 6),
    "duodenum": (65, 6),
    "colon": (60, 6),
    "intestine": (75, 8),
    "rectum": (55, 5),
    "bladder": (8, 4),
    "left_femoral_head": (330, 20),
    "right_femoral_head": (330, 20),
    "content": (30, 6),
    "fat": (-100, 4),
    "muscle": (60, 5),
    "skin": (30, 5),
    "bone": (480, 25),
    "marrow": (200, 20),
    "lung": (-800, 20),
    "heart": (135, 8),
}
FAR = np.float32(60.0)  # mm: stands for "outside" wherever a structure was not evaluated
SIDES = (("right", 1), ("left", -1))

# Tissue intensities (t1c, t1n, t2f, t2w) in arbitrary units.
MR_TISSUE = {
    "csf": (230, 220, 130, 1500),
    "grey": (600, 570, 800, 860),
    "white": (760, 780, 640, 590),
    "necrotic_core": (400, 400, 780, 1250),
    "edema": (580, 540, 1300, 1200),
    "enhancing": (1500, 620, 1020, 980),
}


def smooth_noise(rng, shape, spacing, scale):
    """Smooth random field with zero mean and unit standard deviation; (H, W, D) float32, `scale` =
    grain in mm.
    """
    coarse = [max(4, int(np.ceil(n * s / scale)) + 3) for n, s in zip(shape, spacing)]
    field = rng.standard_normal(coarse, np.float32)
    # Cubic interpolation one axis at a time is far cheaper than in 3D. einsum, not a matrix
    # product: the bits must not depend on the number of BLAS threads.
    for n, c, term in zip(shape, coarse, ("na,abc->nbc", "nb,abc->anc", "nc,abc->abn")):
        weights = ndimage.zoom(np.eye(c, dtype=np.float32), (n / c, 1), order=3, mode="nearest")
        field = np.einsum(term, weights, field)
    return (field - field.mean()) / max(float(field.std()), 1e-6)


def smooth_union(a, b, radius):
    """Union of two distance fields whose seam is rounded over `radius` mm."""
    blend = np.clip(0.5 + 0.5 * (b - a) / radius, 0, 1)
    return b + (a - b) * blend - radius * blend * (1 - blend)


class Canvas:
    """One scan being painted: patient coordinates `x y z` in mm, `image`, `label`; all (H, W, D) in
    RAS order.
    """

    def __init__(
        self, rng, shape, spacing, centre=(0, 0, 0), scale=(1, 1, 1), wobble=0.0, background=0.0
    ):
        self.shape, self.spacing, self.scale = (
            tuple(shape),
            np.asarray(spacing, float),
            np.asarray(scale, float),
        )
        self.centre = np.asarray(centre, float)
        self.voxel = float(np.prod(self.spacing) ** (1 / 3))
        axes = [
            (np.arange(n) - (n - 1) / 2) * s / k
            for n, s, k in zip(self.shape, self.spacing, self.scale)
        ]
        grid = np.meshgrid(*[a.astype(np.float32) for a in axes], indexing="ij")
        shifts = [wobble * smooth_noise(rng, self.shape, self.spacing, 70.0) for _ in range(3)]
        # mm that the deformation moves a voxel at most
        self.reach = max(float(np.abs(s).max()) for s in shifts)
        self.x, self.y, self.z = (
            g + np.float32(c) + s for g, c, s in zip(grid, self.centre, shifts)
        )
        self.table_y = grid[1]  # undeformed height above the table: fluid levels are flat
        self.lumps = smooth_noise(rng, self.shape, self.spacing, 22.0)
        self.grain = smooth_noise(rng, self.shape, self.spacing, 8.0)
        self.image = np.full(self.shape, background, np.float32)
        self.label = np.zeros(self.shape, np.uint8)

    def box(self, low, high):
        """Index slices that are sure to contain the patient-coordinate box [low, high] mm after
        deformation.
        """
        half = (np.array(self.shape) - 1) / 2
        step = self.spacing / self.scale
        start = np.floor((np.asarray(low) - self.reach - self.centre) / step + half).astype(int)
        stop = np.ceil((np.asarray(high) + self.reach - self.centre) / step + half).astype(int) + 1
        return tuple(
            slice(a, b) for a, b in zip(np.clip(start, 0, self.shape), np.clip(stop, 0, self.shape))
        )

    def ellipsoid(self, centre, semi, turn=(0, 0, 0), margin=14.0):
        """Distance to an ellipsoid; `semi` axes in mm, `turn` = rotations about x, y, z in
        degrees.
        """
        field = np.full(self.shape, FAR, np.float32)
        reach = max(semi) + margin if any(turn) else np.asarray(semi) + margin
        box = self.box(np.asarray(centre) - reach, np.asarray(centre) + reach)
        offset = [c[box] - np.float32(m) for c, m in zip((self.x, self.y, self.z), centre)]
        if any(turn):
            rows = Rotation.from_euler("xyz", turn, degrees=True).as_matrix().T.astype(np.float32)
            offset = [r[0] * offset[0] + r[1] * offset[1] + r[2] * offset[2] for r in rows]
        unit = [o / np.float32(s) for o, s in zip(offset, semi)]
        radius = np.sqrt(sum(u * u for u in unit))
        slope = np.sqrt(sum((u / np.float32(s)) ** 2 for u, s in zip(unit, semi)))
        # first-order distance, exact at the surface
        field[box] = radius * (radius - 1) / np.maximum(slope, 1e-4)
        return field

    def tube(self, points, radii, margin=8.0, step=8.0):
        """Distance to a tube along a spline through `points` (n, 3) mm, with `radii` (n,) or one
        radius in mm.

        Radii below 0.6 voxel are raised to it: on coarse grids thin structures stay one voxel wide,
        not broken.
        """
        points = np.asarray(points, float)
        radii = np.maximum(np.broadcast_to(np.asarray(radii, float), len(points)), 0.6 * self.voxel)
        knots = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
        along = np.linspace(0, knots[-1], max(2, int(knots[-1] / step) + 1))
        line = (
            CubicSpline(knots, points)(along)
            if len(points) > 2
            else np.linspace(*points, len(along))
        )
        width = np.interp(along, knots, radii)
        field = np.full(self.shape, FAR, np.float32)
        for start, end, r0, r1 in zip(line[:-1], line[1:], width[:-1], width[1:]):
            reach = max(r0, r1) + margin
            box = self.box(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
            offset = [c[box] - np.float32(s) for c, s in zip((self.x, self.y, self.z), start)]
            axis = (end - start).astype(np.float32)
            t = np.clip(sum(o * a for o, a in zip(offset, axis)) / np.float32(axis @ axis), 0, 1)
            distance = np.sqrt(sum((o - t * a) ** 2 for o, a in zip(offset, axis)))
            field[box] = np.minimum(
                field[box], distance - (np.float32(r0) + t * np.float32(r1 - r0))
            )
        return field

    def paint(self, distance, value, label=None):
        """Blend `value` (number or field) in where `distance` < 0; `label` None leaves the label
        map as it is.
        """
        where = np.nonzero(distance.ravel() < self.voxel / 2)[0]
        member = np.clip(0.5 - distance.ravel()[where] / self.voxel, 0, 1)
        value = value.ravel()[where] if isinstance(value, np.ndarray) else np.float32(value)
        flat = self.image.reshape(-1)
        flat[where] += member * (value - flat[where])
        if label is not None:
            self.label.reshape(-1)[where[member >= 0.5]] = label


class Abdomen:
    """Paints one abdomen; `labels` maps organ names to ids; `missing` organs are FAR everywhere, so
    never painted.
    """

    def __init__(self, rng, canvas, labels, missing):
        self.rng, self.canvas, self.labels, self.missing = rng, canvas, labels, missing
        self.hu = {name: float(rng.normal(*stats)) for name, stats in CT_HU.items()}
        for organ in ("kidney", "adrenal", "femoral_head"):
            self.hu[f"left_{organ}"] = self.hu[f"right_{organ}"]  # pairs enhance alike
        self.shift = {name: rng.normal(0, 2.0, 3) for name in CT_HU}  # mm
        self.size = {name: float(rng.uniform(0.92, 1.08)) for name in CT_HU}
        self.size["gallbladder"] = float(rng.uniform(0.75, 1.25))  # filling differs most here
        self.size["stomach"] = float(rng.uniform(0.85, 1.15))

    def ellipsoid(self, name, centre, semi, turn=(0, 0, 0)):
        """Ellipsoid of an organ with the organ's own jitter of place and size."""
        if name in self.missing:
            return np.full(self.canvas.shape, FAR, np.float32)
        return self.canvas.ellipsoid(
            np.add(centre, self.shift[name]), np.multiply(semi, self.size[name]), turn
        )

    def tube(self, name, points, radii):
        """Tube of an organ with the organ's own jitter of place and width."""
        if name in self.missing:
            return np.full(self.canvas.shape, FAR, np.float32)
        return self.canvas.tube(
            np.add(points, self.shift[name]), np.multiply(radii, self.size[name])
        )

    def organ(self, name, distance):
        """Paint an organ with its label (0 if the dataset does not label it)."""
        key = "adrenal" if name.endswith("adrenal") and "adrenal" in self.labels else name
        self.canvas.paint(distance, self.hu[name], self.labels.get(key, 0))

    def body(self):
        """Skin, fat, muscle wall; keeps the distances to the body surface and to the inner wall."""
        c, hu, rng = self.canvas, self.hu, self.rng
        power = 2.3
        hips = 1 / (1 + np.exp((c.z + 190) / 25))
        half_x, half_y = 148 * (1 + 0.05 * hips), np.float32(104)
        ux, uy = np.abs(c.x / half_x) + 1e-4, np.abs(c.y / half_y) + 1e-4
        radius = (ux**power + uy**power) ** (1 / power)
        slope = radius ** (1 - power) * np.hypot(
            ux ** (power - 1) / half_x, uy ** (power - 1) / half_y
        )
        self.surface = ((radius - 1) / slope).astype(np.float32)
        fat = rng.uniform(9, 17) * (1 - 0.3 * c.y / 100 + 0.12 * c.lumps)
        fat -= 0.5 * fat * np.exp(-((c.x / 25) ** 2)) * (c.y < 0)  # thin over the spinous processes
        self.fat_edge = self.surface + fat + 2
        self.wall = rng.uniform(9, 12)
        self.cavity = self.fat_edge + self.wall
        c.paint(self.surface, hu["skin"])
        c.paint(self.surface + 2.5, hu["fat"] + 12 * c.grain)
        c.paint(self.fat_edge, hu["muscle"] + 10 * c.grain)
        # Fat planes between the layers of the flank muscles.
        c.paint(np.abs(self.cavity - 0.45 * self.wall) - 0.5, hu["fat"] / 3)
        c.paint(self.cavity, hu["fat"] + 14 * c.grain)
        rectus = np.maximum(self.cavity - 2, 62 - c.y)
        c.paint(np.maximum(rectus, 4 - np.abs(c.x)), hu["muscle"])

    def skeleton(self):
        """Back muscles, ribs and vertebrae with spinal canal; displaces whatever was painted
        there.
        """
        c, hu = self.canvas, self.hu
        for _, s in SIDES:
            bottom = -190 if c.z.min() < -150 else -130
            c.paint(
                c.tube([(s * 30, -81, 130), (s * 31, -80, 0), (s * 30, -82, bottom)], 17),
                hu["muscle"],
                0,
            )
            c.paint(
                c.tube([(s * 58, -74, -5), (s * 60, -73, -110), (s * 58, -72, -150)], 9),
                hu["muscle"],
                0,
            )
            psoas = [
                (s * 27, -46, 12),
                (s * 33, -44, -40),
                (s * 43, -40, -100),
                (s * 58, -18, -200),
                (s * 72, 8, -270),
            ]
            c.paint(c.tube(psoas, [5, 12, 19, 18, 12]), hu["muscle"], 0)
        rib_height = (c.z + 0.45 * c.y + 400) % 29 - 14.5
        ribs = np.hypot(rib_height, self.fat_edge + 0.55 * self.wall) - 4.8
        margin = -22 + 0.75 * np.maximum(c.y + 20, 0) + 0.2 * np.maximum(60 - np.abs(c.x), 0)
        ribs = np.maximum(np.maximum(ribs, margin - c.z), 22 - np.abs(c.x))
        c.paint(ribs, 110, 0)  # cartilage in front, bone elsewhere
        self.bone(np.maximum(ribs, c.y - 58), cortex=2.5)
        sacral = np.clip((-130 - c.z) / 120, 0, 1)  # the sacrum bends backwards
        back = 24 * sacral * (2 - sacral)
        disc = np.abs((c.z + 400) % 34 - 17)  # discs lie where this is below 4
        waist = 2.0 * np.cos((c.z + 400) * 2 * np.pi / 34)
        vertebra = np.hypot(c.x / 1.2, c.y + 52 + back) - (18.5 + waist) * (1 - 0.45 * sacral)
        extent = np.maximum(-252 - c.z, self.fat_edge + 3)
        c.paint(np.maximum(vertebra, extent), 85, 0)
        self.bone(np.maximum(np.maximum(vertebra, extent), (4 - disc) * (sacral < 0.05)))
        arch = np.hypot(c.x, c.y + 79 + back) - 14.5
        spinous = np.maximum(np.hypot(c.x / 0.8, (c.y + 92 + back * 0.6) * 0.5) - 5, 8 - disc)
        transverse = np.maximum.reduce([np.abs(c.y + 74 + back) - 4, np.abs(c.x) - 36, 12 - disc])
        self.bone(np.maximum(np.minimum.reduce([arch, spinous, transverse]), extent), cortex=3)
        c.paint(np.maximum(np.hypot(c.x, c.y + 78 + back) - 8, extent + 30), 20, 0)

    def bone(self, distance, cortex=4.0):
        """Cortical shell of `cortex` mm around marrow."""
        self.canvas.paint(distance, self.hu["bone"], 0)
        self.canvas.paint(distance + cortex, self.hu["marrow"] + 35 * self.canvas.grain)

    def thorax(self):
        """Lung bases over the diaphragm domes and the underside of the heart; keeps the distances
        of both.
        """
        c, hu = self.canvas, self.hu
        right = 88 - 62 * (((c.x - 66) / 72) ** 2 + ((c.y - 8) / 82) ** 2)
        left = 80 - 62 * (((c.x + 70) / 68) ** 2 + ((c.y - 4) / 82) ** 2)
        dome = np.where(c.x > 0, right, left) + self.rng.normal(0, 4)
        self.lungs = np.maximum(
            np.maximum(self.cavity + 2, 0.7 * (dome - c.z)), 24 - np.abs(c.x) + 3 * c.lumps
        )
        c.paint(np.maximum(self.lungs - 3.5, self.cavity), hu["muscle"])
        c.paint(self.lungs, hu["lung"] + 25 * c.grain)
        vessels = np.maximum(1.1 - 0.5 * c.grain, self.lungs / 4) * 4
        c.paint(vessels, -250)
        self.heart = c.ellipsoid((-18, 38, 114), (60, 42, 34), (0, 18, 0)) + 1.5 * c.lumps
        c.paint(self.heart - 5, hu["fat"])
        c.paint(self.heart, hu["muscle"] + 30)
        c.paint(self.heart + 9, hu["heart"])

    def hollow(self, name, distance, wall, content):
        """Hollow organ: wall of `wall` mm in the organ's HU around `content` (number or field)."""
        self.organ(name, distance)
        self.canvas.paint(distance + wall, content)

    def bowel(self):
        """Small bowel, colon with stool and gas, duodenum."""
        c, hu, rng = self.canvas, self.hu, self.rng
        points = []
        for row, height in enumerate(np.arange(-48, -226, -25)):
            reach = 84 if height > -165 else 52  # the pelvis is narrower
            for column, x in enumerate(np.linspace(-reach, reach, 6) * (-1) ** row):
                points.append((x, (16, 4)[row % 2] + 42 * (column % 2), height))
        points = np.array(points) + rng.normal(0, 6, (len(points), 3))
        small = np.maximum(c.tube(points, rng.uniform(12, 16, len(points))), self.cavity + 1)
        self.hollow("intestine", small, 3.0, hu["content"] + 25 * c.lumps)
        c.paint(np.maximum(small + 5, 4 * (1.9 - c.lumps)), -700)
        frame = [
            (97, -14, -172),
            (101, -14, -110),
            (98, -4, -58),
            (78, 30, -50),
            (30, 66, -66),
            (-30, 66, -62),
        ]
        frame += [
            (-84, 30, -20),
            (-102, -18, -5),
            (-106, -28, -70),
            (-104, -22, -130),
            (-88, -2, -180),
        ]
        frame += [(-50, 8, -205), (-10, -25, -212), (0, -50, -226)]
        frame = np.array(frame) + rng.normal(0, 3.5, (len(frame), 3))
        radii = [26, 24, 22, 20, 19, 18, 18, 18, 15, 14, 14, 14, 14, 14]
        haustra = 1.6 * np.sin((c.x + c.y + c.z) / 4.5)
        colon = np.maximum(self.tube("colon", frame, radii) + haustra + c.lumps, self.cavity + 1)
        self.hollow("colon", colon, 3.0, 15 + 30 * c.grain)
        c.paint(np.maximum(colon + 4, 4 * (0.5 - c.lumps)), -850)
        c.paint(np.maximum(colon + 4, 4 * (1.7 - c.grain)), -500)  # bubbles in stool
        loop = [
            (33, 42, -3),
            (46, 30, 0),
            (51, 12, -22),
            (46, 4, -48),
            (22, 2, -60),
            (-10, 5, -58),
            (-30, 14, -44),
        ]
        self.hollow(
            "duodenum",
            self.tube("duodenum", loop, [11, 12, 13, 13, 12, 11, 11]) + c.lumps,
            3.5,
            hu["content"],
        )

    def stomach(self):
        """Stomach with fluid and an air bubble under the front wall, and the esophagus that leads
        into it.
        """
        c, hu = self.canvas, self.hu
        curve = [
            (-66, -14, 62),
            (-68, 8, 48),
            (-58, 42, 18),
            (-28, 57, -10),
            (6, 54, -12),
            (32, 43, -2),
        ]
        stomach = self.tube("stomach", curve, [27, 34, 29, 22, 17, 11]) + c.lumps
        stomach = np.maximum(np.maximum(stomach, self.cavity + 2), 4 - self.lungs)
        self.hollow("stomach", stomach, 4.0, hu["content"] + 18 * c.grain)
        lumen, fluid = stomach < -5, self.rng.uniform(0.8, 0.93)
        if lumen.any():
            level = np.quantile(c.table_y[lumen], fluid)
            c.paint(np.maximum(stomach + 4, level - c.table_y), -950)
        pipe = [(-4, -13, 140), (-7, -12, 112), (-18, -8, 88), (-36, 0, 72)]
        esophagus = self.tube("esophagus", pipe, [8.5, 8.5, 8.5, 9.5])
        self.organ("esophagus", esophagus)
        c.paint(np.maximum(esophagus + 6.5, 2 * (0.9 - c.lumps)), -500)

    def liver_spleen(self):
        """Liver that fills the right dome, with its vessels, and the spleen in the left one."""
        c, hu = self.canvas, self.hu
        right = self.ellipsoid("liver", (80, 2, 28), (70, 88, 80), (0, -8, 0))
        left = self.ellipsoid("liver", (0, 44, 46), (74, 40, 30), (0, 14, 10))
        caudate = self.ellipsoid("liver", (22, 4, 36), (24, 24, 26))
        liver = smooth_union(smooth_union(right, left, 14), caudate, 8) + 1.5 * c.lumps
        # slants up towards the left
        underside = (-52 + 0.55 * (118 - c.x) + 0.12 * c.y - c.z) * 0.85
        liver = -smooth_union(-liver, -underside, 10)
        liver = np.maximum.reduce(
            [liver, self.cavity + 1.5, 3.5 - self.lungs, 5 - self.heart, c.z - 92]
        )
        self.organ("liver", liver)
        trees = [
            ([(30, 2, 74), (55, -2, 66), (92, -18, 45)], [6, 4.5, 2.5]),
            ([(30, 4, 74), (48, 32, 60), (68, 58, 30)], [5, 4, 2.5]),
            ([(28, 6, 74), (10, 38, 58), (-28, 54, 52)], [5, 4, 2.5]),
            ([(58, 8, 32), (88, 28, 18), (105, 38, 0)], [5, 3.5, 2.5]),
            ([(58, 8, 32), (90, -32, 16), (102, -42, -8)], [5, 3.5, 2.5]),
        ]
        for points, radii in trees:
            c.paint(np.maximum(c.tube(points, radii), liver + 3), hu["portal_splenic_vein"] - 5)
        spleen = self.ellipsoid("spleen", (-98, -34, 36), (38, 50, 52), (20, 0, -18)) + c.lumps
        hilum = self.ellipsoid("spleen", (-58, -8, 34), (36, 40, 46))
        spleen = np.maximum(
            np.maximum(spleen, -hilum), np.maximum(self.cavity + 1.5, 3.5 - self.lungs)
        )
        self.organ("spleen", spleen)

    def kidneys(self):
        """Kidneys with sinus fat and pelvis in perirenal fat, renal vessels, and the Y-shaped
        adrenals above.
        """
        c, hu = self.canvas, self.hu
        for (side, s), height in zip(SIDES, (-36, -22)):
            name = f"{side}_kidney"
            centre, turn = np.array((s * 60, -47, height)), (10, s * 12, -s * 25)
            capsule = np.maximum(
                c.ellipsoid(centre + (-s * 3, -10, -2), (34, 28, 60), turn), self.cavity + 1
            )
            c.paint(capsule, hu["fat"] + 8 * c.grain, 0)
            kidney = np.maximum(
                self.ellipsoid(name, centre, (28, 24, 52), turn) + 0.8 * c.lumps, self.cavity + 3
            )
            sinus = self.ellipsoid(name, centre + (-s * 19, 6, 0), (16, 10, 25), turn) + 2 * c.grain
            self.organ(name, kidney)
            c.paint(sinus, hu["fat"], 0)
            # renal pelvis
            c.paint(self.ellipsoid(name, centre + (-s * 19, 3, -3), (7, 5, 11), turn), 20, 0)
            ends = (
                centre + (-s * 12, 6, 3),
                (s * 36, -24, height + 8),
                (8 * s + 6, -18, height + 14),
            )
            c.paint(self.tube(name, ends, [4, 4.5, 4.5]), hu["inferior_vena_cava"] + 10, 0)
        for (side, s), (x, y, z) in zip(SIDES, ((31, -32, 24), (-35, -27, 28))):
            limbs = []
            for level in np.linspace(-13, 11, 7):
                fork, spread = np.array((x + s * 0.15 * level, y, z + level)), (12 - level) / 24
                for dx, dy in ((-s * 2, 8), (s * (4 + 6 * spread), -12), (-s * 5, -12)):
                    limbs.append(self.tube(f"{side}_adrenal", [fork, fork + (dx, dy, 0)], 3.2))
            adrenal = np.minimum.reduce(limbs)
            c.paint(adrenal - 2, hu["fat"], 0)
            self.organ(f"{side}_adrenal", adrenal)

    def pancreas_gallbladder(self):
        """Lobulated pancreas from the duodenal loop to the splenic hilum; gallbladder under the
        liver.
        """
        c = self.canvas
        gland = [
            (33, 14, -32),
            (29, 16, -14),
            (10, 25, -4),
            (-20, 22, 6),
            (-50, 2, 16),
            (-78, -14, 26),
        ]
        self.organ(
            "pancreas", self.tube("pancreas", gland, [13, 15, 9.5, 11, 11, 10]) + 1.0 * c.grain
        )
        bladder = [(66, 62, -24), (62, 50, -12), (54, 34, 6), (49, 26, 14)]
        gallbladder = np.maximum(
            self.tube("gallbladder", bladder, [15, 16, 11, 5]), self.cavity + 2
        )
        # enhancing wall, left with the liver's or no label
        c.paint(gallbladder - 2, self.hu["muscle"])
        self.organ("gallbladder", gallbladder)

    def vessels(self):
        """Aorta, inferior vena cava, portal and splenic vein; mesenteric and iliac vessels without
        label.
        """
        c, hu = self.canvas, self.hu
        for s in (1, -1):
            iliac = [
                (s * 8 + 2, -20, -138),
                (s * 34, -22, -180),
                (s * 58, -5, -225),
                (s * 62, 42, -290),
            ]
            c.paint(c.tube(iliac, [7, 6.5, 6, 5.5]), hu["inferior_vena_cava"] + 5, 0)
        c.paint(
            c.tube([(-6, -16, 4), (-4, 4, -8), (-2, 10, -50), (4, 20, -100)], [4.5, 4, 3.5, 2]),
            hu["aorta"],
            0,
        )
        c.paint(
            c.tube([(10, 13, -10), (12, 15, -50), (16, 24, -100)], [5.5, 5, 3]),
            hu["portal_splenic_vein"],
            0,
        )
        cava = [
            (18, -21, -142),
            (20, -21, -60),
            (23, -17, 0),
            (29, -8, 45),
            (28, 2, 75),
            (22, 12, 100),
        ]
        self.organ(
            "inferior_vena_cava",
            self.tube("inferior_vena_cava", cava, [10, 10.5, 11, 11.5, 11.5, 12]),
        )
        aorta = [
            (-15, -30, 140),
            (-13, -27, 90),
            (-8, -21, 30),
            (-7, -20, -40),
            (-5, -20, -110),
            (-2, -20, -140),
        ]
        self.organ("aorta", self.tube("aorta", aorta, [11.5, 11.5, 11, 10, 8.5, 8]))
        # splenic artery
        c.paint(c.tube([(-7, -20, 14), (-6, -6, 17), (-38, 0, 22)], [4, 4, 3]), hu["aorta"], 0)
        branches = [
            ([(-80, -22, 28), (-48, -6, 16), (-18, 11, 4), (10, 13, -8)], [4, 4.5, 5, 6]),
            ([(10, 13, -10), (22, 14, 8), (42, 14, 26), (58, 8, 32)], [6.5, 7, 7, 5.5]),
            ([(40, 14, 25), (26, 24, 36), (6, 34, 42)], [5.5, 5, 4]),
        ]
        tubes = [self.tube("portal_splenic_vein", points, radii) for points, radii in branches]
        self.organ("portal_splenic_vein", np.minimum.reduce(tubes))

    def pelvis(self):
        """Pelvic bones and muscles, femoral heads, bladder and rectum."""
        c, hu = self.canvas, self.hu
        inlet = (np.hypot(c.x / 74, (c.y - 2) / 68) - 1) * 68
        ring = np.maximum(np.maximum(-inlet, self.fat_edge + 6), c.z + 178 + 0.5 * np.abs(c.x))
        c.paint(ring, hu["muscle"] + 15 * c.lumps, 0)
        for side, s in SIDES:
            wing = c.ellipsoid((s * 84, -24, -192), (9, 56, 50), (0, s * 18, s * 30)) + 2 * c.lumps
            socket = smooth_union(c.ellipsoid((s * 80, 0, -262), (29, 32, 36)), wing, 12)
            pubis = c.tube([(s * 66, 22, -272), (s * 30, 46, -290), (s * 8, 44, -300)], [10, 9, 10])
            ischium = c.tube(
                [(s * 68, -22, -275), (s * 60, -34, -318), (s * 40, 10, -330)], [15, 14, 9]
            )
            self.bone(np.minimum.reduce([socket, pubis, ischium]))
            head = self.ellipsoid(f"{side}_femoral_head", (s * 94, 2, -270), (24.5, 24.5, 24.5))
            c.paint(head - 3, hu["muscle"], 0)
            shaft = c.tube(
                [(s * 94, 2, -270), (s * 122, -6, -296), (s * 128, -6, -345)], [15, 18, 15]
            )
            self.bone(np.maximum(shaft, self.surface + 6))
            self.organ(f"{side}_femoral_head", head)
        neck = self.ellipsoid("bladder", (0, 22, -285), (26, 22, 20))
        bladder = smooth_union(self.ellipsoid("bladder", (0, 30, -268), (42, 32, 28)), neck, 8)
        c.paint(bladder - 3, hu["muscle"], 0)
        self.organ("bladder", bladder)
        # prostate or uterus
        c.paint(c.ellipsoid((0, -10, -285), (24, 12, 26)), hu["muscle"] + 10, 0)
        canal = [(0, -50, -226), (4, -64, -250), (0, -58, -285), (0, -45, -318)]
        self.hollow(
            "rectum", self.tube("rectum", canal, [14, 17, 17, 11]) + c.lumps, 4.0, 5 + 35 * c.grain
        )

    def paint(self):
        """All structures, from the skin inwards; those of firm place come last because they
        displace the others.
        """
        self.body()
        self.thorax()
        self.bowel()
        self.stomach()
        self.liver_spleen()
        self.pancreas_gallbladder()
        self.kidneys()
        if self.canvas.z.min() < -150:
            self.pelvis()
        self.skeleton()
        self.vessels()


def abdomen_ct(seed, shape, spacing, labels, missing, height):
    """CT of an abdomen whose field of view is centred `height` mm above the kidneys; image in HU
    and label.
    """
    unknown = sorted(set(missing) - set(labels))
    if unknown:
        raise ValueError(
            f"unknown organ {unknown[0]!r} in missing; choose from {', '.join(sorted(labels))}"
        )
    if "adrenal" in missing:
        missing = (*missing, "right_adrenal", "left_adrenal")
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.95, 1.04, 3)
    centre = (0, 0, height + rng.normal(0, 3))
    canvas = Canvas(rng, shape, spacing, centre, scale, wobble=2.6, background=-1000.0)
    Abdomen(rng, canvas, labels, missing).paint()
    image = ndimage.gaussian_filter(canvas.image, 0.4)
    grainy = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (1.1, 1.1, 0.4))
    image += rng.uniform(7, 12) * grainy / grainy.std() + rng.uniform(3, 6) * rng.standard_normal(
        shape, np.float32
    )
    image += 3 * smooth_noise(rng, shape, spacing, 120.0)  # beam hardening and scatter
    return np.clip(image, -1024, 3071).astype(np.float32), canvas.label


def btcv_phantom(seed, shape=(128, 96, 56), spacing=(2.8, 2.8, 4.0), missing=()):
    """Abdominal CT with the 13 BTCV organs.

    shape (H, W, D) voxels and spacing mm, in RAS order; the body needs about 330 × 240 × 220 mm.
    missing: names of BTCV_LABELS that this patient lacks.
    Returns image (H, W, D) float32 in HU and label (H, W, D) uint8 with ids 0-13.
    """
    return abdomen_ct(seed, shape, spacing, BTCV_LABELS, tuple(missing), height=0)


def word_phantom(seed, shape=(128, 96, 96), spacing=(2.8, 2.8, 4.5), missing=()):
    """CT of abdomen and pelvis with the 16 WORD organs.

    shape (H, W, D) voxels and spacing mm, in RAS order; the body needs about 340 × 240 × 430 mm.
    missing: names of WORD_LABELS that this patient lacks.
    Returns image (H, W, D) float32 in HU and label (H, W, D) uint8 with ids 0-16.
    """
    return abdomen_ct(seed, shape, spacing, WORD_LABELS, tuple(missing), height=-112)


def brain_tissue(rng, canvas):
    """Distances of brain, white matter and fluid in a canvas of brain coordinates (mm, centred
    between commissures).
    """
    c = canvas
    brain = c.ellipsoid((0, 0, 12), (68, 84, 56))
    for s in (1, -1):
        brain = smooth_union(brain, c.ellipsoid((s * 40, 2, -22), (25, 42, 24)), 10)
    brain += 0.6 * c.lumps
    fissure = np.maximum(
        np.abs(c.x + 1.5 * c.lumps) - 1.6, np.maximum(16 - c.z - 0.5 * np.abs(c.y), -30 - c.z)
    )
    hind = smooth_union(
        c.ellipsoid((0, -46, -42), (50, 34, 24)),
        c.tube([(0, -20, -14), (0, -30, -70)], [17, 11]),
        6,
    )
    # Sulci follow the zero level of a random field, as deep as the cortex folds.
    folds = smooth_noise(rng, c.shape, c.spacing, 11.0)
    slope = np.sqrt(sum(g * g for g in np.gradient(folds, *c.spacing))) + 0.04
    fold = np.abs(folds) / slope
    sulci = np.maximum(fold - 0.8, -brain - rng.uniform(14, 19))
    folia = np.maximum(
        np.abs((np.hypot(c.y + 20, c.z + 20) + 1.5 * c.lumps) % 7 - 3.5) - 0.6, -hind - 12
    )
    fluid = np.minimum(np.maximum(sulci, brain), fissure)
    cerebrum_white = np.maximum(brain + 4.5, np.minimum(3.4 - fold, brain + 17))
    cerebrum_white = np.maximum(cerebrum_white, 4.5 - fissure)
    hind_white = np.maximum(hind + 6, 1.6 - folia)
    in_hind = hind < brain
    fluid = np.where(in_hind, np.maximum(folia, np.abs(c.x) * 0.03 - 5), fluid)
    white = np.where(in_hind, hind_white, cerebrum_white)
    size = rng.uniform(0.8, 1.5)
    ventricles = np.maximum(np.abs(c.x) - 1.8, np.hypot((c.y + 6) / 1.6, c.z + 2) - 9)
    for s in (1, -1):
        deep = np.minimum(
            c.ellipsoid((s * 12, -14, 2), (9, 14, 9)),
            c.ellipsoid((s * 25, 6, 2), (7, 17, 11), (0, 0, s * 12)),
        )
        white = np.maximum(white, -np.minimum(deep, c.ellipsoid((s * 15, 20, 10), (5, 12, 8))))
        horn = [
            (s * 7, 34, 8),
            (s * 9, 12, 17),
            (s * 13, -14, 20),
            (s * 24, -36, 8),
            (s * 33, -20, -12),
        ]
        ventricles = np.minimum(ventricles, c.tube(horn, size * np.array([5.5, 6, 6, 7, 3.5])))
    return np.minimum(brain, hind), white, np.minimum(fluid, ventricles), ventricles


def brats_phantom(seed, shape=(96, 112, 88), no_enhancing=False):
    """Skull-stripped brain MRI with a glioma, four co-registered images; the head is scaled to fit
    `shape`.

    no_enhancing: the tumour core has no enhancing rim (label 3 absent), as in low-grade glioma.
    Returns images {t1c, t1n, t2f, t2w: (H, W, D) float32, zero outside the brain, arbitrary units
    above zero} and label (H, W, D) uint8: 1 necrotic or non-enhancing core, 2 edema, 3 enhancing;
    RAS order.
    """
    rng = np.random.default_rng(seed)
    voxel = max(extent / n for extent, n in zip((148, 180, 146), shape))  # mm of brain per voxel
    c = Canvas(rng, shape, (voxel,) * 3, (0, 0, 1), rng.uniform(0.95, 1.0, 3), wobble=1.3)
    brain, white, fluid, ventricles = brain_tissue(rng, c)
    side = rng.choice((-1, 1))
    centre = (side * rng.uniform(24, 40), rng.uniform(-45, 42), rng.uniform(6, 30))
    semi = rng.uniform(15, 25, 3)
    tumour = (
        c.ellipsoid(centre, semi, rng.uniform(-40, 40, 3), margin=50)
        + 2.2 * c.lumps
        + 0.8 * c.grain
    )
    rim = rng.uniform(3.5, 6.0) + 1.2 * c.lumps
    spread = rng.uniform(9, 17) + 3.0 * smooth_noise(rng, shape, c.spacing, 18.0)
    # Edema runs along white matter, spares cortex, stops at the ventricles and does not cross the
    # midline.
    midline = 3 - side * c.x + 1.5 * c.lumps
    edema = -smooth_union(np.maximum(spread, 3) - tumour, -midline, 9)
    edema = np.maximum(np.maximum(edema, 0.7 * (white - 1)), -ventricles)
    edema = np.minimum(edema, np.maximum(tumour - 2.5, brain + 1))
    tumour = np.maximum(np.maximum(tumour, brain + 1.5), 1 - ventricles)
    necrosis = tumour if no_enhancing else tumour + np.maximum(rim, 1.2 * voxel)
    layers = [("grey", brain, None), ("white", white, None), ("csf", fluid, None)]
    layers += [
        ("edema", edema, 2),
        ("enhancing", tumour, None if no_enhancing else 3),
        ("necrotic_core", necrosis, 1),
    ]
    inside = brain < 0
    shared_bias = smooth_noise(rng, shape, c.spacing, 110.0)
    images = {}
    for channel, name in enumerate(BRATS_MODALITIES):
        c.image[:] = MR_TISSUE["csf"][channel]
        for tissue, distance, label in layers:
            value = MR_TISSUE[tissue][channel] * rng.normal(1, 0.04)
            texture = 0.08 if tissue in ("edema", "enhancing", "necrotic_core") else 0.02
            c.paint(distance, value * (1 + texture * c.grain), label)
        image = ndimage.gaussian_filter(c.image, 0.45)
        image *= np.exp(0.07 * shared_bias + 0.05 * smooth_noise(rng, shape, c.spacing, 90.0))
        noise = 22 * rng.standard_normal((2, *shape), np.float32)
        image = np.hypot(image + noise[0], noise[1])  # magnitude images have Rician noise
        images[name] = np.where(inside, np.maximum(image, 1), 0).astype(np.float32)
    return images, np.where(inside, c.label, 0).astype(np.uint8)
