"""Per-case segmentation metrics on label maps: Dice, Jaccard, HD95, ASD, NSD, with spacing in mm.

Definitions. The surface of a mask is the mask minus its erosion by the 6-neighbourhood (4 in 2D);
voxels on the edge of the volume belong to it. d(X -> Y) are the Euclidean distances in mm from the
surface voxels of X to those of Y.
- hd95, definition 'pooled': 95th percentile of d(P -> G) and d(G -> P) together (as medpy).
- hd95, definition 'directed': the larger of the two directed 95th percentiles (as MONAI).
- asd: mean of d(P -> G), one-sided (as medpy's asd). assd: mean of d(P -> G) and d(G -> P)
  together, symmetric.
- nsd: normalised surface Dice at a tolerance in mm (Nikolov et al. 2018): the area of both surfaces
  that lies within the tolerance of the other, over their whole area. Here a surface is made of
  elements, one for each 2 x 2 x 2 voxels that are partly in the mask: it lies at their common
  corner, and its area is that of the triangles through the middles of the edges that the mask's
  border cuts (marching cubes). In 2D an element is a line through 2 x 2 pixels, and has a length.

Empty masks. Both empty: every metric is NaN, left out of means and counted (`absent`). Exactly one
empty: Dice, Jaccard and NSD are 0, the distances are undefined (NaN), and the case is counted:
`missed` if the prediction is empty, a false positive (`spurious`) if the label is. So failing can
lower a mean Dice but never improves one. Distances are another matter: a mean that leaves failures
out may fall when an organ is missed. Wherever one is printed, the counts and the `penalised` mean
(`summarise`) stand beside it, in which failed distances are the volume's diagonal, longer than any
that can be measured; runs are compared by that one. `empty='diag'` writes the diagonal into the
scores themselves; `empty='agree'` counts two empty masks as full agreement, Dice, Jaccard and NSD 1
and distances 0, and is else as 'nan'.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.compiled import compiled
from utils.config import NSD_TOLERANCE


class Pair(NamedTuple):
    """A class that the prediction and the label both have: voxels of each and of both together,
    distances in mm from each surface voxel to the other surface, the definition of HD95, and the
    area of both surfaces in mm^2 (in 2D their length in mm).
    """

    predicted: int
    labelled: int
    both: int
    forward: np.ndarray  # d(P -> G)
    backward: np.ndarray  # d(G -> P)
    pooled: np.ndarray
    hd95: str
    area: float
    area_within: float  # the tolerance of the other surface


@dataclass(frozen=True)
class Metric:
    """What scores, files and tables have to know of a metric. As it stands a share of 1, 0 for an
    organ that was missed; `_distance` makes the other kind.
    """

    title: str
    of: Callable[[Pair], float]
    distance: bool = False  # in mm, voxels or pixels, undefined for an organ that was missed
    best: float = 1.0  # what full agreement has
    higher_is_better: bool = True
    factor: float = 100.0  # to the unit of tables
    digits: int = 4  # in what the test scripts print
    shown: bool = True  # in printed tables; files have all
    published: bool = False  # in the published tables of few-label data sets


def _distance(title: str, of: Callable[[Pair], float], **values) -> Metric:
    kind = {"distance": True, "best": 0.0, "higher_is_better": False, "factor": 1.0, "digits": 2}
    return Metric(title, of, **kind, **values)


def _hd95(pair: Pair) -> float:
    if pair.hd95 == "pooled":
        return np.percentile(pair.pooled, 95)
    return max(np.percentile(pair.forward, 95), np.percentile(pair.backward, 95))


# To add a metric: a line here. Scores, files, tables and the test scripts take it from this place.
METRICS = {
    "dice": Metric("Dice", lambda p: 2.0 * p.both / (p.predicted + p.labelled), published=True),
    "jaccard": Metric(
        "Jaccard", lambda p: p.both / (p.predicted + p.labelled - p.both), published=True
    ),
    "hd95": _distance("HD95", _hd95, published=True),
    "asd": _distance("ASD", lambda p: p.forward.mean(), published=True),
    "nsd": Metric("NSD", lambda p: p.area_within / p.area),
    "assd": _distance("ASSD", lambda p: p.pooled.mean(), shown=False),
}
SHOWN = tuple(key for key, metric in METRICS.items() if metric.shown)
PUBLISHED = tuple(key for key, metric in METRICS.items() if metric.published)
SHARES = tuple(key for key, metric in METRICS.items() if not metric.distance)
DISTANCES = tuple(key for key, metric in METRICS.items() if metric.distance)
HD95_DEFINITIONS = ("pooled", "directed")
EMPTY_POLICIES = ("nan", "diag", "agree")
UNKNOWN = 255  # in labels: a voxel that nobody labelled, which counts in no metric
PENALISED = (
    "* with missed and false positive classes as the diagonal of the volume: compare runs by these"
)
# Of each class: which of the masks are empty. `spurious` is called a false positive in print.
FLAGS = ("absent", "missed", "spurious")
REACH = 3  # voxels within which the nearest surface is looked up place by place
# blocks that the points of a surface are sorted into, to find the nearest of a point far away
MOST_BLOCKS = 512


def case_metrics(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    *,
    spacing: Sequence[float],
    multilabel: bool = False,
    hd95: str = "pooled",
    empty: str = "nan",
    tolerance: float | Sequence[float] = NSD_TOLERANCE,
) -> list[dict[str, float]]:
    """Score one volume: a dict for each foreground class 1..num_classes-1 (each region if
    `multilabel`).

    prediction, label: integer label maps of equal shape `(H, W, D)` or `(H, W)`; if `multilabel`,
    masks `(num_classes, H, W, D)`. spacing: mm per axis. tolerance: of NSD in mm, one for all or
    one for each dict; a distance of just so much is within it. Keys: METRICS, and `absent`,
    `missed`, `spurious` (0 or 1). Where the label is UNKNOWN both count as background.
    """
    prediction, label = without_unknown(np.asarray(prediction), np.asarray(label), num_classes)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    if len(spacing) != label.ndim - multilabel:
        raise ValueError(
            f"spacing has {len(spacing)} values for a volume of {label.ndim - multilabel} axes"
        )
    if hd95 not in HD95_DEFINITIONS or empty not in EMPTY_POLICIES:
        raise ValueError(
            f"hd95 must be one of {HD95_DEFINITIONS}, empty one of {EMPTY_POLICIES}; got {hd95}, "
            f"{empty}"
        )
    scored = num_classes if multilabel else num_classes - 1
    tolerances = np.broadcast_to(np.asarray(tolerance, float), scored)
    if not (tolerances >= 0).all():
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    if multilabel:
        _check_regions(label, num_classes)
        rows = []
        for region in range(num_classes):
            masks = (prediction[region].astype(np.uint8), label[region].astype(np.uint8))
            rows += _score(*masks, 2, spacing, hd95, empty, tolerances[[region]])
        return rows
    return _score(prediction, label, num_classes, spacing, hd95, empty, tolerances)


def without_unknown(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both with 0 where the label is UNKNOWN; the same arrays if it is so nowhere, or if that is
    the id of a class.
    """
    unknown = label == UNKNOWN
    if num_classes > UNKNOWN or prediction.shape != label.shape or not unknown.any():
        return prediction, label
    return tuple(np.where(unknown, array.dtype.type(0), array) for array in (prediction, label))


def dice(prediction: np.ndarray, label: np.ndarray) -> float:
    """2 |P and G| / (|P| + |G|) of two binary masks; NaN if both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(label)
    return (
        2.0 * np.count_nonzero(np.logical_and(prediction, label)) / total if total else float("nan")
    )


def jaccard(prediction: np.ndarray, label: np.ndarray) -> float:
    """|P and G| / |P or G| of two binary masks; NaN if both are empty."""
    union = np.count_nonzero(np.logical_or(prediction, label))
    return np.count_nonzero(np.logical_and(prediction, label)) / union if union else float("nan")


def hd95(
    prediction: np.ndarray,
    label: np.ndarray,
    *,
    spacing: Sequence[float],
    definition: str = "pooled",
) -> float:
    """95th percentile Hausdorff distance of two binary masks in mm; NaN unless both have voxels."""
    masks = np.asarray(prediction).astype(np.uint8), np.asarray(label).astype(np.uint8)
    return case_metrics(*masks, 2, spacing=spacing, hd95=definition)[0]["hd95"]


def asd(
    prediction: np.ndarray, label: np.ndarray, *, spacing: Sequence[float], symmetric: bool = False
) -> float:
    """Average surface distance of two binary masks in mm, one-sided P -> G unless `symmetric`."""
    masks = np.asarray(prediction).astype(np.uint8), np.asarray(label).astype(np.uint8)
    return case_metrics(*masks, 2, spacing=spacing)[0]["assd" if symmetric else "asd"]


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length in mm of the diagonal of a volume of `shape` voxels: what a failed distance counts
    as.
    """
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def tolerance_text(tolerances: Mapping[str, float], unit: str) -> str:
    """'2 mm', or '2 mm, liver 3 mm' where some classes have others. tolerances: of each class."""
    values = list(tolerances.values())
    usual = max(dict.fromkeys(values), key=values.count)
    others = [f"{name} {value:g} {unit}" for name, value in tolerances.items() if value != usual]
    return ", ".join([f"{usual:g} {unit}", *others])


def penalise(rows: Sequence[dict]) -> list[dict]:
    """Copies of the rows in which the distances of missed and spurious organs are the row's
    `diagonal`.
    """
    return [
        row
        | (
            {key: row["diagonal"] for key in DISTANCES if key in row}
            if row["missed"] or row["spurious"]
            else {}
        )
        for row in rows
    ]


def _score(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    spacing: Sequence[float],
    hd95: str,
    empty: str,
    tolerances: np.ndarray,
) -> list[dict[str, float]]:
    longest = diagonal(label.shape, spacing)
    prediction, label = _foreground(prediction, label, num_classes)
    size_p, size_g, both = _counts(prediction, label, num_classes)
    wanted = (size_p > 0) & (size_g > 0)
    surfaces = [_surface(volume, wanted) for volume in (prediction, label)]
    surface_distances = _surface_distances(surfaces, label, wanted, spacing)
    limits = np.append(0.0, tolerances)
    volumes = (prediction, label)
    area, area_within = _surface_areas(volumes, surfaces, surface_distances, spacing, limits)
    rows = []
    for k in range(1, num_classes):
        flags = dict.fromkeys(FLAGS, 0)
        if not size_p[k] and not size_g[k]:
            flags["absent"] = 1
            agree = empty == "agree"
            row = {key: metric.best if agree else np.nan for key, metric in METRICS.items()}
        elif not size_p[k] or not size_g[k]:
            flags["spurious" if size_p[k] else "missed"] = 1
            failed = longest if empty == "diag" else np.nan
            row = {key: failed if metric.distance else 0.0 for key, metric in METRICS.items()}
        else:
            pooled = np.concatenate(surface_distances[k])
            distances = (*surface_distances[k], pooled, hd95)
            pair = Pair(size_p[k], size_g[k], both[k], *distances, area[k], area_within[k])
            row = {key: float(metric.of(pair)) for key, metric in METRICS.items()}
        rows.append(row | flags)
    return rows


def _check_regions(masks: np.ndarray, num_classes: int) -> None:
    if len(masks) != num_classes:
        raise ValueError(
            f"expected masks of {num_classes} regions, (num_classes, *spatial), got {masks.shape}"
        )


def _foreground(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both label maps in the smallest integer type, cut to the box around all foreground, in a
    frame of zeros.

    The frame is REACH + 1 voxels wide: it makes voxels on the edge of the volume differ from their
    outer neighbour, so they are surface, and a voxel or one of its corners plus an offset of at
    most REACH along each axis is always inside.
    """
    for name, volume in (("prediction", prediction), ("label", label)):
        if volume.dtype.kind not in "biu":
            raise ValueError(f"{name} has dtype {volume.dtype}, expected an integer label map")
        if volume.size and (volume.min() < 0 or volume.max() >= num_classes):
            raise ValueError(
                f"{name} has ids {volume.min()}..{volume.max()}, expected 0..{num_classes - 1}"
            )
    inside = (prediction != 0) | (label != 0)
    box = []
    for axis in range(inside.ndim):
        filled = np.flatnonzero(
            inside.any(axis=tuple(other for other in range(inside.ndim) if other != axis))
        )
        box.append(slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0))
    dtype = np.min_scalar_type(max(num_classes - 1, 0))
    # In C order, whatever that of the input: the steps between voxels below are those of a
    # flattened copy.
    cut = (np.ascontiguousarray(volume[tuple(box)], dtype=dtype) for volume in (prediction, label))
    return tuple(np.pad(volume, REACH + 1) for volume in cut)


def _counts(
    prediction: np.ndarray, label: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of each id in the prediction, in the label, and in both at the same place; 0 for id
    0.
    """
    # flat, since the rest is most of a volume
    filled = np.flatnonzero((prediction != 0) | (label != 0))
    prediction, label = prediction.ravel()[filled], label.ravel()[filled]
    same = label[prediction == label]
    counts = [np.bincount(ids, minlength=num_classes) for ids in (prediction, label, same)]
    for count in counts:
        count[:1] = 0
    return tuple(counts)


def _surface(volume: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surface voxels of all ids in one pass over a framed label map.

    Returns the flattened map with 0 in place of all but surface voxels; flat indices of the surface
    voxels of the ids `wanted` (a boolean for each id), ordered by id; and, with one entry more than
    ids, where each id begins in them.
    """
    flat = volume.ravel()
    surface = np.zeros(flat.shape, dtype=bool)
    for stride in (step // volume.itemsize for step in volume.strides):
        # pairs across the end of a row are both 0: the frame
        differs = flat[stride:] != flat[:-stride]
        surface[stride:] |= differs
        surface[:-stride] |= differs
    surface &= flat != 0
    where = np.flatnonzero(surface)
    ids = flat[where]
    where, ids = where[wanted[ids]], ids[wanted[ids]]
    order = np.argsort(ids, kind="stable")
    return flat * surface, where[order], np.searchsorted(ids[order], np.arange(len(wanted) + 1))


def _surface_distances(
    surfaces: Sequence[tuple], label: np.ndarray, wanted: np.ndarray, spacing: Sequence[float]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """d(P -> G) and d(G -> P) in mm for each id of two framed label maps; empty arrays unless
    `wanted`. surfaces: of P and G, as `_surface` returns them. label: the label map, for its shape.

    Most surface voxels of a good prediction have the other surface within a few voxels: they look
    up the neighbours of their place, nearest first, all ids at once. The rest, scattered false
    voxels above all, search all of their id.
    """
    offsets, lengths = _ball(spacing)
    strides = np.array(label.strides) // label.itemsize
    directions = []
    for (_, where, begin), (map_there, where_there, begin_there) in (surfaces, surfaces[::-1]):
        ids = np.repeat(np.arange(len(wanted), dtype=label.dtype), np.diff(begin))
        distances = _near_distances(where, ids, map_there, offsets @ strides, lengths)
        far = np.flatnonzero(distances == np.inf)
        for k in np.unique(ids[far]):
            own = far[np.searchsorted(ids[far], k) : np.searchsorted(ids[far], k, side="right")]
            targets = where_there[begin_there[k] : begin_there[k + 1]]
            points, targets = (
                np.stack(np.unravel_index(flat, label.shape), 1) for flat in (where[own], targets)
            )
            distances[own] = _far_distances(points, targets, spacing)
        directions.append(np.split(distances, begin[1:-1]))
    return list(zip(*directions))


def _ball(spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (n, axes) in voxels, nearest first, and their lengths in mm: at most REACH times the
    smallest spacing.
    """
    axis = np.arange(-REACH, REACH + 1)
    offsets = np.stack(np.meshgrid(*[axis] * len(spacing), indexing="ij"), -1).reshape(
        -1, len(spacing)
    )
    lengths = np.linalg.norm(offsets * np.asarray(spacing), axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= REACH * min(spacing)]
    return offsets[order], lengths[order]


def _near_distances(
    where: np.ndarray,
    ids: np.ndarray,
    map_there: np.ndarray,
    steps: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """Lengths of the first of `steps` from each place that meets its own id on the other map; inf
    where none does.
    """
    distances = np.full(len(where), np.inf)
    waiting = np.arange(len(where))
    # Steps of equal length go together, so that the places still waiting are gathered anew only
    # once for each length.
    ends = np.flatnonzero(np.append(np.diff(lengths) > 1e-9 * lengths[-1], True)) + 1
    for begin, end in zip([0, *ends], ends):
        met = map_there.take(where + steps[begin]) == ids
        for step in steps[begin + 1 : end]:
            met |= map_there.take(where + step) == ids
        distances[waiting[met]] = lengths[begin]
        left = np.flatnonzero(~met)
        waiting, where, ids = waiting.take(left), where.take(left), ids.take(left)
    return distances


def _far_distances(points: np.ndarray, targets: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances in mm from each of `points` (n, axes) to the nearest of `targets` (m, axes), both
    in voxels.

    The targets are sorted into cubic blocks. A point looks at the bounds of all blocks, then into
    those that may hold something nearer than what it has found. A k-d tree, which has to descend to
    many targets of nearly equal distance when the point is far away, takes several times as long.
    """
    shift = 3  # blocks of 8 voxels
    while True:
        blocks = targets >> shift
        key = np.ravel_multi_index(tuple(blocks.T), tuple(blocks.max(0) + 1))
        order = np.argsort(key, kind="stable")
        begin = np.flatnonzero(np.diff(key[order], prepend=-1))
        if len(begin) <= MOST_BLOCKS:
            break
        shift += 1
    scaled = [np.zeros((len(voxels), 3)) for voxels in (points, targets)]
    for array, voxels in zip(scaled, (points, targets[order])):
        array[:, : voxels.shape[1]] = voxels * np.asarray(spacing)
    points, targets = scaled
    bounds = np.stack([np.minimum.reduceat(targets, begin), np.maximum.reduceat(targets, begin)])
    return _search_blocks(
        points, targets.T.copy(), np.append(begin, len(targets)), bounds.transpose(0, 2, 1).copy()
    )


@compiled
def _search_blocks(points, targets, begin, bounds):
    """Nearest-target distances of points (n, 3); targets (3, m) sorted by block, block b from
    begin[b] to begin[b + 1], within bounds[0, :, b] .. bounds[1, :, b].
    """
    num_blocks = len(begin) - 1
    least = np.empty(num_blocks)  # squared distance to the bounds of each block
    result = np.empty(len(points))
    for index in range(len(points)):
        x, y, z = points[index]
        for b in range(num_blocks):
            dx = max(bounds[0, 0, b] - x, 0.0, x - bounds[1, 0, b])
            dy = max(bounds[0, 1, b] - y, 0.0, y - bounds[1, 1, b])
            dz = max(bounds[0, 2, b] - z, 0.0, z - bounds[1, 2, b])
            least[b] = dx * dx + dy * dy + dz * dz
        first = np.argmin(least)
        best = np.inf
        for turn in range(-1, num_blocks):  # the nearest block, then the others
            b = first if turn < 0 else turn
            if least[b] >= best or (b == first and turn >= 0):
                continue
            for t in range(begin[b], begin[b + 1]):
                dx, dy, dz = targets[0, t] - x, targets[1, t] - y, targets[2, t] - z
                best = min(best, dx * dx + dy * dy + dz * dz)
        result[index] = np.sqrt(best)
    return result


def _surface_areas(
    volumes: Sequence[np.ndarray],
    surfaces: Sequence[tuple],
    surface_distances: Sequence[tuple[np.ndarray, np.ndarray]],
    spacing: Sequence[float],
    tolerances: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """For each id of two framed label maps the area of both surfaces, and that within the tolerance
    of the other surface, in mm^2 (mm in 2D). surfaces: as `_surface` returns them;
    surface_distances: as `_surface_distances`; tolerances: mm for each id.

    An element lies half a voxel's diagonal from a surface voxel, so the distance of the one differs
    by at most a diagonal from that of the other: most elements are decided by it. The others look
    up their neighbours, and those that have none within REACH and are allowed more search all of
    their id.
    """
    shape, dtype = volumes[0].shape, volumes[0].dtype
    strides = np.array(volumes[0].strides) // dtype.itemsize
    steps = np.array(list(itertools.product((0, 1), repeat=len(shape)))) @ strides
    sizes = _element_sizes(tuple(spacing))
    offsets, lengths = _ball(spacing)
    limits = tolerances * (1 + 1e-9)  # 3 * 0.1 is not above a tolerance of 0.3
    voxel = float(np.linalg.norm(spacing)) * (1 + 1e-9)
    maps = [volume.ravel() for volume in volumes]
    elements = []
    for flat, (surface, where, begin) in zip(maps, surfaces):
        ids = np.repeat(np.arange(len(tolerances), dtype=dtype), np.diff(begin))
        elements.append(_find_elements(where, ids, flat, surface, steps))
    area, area_within = np.zeros((2, len(tolerances)))
    for side, (index, ids, places, codes) in enumerate(elements):
        distances = np.concatenate([pair[side] for pair in surface_distances])[index]
        limit = limits[ids]
        within = distances + voxel <= limit
        open_ones = np.flatnonzero(~within & (distances - voxel <= limit))
        within[open_ones] = _near_elements(
            places[open_ones],
            ids[open_ones],
            maps[1 - side],
            steps,
            offsets @ strides,
            lengths,
            limits,
        )
        far = open_ones[~within[open_ones] & (limit[open_ones] > lengths[-1])]
        for k in np.unique(ids[far]):
            own = far[ids[far] == k]
            _, ids_there, places_there, _ = elements[1 - side]
            flats = places[own], places_there[ids_there == k]
            points, targets = (np.stack(np.unravel_index(flat, shape), 1) for flat in flats)
            within[own] = _far_distances(points, targets, spacing) <= limits[k]
        weights = sizes[codes]
        area += np.bincount(ids, weights, len(tolerances))
        area_within += np.bincount(ids, weights * within, len(tolerances))
    return area, area_within


@compiled
def _find_elements(where, ids, flat, surface, steps):
    """The surface elements of a flattened label map: index in `where` of a surface voxel that they
    touch, id, place of the first of their voxels, and code, in which bit c says whether the voxel
    at steps[c] from there has the id. where, ids: of the surface voxels, whose corners are all
    places that there can be; surface: the map with 0 for all other voxels.
    """
    most = len(where) * len(steps)
    touched, of_id = np.empty(most, np.int64), np.empty(most, ids.dtype)
    places, codes = np.empty(most, np.int64), np.empty(most, np.int64)
    found = 0
    for index in range(len(where)):
        own = ids[index]
        for corner in range(len(steps)):
            place = where[index] - steps[corner]
            code, first = 0, True
            for c in range(len(steps)):
                voxel = place + steps[c]
                if flat[voxel] == own:
                    code += 1 << c
                if c < corner and surface[voxel] == own:
                    first = False  # that voxel has found this place
            if first and code < (1 << len(steps)) - 1:
                touched[found], of_id[found] = index, own
                places[found], codes[found] = place, code
                found += 1
    return touched[:found], of_id[:found], places[:found], codes[:found]


@compiled
def _near_elements(places, ids, flat, steps, offsets, lengths, limits):
    """Which elements have one of their id on the flattened map of the other surface at one of
    `offsets` (nearest first), not longer than the limit of the id.
    """
    within = np.zeros(len(places), np.bool_)
    for index in range(len(places)):
        own = ids[index]
        for k in range(len(offsets)):
            if lengths[k] > limits[own]:
                break
            inside = 0
            for step in steps:
                inside += flat[places[index] + offsets[k] + step] == own
            if 0 < inside < len(steps):
                within[index] = True
                break
    return within


@functools.lru_cache(maxsize=64)
def _element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """Area in mm^2 of the surface element of each code in 3D, its length in mm in 2D; 0 for the
    codes of none and of all voxels.
    """
    codes, points = _element_parts(len(spacing))
    sizes = _sizes(points * np.array(spacing))
    return np.bincount(codes, sizes, 2**2 ** len(spacing))


def _sizes(points: np.ndarray) -> np.ndarray:
    """Areas of triangles (n, 3, 3), lengths of lines (n, 2, 2)."""
    sides = points[:, 1:] - points[:, :1]
    if points.shape[1] == 2:
        return np.linalg.norm(sides[:, 0], axis=1)
    return np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2


@functools.cache
def _element_parts(axes: int) -> tuple[np.ndarray, np.ndarray]:
    """The triangles (lines in 2D) of the elements: the code of each, and its points in the unit
    cube between the centres of the voxels. Bit c of a code is the voxel at the c-th of (0, 0, 0),
    (0, 0, 1), ...

    A face is cut from one edge whose ends differ to another. In 3D the cuts join to closed lines,
    each of which is filled with triangles. A mask and its background have the same surface, so a
    code of more than half of the voxels has the element of the others.
    """
    corners = list(itertools.product((0, 1), repeat=axes))
    codes, points = [], []
    for code in range(2 ** len(corners)):
        inside = {corner for c, corner in enumerate(corners) if code >> c & 1}
        if 2 * len(inside) > len(corners):
            inside = set(corners) - inside
        cuts = [cut for face in _faces(axes) for cut in _face_cuts(face, inside)]
        parts = cuts if axes == 2 else _triangles(cuts)
        codes += [code] * len(parts)
        points += parts
    return np.array(codes), np.array(points)


def _faces(axes: int) -> list[list[tuple[int, ...]]]:
    """The square, or the six faces of the cube: their four corners one after the other around."""
    around = [(0, 0), (0, 1), (1, 1), (1, 0)]
    if axes == 2:
        return [around]
    faces = []
    for axis, side in itertools.product(range(3), (0, 1)):
        faces.append([(*pair[:axis], side, *pair[axis:]) for pair in around])
    return faces


def _face_cuts(face: Sequence[tuple], inside: set[tuple]) -> list[tuple]:
    """Lines (point, point) in which the border of the mask cuts a face. Where two corners inside
    lie across from each other, each is cut off by itself.
    """
    edges = list(zip(face, [*face[1:], face[0]]))
    middles = [tuple((a + b) / 2 for a, b in zip(*edge)) for edge in edges]
    crossed = [(first in inside) != (second in inside) for first, second in edges]
    if sum(crossed) < 4:
        return [tuple(itertools.compress(middles, crossed))] if any(crossed) else []
    # edge k - 1 ends in corner k, and edge k begins there
    return [(middles[k - 1], middles[k]) for k in range(4) if face[k] in inside]


def _triangles(cuts: Sequence[tuple]) -> list[tuple]:
    """Triangles that fill the closed lines which the cuts of the six faces make. Where the points
    of a line are in no plane, the area depends on the corner in which all triangles meet: it is the
    one that gives the largest area, as in the tables of Nikolov et al.
    """
    left, triangles = list(cuts), []
    while left:
        line = list(left.pop())
        while line[-1] != line[0]:
            follows = next(cut for cut in left if line[-1] in cut)
            left.remove(follows)
            line.append(follows[1] if follows[0] == line[-1] else follows[0])
        points = line[:-1]
        fans = []
        for start in range(len(points)):
            first, *others = points[start:] + points[:start]
            fans.append([(first, *pair) for pair in itertools.pairwise(others)])
        triangles += max(fans, key=_fan_area)
    return triangles


def _fan_area(triangles: Sequence[tuple]) -> float:
    """Area on voxels of 1 mm, rounded so that of equal ones the first is taken."""
    return round(float(_sizes(np.array(triangles)).sum()), 9)


def summarise(rows: Sequence[dict]) -> dict:
    """Means over cases and classes of rows with `case`, `class`, `diagonal` (mm) and the keys of
    `case_metrics`.

    `mean`: for each case the NaN-mean over its classes, then the mean over cases (the convention of
    the distillation papers); `std`: population standard deviation of the per-case means; `classes`:
    NaN-mean over cases per class; `counts`: of all (case, class) pairs, how many are absent,
    missed, spurious. `penalised`: `mean` and `classes` of the distances with missed and spurious
    organs as the diagonal: never better for an organ that is missed. Undefined means are None.
    """
    failed = penalise(rows)
    return _means(rows, METRICS) | {
        "penalised": {k: _means(failed, DISTANCES)[k] for k in ("mean", "classes")}
    }


def _means(rows: Sequence[dict], metrics: Sequence[str]) -> dict:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    result = {"cases": len(cases), "mean": {}, "std": {}, "classes": {name: {} for name in classes}}
    for metric in metrics:
        per_case = [_nan_mean([r[metric] for r in rows if r["case"] == case]) for case in cases]
        known = [value for value in per_case if value is not None]
        result["mean"][metric] = float(np.mean(known)) if known else None
        result["std"][metric] = float(np.std(known)) if known else None
        for name in classes:
            result["classes"][name][metric] = _nan_mean(
                [r[metric] for r in rows if r["class"] == name]
            )
    result["counts"] = counts(rows)
    return result


def counts(rows: Sequence[dict]) -> dict[str, int]:
    """How many rows there are, and how many of them are absent, missed, spurious."""
    return {"pairs": len(rows), **{flag: sum(row[flag] for row in rows) for flag in FLAGS}}


def _nan_mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if value == value]
    return float(np.mean(finite)) if finite else None


def class_dice(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    multilabel: bool = False,
    annotated: Sequence[bool] | None = None,
) -> list[float]:
    """Dice of each foreground class (or region), shapes and UNKNOWN as in `case_metrics`; NaN where
    both masks are empty. annotated: of the classes with the background, or the regions, those that
    the label tells; the others are NaN.
    """
    prediction, label = without_unknown(prediction, label, num_classes)
    if multilabel:
        _check_regions(prediction, num_classes)
        _check_regions(label, num_classes)
        scores = [dice(p, g) for p, g in zip(prediction, label)]
    else:
        scores = _class_dice(prediction, label, num_classes)
    if annotated is None:
        return scores
    told = annotated if multilabel else annotated[1:]
    return [score if known else float("nan") for score, known in zip(scores, told, strict=True)]


def _class_dice(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> list[float]:
    size_p, size_g, both = (
        c[1:] for c in _counts(*_foreground(prediction, label, num_classes), num_classes)
    )
    total = size_p + size_g
    return [2.0 * b / t if t else float("nan") for b, t in zip(both.tolist(), total.tolist())]


def mean_dice(scores: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Scores (cases x classes, NaN where undefined) -> `dice`, the mean of per-case means, and the
    mean of each class.

    `dice` is 0 if nothing is defined, so that it can always be compared; a class without a value is
    NaN.
    """
    per_case = [_nan_mean(case) for case in scores]
    known = [value for value in per_case if value is not None]
    per_class = {name: _nan_mean(column) for name, column in zip(names, zip(*scores))}
    overall = {"dice": float(np.mean(known)) if known else 0.0}
    return overall | {
        name: float("nan") if value is None else value for name, value in per_class.items()
    }
