"""BraTS: four MRI channels, three overlapping tumour regions as multi-label targets (the BraTS
recipe of ACF-BCKD).

Scans stay on their own grid (240 x 240 x 155 voxels of 1 mm): no reorientation, no resampling.
Stored ids are 1 necrotic core, 2 oedema, 3 enhancing tumour (4 in the 2021 release and before).

Training and evaluation see different intensities, as in the reference: a patch is z-scored by
itself, a volume that is evaluated by itself as a whole. `normalize: volume` gives patches the
statistics of their volume instead. The cache holds the scans as they are (16-bit where that loses
nothing, 72 MB each), and a training step reads only its patch.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from dataloaders import augment, checks
from dataloaders.cases import UNKNOWN, Case
from dataloaders.faults import CaseNotes, DataError, Finding, Report
from dataloaders.lists import read_decathlon
from dataloaders.msd import MSDDataset

CHANNELS = ("t1c", "t1n", "t2f", "t2w")
REGIONS = ("tumour core", "whole tumour", "enhancing tumour")
NORMALIZATIONS = ("crop", "volume")
# What else the channels are called in data lists, without marks and in small letters
_SYNONYMS = {
    **dict.fromkeys(("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "t1wce"), "t1c"),
    **dict.fromkeys(("t1n", "t1", "t1w", "t1native", "t1pre"), "t1n"),
    **dict.fromkeys(("t2f", "flair", "t2flair", "fla"), "t2f"),
    **dict.fromkeys(("t2w", "t2"), "t2w"),
}
_MEANINGS = {
    "cavity": r"cavit|resect|\brc\b",
    "core": r"necro|non.?enh|\bncr\b|\bnetc?\b|cyst|\bcc\b",
    "oedema": r"edema|\bed\b|snfh|flair",
    "enhancing": r"enhanc|\bet\b|active",
}
_IDS = {"1": "core", "2": "oedema", "3": "enhancing", "4": "enhancing"}
_SUFFIXES_2021 = {"t1ce": "t1c", "t1": "t1n", "flair": "t2f", "t2": "t2w"}


class BraTSDataset(MSDDataset):
    """Cases of a decathlon JSON whose `image` lists four files, in the order of CHANNELS; lists as
    for MSDDataset.

    normalize: 'crop' or 'volume', the voxels whose mean and standard deviation normalise a training
    patch.
    k_divisible: patches come from the box of the brain, enlarged to multiples of this many voxels
    per axis; 0 means the patch size (the reference: 96 for both).
    """

    multilabel = True
    fixed: ClassVar = {
        "orientation": "",
        "spacing": (),
        "intensity": "none",
        "crop_foreground": False,
        "window": (0.0, 1.0),
    }

    @classmethod
    def described(cls, root: Path, datalist: str, keys: Sequence[str]) -> dict:
        """Regions and channels are the same in every release."""
        known = {"class_names": REGIONS, "in_channels": len(CHANNELS)}
        return {key: known[key] for key in keys}

    def __init__(
        self,
        root: str,
        datalist: str,
        class_names: Sequence[str] = REGIONS,
        in_channels: int = len(CHANNELS),
        normalize: str = "crop",
        k_divisible: int = 0,
        crop: str = "uniform",
        **arguments,
    ) -> None:
        if len(class_names) != len(REGIONS):
            raise DataError(
                f"class_names: BraTS has the regions {', '.join(REGIONS)}, got {list(class_names)}"
            )
        if normalize not in NORMALIZATIONS:
            raise DataError(
                f"normalize must be one of {', '.join(NORMALIZATIONS)}, got '{normalize}'"
            )
        if k_divisible < 0:
            raise DataError(
                f"k_divisible: a number of voxels, or 0 for the patch size; got {k_divisible}"
            )
        if crop != "uniform":
            raise DataError(
                f"crop: the data format 'brats' draws patches uniformly, got '{crop}'; set crop: "
                "uniform"
            )
        self.normalize, self.k_divisible = normalize, k_divisible
        super().__init__(
            root, datalist, class_names, in_channels, crop=crop, **arguments, **self.fixed
        )

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        return (0, 1, 2, 3, 4)

    def preprocess(self, case: Case) -> dict:
        """What the cache holds: `image` (C, H, W, D) as stored, `label` ids (1, H, W, D), per
        channel the `mean` and `std` of the non-zero voxels, the brain's `box` (first and one past
        the last voxel), and the grid's keys.
        """
        image, label, affine, notes = self._read_checked(case)
        if label is not None and {3, 4} <= set(np.unique(label).tolist()):
            raise DataError(
                Finding(
                    "label ids",
                    str(case.label),
                    "both ids 3 and 4: those of another release (after treatment 4 is the "
                    "resection cavity, of children it is oedema)",
                    "1 necrotic core, 2 oedema, 3 or 4 enhancing tumour",
                    "map the ids, or set format: nnunet with regions of your own",
                )
            )
        brain = (image > 0).any(0)
        if not brain.any():
            raise DataError(
                Finding(
                    "no foreground",
                    str(case.images[0]),
                    "no channel has a value above 0",
                    "a brain to crop to",
                    "give the scan as it was released, skull-stripped, with air at 0",
                )
            )
        if label is not None:
            self._check_box(case, label, brain, notes)
        occupied = [np.flatnonzero(brain.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        mean, std = _statistics(image)
        short = np.abs(image).max() < 2**15 and bool((image == np.rint(image)).all())
        ids = {}
        if label is not None:
            ids = {"label": label[None], "ids": self._ids(label)}
        if label is not None and self.ignore_label is not None:
            ids["unknown"] = float(np.mean(label == UNKNOWN))
        return {
            "image": image.astype(np.int16) if short else image,
            "mean": mean,
            "std": std,
            "box": [
                [int(found[0]) for found in occupied],
                [int(found[-1]) + 1 for found in occupied],
            ],
            "affine": affine,
            "spacing": np.linalg.norm(affine[:3, :3], axis=0).tolist(),
            "native_affine": affine,
            "native_shape": list(image.shape[1:]),
            **ids,
            **self._seen(case, notes),
        }

    def _check_box(
        self, case: Case, label: np.ndarray, brain: np.ndarray, notes: CaseNotes
    ) -> None:
        """A warning about labelled voxels outside of the brain's box, which patches come from."""
        box = np.ix_(*(_extent(brain.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)))
        before, left = (
            dict(enumerate(np.bincount(ids.ravel(), minlength=256).tolist()))
            for ids in (label, label[box])
        )
        cause, fix = "outside of the brain's box lie", "check that image and label belong together"
        checks.check_kept(case.label, before, left, self.id_titles(), cause, fix, notes)

    def read(self, case: Case) -> dict:
        """The case as it is evaluated: the whole volume, z-scored; label regions (3, H, W, D)
        uint8.
        """
        sample = self.cache.read(case)
        image = _standardise(
            np.asarray(sample["image"], np.float32), sample.pop("mean"), sample.pop("std")
        )
        del sample["box"]  # what is normalised already must not serve as a training sample
        known = {"label": self.encoded(sample["label"])} if "label" in sample else {}
        return sample | {"image": image} | known

    def preprocess_image(
        self, case: Case, image: np.ndarray, affine: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The whole volume z-scored, on its own grid."""
        _check_order(case)
        return _standardise(image, *_statistics(image)), affine

    def channel_of(self, name: str) -> tuple[str, int] | None:
        """Also the releases' own names: CASE-t1c or CASE_t1ce, ...; segmentations beside them are
        no channels.
        """
        scan, separator, suffix = name.replace("_", "-").rpartition("-")
        suffix = _SUFFIXES_2021.get(suffix.lower(), suffix.lower())
        if separator and suffix in (*CHANNELS, "seg"):
            return name[: len(scan)], CHANNELS.index(suffix) if suffix in CHANNELS else -1
        return super().channel_of(name)

    def structures(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.class_names, ((1, 3), (1, 2, 3), (3,))))

    def id_titles(self) -> dict[int, str]:
        return {k: name for k, name in self.id_names().items() if k} | {4: "enhancing tumour"}

    def sections(self, report: Report | None) -> dict[str, list[Case]]:
        """As MSDDataset's; what the JSON says of channels and ids is compared with the format."""
        if report is not None:
            with report.catching():
                path = self.root / self.datalist
                check_description(path, read_decathlon(path), report)
        return super().sections(report)

    def check_labels(self, facts: dict[tuple[str, Case], dict], report: Report) -> None:
        """Also: all cases are of one release. It is told by the ids and by the names of files."""
        super().check_labels(facts, report)
        having = {
            k: [key for key, found in facts.items() if k in (found["ids"] or ())] for k in (3, 4)
        }
        for split, case in having[4] if having[3] else ():
            report.error(
                "label ids",
                case.label,
                f"id 4, and {len(having[3])} other cases have id 3",
                "enhancing tumour as 3 in all cases, or as 4 in all",
                "map the ids of one release to those of the other (4 is another structure in "
                "releases of 2024 and later)",
                split=split,
                case=case.name,
            )
        for split, case in having[4] if not having[3] else ():
            if case.images[0].name.split(".")[0].endswith("-t1c"):
                report.warning(
                    "label ids",
                    case.label,
                    "id 4 beside file names of 2023 and later, where enhancing tumour is 3",
                    "enhancing tumour, as which 4 is read",
                    "make sure that it is no resection cavity and no oedema",
                    split=split,
                    case=case.name,
                )
        for split, case in facts:
            if "-ped-" in case.name.lower():
                report.warning(
                    "label ids",
                    case.label or case.images[0],
                    "a case of the paediatric data, whose ids differ between releases",
                    "1 necrotic core, 2 oedema, 3 or 4 enhancing tumour",
                    "compare them with the description of the release",
                    split=split,
                    case=case.name,
                )

    def id_names(self) -> dict[int, str]:
        return {0: "background", 1: "necrotic core", 2: "oedema", 3: "enhancing tumour"}

    def sample(self, case: Case) -> dict:
        """The case as patches are cut from it: memory-mapped, not normalised."""
        return self.cache.read(case)

    def encode_label(self, label: np.ndarray) -> np.ndarray:
        """Stored ids (1, H, W, D) -> the regions tumour core, whole tumour, enhancing tumour, (3,
        H, W, D) uint8.
        """
        ids = np.asarray(label)[0]
        enhancing = (ids == 3) | (ids == 4)
        core = (ids == 1) | enhancing
        return np.stack([core, core | (ids == 2), enhancing]).astype(np.uint8)

    def _check_case(self, case: Case) -> None:
        _check_order(case)

    def present(self, ids: Sequence[int]) -> set[int]:
        regions = self.encode_label(np.asarray(ids)[None])
        return set(np.flatnonzero(regions.any(1)).tolist())

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Regions (3, H, W, D) -> ids (H, W, D), enhancing tumour as 3; later regions are painted
        over earlier ones.
        """
        core, whole, enhancing = (np.asarray(region) > 0 for region in prediction)
        ids = np.zeros(core.shape, np.uint8)
        ids[whole] = 2
        ids[core] = 1
        ids[enhancing] = 3
        return ids

    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        return self.turn(self.cut(sample, rng), rng)

    def cut(self, sample: dict, rng: np.random.Generator) -> dict:
        """A random crop of which every position in the brain's enlarged box is equally likely; it
        may reach beyond the volume (zeros).
        """
        if "box" not in sample:
            raise ValueError("BraTS patches are cut from sample(case), not from read(case)")
        size = self.patch_size
        low, high = enlarge(*sample["box"], [self.k_divisible or side for side in size])
        start = [int(rng.integers(a, max(b - side, a) + 1)) for a, b, side in zip(low, high, size)]
        image = crop_padded(sample["image"], start, size).astype(np.float32)
        if self.normalize == "volume":
            image = _standardise(image, sample["mean"], sample["std"])
        else:
            image = augment.zscore_nonzero(image)
        return {"image": image, "label": self.encoded(crop_padded(sample["label"], start, size))}


def _extent(found: np.ndarray) -> np.ndarray:
    """Numbers from the first True to the last."""
    places = np.flatnonzero(found)
    return np.arange(places[0], places[-1] + 1)


def _meaning(name: str) -> str:
    """Which part of a tumour a name speaks of; '' for others."""
    name = name.lower()
    for meaning, pattern in _MEANINGS.items():
        if re.search(pattern, name):
            return meaning
    return ""


def check_description(path: Path, content: dict, report: Report) -> None:
    """Errors where a data set's JSON says that its channels or ids are others than the format's."""
    modality = content.get("modality", {})
    if isinstance(modality, dict):
        modality = [modality[key] for key in sorted(modality, key=_number)]
    names = [re.sub(r"[^a-z0-9]", "", str(name).lower()) for name in modality]
    found = [_SYNONYMS.get(name, name) for name in names]
    if sorted(found) == sorted(CHANNELS) and tuple(found) != CHANNELS:
        report.error(
            "channels",
            path,
            f"'modality' lists the channels as {', '.join(map(str, modality))}",
            f"the order {', '.join(CHANNELS)}",
            "write the channels in this order, or set format: msd or nnunet",
        )
    labels = content.get("labels", {})
    labels = labels if isinstance(labels, dict) else {}
    for key, value in labels.items():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        said, meant = _meaning(str(name)), _IDS.get(str(number), "")
        if said and said != meant:
            report.error(
                "label ids",
                path,
                f"'labels' says that {number} is '{name}'",
                "1 necrotic core, 2 oedema, 3 or 4 enhancing tumour",
                "map the ids, or set format: nnunet with regions of your own",
            )


def _number(key: object) -> int:
    return int(key) if str(key).isdecimal() else -1


def enlarge(
    low: Sequence[int], high: Sequence[int], multiple: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The box low..high-1 enlarged to multiples of `multiple` per axis; half of the excess, rounded
    down, in front.
    """
    sides = [-(-(b - a) // k) * k for a, b, k in zip(low, high, multiple)]
    first = [a - (side - (b - a)) // 2 for a, b, side in zip(low, high, sides)]
    return first, [a + side for a, side in zip(first, sides)]


def crop_padded(array: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """`size` voxels of the trailing three axes from `start`, which may be negative; zeros beyond
    the array.
    """
    inner, padding = [], []
    for first, want, have in zip(start, size, array.shape[-3:]):
        begin = min(max(first, 0), have)
        end = max(min(first + want, have), begin)
        before = min(max(-first, 0), want)
        inner.append(slice(begin, end))
        padding.append((before, want - before - (end - begin)))
    return np.pad(np.asarray(array[(..., *inner)]), [(0, 0)] * (array.ndim - 3) + padding)


def _statistics(image: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the non-zero voxels of each channel; 1 in place of a deviation
    of 0.
    """
    inside = [channel[channel != 0].astype(np.float64) for channel in image]
    return [float(values.mean()) for values in inside], [
        float(values.std()) or 1.0 for values in inside
    ]


def _standardise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(image - mean) / std per channel where it is not 0; zeros stay zero. A new array."""
    result = np.zeros_like(image)
    for channel, target, centre, spread in zip(image, result, mean, std):
        np.copyto(target, (channel - np.float32(centre)) / np.float32(spread), where=channel != 0)
    return result


def _check_order(case: Case) -> None:
    """DataError if the file names end in the known channel names, but in another order."""
    suffixes = [
        path.name.split(".")[0].replace("_", "-").rsplit("-", 1)[-1].lower() for path in case.images
    ]
    found = [_SUFFIXES_2021.get(suffix, suffix) for suffix in suffixes]
    if sorted(found) == sorted(CHANNELS) and tuple(found) != CHANNELS:
        raise DataError(
            Finding(
                "channels",
                str(case.images[0]),
                f"the channels of '{case.name}' are listed as {', '.join(suffixes)}",
                "",
                "the order must be t1c, t1n, t2f, t2w (2021 release: t1ce, t1, flair, t2); mend "
                "the data list",
            )
        )
