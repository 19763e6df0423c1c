r"""Look at a data set and write a configuration for it: spacing, intensities, patch, batch, lists;
and say why.

    python tools/new_config.py --data data/Task09_Spleen --out configs/my_spleen.yaml
    python tools/new_config.py --data data/Dataset101_Liver --out configs/liver.yaml \
        --format nnunet --device-memory 12
    python tools/new_config.py --data data/mine --out configs/mine.yaml --patch 96 96 64 \
        --networks resunet unet
    python tools/new_config.py --data data/mine --out configs/mine.yaml --labelled 8
    python tools/new_config.py --data data/mine --out configs/mine.yaml --small  # for a CPU
    python tools/new_config.py --nnunet .../nnUNetTrainer__nnUNetPlans__3d_fullres \
        --data data/Dataset101_Liver --out configs/mine.yaml --budget-ms 200 --threads 4
    python tools/new_config.py --data data/polyps --out configs/polyps.yaml --labelled 5%

--data is a folder with a decathlon JSON (format msd), an nnU-Net v2 raw data set (nnunet), or RGB
images with masks (images2d). Class names and channels of the first two are read from it, now and
when training. With --labelled, --unlabelled or images the file is for few labels: for
train_3d_crkd.py, whose other half, train_2d_crkd.py, takes it too and trains on slices; of images
for the latter alone. Without, it is for train_3d_distill.py. At most --max-scans labelled scans are
read, drawn with --seed; faults in them are listed. What is chosen, in the order of the table that
is printed:

spacing     median voxel size of the scans, by axis (R, A, S). Where one axis is more than three
            times as coarse as the finest and has less than a third of the voxels, its 10th
            percentile instead, so that few scans lose slices (nnU-Net's rule).
intensity   CT (the data set says so or, if it names no modality, most scans go below -200): a
            window from the 0.5th to the 99.5th percentile of labelled voxels. A lower end in gas
            (below -300) is raised to -200 where the labels are of soft tissue: the stomach holds
            air. Where the values of a class lie outside, the window is made wider. Scans are cut to
            the box of what lies above its lower end, unless that would cut off labelled voxels.
            Everything else, and several channels: z-score of each channel over the scan.
patch_size  multiples of the largest stride of --networks, at first as long as the shortest scan
            where that is most of the median one, else as this one, which is then made smaller
            where it is longest in mm, until it has no more voxels than --max-voxels (the papers'
            96x96x96) and a step of two patches of the most demanding network fits
            --device-memory; with few labels a step of two labelled and two unlabelled ones, of
            which each is seen in two views. Images: a square of the median image's area, at most
            the papers' 320.
crop        uniform where the patch holds the whole median scan, else every second patch is centred
            on a label.
lists       those of --splits (default splits/NAME) if they exist, else those of the data set, else
            drawn with --seed: 70 % train, 10 % val, 20 % test (or 80 % and 20 % if the data set has
            a test list of its own). Scans and images without a label are never drawn: they are
            trained on as unlabelled.
workers     by the cores of this machine.

A few steps are timed, and the time of each training on this machine is printed. --small makes a
file for a CPU of two to four cores, whose trainings take about an hour in all: coarser voxels,
smaller patches, narrower networks, and as many steps as fit.

With --nnunet the network in that results folder is the teacher, and spacing, intensities, patch and
lists are those that it was trained with: tools/nnunet_config.py. --labelled 0: no scan has a label,
and all of them, with those of --unlabelled, are trained on by its predictions.

The rest of the file are the scripts' defaults. Read the table, correct what you know
better, and train.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_2d_crkd
import train_3d_crkd
import train_3d_distill
from dataloaders import build_dataset, describe_dataset
from dataloaders.cases import UNKNOWN, read_image, read_label
from dataloaders.faults import DataError
from dataloaders.images2d import FOLDERS
from dataloaders.lists import read_json
from networks import NETWORKS, build_network
from tools import nnunet_config, step_time
from tools.make_splits import drawn, write_lists
from utils.checkpoint import CheckpointError, write_text
from utils.complexity import count_parameters, saved_bytes
from utils.config import ConfigError, labelled_name, parse_labelled_or_zero
from utils.header import device_words, duration
from utils.run import resolve_device, run_folder
from utils.scripts import run_tool

# an axis is anisotropic if its voxels are more than this many times as long as the finest
COARSE = 3
CT_BELOW = -200  # HU; air is at -1000, MRI has no negative intensities
GAS = -300  # HU
SAMPLES = 10_000  # labelled voxels of each scan
SAMPLES_OF_CLASS = 500
# HU; resampling, after which scans are cut, makes the brightest voxels of a plane darker
CROP_MARGIN = 20
MOST_OF_SCAN = 0.75  # of the median scan's side
# tensors of the size of the logits that the losses keep: probabilities, one-hot labels, products
LOSS_TENSORS = 8
SHARE = 0.8  # of the memory that a step may take by the estimate; libraries take the rest
NETWORKS_3D = ("resunet", "segresnet", "unet", "espnetv2", "mobile_unet", "lcovnet")
NETWORK_OF_FEW_LABELS = {2: "unet2d", 3: "vnet"}
ENTRY = 34  # columns of the file before the comments
# passes over the labelled training list, with few labels over the unlabelled scans or images
EPOCHS, EPOCHS_3D, EPOCHS_2D = 400, 240, 200
FEWEST, MOST = 4000, 24000  # steps
VIEWS = 3  # passes that CRKD keeps: labelled, strong, and weak with perturbed features
LARGEST_IMAGE = 320  # pixels of a side
SHARES = (0.1, 0.2)  # of val and test in lists that are drawn
LARGEST_PATCH = 96**3  # voxels, as in the papers
SLICED = {"labelled_batch": 12, "unlabelled_batch": 12}  # of a training on slices
# Of --small: seconds of all trainings, their steps, voxels of a patch and of the median scan, how
# much coarser voxels may be, pixels of a side, widths
HOUR, SMALL_STEPS = 3600, (600, 6000)
SMALL_PATCH, SMALL_SCAN, COARSER, SMALL_IMAGE = 48 * 48 * 32, 96 * 96 * 64, 2.0, 128
TEACHERS = ("resunet", "segresnet")
SMALL_NETWORKS = ("resunet", "unet")
NARROW = {
    "resunet": {"channels": [16, 32, 64, 128]},
    "segresnet": {"init_filters": 8},
    "unet": {"channels": [12, 24, 48, 96]},
    "vnet": {"n_filters": 8},
    "unet2d": {"channels": [8, 16, 32, 64, 128]},
}


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
    parser.add_argument("--format", choices=("auto", "msd", "nnunet", "images2d"), default="auto")
    parser.add_argument(
        "--datalist", help="JSON in --data; default: dataset.json, or the only dataset*.json"
    )
    parser.add_argument(
        "--name", help="name of the data set, of its run folder; default: the name of --out"
    )
    parser.add_argument(
        "--labelled",
        type=parse_labelled_or_zero,
        metavar="N",
        help="few labels: so many of the training list count as labelled (8), or their share "
        "(5%%); with --nnunet 0: no scan has a label",
    )
    parser.add_argument(
        "--unlabelled",
        metavar="FOLDER",
        help="few labels, --nnunet: folder of further scans or images without labels",
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
        "--patch", type=int, nargs="+", metavar="N", help="patch size instead of a chosen one"
    )
    parser.add_argument(
        "--max-voxels",
        type=int,
        help=f"largest patch to choose; default: {LARGEST_PATCH}, with --small {SMALL_PATCH}",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="for a CPU: all trainings take about an hour on two to four cores",
    )
    parser.add_argument(
        "--device-memory",
        type=float,
        metavar="GB",
        help="default: that of the GPU, or half of the main memory",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=(*NETWORKS_3D, *NETWORK_OF_FEW_LABELS.values(), "nnunet"),
        help="to be trained; default: those of the papers, with few labels vnet, of images unet2d, "
        "with --nnunet nnunet and unet",
    )
    nnunet_config.add_flags(parser)
    args = parser.parse_args(argv)
    nnunet_config.check_flags(parser, args)
    if args.small and args.nnunet:
        parser.error("--small does not go with --nnunet; --budget-ms makes its students small")
    args.max_voxels = args.max_voxels or (SMALL_PATCH if args.small else LARGEST_PATCH)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.out.exists():
        raise ConfigError(f"{args.out}: exists already; remove it or choose another --out")
    args.name = args.name or args.out.stem
    args.format, args.datalist = find_format(args.data, args.format, args.datalist)
    dims = 2 if args.format == "images2d" else 3
    few = dims == 2 or args.labelled is not None or bool(args.unlabelled)
    few = few and not args.nnunet
    usual = list(SMALL_NETWORKS if args.small else NETWORKS_3D)
    if few:
        usual = [NETWORK_OF_FEW_LABELS[dims]]
    args.networks = args.networks or (["nnunet", "unet"] if args.nnunet else usual)
    wrong = [name for name in args.networks if NETWORKS[name].dims != dims]
    if wrong or (args.patch and len(args.patch) != dims):
        shown = f"--networks {wrong[0]}" if wrong else f"--patch {args.patch}"
        raise ConfigError(f"{shown}: {args.format} is trained on in {dims}D")
    choose = choose_for_images if dims == 2 else choose_for_scans
    if args.nnunet:
        choose = choose_for_nnunet
    made: list[Path] = []  # what is taken back where it turns out not to fit
    try:
        heading, settings, table = choose(args, few, made)
        more = choose_for_machine(args, few)
        settings, table = settings | more, table | more
        made += [args.out, *absent_folders(args.out)]
        write_text(args.out, yaml_text(heading, settings))
        # the file must be one that the training script takes, with lists that fit the data
        trainings = planned(args, few, dims)
        cfg = trainings[-1].cfg
        dataset = build_dataset(**cfg.dataset_arguments())
        dataset.needs_labels = dataset.needs_val = args.labelled != 0
        dataset.splits(args.labelled or None)
        seconds = step_seconds(trainings, dataset)
        if args.small:
            length = choose_small_length(seconds)
            settings, table = settings | length, table | length
            write_text(args.out, yaml_text(heading, settings))
    except (ConfigError, DataError, CheckpointError):
        for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        raise
    for line in heading:
        print(line.removeprefix("#").strip())
    show(table)
    if args.nnunet:
        nnunet_config.show_candidates(args)
    show_times(trainings, seconds, settings["max_steps"][0])
    print(f"wrote {args.out}, for {' '.join(args.networks)}. Next:")
    for command in next_commands(args, trainings):
        print(f"  {command}")
    return 0


class Training:
    """A training that the file is for: what it is called, its script and flags, and its settings.

    ConfigError where the script does not take the file.
    """

    def __init__(self, title: str, args: argparse.Namespace, script, flags: Sequence[str]) -> None:
        self.title, self.script, self.flags = title, script, list(flags)
        with contextlib.redirect_stderr(io.StringIO()):  # its notes are for who trains
            _, self.cfg = script.parse_args(["--config", str(args.out), *self.flags])
        self.dims = 2 if script is train_2d_crkd else 3

    @property
    def folder(self) -> Path:
        cfg = self.cfg
        if self.script is train_3d_distill:
            networks = cfg.networks
        else:
            networks = f"{cfg.network}-{labelled_name(cfg.labelled)}"
        names = cfg.runs_dir, cfg.dataset, cfg.method, networks
        return run_folder(*names, cfg.seed, cfg.preset, "")

    def command(self, config: Path) -> str:
        name = Path(self.script.__file__).name
        return shlex.join(["python", name, "--config", str(config), *self.flags])


def planned(args: argparse.Namespace, few: bool, dims: int) -> list[Training]:
    """The trainings of the file, in their order; ConfigError if a script does not take it."""
    alone = "--method", "supervised"
    if few:
        script = train_2d_crkd if dims == 2 else train_3d_crkd
        return [
            Training("the labels alone", args, script, alone),
            Training("with the unlabelled ones", args, script, ()),
        ]
    if args.labelled == 0:
        return [
            Training(f"student under {name}", args, train_3d_distill, ("--method", method))
            for method, name in (("kd", "KD"), ("dist", "DIST"))
        ]
    if args.nnunet:
        return [
            Training("student alone", args, train_3d_distill, alone),
            Training("distilled student", args, train_3d_distill, ()),
        ]
    teachers = [name for name in args.networks if name in TEACHERS]
    teacher = (teachers or args.networks)[0]
    student = "unet" if "unet" in args.networks else args.networks[-1]
    trainings = [
        Training("teacher", args, train_3d_distill, (*alone, "--student", teacher)),
        Training("student alone", args, train_3d_distill, (*alone, "--student", student)),
    ]
    if student == teacher:  # the only network
        trainings.pop()
    flags = ["--teacher", teacher, "--student", student]
    if teacher not in TEACHERS:  # it has no residual block for ACF-BCKD to look at
        flags += ["--method", "kd"]
    return [*trainings, Training("distilled student", args, train_3d_distill, flags)]


def sliced(args: argparse.Namespace, training: Training) -> list[Training]:
    """A training of few labels on slices of the same scans, where the patch allows it."""
    stride = NETWORKS["unet2d"].stride
    if training.script is not train_3d_crkd:
        return []
    if any(side % stride for side in training.cfg.patch_size[:2]):
        return []
    flags = "--opts", *(f"{key}={value}" for key, value in SLICED.items())
    return [Training("on slices", args, train_2d_crkd, flags)]


def step_seconds(trainings: Sequence[Training], dataset) -> list[float]:
    """Seconds of a step of each training on this machine."""
    found, built = [], {}
    for training in trainings:
        cfg = training.cfg
        if training.script is not train_3d_distill:
            found.append(step_time.few_labels_step(cfg, dataset))
            continue
        built[cfg.student] = cfg.network_arguments(cfg.student)
        of_teacher = None
        if not cfg.supervised:
            of_teacher = cfg.teacher_arguments() if cfg.nnunet_folder else built[cfg.teacher]
        found.append(step_time.distillation_step(cfg, dataset, of_teacher))
    return found


def show_times(trainings: Sequence[Training], seconds: Sequence[float], steps: int) -> None:
    """Print how long each training takes here."""
    device = resolve_device(trainings[0].cfg.device)
    print(f"time here ({device_words(device, 1)}), without reading scans and validating:")
    for training, each in zip(trainings, seconds):
        print(f"  {training.title:24}  about {duration(each * steps)} for {steps:,} steps")


def choose_for_machine(args: argparse.Namespace, few: bool) -> dict[str, tuple[object, str]]:
    """workers, and with --small narrow networks and, for distillation, rates for few steps."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    if torch.cuda.is_available():
        workers, why = min(8, max(1, cores - 1)), f"of {cores} cores"
    else:
        workers, why = min(2, cores // 2), f"of {cores} cores, which compute the steps too"
    choices: dict[str, tuple[object, str]] = {"workers": (workers, why)}
    if args.small:
        narrow = {name: NARROW[name] for name in args.networks if name in NARROW}
        choices["network_args"] = (narrow, "--small: narrow networks")
    if args.small and not few:
        # In few steps AdamW finds the thin organs too; under ACF-BCKD a student got on worse by it.
        recipe = {"optimizer": "adamw", "lr": 0.003}
        recipes = {name: recipe for name in args.networks if name in TEACHERS}
        choices["lr"] = (0.1, "--small: higher than usual, since there are few steps")
        choices["recipe"] = (recipes, "of the teacher, as in the demonstration")
    return choices


def choose_small_length(seconds: Sequence[float]) -> dict[str, tuple[object, str]]:
    """max_steps and the intervals of --small, by the seconds of a step of each training."""
    fewest, most = SMALL_STEPS
    steps = int(min(max(HOUR / sum(seconds), fewest), most)) // 100 * 100
    total = duration(steps * sum(seconds))
    return {
        "max_steps": (steps, f"--small: all trainings take about {total} here"),
        "val_interval": (steps // 4, "four times"),
        "save_interval": (min(100, steps // 4), "what an interruption costs at most, in steps"),
    }


def choose_for_scans(
    args: argparse.Namespace, few: bool, made: list[Path]
) -> tuple[list[str], dict, dict]:
    """Heading, settings and printed choices of a volumetric data set; files that are written on the
    way go to `made`.
    """
    told = describe_dataset(args.format, str(args.data), args.datalist, {})
    if few and told.get("regions"):
        raise ConfigError(
            f"{args.data / args.datalist}: its labels are regions that overlap, but methods for "
            "few labels give each voxel one class; leave out --labelled and --unlabelled, and "
            "train with train_3d_distill.py"
        )
    arguments = {"root": str(args.data), "datalist": args.datalist, **told}
    arguments["unlabelled"] = args.unlabelled or ""
    dataset = build_dataset(args.format, **arguments)
    cases = dataset.cases()
    if not cases:
        raise DataError(
            f"{args.data / args.datalist}: no labelled scan; expected entries with a label"
        )
    scans = inspect(picked(cases, args), "scan", args.seed, lambda *of: look_at_scan(dataset, *of))

    choices: dict[str, tuple[object, str]] = {}  # key -> value, why
    choices["spacing"] = choose_spacing(scans)
    if args.small:
        choices["spacing"] = coarser(*choices["spacing"], scans)
    named = modalities(args.data / args.datalist)
    choices |= choose_intensity(scans, named, told["in_channels"])
    median = median_shape(scans, choices["spacing"][0])
    estimate = step_memory(args.networks, told["in_channels"], len(told["class_names"]), 3)
    smallest = median_shape(scans, choices["spacing"][0], np.min)
    choices |= choose_patch(args, median, choices["spacing"][0], estimate, few, smallest)
    choices["flip_prob"] = choose_flips(told["class_names"])

    try:
        own = dataset.own_splits()
    except DataError:  # of folds that are not there
        own = {}
    tested = {case.name for case in dataset.own_test()}
    names = [case.name for case in cases if case.name not in tested]
    lists = choose_lists(args, bool(own.get("train") and own.get("val")), names, tested, made)
    choices |= choose_length(args, arguments, lists, choices, few)

    spacings = np.array([scan["spacing"] for scan in scans])
    shapes = np.array([scan["shape"] for scan in scans])
    ranges = [
        " x ".join(
            f"{low:.3g}..{high:.3g}" if low < high else f"{low:.3g}"
            for low, high in zip(v.min(0), v.max(0))
        )
        for v in (spacings, shapes)
    ]
    looked = f"{len(scans)} of {len(cases)}" if len(scans) < len(cases) else f"all {len(cases)}"
    heading = [
        f"# {args.name}: written by tools/new_config.py from {looked} labelled scans",
        f"# of {ranges[1]} voxels (R, A, S) of {ranges[0]} mm.",
        f"# Class names and channels ({told['in_channels']}) come from {args.datalist}:",
        *(f"#   {line}" for line in textwrap.wrap(", ".join(told["class_names"]), 90)),
    ]
    settings = {
        "datalist": (args.datalist, ""),
        "split_dir": choices["split_dir"],
        "orientation": ("RAS", ""),
    }
    return heading, first_settings(args) | settings | choices, choices


def choose_for_nnunet(
    args: argparse.Namespace, few: bool, made: list[Path]
) -> tuple[list[str], dict, dict]:
    """The same for students of the nnU-Net that is trained on the data set."""
    if args.format != "nnunet":
        raise DataError(f"{args.data}: --nnunet needs a raw data set of nnU-Net v2")
    told = describe_dataset(args.format, str(args.data), args.datalist, {})
    results = nnunet_config.fitting_results(args, told)
    arguments = {"root": str(args.data), "datalist": args.datalist, **told}
    arguments["unlabelled"] = args.unlabelled or ""
    dataset = build_dataset(args.format, **arguments)
    dataset.needs_labels = args.labelled != 0
    choices = nnunet_config.choose(args, results, told)
    if args.labelled == 0:
        lists = nnunet_config.without_labels(args, dataset)
    else:
        lists = nnunet_config.fold_lists(args, results, dataset, made)
    if len(lists) == 3:  # folds beside the data
        arguments["fold"] = lists[2]
        choices["fold"] = (lists[2], "of splits_final.json")
    elif not lists:
        tested = {case.name for case in dataset.own_test()}
        names = [case.name for case in dataset.cases() if case.name not in tested]
        split_dir, why = choose_lists(args, False, names, tested, made)
        lists = split_dir, f"{why}, so the teacher may have been trained on the val list"
    choices |= choose_length(args, arguments, lists[:2], choices, few)
    if args.labelled == 0:
        choices["labelled"] = (0, "--labelled: the nnU-Net's prediction is the only label")
        choices["teacher_views"] = ("one", "flips: its predictions of mirrored copies, averaged")
    if args.unlabelled:
        choices["unlabelled"] = (args.unlabelled, "further ones without labels")
    heading = [
        f"# {args.name}: students of {args.nnunet.resolve().name}, by tools/new_config.py.",
        f"# Classes ({', '.join(results.classes)}) and channels come from {args.datalist}.",
    ]
    if results.ignore is not None:
        heading.append(f"# Label id {results.ignore} is 'ignore': voxels that nobody labelled.")
    settings = {"datalist": (args.datalist, ""), "split_dir": choices["split_dir"]}
    return heading, first_settings(args) | settings | choices, choices


def choose_for_images(
    args: argparse.Namespace, few: bool, made: list[Path]
) -> tuple[list[str], dict, dict]:
    """The same of RGB images with masks."""
    arguments = {"root": str(args.data), "unlabelled": args.unlabelled or ""}
    dataset = build_dataset("images2d", **arguments)
    folders = dataset.scan()
    found = {case.name: case for cases in folders.values() for case in cases}
    masked = [case for case in found.values() if case.label]
    if not masked:
        raise DataError(f"{args.data}: no image has a mask of its name; expected at least two")
    looked = picked(masked, args)
    images = inspect(looked, "image", args.seed, lambda *of: look_at_image(dataset, *of))

    estimate = step_memory(args.networks, dataset.in_channels, 2, 2)
    choices = choose_image_patch(args, images, estimate)
    listed = (args.data / "train.txt").is_file() or any(args.data.glob("ratio_*%"))
    own = listed or {"train", "val"} <= folders.keys()
    tested = {case.name for case in folders.get("test", []) if case.label}
    names = [case.name for case in masked if case.name not in tested]
    unmasked = [name for name, case in found.items() if not case.label]
    lists = choose_lists(args, own, names, tested, made, unmasked)
    choices |= choose_length(args, arguments, lists, choices, few)

    sides = np.array([image["shape"] for image in images])
    ranges = [f"{v.min()}..{v.max()}" if v.min() < v.max() else str(v.min()) for v in sides.T]
    heading = [
        f"# {args.name}: written by tools/new_config.py from {len(images)} of {len(masked)} images "
        f"with a mask,",
        f"# {' x '.join(ranges)} pixels.",
    ]
    settings = {
        "split_dir": choices["split_dir"],
        "class_names": (["background", "foreground"], "say what the masks show"),
    }
    return heading, first_settings(args) | settings | choices, choices


def absent_folders(file: Path) -> list[Path]:
    """The folders above a file that do not exist yet."""
    return [folder for folder in file.parents if not folder.exists()]


def first_settings(args: argparse.Namespace) -> dict[str, tuple[object, str]]:
    """What every file begins with."""
    return {
        "dataset": (args.name, "names the run folder"),
        "format": (args.format, ""),
        "data_root": (args.data.as_posix(), ""),
    }


def picked(cases: Sequence, args: argparse.Namespace) -> list:
    """At most --max-scans of the cases, drawn with --seed."""
    if not args.max_scans or len(cases) <= args.max_scans:
        return list(cases)
    order = np.random.default_rng(args.seed).permutation(len(cases))[: args.max_scans]
    return [cases[k] for k in sorted(order)]


def find_format(folder: Path, format: str, datalist: str | None) -> tuple[str, str]:
    """Format and JSON of a data set's folder, '' for images; DataError if there is none, or if it
    is not clear which.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected that of a decathlon or nnU-Net data set, or of "
            "images with masks"
        )
    found = [datalist] if datalist else sorted(path.name for path in folder.glob("dataset*.json"))
    if "dataset.json" in found:
        found = ["dataset.json"]
    pictures = any((folder / images).is_dir() for images, _ in FOLDERS.values())
    if format == "images2d" or (format == "auto" and not found and pictures):
        return "images2d", ""
    if len(found) != 1:
        raise DataError(
            f"{folder}: {', '.join(found) or 'no dataset.json'}; expected one JSON with the lists "
            "or labels, name it with --datalist, or folders images and masks (HDF5 files of ACDC "
            "and LA: configs/acdc.yaml and configs/la.yaml)"
        )
    content = read_json(folder / found[0], expected="an object that describes the data set")
    if format == "auto":
        format = "nnunet" if "channel_names" in content else "msd"
    return format, found[0]


def modalities(path: Path) -> list[str]:
    """Names of the channels, as the data set has them."""
    content = read_json(path)
    names = content.get("channel_names", content.get("modality", []))
    names = (
        names.values() if isinstance(names, dict) else [names] if isinstance(names, str) else names
    )
    return [str(name) for name in names]


def inspect(cases: Sequence, unit: str, seed: int, look: Callable) -> list[dict]:
    """What `look(case, rng)` finds of each case; DataError that lists those that cannot be read."""
    found, problems = [], []
    for number, case in enumerate(tqdm(cases, desc=f"reading the {unit}s", unit=unit)):
        try:
            found.append(look(case, np.random.default_rng([seed, number])))
        except DataError as error:
            problems.append(str(error))
    if problems:
        shown = "\n  ".join(problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(f"{len(problems)} of {len(cases)} {unit}s cannot be used:\n  {shown}{more}")
    return found


def look_at_scan(dataset, case, rng: np.random.Generator) -> dict:
    """Of a scan in RAS order: `shape` (voxels), `spacing` (mm), `lowest` intensity and a sample of
    the labelled voxels' intensities, `labelled`, and of those of each class, `of_class`, first
    channel; `kept_below`, see there.
    """
    image, affine = read_image(case, dataset.in_channels)
    grid = image.shape[1:], affine
    label = read_label(case, dataset.allowed_ids, *grid, ignore=dataset.ignore_label)
    to_ras = nib.orientations.io_orientation(affine)[:, 0].astype(int)
    order = np.argsort(to_ras)  # the stored axis that is R, A, S
    labelled = (label > 0) & (label != UNKNOWN)
    of_class = {}
    for k, name in dataset.id_titles().items():
        inside = image[0][label == k]
        if len(inside):
            of_class[name] = inside[:: math.ceil(len(inside) / SAMPLES_OF_CLASS)]
    values = image[0][labelled]
    if len(values) > SAMPLES:
        values = rng.choice(values, SAMPLES, replace=False)
    return {
        "shape": np.array(image.shape[1:])[order],
        "spacing": np.linalg.norm(affine[:3, :3], axis=0)[order],
        "lowest": float(image[0].min()),
        "labelled": values,
        "of_class": of_class,
        "kept_below": kept_below(image[0], labelled),
    }


def look_at_image(dataset, case, rng: np.random.Generator) -> dict:
    """Of an image: `shape` (rows, columns)."""
    return {"shape": np.array(dataset.read(case)["image"].shape[1:])}


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


def coarser(spacing: Sequence[float], why: str, scans: Sequence[dict]) -> tuple[list[float], str]:
    """A spacing on which the median scan has no more than SMALL_SCAN voxels, at most COARSER times
    as coarse.
    """
    voxels = math.prod(median_shape(scans, spacing))
    factor = min((voxels / SMALL_SCAN) ** (1 / 3), COARSER)
    if factor <= 1:
        return list(spacing), why
    larger = [float(f"{factor * side:.3g}") for side in spacing]
    return larger, f"--small: {factor:.2g} times the {why}"


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
        window, wider = widened(window, scans)
        note = f"; the former, {low:.0f}, is gas in tissue: raised to {CT_BELOW}" if gas else ""
        note += f"; made wider for {', '.join(wider)}" if wider else ""
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
            "crop_foreground": choose_crop(scans, window[0]),
        }
    why = "several channels" if channels > 1 else f"not CT ({named})"
    return {
        "intensity": ("zscore", why),
        "crop_foreground": (False, "after a z-score 0 is the mean, not the background"),
    }


def widened(window: Sequence[float], scans: Sequence[dict]) -> tuple[list[float], list[str]]:
    """The window, made wider for classes whose values it would clip, and the names of these: of all
    voxels together a small structure is no half percent.

    What counts of a class are its 5th to 95th percentiles, and of one that is not itself full of
    air only what is no gas.
    """
    low, high = window
    wider = []
    for name in dict.fromkeys(name for scan in scans for name in scan["of_class"]):
        values = np.concatenate([scan["of_class"].get(name, []) for scan in scans])
        first, middle, last = np.percentile(values, [5, 50, 95])
        if middle > CT_BELOW:
            first = max(first, CT_BELOW)
        if first < low or last > high:
            wider.append(name)
        low = min(low, 5 * math.floor(first / 5))
        high = max(high, 5 * math.ceil(last / 5))
    return [low, high], wider


def choose_crop(scans: Sequence[dict], low: float) -> tuple[bool, str]:
    """crop_foreground, for a window that begins at `low`."""
    cut = sum(scan["kept_below"] <= low + CROP_MARGIN for scan in scans)
    if cut:
        return False, f"cutting to what lies above {low:g} would cut off labels of {cut} scan(s)"
    return True, "cuts the air around the patient, and nothing that is labelled"


def kept_below(image: np.ndarray, labelled: np.ndarray) -> float:
    """The intensity below which a threshold must lie, so that the box of what is above it holds all
    labelled voxels; infinite where there is none.

    image: (H, W, D). labelled: the same shape, bool. Along an axis the box begins at the first
    plane whose brightest voxel is above the threshold; this plane must not come after the first
    labelled one. The same holds from the other end.
    """
    least = math.inf
    for axis in range(3):
        others = tuple(k for k in range(3) if k != axis)
        planes = np.flatnonzero(labelled.any(others))
        if not len(planes):
            return math.inf
        brightest = image.max(others)
        least = min(least, brightest[: planes[0] + 1].max(), brightest[planes[-1] :].max())
    return float(least)


def median_shape(
    scans: Sequence[dict], spacing: Sequence[float], statistic: Callable = np.median
) -> list[int]:
    """Median voxels of the scans on the grid of `spacing`, or another statistic of them."""
    shapes = [scan["shape"] * scan["spacing"] / np.array(spacing) for scan in scans]
    return [max(1, round(float(value))) for value in statistic(shapes, 0)]


def fitting_side(median: int, smallest: int, multiple: int) -> int:
    """The longest side of a patch: one that all scans fill, if that is most of the median scan,
    else one that holds this.
    """
    below = min(median, smallest) // multiple * multiple
    if below >= MOST_OF_SCAN * median:
        return below
    return math.ceil(median / multiple) * multiple


def device_memory(given: float | None) -> tuple[float, str]:
    """GB that training may take, and where they are."""
    if given is not None:
        return given, "--device-memory"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 1e9, "of the GPU"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory / 2e9, "half of the main memory, there is no GPU"


def step_memory(
    networks: Sequence[str], channels: int, classes: int, dims: int
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
        saved_bytes(network, (1, channels, *[side] * dims)) / side**dims for network in built
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
    estimate: Callable[[Sequence[int], int], float],
    few: bool,
    smallest: Sequence[int],
) -> dict[str, tuple[object, str]]:
    """patch_size, crop, rot90_prob, and cases_per_batch and crops_per_case or, with few labels,
    labelled_batch and unlabelled_batch.
    """
    memory, where = device_memory(args.device_memory)
    passes = VIEWS if few else 1  # of the network, for each patch of a batch
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
        patch = [fitting_side(n, shortest, multiple) for n, shortest in zip(median, smallest)]
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
            elif estimate(patch, 2 * passes) > SHARE * memory:
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
        if any(side > n for side, n in zip(patch, smallest)):
            why += f"; shorter scans, the least {'x'.join(map(str, smallest))}, are padded"
    whole = all(side >= n for side, n in zip(patch, median))
    batches = (2, 1) if few or whole or args.small else (4, 2, 1)
    batch, takes = choose_batch(batches, patch, passes, estimate, memory, where)
    turned = square and patch[0] == patch[1]
    held = math.prod(map(min, patch, median)) / math.prod(median)
    crop = ("uniform", "the patch holds the median scan")
    choices = {
        "patch_size": (patch, why),
        "crop": crop if whole else ("pos_neg", f"the patch holds {held:.0%} of the median scan"),
        "rot90_prob": (0.2, "square") if turned else (0.0, "not square, so it cannot be turned"),
    }
    if few:
        return choices | {"labelled_batch": (batch, takes), "unlabelled_batch": (batch, "as many")}
    if whole:
        batch_keys = (batch, takes), (1, "one patch is the whole scan")
    else:
        batch_keys = (1, "several patches of one scan, which is read once"), (batch, takes)
    return choices | dict(zip(("cases_per_batch", "crops_per_case"), batch_keys))


def choose_batch(
    sizes: Sequence[int],
    patch: Sequence[int],
    passes: int,
    estimate: Callable[[Sequence[int], int], float],
    memory: float,
    where: str,
) -> tuple[int, str]:
    """The first of the batch sizes whose step fits the memory, or 1, and what it takes."""
    fitting = (b for b in sizes if estimate(patch, b * passes) <= SHARE * memory)
    batch = next(fitting, 1)
    needed = estimate(patch, batch * passes)
    takes = f"takes about {needed:.2g} GB of {memory:.3g} ({where})"
    if needed > SHARE * memory:
        takes += ": too much, choose fewer --networks, a smaller --patch, or amp: bf16"
    return batch, takes


def choose_image_patch(
    args: argparse.Namespace, images: Sequence[dict], estimate: Callable
) -> dict[str, tuple[object, str]]:
    """patch_size, which images are resized to, labelled_batch and unlabelled_batch."""
    memory, where = device_memory(args.device_memory)
    multiple = math.lcm(*(NETWORKS[name].stride for name in args.networks))
    rows, columns = np.median([image["shape"] for image in images], axis=0)
    why = f"median image {rows:.0f}x{columns:.0f}"
    if args.patch:
        patch, why = list(args.patch), f"--patch; {why}"
    else:
        side = math.ceil(math.sqrt(rows * columns) / multiple) * multiple
        largest = SMALL_IMAGE if args.small else LARGEST_IMAGE
        side = min(max(side, 2 * multiple), largest // multiple * multiple)
        while side > 2 * multiple and estimate([side, side], VIEWS) > SHARE * memory:
            side -= multiple
        patch, why = [side, side], f"{why}, multiples of {multiple}, at most {largest}"
    batches = (4, 2, 1) if args.small else (12, 8, 4, 2, 1)
    batch, takes = choose_batch(batches, patch, VIEWS, estimate, memory, where)
    return {
        "patch_size": (patch, why),
        "labelled_batch": (batch, takes),
        "unlabelled_batch": (batch, "as many"),
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
    args: argparse.Namespace,
    own: bool,
    names: Sequence[str],
    tested: set[str],
    made: list[Path],
    unlabelled: Sequence[str] = (),
) -> tuple[str, str]:
    """split_dir and why; lists are drawn and written, and noted in `made`, if there are none.

    own: the data set has lists. names: labelled cases that may be drawn; tested: those of its test
    list. unlabelled: cases that are trained on only if the list of training names them.
    """
    folder = args.splits or Path("splits") / args.name
    if (folder / "train.txt").is_file():
        return str(folder), "lists that are there"
    if own:
        return "", "the data set's own lists"
    if len(names) < 2:
        raise DataError(
            f"{args.data}: {len(names)} labelled cases to train and validate on, expected at least "
            "2"
        )
    shares = (SHARES[1],) if tested or len(names) < 3 else SHARES
    held = [max(1, round(share * len(names))) for share in shares]
    lists = drawn(sorted(names), [len(names) - sum(held), *held], args.seed)
    lists["train"] += sorted(unlabelled)
    if tested:
        lists["test"] = sorted(tested)
    files = [folder / f"{split}.txt" for split in lists]
    made += [file for file in files if not file.exists()] + absent_folders(files[0])
    write_lists(folder, lists, f"tools/new_config.py --seed {args.seed}")
    return str(folder), f"drawn with seed {args.seed}"


def choose_length(
    args: argparse.Namespace, arguments: dict, lists: tuple[str, str], choices: dict, few: bool
) -> dict[str, tuple[object, str]]:
    """split_dir, labelled, unlabelled, max_steps and the intervals. arguments: of the data set,
    beside its lists.
    """
    split_dir, why = lists
    dataset = build_dataset(args.format, split_dir=split_dir, **arguments)
    dataset.needs_labels = dataset.needs_val = args.labelled != 0
    splits = dataset.splits(args.labelled or None)
    counts = {split: len(cases) for split, cases in splits.items()}
    shown = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    settings = {"split_dir": (split_dir, f"{why}: {shown}")}
    if few:
        if not counts["unlabelled"]:
            raise ConfigError(
                f"{args.data}: all {counts['labelled']} {dataset.unit}s of the training list count "
                "as labelled; expected some that do not; name how many do with --labelled N, or a "
                "folder of further ones with --unlabelled FOLDER"
            )
        settings["labelled"] = (args.labelled, "--labelled; null: all that have a label")
        if args.unlabelled:
            settings["unlabelled"] = (args.unlabelled, "further ones without labels")
        epochs = EPOCHS_2D if dataset.dims == 2 else EPOCHS_3D
        each, total, kind = choices["unlabelled_batch"][0], counts["unlabelled"], "unlabelled"
    else:
        kind = "labelled" if args.labelled is None else "unlabelled"
        epochs, total = EPOCHS, counts["labelled"] + counts["unlabelled"]
        each = choices["cases_per_batch"][0]
        if kind == "labelled":
            total = counts["labelled"]
    steps = min(max(epochs * total // each, FEWEST), MOST) // 100 * 100
    why = f"{epochs} epochs of {total} {kind} {dataset.unit}s within {FEWEST}..{MOST}; a guess"
    return settings | {
        "max_steps": (steps, why),
        "val_interval": (steps // 20, "twenty times"),
        "save_interval": (min(250, steps // 20), "what an interruption costs at most, in steps"),
    }


def yaml_text(heading: Sequence[str], settings: dict[str, tuple[object, str]]) -> str:
    """The configuration, with the reason of each choice beside it."""
    lines = list(heading)
    for key, (value, why) in settings.items():
        entry = f"{key}: {as_yaml(value)}"
        lines.append(f"{entry:{ENTRY}}  # {why}" if why else entry)
    return "\n".join(lines) + "\n"


def as_yaml(value: object) -> str:
    """A value on one line of YAML, which is JSON but for numbers such as 1e-05: 1.0e-05."""
    if isinstance(value, dict):
        items = (f"{json.dumps(key)}: {as_yaml(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text


def show(choices: dict[str, tuple[object, str]]) -> None:
    """Print what was chosen and why."""
    rows = [(key, json.dumps(value), why) for key, (value, why) in choices.items()]
    widths = [max(len(row[k]) for row in rows) for k in range(2)]
    for key, value, why in rows:
        print(f"{key:{widths[0]}}  {value:{widths[1]}}  {why}")


def next_commands(args: argparse.Namespace, trainings: Sequence[Training]) -> list[str]:
    """What to do with the configuration, to the table of scores."""
    if args.labelled == 0:  # there is nothing to score
        return [f"{training.command(args.out)}  # {training.title}" for training in trainings]
    commands = [f"python tools/check_data.py --config {shlex.quote(str(args.out))}"]
    on_slices = sliced(args, trainings[-1])
    trained = [*trainings, *on_slices]
    for training in trained:
        commands.append(f"{training.command(args.out)}  # {training.title}")
    for training in trained:
        best = shlex.quote(str(training.folder / "best.pt"))
        commands.append(f"python test_{training.dims}d.py --ckpt {best}")
    folders = shlex.join(str(training.folder) for training in trained)
    return [*commands, f"python tools/results_table.py {folders}"]


if __name__ == "__main__":
    sys.exit(run_tool(main, DataError))
