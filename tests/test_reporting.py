"""Protocols of semi-supervised scores against medpy and a slow version, empty masks, order of
averaging, tables.
"""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from medpy.metric import binary as medpy

from metrics import METRICS, UNKNOWN, case_metrics, summarise
from reporting import (
    PUBLISHED,
    case_rows,
    describe,
    published_scores,
    report,
    score_columns,
    summary_of,
    write_csv,
    write_summary,
)
from tools.tables import runs_table
from utils.config import PROTOCOLS

NAN = math.nan
VOLUME, IMAGE = (7, 6, 5), (9, 8)
FLAGS = ("absent", "missed", "spurious")


def random_ids(shape, seed, num_classes=4, density=0.7):
    rng = np.random.default_rng([seed, len(shape)])
    return (rng.integers(0, num_classes, shape) * (rng.random(shape) < density)).astype(np.uint8)


def slow_surface(mask):
    """Voxels of the mask with a neighbour along an axis that is outside it or outside the array."""
    points = []
    for point in map(tuple, np.argwhere(mask)):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            other = list(point)
            other[axis] += step
            if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                points.append(point)
                break
    return points


def slow_distances(prediction, label):
    """d(P -> G), d(G -> P)."""
    p, g = slow_surface(prediction), slow_surface(label)
    return [min(math.dist(a, b) for b in g) for a in p], [
        min(math.dist(a, b) for b in p) for a in g
    ]


def slow_published(p, g):
    """The four published metrics of a class of which both masks have voxels."""
    forward, backward = slow_distances(p, g)
    row = {
        "dice": 2 * (p & g).sum() / (p.sum() + g.sum()),
        "jaccard": (p & g).sum() / (p | g).sum(),
    }
    if p.ndim == 3:
        return row | {"hd95": np.percentile(forward + backward, 95), "asd": np.mean(forward)}
    directed = max(np.percentile(forward, 95), np.percentile(backward, 95))
    return row | {"hd95": directed, "asd": (np.mean(forward) + np.mean(backward)) / 2}


def block(shape, *slices):
    mask = np.zeros(shape, np.uint8)
    mask[slices] = 1
    return mask


def boxes(shape):
    """Pairs of masks with distances other than 0 and 1."""
    n = len(shape)
    low, high, middle = ((slice(0, 2),) * n, (slice(3, None),) * n, (slice(1, 4),) * n)
    first, last = (0,) * n, tuple(side - 1 for side in shape)
    places = {
        "low high": (low, high),
        "low middle": (low, middle),
        "corners": (first, last),
        "same": (low, low),
        "everything": ((slice(None),) * n, middle),
    }
    return {name: (block(shape, *a), block(shape, *b)) for name, (a, b) in places.items()}


def pairs():
    """(prediction, label, number of classes) in which every class has voxels."""
    for shape in (VOLUME, IMAGE):
        for name, masks in boxes(shape).items():
            yield pytest.param(*masks, 2, id=f"{name} {len(shape)}D")
        for seed, density in enumerate((0.3, 0.7, 1.0)):
            noise = random_ids(shape, seed, density=density), random_ids(shape, seed + 50)
            yield pytest.param(*noise, 4, id=f"noise {density} {len(shape)}D")


PAIRS = list(pairs())


# Protocols


@pytest.mark.parametrize("prediction, label, num_classes", PAIRS)
def test_published_scores_equal_a_slow_version(prediction, label, num_classes):
    rows = published_scores(prediction, label, num_classes)
    assert len(rows) == num_classes - 1
    for k, row in enumerate(rows, 1):
        expected = slow_published(prediction == k, label == k)
        assert row == pytest.approx(expected | dict.fromkeys(FLAGS, 0), abs=1e-12)


@pytest.mark.parametrize("prediction, label, num_classes", PAIRS)
def test_published_scores_equal_medpy(prediction, label, num_classes):
    for k, row in enumerate(published_scores(prediction, label, num_classes), 1):
        p, g = prediction == k, label == k
        assert row["dice"] == pytest.approx(medpy.dc(p, g)) and row["jaccard"] == pytest.approx(
            medpy.jc(p, g)
        )
        if label.ndim == 3:
            assert row["hd95"] == pytest.approx(medpy.hd95(p, g), abs=1e-9)
            assert row["asd"] == pytest.approx(medpy.asd(p, g), abs=1e-9)
        else:
            assert row["asd"] == pytest.approx((medpy.asd(p, g) + medpy.asd(g, p)) / 2, abs=1e-9)
            directed = [
                np.percentile(medpy.__dict__["__surface_distances"](*pair), 95)
                for pair in ((p, g), (g, p))
            ]
            assert row["hd95"] == pytest.approx(max(directed), abs=1e-9)


def test_distances_of_volumes_are_one_sided_and_pooled_and_those_of_images_are_not():
    line = block((1, 10), 0, slice(0, 5)), block((1, 10), 0, slice(0, 9))  # back: 0 0 0 0 0 1 2 3 4
    (image,) = published_scores(*line, 2)
    (volume,) = published_scores(*(mask[None] for mask in line), 2)
    (swapped,) = published_scores(*(mask[None] for mask in reversed(line)), 2)
    back = [0] * 5 + [1, 2, 3, 4]
    assert (
        volume["asd"] == 0
        and swapped["asd"] == pytest.approx(10 / 9)
        and image["asd"] == pytest.approx(5 / 9)
    )
    assert volume["hd95"] == pytest.approx(np.percentile([0] * 5 + back, 95))
    assert image["hd95"] == pytest.approx(np.percentile(back, 95))


@pytest.mark.parametrize("shape", [VOLUME, IMAGE])
@pytest.mark.parametrize("hd95", ["pooled", "directed"])
def test_the_clean_protocol_is_that_of_metrics_with_unit_spacing(shape, hd95):
    prediction, label = random_ids(shape, 1), random_ids(shape, 2)
    names = ("background", "a", "b", "c")
    rows = case_rows("x", prediction, label, names, protocol="clean", hd95=hd95, empty="agree")
    scores = case_metrics(
        prediction, label, 4, spacing=[1.0] * len(shape), hd95=hd95, empty="agree"
    )
    accuracy = np.mean(prediction == label)
    shared = {"accuracy": accuracy, "diagonal": math.hypot(*shape), "tolerance": 2.0}
    expected = [{"case": "x", "class": name, **row, **shared} for name, row in zip("abc", scores)]
    assert rows == expected and 0 < accuracy < 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_labels_that_are_not_complete(protocol):
    """The labelled voxels alone, and the annotated classes: a, but not b and c."""
    prediction, label = random_ids(IMAGE, 1), np.minimum(random_ids(IMAGE, 2), 1)
    unknown = np.random.default_rng(3).random(IMAGE) < 0.3
    marked = np.where(unknown, UNKNOWN, label).astype(np.uint8)
    how = {"protocol": protocol, "hd95": "pooled", "empty": "agree"}
    told = np.array([True, True, False, False])
    (row,) = case_rows("x", prediction, marked, ("bg", *"abc"), annotated=told, **how)
    ids = [np.where(unknown, 0, v).astype(np.uint8) for v in (prediction == 1, label)]
    (expected,) = case_rows("x", *ids, ("bg", "a"), **how)
    right = (prediction == 1) == (label == 1)
    assert row == expected | {"accuracy": np.mean(right[~unknown])} and row["class"] == "a"


@pytest.mark.parametrize("shape", [VOLUME, IMAGE])
def test_options_of_the_clean_protocol_do_not_touch_published_scores(shape):
    prediction, label = random_ids(shape, 1), np.minimum(random_ids(shape, 2), 2)
    names = ("background", "a", "b", "c", "d")
    found = [
        case_rows("x", prediction, label, names, protocol="published", hd95=hd95, empty=empty)
        for hd95, empty in itertools.product(("pooled", "directed"), ("nan", "diag", "agree"))
    ]
    for rows in found:
        assert [row["class"] for row in rows] == list("abcd") and all(
            "assd" not in row for row in rows
        )
        for row, first in zip(rows, found[0]):
            assert row == pytest.approx(first, nan_ok=True)


EMPTY = {  # dice, jaccard, hd95, asd
    ("clean", "absent"): (1, 1, 0, 0),
    ("clean", "missed"): (0, 0, NAN, NAN),
    ("clean", "spurious"): (0, 0, NAN, NAN),
    ("volume", "absent"): (0, 0, 0, 0),
    ("volume", "missed"): (0, 0, 0, 0),
    ("volume", "spurious"): (0, 0, 0, 0),
    ("image", "absent"): (1, 1, NAN, NAN),
    ("image", "missed"): (0, 0, NAN, NAN),
    ("image", "spurious"): (0, 0, NAN, NAN),
}


@pytest.mark.parametrize("shape", [VOLUME, IMAGE])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", FLAGS)
def test_empty_masks(kind, protocol, shape):
    full, nothing = block(shape, *(slice(1, 3),) * len(shape)), np.zeros(shape, np.uint8)
    pair = {"absent": (nothing, nothing), "missed": (nothing, full), "spurious": (full, nothing)}[
        kind
    ]
    (row,) = case_rows(
        "x", *pair, ("background", "a"), protocol=protocol, hd95="pooled", empty="agree"
    )
    rule = protocol if protocol == "clean" else "volume" if len(shape) == 3 else "image"
    assert [row[key] for key in PUBLISHED] == pytest.approx(EMPTY[rule, kind], nan_ok=True)
    assert [row[flag] for flag in FLAGS] == [int(flag == kind) for flag in FLAGS]


@pytest.mark.parametrize("shape", [VOLUME, IMAGE])
def test_an_empty_class_leaves_the_others_alone(shape):
    prediction, label = random_ids(shape, 3), random_ids(shape, 4)
    before = published_scores(prediction, label, 4)
    prediction[prediction == 2] = 0
    after = published_scores(prediction, label, 4)
    assert (before[0], before[2]) == (after[0], after[2])
    assert after[1]["dice"] == 0 and after[1]["missed"] == 1


# Averages


def row(case, name, dice, hd95=1.0, **flags):
    values = dict.fromkeys(METRICS, NAN) | {
        "dice": dice,
        "jaccard": dice / 2,
        "hd95": hd95,
        "asd": hd95 / 2,
        "accuracy": ord(case) / 200,
    }
    values["diagonal"] = 12.0
    return {"case": case, "class": name, **values, **dict.fromkeys(FLAGS, 0), **flags}


def test_published_means_are_of_classes_over_the_cases_that_have_them():
    rows = [
        row("a", "wall", 0.9, 1.0),
        row("a", "left", 0.5, 2.0),
        row("b", "wall", 0.7, 3.0),
        row("b", "left", 0.0, NAN, missed=1),
        row("c", "wall", 0.2, 8.0),
        row("c", "left", 0.3, NAN, absent=1),
    ]
    result = summary_of(rows, "published")
    assert result["cases"] == 3
    assert result["counts"] == {"pairs": 6, "absent": 1, "missed": 1, "spurious": 0}
    wall, left = result["classes"]["wall"], result["classes"]["left"]
    assert wall == pytest.approx({"dice": 0.6, "jaccard": 0.3, "hd95": 4.0, "asd": 2.0})
    assert left == pytest.approx({"dice": 0.8 / 3, "jaccard": 0.4 / 3, "hd95": 2.0, "asd": 1.0})
    assert result["mean"] == pytest.approx({key: (wall[key] + left[key]) / 2 for key in PUBLISHED})
    assert result["std"]["dice"] == pytest.approx(np.std([0.7, 0.35, 0.25]))
    assert result["std"]["hd95"] == pytest.approx(np.std([1.5, 3.0, 8.0]))
    failed = result["penalised"]  # of `left`, b is missed: (2 + 12) / 2; c is absent and left out
    assert failed["classes"]["left"] == pytest.approx({"hd95": 7.0, "asd": 6.5})
    assert failed["classes"]["wall"] == pytest.approx({key: wall[key] for key in ("hd95", "asd")})
    assert failed["mean"] == pytest.approx({"hd95": 5.5, "asd": 4.25})
    clean = summary_of([entry | {"assd": NAN} for entry in rows], "clean")
    assert clean["penalised"]["mean"]["hd95"] == pytest.approx((1.5 + (3.0 + 12.0) / 2 + 8.0) / 3)
    # complete: both orders agree
    assert clean["mean"]["dice"] == pytest.approx(result["mean"]["dice"])
    assert (
        clean["mean"]["hd95"]
        == pytest.approx((1.5 + 3.0 + 8.0) / 3)
        != pytest.approx(result["mean"]["hd95"])
    )


def test_clean_means_are_those_of_metrics():
    rows = [
        entry | {"assd": 0.5}
        for entry in (row("a", "x", 0.4), row("a", "y", NAN, NAN), row("b", "x", 0.8))
    ]
    found = summary_of(rows, "clean")
    assert {key: found[key] for key in summarise(rows)} == summarise(rows)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_accuracy_and_confidence_are_over_cases(protocol):
    """Student's t for n - 1 = 2 is 4.302653 at 97.5 %."""
    rows = [
        row("a", "x", 0.9),
        row("a", "y", 0.5),
        row("b", "x", 0.7, NAN),
        row("b", "y", 0.3, NAN),
        row("c", "x", 0.2),
        row("c", "y", 0.4),
    ]
    found = summary_of([entry | {"assd": 0.5} for entry in rows], protocol)
    assert found["accuracy"] == pytest.approx((97 + 98 + 99) / 3 / 200)
    means = np.array([0.7, 0.5, 0.3])
    half = 4.302653 * means.std(ddof=1) / np.sqrt(3)
    assert found["ci95"]["dice"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    # over the two cases that have a distance
    assert found["ci95"]["hd95"] == pytest.approx([1.0, 1.0])
    assert (
        summary_of([entry | {"assd": 0.5} for entry in rows[:2]], protocol)["ci95"]["dice"] is None
    )


def test_what_is_never_defined_is_none_so_that_summaries_are_json(tmp_path):
    result = summary_of(
        [row("a", "x", 0.0, NAN, missed=1), row("b", "x", 0.0, NAN, missed=1)], "published"
    )
    assert result["mean"]["hd95"] is result["std"]["hd95"] is result["classes"]["x"]["asd"] is None
    assert result["mean"]["dice"] == 0
    write_summary(tmp_path / "summary.json", result)
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text and json.loads(text) == result


@pytest.mark.parametrize("seed", range(3))
def test_published_means_of_volumes_count_a_missed_class_as_zero(seed):
    labels = [random_ids(VOLUME, seed + 10 * case) for case in range(3)]
    predictions = [random_ids(VOLUME, seed + 10 * case + 100) for case in range(3)]
    predictions[1][predictions[1] == 3] = 0
    names = ("background", "a", "b", "c")
    rows = [
        entry
        for case, (p, g) in enumerate(zip(predictions, labels))
        for entry in case_rows(
            f"case{case}", p, g, names, protocol="published", hd95="pooled", empty="agree"
        )
    ]
    expected = np.zeros((3, 3, 4))  # class, case, metric
    for case, (p, g) in enumerate(zip(predictions, labels)):
        for k in (1, 2, 3):
            if (p == k).any() and (g == k).any():
                scores = slow_published(p == k, g == k)
                expected[k - 1, case] = [scores[key] for key in PUBLISHED]
    assert not expected[2, 1].any()
    found = summary_of(rows, "published")
    assert [found["mean"][key] for key in PUBLISHED] == pytest.approx(expected.mean(1).mean(0))
    for name, values in zip("abc", expected.mean(1)):
        assert [found["classes"][name][key] for key in PUBLISHED] == pytest.approx(values)


# Files and tables

HEADERS = {
    ("clean", "voxels", "pooled"): [
        "dice_clean",
        "jaccard_clean",
        "hd95_pooled_voxels_clean",
        "asd_one_sided_voxels_clean",
        "nsd_clean",
        "assd_voxels_clean",
    ],
    ("clean", "pixels", "directed"): [
        "dice_clean",
        "jaccard_clean",
        "hd95_directed_pixels_clean",
        "asd_one_sided_pixels_clean",
        "nsd_clean",
        "assd_pixels_clean",
    ],
    ("published", "voxels", "pooled"): [
        "dice_published",
        "jaccard_published",
        "hd95_pooled_voxels_published",
        "asd_one_sided_voxels_published",
    ],
    ("published", "pixels", "directed"): [
        "dice_published",
        "jaccard_published",
        "hd95_directed_pixels_published",
        "asd_mean_of_both_pixels_published",
    ],
}


@pytest.mark.parametrize("protocol, unit, hd95", HEADERS)
def test_the_header_names_protocol_definition_and_unit(tmp_path, protocol, unit, hd95):
    shape = VOLUME if unit == "voxels" else IMAGE
    prediction, label = random_ids(shape, 5), random_ids(shape, 6)
    prediction[prediction == 2] = 0
    names = ("background", "a", "b", "c")
    rows = case_rows("x", prediction, label, names, protocol=protocol, hd95=hd95, empty="agree")
    write_csv(tmp_path / "metrics.csv", rows, protocol, hd95, unit)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [
        "case",
        "class",
        *HEADERS[protocol, unit, hd95],
        "absent",
        "missed",
        "false_positive",
        "accuracy",
        f"diagonal_{unit}",
        *[f"tolerance_{unit}"] * (protocol == "clean"),
    ]
    assert len(lines) == len(rows) == 3
    keys = METRICS if protocol == "clean" else PUBLISHED
    for line, expected in zip(lines, rows):
        assert line[:2] == ["x", expected["class"]]
        for text, key in zip(line[2:], keys):
            assert (
                text == ""
                if math.isnan(expected[key])
                else float(text) == pytest.approx(expected[key], rel=1e-5)
            )
        line = dict(zip(header, line, strict=True))
        flags = [line["absent"], line["missed"], line["false_positive"]]
        assert flags == [str(expected[flag]) for flag in FLAGS]
        assert float(line["accuracy"]) == pytest.approx(expected["accuracy"], rel=1e-5)
        assert float(line[f"diagonal_{unit}"]) == pytest.approx(math.hypot(*shape), rel=1e-5)
        assert line.get(f"tolerance_{unit}", "2") == "2"
    assert lines[1][4] == ("0" if (protocol, unit) == ("published", "voxels") else "")


def test_every_metric_is_in_scores_files_and_tables(tmp_path, capsys):
    label = block((6, 6, 6), slice(1, 5))
    prediction = np.roll(label, 1, axis=1)
    how = {"protocol": "clean", "hd95": "pooled", "empty": "agree"}
    rows = case_rows("x", prediction, label, ("background", "a"), **how)
    write_csv(tmp_path / "metrics.csv", rows, "clean", "pooled", "voxels")
    (line,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    columns = score_columns(line)
    assert list(columns) == list(METRICS)
    native = summary_of(rows, "clean")
    summary = describe(checkpoint("val"), "best.pt", "test")
    report(summary | {"protocol": "clean", "unit": "voxels", "native": native})
    table = capsys.readouterr().out
    (run,) = runs_table([summary | SIZES | {"native": native}], "native")[1]
    for key, metric in METRICS.items():
        assert float(line[columns[key]]) == pytest.approx(rows[0][key], rel=1e-5)
        assert native["mean"][key] == native["classes"]["a"][key] == pytest.approx(rows[0][key])
        if metric.shown:
            assert metric.title in table
            assert f"{metric.factor * rows[0][key]:.2f}" in run


def test_columns_of_metrics_whose_names_hold_another(monkeypatch):
    monkeypatch.setitem(METRICS, "hd95_small", METRICS["hd95"])
    header = ["case", "class", "dice_clean", "hd95_small_voxels", "hd95_pooled_voxels", "diagonal"]
    found = score_columns(header)
    assert found == {"dice": header[2], "hd95_small": header[3], "hd95": header[4]}
    with pytest.raises(ValueError, match="both hd95_mm and hd95_pooled_mm are columns of hd95"):
        score_columns(["hd95_mm", "hd95_pooled_mm"])


SIZES = {"parameters": 1, "gmacs": 1.0, "ms_per_volume": 1.0}


def checkpoint(selected_on):
    config = {
        "dataset": "acdc",
        "method": "crkd",
        "preset": "clean",
        "labelled": 3,
        "seed": 1,
        "tag": "",
        "max_steps": 9,
        "patch_size": (32, 32),
    }
    return {
        "config": config,
        "network": {"name": "unet2d"},
        "step": 7,
        "selected_on": selected_on,
        "code": "abc",
    }


@pytest.mark.parametrize(
    "name, selected_on, split, expected",
    [
        ("best.pt", "val", "test", False),
        ("best.pt", "val", "val", True),
        ("best.pt", "val", "val+test", True),
        ("best.pt", "test", "test", True),
        ("best.pt", "test", "val", False),
        ("last.pt", "val", "val", False),
        ("last.pt", "test", "test", False),
    ],
)
def test_a_best_checkpoint_scored_where_it_was_selected_is_marked(
    name, selected_on, split, expected
):
    found = describe(checkpoint(selected_on), name, split)
    assert found["selected_on_reported"] is expected
    assert (found["labelled"], found["student"], found["teacher"], found["step"]) == (
        3,
        "unet2d",
        None,
        7,
    )


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_table_has_classes_mean_counts_and_a_note(capsys, protocol, marked):
    rows = [
        entry | {"assd": 1.0, "nsd": nsd}
        for entry, nsd in (
            (row("a", "wall", 0.5, 4.0), 0.8),
            (row("a", "left", 0.0, NAN, missed=1), 0.0),
        )
    ]
    native = summary_of(rows, protocol)
    summary = describe(checkpoint("val"), "best.pt", "val" if marked else "test")
    if protocol == "clean":
        summary["nsd_tolerance"] = {"left": 2.0, "right": 2.0, "wall": 3.0}
    report(summary | {"protocol": protocol, "unit": "voxels", "native": native})
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == f"best.pt, step 7 of 9, {protocol} protocol, 1 {'val' if marked else 'test'} cases"
    )
    titles = ["Dice", "Jaccard", "HD95", "ASD", "NSD", "HD95*", "ASD*", "(voxels)"]
    figures = [
        ["wall", "0.5000", "0.2500", "4.00", "2.00", "0.8000", "4.00", "2.00"],
        ["left", "0.0000", "0.0000", "-", "-", "0.0000", "12.00", "12.00"],
        ["mean", "0.2500", "0.1250", "4.00", "2.00", "0.4000", "8.00", "7.00"],
    ]
    if protocol == "published":  # has no NSD
        for line in (titles, *figures):
            del line[4 + (line is not titles)]
    assert [line.split() for line in lines[1:5]] == [titles, *figures]
    assert lines[5] == "voxels labelled right: 48.50 %"
    assert lines[6] == "of 2 classes in 1 cases: 1 missed, 0 false positive, 0 absent"
    if protocol == "clean":
        assert lines.pop(7) == (
            "NSD: share of the surfaces that are not further apart than 2 voxels, wall 3 voxels"
        )
    assert lines[7].startswith("* with missed and false positive classes as the diagonal")
    assert lines[8] == "best.pt was selected on the val list"
    assert (
        lines[9:]
        == [
            "note: this checkpoint was selected on cases that are reported here; "
            "the scores of last.pt were not"
        ]
        * marked
    )
