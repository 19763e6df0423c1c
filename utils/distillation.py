"""What the distillation script needs beside its loop: keys of networks and method, a trial of the
settings, cases and batches, the teacher and its labels of unlabelled scans.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from dataloaders import DATASETS, Case, Dataset, Report
from dataloaders.samplers import PatchDataset, draws
from dataloaders.settings import DataSettings
from losses import KD_METHODS, PRESETS, build_kd, methods_in
from losses.incomplete import UNKNOWN
from methods.base import pseudo_label_report
from networks import NETWORKS, build_network, check_network, monai_bundle
from utils import nnunet, plugins
from utils.checkpoint import CheckpointError, load_checkpoint, load_network_weights
from utils.config import (
    OF_FORMAT,
    ConfigError,
    Given,
    Natural,
    NotNegative,
    Share,
    enough_voxels,
    from_flag,
    labelled_name,
    marks,
    trying,
)
from utils.distributed import smallest_share
from utils.modes import weightless
from utils.registry import AnyOf, Joined, OfDims
from utils.run import Run, defaults, named, no_selection, plain, run_folder
from utils.schedules import SCHEDULES

TRAINING, CLEAN, UNLABELLED = 0, 1, 2  # streams of random numbers
VIEWS = ("one", "flips")
COMPARED = 8  # unlabelled scans on which a validation compares the student with the teacher
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
    # monai: the network of a MONAI bundle
    teacher: Annotated[str, AnyOf(OfDims(NETWORKS, 3), ("monai",))] = "resunet"
    # several methods at once, their terms side by side: acf_bckd+dist
    method: Annotated[str, AnyOf(("supervised",), Joined(KD_METHODS))] = "acf_bckd"
    preset: Annotated[str, PRESETS] = "clean"  # as_released: the reference code's arithmetic
    # "": best.pt of the supervised run of `teacher`; of teacher nnunet also a results folder of
    # nnU-Net, of monai a bundle, which `teacher` can name as well
    teacher_checkpoint: str = ""
    teacher_folds: tuple[str, ...] = ()  # of a results folder, averaged; []: those that are there
    teacher_seed: Natural = 0
    # scans that count as labelled, or their share, of those that have a label; 0: none; null: all
    labelled: int | float | None = None
    # patches of a batch that come from unlabelled scans, with the teacher's prediction as their
    # label; null: half of the batch with `labelled` or `unlabelled`, all with labelled 0, else none
    unlabelled_batch: int | None = None
    # flips: its labels are of eight mirrored copies, of an nnU-Net those that it allows
    teacher_views: Annotated[str, VIEWS] = "one"
    pseudo_confidence: Share = 0.0  # voxels where the teacher is less sure are ignored
    # share of the unlabelled cases, those on which the folds of an nnU-Net disagree most, that is
    # left out; 0: they are listed; null: they are not even compared
    drop_disagreeing: float | None = 0.0
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
    # A file's number of labels and batches are for the few-label scripts, since its teacher has all
    # labels; but a file that has `teacher_views`, as config.yaml of a run, means this script.
    set_aside: ClassVar = (
        *("labelled", "labelled_batch", "unlabelled_batch", "network"),
        *("stride", "val_stride", "eval_batch"),
    )

    @classmethod
    def adapted(cls, given: Given) -> list[str]:
        """As Settings', with a results folder of nnU-Net, or a MONAI bundle, as the teacher put
        where checkpoints are named.
        """
        teacher, source = given.get("teacher", ("", ""))
        is_path = isinstance(teacher, str) and "/" in teacher and not teacher.endswith(".pt")
        if is_path and not plugins.is_reference(teacher):
            kind = "monai" if monai_bundle.is_bundle(teacher) else "nnunet"
            given["teacher"] = (kind, source)
            given["teacher_checkpoint"] = (teacher, source)
        shared = ("labelled", "unlabelled_batch") if "teacher_views" in given else ()
        own = {key: given.pop(key) for key in shared if key in given}
        notes = super().adapted(given)
        given |= own
        if "method" not in given or given["method"][0] != "supervised":
            return notes
        for key in ("unlabelled", "unlabelled_batch"):
            entry = given.pop(key, (None, ""))
            if entry[0] and from_flag(entry):
                raise ConfigError(
                    f"{entry[1]}: {key}: a network that is trained alone has no teacher whose "
                    "prediction could be the label of unlabelled scans; leave it out, or distil "
                    "with --method acf_bckd"
                )
        return notes

    @property
    def nnunet_folder(self) -> str:
        """The results folder of nnU-Net that the teacher comes from; "" for another teacher."""
        path = self.teacher_checkpoint
        folder = self.teacher == "nnunet" and path and not path.endswith(".pt")
        return path if folder and not self.supervised else ""

    @property
    def bundle(self) -> str:
        """The MONAI bundle that the teacher comes from; "" for another teacher."""
        return self.teacher_checkpoint if self.teacher == "monai" and not self.supervised else ""

    def teacher_arguments(self) -> dict:
        """Arguments of the teacher's network."""
        if self.nnunet_folder:
            return nnunet.read_results(self.nnunet_folder).network
        return self.network_arguments(self.teacher)

    @property
    def supervised(self) -> bool:
        return self.method == "supervised"

    @property
    def warmup_steps(self) -> float:
        """Steps of `distill_warmup`."""
        return self.distill_warmup * (self.max_steps if self.distill_warmup < 1 else 1)

    @property
    def networks(self) -> str:
        """How the networks, and the labels if these are not simply all, show in the name of the run
        folder.
        """
        name = self.student if self.supervised else f"{self.teacher}-{self.student}"
        if self.labelled is not None or self.taught:
            name += f"-{labelled_name(self.labelled)}"
        return f"{name}-unlabelled" if self.taught else name

    @property
    def batch(self) -> int:
        """Patches of a step."""
        return self.cases_per_batch * self.crops_per_case

    @property
    def taught(self) -> int:
        """Patches of a step whose label is the teacher's prediction."""
        return self.unlabelled_batch or 0

    @property
    def recipe_name(self) -> str:
        return self.student if self.supervised else ""

    @property
    def idle_keys(self) -> tuple[str, ...]:
        of_teacher = ("teacher", "teacher_checkpoint", "teacher_folds", "teacher_seed")
        of_method = ("preset", "method_args", "distill_warmup", "method_lr")
        of_method += ("teacher_views", "pseudo_confidence", "drop_disagreeing")
        return (*of_teacher, *of_method) if self.supervised else ()

    @property
    def trained_network(self) -> str:
        return self.student

    @property
    def method_keys(self) -> tuple[str, ...]:
        return tuple(key for method in self.methods for key in self._keys_of(method))

    def _keys_of(self, method: str) -> tuple[str, str, str]:
        of_teacher = f"{method}@{self.teacher}"
        return method, of_teacher, f"{of_teacher}-{self.student}"

    @property
    def methods(self) -> list[str]:
        """One, unless `method` joins several."""
        return self.method.split("+")

    @property
    def unsure(self) -> bool:
        """Whether labels of the teacher may hold UNKNOWN."""
        return bool(self.taught and self.pseudo_confidence)

    def taught_labels(
        self, teacher: nn.Module, image: Tensor, logits: Tensor, truth: Tensor, multilabel: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`teacher_labels` of patches of unlabelled scans, and how good they are where the `truth`
        is known, for the log.
        """
        how = multilabel, self.teacher_views, self.pseudo_confidence
        label = teacher_labels(teacher, image, logits, *how)
        return label, teacher_label_report(label, truth, len(self.class_names), multilabel)

    def make_method(
        self,
        student_channels: dict,
        teacher_channels: dict,
        num_classes: int,
        multilabel: bool,
        incomplete: bool = False,
    ) -> nn.Module:
        """The distillation loss; TypeError or ValueError for what it does not take."""
        arguments = {name: self.arguments_of(self._keys_of(name)) for name in self.methods}
        if self.leaves_out_attention(teacher_channels):
            arguments["acf_bckd"] = {"afd": 0.0, "cfd": 0.0} | arguments["acf_bckd"]
        if len(self.methods) == 1:
            arguments = arguments[self.method]
        how = {"multilabel": multilabel, "preset": self.preset, "incomplete": incomplete}
        taps = student_channels, teacher_channels
        try:
            return build_kd(self.method, *taps, num_classes, **how, **arguments)
        except ValueError as problem:
            others = [] if teacher_channels else _methods_of_logits(*taps, num_classes, how)
            if not others or set(self.methods) <= set(others):
                raise
            raise ValueError(
                f"{problem}; this teacher has logits alone, which do for {', '.join(others)}"
            ) from problem

    def _completed(self) -> Self:
        cfg = super()._completed()
        cfg = dataclasses.replace(cfg, method="+".join(methods_in(cfg.method)))
        asked = cfg.labelled is not None or cfg.unlabelled
        if cfg.unlabelled_batch is not None or not asked or cfg.supervised:
            return cfg
        count = cfg.batch if cfg.labelled == 0 else max(1, cfg.batch // 2)
        return dataclasses.replace(cfg, unlabelled_batch=count)

    def leaves_out_attention(self, teacher_channels: dict) -> bool:
        """Whether ACF-BCKD goes without AFD and CFD, which compare with a residual block: under an
        nnU-Net or a MONAI network that has none.
        """
        plain = (self.nnunet_folder or self.bundle) and "residual" not in teacher_channels
        return "acf_bckd" in self.methods and bool(plain)

    def _check(self) -> None:
        super()._check()
        warmup = self.distill_warmup
        if isinstance(warmup, float) and warmup >= 1:
            raise ConfigError(
                "distill_warmup: a whole number of steps, or a share of max_steps below 1; got "
                f"{warmup}; the whole training is {self.max_steps}"
            )
        self._check_patch(self.student, self.network_arguments(self.student))
        if self.teacher_folds and not self.nnunet_folder and not self.supervised:
            raise ConfigError("teacher_folds: only a results folder of nnU-Net has folds")
        if self.teacher == "monai" and not self.teacher_checkpoint and not self.supervised:
            raise ConfigError(
                "teacher: monai is the network of a MONAI bundle; name its folder in its place"
            )
        if not self.supervised and not self.bundle:
            with trying(f"teacher: {self.teacher}"):
                self._check_patch(self.teacher, self.teacher_arguments())
        self._check_labels()
        self._check_disagreeing()

    def _check_disagreeing(self) -> None:
        share = self.drop_disagreeing
        if share is not None and not 0 <= share < 1:
            raise ConfigError(f"drop_disagreeing: a share in [0, 1), or null; got {share}")
        if not share or self.supervised:
            return
        folds = ()
        if self.nnunet_folder:
            folds = nnunet.read_results(self.nnunet_folder).chosen(self.teacher_folds)
        if len(folds) < 2:
            raise ConfigError(
                "drop_disagreeing: compares the folds of an nnU-Net, and this teacher "
                f"({self.nnunet_folder or self.teacher}) has {len(folds) or 'no'} fold(s); take "
                "one with several, or leave the key out"
            )
        if not self.taught:
            raise ConfigError(
                "drop_disagreeing: there are no unlabelled scans to leave out; name some with "
                "--unlabelled FOLDER or --labelled N"
            )

    def _check_labels(self) -> None:
        labelled, taught, batch = self.labelled, self.taught, self.batch
        if labelled is not None and (labelled < 0 or (labelled > 1 and labelled != int(labelled))):
            raise ConfigError(
                f"labelled: a whole number, 0 for none, or a share of up to 1; got {labelled}"
            )
        if labelled == 0 and self.supervised:
            raise ConfigError(
                "labelled: 0 leaves a network that is trained alone nothing to learn from; name a "
                "number of labels, or distil with --method acf_bckd"
            )
        if not 0 <= taught <= batch:
            raise ConfigError(
                f"unlabelled_batch: 0 to {batch}, of the {batch} patches of a batch "
                f"(cases_per_batch x crops_per_case); got {taught}"
            )
        if self.unlabelled and not taught and not self.supervised:
            raise ConfigError(
                f"unlabelled: nothing is drawn from {self.unlabelled} with unlabelled_batch 0; "
                "leave one of the two out"
            )
        if labelled == 0 and taught < batch:
            raise ConfigError(
                f"unlabelled_batch: with labelled 0 all {batch} patches of a batch come from "
                f"unlabelled scans, not {taught}; leave it out"
            )
        if labelled != 0 and taught == batch:
            raise ConfigError(
                f"unlabelled_batch: {taught} of {batch} patches leave no labelled one "
                "(cases_per_batch x crops_per_case); take fewer or a larger batch, or train "
                "without labels with --labelled 0"
            )

    def _try_out(self) -> None:
        classes, channels = len(self.class_names), {}
        batch = smallest_share(self.batch, self.device)
        for role in ("student",) if self.supervised else ("student", "teacher"):
            name = getattr(self, role)
            if role == "teacher" and self.bundle:
                with trying("teacher"):
                    monai_bundle.read_bundle(self.bundle)
                channels[role] = {}
                continue
            keys = "cases_per_batch, crops_per_case"
            with trying(f"network_args: {name}"), enough_voxels(name, self.patch_size, batch, keys):
                how = plugins.trial(NETWORKS[name], self.patch_size, batch)
                arguments = self.network_arguments(name)
                if role == "teacher":
                    arguments = self.teacher_arguments()
                channels[role] = check_network(name, self.channels, classes, *how, **arguments)
        if not self.supervised:
            multilabel = self.pluggable["format"].registry[self.format].multilabel
            with trying(f"method_args: {self.method}"), weightless():
                both = channels["student"], channels["teacher"]
                self.make_method(*both, classes, multilabel or bool(self.regions))


def open_lists(
    cfg: Distillation, dataset: Dataset, report: Report, run: Run
) -> dict[str, list[Case]]:
    """The disjoint lists of a training: `labelled`, `unlabelled` (empty unless patches come from
    it), `val` and `test`. DataError or ConfigError for what is wrong with them.

    With labelled 0 all of the training list is unlabelled, and there need be no validation cases.
    """
    if cfg.labelled == 0:
        dataset.needs_labels = dataset.needs_val = False
    splits = dataset.splits(cfg.labelled or None, report)
    report.stop()
    if cfg.labelled == 0:
        splits["unlabelled"] = splits["labelled"] + splits["unlabelled"]
        splits["labelled"] = []
    elif not splits[cfg.select_on]:
        raise ConfigError(no_selection(cfg.select_on, cfg.split_dir or cfg.data_root))
    found = len(splits["unlabelled"])
    if cfg.taught and not found:
        raise ConfigError(
            f"unlabelled_batch: {cfg.taught} patches of a batch are to come from unlabelled scans, "
            "but there are none; label fewer with --labelled, add some with --unlabelled FOLDER, "
            "or take unlabelled_batch=0"
        )
    if not cfg.taught:
        splits["unlabelled"] = []
        if found and cfg.unlabelled_batch is None and not cfg.supervised:
            run.note(
                f"note: {found} unlabelled scans are not used; unlabelled_batch=N takes N patches "
                "of each batch from them, with the teacher's prediction as their label"
            )
    if not splits[cfg.select_on]:
        run.note(
            f"note: no {cfg.select_on} cases with labels, so nothing is validated and no best.pt "
            "is chosen; the result is last.pt"
        )
    return splits


class Batches:
    """Batches of a training, in this process's share: `image` (B, C, H, W, D), `label` (L, 1 or K,
    H, W, D) of the first L patches, `annotated` (B, K) if labels are not complete, and `case`, the
    names. What a step gets depends on the seed and the step alone.

    The other patches are of unlabelled scans, one of each. Where there are any, a batch has `truth`
    (B - L, 1 or K, H, W, D): their labels, for monitoring alone, UNKNOWN where there is none.
    A process loads its part of the cases of each batch or, where that does not come out even, of
    each case's crops.
    """

    def __init__(self, cfg: Distillation, run: Run, dataset: Dataset, splits: Mapping) -> None:
        self.cfg, self.run, self.dataset = cfg, run, dataset
        self.labelled, self.unlabelled = splits["labelled"], splits["unlabelled"]
        # The labelled patches that are left come from as many cases as share them evenly.
        labelled, cases = cfg.batch - cfg.taught, cfg.cases_per_batch
        while labelled % cases:
            cases -= 1
        self.cases, self.crops = cases, labelled // cases
        self.annotated = dataset.annotated if dataset.incomplete or cfg.unsure else None
        # unlabelled scans of this process on which student and teacher are compared
        self.compared = run.world.part(self.unlabelled[:COMPARED])

    def training(self) -> Iterator[dict]:
        """Of each step that is left."""
        return self._of(TRAINING, UNLABELLED, self.run.start, self.cfg.max_steps)

    def clean(self) -> Iterator[dict]:
        """`bn_batches` batches, the same at each call."""
        return self._of(CLEAN, CLEAN, 0, self.cfg.bn_batches)

    def _of(self, stream: int, of_unlabelled: int, first: int, last: int) -> Iterator[dict]:
        if not self.cfg.taught:
            return self._labelled(stream, first, last)
        none = itertools.repeat(None, last - first)
        labelled = self._labelled(stream, first, last) if self.crops else none
        return map(_joined, labelled, self._unlabelled(of_unlabelled, first, last))

    def _labelled(self, stream: int, first: int, last: int) -> Iterator[dict]:
        cfg, world = self.cfg, self.run.world
        rank, size, kept = world.rank, world.size, slice(None)
        if self.cases % world.size:
            name = "labelled patches of a case" if cfg.taught else "crops_per_case"
            crops = world.share(self.crops, name)
            rank, size, kept = 0, 1, slice(rank * crops, (rank + 1) * crops)
        patches = PatchDataset(
            self.labelled,
            self.dataset.sample,
            self.dataset.patch,
            cfg.seed,
            self.crops,
            stream=stream,
            kept=kept,
            annotated=self.annotated,
        )
        batch, workers = self.cases, cfg.workers
        return draws(patches, first, last, batch, workers, self.run.device, rank, size)

    def _unlabelled(self, stream: int, first: int, last: int) -> Iterator[dict]:
        cfg, world = self.cfg, self.run.world
        world.share(cfg.taught, "unlabelled_batch")
        keys = "image", "truth"
        patches = PatchDataset(
            self.unlabelled,
            self.dataset.sample,
            self._view,
            cfg.seed,
            keys=keys,
            stream=stream,
            annotated=self.annotated,
        )
        parts = world.rank, world.size
        return draws(patches, first, last, cfg.taught, cfg.workers, self.run.device, *parts)

    def _view(self, sample: dict, rng: np.random.Generator) -> dict:
        """A patch at any place, since where the foreground is would be told by the label."""
        view = self.dataset.views(sample, rng, strong_views=0)
        patch = self.dataset.jitter({"image": view["weak"]}, rng)
        return {"image": patch["image"], "truth": view["label"]}


def _joined(labelled: dict | None, unlabelled: dict) -> dict:
    """One batch of the labelled and unlabelled patches of a step."""
    truth = unlabelled["truth"]
    if "annotated" in unlabelled:
        # a truth that lacks classes is no measure, and the teacher knows them all
        truth[~unlabelled["annotated"].all(1)] = UNKNOWN
        unlabelled["annotated"].fill_(True)
    if labelled is None:
        return unlabelled | {"label": truth[:0]}
    joined = {"label": labelled["label"], "truth": truth}
    for key in ("image", "annotated"):
        if key in unlabelled:
            joined[key] = torch.cat([labelled[key], unlabelled[key]])
    return joined | {"case": labelled["case"] + unlabelled["case"]}


@torch.no_grad()
def teacher_labels(
    teacher: nn.Module,
    image: Tensor,
    logits: Tensor,
    multilabel: bool,
    views: str = "one",
    confidence: float = 0.0,
) -> Tensor:
    """The teacher's prediction on patches as their label: ids (B, 1, H, W, D) or, if `multilabel`,
    regions (B, K, H, W, D), uint8.

    image: (B, C, H, W, D). logits: (B, K, H, W, D), the teacher's of it. With p the softmax of the
    classes, or the sigmoid of each region, the label is argmax p, or p >= 0.5, and UNKNOWN where
    max p, or max(p, 1 - p), is below `confidence`. views: 'flips' takes for p its mean over the
    mirrored copies of the patches, each mirrored back: eight, or of an nnU-Net those along its
    `mirror_axes`.
    """

    def probabilities(logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if multilabel else logits.float().softmax(1)

    probs = probabilities(logits)
    if views == "flips":
        axes = [2 + axis for axis in mirror_axes(teacher)]
        mirrored = []
        for count in range(1, 1 + len(axes)):
            mirrored += itertools.combinations(axes, count)
        for dims in mirrored:
            probs += probabilities(teacher(image.flip(dims))).flip(dims)
        probs /= 1 + len(mirrored)
    if multilabel:
        label, sure = probs >= 0.5, torch.maximum(probs, 1 - probs)
    else:
        sure, label = probs.max(1, keepdim=True)
    return label.to(torch.uint8).masked_fill(sure < confidence, UNKNOWN)


def mirror_axes(teacher: nn.Module) -> tuple[int, ...]:
    """Axes of the image along which a teacher may be shown mirrored patches: all, or those that the
    checkpoint of an nnU-Net allows. One that was trained without mirrors may take left for right.
    """
    return getattr(teacher, "mirror_axes", (0, 1, 2))


def teacher_label_report(
    label: Tensor, truth: Tensor, num_classes: int, multilabel: bool
) -> dict[str, Tensor]:
    """How good `teacher_labels` are where the truth is known: `pseudo_label_report`, to which each
    of overlapping regions is a label of its own.

    label, truth: (B, 1 or K, H, W, D) uint8.
    """
    if multilabel:
        label, truth, num_classes = label.flatten(0, 1)[:, None], truth.flatten(0, 1)[:, None], 2
    pred, valid = label[:, 0], label[:, 0] != UNKNOWN
    return pseudo_label_report(pred.where(valid, 0), valid, truth, num_classes)


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
    if cfg.nnunet_folder:
        return load_nnunet(cfg, dataset.num_classes), None
    if cfg.bundle:
        bundle = monai_bundle.read_bundle(cfg.bundle)
        sizes = cfg.channels, cfg.class_names, cfg.patch_size
        return monai_bundle.load_monai(bundle, *sizes), None
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


def _methods_of_logits(student_channels: dict, taps: dict, num_classes: int, how: dict) -> list:
    """The methods that a teacher without feature maps can teach by; acf_bckd by its boundary terms
    alone.
    """
    found = []
    for name in KD_METHODS:
        less = {"afd": 0.0, "cfd": 0.0} if name == "acf_bckd" else {}
        with contextlib.suppress(ValueError), weightless():
            build_kd(name, student_channels, taps, num_classes, **how, **less)
            found.append(name)
    return found


def load_nnunet(cfg: Distillation, num_classes: int) -> nn.Module:
    """The frozen networks of an nnU-Net's results folder, one from each fold, as one teacher.

    CheckpointError where they are not what the plans say, or see other classes or images than the
    configuration has.
    """
    from networks.nnunet import NnUNet, NnUNetTeacher, own_weights

    results = nnunet.read_results(cfg.nnunet_folder)
    if results.in_channels != cfg.channels:
        raise CheckpointError(
            f"{results.folder}: this nnU-Net takes {results.in_channels} channel(s), the data have "
            f"{cfg.channels}"
        )
    outputs = results.outputs(cfg.class_names, str(results.folder))
    wrong = results.unlike({key: getattr(cfg, key) for key in results.preprocessing})
    if wrong:
        raise CheckpointError(
            f"{results.folder}: this nnU-Net was trained on images prepared in another way "
            f"({'; '.join(wrong)}); tools/new_config.py --nnunet writes a configuration for it"
        )
    folds, mirrored = [], []
    for fold in results.chosen(cfg.teacher_folds):
        weights, axes = nnunet.load_fold(results, fold)
        with trying(f"{results.folder}: plans.json"):
            network = NnUNet(cfg.channels, num_classes, **results.network)
        source = str(results.folds[fold])
        try:
            weights = own_weights(weights, network)
        except ValueError as problem:
            raise CheckpointError(f"{source}: {problem}") from problem
        load_network_weights(network, weights, source)
        folds.append(network)
        mirrored.append(axes)
    return NnUNetTeacher(folds, outputs, mirrored[0]).eval().requires_grad_(False)


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


def note_idle(cfg: Distillation, run: Run, has_parameters: bool, teacher: nn.Module | None) -> None:
    """Say what of the settings does nothing, and what teaches if it comes from another program.
    has_parameters: of the method's own, which learn.
    """
    if cfg.supervised:
        return
    if cfg.nnunet_folder:
        _note_nnunet(cfg, run, mirror_axes(teacher))
    if cfg.bundle:
        loaded = monai_bundle.described(monai_bundle.read_bundle(cfg.bundle), teacher)
        less = " (acf_bckd without AFD and CFD)" if cfg.leaves_out_attention({}) else ""
        run.note(f"note: the teacher is {loaded}{less}")
    if cfg.method_lr and not has_parameters:
        run.note(f"note: {cfg.method} has no parameters of its own: method_lr does nothing")
    if not cfg.taught and (cfg.pseudo_confidence or cfg.teacher_views != "one"):
        run.note(
            "note: without unlabelled scans (--labelled N, --unlabelled FOLDER) pseudo_confidence "
            "and teacher_views do nothing"
        )
    if cfg.warmup_steps > cfg.max_steps:
        run.note(
            f"note: with max_steps {cfg.max_steps} the terms do not reach their weights, for which "
            f"distill_warmup takes {cfg.warmup_steps} steps"
        )


def _note_nnunet(cfg: Distillation, run: Run, axes: Sequence[int]) -> None:
    """Say which folds teach, what ACF-BCKD leaves out under a plain network, and along which of the
    image's axes `teacher_views` mirrors where these are not all.
    """
    results = nnunet.read_results(cfg.nnunet_folder)
    folds = results.chosen(cfg.teacher_folds)
    listed = ", ".join(f"{fold} ({results.folds[fold].name})" for fold in folds)
    features = f"; the features are those of fold {folds[0]}" if len(folds) > 1 else ""
    run.note(f"note: the teacher is {results.folder.name}, fold {listed}{features}")
    if cfg.leaves_out_attention({} if results.network["encoder"] == "plain" else {"residual": 0}):
        run.note(
            "note: this nnU-Net has no residual block: acf_bckd goes without AFD and CFD, its "
            "boundary terms HBD and SBD remain"
        )
    if cfg.taught and cfg.teacher_views == "flips" and len(axes) < 3:
        allowed = f"no axis but {', '.join(map(str, axes))} of the image" if axes else "no mirrors"
        run.note(
            "note: inference_allowed_mirroring_axes of this nnU-Net's checkpoint allows "
            f"{allowed}: teacher_views=flips takes {2 ** len(axes)} of the 8 copies"
        )
