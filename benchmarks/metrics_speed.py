"""Dice, Jaccard, HD95 and ASD of one case: `metrics.case_metrics` against medpy and MONAI, with
equal results.

    python benchmarks/metrics_speed.py --threads 1 --out metrics.md
    # on a computer that is busy with other work
    python benchmarks/metrics_speed.py --threads 1 --cpu-time
    python benchmarks/metrics_speed.py --parts binary --repeats 5
    python benchmarks/metrics_speed.py --small                        # seconds, bars not enforced

medpy, monai: 13 organs, each a few overlapping ellipsoids with rough borders, on 240 x 200 x 160
voxels of 1.5 x 1.5 x 2 mm. binary: one such shape on 190 x 142 x 88 voxels of 0.625 mm, against
medpy. 'clean' is the label with its borders moved by up to 2 voxels, 'noisy' by up to 5, after
which `--scatter` of all voxels get a random id. medpy is called class by class (dc, jc, hd95, asd),
MONAI with one-hot tensors that are made before the clock starts (compute_hausdorff_distance,
compute_average_surface_distance, compute_dice, compute_iou).

Whole calls on organs take a peer up to minutes, so that each of its classes (medpy) or functions
(MONAI) is timed once after a warm-up on a small volume; ours is the median of the calls made after
each. Distances are compared in mm, to 1e-5 with medpy and to 1e-4 with MONAI; the part names the
largest difference. MONAI takes the percentile in float32, which at distances of 200 mm is off by
more: then that of its own distances, in float64, is what must agree.
"""

import argparse
import functools
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from medpy.metric import binary
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
)
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import arguments, faster, report
from metrics import case_metrics

KEYS = ("dice", "jaccard", "hd95", "asd")
ORGANS = {"shape": (240, 200, 160), "spacing": (1.5, 1.5, 2.0), "num_classes": 14}
ATRIUM = {"shape": (190, 142, 88), "spacing": (0.625, 0.625, 0.625), "num_classes": 2}
SMALL_ORGANS = {"shape": (48, 40, 32), "spacing": (1.5, 1.5, 2.0), "num_classes": 4}
SMALL_ATRIUM = {"shape": (38, 28, 18), "spacing": (0.625, 0.625, 0.625), "num_classes": 2}
PEERS = {"medpy": ("medpy", 100, 1e-5), "monai": ("MONAI", 8, 1e-4), "binary": ("medpy", 20, 1e-5)}


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--scatter",
        type=float,
        default=0.005,
        help="share of voxels made noise (default %(default)s)",
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor seconds of all threads, not wall time"
    )
    args = parser.parse_args()
    if args.threads < 1 or args.repeats < 1 or not 0 <= args.scatter <= 1:
        parser.error("--threads and --repeats must be at least 1, --scatter from 0 to 1")
    return args


def make_label(
    shape: Sequence[int],
    spacing: Sequence[float],
    num_classes: int,
    rng: np.random.Generator,
    blobs: int = 4,
) -> np.ndarray:
    """Label map uint8 in which every id has voxels, later ones over earlier ones."""
    label = np.zeros(shape, np.uint8)
    extent = np.multiply(shape, spacing)
    for k in rng.permutation(np.arange(1, num_classes)):
        size = extent.min() * (rng.uniform(0.04, 0.16) if num_classes > 2 else 0.25)
        centre = extent * rng.uniform(0.2, 0.8, len(shape))
        for _ in range(blobs):
            radii = size * rng.uniform(0.5, 1.2, len(shape))
            middle = centre + size * rng.uniform(-1, 1, len(shape))
            axes = [
                ((np.arange(n) * s - m) / r) ** 2
                for n, s, m, r in zip(shape, spacing, middle, radii)
            ]
            label[sum(np.ix_(*axes)) <= 1] = k
    return moved(label, 5, rng)


def moved(label: np.ndarray, voxels: float, rng: np.random.Generator, knots: int = 8) -> np.ndarray:
    """The label map looked up at places moved by up to `voxels` along each axis, smoothly between
    knots.
    """
    index = []
    for axis, side in enumerate(label.shape):
        coarse = rng.uniform(-voxels, voxels, [-(-n // knots) + 1 for n in label.shape]).astype(
            np.float32
        )
        field = ndimage.zoom(coarse, np.divide(label.shape, coarse.shape), order=1)
        own = np.arange(side, dtype=np.float32).reshape(
            [-1 if a == axis else 1 for a in range(label.ndim)]
        )
        index.append(np.clip(np.rint(own + field), 0, side - 1).astype(np.int32))
    return label[tuple(index)]


def scattered(
    label: np.ndarray, share: float, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """The label map with random ids at a random `share` of its voxels."""
    noise = rng.integers(0, num_classes, label.shape, np.uint8)
    return np.where(rng.random(label.shape, np.float32) < share, noise, label)


def make_cases(
    setting: dict, scatter: float, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """'clean' and 'noisy': prediction and label."""
    rng = np.random.default_rng(seed)
    label = make_label(**setting, rng=rng)
    clean = moved(label, 2, rng)
    noisy = scattered(moved(label, 5, rng), scatter, setting["num_classes"], rng)
    for name, volume in (("label", label), ("clean", clean), ("noisy", noisy)):
        absent = set(range(setting["num_classes"])) - set(np.unique(volume).tolist())
        if absent:
            raise ValueError(
                f"seed {seed} leaves ids {sorted(absent)} without voxels in {name}; peers need all"
            )
    return {"clean": (clean, label), "noisy": (noisy, label)}


def medpy_calls(
    prediction: np.ndarray, label: np.ndarray, setting: dict
) -> list[Callable[[], np.ndarray]]:
    """A call for each class, which gives its KEYS."""

    def score(k: int) -> np.ndarray:
        p, g = prediction == k, label == k
        distances = [f(p, g, setting["spacing"]) for f in (binary.hd95, binary.asd)]
        return np.array([binary.dc(p, g), binary.jc(p, g), *distances])

    return [functools.partial(score, k) for k in range(1, setting["num_classes"])]


def monai_calls(
    prediction: np.ndarray, label: np.ndarray, setting: dict
) -> list[Callable[[], np.ndarray]]:
    """A call for each of KEYS, which gives its value for all classes."""
    ids = torch.arange(setting["num_classes"], dtype=torch.uint8)[:, None, None, None]
    tensors = [
        (torch.from_numpy(volume)[None] == ids).to(torch.uint8)[None]
        for volume in (prediction, label)
    ]
    spacing = {"spacing": list(setting["spacing"])}
    functions = (
        functools.partial(compute_dice, include_background=False),
        functools.partial(compute_iou, include_background=False),
        functools.partial(compute_hausdorff_distance, percentile=95, **spacing),
        functools.partial(compute_average_surface_distance, **spacing),
    )
    return [lambda f=f: f(*tensors)[0].double().numpy() for f in functions]


def monai_exact_hd95(prediction: np.ndarray, label: np.ndarray, setting: dict) -> np.ndarray:
    """HD95 of each class from MONAI's surface distances, the percentiles taken in float64."""
    values = []
    for k in range(1, setting["num_classes"]):
        masks = [torch.from_numpy(volume == k) for volume in (prediction, label)]
        _, distances, _ = get_edge_surface_distance(
            *masks, spacing=setting["spacing"], symmetric=True
        )
        values.append(max(np.percentile(d.double().numpy(), 95) for d in distances))
    return np.array(values)


def timed(function: Callable[[], object], clock: Callable[[], float]) -> tuple[float, object]:
    begin = clock()
    result = function()
    return clock() - begin, result


def measure(
    part: str,
    kind: str,
    case: tuple[np.ndarray, np.ndarray],
    setting: dict,
    args: argparse.Namespace,
) -> tuple[dict, bool]:
    """Row of the table for one kind of prediction, and whether the results agree. `case`:
    prediction and label.
    """
    peer, bar, tolerance = PEERS[part]
    clock = time.process_time if args.cpu_time else time.perf_counter
    make_calls = monai_calls if part == "monai" else medpy_calls
    options = {"spacing": setting["spacing"], "hd95": "directed" if part == "monai" else "pooled"}

    small = SMALL_ATRIUM if part == "binary" else SMALL_ORGANS
    for call in make_calls(*make_cases(small, 0.005, seed=0)["noisy"], small):
        call()
    calls = make_calls(*case, setting)
    ours = functools.partial(case_metrics, *case, setting["num_classes"], **options)
    rows = ours()
    peer_rounds, ours_seconds = [], []
    for _ in range(args.repeats if part == "binary" else 1):
        peer_rounds.append(0.0)
        results = []
        for call in calls:
            seconds, result = timed(call, clock)
            peer_rounds[-1] += seconds
            results.append(result)
            ours_seconds.append(timed(ours, clock)[0])
    expected = np.stack(results, axis=1 if part == "monai" else 0)  # (classes, KEYS)
    found = np.array([[row[key] for key in KEYS] for row in rows])
    difference = float(np.abs(found - expected).max())
    if part == "monai" and difference > tolerance:
        expected[:, KEYS.index("hd95")] = monai_exact_hd95(*case, setting)
        difference = float(np.abs(found - expected).max())
    content = "atrium" if part == "binary" else f"{setting['num_classes'] - 1} organs"
    size = "x".join(map(str, setting["shape"]))
    once = "" if part == "binary" else ", peer timed once"
    name = f"{content}, {size}, {kind}, equal to {difference:.0e}{once}"
    row = faster(name, peer, statistics.median(peer_rounds), statistics.median(ours_seconds), bar)
    return row, difference <= tolerance


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    rows, differing = [], []
    organs, atrium = (SMALL_ORGANS, SMALL_ATRIUM) if args.small else (ORGANS, ATRIUM)
    organ_cases, atrium_cases = (
        make_cases(setting, args.scatter, seed=0) for setting in (organs, atrium)
    )
    for part in args.parts:
        setting, cases = (atrium, atrium_cases) if part == "binary" else (organs, organ_cases)
        for kind, case in cases.items():
            row, agrees = measure(part, kind, case, setting, args)
            print(f"{row['part']}, {row['peer']}: {row['ratio']}", file=sys.stderr, flush=True)
            rows.append(row)
            if not agrees:
                differing.append(f"{part} {kind}")
    status = report(rows, args)
    if args.cpu_time:
        print("Times are processor seconds.")
    if differing:
        print(f"results differ: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else status


if __name__ == "__main__":
    sys.exit(main())
