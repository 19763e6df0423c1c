"""Decathlon-style NIfTI data sets: BTCV, WORD, MSD tasks and own data in the same format.

Deterministic part, done once per case and cached: reorient, resample, normalise intensity, crop to
the foreground (MONAI transforms; steps 1-5 of the CT recipe of ACF-BCKD). Random part, per step:
dataloaders/augment.py.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
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
from tqdm import tqdm

from dataloaders import augment
from dataloaders.cache import CaseCache
from dataloaders.cases import (
    Case,
    DataError,
    check_disjoint,
    patient_function,
    read_class_names,
    read_datalist,
    read_image,
    read_label,
    read_num_channels,
    read_split,
    select,
)
from dataloaders.faults import (
    ERROR,
    WARNING,
    CaseNotes,
    Finding,
    Report,
    check_classes,
    check_duplicates,
    gathering,
    placed,
)
from dataloaders.volumes import channel_number

INTENSITIES = ("window", "zscore", "none")
CROPS = ("pos_neg", "uniform")
_AXES = (("L", "R"), ("P", "A"), ("I", "S"))


class MSDDataset:
    """Cases of a decathlon JSON and how they are preprocessed.

    root, datalist: folder and JSON name. split_dir: folder with train.txt, val.txt, test.txt of
    case names; where it is empty the JSON's own lists training, validation, test are used.
    cache_dir: where preprocessed cases go.
    orientation: axis codes such as RAS, or "" to keep the stored order. spacing: mm per axis, () to
    keep the stored.
    intensity: 'window' maps window[0]..window[1] to 0..1 and clips, 'zscore' normalises each
    channel over the volume.
    crop_foreground: cut to the box of voxels above 0 after normalisation.
    patient_pattern: regular expression whose group 1 is the patient in a case's name, '' for the
    usual conventions (cases.patient_function). absent_classes: those that the training list may
    lack.
    """

    multilabel = False
    allow_outside = False  # whether lists may name files outside of root
    described_keys = ("class_names", "in_channels")  # arguments that `described` knows

    @classmethod
    def described(cls, root: Path, datalist: str, keys: Sequence[str]) -> dict:
        """Values of `keys`, which are among `described_keys`, as the data set itself tells them."""
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
        crop_foreground: bool = True,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
    ) -> None:
        if intensity not in INTENSITIES:
            raise DataError(f"intensity must be one of {', '.join(INTENSITIES)}, got '{intensity}'")
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
        self.root, self.datalist, self.split_dir = Path(root), datalist, split_dir
        self.class_names, self.in_channels = tuple(class_names), in_channels
        self.orientation, self.spacing = orientation, tuple(spacing)
        self.intensity, self.window, self.crop_foreground = (
            intensity,
            tuple(window),
            crop_foreground,
        )
        self.patient, self.absent_classes = patient_function(patient_pattern), tuple(absent_classes)
        self.cache = CaseCache(Path(cache_dir), self.preprocess, self._parameters())

    @property
    def num_classes(self) -> int:
        """Channels of the logits: background included, or the number of regions of multi-label
        data.
        """
        return len(self.class_names)

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """Ids that a label file may hold."""
        return tuple(range(len(self.class_names)))

    @property
    def classes(self) -> dict[int, str]:
        """Number -> name of what is scored: the foreground classes, or the regions of multi-label
        data.
        """
        return (
            dict(enumerate(self.class_names))
            if self.multilabel
            else dict(enumerate(self.class_names[1:], 1))
        )

    def splits(self, report: Report | None = None) -> dict[str, list[Case]]:
        """The lists train, val and test (the last may be empty), checked to be disjoint and not
        empty.

        report: takes the faults, and the lists have what is left; where it is None, they are raised
        together.
        """
        result: dict[str, list[Case]] = {}
        with gathering(report) as report:
            labelled = self.labelled(report)
            for split in ("train", "val", "test") if self.split_dir else ():
                names, source = (
                    read_split(Path(self.split_dir), split, report),
                    f"{self.split_dir}/{split}.txt",
                )
                result[split] = select(labelled, names, source, report) if names else []
            if not self.split_dir:
                result = self.own_splits(report)
            for split in ("train", "val") if labelled else ():
                where = (
                    Path(self.split_dir) / f"{split}.txt"
                    if self.split_dir
                    else self.root / self.datalist
                )
                if not result[split] and not (self.split_dir and where.is_file()):
                    report.error(
                        "empty list",
                        where,
                        f"the {split} list is empty",
                        "at least one labelled case",
                        "tools/make_splits.py draws seeded lists",
                    )
            check_disjoint(result, report, self.patient)
        return result

    def find(self, names: Sequence[str]) -> list[Case]:
        """The labelled cases called `names`, from any list of the JSON; DataError naming those that
        are not there.
        """
        return select(self.labelled(), names, str(self.root / self.datalist))

    def labelled(self, report: Report | None = None) -> list[Case]:
        """All labelled cases, from any list of the data set."""
        return [case for cases in self._labelled(report).values() for case in cases]

    def labelled_tests(self) -> list[Case]:
        """The labelled cases that the data set keeps for the test."""
        return self.own_splits()["test"]

    def own_splits(self, report: Report | None = None) -> dict[str, list[Case]]:
        """The lists train, val and test that come with the data set; each may be empty."""
        labelled = self._labelled(report)
        names = {"train": "training", "val": "validation", "test": "test"}
        return {split: labelled.get(section, []) for split, section in names.items()}

    def _labelled(self, report: Report | None) -> dict[str, list[Case]]:
        """The labelled cases of each list of the JSON; others are left out, with a word about it
        for training lists.
        """
        sections = read_datalist(self.root, self.datalist, report, self.allow_outside)
        for section, cases in sections.items():
            without = [case for case in cases if case.label is None]
            if without and section in ("training", "validation") and report is not None:
                report.warning(
                    "no label",
                    self.root / self.datalist,
                    f"{len(without)} of {len(cases)} entries of '{section}' have no label, for "
                    "example "
                    f"'{without[0].name}'",
                    "entries with 'image' and 'label'",
                    "they are left out",
                )
        return {
            name: [case for case in cases if case.label is not None]
            for name, cases in sections.items()
        }

    def prepare(
        self,
        splits: dict[str, Sequence[Case]],
        patch_size: Sequence[int] = (),
        report: Report | None = None,
        store: bool = True,
    ) -> list[Finding]:
        """Preprocess every case of the lists that is not cached yet, and check them together -> the
        warnings.

        DataError that lists every fault, or with `report` the faults are noted there. patch_size:
        of training, to tell of smaller scans. store: keep what was preprocessed.
        """
        with gathering(report) as report:
            facts: dict[tuple[str, Case], dict] = {}
            for split, cases in splits.items():
                report.count(split, len(cases), f"{split} cases")
                for case in tqdm(cases, desc=f"preparing {split}", unit="case", delay=1):
                    with report.catching(split, case.name):
                        facts[split, case] = self.cache.facts(case, store)
            if store:
                self.cache.write_digests()
            for (split, case), found in facts.items():
                report.take(placed(_stored_warnings(case, found["warnings"]), split, case.name))
                if any(side < want for side, want in zip(found["shape"], patch_size)):
                    sides = " x ".join(map(str, found["shape"]))
                    report.warning(
                        "small",
                        case.images[0],
                        f"{sides} voxels after preprocessing",
                        f"at least the patch, {' x '.join(map(str, patch_size))}",
                        "patches are padded with zeros",
                        split=split,
                        case=case.name,
                    )
            _check_orientations(
                {key: found["native_affine"] for key, found in facts.items()}, report
            )
            seen = (
                (split, case.name, case.images[0], found["content"])
                for (split, case), found in facts.items()
            )
            check_duplicates(seen, report, ERROR)
            training = [found["ids"] for (split, _), found in facts.items() if split == "train"]
            # only where all were read: a class may be in a case that was not
            if training and len(training) == len(splits["train"]):
                present = {number for ids in training for number in self.present(ids)}
                source = (
                    f"{self.split_dir}/train.txt"
                    if self.split_dir
                    else str(self.root / self.datalist)
                )
                check_classes(present, self.classes, self.absent_classes, source, report)
        return report.warnings

    def present(self, ids: Sequence[int]) -> set[int]:
        """Which of `classes` a label with these `ids` has."""
        return set(ids)

    def read(self, case: Case) -> dict:
        """The preprocessed case: image (C, H, W, D) float32, label (1, H, W, D) uint8 and the keys
        of `preprocess`.
        """
        return self.cache.read(case)

    def training_sample(self, case: Case) -> dict:
        """The case as training patches are cut from it."""
        return self.read(case)

    def preprocess(self, case: Case) -> dict:
        """Read and transform one case. Beside image and label: affine, spacing (mm) and the stored
        grid's native_affine and native_shape; `foreground` and `background`, flat indices of
        possible patch centres; `ids`, the label ids that occur.
        """
        image, label, affine, seen = self._read_checked(case)
        native = {"native_affine": affine, "native_shape": list(image.shape[1:])}
        sample = self._transform(
            case,
            {
                "image": MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine)),
                "label": MetaTensor(
                    torch.from_numpy(label[None].astype(np.float32)),
                    affine=torch.from_numpy(affine),
                ),
            },
        )
        image, label = (
            sample["image"].numpy(),
            self.encode_label(sample["label"].numpy().astype(np.uint8)),
        )
        affine = sample["image"].affine.numpy()
        inside = (image > 0).any(0) if self.crop_foreground else np.ones(image.shape[1:], bool)
        positive = label.any(0)
        return {
            "image": np.ascontiguousarray(image, dtype=np.float32),
            "label": label,
            "affine": affine,
            "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
            "foreground": np.flatnonzero(positive).astype(np.int32),
            "background": np.flatnonzero(inside & ~positive).astype(np.int32),
            "ids": self._ids(label),
            **native,
            **seen,
        }

    def read_unlabelled(self, case: Case) -> dict:
        """A scan without a label as `read` gives it: image (C, H, W, D) float32, affine, and the
        stored grid's native_affine and native_shape. Nothing is cached.
        """
        image, affine = read_image(case, self.in_channels)
        native = {"native_affine": affine, "native_shape": list(image.shape[1:])}
        image, affine = self.preprocess_image(case, image, affine)
        return {"image": image, "affine": affine, **native}

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

    def structures(self) -> dict[str, tuple[int, ...]]:
        """What a prediction shows, by name: the ids that it is made of in what `decode_prediction`
        gives.
        """
        return {name: (k,) for k, name in enumerate(self.class_names) if k}

    def id_names(self) -> dict[int, str]:
        """Names of the ids that `decode_prediction` gives."""
        return dict(enumerate(self.class_names))

    def _read_checked(self, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """Image, label and affine of a case, and what the cache keeps of the checks; DataError with
        all its faults.
        """
        notes, image, affine = CaseNotes(), None, None
        with notes.catching():
            self._check_case(case)
        with notes.catching():
            image, affine = read_image(case, self.in_channels, notes)
        with notes.catching():
            label = read_label(case, self.allowed_ids, *notes.grid, notes)
        notes.stop()
        # Entries of the cache are found by content, wherever the files are: their names are not
        # stored.
        files = [str(path) for path in (*case.images, case.label)]
        stored = [
            [files.index(w.file), w.fault, w.found, w.expected, w.fix] for w in notes.warnings
        ]
        return image, label, affine, {"content": notes.content, "warnings": stored}

    def _check_case(self, case: Case) -> None:
        """DataError for what the names of a case's files tell."""

    def encode_label(self, label: np.ndarray) -> np.ndarray:
        """Stored ids (1, H, W, D) -> what the networks are trained on; the same for multi-class
        data.
        """
        return label

    def native_label(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The label on its stored grid, ids (H, W, D) or regions (K, H, W, D), and its affine."""
        image, affine = read_image(case, self.in_channels)
        label = self.encode_label(read_label(case, self.allowed_ids, image.shape[1:], affine)[None])
        return (label if self.multilabel else label[0]), affine

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Prediction on any grid -> ids as label files hold them; the same for multi-class data."""
        return prediction

    def patch_function(
        self,
        patch_size: Sequence[int],
        crop: str = "pos_neg",
        flip_prob: float = 0.2,
        rot90_prob: float = 0.2,
        scale_prob: float = 0.1,
        shift_prob: float = 0.1,
    ):
        """(sample, rng) -> one random training patch: crop, flips, 90-degree turns, intensity scale
        and shift.
        """
        if crop not in CROPS:
            raise DataError(f"crop must be one of {', '.join(CROPS)}, got '{crop}'")
        if rot90_prob and patch_size[0] != patch_size[1]:
            raise DataError(
                f"rot90_prob is {rot90_prob}, but a patch of {tuple(patch_size)} changes its shape "
                "when turned; "
                f"set rot90_prob: 0 or make the first two sides equal"
            )
        cut = augment.crop_pos_neg if crop == "pos_neg" else augment.crop_uniform
        return partial(
            self._patch,
            cut=partial(cut, size=tuple(patch_size)),
            flip_prob=flip_prob,
            rot90_prob=rot90_prob,
            scale_prob=scale_prob,
            shift_prob=shift_prob,
        )

    def _patch(
        self,
        sample: dict,
        rng: np.random.Generator,
        *,
        cut,
        flip_prob,
        rot90_prob,
        scale_prob,
        shift_prob,
    ):
        patch = cut(sample, rng)
        patch = augment.random_flip(patch, rng, flip_prob)
        patch = augment.random_rot90(patch, rng, rot90_prob)
        patch = augment.random_scale(patch, rng, scale_prob)
        return augment.random_shift(patch, rng, shift_prob)

    def _ids(self, label: np.ndarray) -> list[int]:
        return np.unique(label).tolist()

    def _transform(self, case: Case, sample: dict) -> dict:
        """The deterministic transforms of an image, and of a label if there is one."""
        keys = tuple(sample)
        steps = []
        if self.orientation:
            steps.append(Orientationd(keys, axcodes=self.orientation, labels=_AXES))
        if self.spacing:
            steps.append(
                Spacingd(keys, pixdim=self.spacing, mode=("bilinear", "nearest")[: len(keys)])
            )
        if self.intensity == "window":
            steps.append(ScaleIntensityRanged("image", *self.window, 0.0, 1.0, clip=True))
        elif self.intensity == "zscore":
            steps.append(NormalizeIntensityd("image", channel_wise=True))
        if self.crop_foreground:
            steps.append(
                CropForegroundd(keys, source_key="image", select_fn=_positive, allow_smaller=True)
            )
        sample = Compose(steps)(sample)
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

    def _parameters(self) -> dict:
        return {
            "kind": type(self).__name__,
            "in_channels": self.in_channels,
            "ids": list(self.allowed_ids),
            "orientation": self.orientation,
            "spacing": list(self.spacing),
            "intensity": self.intensity,
            "window": list(self.window),
            "crop_foreground": self.crop_foreground,
        }


def _positive(image):
    return image > 0


def _stored_warnings(case: Case, stored: Sequence[Sequence]) -> list[Finding]:
    """What `_read_checked` noted of a case, with the names that its files have now."""
    files = [str(path) for path in (*case.images, case.label)]
    return [
        Finding(fault, files[k], found, expected, fix, WARNING)
        for k, fault, found, expected, fix in stored
    ]


def _check_orientations(affines: dict[tuple[str, Case], Sequence], report: Report) -> None:
    """A warning for each case that is stored in another axis order than most: a flipped header
    looks like that.
    """
    codes = {key: "".join(nib.aff2axcodes(np.asarray(affine))) for key, affine in affines.items()}
    counts = Counter(codes.values()).most_common()
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return
    for (split, case), code in codes.items():
        if code != counts[0][0]:
            report.warning(
                "orientation",
                case.images[0],
                f"stored as {code}",
                f"{counts[0][0]}, as {counts[0][1]} of {len(codes)} cases are",
                "check that the header is right",
                split=split,
                case=case.name,
            )
