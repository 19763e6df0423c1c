"""What the semi-supervised data sets share: labelled and unlabelled lists, units in memory, HDF5
files with checks.
"""

import abc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from dataloaders.cases import Case, DataError, check_disjoint, patient_function, read_split
from dataloaders.faults import (
    ERROR,
    CaseNotes,
    Finding,
    Report,
    check_classes,
    check_duplicates,
    gathering,
    no_file,
    placed,
    unreadable,
)


class SemiDataset(abc.ABC):
    """Names in lists -> cases; of the training names some count as labelled, all others as
    unlabelled.

    split_dir: folder with train.txt, val.txt and test.txt. patch_size: what `weak` and
    `labelled_patch` return.
    memory_gb: training units that `prepare` and `read` keep in memory, so that no step reads a
    file; 0 keeps none.
    patient_pattern: regular expression whose group 1 is the patient in a name, '' for the usual
    conventions.
    absent_classes: those that the labelled list may lack.
    """

    multilabel = False
    dims = 3  # axes of what a network is trained on
    in_channels = 1
    unit = "case"  # what a line of the lists names
    needs_val = True
    allow_outside = False  # whether lists may name files outside of root
    pads = False  # whether units smaller than the patch are padded, rather than resized
    repeats = ERROR  # level of an image that is there twice in one list

    def __init__(
        self,
        root: str,
        split_dir: str,
        patch_size: Sequence[int],
        class_names: Sequence[str],
        memory_gb: float,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
    ) -> None:
        if not patch_size or min(patch_size) < 1:
            raise DataError(f"patch_size must be positive whole numbers, got {list(patch_size)}")
        if memory_gb < 0:
            raise DataError(f"memory_gb must be 0 or more, got {memory_gb}")
        if len(class_names) < 2:
            raise DataError(
                "class_names must hold the background and at least one class, got "
                f"{list(class_names)}"
            )
        self.root, self.split_dir = Path(root), Path(split_dir)
        self.patch_size, self.class_names = tuple(patch_size), tuple(class_names)
        self.patient, self.absent_classes = patient_function(patient_pattern), tuple(absent_classes)
        self._room = int(memory_gb * 1e9)  # bytes
        self._memory: dict[Case, dict] = {}

    @property
    def num_classes(self) -> int:
        """Channels of the logits, background included."""
        return len(self.class_names)

    def splits(
        self, labelled: int | float | None = None, report: Report | None = None
    ) -> dict[str, list[Case]]:
        """Cases of `labelled`, `unlabelled`, `val` and `test`.

        labelled: whole number = that many of the train list; fraction below 1 = that share of it,
        rounded down; None or 1.0 = all. Unlabelled is always what remains: lists of it that are
        shipped with the data are never read.
        report: takes the faults, and the lists have what is left; where it is None, they are raised
        together.
        """
        if not self.root.is_dir():
            raise DataError(
                Finding(
                    "list",
                    str(self.root),
                    "no such folder",
                    "",
                    "put the data set there (docs/data.md) or name its folder with --opts "
                    "data_root=FOLDER",
                )
            )
        with gathering(report) as report:
            lists = self._lists(report)
            named: dict[str, list[Case]] = {split: [] for split in lists}
            for split, names in lists.items():
                for name in names:
                    with report.catching():
                        named[split].append(Case(name, ()))
            lists = {split: [case.name for case in cases] for split, cases in named.items()}
            check_disjoint(named, report, self.patient)
            chosen = self._choose(lists["train"], labelled, report) if lists["train"] else []
            kept = set(chosen)
            rest = [name for name in lists["train"] if name not in kept]
            result = {
                "labelled": self._training_cases(chosen, report),
                "unlabelled": self._training_cases(rest, report),
                "val": self._evaluation_cases(lists["val"], report),
                "test": self._evaluation_cases(lists["test"], report),
            }
            # A name in two lists is reported already; here one file may be met under two names.
            counts = Counter(name for names in lists.values() for name in names)
            once = {
                split: [c for c in cases if counts[self.named(c)] == 1]
                for split, cases in result.items()
            }
            check_disjoint(once, report)
        return result

    def prepare(
        self, splits: dict[str, Sequence[Case]], report: Report | None = None
    ) -> list[Finding]:
        """Read every training unit and evaluation case once, with a progress bar, check them
        together -> the warnings.

        splits: of `labelled` and `unlabelled` units are read, which fills the memory, of `val` and
        `test` cases. DataError that lists every fault, or with `report` the faults are noted there.
        """
        jobs = [
            (split, case, self.read)
            for split in ("labelled", "unlabelled")
            for case in splits.get(split, [])
        ]
        jobs += [
            (split, case, self.read_volume)
            for split in ("val", "test")
            for case in splits.get(split, [])
        ]
        with gathering(report) as report:
            noted: dict[tuple[str, Case], CaseNotes] = {}
            for split, cases in splits.items():
                report.count(split, len(cases), "files")
            for split, case, read in tqdm(
                jobs, desc="reading the data", unit="file", disable=not jobs
            ):
                with report.catching(split, case.name):
                    notes = CaseNotes()
                    self._check_size(case, read(case, notes), notes)
                    noted[split, case] = notes
            for (split, case), notes in noted.items():
                report.take(placed(notes.findings, split, case.name))
            self._check_empty(
                {case: (split, notes.ids) for (split, case), notes in noted.items()}, report
            )
            lists = {"labelled": "train", "unlabelled": "train"}
            seen = (
                (lists.get(split, split), self.named(case), case.images[0], notes.content)
                for (split, case), notes in noted.items()
            )
            check_duplicates(seen, report, self.repeats)
            labelled = [notes.ids for (split, _), notes in noted.items() if split == "labelled"]
            # only where all were read: a class may be in a file that was not
            if labelled and len(labelled) == len(splits["labelled"]):
                ids = {number for found in labelled for number in found}
                classes = dict(enumerate(self.class_names[1:], 1))
                check_classes(
                    ids,
                    classes,
                    self.absent_classes,
                    f"{self.split_dir}/train.txt, labelled",
                    report,
                )
        return report.warnings

    def read(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """One training unit: image (C, *spatial) float32, label (1, *spatial) uint8; not to be
        written to.

        notes: takes what is noted where the unit is read from its file.
        """
        stored = self._memory.get(case)
        if stored is None:
            stored = self._load(case, notes)
            size = sum(array.nbytes for array in stored.values())
            if size <= self._room:
                self._memory[case] = stored
                self._room -= size
        return self._sample(stored)

    def named(self, case: Case) -> str:
        """The line of a list that a case belongs to."""
        return case.name

    def _check_size(self, case: Case, sample: dict, notes: Report) -> None:
        shape = sample["label"].shape[1:]
        if self.pads and any(side < want for side, want in zip(shape, self.patch_size)):
            notes.warning(
                "small",
                case.images[0],
                f"{' x '.join(map(str, shape))} voxels",
                f"at least the patch, {' x '.join(map(str, self.patch_size))}",
                "patches are padded with zeros",
            )

    def _check_empty(self, ids: dict[Case, tuple[str, set[int]]], report: Report) -> None:
        """A warning for each label without foreground. ids: case -> its list, the ids of its
        label.
        """
        for case, (split, found) in ids.items():
            if not found - {0}:
                report.warning(
                    "empty label",
                    case.label,
                    "no foreground",
                    "a labelled voxel",
                    "check that it is meant so",
                    split=split,
                    case=case.name,
                )

    @abc.abstractmethod
    def find(self, names: Sequence[str]) -> list[Case]:
        """The evaluation cases called `names`; DataError naming those that are not there."""

    @abc.abstractmethod
    def read_volume(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """An evaluation case on its own grid: image (C, *spatial), label (1, *spatial), spacing."""

    def read_unlabelled(self, case: Case) -> dict:
        """A file without a label, of a kind that people have, as the network's data are: `image` as
        `read_volume` has it, float32, and what the way back to the file's own grid takes.
        """
        raise DataError(
            f"{case.images[0]}: {type(self).__name__} has no `read_unlabelled`, new files cannot "
            "be read"
        )

    def channel_of(self, name: str) -> None:
        """None: each file is a whole scan (see MSDDataset.channel_of)."""
        return None

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Prediction -> ids as label files hold them: the same."""
        return prediction

    def structures(self) -> dict[str, tuple[int, ...]]:
        """Name of each class but the background: its id."""
        return {name: (k,) for k, name in enumerate(self.class_names) if k}

    def id_names(self) -> dict[int, str]:
        """Names of the ids."""
        return dict(enumerate(self.class_names))

    @abc.abstractmethod
    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """The weak view: random geometry of image and label."""

    @abc.abstractmethod
    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """The strong view of a weak one: random intensities, the same geometry."""

    def labelled_patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """What a labelled unit is trained on: the weak view."""
        return self.weak(sample, rng)

    def views(self, sample: dict, rng: np.random.Generator, strong_views: int = 1) -> dict:
        """An unlabelled unit: `weak` and `label` of one geometry, and `strong0`, `strong1`, ...
        that start from it.

        The label is for monitoring pseudo-labels; no method trains on it.
        """
        weak = self.weak(sample, rng)
        strong = {f"strong{k}": self.strong(weak, rng)["image"] for k in range(strong_views)}
        return {"weak": weak["image"], **strong, "label": weak["label"]}

    def view_function(self, strong_views: int) -> Callable[[dict, np.random.Generator], dict]:
        """`views` as a function of (sample, rng)."""
        return partial(self.views, strong_views=strong_views)

    @abc.abstractmethod
    def _load(self, case: Case, notes: CaseNotes | None) -> dict[str, np.ndarray]:
        """The arrays of a training unit as they are kept in memory."""

    def _sample(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(stored)

    @abc.abstractmethod
    def _training_cases(self, names: Sequence[str], report: Report) -> list[Case]: ...

    @abc.abstractmethod
    def _evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]: ...

    def _lists(self, report: Report) -> dict[str, list[str]]:
        lists = {
            split: read_split(self.split_dir, split, report) for split in ("train", "val", "test")
        }
        for split in ("train", "val") if self.needs_val else ("train",):
            if lists[split] is None:
                report.error(
                    "list",
                    f"{self.split_dir / split}.txt",
                    "no such list",
                    f"one {self.unit} per line",
                    "set split_dir to the folder that has it",
                )
        return {split: names or [] for split, names in lists.items()}

    def _choose(
        self, train: Sequence[str], labelled: int | float | None, report: Report
    ) -> list[str]:
        """Prefix of the train list, as every published table takes it."""
        return list(
            train[: labelled_count(labelled, len(train), f"{self.split_dir}/train.txt", self.unit)]
        )


def labelled_count(labelled: int | float | None, total: int, source: str, unit: str) -> int:
    """How many of `total` units are labelled: a count, a fraction rounded down, or None or 1.0 for
    all of them.
    """
    if labelled is None:
        return total
    expected = f"expected 1..{total} or a fraction of 1, such as 0.1"
    if isinstance(labelled, bool) or not isinstance(labelled, (int, float)) or not labelled > 0:
        raise DataError(f"labelled is {labelled!r}; {expected}")
    if isinstance(labelled, float) and labelled <= 1:
        count = int(labelled * total + 1e-9)  # 0.29 * 100 is 28.999...
        if count < 1:
            raise DataError(
                f"labelled is {labelled}, which is less than one {unit} of the {total} in {source}"
            )
        return count
    if labelled != int(labelled):
        raise DataError(f"labelled is {labelled}; {expected}")
    if labelled > total:
        raise DataError(
            f"labelled is {int(labelled)}, but {source} has only {total} {unit}s; {expected}"
        )
    return int(labelled)


def read_h5(
    path: Path,
    num_classes: int,
    ndim: int,
    index: int | None = None,
    notes: CaseNotes | None = None,
    limits: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`image` float32 and `label` uint8 of an HDF5 file, or of its slice `index`; DataError with
    all that is wrong.

    Other keys are ignored. `ndim` is that of the stored arrays. limits: of the intensities.
    Warnings go to `notes`.
    """
    if not path.is_file():
        raise DataError(no_file(path))
    faults = Report()
    try:
        with h5py.File(path) as file:
            missing = [
                key for key in ("image", "label") if not isinstance(file.get(key), h5py.Dataset)
            ]
            if missing:
                raise DataError(
                    Finding(
                        "keys",
                        str(path),
                        f"no array '{missing[0]}', found {sorted(file)}",
                        "the keys 'image' and 'label'",
                        "convert the case again",
                    )
                )
            shapes = file["image"].shape, file["label"].shape
            if shapes[0] != shapes[1] or len(shapes[0]) != ndim:
                faults.error(
                    "shape",
                    path,
                    f"image has shape {shapes[0]}, label {shapes[1]}",
                    f"the same {ndim} axes for both",
                    "convert the case again",
                )
            elif index is not None and index >= shapes[0][0]:
                faults.error(
                    "shape",
                    path,
                    f"{shapes[0][0]} slices",
                    f"at least {index + 1}",
                    "copy the file again",
                )
            for key in ("image", "label"):
                if file[key].dtype.kind not in "fiub":
                    faults.error(
                        "type",
                        path,
                        f"'{key}' is of type {file[key].dtype}",
                        "numbers",
                        "convert the case again",
                    )
            part = () if index is None or faults.errors else index
            arrays = {
                key: np.asarray(file[key][part])
                for key in ("image", "label")
                if file[key].dtype.kind in "fiub"
            }
    except (OSError, RuntimeError) as error:  # h5py reports damage inside a file as either
        raise DataError(unreadable(path, error)) from error
    image, label = arrays.get("image"), arrays.get("label")
    if image is not None:
        _check_intensities(path, image.astype(np.float32), limits, faults)
    if label is not None:
        wrong = [value for value in np.unique(label).tolist() if value not in range(num_classes)]
        if wrong:
            faults.error(
                "label ids",
                path,
                f"label ids {wrong[:6]}",
                f"only 0..{num_classes - 1}",
                "mend the label or class_names",
            )
    faults.stop()
    if notes is not None:
        if image.dtype.kind != "f":
            notes.warning(
                "type",
                path,
                f"'image' is of type {image.dtype}",
                "floating point, normalised",
                "check that intensities are normalised as the data set's are",
            )
        if label.dtype.kind == "f":
            notes.warning(
                "type",
                path,
                f"'label' is of type {label.dtype}",
                "whole numbers",
                "store ids as 8-bit integers",
            )
    return np.asarray(image, np.float32), label.astype(np.uint8)


def _check_intensities(
    path: Path, image: np.ndarray, limits: tuple[float, float] | None, faults: Report
) -> None:
    if not np.isfinite(image).all():
        bad = int(image.size - np.isfinite(image).sum())
        faults.error(
            "not finite",
            path,
            f"{bad} voxels are NaN or infinite",
            "finite intensities",
            "repair the scan",
        )
    elif image.size == 0 or image.min() == image.max():
        faults.error(
            "constant",
            path,
            f"constant image, shape {image.shape}",
            "",
            "the scan is empty, take it out of the lists",
        )
    elif limits and not limits[0] - 1e-6 <= image.min() <= image.max() <= limits[1] + 1e-6:
        faults.error(
            "range",
            path,
            f"intensities {image.min():.4g}..{image.max():.4g}",
            f"{limits[0]:g}..{limits[1]:g}",
            "scale each volume with (x - min) / (max - min)",
        )
