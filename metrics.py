"""Per-case segmentation metrics on label maps: Dice, Jaccard, HD95, ASD, with spacing in mm.

Definitions. The surface of a mask is the mask minus its erosion by the 6-neighbourhood (4 in 2D); voxels on the edge
of the volume belong to it. d(X -> Y) are the Euclidean distances in mm from the surface voxels of X to those of Y.
- hd95, definition 'pooled': 95th percentile of d(P -> G) and d(G -> P) together (as medpy).
- hd95, definition 'directed': the larger of the two directed 95th percentiles (as MONAI).
- asd: mean of d(P -> G), one-sided (as medpy's asd). assd: mean of d(P -> G) and d(G -> P) together, symmetric.

Empty masks. Both empty: every metric is NaN, left out of means and counted (`absent`). Exactly one empty: Dice and
Jaccard are 0, the distances are undefined (NaN), and the case is counted: `missed` if the prediction is empty,
`spurious` if the label is. So failing can lower a mean Dice but never improves one; the counts stand beside the means
because the distances of failed cases do not enter them. `empty='diag'` gives those distances the volume's diagonal;
`empty='agree'` counts two empty masks as full agreement, Dice and Jaccard 1 and distances 0, and is else as 'nan'.
"""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

METRICS = ("dice", "jaccard", "hd95", "asd", "assd")
HD95_DEFINITIONS = ("pooled", "directed")
EMPTY_POLICIES = ("nan", "diag", "agree")


def case_metrics(
    prediction: np.ndarray,
    label: np.ndarray,
    num_classes: int,
    *,
    spacing: Sequence[float],
    multilabel: bool = False,
    hd95: str = "pooled",
    empty: str = "nan",
) -> list[dict[str, float]]:
    """Score one volume: a dict for each foreground class 1..num_classes-1 (each region if `multilabel`).

    prediction, label: integer label maps of equal shape `(H, W, D)` or `(H, W)`; if `multilabel`, masks
    `(num_classes, H, W, D)`. spacing: mm per axis. Keys: METRICS, and `absent`, `missed`, `spurious` (0 or 1).
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    if len(spacing) != label.ndim - multilabel:
        raise ValueError(f"spacing has {len(spacing)} values for a volume of {label.ndim - multilabel} axes")
    if hd95 not in HD95_DEFINITIONS or empty not in EMPTY_POLICIES:
        raise ValueError(f"hd95 must be one of {HD95_DEFINITIONS}, empty one of {EMPTY_POLICIES}; got {hd95}, {empty}")
    if multilabel:
        _check_regions(label, num_classes)
        rows = []
        for region in range(num_classes):
            masks = (prediction[region].astype(np.uint8), label[region].astype(np.uint8))
            rows += _score(*masks, 2, spacing, hd95, empty)
        return rows
    return _score(prediction, label, num_classes, spacing, hd95, empty)


def dice(prediction: np.ndarray, label: np.ndarray) -> float:
    """2 |P and G| / (|P| + |G|) of two binary masks; NaN if both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(label)
    return 2.0 * np.count_nonzero(np.logical_and(prediction, label)) / total if total else float("nan")


def jaccard(prediction: np.ndarray, label: np.ndarray) -> float:
    """|P and G| / |P or G| of two binary masks; NaN if both are empty."""
    union = np.count_nonzero(np.logical_or(prediction, label))
    return np.count_nonzero(np.logical_and(prediction, label)) / union if union else float("nan")


def hd95(prediction: np.ndarray, label: np.ndarray, *, spacing: Sequence[float], definition: str = "pooled") -> float:
    """95th percentile Hausdorff distance of two binary masks in mm; NaN unless both have voxels."""
    masks = np.asarray(prediction).astype(np.uint8), np.asarray(label).astype(np.uint8)
    return case_metrics(*masks, 2, spacing=spacing, hd95=definition)[0]["hd95"]


def asd(prediction: np.ndarray, label: np.ndarray, *, spacing: Sequence[float], symmetric: bool = False) -> float:
    """Average surface distance of two binary masks in mm, one-sided P -> G unless `symmetric`."""
    masks = np.asarray(prediction).astype(np.uint8), np.asarray(label).astype(np.uint8)
    return case_metrics(*masks, 2, spacing=spacing)[0]["assd" if symmetric else "asd"]


def _score(
    prediction: np.ndarray, label: np.ndarray, num_classes: int, spacing: Sequence[float], hd95: str, empty: str
) -> list[dict[str, float]]:
    size_p, size_g, both = _counts(prediction, label, num_classes)
    diagonal = float(np.linalg.norm(np.multiply(label.shape, spacing)))
    surfaces_p, surfaces_g = _surfaces(prediction, num_classes), _surfaces(label, num_classes)
    rows = []
    for k in range(1, num_classes):
        row = dict.fromkeys(METRICS, float("nan")) | {"absent": 0, "missed": 0, "spurious": 0}
        if not size_p[k] and not size_g[k]:
            row["absent"] = 1
            if empty == "agree":
                row |= {"dice": 1.0, "jaccard": 1.0, "hd95": 0.0, "asd": 0.0, "assd": 0.0}
        elif not size_p[k] or not size_g[k]:
            row["dice"] = row["jaccard"] = 0.0
            row["spurious" if size_p[k] else "missed"] = 1
            if empty == "diag":
                row["hd95"] = row["asd"] = row["assd"] = diagonal
        else:
            row["dice"] = 2.0 * both[k] / (size_p[k] + size_g[k])
            row["jaccard"] = both[k] / (size_p[k] + size_g[k] - both[k])
            forward, backward = _surface_distances(surfaces_p[k], surfaces_g[k], label.shape, spacing)
            if hd95 == "pooled":
                row["hd95"] = float(np.percentile(np.concatenate([forward, backward]), 95))
            else:
                row["hd95"] = float(max(np.percentile(forward, 95), np.percentile(backward, 95)))
            row["asd"] = float(forward.mean())
            row["assd"] = float(np.concatenate([forward, backward]).mean())
        rows.append({key: float(value) if key in METRICS else int(value) for key, value in row.items()})
    return rows


def _check_regions(masks: np.ndarray, num_classes: int) -> None:
    if len(masks) != num_classes:
        raise ValueError(f"expected masks of {num_classes} regions, (num_classes, *spatial), got {masks.shape}")


def _counts(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of each id in the prediction, in the label, and in both at the same place."""
    for name, volume in (("prediction", prediction), ("label", label)):
        if volume.size and (volume.min() < 0 or volume.max() >= num_classes):
            raise ValueError(f"{name} has ids {volume.min()}..{volume.max()}, expected 0..{num_classes - 1}")
    same = label[prediction == label]
    return tuple(np.bincount(v.ravel(), minlength=num_classes) for v in (prediction, label, same))


def _surfaces(volume: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Flat indices of the surface voxels of each id, found in one pass over the label map."""
    surface = np.zeros(volume.shape, dtype=bool)
    for axis in range(volume.ndim):
        ahead, behind = [slice(None)] * volume.ndim, [slice(None)] * volume.ndim
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        differs = volume[tuple(ahead)] != volume[tuple(behind)]
        surface[tuple(ahead)] |= differs
        surface[tuple(behind)] |= differs
        edge = [slice(None)] * volume.ndim
        for end in (0, -1):
            edge[axis] = end
            surface[tuple(edge)] = True
    flat = np.flatnonzero(surface & (volume != 0))
    ids = volume.ravel()[flat]
    order = np.argsort(ids, kind="stable")
    bounds = np.searchsorted(ids[order], np.arange(num_classes + 1))
    return [flat[order[bounds[k] : bounds[k + 1]]] for k in range(num_classes)]


def _surface_distances(
    points_p: np.ndarray, points_g: np.ndarray, shape: tuple[int, ...], spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """d(P -> G) and d(G -> P) in mm between two sets of sorted flat voxel indices."""
    scale = np.asarray(spacing)
    coordinates = [np.stack(np.unravel_index(points, shape), 1) * scale for points in (points_p, points_g)]
    distances = []
    for own, other, here, there in (
        (points_p, points_g, *coordinates),
        (points_g, points_p, *reversed(coordinates)),
    ):
        result = np.zeros(len(own))
        apart = ~np.isin(own, other, assume_unique=True)  # points shared by both surfaces have distance 0
        if apart.any():
            result[apart] = cKDTree(there).query(here[apart])[0]
        distances.append(result)
    return distances[0], distances[1]


def summarise(rows: Sequence[dict]) -> dict:
    """Means over cases and classes of rows with `case`, `class` and the keys of `case_metrics`.

    `mean`: for each case the NaN-mean over its classes, then the mean over cases (the convention of the distillation
    papers); `std`: population standard deviation of the per-case means; `classes`: NaN-mean over cases per class;
    `counts`: of all (case, class) pairs, how many are absent, missed, spurious. Undefined means are None.
    """
    cases = list(dict.fromkeys(row["case"] for row in rows))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    result = {"cases": len(cases), "mean": {}, "std": {}, "classes": {name: {} for name in classes}}
    for metric in METRICS:
        per_case = [_nan_mean([r[metric] for r in rows if r["case"] == case]) for case in cases]
        known = [value for value in per_case if value is not None]
        result["mean"][metric] = float(np.mean(known)) if known else None
        result["std"][metric] = float(np.std(known)) if known else None
        for name in classes:
            result["classes"][name][metric] = _nan_mean([r[metric] for r in rows if r["class"] == name])
    result["counts"] = {
        "pairs": len(rows), **{key: sum(r[key] for r in rows) for key in ("absent", "missed", "spurious")},
    }  # fmt: skip
    return result


def _nan_mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if value == value]
    return float(np.mean(finite)) if finite else None


def class_dice(prediction: np.ndarray, label: np.ndarray, num_classes: int, multilabel: bool = False) -> list[float]:
    """Dice of each foreground class (or region), shapes as in `case_metrics`; NaN where both masks are empty."""
    if multilabel:
        _check_regions(prediction, num_classes)
        _check_regions(label, num_classes)
        return [dice(p, g) for p, g in zip(prediction, label)]
    size_p, size_g, both = (counts[1:] for counts in _counts(prediction, label, num_classes))
    total = size_p + size_g
    return [2.0 * b / t if t else float("nan") for b, t in zip(both.tolist(), total.tolist())]


def mean_dice(scores: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """Scores (cases x classes, NaN where undefined) -> `dice`, the mean of per-case means, and the mean of each class.

    `dice` is 0 if nothing is defined, so that it can always be compared; a class without a value is NaN.
    """
    per_case = [_nan_mean(case) for case in scores]
    known = [value for value in per_case if value is not None]
    per_class = {name: _nan_mean(column) for name, column in zip(names, zip(*scores))}
    overall = {"dice": float(np.mean(known)) if known else 0.0}
    return overall | {name: float("nan") if value is None else value for name, value in per_class.items()}
