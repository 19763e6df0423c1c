"""What the two few-label scripts share: keys, a trial of the settings, data and batches."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from dataloaders import DATASETS, Dataset, Report, build_dataset
from dataloaders.cases import UNKNOWN, Case
from dataloaders.samplers import PatchDataset, draws
from dataloaders.settings import DataSettings
from losses import KD_METHODS, PRESETS
from methods import SSL_METHODS, build_method
from methods.base import Method
from networks import NETWORKS, build_network, check_network
from utils import plugins
from utils.config import ConfigError, constructing, enough_voxels, trying
from utils.distributed import smallest_share
from utils.modes import weightless
from utils.run import Run, no_selection

LABELLED, UNLABELLED, MIX, CLEAN = 0, 1, 2, 3  # streams of random numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLabels(DataSettings):
    """Keys of both scripts."""

    # units that count as labelled, or their share; null: all
    labelled: int | float | None = None
    # Method
    method: Annotated[str, SSL_METHODS] = "crkd"
    preset: Annotated[str, PRESETS] = "clean"  # as_released: the reference code's arithmetic

    pluggable = {  # noqa: RUF012 - of the class, not of a configuration
        "network": plugins.network(NETWORKS),
        "method": plugins.semi_supervised(SSL_METHODS, Method),
        "format": plugins.data_format(DATASETS, Dataset),
    }
    recipes = SSL_METHODS
    not_in_recipes = ("method",)
    set_aside: ClassVar = (
        *(
            "student",
            "teacher",
            "teacher_checkpoint",
            "teacher_folds",
            "teacher_seed",
            "distill_warmup",
        ),
        *("method_lr", "cases_per_batch", "crops_per_case", "val_start", "overlap"),
    )
    other_names = (*KD_METHODS, *NETWORKS)

    @property
    def idle_keys(self) -> tuple[str, ...]:
        supervised = self.method == "supervised"
        return ("preset", "method_args", "unlabelled_batch") if supervised else ()

    def make_method(self, in_channels: int, num_classes: int) -> Method:
        """The method with its networks; TypeError or ValueError for what they do not take."""
        return build_method(
            self.method,
            lambda: build_network(
                self.network, in_channels, num_classes, **self.network_arguments(self.network)
            ),
            max_steps=self.max_steps,
            preset=self.preset,
            **self.method_arguments,
        )

    def _check(self) -> None:
        super()._check()
        share = self.labelled
        if share is not None and (share <= 0 or (share > 1 and share != int(share))):
            raise ConfigError(
                f"labelled: a whole number, or a share above 0 and up to 1; got {share}"
            )
        dimensions = SSL_METHODS[self.method].dimensions
        if len(self.patch_size) not in dimensions:
            raise ConfigError(f"method: {self.method} is a method for {dimensions[0]}D networks")
        self._check_patch(self.network, self.network_arguments(self.network))
        of_format = self.pluggable["format"].registry[self.format]
        key = "regions" if self.regions and "regions" in of_format.accepted() else "format"
        if key == "regions" or of_format.multilabel:
            raise ConfigError(
                f"{key}: {getattr(self, key)} has regions that overlap, so a voxel can be in "
                f"several, but {self.method} gives each voxel one class; train it with "
                "train_3d_distill.py, or store labels of classes that exclude each other"
            )

    def _try_out(self) -> None:
        channels, classes = self.channels, len(self.class_names)
        batch = smallest_share(self.labelled_batch, self.device)
        with (
            trying(f"network_args: {self.network}"),
            enough_voxels(self.network, self.patch_size, batch, "labelled_batch"),
        ):
            how = plugins.trial(NETWORKS[self.network], self.patch_size, batch)
            arguments = self.network_arguments(self.network)
            check_network(self.network, channels, classes, *how, **arguments)
        with trying(f"method_args: {self.method}"), weightless():
            self.make_method(channels, classes)


def open_data(cfg: FewLabels, args: Any, run: Run) -> tuple[Dataset, dict[str, list[Case]]]:
    """The data set and its disjoint lists, after everything of them was read and checked; makes the
    run folder.

    Test cases are read too: none may be trained on. DataError or ConfigError for what is wrong.
    """
    with constructing(args.config):
        dataset = build_dataset(**cfg.dataset_arguments(), allow_outside=args.allow_outside)
    report = Report()
    splits = dataset.splits(cfg.labelled, report)
    report.stop()
    if not splits[cfg.select_on]:
        raise ConfigError(no_selection(cfg.select_on, cfg.split_dir or cfg.data_root))
    uses_unlabelled = SSL_METHODS[cfg.method].uses_unlabelled
    if uses_unlabelled and not splits["unlabelled"]:
        raise ConfigError(
            f"labelled: {cfg.labelled} leaves no unlabelled {dataset.unit} for {cfg.method}; label "
            "fewer, or add some with --unlabelled FOLDER"
        )
    if dataset.incomplete and not SSL_METHODS[cfg.method].incomplete:
        raise ConfigError(
            f"method: {cfg.method} does not say that it can take labels that are not complete, and "
            "the data have ignore_label or labelled_classes; see docs/extending.md, and set its "
            "attribute incomplete = True"
        )
    used = [split for split in splits if split != "unlabelled" or uses_unlabelled]
    with contextlib.ExitStack() as first:
        if dataset.caches:  # so that one process fills the cache
            first.enter_context(run.world.main_first())
        dataset.prepare({split: splits[split] for split in used}, report, chosen=cfg.select_on)
        report.stop()
    with run.world.main_first():
        run.open(report)
    return dataset, splits


def _compared(batch: dict) -> dict:
    """A batch of unlabelled images whose pseudo-labels are monitored: a truth that lacks classes
    would say nothing of most voxels, and mislead of the others, so all of it counts as UNKNOWN.
    """
    partial = ~batch.pop("annotated").all(1)
    batch["label"][partial] = UNKNOWN
    return batch


class Batches:
    """Batches of a training, in this process's share: dicts of tensors (B, C or 1, *spatial), and
    `case`, the names. What a step gets depends on the seed and the step alone.
    """

    def __init__(
        self,
        cfg: FewLabels,
        run: Run,
        dataset: Dataset,
        splits: Mapping[str, Sequence[Case]],
        method: Method,
    ) -> None:
        self.cfg, self.run, self.dataset, self.splits = cfg, run, dataset, splits
        self.method = method

    def _of(
        self, split: str, augment, keys: Sequence[str], stream: int, first: int, last: int
    ) -> Iterator[dict]:
        cfg, world = self.cfg, self.run.world
        size = getattr(cfg, f"{split}_batch")
        world.share(size, f"{split}_batch")
        dataset = self.dataset
        patches = PatchDataset(
            self.splits[split],
            dataset.sample,
            augment,
            cfg.seed,
            keys=keys,
            stream=stream,
            annotated=dataset.annotated if dataset.incomplete else None,
        )
        return draws(
            patches, first, last, size, cfg.workers, self.run.device, world.rank, world.size
        )

    def labelled(self) -> Iterator[dict]:
        """`image` and `label`, of each step that is left; with `annotated` (B, K) if labels are not
        complete.
        """
        augment = self.dataset.patch
        steps = self.run.start, self.cfg.max_steps
        return self._of("labelled", augment, ("image", "label"), LABELLED, *steps)

    def unlabelled(self, stream: int = UNLABELLED) -> Iterator[dict]:
        """`weak` and `strong0`, `strong1`, ... of one geometry, and `label`, which no method trains
        on. stream: MIX for other images than those of the same step.
        """
        count = self.method.strong_views
        keys = ("weak", *(f"strong{k}" for k in range(count)), "label")
        views = partial(self.dataset.views, strong_views=count)
        batches = self._of("unlabelled", views, keys, stream, self.run.start, self.cfg.max_steps)
        return map(_compared, batches) if self.dataset.incomplete else batches

    def clean(self) -> Iterator[Tensor]:
        """`bn_batches` batches of labelled and weak unlabelled images, the same at each call, on
        the device.
        """
        steps = 0, self.cfg.bn_batches
        parts = [self._of("labelled", self.dataset.patch, ("image",), CLEAN, *steps)]
        if self.method.uses_unlabelled:
            views = partial(self.dataset.views, strong_views=0)
            parts.append(self._of("unlabelled", views, ("weak",), CLEAN, *steps))
        for found in zip(*parts):
            images = [batch[key] for batch, key in zip(found, ("image", "weak"))]
            yield torch.cat(images).to(self.run.device)
