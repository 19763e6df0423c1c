"""Metrics against medpy, MONAI and slow references, and what happens when a mask is empty."""

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from medpy.metric import binary as medpy
from monai.metrics import compute_hausdorff_distance

import metrics
from metrics import (
    DISTANCES,
    METRICS,
    asd,
    case_metrics,
    class_dice,
    dice,
    hd95,
    jaccard,
    summarise,
)
from utils.compiled import compiled

COMPARED = ("dice", "jaccard", "hd95", "asd", "assd")  # with other implementations

CUBE, LINE = (9, 8, 7), (13, 11)


def test_compiled_code_runs_without_a_cache():
    """Of a source that Numba finds no folder for, as in a read-only container."""
    scope = {}
    exec(compile("def thrice(value): return 3 * value", "/proc/nowhere.py", "exec"), scope)
    assert compiled(scope["thrice"])(2) == 6


def test_a_cache_that_cannot_be_written_is_left_alone(monkeypatch):
    from numba.core.caching import FunctionCache

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def four_times(value):
        return 4 * value

    monkeypatch.setattr(FunctionCache, "save_overload", full)
    assert compiled(four_times)(2) == 8


def blob(shape, *slices):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[slices] = 1
    return mask


def pairs():
    """(name, prediction, label, spacing) of binary masks that both have voxels."""
    for shape, spacing in (
        (CUBE, (1.0, 1.0, 1.0)),
        (CUBE, (0.7, 1.5, 4.0)),
        (LINE, (1.0, 1.0)),
        (LINE, (2.5, 0.4)),
    ):
        rng = np.random.default_rng(len(shape))
        for density in (0.02, 0.3, 0.9):
            noise = [(rng.random(shape) < density).astype(np.uint8) for _ in range(2)]
            yield f"noise {density} {shape} {spacing}", *noise, spacing
        inner, edge = slice(2, 5), slice(0, 4)
        everything, first = (slice(None),) * len(shape), (0,) * len(shape)
        last = tuple(size - 1 for size in shape)
        boxes = {
            "inside": (inner,) * len(shape),
            "border": (edge,) * len(shape),
            "full": everything,
            "corner": first,
            "opposite": last,
            "thin": (3, *everything[1:]),
        }
        for chosen in (
            "inside border",
            "full inside",
            "corner opposite",
            "corner corner",
            "thin border",
        ):
            a, b = chosen.split()
            yield (
                f"{a}-{b} {shape} {spacing}",
                blob(shape, *boxes[a]),
                blob(shape, *boxes[b]),
                spacing,
            )


PAIRS = [pytest.param(*values, id=name) for name, *values in pairs()]


@pytest.mark.parametrize("prediction, label, spacing", PAIRS)
def test_equals_medpy(prediction, label, spacing):
    (row,) = case_metrics(prediction, label, 2, spacing=spacing)
    expected = {
        "dice": medpy.dc(prediction, label),
        "jaccard": medpy.jc(prediction, label),
        "hd95": medpy.hd95(prediction, label, spacing),
        "asd": medpy.asd(prediction, label, spacing),
        "assd": medpy.assd(prediction, label, spacing),
        "absent": 0,
        "missed": 0,
        "spurious": 0,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert dice(prediction, label) == pytest.approx(expected["dice"])
    assert jaccard(prediction, label) == pytest.approx(expected["jaccard"])
    assert hd95(prediction > 0, label > 0, spacing=spacing) == pytest.approx(
        expected["hd95"], abs=1e-9
    )
    assert asd(prediction > 0, label > 0, spacing=spacing) == pytest.approx(
        expected["asd"], abs=1e-9
    )
    assert asd(prediction, label, spacing=spacing, symmetric=True) == pytest.approx(
        expected["assd"], abs=1e-9
    )


@pytest.mark.parametrize("prediction, label, spacing", PAIRS)
def test_directed_hd95_equals_monai(prediction, label, spacing):
    tensors = [torch.from_numpy(mask)[None, None] for mask in (prediction, label)]
    expected = compute_hausdorff_distance(
        *tensors, include_background=True, percentile=95, directed=False, spacing=list(spacing)
    ).item()
    found = hd95(prediction, label, spacing=spacing, definition="directed")
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    (row,) = case_metrics(prediction, label, 2, spacing=spacing, hd95="directed")
    assert row["hd95"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def slow_surface(mask):
    """Coordinates of the mask's voxels that have a neighbour outside it or outside the volume."""

    def inside(place):
        return all(0 <= i < side for i, side in zip(place, mask.shape)) and mask[tuple(place)]

    steps = [step for axis in np.eye(mask.ndim, dtype=int) for step in (axis, -axis)]
    return np.array([p for p in np.argwhere(mask) if not all(inside(p + step) for step in steps)])


def slow_metrics(prediction, label, spacing):
    """COMPARED with pooled HD95, then the directed HD95, of two binary masks from the distances of
    all pairs.
    """
    both, either = np.sum(prediction & label), np.sum(prediction | label)
    apart = (slow_surface(prediction)[:, None] - slow_surface(label)[None]) * np.array(spacing)
    pairs = np.sqrt((apart**2).sum(-1))
    forward, backward = pairs.min(1), pairs.min(0)
    pooled = np.concatenate([forward, backward])
    directed = max(np.percentile(forward, 95), np.percentile(backward, 95))
    overlap = [2 * both / (prediction.sum() + label.sum()), both / either]
    return [*overlap, np.percentile(pooled, 95), forward.mean(), pooled.mean(), directed]


def hard_maps(kind, shape):
    """Prediction and label with ids 0..3, in which distances from 0 to the length of the volume
    occur.
    """
    rng = np.random.default_rng(7)
    prediction, label = np.zeros((2, *shape), np.uint8)
    if kind == "scattered noise":
        for k, part in enumerate(np.array_split(np.arange(shape[0]), 3), start=1):
            label[part, 3:8] = k
        prediction = np.where(
            rng.random(shape) < 0.05, rng.integers(0, 4, shape, np.uint8), np.roll(label, 2, 1)
        )
    elif kind == "noise alone":
        prediction, label = (
            np.where(rng.random(shape) < 0.1, rng.integers(0, 4, shape, np.uint8), 0)
            for _ in range(2)
        )
    elif kind == "single voxels":
        for k in (1, 2, 3):
            for volume in (prediction, label):
                volume.ravel()[3 * rng.integers(volume.size // 3) + k - 1] = k
    elif kind == "far apart, at the border":
        label[:2], label[2:4] = 1, 2
        prediction[-2:], prediction[-4:-2] = 2, 1
        prediction[-1, -1], label[0, 0] = 3, 3
    elif kind == "one id missed, one invented":
        label[2:6], label[6:9], prediction[3:6], prediction[9:11] = 1, 2, 1, 3
    return prediction, label


KINDS = (
    "scattered noise",
    "noise alone",
    "single voxels",
    "far apart, at the border",
    "one id missed, one invented",
    "all absent",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape, spacing",
    [
        ((19, 14, 11), (1.5, 1.5, 2.0)),
        ((19, 14, 11), (1.0, 1.0, 1.0)),
        ((12, 11, 4), (0.7, 0.7, 9.0)),
        ((12, 11, 4), (8.0, 0.3, 1.1)),
        ((31, 27), (1.0, 1.0)),
        ((31, 27), (0.4, 2.5)),
    ],
)
def test_equals_all_pairs(kind, shape, spacing):
    prediction, label = hard_maps(kind, shape)
    # The order of axes in memory (nibabel's is the reverse of NumPy's) and the integer type change
    # nothing.
    for variant in (np.asarray, np.asfortranarray, lambda v: v[::-1].astype(np.int64)[::-1]):
        rows = {
            name: case_metrics(variant(prediction), variant(label), 5, spacing=spacing, hd95=name)
            for name in ("pooled", "directed")
        }
        for k in range(1, 5):
            row, p, g = rows["pooled"][k - 1], prediction == k, label == k
            flags = {"absent": not (p.any() or g.any()), "missed": not p.any() and g.any()}
            flags["spurious"] = p.any() and not g.any()
            assert {key: row[key] for key in flags} == flags
            values = [row[key] for key in COMPARED] + [rows["directed"][k - 1]["hd95"]]
            if p.any() and g.any():
                assert values == pytest.approx(slow_metrics(p, g, spacing), abs=1e-9)
            else:
                overlap = math.nan if flags["absent"] else 0.0
                assert values == pytest.approx([overlap, overlap] + [math.nan] * 4, nan_ok=True)


# NSD

# By hand: a surface element around voxels of the unit cube that share faces, as corners to fans of
# triangles. What is not here is one of these turned or mirrored.
ELEMENTS = {
    "corner": ([(0, 0, 0)], [[(0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5)]]),
    "edge": ([(0, 0, 0), (0, 0, 1)], [[(0.5, 0, 0), (0, 0.5, 0), (0, 0.5, 1), (0.5, 0, 1)]]),
    "three around a corner": (
        [(0, 0, 0), (0, 0, 1), (0, 1, 0)],
        # a right triangle in the plane x = 0.5, and a trapezoid
        [
            [(0.5, 0, 0), (0.5, 0, 1), (0.5, 1, 0)],
            [(0.5, 0, 1), (0.5, 1, 0), (0, 1, 0.5), (0, 0.5, 1)],
        ],
    ),
    "face": (
        [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)],
        [[(0.5, 0, 0), (0.5, 0, 1), (0.5, 1, 1), (0.5, 1, 0)]],
    ),
    "a corner and its neighbours": (
        [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)],
        # a flat hexagon
        [[(0.5, 0, 1), (0, 0.5, 1), (0, 1, 0.5), (0.5, 1, 0), (1, 0.5, 0), (1, 0, 0.5)]],
    ),
    "chain": (
        [(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)],
        [[(0, 0.5, 0), (0, 1, 0.5), (1, 1, 0.5), (1, 0.5, 1), (0.5, 0, 1), (0.5, 0, 0)]],
    ),
}


def turned(point, order, mirrored):
    return tuple(1 - point[a] if mirror else point[a] for a, mirror in zip(order, mirrored))


@functools.cache
def slow_patches():
    """Voxels of the unit cube that share faces -> the fans of their element."""
    found = {}
    for voxels, fans in ELEMENTS.values():
        for order in itertools.permutations(range(3)):
            for mirrored in itertools.product((False, True), repeat=3):
                key = frozenset(turned(voxel, order, mirrored) for voxel in voxels)
                placed = [[turned(point, order, mirrored) for point in fan] for fan in fans]
                found.setdefault(key, placed)
    return found


def parts_by_faces(voxels):
    """The voxels in groups that share faces."""
    left, groups = set(voxels), []
    while left:
        group = {left.pop()}
        while near := {v for v in left if any(math.dist(v, own) == 1 for own in group)}:
            group |= near
            left -= near
        groups.append(frozenset(group))
    return groups


@functools.cache
def slow_element(inside, spacing):
    """Area of the surface within the cube (length within the square) between the centres of voxels,
    of which `inside` are in the mask.
    """
    axes = len(spacing)
    if 2 * len(inside) > 2**axes:
        inside = frozenset(itertools.product((0, 1), repeat=axes)) - inside
    if axes == 2:
        corner_cut = math.hypot(*spacing) / 2
        groups = parts_by_faces(inside)
        if len(groups) == 1 and len(inside) == 2:
            (first, second) = inside
            return spacing[0] if first[0] != second[0] else spacing[1]
        return corner_cut * len(groups)
    area = 0.0
    for group in parts_by_faces(inside):
        for fan in slow_patches()[group]:
            first, *others = np.array(fan) * spacing
            for b, c in itertools.pairwise(others):
                a = [math.dist(first, b), math.dist(b, c), math.dist(c, first)]
                half = sum(a) / 2
                area += math.sqrt(max(0.0, half * math.prod(half - side for side in a)))  # Heron
    return area


def slow_elements(mask, spacing):
    """Places in mm and sizes of the surface elements of a mask."""
    mask = np.pad(mask, 1)
    corners = list(itertools.product((0, 1), repeat=mask.ndim))
    places, sizes = [], []
    for place in np.ndindex(*(side - 1 for side in mask.shape)):
        inside = frozenset(c for c in corners if mask[tuple(np.add(place, c))])
        if 0 < len(inside) < len(corners):
            places.append(np.multiply(place, spacing))
            sizes.append(slow_element(inside, spacing))
    return np.array(places), np.array(sizes)


def slow_nsd(prediction, label, spacing, tolerance):
    (places_p, sizes_p), (places_g, sizes_g) = (
        slow_elements(mask, spacing) for mask in (prediction, label)
    )
    apart = np.linalg.norm(places_p[:, None] - places_g[None], axis=-1)
    limit = tolerance * (1 + 1e-9)  # five voxels of 0.4 mm are within 2 mm, whatever is rounded
    within = sizes_p[apart.min(1) <= limit].sum() + sizes_g[apart.min(0) <= limit].sum()
    return within / (sizes_p.sum() + sizes_g.sum())


def test_every_neighbourhood_has_the_area_of_its_element():
    for spacing in ((1.0, 1.0, 1.0), (0.7, 1.5, 4.0), (2.5, 0.4)):
        corners = list(itertools.product((0, 1), repeat=len(spacing)))
        sizes = metrics._element_sizes(spacing)
        assert sizes[0] == sizes[-1] == 0
        for code in range(1, len(sizes) - 1):
            inside = frozenset(c for k, c in enumerate(corners) if code >> k & 1)
            assert sizes[code] == pytest.approx(slow_element(inside, spacing), abs=1e-9), inside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape, spacing",
    [((9, 9, 5), (1.5, 1.5, 2.0)), ((9, 9, 5), (0.3, 0.7, 4.0)), ((17, 9), (0.4, 2.5))],
)
def test_nsd_equals_all_pairs(kind, shape, spacing):
    prediction, label = hard_maps(kind, shape)
    for tolerance in (0.0, 1.0, 2.0, 6.1):
        rows = case_metrics(prediction, label, 4, spacing=spacing, tolerance=tolerance)
        for k, row in enumerate(rows, start=1):
            p, g = prediction == k, label == k
            if p.any() and g.any():
                expected = slow_nsd(p, g, spacing, tolerance)
                assert row["nsd"] == pytest.approx(expected, abs=1e-9)
    # a tolerance for each class
    each = case_metrics(prediction, label, 4, spacing=spacing, tolerance=(1.0, 2.0, 6.1))
    alone = [
        case_metrics(prediction, label, 4, spacing=spacing, tolerance=value)[k]["nsd"]
        for k, value in enumerate((1.0, 2.0, 6.1))
    ]
    assert [row["nsd"] for row in each] == pytest.approx(alone, nan_ok=True)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.1, 0.7, 5.0), (0.3, 0.3)])
def test_a_shifted_box_is_within_a_tolerance_of_the_shift(spacing):
    shape = (12,) * len(spacing)
    label = blob(shape, *[slice(2, 7)] * len(spacing))
    for axis, shift in itertools.product(range(len(spacing)), (1, 3)):
        prediction = np.roll(label, shift, axis)
        found = [
            case_metrics(prediction, label, 2, spacing=spacing, tolerance=tolerance)[0]["nsd"]
            for tolerance in (shift * spacing[axis], 0.99 * shift * spacing[axis], 0.0)
        ]
        assert found[0] == 1.0 and 1 > found[1] >= found[2] > 0


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.5), (0.4, 0.4, 1.0)])
def test_nsd_of_shifted_spheres(spacing):
    """Of two spheres that are d apart, a surface lies within t of the other over t / d of its
    height, and so of its area (Archimedes): here up to the size of a voxel over d.
    """
    axes = np.meshgrid(*[np.arange(-30, 30.1, step) for step in spacing], indexing="ij")
    spheres = [
        (np.sqrt(axes[0] ** 2 + (axes[1] - shift) ** 2 + axes[2] ** 2) <= 20).astype(np.uint8)
        for shift in (0, 8)
    ]
    for tolerance in (2.5, 4.5, 6.5):
        (row,) = case_metrics(*spheres, 2, spacing=spacing, tolerance=tolerance)
        assert row["nsd"] == pytest.approx(tolerance / 8, abs=max(spacing) / 8)


def test_distances_just_within_and_beyond_the_reach_of_the_look_up():
    for gap in range(1, 3 * metrics.REACH):
        for spacing in ((1.0, 1.0, 1.0), (0.7, 1.5, 4.0), (4.0, 1.5, 0.7)):
            for step in ((gap, 0, 0), (0, gap, 0), (0, 0, gap), (gap, gap, 0), (gap, gap, gap)):
                prediction, label = np.zeros((2, 12, 12, 12), np.uint8)
                label[0, 0, 0] = prediction[step] = 1
                expected = np.linalg.norm(np.multiply(step, spacing))
                assert asd(prediction, label, spacing=spacing) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ("shell", "everywhere", "one voxel"))
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.3, 4.0, 1.0), (0.7, 2.5)])
def test_points_far_away_find_the_nearest_of_all(kind, spacing, monkeypatch):
    rng = np.random.default_rng(3)
    axes = len(spacing)
    points = rng.integers(0, 90, (200, axes))
    targets = rng.integers(0, 90, (3000, axes))  # everywhere: more blocks than are searched at once
    if kind == "shell":
        direction = rng.normal(size=(3000, axes))
        targets = np.rint(
            45 + 20 * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        ).astype(int)
    elif kind == "one voxel":
        targets = targets[:1]
    expected = np.sqrt(
        (((points[:, None] - targets[None]) * np.array(spacing)) ** 2).sum(-1).min(1)
    )
    for most in (1, 4, metrics.MOST_BLOCKS):
        monkeypatch.setattr(metrics, "MOST_BLOCKS", most)
        np.testing.assert_allclose(
            metrics._far_distances(points, targets, spacing), expected, rtol=1e-12
        )


def test_more_than_256_ids():
    prediction, label = np.zeros((2, 9, 8), np.int64)
    # 300 and 44 are one in eight bits
    label[:4], label[4:], prediction[:4], prediction[5:] = 300, 44, 300, 44
    rows = case_metrics(prediction, label, 301, spacing=(1.0, 1.0))
    assert rows[299]["dice"] == 1.0 and rows[43]["dice"] == pytest.approx(2 * 32 / (40 + 32))
    assert sum(row["absent"] for row in rows) == 298
    assert class_dice(prediction, label, 301)[299] == 1.0


def test_inputs_are_left_as_they_were():
    prediction, label = hard_maps("scattered noise", (19, 14, 11))
    copies = prediction.copy(), label.copy()
    for volume in (prediction, label):
        volume.flags.writeable = False
    case_metrics(prediction, label, 4, spacing=(1.0, 1.0, 1.0))
    assert np.array_equal(prediction, copies[0]) and np.array_equal(label, copies[1])


def test_hand_values():
    # A line of 10 voxels of 2 mm: voxels 0-4 against 0-8. Surfaces are whole masks in one row.
    prediction, label = blob((1, 10), 0, slice(0, 5)), blob((1, 10), 0, slice(0, 9))
    (row,) = case_metrics(prediction, label, 2, spacing=(1.0, 2.0))
    assert row["dice"] == pytest.approx(10 / 14) and row["jaccard"] == pytest.approx(5 / 9)
    back = [0, 0, 0, 0, 0, 2, 4, 6, 8]
    assert row["asd"] == 0.0 and row["assd"] == pytest.approx(np.mean([0] * 5 + back))
    assert row["hd95"] == pytest.approx(np.percentile([0] * 5 + back, 95))
    assert hd95(prediction, label, spacing=(1.0, 2.0), definition="directed") == pytest.approx(
        np.percentile(back, 95)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("shape, spacing", [(CUBE, (0.7, 1.5, 4.0)), (LINE, (2.5, 0.4))])
def test_label_maps_are_scored_class_by_class(shape, spacing, dtype):
    rng = np.random.default_rng(4)
    prediction, label = (rng.integers(0, 5, shape).astype(dtype) for _ in range(2))
    rows = case_metrics(prediction, label, 5, spacing=spacing)
    assert len(rows) == 4
    for k, row in enumerate(rows, start=1):
        p, g = prediction == k, label == k
        expected = [f(p, g) for f in (medpy.dc, medpy.jc)] + [
            f(p, g, spacing) for f in (medpy.hd95, medpy.asd, medpy.assd)
        ]
        assert [row[key] for key in COMPARED] == pytest.approx(expected, abs=1e-9)
    assert class_dice(prediction, label, 5) == pytest.approx([row["dice"] for row in rows])


@pytest.mark.parametrize("shape, spacing", [(CUBE, (0.7, 1.5, 4.0)), (LINE, (2.5, 0.4))])
def test_touching_classes_have_their_own_surfaces(shape, spacing):
    label = np.full(shape, 1)
    label[4:] = 2
    prediction = np.full(shape, 2)
    prediction[:6] = 1
    rows = case_metrics(prediction, label, 3, spacing=spacing)
    for k, row in enumerate(rows, start=1):
        assert row["hd95"] == pytest.approx(medpy.hd95(prediction == k, label == k, spacing))


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_multilabel_scores_overlapping_regions(dtype):
    rng = np.random.default_rng(5)
    prediction, label = (
        np.stack([rng.random(CUBE) < d for d in (0.6, 0.3, 0.1)]).astype(dtype) for _ in range(2)
    )
    rows = case_metrics(prediction, label, 3, spacing=(1.0, 2.0, 3.0), multilabel=True)
    assert len(rows) == 3
    for region, row in enumerate(rows):
        assert row["dice"] == pytest.approx(medpy.dc(prediction[region], label[region]))
        assert row["hd95"] == pytest.approx(
            medpy.hd95(prediction[region], label[region], (1.0, 2.0, 3.0))
        )
    assert class_dice(prediction, label, 3, multilabel=True) == pytest.approx(
        [row["dice"] for row in rows]
    )


# Empty masks

DIAGONAL = math.sqrt(9**2 + 16**2 + 21**2)  # CUBE in voxels of (1, 2, 3) mm


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("policy", ["nan", "diag", "agree"])
@pytest.mark.parametrize("kind", ["absent", "missed", "spurious"])
def test_empty_masks(kind, policy, multilabel):
    full, nothing = (
        blob(CUBE, slice(2, 5), slice(2, 5), slice(2, 5)),
        np.zeros(CUBE, dtype=np.uint8),
    )
    pair = {"absent": (nothing, nothing), "missed": (nothing, full), "spurious": (full, nothing)}[
        kind
    ]
    if multilabel:
        pair = [mask[None] for mask in pair]
    (row,) = case_metrics(
        *pair, 1 if multilabel else 2, spacing=(1.0, 2.0, 3.0), empty=policy, multilabel=multilabel
    )
    overlap = defined = math.nan if kind == "absent" else 0.0
    distance = DIAGONAL if policy == "diag" and kind != "absent" else math.nan
    if policy == "agree" and kind == "absent":
        overlap, distance = 1.0, 0.0
    assert set(DISTANCES) >= {"hd95", "asd", "assd"} and not {"dice", "jaccard"} & set(DISTANCES)
    expected = {key: distance if key in DISTANCES else overlap for key in METRICS}
    assert row == pytest.approx(
        expected | {"absent": 0, "missed": 0, "spurious": 0, kind: 1}, nan_ok=True
    )
    assert class_dice(*pair, len(pair[0]) if multilabel else 2, multilabel) == pytest.approx(
        [defined], nan_ok=True
    )


def test_empty_masks_by_the_single_functions():
    full, nothing = np.ones((3, 3), bool), np.zeros((3, 3), bool)
    assert dice(full, nothing) == jaccard(nothing, full) == 0.0
    assert all(
        math.isnan(value)
        for value in (
            dice(nothing, nothing),
            jaccard(nothing, nothing),
            hd95(full, nothing, spacing=(1, 1)),
            asd(nothing, nothing, spacing=(1, 1)),
        )
    )


@pytest.mark.parametrize("shape, spacing", [(CUBE, (0.7, 1.5, 4.0)), (LINE, (2.5, 0.4))])
@pytest.mark.parametrize("definition", ["pooled", "directed"])
def test_agreement_on_nothing_changes_no_other_class(shape, spacing, definition):
    rng = np.random.default_rng(6)
    prediction, label = rng.integers(0, 4, shape), rng.integers(0, 4, shape)
    plain, agree = (
        case_metrics(prediction, label, 6, spacing=spacing, hd95=definition, empty=policy)
        for policy in ("nan", "agree")
    )
    assert agree[:3] == plain[:3]
    for row in agree[3:]:
        scores = {key: 0.0 if key in DISTANCES else 1.0 for key in METRICS}
        assert row == scores | {"absent": 1, "missed": 0, "spurious": 0}


def test_agreement_on_nothing_enters_the_means():
    full, nothing = (
        blob(CUBE, slice(2, 5), slice(2, 5), slice(2, 5)),
        np.zeros(CUBE, dtype=np.uint8),
    )
    rows = [
        {
            "case": case,
            "class": "x",
            "diagonal": 1.0,
            **case_metrics(*pair, 2, spacing=(1, 1, 1), empty="agree")[0],
        }
        for case, pair in {"a": (nothing, nothing), "b": (nothing, full), "c": (full, full)}.items()
    ]
    result = summarise(rows)
    assert result["mean"]["dice"] == pytest.approx(2 / 3) and result["mean"]["hd95"] == 0.0
    assert result["counts"] == {"pairs": 3, "absent": 1, "missed": 1, "spurious": 0}


# Summary


def row(case, name, dice, hd95=1.0, **flags):
    values = dict.fromkeys(METRICS, math.nan) | {"dice": dice, "hd95": hd95}
    return {
        "case": case,
        "class": name,
        "diagonal": 20.0,
        **values,
        "absent": 0,
        "missed": 0,
        "spurious": 0,
        **flags,
    }


def test_summary_is_the_mean_of_case_means():
    nan = math.nan
    rows = [
        row("a", "liver", 0.8, 2.0),
        row("a", "spleen", 0.4, 4.0),
        row("b", "liver", 0.9, 6.0),
        row("b", "spleen", nan, nan, absent=1),
        row("c", "liver", 0.0, nan, missed=1),
        row("c", "spleen", 0.0, nan, spurious=1),
        row("d", "liver", nan, nan, absent=1),
        row("d", "spleen", nan, nan, absent=1),
    ]
    result = summarise(rows)
    assert result["cases"] == 4
    assert result["counts"] == {"pairs": 8, "absent": 3, "missed": 1, "spurious": 1}
    assert result["mean"]["dice"] == pytest.approx((0.6 + 0.9 + 0.0) / 3)
    assert result["std"]["dice"] == pytest.approx(np.std([0.6, 0.9, 0.0]))
    assert result["mean"]["hd95"] == pytest.approx((3.0 + 6.0) / 2)
    assert result["classes"]["liver"]["dice"] == pytest.approx((0.8 + 0.9 + 0.0) / 3)
    assert result["classes"]["spleen"]["dice"] == pytest.approx((0.4 + 0.0) / 2)
    assert result["classes"]["spleen"]["hd95"] == pytest.approx(4.0)
    failed = result["penalised"]
    assert failed["mean"]["hd95"] == pytest.approx((3.0 + 6.0 + 20.0) / 3)
    assert failed["classes"]["liver"]["hd95"] == pytest.approx((2.0 + 6.0 + 20.0) / 3)
    assert failed["classes"]["spleen"]["hd95"] == pytest.approx((4.0 + 20.0) / 2)
    # Never defined: None, not NaN, so that the summary is valid JSON; and no warning about empty
    # means.
    assert result["mean"]["asd"] is None and result["classes"]["liver"]["assd"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert summarise([])["mean"]["dice"] is None


@pytest.mark.parametrize("policy", ["nan", "diag", "agree"])
@pytest.mark.parametrize("seed", range(5))
def test_a_missed_or_invented_organ_never_improves_the_score(seed, policy):
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, 4, (6, 5, 4)) for _ in range(3)]
    labels[1][labels[1] == 3] = 0  # class 3 is absent from this case
    predictions = [
        np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 4, label.shape))
        for label in labels
    ]
    predictions[1][predictions[1] == 3] = 0

    def mean(predictions):
        rows = [
            {"case": case, "class": k, "diagonal": math.sqrt(77), **scores}
            for case, (p, g) in enumerate(zip(predictions, labels))
            for k, scores in enumerate(case_metrics(p, g, 4, spacing=(1, 1, 1), empty=policy))
        ]
        return summarise(rows)

    before = mean(predictions)
    for case, k in ((0, 1), (0, 3), (2, 2)):
        failed = [p.copy() for p in predictions]
        failed[case][failed[case] == k] = 0
        after = mean(failed)
        assert (
            after["mean"]["dice"] < before["mean"]["dice"]
            and after["mean"]["jaccard"] < before["mean"]["jaccard"]
        )
        assert after["counts"]["missed"] == before["counts"]["missed"] + 1
        if policy == "diag":
            assert after["mean"]["hd95"] > before["mean"]["hd95"]
        for metric in ("hd95", "asd", "assd"):
            assert after["penalised"]["mean"][metric] > before["penalised"]["mean"][metric]
    invented = [p.copy() for p in predictions]
    place = tuple(np.argwhere((labels[1] == 0) & (predictions[1] == 0))[0])
    invented[1][place] = 3
    after = mean(invented)
    assert after["mean"]["dice"] < before["mean"]["dice"] and after["counts"]["spurious"] == 1


# Errors


@pytest.mark.parametrize(
    "shape_p, shape_g, spacing, options, message",
    [
        ((3, 3), (3, 4), (1, 1), {}, r"prediction \(3, 3\) and label \(3, 4\)"),
        ((3, 3), (3, 3), (1, 1, 1), {}, "spacing has 3 values for a volume of 2 axes"),
        (
            (2, 3, 3),
            (2, 3, 3),
            (1, 1, 1),
            {"multilabel": True},
            "spacing has 3 values for a volume of 2 axes",
        ),
        ((3, 3), (3, 3), (1, 1), {"hd95": "max"}, "hd95 must be one of .*got max"),
        ((3, 3), (3, 3), (1, 1), {"empty": "zero"}, "empty one of .*zero"),
        ((3, 3), (3, 3), (1, 1), {"tolerance": -1}, "tolerance must not be negative, got -1"),
    ],
)
def test_shape_spacing_and_option_errors(shape_p, shape_g, spacing, options, message):
    with pytest.raises(ValueError, match=message):
        case_metrics(np.zeros(shape_p, int), np.zeros(shape_g, int), 2, spacing=spacing, **options)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize("which", ["prediction", "label"])
def test_id_errors(which, wrong):
    good, bad = np.zeros((3, 3), int), np.zeros((3, 3), int)
    bad[1, 1] = wrong
    pair = (bad, good) if which == "prediction" else (good, bad)
    for score in (lambda: case_metrics(*pair, 3, spacing=(1, 1)), lambda: class_dice(*pair, 3)):
        with pytest.raises(ValueError, match=rf"{which} has ids .*{wrong}.*expected 0\.\.2"):
            score()


@pytest.mark.parametrize("which", ["prediction", "label"])
def test_label_maps_must_hold_integers(which):
    good, bad = np.zeros((3, 3), int), np.full((3, 3), 0.5)
    pair = (bad, good) if which == "prediction" else (good, bad)
    for score in (lambda: case_metrics(*pair, 3, spacing=(1, 1)), lambda: class_dice(*pair, 3)):
        with pytest.raises(ValueError, match=rf"{which} has dtype float64, expected an integer"):
            score()


def test_spacing_is_required():
    with pytest.raises(TypeError, match="spacing"):
        metrics.case_metrics(np.zeros((3, 3), int), np.zeros((3, 3), int), 2)


@pytest.mark.parametrize("count", [2, 4])
def test_multilabel_region_count_must_fit(count):
    masks = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="3"):
        case_metrics(masks, masks, count, spacing=(1, 1), multilabel=True)


@pytest.mark.parametrize("multilabel", [False, True])
def test_voxels_that_nobody_labelled_count_in_no_metric(multilabel):
    rng = np.random.default_rng(4)
    shape = (3, *CUBE) if multilabel else CUBE
    prediction, label = (rng.integers(0, 2 if multilabel else 3, shape, np.uint8) for _ in "pg")
    unknown = rng.random(CUBE) < 0.4
    marked = np.where(unknown, metrics.UNKNOWN, label).astype(np.uint8)
    cleared = [np.where(unknown, 0, ids).astype(np.uint8) for ids in (prediction, label)]
    how = {"spacing": (1.0, 2.0, 3.0), "multilabel": multilabel}
    assert case_metrics(prediction, marked, 3, **how) == case_metrics(*cleared, 3, **how)
    scores = class_dice(*cleared, 3, multilabel)
    assert class_dice(prediction, marked, 3, multilabel) == scores
    told = class_dice(prediction, marked, 3, multilabel, [True, False, True])
    middle = 1 if multilabel else 0
    assert math.isnan(told[middle]) and np.delete(told, middle) == pytest.approx(
        np.delete(scores, middle)
    )
