"""Data order as a function of (seed, draw): wherever it is entered, and however many processes load it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataloaders import augment
from dataloaders.samplers import DrawSampler, PatchDataset, collate

CASES = [SimpleNamespace(name=f"case{k}") for k in range(5)]


def read(case):
    rng = np.random.default_rng(int(case.name[4:]))
    image = rng.normal(size=(2, 9, 8, 7)).astype(np.float32)
    return {
        "image": image, "label": (image[:1] > 0.5).astype(np.uint8),
        "foreground": np.flatnonzero(image[0] > 0.5), "background": np.flatnonzero(image[0] <= 0.5),
    }  # fmt: skip


def patch(sample, rng):
    cut = augment.crop_pos_neg(sample, rng, (4, 4, 4))
    return augment.random_shift(augment.random_flip(cut, rng, 0.5), rng, 0.5)


def load(start, stop, seed=0, workers=0, batch_size=2, crops=3):
    loader = DataLoader(
        PatchDataset(CASES, read, patch, seed, crops), batch_size=batch_size, num_workers=workers, collate_fn=collate,
        sampler=DrawSampler(len(CASES), seed, start, stop),
    )  # fmt: skip
    return list(loader)


def equal(first, second):
    return len(first) == len(second) and all(
        a["case"] == b["case"] and torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
        for a, b in zip(first, second)
    )


def test_every_epoch_is_a_permutation_of_its_own():
    draws = list(DrawSampler(5, 0, 0, 50))
    assert [draw for draw, _ in draws] == list(range(50))
    epochs = [tuple(index for _, index in draws[k : k + 5]) for k in range(0, 50, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 5


@pytest.mark.parametrize("start", [0, 1, 5, 7, 13, 20])
def test_resuming_goes_on_with_the_same_sequence(start):
    sampler = DrawSampler(5, 3, start, 20)
    assert list(sampler) == list(DrawSampler(5, 3, 0, 20))[start:] and len(sampler) == 20 - start


def test_seeds_differ_and_a_finished_run_draws_nothing():
    assert list(DrawSampler(5, 0, 0, 40)) != list(DrawSampler(5, 1, 0, 40))
    assert list(DrawSampler(5, 0, 9, 7)) == [] and len(DrawSampler(5, 0, 9, 7)) == 0


def test_batches():
    batches = load(0, 6)
    assert len(batches) == 3
    assert batches[0]["image"].shape == (6, 2, 4, 4, 4) and batches[0]["image"].dtype == torch.float32
    assert batches[0]["label"].shape == (6, 1, 4, 4, 4) and batches[0]["label"].dtype == torch.uint8
    order = [CASES[index].name for _, index in DrawSampler(5, 0, 0, 6)]
    assert [name for batch in batches for name in batch["case"]] == [name for name in order for _ in range(3)]


def test_the_same_draws_give_the_same_batches():
    assert equal(load(0, 8), load(0, 8))
    assert equal(load(0, 8)[2:], load(4, 8))
    assert not equal(load(0, 8), load(0, 8, seed=1))


def test_crops_of_one_draw_and_of_two_draws_differ():
    images = torch.cat([batch["image"] for batch in load(0, 10)])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_items_do_not_depend_on_global_random_states():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    first = load(0, 4)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    assert equal(first, load(0, 4))


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_change_nothing():
    assert equal(load(0, 8), load(0, 8, workers=2))
