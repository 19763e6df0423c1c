"""Data order as a function of (seed, draw): wherever it is entered, and however many processes load
it.
"""

import importlib
import pickle
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataloaders import augment, build_dataset
from dataloaders.samplers import DrawSampler, PatchDataset, collate
from tools.corrupt_data import SITES, write_site

CASES = [SimpleNamespace(name=f"case{k}") for k in range(5)]


def read(case):
    rng = np.random.default_rng(int(case.name[4:]))
    image = rng.normal(size=(2, 9, 8, 7)).astype(np.float32)
    return {
        "image": image,
        "label": (image[:1] > 0.5).astype(np.uint8),
        "foreground": np.flatnonzero(image[0] > 0.5),
        "background": np.flatnonzero(image[0] <= 0.5),
    }


def patch(sample, rng):
    cut = augment.crop_pos_neg(sample, rng, (4, 4, 4))
    return augment.random_shift(augment.random_flip(cut, rng, 0.5), rng, 0.5)


def load(start, stop, seed=0, workers=0, batch_size=2, crops=3):
    loader = DataLoader(
        PatchDataset(CASES, read, patch, seed, crops),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        sampler=DrawSampler(len(CASES), seed, start, stop),
    )
    return list(loader)


def equal(first, second):
    return len(first) == len(second) and all(
        a["case"] == b["case"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["label"], b["label"])
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
    assert (
        batches[0]["image"].shape == (6, 2, 4, 4, 4) and batches[0]["image"].dtype == torch.float32
    )
    assert batches[0]["label"].shape == (6, 1, 4, 4, 4) and batches[0]["label"].dtype == torch.uint8
    order = [CASES[index].name for _, index in DrawSampler(5, 0, 0, 6)]
    assert [name for batch in batches for name in batch["case"]] == [
        name for name in order for _ in range(3)
    ]


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


@pytest.mark.parametrize("stream", [0, 1, 3])
def test_a_stream_is_a_function_of_seed_and_draw(stream):
    draws = list(DrawSampler(5, 3, 0, 20, stream))
    assert draws == list(DrawSampler(5, 3, 0, 20, stream=stream))
    assert list(DrawSampler(5, 3, 7, 20, stream)) == draws[7:]
    assert all(
        sorted(index for _, index in draws[k : k + 5]) == [0, 1, 2, 3, 4] for k in range(0, 20, 5)
    )


def test_streams_of_one_seed_differ():
    orders = [tuple(DrawSampler(5, 0, 0, 40, stream)) for stream in range(4)]
    assert len(set(orders)) == 4
    datasets = [PatchDataset(CASES, read, patch, seed=0, stream=stream) for stream in range(4)]
    assert len({data[0, 2]["image"].numpy().tobytes() for data in datasets}) == 4


def test_the_first_stream_is_what_runs_without_streams_had():
    for epoch in range(3):
        expected = np.random.default_rng([7, 0, epoch]).permutation(5).tolist()
        assert [index for _, index in DrawSampler(5, 7, 5 * epoch, 5 * epoch + 5)] == expected
    assert list(DrawSampler(5, 7, 0, 30)) == list(DrawSampler(5, 7, 0, 30, stream=0))
    item = PatchDataset(CASES, read, patch, seed=7)[4, 2]
    expected = patch(read(CASES[2]), np.random.default_rng([7, 1, 4]))
    assert np.array_equal(item["image"][0].numpy(), expected["image"])


def test_order_and_patches_of_all_streams_draw_from_generators_of_their_own(monkeypatch):
    used, original, empty = [], np.random.default_rng, {"image": np.zeros(1)}
    monkeypatch.setattr(
        np.random, "default_rng", lambda key: used.append(tuple(key)) or original(key)
    )
    for stream in range(3):
        data = PatchDataset(
            CASES, lambda case: None, lambda *_: empty, 0, keys=["image"], stream=stream
        )
        for draw, index in DrawSampler(1, 0, 0, 4, stream):
            data[draw, index]
    assert len(used) == 3 * (4 + 4) == len(set(used))


def views(sample, rng):
    cut = patch(sample, rng)
    return {"weak": cut["image"], "strong0": -cut["image"], "label": cut["label"], "unused": None}


def test_an_item_has_the_keys_that_were_asked_for():
    data = PatchDataset(
        CASES, read, views, seed=0, crops=2, keys=("weak", "strong0", "label"), stream=1
    )
    item = data[3, 1]
    assert list(item) == ["weak", "strong0", "label", "case"] and item["case"] == ["case1", "case1"]
    assert item["weak"].shape == (2, 2, 4, 4, 4) and torch.equal(item["strong0"], -item["weak"])
    batch = collate([item, data[4, 0]])
    assert list(batch) == ["weak", "strong0", "label", "case"]
    assert batch["weak"].shape == (4, 2, 4, 4, 4) and batch["label"].shape == (4, 1, 4, 4, 4)
    assert batch["case"] == ["case1", "case1", "case0", "case0"]
    assert list(PatchDataset(CASES, read, patch, seed=0)[0, 0]) == ["image", "label", "case"]


@pytest.mark.filterwarnings("ignore:This process")
def test_workers_change_nothing_in_a_stream_of_views():
    def batches(workers, start=0):
        return list(
            DataLoader(
                PatchDataset(CASES, read, views, 0, keys=("weak", "label"), stream=1),
                batch_size=2,
                collate_fn=collate,
                sampler=DrawSampler(len(CASES), 0, start, 8, stream=1),
                num_workers=workers,
            )
        )

    alone, two, resumed = batches(0), batches(2), batches(2, start=4)
    assert all(
        a["case"] == b["case"] and torch.equal(a["weak"], b["weak"])
        for a, b in zip(alone, two, strict=True)
    )
    assert all(torch.equal(a["weak"], b["weak"]) for a, b in zip(alone[2:], resumed, strict=True))


@pytest.mark.parametrize("name", SITES)
def test_the_data_of_every_format_can_be_sent_to_a_process_that_starts_anew(name, tmp_path):
    site = write_site(name, "sound", tmp_path / "data")
    arguments = ["--config", str(site.root / "config.yaml")]
    script = importlib.import_module(site.script.removesuffix(".py"))
    _, cfg = script.parse_args(arguments)
    dataset = build_dataset(**cfg.dataset_arguments())
    cases = dataset.splits(None)["labelled"]
    views = partial(dataset.views, strong_views=1)
    for augment_with, keys in ((dataset.patch, ("image", "label")), (views, ("weak", "strong0"))):
        here = PatchDataset(cases, dataset.sample, augment_with, 0, keys=keys)
        there = pickle.loads(ForkingPickler.dumps(here))
        for key in keys:
            assert torch.equal(here[3, 0][key], there[3, 0][key])
