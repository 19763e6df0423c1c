"""What the semi-supervised data sets share: labelled and unlabelled lists, units in memory, HDF5 files with checks."""

import abc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from dataloaders.cases import Case, DataError, check_disjoint, read_split


class SemiDataset(abc.ABC):
    """Names in lists -> cases; of the training names some count as labelled, all others as unlabelled.

    split_dir: folder with train.txt, val.txt and test.txt. patch_size: what `weak` and `labelled_patch` return.
    memory_gb: training units that `prepare` and `read` keep in memory, so that no step reads a file; 0 keeps none.
    """

    multilabel = False
    dims = 3  # axes of what a network is trained on
    in_channels = 1
    unit = "case"  # what a line of the lists names
    needs_val = True

    def __init__(
        self, root: str, split_dir: str, patch_size: Sequence[int], class_names: Sequence[str], memory_gb: float
    ) -> None:
        if not patch_size or min(patch_size) < 1:
            raise DataError(f"patch_size must be positive whole numbers, got {list(patch_size)}")
        if memory_gb < 0:
            raise DataError(f"memory_gb must be 0 or more, got {memory_gb}")
        if len(class_names) < 2:
            raise DataError(f"class_names must hold the background and at least one class, got {list(class_names)}")
        self.root, self.split_dir = Path(root), Path(split_dir)
        self.patch_size, self.class_names = tuple(patch_size), tuple(class_names)
        self._room = int(memory_gb * 1e9)  # bytes
        self._memory: dict[Case, dict] = {}

    @property
    def num_classes(self) -> int:
        """Channels of the logits, background included."""
        return len(self.class_names)

    def splits(self, labelled: int | float | None = None) -> dict[str, list[Case]]:
        """Cases of `labelled`, `unlabelled`, `val` and `test`.

        labelled: whole number = that many of the train list; fraction below 1 = that share of it, rounded down; None or
        1.0 = all. Unlabelled is always what remains: lists of it that are shipped with the data are never read.
        """
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: no such folder; put the data set there (docs/data.md) or name its folder with "
                f"--opts data_root=FOLDER"
            )
        lists = self._lists()
        check_disjoint({split: [Case(name, ()) for name in names] for split, names in lists.items()})
        chosen = self._choose(lists["train"], labelled)
        kept = set(chosen)
        result = {
            "labelled": self._training_cases(chosen),
            "unlabelled": self._training_cases([name for name in lists["train"] if name not in kept]),
            "val": self._evaluation_cases(lists["val"]),
            "test": self._evaluation_cases(lists["test"]),
        }
        check_disjoint(result)
        return result

    def prepare(self, splits: dict[str, Sequence[Case]]) -> None:
        """Read every training unit and evaluation case once, with a progress bar; DataError that lists the faulty ones.

        splits: of `labelled` and `unlabelled` units are read, which fills the memory, of `val` and `test` cases.
        """
        jobs = [(case, self.read) for split in ("labelled", "unlabelled") for case in splits.get(split, [])]
        jobs += [(case, self.read_volume) for split in ("val", "test") for case in splits.get(split, [])]
        problems = []
        for case, read in tqdm(jobs, desc="reading the data", unit="file", disable=not jobs):
            try:
                read(case)
            except DataError as error:
                problems.append(str(error))
        if problems:
            shown = "\n  ".join(problems[:10])
            more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise DataError(f"{len(problems)} of {len(jobs)} files cannot be used:\n  {shown}{more}")

    def read(self, case: Case) -> dict:
        """One training unit: image (C, *spatial) float32, label (1, *spatial) uint8; not to be written to."""
        stored = self._memory.get(case)
        if stored is None:
            stored = self._load(case)
            size = sum(array.nbytes for array in stored.values())
            if size <= self._room:
                self._memory[case] = stored
                self._room -= size
        return self._sample(stored)

    @abc.abstractmethod
    def find(self, names: Sequence[str]) -> list[Case]:
        """The evaluation cases called `names`; DataError naming those that are not there."""

    @abc.abstractmethod
    def read_volume(self, case: Case) -> dict:
        """An evaluation case on its own grid: image (C, *spatial), label (1, *spatial), spacing."""

    def read_unlabelled(self, case: Case) -> dict:
        """A file without a label, of a kind that people have, as the network's data are: `image` as `read_volume` has
        it, float32, and what the way back to the file's own grid takes."""
        raise DataError(f"{case.images[0]}: {type(self).__name__} has no `read_unlabelled`, new files cannot be read")

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
        """An unlabelled unit: `weak` and `label` of one geometry, and `strong0`, `strong1`, ... that start from it.

        The label is for monitoring pseudo-labels; no method trains on it.
        """
        weak = self.weak(sample, rng)
        strong = {f"strong{k}": self.strong(weak, rng)["image"] for k in range(strong_views)}
        return {"weak": weak["image"], **strong, "label": weak["label"]}

    def view_function(self, strong_views: int) -> Callable[[dict, np.random.Generator], dict]:
        """`views` as a function of (sample, rng)."""
        return partial(self.views, strong_views=strong_views)

    @abc.abstractmethod
    def _load(self, case: Case) -> dict[str, np.ndarray]:
        """The arrays of a training unit as they are kept in memory."""

    def _sample(self, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(stored)

    @abc.abstractmethod
    def _training_cases(self, names: Sequence[str]) -> list[Case]: ...

    @abc.abstractmethod
    def _evaluation_cases(self, names: Sequence[str]) -> list[Case]: ...

    def _lists(self) -> dict[str, list[str]]:
        lists = {split: read_split(self.split_dir, split) for split in ("train", "val", "test")}
        for split in ("train", "val") if self.needs_val else ("train",):
            if lists[split] is None:
                raise DataError(
                    f"{self.split_dir / split}.txt: no such list; expected one {self.unit} per line, set split_dir to "
                    f"the folder that has it"
                )
        return {split: names or [] for split, names in lists.items()}

    def _choose(self, train: Sequence[str], labelled: int | float | None) -> list[str]:
        """Prefix of the train list, as every published table takes it."""
        return list(train[: labelled_count(labelled, len(train), f"{self.split_dir}/train.txt", self.unit)])


def labelled_count(labelled: int | float | None, total: int, source: str, unit: str) -> int:
    """How many of `total` units are labelled: a count, a fraction rounded down, or None or 1.0 for all of them."""
    if labelled is None:
        return total
    expected = f"expected 1..{total} or a fraction of 1, such as 0.1"
    if isinstance(labelled, bool) or not isinstance(labelled, (int, float)) or not labelled > 0:
        raise DataError(f"labelled is {labelled!r}; {expected}")
    if isinstance(labelled, float) and labelled <= 1:
        count = int(labelled * total + 1e-9)  # 0.29 * 100 is 28.999...
        if count < 1:
            raise DataError(f"labelled is {labelled}, which is less than one {unit} of the {total} in {source}")
        return count
    if labelled != int(labelled):
        raise DataError(f"labelled is {labelled}; {expected}")
    if labelled > total:
        raise DataError(f"labelled is {int(labelled)}, but {source} has only {total} {unit}s; {expected}")
    return int(labelled)


def read_h5(path: Path, num_classes: int, ndim: int, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`image` float32 and `label` uint8 of an HDF5 file, or of its slice `index`; DataError for whatever is wrong.

    Other keys are ignored. `ndim` is that of the stored arrays.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; restore it or take the case out of the lists")
    try:
        with h5py.File(path) as file:
            missing = [key for key in ("image", "label") if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise DataError(
                    f"{path}: no array '{missing[0]}', found {sorted(file)}; expected the keys 'image' and 'label', "
                    f"convert the case again"
                )
            shapes = file["image"].shape, file["label"].shape
            if shapes[0] != shapes[1] or len(shapes[0]) != ndim:
                raise DataError(
                    f"{path}: image has shape {shapes[0]}, label {shapes[1]}; expected the same {ndim} axes for both"
                )
            if index is not None and index >= shapes[0][0]:
                raise DataError(f"{path}: {shapes[0][0]} slices, expected at least {index + 1}; copy the file again")
            image, label = (file[key][() if index is None else index] for key in ("image", "label"))
    except (OSError, RuntimeError) as error:  # h5py reports damage inside a file as either
        raise DataError(
            f"{path}: unreadable or truncated ({type(error).__name__}: {error}); copy the file again"
        ) from error
    image = np.asarray(image, np.float32)
    if not np.isfinite(image).all():
        bad = int(image.size - np.isfinite(image).sum())
        raise DataError(f"{path}: {bad} voxels are NaN or infinite; expected finite intensities, repair the scan")
    if image.size == 0 or image.min() == image.max():
        raise DataError(f"{path}: constant image, shape {image.shape}; the scan is empty, take it out of the lists")
    ids = np.unique(label)
    wrong = [value for value in ids.tolist() if value not in range(num_classes)]
    if wrong:
        raise DataError(
            f"{path}: label ids {wrong[:6]}, expected only 0..{num_classes - 1}; mend the label or class_names"
        )
    return image, label.astype(np.uint8)
