"""When the scores in a teacher's checkpoint stand for those of a new run; the labels that it gives
to unlabelled scans, and batches with these.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dataloaders import Case
from dataloaders.lists import patient_function
from networks.nnunet import NnUNet, NnUNetTeacher
from tests.losses import reference as ref
from train_3d_distill import Config
from utils.config import ConfigError
from utils.distillation import (
    Batches,
    _other_preprocessing,
    _seen_in_training,
    _validated_alike,
    teacher_label_report,
    teacher_labels,
    teacher_path,
)
from utils.distributed import World

CASES = [Case("a", ()), Case("b", ())]
CONFIG = Config(
    dataset="x", data_root="d", max_steps=2, patch_size=(16, 16, 16), flip_prob=0.0, cache_dir="c"
)


def checkpoint(**changed):
    config = dataclasses.asdict(CONFIG) | changed
    config = {key: value for key, value in config.items() if value is not None}
    return {"config": config, "cases": {"val": ["a", "b"]}}


@pytest.mark.parametrize(
    "changed",
    [
        {"k_divisible": None, "regions": None, "spacing": None, "unlabelled": None},  # not there
        {"cache_dir": "other", "memory_gb": 0.0, "unlabelled": "more", "crop": "uniform"},
        {"flip_prob": 0.5, "rot90_prob": 0.0, "scale_prob": 0.0, "shift_prob": 0.0},
        {"last_start": False, "augmentation": "supervised"},
        {"window": [-175.0, 250.0]},
    ],
)
def test_keys_that_change_no_score(changed):
    assert _validated_alike(checkpoint(**changed), CONFIG, CASES)


@pytest.mark.parametrize(
    "changed",
    [{"spacing": (1.0, 1.0, 1.0)}, {"window": (0.0, 1.0)}, {"dataset": "y"}, {"overlap": 0.25}],
)
def test_keys_that_change_scores(changed):
    assert not _validated_alike(checkpoint(**changed), CONFIG, CASES)
    older = {key: None for key in changed if key in ("spacing", "window")}
    assert _validated_alike(checkpoint(**older), CONFIG, CASES)


@pytest.mark.parametrize(
    "changed, shown",
    [
        ({}, []),
        ({"spacing": None, "flip_prob": 0.5, "patch_size": (8, 8, 8), "normalize": "volume"}, []),
        ({"window": [-1000.0, 1000.0]}, ["window: [-1000.0, 1000.0] in the teacher's run, "]),
        (
            {"intensity": "zscore", "spacing": (2, 2, 2)},
            ["intensity: zscore", "spacing: [2, 2, 2]"],
        ),
        ({"orientation": "LPS", "crop_foreground": False}, ["crop_foreground", "orientation: LPS"]),
        ({"format": "nnunet"}, ["format: nnunet"]),
        ({"format": "la"}, ["format: la in the teacher's run, msd here"]),
        ({"format": "mine"}, ["format: mine"]),
    ],
)
def test_a_teacher_of_other_preprocessing(changed, shown):
    found = _other_preprocessing(checkpoint(**changed), CONFIG)
    assert len(found) == len(shown)
    for text, start in zip(found, shown):
        assert text.startswith(start) and " here" in text


def test_a_teacher_that_has_seen_the_cases():
    dataset = SimpleNamespace(patient=patient_function(""), named=lambda case: case.name)
    splits = {"val": [Case("a", ())], "test": [Case("p1_visit2", ()), Case("c", ())]}
    lists = {"labelled": ["x", "p1_visit1"], "unlabelled": ["c"], "val": ["a"], "test": []}
    alone = {"cases": lists, "config": {"method": "supervised"}}
    assert _seen_in_training(alone, dataset, splits) == ["p1_visit2 (test)"]
    semi = {"cases": lists | {"labelled": ["a"]}, "config": {"method": "crkd"}}
    assert _seen_in_training(semi, dataset, splits) == ["a (val)", "c (test)"]
    older = {"cases": {"train": ["c"], "val": ["a"]}}
    assert _seen_in_training(older, dataset, splits) == ["c (test)"]


def test_a_fold_has_the_teacher_of_its_tag(tmp_path):
    def path(tag, **more):
        return teacher_path(dataclasses.replace(CONFIG, runs_dir=str(tmp_path), tag=tag, **more))

    plain, tagged = path(""), tmp_path / "x/supervised/resunet/seed0-fold1/best.pt"
    assert plain == tmp_path / "x/supervised/resunet/seed0/best.pt" == path("fold1")
    tagged.parent.mkdir(parents=True)
    tagged.touch()
    assert (path("fold1"), path("fold2"), path("")) == (tagged, plain, plain)
    assert str(path("fold1", teacher_checkpoint="other.pt")) == "other.pt"


# The teacher's labels of unlabelled scans


def slow_labels(teacher, image, multilabel, views, confidence, allowed=(0, 1, 2)):
    """The same by loops over mirrored copies, voxels and classes, in float64."""
    total, codes = 0.0, range(2 ** len(allowed) if views == "flips" else 1)
    for code in codes:
        axes = [2 + axis for bit, axis in enumerate(allowed) if code >> bit & 1]
        mirrored = torch.from_numpy(np.flip(image.numpy(), axes).copy())
        logits = np.flip(teacher(mirrored).detach().numpy(), axes)
        probs = np.zeros(logits.shape)
        for b, v, column in ref.columns(logits):
            found = ref.sigmoid(column) if multilabel else ref.softmax(column)
            probs.reshape(*probs.shape[:2], -1)[b, :, v] = found
        total = total + probs
    label = np.zeros((*image.shape[:1], probs.shape[1] if multilabel else 1, *image.shape[2:]), int)
    flat = label.reshape(*label.shape[:2], -1)
    for b, v, column in ref.columns(total / len(codes)):
        if multilabel:
            flat[b, :, v] = [255 if max(p, 1 - p) < confidence else p >= 0.5 for p in column]
        else:
            flat[b, 0, v] = 255 if max(column) < confidence else list(column).index(max(column))
    return label


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("views", ["one", "flips"])
@pytest.mark.parametrize("confidence", [0.0, 0.6])
def test_labels_of_the_teacher_against_loops(multilabel, views, confidence):
    torch.manual_seed(0)
    teacher = nn.Conv3d(2, 3, 3, padding=1).double()
    teacher.weight.data *= 4
    image = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64)
    expected = slow_labels(teacher, image, multilabel, views, confidence)
    found = teacher_labels(teacher, image, teacher(image), multilabel, views, confidence)
    assert found.dtype == torch.uint8 and not found.requires_grad
    assert np.array_equal(found.numpy(), expected)
    ignored = (expected == 255).mean()
    assert 0.05 < ignored < 0.95 if confidence else ignored == 0
    if not (confidence or multilabel):
        assert len(np.unique(expected)) == 3
        one = slow_labels(teacher, image, multilabel, "one", confidence)
        assert views == "one" or (one != expected).any()


@pytest.mark.parametrize("allowed", [(), (1,), (0, 2)])
def test_an_nnunet_is_shown_the_mirrors_that_it_allows(allowed):
    torch.manual_seed(0)
    narrow = {"features_per_stage": (2, 3), "kernel_sizes": (3, 3), "strides": (1, 2)}
    blocks = {"blocks_per_stage": (1, 1), "convs_per_stage_decoder": (1,)}
    teacher = NnUNetTeacher([NnUNet(1, 3, **narrow, **blocks)], [0, 1, 2], allowed).double()
    image = torch.randn(2, 1, 8, 6, 4, dtype=torch.float64)
    found = teacher_labels(teacher, image, teacher(image), False, "flips")
    expected = slow_labels(teacher, image, False, "flips", 0.0, allowed)
    assert np.array_equal(found.numpy(), expected)
    assert (expected != slow_labels(teacher, image, False, "flips", 0.0)).any()
    assert not allowed or (expected != slow_labels(teacher, image, False, "one", 0.0)).any()


def test_the_report_of_the_labels_by_hand():
    label = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    truth = torch.tensor([0, 2, 2, 1], dtype=torch.uint8).view(1, 1, 4, 1, 1)
    report = {k: v.item() for k, v in teacher_label_report(label, truth, 3, False).items()}
    assert report == pytest.approx(
        {
            "mask_ratio": 3 / 4,
            "pseudo_accuracy": 2 / 3,
            "pseudo_foreground": 2 / 4,
            "true_foreground": 3 / 4,
            "recall_1": 0.0,
            "recall_2": 1 / 2,
        }
    )
    unknown = teacher_label_report(label, torch.full_like(truth, 255), 3, False)
    assert unknown["mask_ratio"] == 3 / 4 and unknown["pseudo_accuracy"].isnan()
    both = torch.tensor([1, 1, 0, 0, 1, 255], dtype=torch.uint8).view(1, 2, 3, 1, 1)
    truth = torch.tensor([1, 0, 0, 1, 1, 1], dtype=torch.uint8).view(1, 2, 3, 1, 1)
    report = teacher_label_report(both, truth, 2, True)
    assert report["pseudo_accuracy"].item() == pytest.approx(3 / 5)
    assert report["recall_1"].item() == pytest.approx(2 / 4)


# Batches with unlabelled scans


def settings(cases, crops, **values):
    values = {"labelled": 2, "class_names": ("a", "b")} | values
    return dataclasses.replace(CONFIG, cases_per_batch=cases, crops_per_case=crops, **values)


class Scans:
    """Cases whose patches are their own number, and whose truth is unknown."""

    incomplete = False
    jitter = staticmethod(lambda sample, rng: sample | {"image": sample["image"] + 0.5})

    def sample(self, case):
        return {"image": np.full((1, 2, 2, 2), float(case.name), np.float32)}

    def patch(self, sample, rng):
        label = np.full((1, 2, 2, 2), sample["image"].max(), np.uint8)
        return {"image": sample["image"] + rng.random(), "label": label}

    def views(self, sample, rng, strong_views):
        assert strong_views == 0
        label = np.full((1, 2, 2, 2), 255, np.uint8)
        return {"weak": sample["image"] + rng.random(), "label": label}


def drawn(cfg, start=0, world=None, scans=None):
    """The batches of the steps that are left."""
    world = world or World()
    run = SimpleNamespace(world=world, device=torch.device("cpu"), start=start)
    labelled = [Case(str(k), ()) for k in range(4)] if cfg.labelled else []
    unlabelled = [Case(str(k), ()) for k in range(100, 112)]
    splits = {"labelled": labelled, "unlabelled": unlabelled}
    return list(Batches(cfg, run, scans or Scans(), splits).training())


@pytest.mark.parametrize(
    "cases, crops, taught, cases_left",
    [(2, 1, 1, 1), (1, 4, 2, 1), (2, 4, 4, 2), (2, 4, 2, 2), (2, 4, 3, 1), (3, 2, 2, 2)],
)
def test_what_a_batch_with_unlabelled_scans_holds(cases, crops, taught, cases_left):
    cfg = settings(cases, crops, unlabelled_batch=taught, max_steps=3, workers=0)
    for batch in drawn(cfg):
        labelled = cases * crops - taught
        assert len(batch["image"]) == cases * crops and len(batch["label"]) == labelled
        assert len(batch["truth"]) == taught and (batch["truth"] == 255).all()
        names = [int(name) for name in batch["case"]]
        # named after the scan that each patch is of; patches of one draw differ
        assert (
            batch["image"].flatten(1).amin(1).floor().int().tolist()[:labelled] == names[:labelled]
        )
        assert max(names[:labelled]) < 100 <= min(names[labelled:])
        assert len(set(names[:labelled])) == cases_left
        assert len(set(names[labelled:])) == taught
    first, second = (drawn(cfg, start)[0]["image"] for start in (0, 2))
    assert torch.equal(second, drawn(cfg)[2]["image"]) and not torch.equal(first, second)


def test_a_batch_without_labels_and_one_of_two_processes():
    cfg = settings(2, 2, labelled=0, unlabelled_batch=4, max_steps=3, workers=0)
    whole = drawn(cfg)
    assert all(len(batch["label"]) == 0 and len(batch["image"]) == 4 for batch in whole)
    cfg = settings(2, 2, unlabelled_batch=2, max_steps=3, workers=0)
    parts = [drawn(cfg, world=World(rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(drawn(cfg), *parts, strict=True):
        assert len(first["case"]) == 2
        order = torch.cat([part["image"][k : k + 1] for k in (0, 1) for part in (first, second)])
        assert torch.equal(order, batch["image"])
    for labelled, part in ((0, "unlabelled_batch: 3"), (2, "labelled patches of a case: 3")):
        cfg = settings(1, 3 + bool(labelled) * 3, labelled=labelled, unlabelled_batch=3, workers=0)
        with pytest.raises(ConfigError, match=f"{part} cannot be shared by 2 processes"):
            drawn(cfg, world=World(0, 2))


class Partial(Scans):
    """Some classes of labelled scan 0 and unlabelled scan 100 were not annotated."""

    incomplete = True

    def annotated(self, case):
        return np.array([True, True, case.name not in ("0", "100")])

    def views(self, sample, rng, strong_views):
        view = super().views(sample, rng, strong_views)
        return view | {"label": np.ones_like(view["label"])}


def test_classes_that_were_not_annotated_of_labelled_and_unlabelled_scans():
    cfg = settings(2, 2, unlabelled_batch=3, max_steps=4, workers=0)
    for batch in drawn(cfg, scans=Partial()):
        told = torch.tensor([name != "0" for name in batch["case"]])
        assert torch.equal(batch["annotated"][:, 2], told) and batch["annotated"][:, :2].all()
        # a truth without some classes is no measure of the teacher's labels
        expected = [255 if name == "100" else 1 for name in batch["case"][1:]]
        assert batch["truth"].flatten(1).unique(dim=1).flatten().tolist() == expected
    cfg = settings(2, 2, labelled=0, unlabelled_batch=4, max_steps=1, workers=0)
    assert all(batch["annotated"].all() for batch in drawn(cfg, scans=Partial()))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, None),
        ({"labelled": 3}, 4),
        ({"unlabelled": "more"}, 4),
        ({"labelled": 0}, 8),
        ({"labelled": 3, "unlabelled_batch": 0}, 0),
        ({"labelled": 3, "method": "supervised"}, None),
        ({"labelled": 3, "cases_per_batch": 1, "crops_per_case": 3}, 1),
    ],
)
def test_how_many_patches_of_a_batch_are_unlabelled(values, expected):
    values = {"labelled": None, "cases_per_batch": 2, "crops_per_case": 4} | values
    cfg = settings(values.pop("cases_per_batch"), values.pop("crops_per_case"), **values)
    assert cfg._completed().unlabelled_batch == expected


@pytest.mark.parametrize(
    "values, name",
    [
        ({}, "resunet-unet"),
        ({"labelled": 16}, "resunet-unet-16"),
        ({"labelled": 16, "unlabelled_batch": 1}, "resunet-unet-16-unlabelled"),
        ({"labelled": 0, "unlabelled_batch": 4}, "resunet-unet-0-unlabelled"),
        ({"labelled": None, "unlabelled_batch": 1}, "resunet-unet-all-unlabelled"),
        ({"labelled": 0.05, "method": "supervised"}, "unet-5%"),
    ],
)
def test_labels_in_the_name_of_the_folder(values, name):
    assert dataclasses.replace(CONFIG, **values).networks == name
