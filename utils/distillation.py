"""What the distillation script needs beside its loop: keys of networks and method, a trial of the
settings, the teacher.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from torch import nn

from dataloaders import DATASETS, Case, Dataset
from dataloaders.samplers import PatchDataset, draws
from dataloaders.settings import DataSettings
from losses import KD_METHODS, PRESETS, build_kd
from networks import NETWORKS, build_network, check_network
from utils import plugins
from utils.checkpoint import CheckpointError, load_checkpoint, load_network_weights
from utils.config import OF_FORMAT, ConfigError, Natural, NotNegative, enough_voxels, marks, trying
from utils.distributed import smallest_share
from utils.modes import weightless
from utils.registry import AnyOf, OfDims
from utils.run import Run, defaults, named, plain, run_folder
from utils.schedules import SCHEDULES

TRAINING, CLEAN = 0, 1  # streams of random numbers
# Keys of the data that do not change a validated case: where it is kept, and what patches are
NOT_SCORED = {
    *("cache_dir", "memory_gb", "unlabelled", "crop", "last_start", "augmentation"),
    *("flip_prob", "rot90_prob", "scale_prob", "shift_prob"),
}
# Keys that say what a network gets of a scan
PREPROCESSING = {
    *("orientation", "spacing", "intensity", "window", "crop_foreground", "normalize", "regions")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(DataSettings):
    """Keys of student, teacher and method."""

    student: Annotated[str, OfDims(NETWORKS, 3)] = "unet"
    teacher: Annotated[str, OfDims(NETWORKS, 3)] = "resunet"
    method: Annotated[str, AnyOf(("supervised",), KD_METHODS)] = "acf_bckd"
    preset: Annotated[str, PRESETS] = "clean"  # as_released: the reference code's arithmetic
    teacher_checkpoint: str = ""  # "": best.pt of the supervised run of `teacher`
    teacher_seed: Natural = 0
    # steps, a whole number, or below 1 the share of max_steps, in which the method's terms grow
    # from nothing to their weights; 0: none
    distill_warmup: Annotated[int | float, "[0, inf)"] = 0
    method_lr: NotNegative = 0.0  # of the method's own parameters (attention, projections); 0: lr
    schedule: Annotated[str, SCHEDULES] = "poly_closed"  # its last step runs at exactly min_lr
    weight_decay: NotNegative = 5e-4
    channels_last: bool = False

    pluggable = {  # noqa: RUF012 - of the class, not of a configuration
        "student": plugins.network(NETWORKS),
        "teacher": plugins.network(NETWORKS),
        "method": plugins.distillation(KD_METHODS),
        "format": plugins.data_format(DATASETS, Dataset),
    }
    recipes = NETWORKS
    method_pairs = NETWORKS
    not_in_recipes = ("method", "student", "teacher")
    set_aside: ClassVar = (
        *("labelled", "labelled_batch", "unlabelled_batch", "unlabelled", "network"),
        *("stride", "val_stride", "eval_batch"),
    )

    @property
    def supervised(self) -> bool:
        return self.method == "supervised"

    @property
    def warmup_steps(self) -> float:
        """Steps of `distill_warmup`."""
        return self.distill_warmup * (self.max_steps if self.distill_warmup < 1 else 1)

    @property
    def networks(self) -> str:
        """How the networks show in the name of the run folder."""
        return self.student if self.supervised else f"{self.teacher}-{self.student}"

    @property
    def recipe_name(self) -> str:
        return self.student if self.supervised else ""

    @property
    def idle_keys(self) -> tuple[str, ...]:
        of_teacher = ("teacher", "teacher_checkpoint", "teacher_seed")
        of_method = ("preset", "method_args", "distill_warmup", "method_lr")
        return (*of_teacher, *of_method) if self.supervised else ()

    @property
    def trained_network(self) -> str:
        return self.student

    @property
    def method_keys(self) -> tuple[str, ...]:
        of_teacher = f"{self.method}@{self.teacher}"
        return self.method, of_teacher, f"{of_teacher}-{self.student}"

    def make_method(
        self,
        student_channels: dict,
        teacher_channels: dict,
        num_classes: int,
        multilabel: bool,
        incomplete: bool = False,
    ) -> nn.Module:
        """The distillation loss; TypeError or ValueError for what it does not take."""
        return build_kd(
            self.method,
            student_channels,
            teacher_channels,
            num_classes,
            multilabel=multilabel,
            preset=self.preset,
            incomplete=incomplete,
            **self.method_arguments,
        )

    def _check(self) -> None:
        super()._check()
        warmup = self.distill_warmup
        if isinstance(warmup, float) and warmup >= 1:
            raise ConfigError(
                "distill_warmup: a whole number of steps, or a share of max_steps below 1; got "
                f"{warmup}; the whole training is {self.max_steps}"
            )
        self._check_patch(self.student, self.teacher)

    def _try_out(self) -> None:
        classes, channels = len(self.class_names), {}
        batch = smallest_share(self.cases_per_batch * self.crops_per_case, self.device)
        for role in ("student",) if self.supervised else ("student", "teacher"):
            name = getattr(self, role)
            keys = "cases_per_batch, crops_per_case"
            with trying(f"network_args: {name}"), enough_voxels(name, self.patch_size, batch, keys):
                how = plugins.trial(NETWORKS[name], self.patch_size, batch)
                arguments = self.network_arguments(name)
                channels[role] = check_network(name, self.channels, classes, *how, **arguments)
        if not self.supervised:
            multilabel = self.pluggable["format"].registry[self.format].multilabel
            with trying(f"method_args: {self.method}"), weightless():
                both = channels["student"], channels["teacher"]
                self.make_method(*both, classes, multilabel or bool(self.regions))


class Batches:
    """Batches of a training, in this process's share: `image` (B, C, H, W, D), `label` (B, 1 or K,
    H, W, D), `annotated` (B, K) if labels are not complete, and `case`, the names. What a step gets
    depends on the seed and the step alone.

    A process loads its part of the cases of each batch or, where that does not come out even, of
    each case's crops.
    """

    def __init__(self, cfg: Distillation, run: Run, dataset: Dataset, splits: Mapping) -> None:
        self.cfg, self.run, self.dataset = cfg, run, dataset
        self.cases = splits["labelled"]

    def training(self) -> Iterator[dict]:
        """Of each step that is left."""
        return self._of(TRAINING, self.run.start, self.cfg.max_steps)

    def clean(self) -> Iterator[dict]:
        """`bn_batches` batches, the same at each call."""
        return self._of(CLEAN, 0, self.cfg.bn_batches)

    def _of(self, stream: int, first: int, last: int) -> Iterator[dict]:
        cfg, world = self.cfg, self.run.world
        rank, size, kept = world.rank, world.size, slice(None)
        if cfg.cases_per_batch % world.size:
            crops = world.share(cfg.crops_per_case, "crops_per_case")
            rank, size, kept = 0, 1, slice(rank * crops, (rank + 1) * crops)
        patches = PatchDataset(
            self.cases,
            self.dataset.sample,
            self.dataset.patch,
            cfg.seed,
            cfg.crops_per_case,
            stream=stream,
            kept=kept,
            annotated=self.dataset.annotated if self.dataset.incomplete else None,
        )
        batch, workers = cfg.cases_per_batch, cfg.workers
        return draws(patches, first, last, batch, workers, self.run.device, rank, size)


def teacher_path(cfg: Distillation) -> Path:
    """Where the teacher's weights are: as named, or best.pt of the supervised run of the same tag
    or, where there is none, of the one without a tag. So a student of a fold that goes by a tag has
    the teacher of that fold.
    """
    if cfg.teacher_checkpoint:
        return Path(cfg.teacher_checkpoint)
    paths = [
        run_folder(
            cfg.runs_dir, cfg.dataset, "supervised", cfg.teacher, cfg.teacher_seed, "clean", tag
        )
        / "best.pt"
        for tag in (cfg.tag, "")
    ]
    return next((path for path in paths if path.is_file()), paths[-1])


def load_teacher(
    cfg: Distillation, args: Any, dataset: Dataset, splits: Mapping[str, Sequence[Case]]
) -> tuple[nn.Module | None, dict[str, float] | None]:
    """The frozen teacher, in evaluation mode, and its scores on the cases of `select_on`, if it was
    validated on just those, in the same way, else None. Of a supervised run: None, None.

    CheckpointError if it is missing, was trained for other classes or on scans that were
    preprocessed in another way, or has seen validation or test cases in training.
    """
    if cfg.supervised:
        return None, None
    path, num_classes = teacher_path(cfg), dataset.num_classes
    own = args.plugins.get(cfg.teacher)
    name = f"{own['file']}:{cfg.teacher}" if own else cfg.teacher
    training = (
        f"  python train_3d_distill.py --config {args.config} --method supervised --student "
        f"{name} --seed {cfg.teacher_seed}"
    )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no teacher weights; train the teacher first:\n{training}\n"
            f"or name a checkpoint with --opts teacher_checkpoint=FILE"
        )
    checkpoint = load_checkpoint(path)
    network = checkpoint["network"]
    expected = {"name": cfg.teacher, "in_channels": cfg.channels, "num_classes": num_classes}
    wrong = [f"{k} {network[k]} instead of {v}" for k, v in expected.items() if network[k] != v]
    if checkpoint.get("class_names") and list(checkpoint["class_names"]) != list(cfg.class_names):
        wrong.append(
            f"classes {list(checkpoint['class_names'])} instead of {list(cfg.class_names)}"
        )
    if wrong:
        raise CheckpointError(
            f"{path}: this teacher does not fit ({'; '.join(wrong)}); train one on this data set"
        )
    differ = _other_preprocessing(checkpoint, cfg)
    if differ:
        raise CheckpointError(
            f"{path}: this teacher learnt from scans that were preprocessed in another way "
            f"({'; '.join(differ)}), and both networks get the same patches; train a teacher with "
            "these settings or distil with its own"
        )
    seen = _seen_in_training(checkpoint, dataset, splits)
    if seen:
        raise CheckpointError(
            f"{path}: this teacher was trained on cases that this student is validated or tested "
            f"on: {'; '.join(seen)}. Name one that was trained on these lists with --opts "
            "teacher_checkpoint=FILE, or train it, under a tag that the student has too:\n"
            f"{training} --opts tag=NAME split_dir=FOLDER"
        )
    plugins.check_same(checkpoint.get("plugins", {}), args.plugins, str(path), [cfg.teacher])
    teacher = build_network(
        network["name"], network["in_channels"], network["num_classes"], **network["arguments"]
    )
    load_network_weights(teacher, checkpoint["weights"], str(path))
    alike = _validated_alike(checkpoint, cfg, splits[cfg.select_on])
    scores = checkpoint.get("val") if alike else None
    return teacher.eval().requires_grad_(False), scores


def _other_preprocessing(checkpoint: Mapping[str, Any], cfg: Distillation) -> list[str]:
    """Keys of what makes a network's input of a scan that a teacher's run had otherwise, with both
    values.
    """
    if not checkpoint.get("config"):
        return []
    # keys that did not exist when it was trained had what is their default now
    before = defaults(type(cfg)) | checkpoint["config"]
    formats = cfg.pluggable["format"].registry
    keys = PREPROCESSING & formats[cfg.format].accepted()
    other = before["format"]
    if other != cfg.format:
        others = PREPROCESSING & formats[other].accepted() if other in formats else None
        if others != keys:
            return [f"format: {other} in the teacher's run, {cfg.format} here"]
    return [
        f"{key}: {plain(before[key])} in the teacher's run, {plain(getattr(cfg, key))} here"
        for key in sorted(keys)
        if plain(before[key]) != plain(getattr(cfg, key))
    ]


def _seen_in_training(
    checkpoint: Mapping[str, Any], dataset: Dataset, splits: Mapping[str, Sequence[Case]]
) -> list[str]:
    """The cases of `val` and `test` that a teacher was trained on, in words, or that are scans of a
    patient whom it was trained on.
    """
    lists = checkpoint.get("cases", {})
    alone = checkpoint.get("config", {}).get("method") == "supervised"
    trained = [*lists.get("train", ()), *lists.get("labelled", ())]
    trained += () if alone else lists.get("unlabelled", ())
    patients = {dataset.patient(name) for name in trained}
    found = []
    for split in ("val", "test"):
        seen = [c.name for c in splits[split] if dataset.patient(dataset.named(c)) in patients]
        if seen:
            found.append(f"{named(seen)} ({split})")
    return found


def _validated_alike(checkpoint: dict[str, Any], cfg: Distillation, chosen: Sequence) -> bool:
    """Whether the scores of a checkpoint are those of the cases `chosen` under these settings."""
    # keys that did not exist when it was trained had what is their default now
    before = defaults(type(cfg)) | checkpoint.get("config", {})
    keys = [key for key, mark in marks(type(cfg)) if mark is OF_FORMAT and key not in NOT_SCORED]
    same_keys = all(
        plain(before.get(key)) == plain(getattr(cfg, key))
        for key in ("dataset", "amp", "overlap", *keys)
    )
    same_patch = list(before.get("patch_size", ())) == list(cfg.patch_size)
    names = [case.name for case in chosen]
    same_list = checkpoint.get("selected_on", "val") == cfg.select_on
    same_cases = checkpoint.get("cases", {}).get(cfg.select_on) == names
    return same_keys and same_patch and same_list and same_cases


def note_idle(cfg: Distillation, run: Run, has_parameters: bool) -> None:
    """Say what of the settings does nothing. has_parameters: of the method's own, which learn."""
    if cfg.supervised:
        return
    if cfg.method_lr and not has_parameters:
        run.note(f"note: {cfg.method} has no parameters of its own: method_lr does nothing")
    if cfg.warmup_steps > cfg.max_steps:
        run.note(
            f"note: with max_steps {cfg.max_steps} the terms do not reach their weights, for which "
            f"distill_warmup takes {cfg.warmup_steps} steps"
        )
