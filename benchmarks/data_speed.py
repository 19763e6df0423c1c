"""Start-up and batches from the cache of preprocessed cases, against transforming the NIfTI files
each time.

    python benchmarks/data_speed.py --threads 2 --out data.md
    python benchmarks/data_speed.py --cases 3 --shape 160 128 96 --repeats 1
    python benchmarks/data_speed.py --small                    # seconds, bars not enforced

The data are generated abdomens in the layout of BTCV, preprocessed and cropped as in
configs/btcv.yaml; all files are in the operating system's memory, so no side waits for a disk.
'start-up': from nothing in memory to every case of the lists checked and at hand. 'batch': four
patches of one case from the DataLoader of train_3d_distill.py, without worker processes, so that
the time is that of the work itself.

Peers: 'no cache', this project's own preprocessing in the same loader, whose samples and batches
must be equal, bit for bit; 'MONAI', its chain of transforms from LoadImaged to the random crops,
whose preprocessed volumes must agree to 1e-5. 'fed': a loop that sleeps 100 ms per step beside a
loader with two worker processes; 'ours' is the sleep and the mean wait for a batch, the release of
its memory included. Its bar allows 5 ms.
"""

import argparse
import contextlib
import functools
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai import transforms
from monai.data import DataLoader as MonaiLoader
from monai.data import Dataset as MonaiDataset
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.harness import arguments, faster, interleaved, overhead, report
from dataloaders import build_dataset
from dataloaders.msd import MSDDataset
from dataloaders.samplers import DrawSampler, PatchDataset, collate
from tools import make_demo_data
from tools.phantoms.scans import BTCV_LABELS

SPACING, COARSE = (1.5, 1.5, 2.0), (8.0, 8.0, 8.0)  # mm, resampled to; the second for --small
WINDOW = (-175.0, 250.0)  # HU
CROPS, SEED = 4, 0
STEP = 0.1  # seconds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument(
        "--cases", type=int, default=6, help="generated scans, at least 3 (default %(default)s)"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=(240, 200, 120), help="voxels of a stored scan"
    )
    parser.add_argument(
        "--patch", type=int, default=96, help="side of a patch in voxels (default %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=4, help="in one timed call (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="of the loop that sleeps (default %(default)s)"
    )
    args = parser.parse_args(argv)
    args.spacing = COARSE if args.small else SPACING
    if args.small:
        args.cases, args.shape, args.patch, args.batches, args.steps = 3, (48, 40, 32), 16, 2, 3
    if args.cases < 3 or min(args.patch, args.batches, args.steps - 1) < 1:
        parser.error(
            "--cases must be at least 3, --steps at least 2, --patch and --batches at least 1"
        )
    return args


def open_data(folder: Path, args: argparse.Namespace) -> MSDDataset:
    """The generated data as configs/btcv.yaml has them."""
    return build_dataset(
        "msd",
        root=str(folder / "data"),
        datalist="dataset_0.json",
        class_names=["background", *BTCV_LABELS],
        cache_dir=str(folder / "cache"),
        spacing=args.spacing,
        window=WINDOW,
        patch_size=(args.patch,) * 3,
        absent_classes=tuple(BTCV_LABELS),  # coarse phantoms lose small organs
    )


def make_loader(dataset: MSDDataset, read: Callable, draws: int, workers: int = 0) -> DataLoader:
    """The loader of train_3d_distill.py, one case per batch, over `draws` batches; read: case ->
    sample.
    """
    cases = dataset.splits()["labelled"]
    return DataLoader(
        PatchDataset(cases, read, dataset.patch, SEED, CROPS),
        batch_size=1,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
        sampler=DrawSampler(len(cases), SEED, 0, draws),
    )


def monai_steps(spacing: tuple[float, ...]) -> list:
    """Deterministic part of the recipe in MONAI's transforms."""
    keys = ("image", "label")
    return [
        transforms.LoadImaged(keys),
        transforms.EnsureChannelFirstd(keys),
        transforms.Orientationd(keys, axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        transforms.Spacingd(keys, pixdim=spacing, mode=("bilinear", "nearest")),
        transforms.ScaleIntensityRanged("image", *WINDOW, 0.0, 1.0, clip=True),
        transforms.CropForegroundd(keys, source_key="image", allow_smaller=True),
    ]


def monai_random(patch: int) -> list:
    """Random part of the recipe in MONAI's transforms."""
    keys = ("image", "label")
    return [
        transforms.SpatialPadd(keys, (patch, patch, patch)),
        transforms.RandCropByPosNegLabeld(
            keys,
            "label",
            (patch, patch, patch),
            num_samples=CROPS,
            image_key="image",
            image_threshold=0,
        ),
        *(transforms.RandFlipd(keys, prob=0.2, spatial_axis=axis) for axis in range(3)),
        transforms.RandRotate90d(keys, prob=0.2, max_k=3),
        transforms.RandScaleIntensityd("image", factors=0.1, prob=0.1),
        transforms.RandShiftIntensityd("image", offsets=0.1, prob=0.1),
    ]


def monai_entries(cases: list) -> list[dict]:
    return [{"image": str(case.images[0]), "label": str(case.label)} for case in cases]


def kept(
    functions: dict[str, Callable[[], list]], results: dict[str, list]
) -> dict[str, Callable[[], None]]:
    """The functions with their last results put into `results`, so that what is compared is what
    was timed.
    """
    return {
        name: functools.partial(lambda n, f: results.update({n: f()}), name, f)
        for name, f in functions.items()
    }


def start_up(folder: Path, args: argparse.Namespace) -> list[dict]:
    def ours() -> list[dict]:
        dataset = open_data(folder, args)
        splits = dataset.splits()
        dataset.prepare(splits)
        return [dataset.read(case) for cases in splits.values() for case in cases]

    def uncached() -> list[dict]:
        dataset = open_data(folder, args)
        return [dataset.preprocess(case) for cases in dataset.splits().values() for case in cases]

    def monai() -> list[dict]:
        chain = transforms.Compose(monai_steps(args.spacing))
        cases = [case for cases in open_data(folder, args).splits().values() for case in cases]
        return [chain(entry) for entry in monai_entries(cases)]

    results: dict[str, list] = {}
    seconds = interleaved(
        kept({"ours": ours, "no cache": uncached, "MONAI": monai}, results), args.repeats
    )
    for mine, other, third in zip(results["ours"], results["no cache"], results["MONAI"]):
        for key in ("image", "label", "foreground", "background"):
            if not np.array_equal(mine[key], other[key]):
                raise AssertionError(
                    f"start-up: '{key}' from the cache differs from that made anew"
                )
        for key in ("image", "label"):
            if not np.allclose(mine[key], third[key].numpy(), atol=1e-5):
                raise AssertionError(f"start-up: '{key}' differs from MONAI's by more than 1e-5")
    part = f"start-up, {args.cases} cases"
    return [
        faster(part, peer, seconds[peer], seconds["ours"], 10) for peer in ("no cache", "MONAI")
    ]


def batches(folder: Path, args: argparse.Namespace) -> list[dict]:
    dataset = open_data(folder, args)
    monai_set = MonaiDataset(
        monai_entries(dataset.splits()["labelled"]),
        transforms.Compose(
            [*monai_steps(args.spacing), *monai_random(args.patch)]
        ).set_random_state(SEED),
    )

    def ours() -> list[dict]:
        return list(make_loader(dataset, dataset.sample, args.batches))

    def uncached() -> list[dict]:
        return list(make_loader(dataset, dataset.preprocess, args.batches))

    def monai() -> list[dict]:
        loader = MonaiLoader(monai_set, batch_size=1)
        return list(
            itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), args.batches)
        )

    results: dict[str, list] = {}
    seconds = interleaved(
        kept({"ours": ours, "no cache": uncached, "MONAI": monai}, results), args.repeats
    )
    for mine, other, third in zip(results["ours"], results["no cache"], results["MONAI"]):
        if not all(torch.equal(mine[key], other[key]) for key in ("image", "label")):
            raise AssertionError("batch: from the cache it differs from that of files read anew")
        if mine["image"].shape != third["image"].shape:
            raise AssertionError(
                f"batch: {tuple(mine['image'].shape)}, MONAI's {tuple(third['image'].shape)}"
            )
    each = {name: value / args.batches for name, value in seconds.items()}
    begin = time.process_time()
    ours()
    print(
        "processor time of a batch from the cache: "
        f"{1000 * (time.process_time() - begin) / args.batches:.1f} ms"
    )
    part = f"batch, {CROPS} patches {args.patch}³"
    return [faster(part, peer, each[peer], each["ours"], 10) for peer in ("no cache", "MONAI")]


def fed(folder: Path, args: argparse.Namespace) -> list[dict]:
    dataset = open_data(folder, args)
    loader = iter(make_loader(dataset, dataset.sample, args.steps, workers=2))
    waits, sleeps = [], []
    for _ in range(args.steps):
        begin = time.perf_counter()
        next(loader)
        received = time.perf_counter()
        time.sleep(STEP)
        waits.append(received - begin)
        sleeps.append(time.perf_counter() - received)
    first, *later = waits
    wait, sleep = sum(later) / len(later), sum(sleeps) / len(sleeps)
    print(
        f"wait for a batch beside a step of {1000 * STEP:.0f} ms, 2 workers: mean "
        f"{1000 * wait:.2f} ms, longest "
        f"{1000 * max(later):.2f} ms of {len(later)} steps; the first, with the start of the "
        f"workers, {first:.2f} s\n"
    )
    return [overhead("fed, 2 workers", f"sleep of {1000 * STEP:.0f} ms", sleep, sleep + wait, 1.05)]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            make_demo_data.main(
                [
                    "--dataset",
                    "btcv",
                    "--out",
                    str(folder / "data"),
                    "--cases",
                    str(args.cases),
                    "--seed",
                    str(SEED),
                    "--shape",
                    *map(str, args.shape),
                ]
            )
        dataset = open_data(folder, args)
        dataset.prepare(dataset.splits())
        rows = [*start_up(folder, args), *batches(folder, args), *fed(folder, args)]
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
