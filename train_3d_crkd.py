"""Train a 3D segmentation network with few labels: CRKD, or another semi-supervised method, or the
labels alone.

Methods live in methods/, one file each. A step: a batch of labelled patches and, unless the method
is supervised, a batch of unlabelled ones in a weak and strong views of the same geometry; the
method makes the loss of them.

    python train_3d_crkd.py --config configs/la.yaml --labelled 4  # CRKD, 4 labelled scans
    python train_3d_crkd.py --config configs/la.yaml --labelled 4 --method supervised
    python train_3d_crkd.py --config configs/la.yaml --label_num 8 --seed 1 --resume

Results go to runs/<dataset>/<method>/<network>-<labelled>/seed<k>/; `python test_3d.py --ckpt
.../best.pt` scores them.
"""

import argparse
import dataclasses
import inspect
import math
import shlex
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataloaders import SEMI_DATASETS, DataError, Report, SemiDataset, build_semi_dataset
from dataloaders.samplers import DrawSampler, PatchDataset, collate
from inference import AMP_MODES, autocast, predict_labels
from methods import PRESETS, SSL_METHODS, Method, build_method
from metrics import class_dice, mean_dice
from networks import NETWORKS, build_network, check_network
from utils import figures, plugins
from utils.checkpoint import (
    PREVIOUS,
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
    labelled_name,
    leave_signals_to_parent,
    no_selection,
    open_run,
    parse_labelled,
    resolve_device,
    run_folder,
    run_script,
)
from utils.runlog import Averages, RunLog, SilentLog, read_log
from utils.schedules import OPTIMIZERS, SCHEDULES, build_optimizer, set_lr
from utils.trackers import LOGGERS, open_tracker, require_logger

LABELLED, UNLABELLED, MIX, CLEAN = 0, 1, 2, 3  # streams of random numbers
# Keys that only some data formats have a use for
FORMAT_KEYS = ("last_start", "patient_pattern", "absent_classes")
# Where a class of the user's own, FILE.py:ClassName, can stand in place of a name
PLUGGABLE = {
    "network": plugins.network(NETWORKS),
    "method": plugins.semi_supervised(SSL_METHODS, Method),
    "format": plugins.data_format(SEMI_DATASETS, SemiDataset),
}


@dataclasses.dataclass(frozen=True)
class Config:
    # Data. How each key is used: dataloaders/la.py
    dataset: str  # name of the data set: names the run folder
    format: str  # class in dataloaders.SEMI_DATASETS
    data_root: str
    class_names: tuple[str, ...]  # by label id, background first
    patch_size: tuple[int, int, int]  # voxels of a training crop, and of a window
    max_steps: int  # optimiser updates
    split_dir: str = ""  # folder with train.txt, val.txt, test.txt
    labelled: int | float | None = None  # scans that count as labelled, or their share; null: all
    # group 1 is the patient in a name; "": the usual conventions (dataloaders/cases.py)
    patient_pattern: str = ""
    absent_classes: tuple[str, ...] = ()  # classes that the labelled list may lack
    memory_gb: float = 2.0  # of training scans kept in memory
    # crops may start at the last admissible voxel; the released code never draws it
    last_start: bool = True
    labelled_batch: int = 2  # patches in a step
    unlabelled_batch: int = 2
    workers: int = 4  # loader processes for each of the two streams; 0 loads in the main one
    # Network and method
    network: str = "vnet"
    method: str = "crkd"  # methods.SSL_METHODS
    preset: str = "clean"  # clean | as_released: the reference code's arithmetic
    network_args: dict = dataclasses.field(default_factory=dict)  # {network: {argument: value}}
    method_args: dict = dataclasses.field(default_factory=dict)  # {method: {argument: value}}
    # {method: {key: value}}: settings of that method alone
    recipe: dict = dataclasses.field(default_factory=dict)
    # Optimisation
    optimizer: str = "sgd"  # sgd | adamw
    lr: float = 0.01
    min_lr: float = 0.0
    schedule: str = "poly"  # poly | constant | step
    # length that the schedule is made for, if not max_steps; of 'step': between two falls
    schedule_steps: int = 0
    momentum: float = 0.9  # of sgd
    nesterov: bool = False
    weight_decay: float = 1e-4
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    amp: str = "off"  # off | bf16 | fp16
    # steps that may be left out where a loss or gradient is not finite; 0: stop
    skip_nonfinite: int = 0
    # deterministic algorithms; utils/numerics.py says what they cannot guarantee
    deterministic: bool = False
    compile: bool = False  # torch.compile of the network
    # memory order of weights and activations: 15 to 30 % off a step, on the CPU too
    channels_last: bool = True
    # Validation, output
    val_interval: int = 500  # steps
    # clean batches from which batch norms get the statistics they are tested with; 0: the running
    bn_batches: int = 20
    stride: tuple[int, int, int] = (18, 18, 4)  # voxels between windows when a scan is tested
    # the same in validation, which need not be as fine
    val_stride: tuple[int, int, int] = (56, 56, 40)
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
        "--config", required=True, help="YAML file of the data set, for example configs/la.yaml"
    )
    parser.add_argument("--method", help=", ".join(SSL_METHODS))
    parser.add_argument(
        "--labelled",
        "--label_num",
        "--labeled_num",
        "--labeled-num",
        "--label_rat",
        type=parse_labelled,
        help="scans that count as labelled (4), or their share (0.05, 5%%)",
    )
    parser.add_argument("--network", help="the network to train")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--amp", help=", ".join(AMP_MODES))
    parser.add_argument(
        "--deterministic", action="store_true", default=None, help="deterministic algorithms"
    )
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the network (torch.compile)"
    )
    parser.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="channels-last memory order (the default)",
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
        "method",
        "labelled",
        "network",
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
        check_recipes(Config, cfg.recipe, SSL_METHODS, fixed=("method",))
        if cfg.method in cfg.recipe:
            given = gather(args.config, args.opts, flags, cfg.recipe[cfg.method])
            args.plugins = plugins.plug_in(given, PLUGGABLE)
            cfg = build(Config, given)
    if cfg.method == "supervised":
        note_unused(given, ("preset", "method_args", "unlabelled_batch"), "--method supervised")
    with located(given, args.config):
        cfg = dataclasses.replace(
            cfg,
            recipe={},
            network_args=check_nested(
                "network_args", cfg.network_args, NETWORKS, PLUGGABLE["network"].takes
            ),
            method_args=check_nested(
                "method_args", cfg.method_args, SSL_METHODS, PLUGGABLE["method"].takes
            ),
        )
        validate(cfg)
    # Only what concerns this run is stored: an edit elsewhere in the file must not keep it from
    # resuming.
    cfg = dataclasses.replace(
        cfg,
        network_args={k: v for k, v in cfg.network_args.items() if k == cfg.network},
        method_args={k: v for k, v in cfg.method_args.items() if k == cfg.method},
    )
    return args, cfg


def validate(cfg: Config) -> None:
    """Raise ConfigError for values that could only fail later."""
    check_choices(
        cfg,
        {
            "format": [name for name, cls in SEMI_DATASETS.items() if cls.dims == 3],
            "network": [name for name, cls in NETWORKS.items() if getattr(cls, "dims", 3) == 3],
            "method": SSL_METHODS,
            "preset": PRESETS,
            "amp": AMP_MODES,
            "schedule": SCHEDULES,
            "optimizer": OPTIMIZERS,
            "logger": LOGGERS,
            "select_on": SELECTIONS,
        },
    )
    check_intervals(
        cfg,
        {
            "[1, inf)": (
                "max_steps",
                "labelled_batch",
                "unlabelled_batch",
                "window_batch",
                "val_interval",
                "log_interval",
                "save_interval",
                "patch_size",
                "stride",
                "val_stride",
            ),
            "[0, inf)": (
                "workers",
                "seed",
                "memory_gb",
                "momentum",
                "weight_decay",
                "schedule_steps",
                "grad_clip",
                "min_lr",
                "diagnose_interval",
                "skip_nonfinite",
                "bn_batches",
            ),
            "(0, inf)": ("lr",),
        },
    )
    if cfg.labelled is not None and (
        cfg.labelled <= 0 or (cfg.labelled > 1 and cfg.labelled != int(cfg.labelled))
    ):
        raise ConfigError(
            f"labelled: a whole number, or a share above 0 and up to 1; got {cfg.labelled}"
        )
    check_run_names(cfg)
    if cfg.optimizer != "sgd":
        check_unused(cfg, ("momentum", "nesterov"), f"optimizer '{cfg.optimizer}'")
    if cfg.schedule == "constant":
        check_unused(cfg, ("schedule_steps", "min_lr"), "schedule 'constant'")
    if cfg.nesterov and not cfg.momentum:
        raise ConfigError("nesterov: needs a momentum above 0")
    if 3 not in SSL_METHODS[cfg.method].dimensions:
        raise ConfigError(
            f"method: {cfg.method} is a method for {SSL_METHODS[cfg.method].dimensions[0]}D "
            "networks"
        )
    for key in ("stride", "val_stride"):
        if any(step > side for step, side in zip(getattr(cfg, key), cfg.patch_size)):
            raise ConfigError(
                f"{key}: {list(getattr(cfg, key))} leaves gaps between windows of "
                f"{list(cfg.patch_size)}"
            )
    stride = NETWORKS[cfg.network].stride
    if any(side % stride for side in cfg.patch_size):
        raise ConfigError(
            f"patch_size: {list(cfg.patch_size)} must be multiples of {stride} for {cfg.network}"
        )
    dataset_arguments(cfg)
    require_logger(cfg.logger)
    try_out(cfg)


def try_out(cfg: Config) -> None:
    """Build the network and the method once without memory, so that what does not fit shows before
    the data.
    """
    channels, classes = SEMI_DATASETS[cfg.format].in_channels, len(cfg.class_names)
    arguments = cfg.network_args.get(cfg.network, {})
    with trying(f"network_args: {cfg.network}"):
        how = plugins.trial(NETWORKS[cfg.network], cfg.patch_size, cfg.labelled_batch)
        check_network(cfg.network, channels, classes, **how, **arguments)
    with trying(f"method_args: {cfg.method}"), weightless():
        build_method(
            cfg.method,
            lambda: build_network(cfg.network, channels, classes, **arguments),
            max_steps=cfg.max_steps,
            preset=cfg.preset,
            **cfg.method_args.get(cfg.method, {}),
        )


def dataset_arguments(cfg: Config) -> dict:
    """What the data set's class takes from the configuration; a departed-from default that it
    ignores is an error.
    """
    accepted = set(inspect.signature(SEMI_DATASETS[cfg.format].__init__).parameters)
    check_unused(
        cfg, [key for key in FORMAT_KEYS if key not in accepted], f"the data format '{cfg.format}'"
    )
    values = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name in accepted
    }
    return {"root": cfg.data_root, "format": cfg.format} | values


def evaluate(
    network: torch.nn.Module, dataset, cases: list, cfg: Config, world: World
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean Dice over `cases` and of each class, and a picture of the first case: image, label,
    prediction.
    """
    device = next(network.parameters()).device
    scores, picture = [], None
    for case in tqdm(
        world.part(cases), desc="validating", unit="case", leave=False, disable=not world.main
    ):
        volume = dataset.read_volume(case)
        prediction = (
            predict_labels(
                network,
                torch.from_numpy(volume["image"]).to(device),
                patch_size=cfg.patch_size,
                stride=cfg.val_stride,
                window_batch=cfg.window_batch,
                amp=cfg.amp,
                probabilities=True,
            )
            .cpu()
            .numpy()
        )
        label = volume["label"][0]
        scores.append(class_dice(prediction, label, dataset.num_classes))
        if picture is None:
            shown = [
                (volume["image"], None),
                (volume["image"], label),
                (volume["image"], prediction),
            ]
            picture = figures.views(shown, dataset.num_classes)
    return mean_dice(world.merged(scores), dataset.class_names[1:]), picture


def main() -> int:
    args, cfg = parse_args()
    networks = f"{cfg.network}-{labelled_name(cfg.labelled)}"
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

    # Data: disjoint lists, everything that is trained on read and checked before the first step
    with constructing(args.config):
        dataset = build_semi_dataset(**dataset_arguments(cfg), allow_outside=args.allow_outside)
    report = Report()
    splits = dataset.splits(cfg.labelled, report)
    report.stop()
    if not splits[cfg.select_on]:
        raise ConfigError(no_selection(cfg.select_on, cfg.split_dir))

    # Network, method, optimiser
    seed_everything(cfg.seed)
    arguments = cfg.network_args.get(cfg.network, {})
    memory = torch.channels_last_3d if cfg.channels_last else torch.contiguous_format
    with constructing(f"{args.config}: network_args or method_args"):
        method = build_method(
            cfg.method,
            lambda: build_network(
                cfg.network, dataset.in_channels, dataset.num_classes, **arguments
            ),
            max_steps=cfg.max_steps,
            preset=cfg.preset,
            **cfg.method_args.get(cfg.method, {}),
        )
    method = world.synchronised(method.to(device, memory_format=memory), device)
    if cfg.compile:
        method.network.compile()
    if world.rank:
        seed_everything(cfg.seed + 10**6 * world.rank)  # dropout and boxes differ between processes
    if method.uses_unlabelled and not splits["unlabelled"]:
        raise ConfigError(
            f"labelled: {cfg.labelled} leaves no unlabelled {dataset.unit} for {cfg.method}; label "
            "fewer"
        )
    used = [split for split in splits if split != "unlabelled" or method.uses_unlabelled]
    # test cases too: none may be trained on
    dataset.prepare({split: splits[split] for split in used}, report)
    report.stop()
    with world.main_first():
        if world.main:
            print(
                *report.spoken_warnings(),
                sep="\n",
                end="\n" * bool(report.warnings),
                file=sys.stderr,
            )
            open_run(folder, cfg, resume)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        cfg.optimizer, trained, cfg.lr, cfg.momentum, cfg.weight_decay, cfg.nesterov
    )
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    watch = StepWatch(folder, {"method": method}, scaler, world, cfg.skip_nonfinite)

    # Resume
    start, best, averages = 0, {"dice": -1.0, "step": -1}, Averages()
    if resume:
        state, warning = load_last(folder)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        plugins.check_same(state.get("plugins", {}), args.plugins, str(folder))
        load_network_weights(method, state["method"], str(folder))
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], world.rank)
        watch.load_state_dict(state.get("watch", {}))
        start, best = state["step"], state["best"]
        averages.load_state_dict(state["averages"])
    tracker = (
        open_tracker(cfg.logger, folder, dataclasses.asdict(cfg), start > 0) if world.main else None
    )
    log = RunLog(folder, start, tracker) if world.main else SilentLog()
    diagnosis = Diagnosis(
        cfg.diagnose_interval, method.network.parameters(), world, log, cfg.compile
    )
    stop = StopSignal()
    described = {
        "kind": "3d-semi",
        "network": {
            "name": cfg.network,
            "in_channels": dataset.in_channels,
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
                    "method": method.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "rng": random_states,
                    "step": step,
                    "best": best,
                    "averages": averages.state_dict(),
                    "watch": watch.state_dict(),
                },
                folder,
            )

    def batches(
        split: str,
        size: int,
        augment,
        keys: tuple[str, ...],
        stream: int,
        first=start,
        last=cfg.max_steps,
    ):
        return iter(
            DataLoader(
                PatchDataset(
                    splits[split], dataset.read, augment, cfg.seed, keys=keys, stream=stream
                ),
                batch_size=world.share(size, f"{split}_batch"),
                num_workers=cfg.workers,
                collate_fn=collate,
                pin_memory=device.type == "cuda",
                worker_init_fn=leave_signals_to_parent,
                sampler=DrawSampler(
                    len(splits[split]),
                    cfg.seed,
                    first * size,
                    last * size,
                    stream,
                    size,
                    world.rank,
                    world.size,
                ),
                # or a loader would draw from the state that a resumed run has just restored
                generator=torch.Generator(),
            )
        )

    labelled_batches = batches(
        "labelled", cfg.labelled_batch, dataset.labelled_patch, ("image", "label"), LABELLED
    )
    if method.uses_unlabelled:
        keys = ("weak", *(f"strong{k}" for k in range(method.strong_views)), "label")
        views = dataset.view_function(method.strong_views)
        unlabelled_batches = batches("unlabelled", cfg.unlabelled_batch, views, keys, UNLABELLED)
        mix_batches = (
            batches("unlabelled", cfg.unlabelled_batch, views, keys, MIX) if method.mixes else None
        )

    def see_clean_images() -> None:
        """Labelled and weak unlabelled images, the same at each validation, for the statistics of
        batch norm.
        """
        parts = [
            batches(
                "labelled",
                cfg.labelled_batch,
                dataset.labelled_patch,
                ("image",),
                CLEAN,
                0,
                cfg.bn_batches,
            )
        ]
        if method.uses_unlabelled:
            views = dataset.view_function(0)
            parts.append(
                batches(
                    "unlabelled", cfg.unlabelled_batch, views, ("weak",), CLEAN, 0, cfg.bn_batches
                )
            )
        for found in zip(*parts):
            images = torch.cat([batch[key] for batch, key in zip(found, ("image", "weak"))]).to(
                device
            )
            with autocast(device, cfg.amp):
                method.evaluated(images)

    steps = range(start, cfg.max_steps)
    bar = tqdm(
        steps,
        initial=start,
        total=cfg.max_steps,
        desc=f"{cfg.method} {networks}",
        unit="step",
        disable=not world.main,
    )
    for step in bar:  # one step = one batch, and one optimiser update for nearly all methods
        labelled, unlabelled = next(labelled_batches), None
        cases = labelled.pop("case")
        labelled = {key: value.to(device, non_blocking=True) for key, value in labelled.items()}
        if method.uses_unlabelled:
            unlabelled = next(unlabelled_batches)
            cases = cases + unlabelled.pop("case")
            if method.mixes:
                unlabelled |= {
                    f"mix_{key}": value for key, value in next(mix_batches).items() if key != "case"
                }
            unlabelled = {
                key: value.to(device, non_blocking=True) for key, value in unlabelled.items()
            }
        lr = SCHEDULES[cfg.schedule](step, cfg.lr, cfg.schedule_steps or cfg.max_steps, cfg.min_lr)
        set_lr(optimizer, lr)
        method.train()
        done = step + 1
        last = done == cfg.max_steps
        validates = done % cfg.val_interval == 0 or last
        stopping = world.any(bool(stop))
        saves = done % cfg.save_interval == 0 or last or stopping
        logs = done % cfg.log_interval == 0 or last
        # one, but for methods that learn from a batch several times
        for _ in range(method.updates):
            watch.before()
            with autocast(device, cfg.amp):
                # the whole method: methods/<name>.py
                terms = method.loss(labelled, unlabelled, step)
                loss = sum(terms.values())
            diagnosis.measure(step, terms, scaler)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            world.average_gradients(trained)
            settles = logs or saves or validates
            updated = watch.passes(
                step, terms, {"labelled": labelled, "unlabelled": unlabelled}, cases, settles
            )
            if updated:  # else the step is left out
                if cfg.grad_clip:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
                scaler.step(optimizer)
                scaler.update()
        if updated:
            method.after_step(step)
            averages.add(terms | method.monitor)

        if logs:
            means = world.means(averages.take())
            # NaN if all steps were left out
            total = sum(means.get(name, math.nan) for name in terms)
            log.scalars(step, "train", {"loss": total, **means, "lr": lr, **watch.report()})
            bar.set_postfix(
                loss=f"{total:.3f}", best=f"{best['dice']:.3f}" if best["step"] >= 0 else "-"
            )
        if saves or validates:
            world.average_statistics(method)
            with statistics_estimated(method.evaluated, see_clean_images, world.average):
                weights = {
                    name: value.clone() for name, value in method.evaluated.state_dict().items()
                }
                if validates:
                    scores, picture = evaluate(
                        method.evaluated, dataset, splits[cfg.select_on], cfg, world
                    )
        if validates:
            log.scalars(step, "val", scores)
            log.image(step, "val/image, label, prediction", picture)
            if method.pictures:
                pairs = [figures.as_arrays(*pair) for pair in method.pictures.values()]
                log.image(
                    step,
                    f"train/{' | '.join(method.pictures)}",
                    figures.views(pairs, dataset.num_classes),
                )
            if scores["dice"] > best["dice"]:
                best = {"dice": scores["dice"], "step": done}
                chosen = {**described, "weights": weights, "step": done, "val": scores}
                if world.main:
                    atomic_save(chosen, folder / "best.pt")
        if saves:
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
