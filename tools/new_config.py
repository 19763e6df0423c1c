r"""Look at a data set and write a configuration for it: spacing, intensities, patch, batch, lists;
and say why.

    python tools/new_config.py --data data/Task09_Spleen --out configs/my_spleen.yaml
    python tools/new_config.py --data data/Dataset101_Liver --out configs/liver.yaml \
        --format nnunet --device-memory 12
    python tools/new_config.py --data data/mine --out configs/mine.yaml --patch 96 96 64 \
        --networks resunet unet

--data is a folder with a decathlon JSON (format msd) or an nnU-Net v2 raw data set (nnunet); class
names and channels are read from it, now and when training. At most --max-scans labelled scans are
read, drawn with --seed; faults in them are listed. What is chosen, in the order of the table that
is printed:

spacing     median voxel size of the scans, by axis (R, A, S). Where one axis is more than three
            times as coarse as the finest and has less than a third of the voxels, its 10th
            percentile instead, so that few scans lose slices (nnU-Net's rule).
intensity   CT (the data set says so or, if it names no modality, most scans go below -200): a
            window from the 0.5th to the 99.5th percentile of labelled voxels. A lower end in gas
            (below -300) is raised to -200 where the labels are of soft tissue: the stomach holds
            air. Everything else, and several channels: z-score of each channel over the scan.
patch_size  multiples of the largest stride of --networks, at first the median scan, which is then
            made smaller where it is longest in mm, until it has no more voxels than --max-voxels
            (the papers' 96x96x96) and a step of two patches of the most demanding network fits
            --device-memory.
crop        uniform where the patch holds the whole median scan, else every second patch is centred
            on a label.
lists       those of --splits (default splits/NAME) if they exist, else those of the data set, else
            drawn with --seed: 70 % train, 10 % val, 20 % test (or 80 % and 20 % if the data set has
            a test list of its own).

The rest of the file are the defaults of the BTCV recipe. Read the table, correct what you know
better, and train.
"""

import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_3d_distill
from dataloaders import build_dataset, describe_dataset
from dataloaders.cases import UNKNOWN, read_image, read_label
from dataloaders.faults import DataError
from dataloaders.lists import read_json, read_split
from networks import NETWORKS, build_network
from tools.make_splits import drawn, write_lists
from utils.complexity import count_parameters, saved_bytes
from utils.config import ConfigError

# an axis is anisotropic if its voxels are more than this many times as long as the finest
COARSE = 3
CT_BELOW = -200  # HU; air is at -1000, MRI has no negative intensities
GAS = -300  # HU
SAMPLES = 10_000  # labelled voxels of each scan
# tensors of the size of the logits that the losses keep: probabilities, one-hot labels, products
LOSS_TENSORS = 8
SHARE = 0.8  # of the memory that a step may take by the estimate; libraries take the rest
NETWORKS_3D = ("resunet", "segresnet", "unet", "espnetv2", "mobile_unet", "lcovnet")
ENTRY = 34  # columns of the file before the comments
EPOCHS, FEWEST, MOST = 400, 4000, 24000  # of the training list; steps


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of the data set")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="configuration to write, for example configs/mine.yaml",
    )
    parser.add_argument("--format", choices=("auto", "msd", "nnunet"), default="auto")
    parser.add_argument(
        "--datalist", help="JSON in --data; default: dataset.json, or the only dataset*.json"
    )
    parser.add_argument(
        "--name", help="name of the data set, of its run folder; default: the name of --out"
    )
    parser.add_argument(
        "--splits", type=Path, help="folder for train.txt, val.txt, test.txt; default: splits/NAME"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the lists, and of which scans and voxels are looked at",
    )
    parser.add_argument("--max-scans", type=int, default=100, help="scans to read; 0: all")
    parser.add_argument(
        "--patch", type=int, nargs=3, metavar="N", help="patch size instead of a chosen one"
    )
    parser.add_argument("--max-voxels", type=int, default=96**3, help="largest patch to choose")
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GB",
        help="default: that of the GPU, or half of the main memory",
    )
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS_3D, default=NETWORKS_3D, help="to be trained"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.out.exists():
        raise ConfigError(f"{args.out}: exists already; remove it or choose another --out")
    name = args.name or args.out.stem
    format, datalist = find_format(args.data, args.format, args.datalist)
    told = describe_dataset(format, str(args.data), datalist, {})
    dataset = build_dataset(format, root=str(args.data), datalist=datalist, **told)
    cases = dataset.cases()
    if not cases:
        raise DataError(f"{args.data / datalist}: no labelled scan; expected entries with a label")
    picked = cases
    if args.max_scans and len(cases) > args.max_scans:
        order = np.random.default_rng(args.seed).permutation(len(cases))[: args.max_scans]
        picked = [cases[k] for k in sorted(order)]
    scans = inspect(picked, dataset, args.seed)

    choices: dict[str, tuple[object, str]] = {}  # key -> value, why
    choices["spacing"] = choose_spacing(scans)
    choices |= choose_intensity(scans, modalities(args.data / datalist), told["in_channels"])
    median = median_shape(scans, choices["spacing"][0])
    memory, where = args.device_memory, "--device-memory"
    if memory is None:
        memory, where = device_memory()
    estimate = step_memory(args.networks, told["in_channels"], len(told["class_names"]))
    choices |= choose_patch(args, median, choices["spacing"][0], memory, where, estimate)
    choices["flip_prob"] = choose_flips(told["class_names"])
    split_dir, counts, why = choose_lists(args, name, dataset, cases)
    choices["split_dir"] = (split_dir, why)
    per_batch = choices["cases_per_batch"][0]
    steps = min(max(EPOCHS * counts["train"] // per_batch, FEWEST), MOST) // 100 * 100
    choices["max_steps"] = (
        steps,
        f"{EPOCHS} epochs of {counts['train']} scans within {FEWEST}..{MOST}; a guess",
    )
    choices["val_interval"] = (steps // 20, "twenty times")
    choices["save_interval"] = (
        min(250, steps // 20),
        "what an interruption costs at most, in steps",
    )

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        yaml_text(args, name, format, datalist, told, choices, scans), encoding="utf-8"
    )
    try:  # the file must be one that the training script takes, with lists that fit the data
        _, cfg = train_3d_distill.parse_args(["--config", str(args.out)])
        build_dataset(**cfg.dataset_arguments()).splits()
    except (ConfigError, DataError):
        args.out.unlink()
        raise
    show(args, told, choices, scans, len(cases))
    return 0


def find_format(folder: Path, format: str, datalist: str | None) -> tuple[str, str]:
    """Format and JSON of a data set's folder; DataError if there is none, or if it is not clear
    which.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected that of a decathlon or nnU-Net data set"
        )
    if datalist is None:
        found = sorted(path.name for path in folder.glob("dataset*.json"))
        if "dataset.json" in found:
            found = ["dataset.json"]
        if len(found) != 1:
            raise DataError(
                f"{folder}: {', '.join(found) or 'no dataset.json'}; expected one JSON with the "
                "lists or labels, name "
                f"it with --datalist"
            )
        datalist = found[0]
    content = read_json(folder / datalist, expected="an object that describes the data set")
    return (
        "nnunet" if "channel_names" in content else "msd"
    ) if format == "auto" else format, datalist


def modalities(path: Path) -> list[str]:
    """Names of the channels, as the data set has them."""
    content = read_json(path)
    names = content.get("channel_names", content.get("modality", []))
    names = (
        names.values() if isinstance(names, dict) else [names] if isinstance(names, str) else names
    )
    return [str(name) for name in names]


def inspect(cases: Sequence, dataset, seed: int) -> list[dict]:
    """Of each scan in RAS order: `shape` (voxels), `spacing` (mm), `lowest` intensity and a sample
    of the labelled voxels' intensities, `labelled`, first channel; DataError that lists the scans
    that cannot be read.
    """
    scans, problems = [], []
    for number, case in enumerate(tqdm(cases, desc="reading the scans", unit="scan")):
        try:
            image, affine = read_image(case, dataset.in_channels)
            grid = image.shape[1:], affine
            label = read_label(case, dataset.allowed_ids, *grid, ignore=dataset.ignore_label)
        except DataError as error:
            problems.append(str(error))
            continue
        to_ras = nib.orientations.io_orientation(affine)[:, 0].astype(int)
        order = np.argsort(to_ras)  # the stored axis that is R, A, S
        values = image[0][(label > 0) & (label != UNKNOWN)]
        rng = np.random.default_rng([seed, number])
        scans.append(
            {
                "shape": np.array(image.shape[1:])[order],
                "spacing": np.linalg.norm(affine[:3, :3], axis=0)[order],
                "lowest": float(image[0].min()),
                "labelled": rng.choice(values, SAMPLES, replace=False)
                if len(values) > SAMPLES
                else values,
            }
        )
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} of {len(cases)} scans cannot be used:\n  {shown}{more}")
    return scans


def choose_spacing(scans: Sequence[dict]) -> tuple[list[float], str]:
    """Target voxel size in mm, R, A, S."""
    spacings, shapes = (
        np.array([scan["spacing"] for scan in scans]),
        np.array([scan["shape"] for scan in scans]),
    )
    target, shape = np.median(spacings, 0), np.median(shapes, 0)
    why = "median of the scans"
    axis = int(target.argmax())
    others = [k for k in range(3) if k != axis]
    if target[axis] > COARSE * target.min() and shape[axis] * COARSE < shape[others].min():
        finer = max(float(np.percentile(spacings[:, axis], 10)), float(target[others].max()))
        why = (
            f"median; along {'RAS'[axis]}, coarse, the 10th percentile (median {target[axis]:.3g})"
        )
        target[axis] = finer
    return [float(f"{value:.3g}") for value in target], why


def choose_intensity(
    scans: Sequence[dict], names: Sequence[str], channels: int
) -> dict[str, tuple[object, str]]:
    """intensity, window and crop_foreground."""
    lowest = np.array([scan["lowest"] for scan in scans])
    below = int((lowest < CT_BELOW).sum())
    named = ", ".join(names) or "no modality named"
    by_name = any(
        re.fullmatch(r"(?i)ct|.*\bct\b.*|.*computed tomography.*", name) for name in names
    )
    unnamed = not names or all(name.lower() in ("unknown", "", "image", "0") for name in names)
    if channels == 1 and (by_name or (unnamed and 2 * below > len(scans))):
        values = np.concatenate([scan["labelled"] for scan in scans])
        if not len(values):
            raise DataError(
                "no scan has a labelled voxel; expected labels above 0 to choose a window from"
            )
        low, high = np.percentile(values, [0.5, 99.5])
        gas = low < GAS and np.percentile(values, 25) > CT_BELOW
        window = [CT_BELOW if gas else 5 * math.floor(low / 5), 5 * math.ceil(high / 5)]
        if window[0] == window[1]:
            window[1] += 5
        note = f"; the former, {low:.0f}, is gas in tissue: raised to {CT_BELOW}" if gas else ""
        note += (
            "" if below else f"; no scan goes below {CT_BELOW}: stored with an offset or masked?"
        )
        reason = named if by_name else f"{below} of {len(scans)} scans go below {CT_BELOW}"
        return {
            "intensity": ("window", f"CT ({reason})"),
            "window": (
                [float(v) for v in window],
                f"0.5th to 99.5th percentile of labelled voxels{note}",
            ),
            "crop_foreground": (True, "cuts the air around the patient"),
        }
    why = "several channels" if channels > 1 else f"not CT ({named})"
    return {
        "intensity": ("zscore", why),
        "crop_foreground": (False, "after a z-score 0 is the mean, not the background"),
    }


def median_shape(scans: Sequence[dict], spacing: Sequence[float]) -> list[int]:
    """Median voxels of the scans on the grid of `spacing`."""
    shapes = [scan["shape"] * scan["spacing"] / np.array(spacing) for scan in scans]
    return [max(1, round(float(value))) for value in np.median(shapes, 0)]


def device_memory() -> tuple[float, str]:
    """GB that training may take, and where they are."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e9, "of the GPU"
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    ) / 2e9, "half of the main memory, there is no GPU"


def step_memory(
    networks: Sequence[str], channels: int, classes: int
) -> Callable[[Sequence[int], int], float]:
    """(patch, batch) -> GB that a training step takes, of the network that takes most, by an
    estimate.
    """
    built = [build_network(name, channels, classes) for name in networks]
    # weights, gradients, momentum, and one to spare
    fixed = [4 * 4 * count_parameters(network) for network in built]
    # What is kept is in proportion to the voxels; measured on one patch.
    side = 2 * max(NETWORKS[name].stride for name in networks)
    per_voxel = [
        saved_bytes(network, (1, channels, side, side, side)) / side**3 for network in built
    ]

    def estimate(patch: Sequence[int], batch: int) -> float:
        voxels = math.prod(patch) * batch
        return (
            max(f + voxels * (p + 4 * LOSS_TENSORS * classes) for f, p in zip(fixed, per_voxel))
            / 1e9
        )

    return estimate


def choose_patch(
    args: argparse.Namespace,
    median: Sequence[int],
    spacing: Sequence[float],
    memory: float,
    where: str,
    estimate: Callable[[Sequence[int], int], float],
) -> dict[str, tuple[object, str]]:
    """patch_size, crop, rot90_prob, cases_per_batch and crops_per_case."""
    multiple = math.lcm(*(NETWORKS[name].stride for name in args.networks))
    scan = f"median scan {'x'.join(map(str, median))} on this grid"
    square = abs(spacing[0] - spacing[1]) < 0.05 * spacing[0]  # pixels
    if args.patch:
        wrong = [side for side in args.patch if side < 1 or side % multiple]
        if wrong:
            raise ConfigError(
                f"--patch {args.patch}: {', '.join(args.networks)} take multiples of {multiple}"
            )
        patch, why = list(args.patch), f"--patch; {scan}"
    else:
        patch = [math.ceil(side / multiple) * multiple for side in median]
        if max(patch) == multiple:  # norms want more than one voxel in the deepest layer
            patch[2] *= 2
        # a patch of equal sides can be turned
        together = square and max(median[:2]) < 1.5 * min(median[:2])
        if together:
            patch[:2] = [max(patch[:2])] * 2
        limits = []
        while True:
            if math.prod(patch) > args.max_voxels:
                limits.append(f"{args.max_voxels} voxels")
            elif estimate(patch, 2) > SHARE * memory:
                limits.append(f"{memory:.3g} GB")
            else:
                break
            longest = max(
                (k for k in range(3) if patch[k] > multiple), key=lambda k: patch[k] * spacing[k]
            )
            axes = (0, 1) if together and longest < 2 else (longest,)
            smaller = [side - multiple * (k in axes) for k, side in enumerate(patch)]
            if max(smaller) == multiple:
                break
            patch = smaller
        limit = f", made smaller for {' and '.join(dict.fromkeys(limits))}" if limits else ""
        why = f"{scan}, multiples of {multiple}{limit}"
    whole = all(side >= n for side, n in zip(patch, median))
    most = 2 if whole else 4
    batch = next((b for b in (4, 2, 1) if b <= most and estimate(patch, b) <= SHARE * memory), 1)
    takes = f"takes about {estimate(patch, batch):.2g} GB of {memory:.3g} ({where})"
    if estimate(patch, batch) > SHARE * memory:
        takes += ": too much, choose fewer --networks, a smaller --patch, or amp: bf16"
    turned = square and patch[0] == patch[1]
    held = math.prod(map(min, patch, median)) / math.prod(median)
    crop = ("uniform", "the patch holds the median scan")
    return {
        "patch_size": (patch, why),
        "crop": crop if whole else ("pos_neg", f"the patch holds {held:.0%} of the median scan"),
        "rot90_prob": (0.2, "square") if turned else (0.0, "not square, so it cannot be turned"),
        "cases_per_batch": (batch, takes)
        if whole
        else (1, "several patches of one scan, which is read once"),
        "crops_per_case": (1, "one patch is the whole scan") if whole else (batch, takes),
    }


def choose_flips(names: Sequence[str]) -> tuple[float, str]:
    """Probability of mirroring each axis."""
    sided = [name for name in names if re.search(r"(?i)left|right|\b[lr]\b", name)]
    if sided:
        return (
            0.0,
            f"a mirror makes '{sided[0]}' the other side's; the papers mirror BTCV all the same "
            "(0.2)",
        )
    return 0.2, "as in the papers"


def choose_lists(
    args: argparse.Namespace, name: str, dataset, cases: Sequence
) -> tuple[str, dict[str, int], str]:
    """split_dir, cases of each list, and why; lists are drawn and written if there are none."""
    folder = args.splits or Path("splits") / name
    if (folder / "train.txt").is_file():
        counts = {split: len(read_split(folder, split) or []) for split in ("train", "val", "test")}
        return str(folder), counts, f"lists that are there: {shown_counts(counts)}"
    try:
        own = dataset.own_splits()
    except DataError:
        own = {}
    if own.get("train") and own.get("val"):
        counts = {split: len(own[split]) for split in own}
        return "", counts, f"the data set's own lists: {shown_counts(counts)}"
    test = {case.name for case in dataset.own_test()}
    names = sorted(case.name for case in cases if case.name not in test)
    if len(names) < 2:
        raise DataError(
            f"{args.data}: {len(names)} labelled scans to train and validate on, expected at least "
            "2"
        )
    shares = (0.2,) if test or len(names) < 3 else (0.1, 0.2)
    held = [max(1, round(share * len(names))) for share in shares]
    lists = drawn(names, [len(names) - sum(held), *held], args.seed)
    if test:
        lists["test"] = sorted(test)
    write_lists(folder, lists, f"tools/new_config.py --seed {args.seed}")
    counts = {split: len(lists.get(split, ())) for split in ("train", "val", "test")}
    return str(folder), counts, f"drawn with seed {args.seed}: {shown_counts(counts)}"


def shown_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in counts.items())


def yaml_text(
    args: argparse.Namespace,
    name: str,
    format: str,
    datalist: str,
    told: dict,
    choices: dict,
    scans: Sequence[dict],
) -> str:
    """The configuration, with the reason of each choice beside it."""
    classes = ", ".join(told["class_names"])
    spacings = np.array([scan["spacing"] for scan in scans])
    shapes = np.array([scan["shape"] for scan in scans])
    ranges = [
        " x ".join(
            f"{low:.3g}..{high:.3g}" if low < high else f"{low:.3g}"
            for low, high in zip(v.min(0), v.max(0))
        )
        for v in (spacings, shapes)
    ]
    lines = [
        f"# {name}: written by tools/new_config.py from {len(scans)} labelled scans of {ranges[1]} "
        "voxels (R, A, S) of",
        f"# {ranges[0]} mm. Class names and channels ({told['in_channels']}) come from {datalist}:",
        *(f"#   {line}" for line in textwrap.wrap(classes, 110)),
    ]
    settings = {
        "dataset": (name, "names the run folder"),
        "format": (format, ""),
        "data_root": (args.data.as_posix(), ""),
        "datalist": (datalist, ""),
        "split_dir": choices["split_dir"],
        "orientation": ("RAS", ""),
    }
    keys = (
        "spacing",
        "intensity",
        "window",
        "crop_foreground",
        "patch_size",
        "crop",
        "flip_prob",
        "rot90_prob",
        "cases_per_batch",
        "crops_per_case",
        "max_steps",
        "val_interval",
        "save_interval",
    )
    settings |= {key: choices[key] for key in keys if key in choices}
    for key, (value, why) in settings.items():
        entry = f"{key}: {json.dumps(value, ensure_ascii=False)}"
        lines.append(f"{entry:{ENTRY}}  # {why}" if why else entry)
    return "\n".join(lines) + "\n"


def show(
    args: argparse.Namespace, told: dict, choices: dict, scans: Sequence[dict], labelled: int
) -> None:
    """Print what was chosen and why."""
    looked = (
        f"{len(scans)} of {labelled} labelled scans"
        if len(scans) < labelled
        else f"all {labelled} labelled scans"
    )
    print(f"looked at {looked}; {told['in_channels']} channel(s); {', '.join(told['class_names'])}")
    rows = [(key, json.dumps(value), why) for key, (value, why) in choices.items()]
    widths = [max(len(row[k]) for row in rows) for k in range(2)]
    for key, value, why in rows:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {why}")
    names = " ".join(args.networks)
    teacher = next((n for n in args.networks if n in ("resunet", "segresnet")), args.networks[0])
    print(f"wrote {args.out}, for {names}. Next:")
    print(
        f"  python train_3d_distill.py --config {args.out} --method supervised --student {teacher}"
    )
    print(f"  python train_3d_distill.py --config {args.out} --teacher {teacher}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, DataError) as problem:
        sys.exit(f"error: {problem}")
