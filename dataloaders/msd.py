"""Decathlon-style NIfTI data sets: BTCV, WORD, MSD tasks and own data in the same format.

Deterministic part, done once per case and cached: reorient, resample, normalise intensity, crop to
the foreground (MONAI transforms; steps 1-5 of the CT recipe of ACF-BCKD). Random part, per step:
dataloaders/augment.py.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from dataloaders import augment, checks, nnunet_preprocessing
from dataloaders.base import Dataset
from dataloaders.cache import CaseCache
from dataloaders.cases import UNKNOWN, Case, read_image, read_label
from dataloaders.faults import WARNING, CaseNotes, DataError, Finding, Report
from dataloaders.lists import read_class_names, read_datalist, read_num_channels, read_split, select
from dataloaders.volumes import channel_number

INTENSITIES = ("window", "zscore", "none", "nnunet")
CROPS = ("pos_neg", "uniform")
# share of an id's voxels that resampling has to leave; nearest neighbours move borders anyway
HALF_LOST = 0.5
LOOKED_AT = 100_000  # voxels of an id
SECTIONS = {"train": "training", "val": "validation", "test": "test"}
SECTION_ORDER = (*SECTIONS.values(), "unlabelled")
_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


class MSDDataset(Dataset):
    """Cases of a decathlon JSON and how they are preprocessed.

    root, datalist: folder and JSON name. split_dir: folder with train.txt, val.txt, test.txt of
    case names; where it is empty the JSON's own lists training, validation, test are used.
    cache_dir: where preprocessed cases go.
    orientation: axis codes such as RAS, or "" to keep the stored order. spacing: mm per axis, () to
    keep the stored.
    intensity: 'window' maps window[0]..window[1] to 0..1 and clips, 'zscore' normalises each
    channel over the volume, 'nnunet' does what nnU-Net does, by the scheme and the numbers of each
    channel in intensity_channels, and resamples after that (dataloaders/nnunet_preprocessing.py).
    crop_foreground: cut to the box of voxels above 0 after normalisation; with 'nnunet' to that of
    non-zero voxels before it.
    crop: 'pos_neg', half of the labelled patches are centred on foreground, or 'uniform'. flip_prob
    (of each axis), rot90_prob, scale_prob, shift_prob: how often a patch is mirrored, turned, and
    its intensities scaled and shifted.
    """

    caches = True
    pads = True
    distance_unit = "mm"
    described_keys = ("class_names", "in_channels")

    @classmethod
    def described(cls, root: Path, datalist: str, keys: Sequence[str]) -> dict:
        readers = {"class_names": read_class_names, "in_channels": read_num_channels}
        return {key: readers[key](root / datalist) for key in keys}

    def __init__(
        self,
        root: str,
        datalist: str,
        class_names: Sequence[str],
        in_channels: int = 1,
        split_dir: str = "",
        cache_dir: str = "cache",
        orientation: str = "RAS",
        spacing: Sequence[float] = (),
        intensity: str = "window",
        window: Sequence[float] = (-175.0, 250.0),
        intensity_channels: Sequence[dict] = (),
        crop_foreground: bool = True,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        patch_size: Sequence[int] = (),
        crop: str = "pos_neg",
        flip_prob: float = 0.2,
        rot90_prob: float = 0.2,
        scale_prob: float = 0.1,
        shift_prob: float = 0.1,
        unlabelled: str = "",
        **labels,
    ) -> None:
        if intensity not in INTENSITIES:
            raise DataError(f"intensity must be one of {', '.join(INTENSITIES)}, got '{intensity}'")
        if intensity == "nnunet":
            nnunet_preprocessing.check_channels(intensity_channels, in_channels)
        elif intensity_channels:
            raise DataError(f"intensity_channels: intensity '{intensity}' does not use it")
        if len(window) != 2 or window[0] >= window[1]:
            raise DataError(f"window must be two rising values, got {tuple(window)}")
        if len(spacing) not in (0, 3) or any(value <= 0 for value in spacing):
            raise DataError(
                "spacing must be three positive values in mm, or [] to keep the files', got "
                f"{spacing}"
            )
        if orientation and sorted(map("LRPAIS".find, orientation)) not in [
            sorted(map("LRPAIS".find, (a, b, c))) for a in "LR" for b in "PA" for c in "IS"
        ]:
            raise DataError(f"orientation must name three axes, such as RAS, got '{orientation}'")
        if crop not in CROPS:
            raise DataError(f"crop must be one of {', '.join(CROPS)}, got '{crop}'")
        if rot90_prob and patch_size and patch_size[0] != patch_size[1]:
            raise DataError(
                f"rot90_prob is {rot90_prob}, but a patch of {tuple(patch_size)} changes its shape "
                "when turned; set rot90_prob: 0 or make the first two sides equal"
            )
        others = patient_pattern, absent_classes, unlabelled
        super().__init__(root, split_dir, class_names, patch_size, *others, **labels)
        if self.ignore_label is not None and UNKNOWN in self.allowed_ids:
            raise DataError(
                f"ignore_label: {self.ignore_label}, but {UNKNOWN} is the id of a class; labels "
                f"with voxels that nobody labelled can have the class ids 0..{UNKNOWN - 1}; give "
                "that class another one"
            )
        self.datalist, self.in_channels, self.listed = datalist, in_channels, bool(split_dir)
        self.orientation, self.spacing = orientation, tuple(spacing)
        self.intensity, self.window = intensity, tuple(window)
        self.intensity_channels = tuple(dict(channel) for channel in intensity_channels)
        self.crop_foreground = crop_foreground
        self.crop, self.flip_prob, self.rot90_prob = crop, flip_prob, rot90_prob
        self.scale_prob, self.shift_prob = scale_prob, shift_prob
        self.turns = rot90_prob > 0
        self._known: dict[str, Case] = {}
        self.cache = CaseCache(Path(cache_dir), self.preprocess, self._parameters())

    @property
    def incomplete(self) -> bool:
        told = (case.classes for case in self._all(None).values())
        return super().incomplete or any(classes is not None for classes in told)

    @property
    def source(self) -> str:
        return super().source if self.listed else str(self.root / self.datalist)

    # Lists

    def cases(self, report: Report | None = None) -> list[Case]:
        """All labelled cases, from any list of the data set."""
        return [case for case in self._all(report).values() if case.label is not None]

    def own_splits(self, report: Report | None = None) -> dict[str, list[Case]]:
        """The lists train, val and test that come with the data set; each may be empty. Of train
        alone some cases may have no label.
        """
        sections = self.sections(report)
        own = {split: sections.get(section, []) for split, section in SECTIONS.items()}
        scored = {split: [c for c in own[split] if c.label] for split in ("val", "test")}
        return own | scored

    def own_test(self) -> list[Case]:
        """The labelled cases that the data set keeps for the test."""
        return self.own_splits()["test"]

    def lists(self, report: Report) -> dict[str, list[str]]:
        cases = self._all(report)
        if not self.listed:
            own = self.own_splits(report)
            lists = {split: [case.name for case in found] for split, found in own.items()}
            lists["unlabelled"] = []
        else:
            lists = {}
            for split in (*SECTIONS, "unlabelled"):
                names = read_split(self.split_dir, split, report) or []
                source = f"{self.split_dir}/{split}.txt"
                known = select(cases.values(), names, source, report)
                lists[split] = [case.name for case in known]
        required = ("train", "val") if self.needs_val else ("train",)
        for split in required if any(case.label for case in cases.values()) else ():
            path = self.split_dir / f"{split}.txt" if self.listed else self.root / self.datalist
            if not lists[split] and not (self.listed and path.is_file()):
                report.error(
                    "empty list",
                    path,
                    f"the {split} list is empty",
                    "at least one labelled case",
                    "tools/make_splits.py draws seeded lists",
                )
        return lists

    def evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        source = str(self.root / self.datalist)
        return select(self._all(report).values(), names, source, report)

    def has_label(self, name: str) -> bool:
        return self._all(None)[name].label is not None

    def unlisted(self, listed: set[str], report: Report) -> list[Case]:
        """Training cases that the data set has without labels, and those of `unlabelled`."""
        sections = self.sections(report)
        found = sections.get("training", []) + sections.get("unlabelled", [])
        if self.unlabelled == "test":
            found = found + sections.get("test", [])
        known = self._all(None)
        for case in found:
            same = known.get(case.name, case)
            if case.label is None and case.name in listed and same.images != case.images:
                report.error(
                    "listed twice",
                    case.images[0],
                    f"an unlabelled scan with the name of {same.images[0]}",
                    "",
                    "every scan needs a name of its own",
                )
        own = [case for case in found if case.label is None and case.name not in listed]
        return own + (super().unlisted(listed, report) if self.unlabelled != "test" else [])

    def sections(self, report: Report | None) -> dict[str, list[Case]]:
        """The lists of the data set, labelled cases and others: training, validation, test and, in
        formats that have it, unlabelled.
        """
        sections = read_datalist(self.root, self.datalist, report, self.allow_outside)
        without = [case for case in sections.get("validation", []) if case.label is None]
        if without and report is not None:
            report.warning(
                "no label",
                self.root / self.datalist,
                f"{len(without)} of {len(sections['validation'])} entries of 'validation' have no "
                f"label, for example '{without[0].name}'",
                "entries with 'image' and 'label'",
                "they are left out",
            )
        return sections

    def _all(self, report: Report | None) -> dict[str, Case]:
        """Every case of the data set by its name; read once, unless faults are asked for."""
        if report is not None or not self._known:
            sections, self._known = self.sections(report), {}
            order = [section for section in SECTION_ORDER if section in sections]
            cases = [case for section in order for case in sections[section]]
            # a scan without a label must not stand in for a labelled one of its name
            for case in sorted(cases, key=lambda case: case.label is None):
                self._known.setdefault(case.name, case)
        return self._known

    # Reading

    def prepare(
        self,
        splits: dict[str, Sequence[Case]],
        report: Report | None = None,
        store: bool = True,
        chosen: str = "",
    ) -> list[Finding]:
        try:
            return super().prepare(splits, report, store, chosen)
        finally:
            if store:
                self.cache.sweep()

    def facts(self, case: Case, split: str, store: bool) -> dict:
        found = self.cache.facts(case, store)
        findings = [
            Finding(fault, str(case.files[k]), what, expected, fix, WARNING)
            for k, fault, what, expected, fix in found["warnings"]
        ]
        return {"ids": None} | found | {"findings": findings}

    def read(self, case: Case) -> dict:
        """The preprocessed case, memory-mapped, with the keys of `preprocess`."""
        return self.cache.read(case)

    def preprocess(self, case: Case) -> dict:
        """Read and transform one case. Beside image and label: affine, spacing (mm) and the stored
        grid's native_affine and native_shape; `foreground` and `background`, flat indices of
        possible patch centres; `ids`, the label ids that occur.
        """
        image, label, affine, notes = self._read_checked(case)
        self.check_unit(case, image, notes)
        native = {"native_affine": affine, "native_shape": list(image.shape[1:])}
        shares = self._shares(image)
        sample = {"image": MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine))}
        if label is not None:
            ids = torch.from_numpy(label[None].astype(np.float32))
            sample["label"] = MetaTensor(ids, affine=torch.from_numpy(affine))
        sample = self._transform(case, sample, notes)
        image, affine = sample["image"].numpy(), sample["image"].affine.numpy()
        found = {
            "image": np.ascontiguousarray(image, dtype=np.float32),
            "affine": affine,
            "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
            **native,
            **shares,
            **self._seen(case, notes),
        }
        if label is None:
            return found
        label = self.encoded(sample["label"].numpy().astype(np.uint8))
        above = self.crop_foreground and self.intensity != "nnunet"
        inside = (image > 0).any(0) if above else np.ones(image.shape[1:], bool)
        positive = label.any(0)
        if self.ignore_label is not None:
            unknown = (label == UNKNOWN).any(0)
            inside, positive = inside & ~unknown, positive & ~unknown
            found["unknown"] = float(unknown.mean())
        return found | {
            "label": label,
            "foreground": np.flatnonzero(positive).astype(np.int32),
            "background": np.flatnonzero(inside & ~positive).astype(np.int32),
            "ids": self._ids(label),
        }

    def read_file(self, case: Case) -> dict:
        """A scan without a label as `read` gives it; nothing is cached."""
        notes = CaseNotes()
        image, affine = read_image(case, self.in_channels, notes)
        self.check_unit(case, image, notes)
        native = {"native_affine": affine, "native_shape": list(image.shape[1:])}
        image, affine = self.preprocess_image(case, image, affine)
        if self.patch_size:
            checks.check_size(case, "", image.shape[1:], self.patch_size, notes)
        return {"image": image, "affine": affine, "findings": notes.warnings, **native}

    def check_unit(self, case: Case, image: np.ndarray, notes: Report) -> None:
        """A warning about a scan that is not in the unit of the window."""
        if self.intensity == "window":
            checks.check_hounsfield(case.images[0], image, self.window, notes)

    def _shares(self, image: np.ndarray) -> dict:
        """Shares of the scan's values below, in and above the window, where there is one."""
        if self.intensity != "window":
            return {}
        values = image.ravel()[:: max(1, image.size // 10**6)]
        below, above = (values < self.window[0]).mean(), (values > self.window[1]).mean()
        return {"shares": [float(below), float(1 - below - above), float(above)]}

    def id_titles(self) -> dict[int, str]:
        """Names of the foreground ids that label files hold."""
        return dict(enumerate(self.class_names[1:], 1))

    def preprocess_image(
        self, case: Case, image: np.ndarray, affine: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, H, W, D) as stored and its affine -> both as networks see them; `case` names it
        in errors.
        """
        sample = {"image": MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine))}
        result = self._transform(case, sample)["image"]
        return np.ascontiguousarray(result.numpy(), dtype=np.float32), result.affine.numpy()

    def channel_of(self, name: str) -> tuple[str, int] | None:
        """Name of a channel's file, without suffix -> name of its scan and number of the channel
        (below 0: none that a network sees); None for a name that says neither, that of a file with
        a whole scan.
        """
        return channel_number(name) if self.in_channels > 1 else None

    def _read_checked(
        self, case: Case
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, CaseNotes]:
        """Image, label (None: it has none) and affine of a case, and what was noted of them;
        DataError with all its faults.
        """
        notes, image, label, affine = CaseNotes(), None, None, None
        with notes.catching():
            self._check_case(case)
        with notes.catching():
            image, affine = read_image(case, self.in_channels, notes)
        with notes.catching():
            if case.label is not None:
                label = read_label(case, self.allowed_ids, *notes.grid, notes, self.ignore_label)
        notes.stop()
        return image, label, affine, notes

    def _seen(self, case: Case, notes: CaseNotes) -> dict:
        """What the cache keeps of the checks."""
        # Entries of the cache are found by content, wherever the files are: their names are not
        # stored.
        files = [str(path) for path in case.files]
        stored = [
            [files.index(w.file), w.fault, w.found, w.expected, w.fix] for w in notes.warnings
        ]
        return {"content": notes.content, "labels": notes.labels, "warnings": stored}

    def _check_case(self, case: Case) -> None:
        """DataError for what the names of a case's files tell."""

    def encode_label(self, label: np.ndarray) -> np.ndarray:
        """Stored ids (1, H, W, D) -> what the networks are trained on; the same for multi-class
        data.
        """
        return label

    def encoded(self, label: np.ndarray) -> np.ndarray:
        """`encode_label` of ids that may be UNKNOWN, which such voxels then are in all channels."""
        if self.ignore_label is None:
            return self.encode_label(label)
        unknown = np.asarray(label) == UNKNOWN
        known = self.encode_label(np.where(unknown, np.uint8(0), label))
        return np.where(unknown, np.uint8(UNKNOWN), known)

    def native_label(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The label on its stored grid, ids (H, W, D) or regions (K, H, W, D), and its affine."""
        image, affine = read_image(case, self.in_channels)
        grid = image.shape[1:], affine
        label = read_label(case, self.allowed_ids, *grid, ignore=self.ignore_label)
        label = self.encoded(label[None])
        return (label if self.multilabel else label[0]), affine

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Prediction on any grid -> ids as label files hold them; the same for multi-class data."""
        return prediction

    # Patches

    def patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """One random training patch: crop, flips, 90-degree turns, intensity scale and shift."""
        return self.jitter(self.turn(self.cut(sample, rng), rng), rng)

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """A crop at any place, flips and 90-degree turns."""
        return self.turn(augment.crop_uniform(sample, rng, self.patch_size), rng)

    def cut(self, sample: dict, rng: np.random.Generator) -> dict:
        """A random crop of the size of a patch."""
        crop = augment.crop_pos_neg if self.crop == "pos_neg" else augment.crop_uniform
        return crop(sample, rng, self.patch_size)

    def turn(self, patch: dict, rng: np.random.Generator) -> dict:
        patch = augment.random_flip(patch, rng, self.flip_prob)
        return augment.random_rot90(patch, rng, self.rot90_prob)

    def jitter(self, patch: dict, rng: np.random.Generator) -> dict:
        patch = augment.random_scale(patch, rng, self.scale_prob)
        return augment.random_shift(patch, rng, self.shift_prob)

    def _ids(self, label: np.ndarray) -> list[int]:
        return np.unique(label).tolist()

    def _transform(self, case: Case, sample: dict, notes: Report | None = None) -> dict:
        """The deterministic transforms of an image, and of a label if there is one. notes: takes
        warnings about labelled voxels that they take away.
        """
        keys = tuple(sample)
        steps = []
        if self.orientation:
            steps.append(Orientationd(keys, axcodes=self.orientation, labels=_AXES))
        if self.intensity == "nnunet":
            return self._as_nnunet(case, Compose(steps)(sample), notes)
        if self.spacing:
            steps.append(
                Spacingd(keys, pixdim=self.spacing, mode=("bilinear", "nearest")[: len(keys)])
            )
        if self.intensity == "window":
            steps.append(ScaleIntensityRanged("image", *self.window, 0.0, 1.0, clip=True))
        elif self.intensity == "zscore":
            steps.append(NormalizeIntensityd("image", channel_wise=True))
        whole = Compose(steps)(sample)
        crop = CropForegroundd(keys, source_key="image", select_fn=_positive, allow_smaller=True)
        crops = [crop] if self.crop_foreground else []
        stored, sample = sample, Compose(crops)(whole)
        if notes is not None and "label" in sample:
            self._check_losses(case, stored["label"], whole["label"], sample["label"], notes)
        if min(sample["image"].shape[1:]) == 0:
            raise DataError(
                Finding(
                    "no foreground",
                    str(case.images[0]),
                    "nothing is left after cropping to the foreground",
                    "",
                    "check the window",
                )
            )
        return sample

    def _check_losses(
        self, case: Case, stored: MetaTensor, whole: MetaTensor, cropped: MetaTensor, notes: Report
    ) -> None:
        """Warnings about labelled voxels that are lost from the stored label to the resampled one
        and to what is left of that after cropping.
        """
        names = self.id_titles()
        grids = [
            (label[0].numpy().astype(np.uint8), label.affine.numpy()) for label in (stored, whole)
        ]
        found = surviving(*grids[0], *grids[1], names)
        shown = " x ".join(f"{side:g}" for side in self.spacing)
        cause = f"resampling to {shown} mm loses"
        fix = "choose a finer spacing"
        checks.check_kept(
            case.label, dict.fromkeys(found, 1.0), found, names, cause, fix, notes, HALF_LOST
        )
        before, left = (
            dict(enumerate(np.bincount(ids.ravel(), minlength=256).tolist()))
            for ids in (grids[1][0], cropped.numpy().astype(np.uint8))
        )
        cause = "cropping to the box of values above the lower end of the intensities cuts off"
        fix = "set crop_foreground: false, or a window with a lower beginning"
        checks.check_kept(case.label, before, left, names, cause, fix, notes)

    def _as_nnunet(self, case: Case, sample: dict, notes: Report | None) -> dict:
        """Crop, normalise and resample as nnU-Net does. notes: as in `_transform`."""
        image, affine = sample["image"].numpy(), sample["image"].affine.numpy()
        mask = nnunet_preprocessing.nonzero_mask(image)
        place = nnunet_preprocessing.box(mask)
        if not self.crop_foreground:
            place = tuple(slice(0, side) for side in mask.shape)
        if not mask.any():
            raise DataError(
                Finding(
                    "no foreground", str(case.images[0]), "every voxel is 0", "", "see the scan"
                )
            )
        image, mask = image[(slice(None), *place)], mask[place]
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        target = self.spacing or spacing
        shape = nnunet_preprocessing.new_shape(mask.shape, spacing, target)
        apart = nnunet_preprocessing.coarse_axis(spacing, target)
        channels = []
        for channel, how in zip(image, self.intensity_channels):
            channel = nnunet_preprocessing.normalized(channel, how, mask)
            channels.append(nnunet_preprocessing.resample_image(channel, shape, apart))
        start = [side.start for side in place]
        affine = nnunet_preprocessing.resampled_affine(affine, start, mask.shape, shape)
        arrays = {"image": np.stack(channels)}
        if "label" in sample:
            label = sample["label"].numpy()[0][place]
            arrays["label"] = nnunet_preprocessing.resample_label(label, shape, apart)[None]
        result = {
            key: MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine))
            for key, array in arrays.items()
        }
        if notes is not None and "label" in result:
            self._check_losses(case, sample["label"], result["label"], result["label"], notes)
        return result

    def _parameters(self) -> dict:
        # keys that came later stand here only where they are used: entries from before are found
        ignored = {} if self.ignore_label is None else {"ignore": self.ignore_label}
        if self.intensity == "nnunet":
            ignored |= {"intensity_channels": list(self.intensity_channels)}
        return ignored | {
            "kind": type(self).__name__,
            "in_channels": self.in_channels,
            "ids": list(self.allowed_ids),
            "orientation": self.orientation,
            "spacing": list(self.spacing),
            "intensity": self.intensity,
            "window": list(self.window),
            "crop_foreground": self.crop_foreground,
        }


def surviving(
    label: np.ndarray,
    affine: np.ndarray,
    resampled: np.ndarray,
    resampled_affine: np.ndarray,
    ids: Iterable[int],
) -> dict[int, float]:
    """Of each of the `ids` that occur in a label, the share of its voxels whose place has the same
    id on another grid, so that it could be found again. Label maps (H, W, D); of an id with many
    voxels, some are looked at.
    """
    to_other = np.linalg.inv(resampled_affine) @ affine
    edge = np.array(resampled.shape) - 1
    shares = {}
    for k in ids:
        places = np.flatnonzero(label == k)
        if not len(places):
            continue
        places = places[:: 1 + len(places) // LOOKED_AT]
        voxels = np.stack(np.unravel_index(places, label.shape))
        other = np.rint(to_other[:3, :3] @ voxels + to_other[:3, 3:]).astype(int)
        other = np.clip(other, 0, edge[:, None])
        shares[k] = float(np.mean(resampled[tuple(other)] == k))
    return shares


def _positive(image):
    return image > 0
