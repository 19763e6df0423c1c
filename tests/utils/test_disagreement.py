"""How much the folds of an nnU-Net disagree, and which cases are left out for it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dataloaders import Case
from utils.disagreement import fold_disagreement, without_disagreeing
from utils.distributed import World


def slow(labels, num_classes, multilabel):
    """Voxel by voxel, class by class, pair by pair."""
    pairs = []
    for one, other in itertools.combinations(range(len(labels)), 2):
        scores = []
        classes = range(num_classes) if multilabel else range(1, num_classes)
        for k in classes:
            first = labels[one][k] > 0 if multilabel else labels[one] == k
            second = labels[other][k] > 0 if multilabel else labels[other] == k
            both = total = 0
            for a, b in zip(first.ravel(), second.ravel()):
                both += int(a and b)
                total += int(a) + int(b)
            if total:
                scores.append(2 * both / total)
        pairs.append(sum(scores) / len(scores) if scores else 1.0)
    return 1 - sum(pairs) / len(pairs)


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_disagreement_against_loops(multilabel, folds):
    rng = np.random.default_rng(folds)
    shape = (3, 4, 3, 2) if multilabel else (4, 3, 2)
    labels = [rng.integers(0, 2 if multilabel else 4, shape).astype(np.uint8) for _ in range(folds)]
    labels[0][labels[0] == 3] = 0  # a class that not all have
    found = fold_disagreement(labels, 3 if multilabel else 4, multilabel)
    assert found == pytest.approx(slow(labels, 3 if multilabel else 4, multilabel), abs=1e-12)
    assert 0 < found < 1


def test_the_ends_of_the_scale():
    empty, some, other = (np.zeros((4, 4, 4), np.uint8) for _ in range(3))
    some[:2], other[2:] = 1, 1
    assert fold_disagreement([empty, empty], 3, False) == 0
    assert fold_disagreement([some, some, some], 3, False) == 0
    assert fold_disagreement([some, other], 3, False) == 1
    assert fold_disagreement([some, empty], 3, False) == 1
    # one of three pairs agrees
    assert fold_disagreement([some, some, other], 3, False) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "share, left", [(0.0, ""), (0.1, ""), (0.13, "d"), (0.5, "db"), (0.99, "dba"), (None, "")]
)
def test_the_largest_are_left_out_and_the_order_stays(tmp_path, share, left):
    """Folds of which the second says `wrong` voxels of a case otherwise."""
    wrong = {"a": 2, "b": 3, "c": 1, "d": 7}
    cases = [Case(name, ()) for name in wrong]
    first, second = (SimpleNamespace(features=1, number=n) for n in (0, 1))
    notes, asked = [], []

    class Teacher:
        folds, outputs = (first, second), [0, 1]

    def predict(network, sample, dataset, run):
        asked.append(sample)
        label = np.ones(8, np.uint8).reshape(2, 2, 2)
        if network.of.number:
            label.flat[: wrong[sample]] = 0
        return label

    run = SimpleNamespace(folder=tmp_path, resumes=False, world=World(), note=notes.append)
    dataset = SimpleNamespace(read=lambda case: case.name, num_classes=2, multilabel=False)
    cfg = SimpleNamespace(drop_disagreeing=share)
    splits = {"labelled": [], "unlabelled": cases, "val": cases}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "utils.disagreement.single_fold", lambda teacher, fold: SimpleNamespace(of=fold)
        )
        result = without_disagreeing(cfg, Teacher(), dataset, splits, run, predict)
        assert "".join(c.name for c in result["unlabelled"]) == "".join(
            n for n in wrong if n not in left
        )
        assert result["val"] == cases
        assert len(asked) == (0 if share is None else 8)
        if share is None:
            assert not notes
            return
        lines = (tmp_path / "disagreement.csv").read_text().split()
        # Dice of 8 voxels with 8 - n of them is 2 (8 - n) / (16 - n)
        expected = {n: 1 - 2 * (8 - wrong[n]) / (16 - wrong[n]) for n in "dbac"}
        assert [line.split(",")[0] for line in lines] == ["case", *expected]
        assert [float(line.split(",")[1]) for line in lines[1:]] == pytest.approx(
            list(expected.values())
        )
        assert sum("left out" in note and "unlabelled" not in note for note in notes) == len(left)
        # a resumed run reads the file, and measures anew where it is of other cases
        run.resumes = True
        assert without_disagreeing(cfg, Teacher(), dataset, splits, run, predict) == result
        assert len(asked) == 8
        fewer = splits | {"unlabelled": cases[:3]}
        without_disagreeing(cfg, Teacher(), dataset, fewer, run, predict)
        assert len(asked) == 14
