"""Data order as a pure function of (seed, draw)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


class DrawSampler(Sampler):
    """Yields (draw, case index) for draws start..stop-1; every `num_cases` draws are one random permutation.

    Resuming means starting at another draw: the sequence does not depend on where it was entered.
    """

    def __init__(self, num_cases: int, seed: int, start: int, stop: int) -> None:
        self.num_cases, self.seed, self.start, self.stop = num_cases, seed, start, stop

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, current = None, -1
        for draw in range(self.start, self.stop):
            epoch, position = divmod(draw, self.num_cases)
            if epoch != current:
                order, current = np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_cases), epoch
            yield draw, int(order[position])


class PatchDataset(Dataset):
    """Random patches: item (draw, index) -> `crops` patches of that case, drawn with a generator of (seed, draw).

    read: case -> preprocessed sample. augment: (sample, rng) -> dict of arrays, one patch.
    An item is {"image": (crops, C, H, W, D), "label": (crops, 1 or K, H, W, D), "case": [name] * crops}.
    """

    def __init__(self, cases: Sequence, read: Callable, augment: Callable, seed: int, crops: int = 1) -> None:
        self.cases, self.read, self.augment, self.seed, self.crops = cases, read, augment, seed, crops

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        draw, index = item
        case = self.cases[index]
        rng = np.random.default_rng([self.seed, 1, draw])
        sample = self.read(case)
        patches = [self.augment(sample, rng) for _ in range(self.crops)]
        stacked = {
            key: torch.from_numpy(np.stack([np.ascontiguousarray(patch[key]) for patch in patches]))
            for key in ("image", "label")
        }
        return {**stacked, "case": [case.name] * self.crops}


def collate(items: Sequence[dict]) -> dict:
    """Concatenate the patches of several items into one batch."""
    batch = {key: torch.cat([item[key] for item in items]) for key in ("image", "label")}
    return {**batch, "case": [name for item in items for name in item["case"]]}
