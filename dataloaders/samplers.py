"""Data order as a pure function of (seed, draw)."""

import pickle
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import plugins
from utils.run import leave_signals_to_parent


class DrawSampler(Sampler):
    """Yields (draw, case index) for draws start..stop-1; every `num_cases` draws are one random
    permutation.

    Resuming means starting at another draw: the sequence does not depend on where it was entered.
    stream: tells apart independent sequences of one seed, such as labelled and unlabelled images.
    batch, rank, size: of each `batch` draws, the rank-th of `size` equal parts, for the rank-th of
    `size` processes; `start` and `stop` are multiples of `batch`.
    """

    def __init__(
        self,
        num_cases: int,
        seed: int,
        start: int,
        stop: int,
        stream: int = 0,
        batch: int = 1,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        if batch % size or start % batch:
            raise ValueError(
                f"{size} processes cannot share batches of {batch} from draw {start} on"
            )
        self.num_cases, self.seed, self.start, self.stop, self.stream = (
            num_cases,
            seed,
            start,
            stop,
            stream,
        )
        self.batch, self.rank, self.size = batch, rank, size

    def __len__(self) -> int:
        return max(self.stop - self.start, 0) // self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, current = None, -1
        for draw in range(self.start, self.stop):
            if draw % self.batch * self.size // self.batch != self.rank:
                continue
            epoch, position = divmod(draw, self.num_cases)
            if epoch != current:
                rng = np.random.default_rng([self.seed, 2 * self.stream, epoch])
                order, current = rng.permutation(self.num_cases), epoch
            yield draw, int(order[position])


class PatchDataset(Dataset):
    """Random patches: item (draw, index) -> `crops` patches of that case, drawn with a generator of
    (seed, draw).

    read: case -> preprocessed sample. augment: (sample, rng) -> dict of arrays, one patch; `keys`
    of them are stacked. An item is {"image": (crops, C, H, W, D), "label": (crops, 1 or K, H, W,
    D), "case": [name] * crops}, or has `keys` in place of image and label. stream: as in
    DrawSampler. kept: which of the crops are given; all are drawn. annotated: of labels
    that are not complete, case -> (K,) bool, the classes that its label tells; an item has them as
    `annotated` (crops, K).
    """

    def __init__(
        self,
        cases: Sequence,
        read: Callable,
        augment: Callable,
        seed: int,
        crops: int = 1,
        keys: Sequence[str] = ("image", "label"),
        stream: int = 0,
        kept: slice = slice(None),
        annotated: Callable | None = None,
    ) -> None:
        self.cases, self.read, self.augment, self.seed, self.crops = (
            cases,
            read,
            augment,
            seed,
            crops,
        )
        self.keys, self.stream, self.kept = tuple(keys), stream, kept
        self.annotated = annotated

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        draw, index = item
        case = self.cases[index]
        rng = np.random.default_rng([self.seed, 2 * self.stream + 1, draw])
        sample = self.read(case)
        patches = [self.augment(sample, rng) for _ in range(self.crops)][self.kept]
        stacked = {
            key: torch.from_numpy(np.stack([np.ascontiguousarray(patch[key]) for patch in patches]))
            for key in self.keys
        }
        if self.annotated is not None:
            stacked["annotated"] = torch.from_numpy(self.annotated(case)).repeat(len(patches), 1)
        return {**stacked, "case": [case.name] * len(patches)}

    def __reduce__(self) -> tuple:
        """For loader processes that start anew (spawn, forkserver): with the user's own files,
        whose classes no module of such a process has.
        """
        state = pickle.dumps(self.__dict__)
        return _with_plugins, (plugins.files_in(state), state)


def _with_plugins(files: Sequence[tuple[str, str]], state: bytes) -> PatchDataset:
    plugins.load_files(files)
    patches = PatchDataset.__new__(PatchDataset)
    patches.__dict__ = pickle.loads(state)
    return patches


def collate(items: Sequence[dict]) -> dict:
    """Concatenate the patches of several items into one batch."""
    batch = {key: torch.cat([item[key] for item in items]) for key in items[0] if key != "case"}
    return {**batch, "case": [name for item in items for name in item["case"]]}


def draws(
    patches: PatchDataset,
    first: int,
    last: int,
    batch: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    size: int = 1,
) -> Iterator[dict]:
    """The batches of the steps from `first` up to `last`, in parts of `batch` draws each; of these
    the rank-th of `size` equal parts. workers: loader processes; 0 loads in this one.
    """
    sampler = DrawSampler(
        len(patches), patches.seed, first * batch, last * batch, patches.stream, batch, rank, size
    )
    return iter(
        DataLoader(
            patches,
            batch_size=batch // size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
            # without it a loader would draw from the state that a resumed run has just restored
            generator=torch.Generator(),
        )
    )
