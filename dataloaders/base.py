"""One data set: which cases it has, and how they become what networks are trained and scored on.

A file of this folder per format says how its cases are found and read. The rest is here and the
same for all: lists, labelled and unlabelled cases, checks of the whole. A sample is a dict with
`image` (C, *spatial) float32 and, where the case has one, `label` (1 or K, *spatial) uint8.
"""

import abc
import fnmatch
import hashlib
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from dataloaders import augment, checks
from dataloaders.cases import UNKNOWN, Case
from dataloaders.faults import ERROR, CaseNotes, DataError, Finding, Report, gathering, placed
from dataloaders.lists import find_scans, labelled_count, patient_function, read_split
from dataloaders.volumes import to_native

SPLITS = ("labelled", "unlabelled", "val", "test")


class Dataset(abc.ABC):
    """Names in lists -> cases; of the training list some count as labelled, others as unlabelled.

    split_dir: folder with train.txt, val.txt and test.txt. patch_size: of what `patch` and `views`
    return. patient_pattern: regular expression whose group 1 is the patient in a name, '' for the
    usual conventions (lists.patient_function). absent_classes: those that no labelled case need
    have. unlabelled: a folder of further cases without labels, or 'test' for those of the data
    set's own test list. ignore_label: id of voxels that nobody labelled, None: there are none.
    labelled_classes: pattern of case names, such as 'amos_*' -> names or ids of the classes, or
    names of the regions, that the labels of these cases tell; the first that fits counts, a case
    without one has all. The label that `read` and `patch` give holds UNKNOWN where nobody labelled.
    """

    dims = 3  # axes of what a network is trained on
    in_channels = 1
    multilabel = False  # whether classes are regions that may overlap, without a background
    unit = "case"  # what a line of the lists names
    # mm: scores are on the grid of `native`; voxels or pixels: on that of `read`, without a spacing
    distance_unit = "voxels"
    title = "{split} cases"  # what messages count
    needs_val = True
    needs_labels = True  # whether some training case must have one
    caches = False  # whether `prepare` makes files that other processes then find
    pads = False  # whether cases smaller than the patch are padded, rather than resized
    repeats = ERROR  # level of an image that is there twice in one list
    described_keys: tuple[str, ...] = ()  # arguments that `described` knows
    fixed: ClassVar[dict] = {}  # arguments of a base class that a format does not leave open
    allow_outside = False  # whether lists may name files outside of root

    @classmethod
    def described(cls, root: Path, datalist: str, keys: Sequence[str]) -> dict:
        """Values of `keys`, which are among `described_keys`, as the data set itself tells them."""
        return {}

    @classmethod
    def accepted(cls) -> set[str]:
        """Names of the arguments of the constructor, those of its bases with `**`."""
        names: set[str] = set()
        for base in cls.__mro__:
            if "__init__" in vars(base):
                parameters = inspect.signature(base.__init__).parameters.values()
                names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
                if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                    break
        return names - {"self", *cls.fixed}

    def __init__(
        self,
        root: str,
        split_dir: str,
        class_names: Sequence[str],
        patch_size: Sequence[int] = (),
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        unlabelled: str = "",
        ignore_label: int | None = None,
        labelled_classes: Mapping[str, Sequence[str | int]] | None = None,
    ) -> None:
        if len(class_names) < (1 if self.multilabel else 2):
            raise DataError(
                "class_names must hold the background and at least one class, got "
                f"{list(class_names)}"
            )
        if patch_size and min(patch_size) < 1:
            raise DataError(f"patch_size must be positive whole numbers, got {list(patch_size)}")
        self.root, self.split_dir = Path(root), Path(split_dir)
        self.class_names, self.patch_size = tuple(class_names), tuple(patch_size)
        self.patient, self.absent_classes = patient_function(patient_pattern), tuple(absent_classes)
        self.unlabelled, self.ignore_label = unlabelled, ignore_label
        if ignore_label is not None:
            checks.check_ignore_label(ignore_label, self.stored_ids)
        self.labelled_classes = {
            str(pattern): self._numbers(classes, f"labelled_classes of '{pattern}'")
            for pattern, classes in (labelled_classes or {}).items()
        }

    # Classes

    @property
    def num_classes(self) -> int:
        """Channels of the logits: background included, or the number of regions."""
        return len(self.class_names)

    @property
    def classes(self) -> dict[int, str]:
        """Number -> name of what is scored: the foreground classes, or the regions."""
        if self.multilabel:
            return dict(enumerate(self.class_names))
        return dict(enumerate(self.class_names[1:], 1))

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """Ids that a label file may hold."""
        return tuple(range(len(self.class_names)))

    @property
    def stored_ids(self) -> dict[int, str]:
        """What the ids of a label file stand for, in words."""
        names = {} if self.multilabel else dict(enumerate(self.class_names))
        return {k: f"the class '{names[k]}'" if k in names else "a class" for k in self.allowed_ids}

    @property
    def incomplete(self) -> bool:
        """Whether labels may have voxels that nobody labelled, or lack classes."""
        return self.ignore_label is not None or bool(self.labelled_classes)

    def annotated(self, case: Case) -> np.ndarray:
        """Which classes, the background included, or regions the label of a case tells: (K,) bool.
        DataError for names that the data set does not have.
        """
        numbers = None
        if case.classes is not None:
            numbers = self._numbers(case.classes, f"labelled_classes of case '{case.name}'")
        else:
            found = (p for p in self.labelled_classes if fnmatch.fnmatchcase(case.name, p))
            numbers = self.labelled_classes.get(next(found, ""))
        told = np.full(self.num_classes, numbers is None)
        told[list(numbers or ())] = True
        told[:1] |= not self.multilabel
        return told

    def _numbers(self, classes: Sequence[str | int], source: str) -> tuple[int, ...]:
        """Numbers of classes or regions that are named, or given as ids; `source` begins errors."""
        names = list(self.class_names)
        # ids of regions are another matter: those of label files are in several of them
        known = [*names, *(() if self.multilabel else range(len(names)))]
        listed = isinstance(classes, (list, tuple))
        # 1.0 and True equal the id 1, but are none
        wrong = (
            [c for c in classes if c not in known or type(c) not in (str, int)] if listed else []
        )
        if not listed or not classes or wrong:
            found = f"{wrong[0]!r}, which is none" if wrong else repr(classes)
            kind = "names of" if self.multilabel else "names or ids of"
            shown = dict(enumerate(names)) if not self.multilabel else names
            raise DataError(
                Finding("list", source, found, f"a list of {kind} {shown}", "mend the list")
            )
        numbers = tuple(names.index(c) if isinstance(c, str) else c for c in classes)
        if not self.multilabel and set(numbers) == {0}:
            fix = "such a case is one without a label: take its label out"
            raise DataError(
                Finding("list", source, f"'{names[0]}' alone", "at least one other class", fix)
            )
        return numbers

    def _around(self, names: Sequence[str]) -> list[str]:
        """Regions that have one of these within them: the label of the inner one alone shows a part
        of them.
        """
        ids = {name: set(own) for name, own in self.structures().items()}
        inner = [ids[name] for name in names if name in ids]
        return [name for name, own in ids.items() if any(part < own for part in inner)]

    def present(self, ids: Iterable[int]) -> set[int]:
        """Which of `classes` a label with these `ids` has."""
        return set(ids)

    def structures(self) -> dict[str, tuple[int, ...]]:
        """What a prediction shows, by name: the ids that it is made of in what `decode_prediction`
        gives.
        """
        return {name: (k,) for k, name in enumerate(self.class_names) if k}

    def id_names(self) -> dict[int, str]:
        """Names of the ids that `decode_prediction` gives."""
        return dict(enumerate(self.class_names))

    def decode_prediction(self, prediction: np.ndarray) -> np.ndarray:
        """Prediction -> ids as label files hold them; the same, unless it is of regions."""
        return prediction

    def channel_of(self, name: str) -> tuple[str, int] | None:
        """Name of a channel's file, without suffix -> name of its scan and number of the channel
        (below 0: none that a network sees); None where each file is a whole scan.
        """
        return None

    # Lists

    def splits(
        self, labelled: int | float | None = None, report: Report | None = None
    ) -> dict[str, list[Case]]:
        """Cases of `labelled`, `unlabelled`, `val` and `test`, checked to be disjoint.

        labelled: whole number = that many of the train list; fraction below 1 = that share of it,
        rounded down; None or 1.0 = all; always of those that have a label. Unlabelled is what
        remains of it, whatever unlabelled.txt names, and the folder `unlabelled`; other lists that
        are shipped with the data are never read. report: takes the faults, and the lists have what
        is left; where it is None, they are raised together.
        """
        checks.check_folder(self.root)
        with gathering(report) as report:
            named: dict[str, list[Case]] = {}
            for split, names in self.lists(report).items():
                named[split] = []
                for name in names:
                    with report.catching():
                        named[split].append(Case(name, ()))
            checks.check_disjoint(named, report, self.patient)
            lists = {split: [case.name for case in cases] for split, cases in named.items()}
            having = [name for name in lists["train"] if self.has_label(name)]
            if lists["train"] and (having or self.needs_labels):
                checks.check_labelled(lists["train"], having, self.source, self.unit, report)
            chosen = self.choose(having, labelled, report) if having else []
            kept = set(chosen)
            rest = [name for name in lists["train"] if name not in kept] + lists["unlabelled"]
            listed = {name for names in lists.values() for name in names}
            more = self.unlisted(listed, report)
            result = {
                "labelled": self.training_cases(chosen, report),
                "unlabelled": self.training_cases(rest, report) + more,
                "val": self.evaluation_cases(lists["val"], report),
                "test": self.evaluation_cases(lists["test"], report),
            }
            self._check_annotations(result, report)
            # A name in two lists is reported already; here one file may be met under two names.
            counts = Counter(name for names in lists.values() for name in names)
            once = {
                split: [c for c in cases if counts[self.named(c)] <= 1]
                for split, cases in result.items()
            }
            checks.check_disjoint(once, report)
            if more:
                tested = {split: result[split] for split in ("val", "test")}
                # files of a folder are named after scans or slices, lists may name patients
                checks.check_disjoint(
                    {"unlabelled": more, **tested}, report, self.patient, self.named
                )
        return result

    def _check_annotations(self, splits: Mapping[str, list[Case]], report: Report) -> None:
        """A fault for each case with classes that there are not, and each pattern without cases."""
        for split, cases in splits.items():
            for case in cases:
                with report.catching(split, case.name):
                    self.annotated(case)
        names = [case.name for cases in splits.values() for case in cases]
        for pattern in self.labelled_classes:
            if not fnmatch.filter(names, pattern):
                report.error(
                    "unknown case",
                    "labelled_classes",
                    f"no case fits the pattern '{pattern}'",
                    "",
                    f"names look like {', '.join(names[:3])}",
                )

    def lists(self, report: Report) -> dict[str, list[str]]:
        """The names of `train`, `unlabelled`, `val` and `test`, as the lists or the data set have
        them.
        """
        names = ("train", "unlabelled", "val", "test")
        lists = {split: read_split(self.split_dir, split, report) for split in names}
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

    @property
    def source(self) -> str:
        """Where the training list is, for messages."""
        return f"{self.split_dir}/train.txt"

    def choose(
        self, train: Sequence[str], labelled: int | float | None, report: Report
    ) -> list[str]:
        """The labelled names of the train list: its beginning, as every published table has it."""
        return list(train[: labelled_count(labelled, len(train), self.source, self.unit)])

    def has_label(self, name: str) -> bool:
        """Whether what a line of the train list names has a label, as far as a glance can tell."""
        return True

    def unlisted(self, listed: set[str], report: Report) -> list[Case]:
        """Training cases without labels that are in no list: those of `unlabelled`."""
        if self.unlabelled == "test":
            raise DataError(
                f"unlabelled: 'test' is for lists of scans; {type(self).__name__} takes a folder"
            )
        return self.folder_cases(Path(self.unlabelled), report) if self.unlabelled else []

    def folder_cases(self, folder: Path, report: Report) -> list[Case]:
        """Training cases of the files in a folder, none of which has a label."""
        cases, problems = find_scans(folder, self.in_channels, self.channel_of)
        report.take(problems)
        return cases

    def named(self, case: Case) -> str:
        """The line of a list that a case belongs to."""
        return case.name

    @abc.abstractmethod
    def evaluation_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        """The cases that are scored, of lines of a list."""

    def training_cases(self, names: Sequence[str], report: Report) -> list[Case]:
        """The cases that patches are cut from, of lines of a list."""
        return self.evaluation_cases(names, report)

    def find(self, names: Sequence[str]) -> list[Case]:
        """The evaluation cases called `names`; DataError naming those that are not there."""
        with gathering(None) as report:
            return self.evaluation_cases(names, report)

    # Checks of the whole

    def prepare(
        self,
        splits: dict[str, Sequence[Case]],
        report: Report | None = None,
        store: bool = True,
        chosen: str = "",
    ) -> list[Finding]:
        """Read every case of the lists once, with a progress bar, and check them together -> the
        warnings.

        What is read stays in memory or in the cache, unless `store` is False. chosen: the list that
        chooses the best checkpoint, if one is to be chosen. DataError that lists every fault, or
        with `report` the faults are noted there; it also gets the digests of what was read.
        """
        with gathering(report) as report:
            for split, cases in splits.items():
                report.count(split, len(cases), self.title.format(split=split))
            facts: dict[tuple[str, Case], dict] = {}
            incomplete = self.incomplete
            jobs = [(split, case) for split, cases in splits.items() for case in cases]
            for split, case in tqdm(jobs, desc="reading the data", unit=self.unit, delay=1):
                with report.catching(split, case.name):
                    facts[split, case] = found = self.facts(case, split, store)
                    if found["ids"] is None and split != "unlabelled":
                        raise checks.without_label(case)
                    if found["ids"] is not None and incomplete:
                        found["ids"] = [k for k in found["ids"] if k != UNKNOWN]
                        if found.get("unknown") == 1 and split in ("val", "test"):
                            raise checks.nothing_labelled(case)
            for (split, case), found in facts.items():
                digests = "\n".join([*found["content"], *found.get("labels", ())])
                digest = hashlib.sha256(digests.encode()).hexdigest()[:16]
                report.contents.setdefault(split, {})[case.name] = digest
                report.take(placed(found["findings"], split, case.name))
                if found["ids"] is not None and incomplete:
                    names = self.class_names
                    told = [names[k] for k in np.flatnonzero(self.annotated(case))]
                    present = [names[k] for k in sorted(self.present(found["ids"]))]
                    around = self._around([name for name in present if name in told])
                    foreign = [name for name in present if name not in (*told, *around)]
                    checks.check_annotated(case, split, foreign, told, report)
                    report.see_unknown(split, found.get("unknown", 0.0))
                if self.pads:
                    checks.check_size(case, split, found["shape"], self.patch_size, report)
            self.check_labels(facts, report)
            checks.check_orientations(facts, report)
            checks.check_spacings(facts, report)
            checks.check_brightness(facts, report)
            seen = (
                (split, self.named(case), case.images[0], found["content"])
                for (split, case), found in facts.items()
            )
            checks.check_duplicates(seen, report, self.repeats)
            labelled = [found["ids"] for (split, _), found in facts.items() if split == "labelled"]
            labelled = [ids for ids in labelled if ids is not None]
            # else a class may be in a case that is not read
            if labelled and len(labelled) == len(splits["labelled"]):
                present = {number for ids in labelled for number in self.present(ids)}
                checks.check_classes(
                    present, self.classes, self.absent_classes, self.source, report
                )
            ids = [found["ids"] for (split, _), found in facts.items() if split == chosen]
            if ids and len(ids) == len(splits[chosen]):
                present = {number for found in ids for number in self.present(found or ())}
                checks.check_choice(present, self.classes, self.absent_classes, chosen, report)
        return report.warnings

    @abc.abstractmethod
    def facts(self, case: Case, split: str, store: bool) -> dict:
        """Read a case with checks -> `findings` about it, `content` (digests of its images), `ids`
        of its label (None: it has none), `shape` of its image and, where files have them,
        `labels` (digests of them), `native_affine`, `spacing` and `shares` of its values below, in
        and above the window, and of labels that may hold UNKNOWN its share as `unknown`.
        """

    def check_labels(self, facts: dict[tuple[str, Case], dict], report: Report) -> None:
        """A warning for each label without foreground."""
        for (split, case), found in facts.items():
            if found["ids"] is not None:
                checks.check_foreground(case, split, found["ids"], report)

    # Samples

    @abc.abstractmethod
    def read(self, case: Case) -> dict:
        """A whole case on the grid that it is scored on: a sample with `spacing` (mm, or 1) and,
        for volumes, `affine`; the label, if it has one, with UNKNOWN.
        """

    def native_label(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The label on the grid of its file, ids (*spatial) or regions (K, *spatial), and that
        grid's affine.
        """
        sample = self.read(case)
        return (sample["label"] if self.multilabel else sample["label"][0]), sample["affine"]

    def sample(self, case: Case) -> dict:
        """What `patch` and `views` are cut from; not to be written to."""
        return self.read(case)

    def read_file(self, case: Case) -> dict:
        """A file that is to be predicted, of a kind that people have, as `read` gives cases, and
        what `native` takes; `findings`: warnings about it, if there are any. DataError for a format
        that cannot.
        """
        raise DataError(
            f"{case.images[0]}: {type(self).__name__} has no `read_file`, new files cannot be read"
        )

    def patch(self, sample: dict, rng: np.random.Generator) -> dict:
        """What a labelled case is trained on: the weak view."""
        return self.weak(sample, rng)

    @abc.abstractmethod
    def weak(self, sample: dict, rng: np.random.Generator) -> dict:
        """The weak view: random geometry of image and label, which does not depend on the label."""

    def strong(self, sample: dict, rng: np.random.Generator) -> dict:
        """The strong view of a weak one: random intensities, the same geometry."""
        return augment.strong_volume(sample, rng)

    # What a weak view and a patch are made of, where they are of slices: dataloaders/slices.py

    turns = True  # whether `turn` exchanges the first two axes

    def turn(self, sample: dict, rng: np.random.Generator) -> dict:
        """Random mirrors and 90-degree turns, of image and label."""
        return augment.rot_flip(sample, rng)

    def jitter(self, sample: dict, rng: np.random.Generator) -> dict:
        """Random intensities of labelled patches."""
        return sample

    def views(self, sample: dict, rng: np.random.Generator, strong_views: int = 1) -> dict:
        """An unlabelled case: `weak` and `label` of one geometry, and `strong0`, `strong1`, ...
        that start from it.

        The label is for monitoring pseudo-labels, UNKNOWN where there is none; no method trains on
        it.
        """
        known = "label" in sample
        if not known:
            channels = self.num_classes if self.multilabel else 1
            empty = np.zeros((channels, *sample["image"].shape[1:]), np.uint8)
            sample = sample | {"label": empty}
        weak = self.weak(sample, rng)
        strong = {f"strong{k}": self.strong(weak, rng)["image"] for k in range(strong_views)}
        label = weak["label"] if known else np.full_like(weak["label"], UNKNOWN)
        return {"weak": weak["image"], **strong, "label": label}

    def native(self, prediction: np.ndarray, sample: dict) -> np.ndarray:
        """Prediction, ids or regions, on the grid of `read` -> on the grid of the case's file."""
        if "native_affine" not in sample:
            return prediction
        grids = sample["affine"], sample["native_affine"], sample["native_shape"]
        volumes = [to_native(v, *grids) for v in (prediction if self.multilabel else [prediction])]
        return np.stack(volumes) if self.multilabel else volumes[0]


class InMemory(Dataset):
    """A data set whose training cases stay in memory, so that no step reads a file.

    memory_gb: how much of them; 0 keeps none.
    """

    title = "files"

    def __init__(
        self,
        root: str,
        split_dir: str,
        class_names: Sequence[str],
        patch_size: Sequence[int],
        memory_gb: float,
        patient_pattern: str = "",
        absent_classes: Sequence[str] = (),
        unlabelled: str = "",
        **labels,
    ) -> None:
        if memory_gb < 0:
            raise DataError(f"memory_gb must be 0 or more, got {memory_gb}")
        others = patient_pattern, absent_classes, unlabelled
        super().__init__(root, split_dir, class_names, patch_size, *others, **labels)
        if self.patch_size and len(self.patch_size) != self.dims:
            raise DataError(f"patch_size must be {self.dims} numbers, got {list(patch_size)}")
        self._room = int(memory_gb * 1e9)  # bytes
        self._memory: dict[Case, dict] = {}

    def facts(self, case: Case, split: str, store: bool) -> dict:
        notes = CaseNotes()
        read = self.read if split in ("val", "test") else self.sample
        sample = read(case, notes)
        return {
            "findings": notes.findings,
            "content": notes.content,
            "labels": notes.labels,
            "ids": sorted(notes.ids) if "label" in sample else None,
            "unknown": float(np.mean(sample.get("label", 0) == UNKNOWN)),
            "shape": sample["image"].shape[1:],
        }

    @abc.abstractmethod
    def read(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """As Dataset's; `notes` takes what is noted of the file."""

    def sample(self, case: Case, notes: CaseNotes | None = None) -> dict:
        """As Dataset's; `notes` takes what is noted where the case is read from its file."""
        stored = self._memory.get(case)
        if stored is None:
            stored = self.load(case, notes)
            size = sum(array.nbytes for array in stored.values())
            if size <= self._room:
                self._memory[case] = stored
                self._room -= size
        return self.unpacked(stored)

    @abc.abstractmethod
    def load(self, case: Case, notes: CaseNotes | None) -> dict[str, np.ndarray]:
        """The arrays of a training case as they are kept in memory."""

    def unpacked(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The sample of what `load` gave."""
        return dict(stored)
