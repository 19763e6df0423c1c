r"""Train a 3D segmentation network: a light student under a frozen teacher, or any one network by
itself.

Distillation methods live in losses/, one file each; ACF-BCKD is the default. A step: the teacher
and the student see the same patches, the student's loss is the segmentation loss plus the weighted
terms of the method.

    # the teacher
    python train_3d_distill.py --config configs/btcv.yaml --method supervised --student resunet
    python train_3d_distill.py --config configs/btcv.yaml --teacher resunet  # ACF-BCKD, U-Net
    python train_3d_distill.py --config configs/btcv.yaml --teacher resunet --student unet \
        --method supervised --seed 1

Results go to runs/<dataset>/<method>/<teacher>-<student>/seed<k>/; `python test_3d.py --ckpt
.../best.pt` scores them.
"""

import argparse
import dataclasses
import inspect
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataloaders import DATASETS, DataError, MSDDataset, Report, build_dataset, describe_dataset
from dataloaders.samplers import DrawSampler, PatchDataset, collate
from inference import AMP_MODES, autocast, predict_labels
from losses import KD_METHODS, PRESETS, build_kd
from losses.segmentation import SegmentationLoss
from metrics import class_dice, mean_dice
from networks import NETWORKS, build_network, check_network, init_weights
from utils import figures, plugins
from utils.checkpoint import (
    PREVIOUS,
    CheckpointError,
    atomic_save,
    code_version,
    load_checkpoint,
    load_last,
    load_network_weights,
    save_last,
)
from utils.config import (
    ConfigError,
    build,
    check_choices,
    check_intervals,
    check_nested,
    check_recipes,
    check_run_names,
    check_unused,
    constructing,
    gather,
    located,
    note_unused,
    trying,
)
from utils.diagnosis import Diagnosis, findings
from utils.distributed import World, join_world
from utils.modes import (
    keep_freed_memory,
    rng_state,
    seed_everything,
    set_rng_state,
    statistics_estimated,
    weightless,
)
from utils.numerics import StepWatch, use_deterministic
from utils.run import (
    SELECTIONS,
    StopSignal,
    leave_signals_to_parent,
    no_selection,
    open_run,
    resolve_device,
    run_folder,
    run_script,
)
from utils.runlog import RunLog, SilentLog, read_log
from utils.schedules import poly_lr, set_lr
from utils.trackers import LOGGERS, open_tracker, require_logger

TRAINING, CLEAN = 0, 1  # streams of random numbers
# Where a class of the user's own, FILE.py:ClassName, can stand in place of a name
PLUGGABLE = {
    "student": plugins.network(NETWORKS),
    "teacher": plugins.network(NETWORKS),
    "method": plugins.distillation(KD_METHODS),
    "format": plugins.data_format(DATASETS, MSDDataset),
}
# Keys that only some data formats have a use for
PREPROCESSING = (
    "orientation",
    "spacing",
    "intensity",
    "window",
    "crop_foreground",
    "normalize",
    "k_divisible",
    "regions",
    "regions_class_order",
    "fold",
    "patient_pattern",
    "absent_classes",
)


@dataclasses.dataclass(frozen=True)
class Config:
    # Data. How each key is used: dataloaders/msd.py
    dataset: str  # name of the data set: names the run folder
    data_root: str  # folder that holds the data list
    patch_size: tuple[int, int, int]  # voxels of the preprocessed grid
    max_steps: int  # optimiser updates
    format: str = "msd"  # class in dataloaders.DATASETS
    datalist: str = "dataset.json"  # the data set's JSON in data_root
    class_names: tuple[str, ...] = ()  # by label id, background first; []: as the JSON says
    in_channels: int = 0  # 0: as the JSON says
    # nnunet: {name: [ids]} that overlap; {}: as the JSON says
    regions: dict = dataclasses.field(default_factory=dict)
    # nnunet: id of each region in predictions; []: as the JSON says
    regions_class_order: tuple[int, ...] = ()
    fold: int = 0  # nnunet: entry of splits_final.json, where split_dir is empty
    split_dir: str = ""  # folder with train.txt, val.txt, test.txt; "": the JSON's own lists
    cache_dir: str = "cache"  # preprocessed cases
    # group 1 is the patient in a name; "": the usual conventions (dataloaders/cases.py)
    patient_pattern: str = ""
    absent_classes: tuple[str, ...] = ()  # classes that the training list may lack
    orientation: str = "RAS"
    spacing: tuple[float, ...] = ()  # mm; []: as stored
    intensity: str = "window"  # window | zscore | none
    window: tuple[float, float] = (-175.0, 250.0)  # HU, for intensity: window
    crop_foreground: bool = True
    normalize: str = "crop"  # BraTS: crop | volume, the voxels whose statistics normalise a patch
    # BraTS: patches come from the brain's box enlarged to multiples of this; 0: the patch size
    k_divisible: int = 0
    crop: str = "pos_neg"  # pos_neg: half of the patches are centred on foreground; uniform
    flip_prob: float = 0.2  # each axis
    rot90_prob: float = 0.2
    scale_prob: float = 0.1  # intensity x U(0.9, 1.1)
    shift_prob: float = 0.1  # intensity + U(-0.1, 0.1)
    cases_per_batch: int = 1
    crops_per_case: int = 4  # batch size = cases_per_batch x crops_per_case
    workers: int = 4  # loader processes; 0 loads in the main one
    # Networks and method
    student: str = "unet"
    teacher: str = "resunet"
    method: str = "acf_bckd"  # losses.KD_METHODS, or supervised
    preset: str = "clean"  # clean | as_released: the reference code's arithmetic
    network_args: dict = dataclasses.field(default_factory=dict)  # {network: {argument: value}}
    # {method[@teacher[-student]]: {argument: value}}
    method_args: dict = dataclasses.field(default_factory=dict)
    # {network: {key: value}} when that network trains alone
    recipe: dict = dataclasses.field(default_factory=dict)
    teacher_checkpoint: str = ""  # "": best.pt of the supervised run of `teacher`
    teacher_seed: int = 0
    # steps in which the method's terms grow from nothing to their weights; 0: none
    distill_warmup: int = 0
    # Optimisation: SGD with momentum, poly schedule
    lr: float = 0.01
    method_lr: float = 0.0  # of the method's own parameters (attention, projections); 0: lr
    min_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    amp: str = "off"  # off | bf16 | fp16
    # steps that may be left out where a loss or gradient is not finite; 0: stop
    skip_nonfinite: int = 0
    # deterministic algorithms; utils/numerics.py says what they cannot guarantee
    deterministic: bool = False
    compile: bool = False  # torch.compile of the networks
    channels_last: bool = False  # memory order of weights and activations
    # Validation, output
    val_start: int = 0  # first step at which to validate
    val_interval: int = 500  # steps
    # clean batches from which batch norms get the statistics they are tested with; 0: the running
    bn_batches: int = 20
    overlap: float = 0.5  # of neighbouring windows
    window_batch: int = 4
    # val | test: the list that chooses best.pt; test is recorded and shown in every table
    select_on: str = "val"
    log_interval: int = 20  # steps
    save_interval: int = 500  # steps
    # steps between measurements of each term's gradient, under 1 % of the time; 0: none
    diagnose_interval: int = 100
    logger: str = ""  # wandb | mlflow, beside log.jsonl and TensorBoard
    seed: int = 0
    device: str = "auto"
    runs_dir: str = "runs"
    tag: str = ""  # told apart from other runs of the same cell


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="YAML file of the data set, for example configs/btcv.yaml"
    )
    parser.add_argument("--teacher", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--student", help="the network to train, from the same names")
    parser.add_argument("--method", help=f"supervised, {', '.join(KD_METHODS)}")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", help=", ".join(AMP_MODES))
    parser.add_argument(
        "--deterministic", action="store_true", default=None, help="deterministic algorithms"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the networks (torch.compile)"
    )
    parser.add_argument(
        "--channels-last", action="store_true", default=None, help="channels-last memory order"
    )
    parser.add_argument("--logger", help="also log to wandb or mlflow, if installed")
    parser.add_argument(
        "--select-on", choices=SELECTIONS, help="list that chooses best.pt; test is shown in tables"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="lists may name files outside of the data root"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from last.pt of the same run, if there is one"
    )
    parser.add_argument("--show-run", action="store_true", help="print the run folder and stop")
    parser.add_argument(
        "--opts",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the YAML file",
    )
    args = parser.parse_args(argv)
    keys = (
        "teacher",
        "student",
        "method",
        "seed",
        "device",
        "amp",
        "deterministic",
        "compile",
        "channels_last",
        "logger",
        "select_on",
    )
    flags = {key: getattr(args, key) for key in keys}
    given = gather(args.config, args.opts, flags)
    args.plugins = plugins.plug_in(given, PLUGGABLE)
    cfg = build(Config, given)
    with located(given, args.config):
        check_recipes(Config, cfg.recipe, NETWORKS, fixed=("method", "student", "teacher"))
        if cfg.method == "supervised":
            given = gather(args.config, args.opts, flags, cfg.recipe.get(cfg.student))
            args.plugins = plugins.plug_in(given, PLUGGABLE)
            cfg = build(Config, given)
            unused = (
                "preset",
                "method_args",
                "teacher_checkpoint",
                "teacher_seed",
                "distill_warmup",
                "method_lr",
            )
            note_unused(given, unused, "--method supervised")
        cfg = dataclasses.replace(
            cfg,
            recipe={},
            network_args=check_nested(
                "network_args", cfg.network_args, NETWORKS, PLUGGABLE["student"].takes
            ),
            method_args=check_nested(
                "method_args", cfg.method_args, KD_METHODS, PLUGGABLE["method"].takes, NETWORKS
            ),
        )
        cfg = complete(cfg)
        validate(cfg)
    # Only what concerns this run is stored: an edit elsewhere in the file must not keep it from
    # resuming.
    cfg = dataclasses.replace(
        cfg,
        network_args={k: v for k, v in cfg.network_args.items() if k == cfg.student},
        method_args={k: v for k, v in cfg.method_args.items() if k in method_keys(cfg)},
    )
    return args, cfg


def complete(cfg: Config) -> Config:
    """`cfg` with what it leaves out and the data set's own files tell: class names, channels,
    regions.
    """
    if cfg.format not in DATASETS:
        return cfg  # validate says so
    told = describe_dataset(cfg.format, cfg.data_root, cfg.datalist, dataclasses.asdict(cfg))
    return dataclasses.replace(cfg, **told)


def validate(cfg: Config) -> None:
    """Raise ConfigError for values that could only fail later."""
    networks = [name for name, cls in NETWORKS.items() if getattr(cls, "dims", 3) == 3]
    check_choices(
        cfg,
        {
            "format": DATASETS,
            "student": networks,
            "teacher": networks,
            "method": ["supervised", *KD_METHODS],
            "preset": PRESETS,
            "select_on": SELECTIONS,
            "amp": AMP_MODES,
            "logger": LOGGERS,
        },
    )
    check_intervals(
        cfg,
        {
            "[1, inf)": (
                "max_steps",
                "cases_per_batch",
                "crops_per_case",
                "val_interval",
                "log_interval",
                "save_interval",
                "window_batch",
                "in_channels",
                "patch_size",
            ),
            "[0, inf)": (
                "workers",
                "seed",
                "teacher_seed",
                "val_start",
                "momentum",
                "weight_decay",
                "grad_clip",
                "min_lr",
                "method_lr",
                "diagnose_interval",
                "skip_nonfinite",
                "distill_warmup",
                "bn_batches",
            ),
            "(0, inf)": ("lr",),
            "[0, 1)": ("overlap",),
            "[0, 1]": ("flip_prob", "rot90_prob", "scale_prob", "shift_prob"),
        },
    )
    check_run_names(cfg)
    if cfg.intensity != "window":
        check_unused(cfg, ("window",), f"intensity '{cfg.intensity}'")
    for network in (cfg.student, cfg.teacher):
        stride = NETWORKS[network].stride
        if any(side % stride for side in cfg.patch_size):
            raise ConfigError(
                f"patch_size: {list(cfg.patch_size)} must be multiples of {stride} for {network}"
            )
    dataset_arguments(cfg)
    require_logger(cfg.logger)
    try_out(cfg)


def try_out(cfg: Config) -> None:
    """Build the networks and the method once without memory, so that what does not fit shows before
    the data.
    """
    classes, channels = len(cfg.class_names), {}
    for role in ("student",) if cfg.method == "supervised" else ("student", "teacher"):
        name = getattr(cfg, role)
        with trying(f"network_args: {name}"):
            how = plugins.trial(
                NETWORKS[name], cfg.patch_size, cfg.cases_per_batch * cfg.crops_per_case
            )
            channels[role] = check_network(
                name, cfg.in_channels, classes, **how, **cfg.network_args.get(name, {})
            )
    if cfg.method != "supervised":
        with trying(f"method_args: {cfg.method}"), weightless():
            build_kd(
                cfg.method,
                channels["student"],
                channels["teacher"],
                classes,
                multilabel=DATASETS[cfg.format].multilabel or bool(cfg.regions),
                preset=cfg.preset,
                **method_arguments(cfg),
            )


def dataset_arguments(cfg: Config) -> dict:
    """What the data set's class takes from the configuration; a departed-from default that it
    ignores is an error.
    """
    accepted = set(inspect.signature(DATASETS[cfg.format].__init__).parameters)
    check_unused(
        cfg,
        [key for key in PREPROCESSING if key not in accepted],
        f"the data format '{cfg.format}'",
    )
    values = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name in accepted
    }
    return {"root": cfg.data_root, "format": cfg.format} | values


def method_keys(cfg: Config) -> tuple[str, ...]:
    """Keys of `method_args` that concern this cell, the later the stronger."""
    return cfg.method, f"{cfg.method}@{cfg.teacher}", f"{cfg.method}@{cfg.teacher}-{cfg.student}"


def method_arguments(cfg: Config) -> dict:
    """`method_args` of this cell: those of the method, then of method@teacher, then of
    method@teacher-student.
    """
    return {
        name: value
        for key in method_keys(cfg)
        for name, value in (cfg.method_args.get(key) or {}).items()
    }


def load_teacher(
    args: argparse.Namespace, cfg: Config, dataset, val: list
) -> tuple[torch.nn.Module, dict[str, float] | None]:
    """The frozen teacher, in eval mode; CheckpointError if it is missing or was trained for other
    classes.

    With it, its scores on the cases `val` if it was validated on just those, in the same way; else
    None.
    """
    folder = run_folder(
        cfg.runs_dir, cfg.dataset, "supervised", cfg.teacher, cfg.teacher_seed, "clean", ""
    )
    path = Path(cfg.teacher_checkpoint or folder / "best.pt")
    if not path.is_file():
        own = args.plugins.get(cfg.teacher)
        name = f"{own['file']}:{cfg.teacher}" if own else cfg.teacher
        raise CheckpointError(
            f"{path}: no teacher weights; train the teacher first:\n"
            f"  python train_3d_distill.py --config {args.config} --method supervised --student "
            f"{name} "
            f"--seed {cfg.teacher_seed}\n"
            f"or name a checkpoint with --opts teacher_checkpoint=FILE"
        )
    checkpoint = load_checkpoint(path)
    network = checkpoint["network"]
    expected = {
        "name": cfg.teacher,
        "in_channels": cfg.in_channels,
        "num_classes": dataset.num_classes,
    }
    wrong = [f"{k} {network[k]} instead of {v}" for k, v in expected.items() if network[k] != v]
    if checkpoint.get("class_names") and list(checkpoint["class_names"]) != list(cfg.class_names):
        wrong.append(
            f"classes {list(checkpoint['class_names'])} instead of {list(cfg.class_names)}"
        )
    if wrong:
        raise CheckpointError(
            f"{path}: this teacher does not fit ({'; '.join(wrong)}); train one on this data set"
        )
    plugins.check_same(checkpoint.get("plugins", {}), args.plugins, str(path), [cfg.teacher])
    teacher = build_network(
        network["name"], network["in_channels"], network["num_classes"], **network["arguments"]
    )
    load_network_weights(teacher, checkpoint["weights"], str(path))
    own = {
        "cases": [case.name for case in val],
        "patch": list(cfg.patch_size),
        "overlap": cfg.overlap,
    }
    there = checkpoint.get("config", {})
    before = {
        "cases": checkpoint.get("cases", {}).get("val"),
        "patch": list(there.get("patch_size", ())),
        "overlap": there.get("overlap"),
    }
    alike = own == before and all(
        there.get(key) == getattr(cfg, key) for key in ("dataset", "amp", *PREPROCESSING)
    )
    return teacher.eval().requires_grad_(False), checkpoint.get("val") if alike else None


def evaluate(
    network: torch.nn.Module, dataset, cases: list, cfg: Config, world: World
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean Dice over `cases` and of each class, and a picture of one of this process: image, label,
    prediction.
    """
    names = dataset.class_names if dataset.multilabel else dataset.class_names[1:]
    device = next(network.parameters()).device
    scores, picture = [], None
    for case in tqdm(
        world.part(cases), desc="validating", unit="case", leave=False, disable=not world.main
    ):
        sample = dataset.read(case)
        prediction = (
            predict_labels(
                network,
                torch.from_numpy(np.array(sample["image"])).to(device),
                patch_size=cfg.patch_size,
                overlap=cfg.overlap,
                window_batch=cfg.window_batch,
                amp=cfg.amp,
                multilabel=dataset.multilabel,
            )
            .cpu()
            .numpy()
        )
        label = np.array(sample["label"] if dataset.multilabel else sample["label"][0])
        scores.append(class_dice(prediction, label, dataset.num_classes, dataset.multilabel))
        if picture is None:
            picture = figures.panel(np.array(sample["image"][0]), label, prediction, len(names) + 1)
    return mean_dice(world.merged(scores), names), picture


def main() -> int:
    args, cfg = parse_args()
    supervised = cfg.method == "supervised"
    networks = cfg.student if supervised else f"{cfg.teacher}-{cfg.student}"
    folder = run_folder(
        cfg.runs_dir, cfg.dataset, cfg.method, networks, cfg.seed, cfg.preset, cfg.tag
    )
    if args.show_run:
        print(folder)
        return 0
    if not (folder / "last.pt").exists() and (folder / "best.pt").exists():
        if "imported" in load_checkpoint(folder / "best.pt"):
            print(f"nothing to do: {folder} holds imported weights; remove it to train anew")
            return 0
    resume = args.resume and any((folder / name).exists() for name in ("last.pt", PREVIOUS))
    world, name = join_world(cfg.device)
    device = resolve_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    if cfg.deterministic:
        use_deterministic(device, cfg.compile, quiet=not world.main)

    # Data: three disjoint lists, everything read and checked before the first step
    with constructing(args.config):
        dataset = build_dataset(**dataset_arguments(cfg), allow_outside=args.allow_outside)
        augment = dataset.patch_function(
            cfg.patch_size, cfg.crop, cfg.flip_prob, cfg.rot90_prob, cfg.scale_prob, cfg.shift_prob
        )
    report = Report()
    splits = dataset.splits(report)
    report.stop()
    if not splits[cfg.select_on]:
        raise ConfigError(no_selection(cfg.select_on, cfg.split_dir or cfg.datalist))

    # Networks and objective
    memory = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
    teacher, teacher_scores = (
        (None, None) if supervised else load_teacher(args, cfg, dataset, splits["val"])
    )
    if teacher is not None:
        teacher = teacher.to(device, memory_format=memory)
    seed_everything(cfg.seed)
    arguments = cfg.network_args.get(cfg.student, {})
    kd = None
    with constructing(f"{args.config}: network_args or method_args"):
        student = init_weights(
            build_network(cfg.student, cfg.in_channels, dataset.num_classes, **arguments)
        )
        student = world.synchronised(student.to(device, memory_format=memory), device)
        if teacher is not None:
            kd = build_kd(
                cfg.method,
                student.feature_channels,
                teacher.feature_channels,
                dataset.num_classes,
                multilabel=dataset.multilabel,
                preset=cfg.preset,
                **method_arguments(cfg),
            ).to(device)
    if cfg.compile:
        for network in (student, teacher) if teacher is not None else (student,):
            network.compile()
    if world.rank:
        # dropout and sampled losses differ between processes
        seed_everything(cfg.seed + 10**6 * world.rank)
    seg_loss = SegmentationLoss(dataset.multilabel)
    with world.main_first():  # so that one process fills the cache
        dataset.prepare(splits, cfg.patch_size, report)
        report.stop()
        if world.main:
            print(
                *report.spoken_warnings(),
                sep="\n",
                end="\n" * bool(report.warnings),
                file=sys.stderr,
            )
            open_run(folder, cfg, resume)
    trained = [
        p
        for module in (student, kd)
        if module is not None
        for p in module.parameters()
        if p.requires_grad
    ]
    own = (
        [p for p in kd.parameters() if p.requires_grad] if kd is not None and cfg.method_lr else []
    )
    if cfg.method_lr and not own and not supervised and world.main:
        print(
            f"note: {cfg.method} has no parameters of its own: method_lr does nothing",
            file=sys.stderr,
        )
    if cfg.distill_warmup > cfg.max_steps and not supervised and world.main:
        print(
            f"note: with max_steps {cfg.max_steps} the terms do not reach their weights, for which "
            "distill_warmup "
            f"takes {cfg.distill_warmup} steps",
            file=sys.stderr,
        )
    groups = [[p for p in student.parameters() if p.requires_grad], own] if own else [trained]
    optimizer = torch.optim.SGD(
        [{"params": group} for group in groups],
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    modules = {"student": student} if kd is None else {"student": student, "method": kd}
    watch = StepWatch(folder, modules, scaler, world, cfg.skip_nonfinite)

    # Resume
    start, best, totals, counted = 0, {"dice": -1.0, "step": -1}, {}, 0
    if resume:
        state, warning = load_last(folder)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        plugins.check_same(state.get("plugins", {}), args.plugins, str(folder))
        load_network_weights(student, state.get("student", state["weights"]), str(folder))
        if kd is not None:
            kd.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], world.rank)
        watch.load_state_dict(state.get("watch", {}))
        start, best, totals, counted = (
            state["step"],
            state["best"],
            state["totals"],
            state["counted"],
        )
    tracker = (
        open_tracker(cfg.logger, folder, dataclasses.asdict(cfg), start > 0) if world.main else None
    )
    log = RunLog(folder, start, tracker) if world.main else SilentLog()
    diagnosis = Diagnosis(cfg.diagnose_interval, student.parameters(), world, log, cfg.compile)
    stop = StopSignal()
    described = {
        "kind": "3d",
        "network": {
            "name": cfg.student,
            "in_channels": cfg.in_channels,
            "num_classes": dataset.num_classes,
            "arguments": dict(arguments),
        },
        "class_names": list(cfg.class_names),
        "config": dataclasses.asdict(cfg),
        "dataset": dataset_arguments(cfg),
        "cases": {split: [case.name for case in cases] for split, cases in splits.items()},
        "code": code_version(),
        "plugins": args.plugins,
        "selected_on": cfg.select_on,
    }

    def save(step: int, weights: dict[str, torch.Tensor]) -> None:
        random_states = world.gathered(rng_state())  # all processes, or the others would wait
        if world.main:
            save_last(
                {
                    **described,
                    "weights": weights,
                    "student": student.state_dict(),
                    "method": kd.state_dict() if kd is not None else {},
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": random_states,
                    "step": step,
                    "best": best,
                    "totals": totals,
                    "counted": counted,
                    "watch": watch.state_dict(),
                },
                folder,
            )

    # A process loads its part of the cases of each batch or, where that does not come out even, of
    # each case's crops.
    by_case = cfg.cases_per_batch % world.size == 0
    crops = cfg.crops_per_case if by_case else world.share(cfg.crops_per_case, "crops_per_case")
    kept = slice(None) if by_case else slice(world.rank * crops, (world.rank + 1) * crops)
    rank, size = (world.rank, world.size) if by_case else (0, 1)

    def batches(first: int, last: int, stream: int):
        return iter(
            DataLoader(
                PatchDataset(
                    splits["train"],
                    dataset.training_sample,
                    augment,
                    cfg.seed,
                    cfg.crops_per_case,
                    stream=stream,
                    kept=kept,
                ),
                batch_size=cfg.cases_per_batch // size,
                num_workers=cfg.workers,
                collate_fn=collate,
                pin_memory=device.type == "cuda",
                worker_init_fn=leave_signals_to_parent,
                # or a loader would draw from the state that a resumed run has just restored
                generator=torch.Generator(),
                sampler=DrawSampler(
                    len(splits["train"]),
                    cfg.seed,
                    first * cfg.cases_per_batch,
                    last * cfg.cases_per_batch,
                    stream,
                    cfg.cases_per_batch,
                    rank,
                    size,
                ),
            )
        )

    def see_clean_images() -> None:
        """Training patches, the same at each validation, for the statistics of batch norm."""
        for batch in batches(0, cfg.bn_batches, CLEAN):
            with autocast(device, cfg.amp):
                student(batch["image"].to(device, memory_format=memory))

    if teacher is not None and not start:
        log.scalars(
            0, "teacher", teacher_scores or evaluate(teacher, dataset, splits["val"], cfg, world)[0]
        )
    training_batches = batches(start, cfg.max_steps, TRAINING)
    steps = range(start, cfg.max_steps)
    bar = tqdm(
        steps,
        initial=start,
        total=cfg.max_steps,
        desc=f"{cfg.method} {networks}",
        unit="step",
        disable=not world.main,
    )
    for step in bar:  # one step = one optimiser update
        batch = next(training_batches)
        # (B, C, H, W, D)
        image = batch["image"].to(device, non_blocking=True, memory_format=memory)
        label = batch["label"].to(device, non_blocking=True)  # (B, 1 or K, H, W, D)
        lr = poly_lr(step, cfg.lr, cfg.max_steps, cfg.min_lr)
        set_lr(optimizer, lr)
        if own:
            optimizer.param_groups[1]["lr"] = poly_lr(
                step, cfg.method_lr, cfg.max_steps, cfg.min_lr
            )
        watch.before()
        with autocast(device, cfg.amp):
            student_out = student(image, return_features=True)
            terms = {"seg": seg_loss(student_out.logits, label)}
            if kd is not None:
                with torch.no_grad():
                    teacher_out = teacher(image, return_features=True)
                distilled = kd(student_out, teacher_out, label, progress=step / cfg.max_steps)
                if step < cfg.distill_warmup:
                    distilled = {
                        name: step / cfg.distill_warmup * value for name, value in distilled.items()
                    }
                terms |= distilled
            loss = sum(terms.values())
        done = step + 1
        last = done == cfg.max_steps
        validates = last or (done >= cfg.val_start and done % cfg.val_interval == 0)
        stopping = world.any(bool(stop))
        saves = validates or done % cfg.save_interval == 0 or stopping
        logs = last or done % cfg.log_interval == 0
        diagnosis.measure(step, terms, scaler)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        world.average_gradients(trained)
        # else the step is left out
        if watch.passes(step, terms, batch, batch["case"], wait=logs or saves):
            if cfg.grad_clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            totals = {name: totals.get(name, 0.0) + value.detach() for name, value in terms.items()}
            counted += 1

        if logs:
            means = world.means({name: value.item() / counted for name, value in totals.items()})
            # of no step but such that were left out
            total = sum(means.values()) if means else math.nan
            log.scalars(step, "train", {"loss": total, **means, "lr": lr, **watch.report()})
            bar.set_postfix(
                loss=f"{total:.3f}", best=f"{best['dice']:.3f}" if best["step"] >= 0 else "-"
            )
            totals, counted = {}, 0
        if saves:  # at each validation, too
            world.average_statistics(student)
            with statistics_estimated(student, see_clean_images, world.average):
                weights = {name: value.clone() for name, value in student.state_dict().items()}
                if validates:
                    scores, picture = evaluate(student, dataset, splits[cfg.select_on], cfg, world)
            if validates:
                log.scalars(step, "val", scores)
                log.image(step, "val/image, label, prediction", picture)
                if scores["dice"] > best["dice"]:
                    best = {"dice": scores["dice"], "step": done}
                    chosen = {**described, "weights": weights, "step": done, "val": scores}
                    if world.main:
                        atomic_save(chosen, folder / "best.pt")
            save(done, weights)
            stopping = stopping or world.any(bool(stop))  # validation takes a while
        if stopping and not last:
            bar.close()
            log.close()
            world.leave()
            command = shlex.join(
                [*world.launcher, *[a for a in sys.argv if a != "--resume"], "--resume"]
            )
            if world.main:
                print(f"\nstopped after step {done}; go on with: {command}", file=sys.stderr)
            return stop.exit_code
    log.close()
    if world.main:
        if start >= cfg.max_steps:
            print(f"nothing to do: {folder} has all {cfg.max_steps} steps")
        for finding in findings(read_log(folder / "log.jsonl")):
            print(f"warning: {finding}", file=sys.stderr)
        print(
            f"best validation Dice {best['dice']:.4f} at step {best['step']}; results in {folder}"
        )
    world.leave()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, DataError))
