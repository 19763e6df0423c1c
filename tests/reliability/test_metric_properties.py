"""Metrics on random masks: against medpy and MONAI, symmetry, bounds, and that a missed organ
improves no mean.
"""

import contextlib
import io
import math

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from medpy.metric import binary as medpy
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_iou,
)

import reporting
from metrics import DISTANCES, METRICS, case_metrics, class_dice, diagonal, mean_dice, summarise
from tests.reliability import profiles  # noqa: F401
from tools import tables
from utils.config import PROTOCOLS

NUM_CLASSES = 4
NAMES = ("background", "liver", "left kidney", "spleen")


@st.composite
def masks(draw, shape):
    """A mask: noise of any density, nothing, everything, one voxel, a box that may touch the
    border, or a face.
    """
    kind = draw(st.sampled_from(["noise", "noise", "empty", "full", "voxel", "box", "face"]))
    mask = np.zeros(shape, np.uint8)
    if kind == "noise":
        seed, density = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.02, 0.2, 0.5, 0.9]))
        mask = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    elif kind == "full":
        mask[:] = 1
    elif kind == "voxel":
        mask[tuple(draw(st.integers(0, side - 1)) for side in shape)] = 1
    elif kind == "box":
        ends = [sorted(draw(st.tuples(*[st.integers(0, side)] * 2))) for side in shape]
        mask[tuple(slice(a, max(a + 1, b)) for a, b in ends)] = 1
    elif kind == "face":
        axis, last = draw(st.integers(0, len(shape) - 1)), draw(st.booleans())
        mask[
            tuple(
                slice(-1, None) if last and k == axis else slice(0, 1) if k == axis else slice(None)
                for k in range(len(shape))
            )
        ] = 1
    return mask


shapes = st.one_of(
    st.tuples(*[st.integers(1, 12)] * 2),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.just((9, 1, 5)),
    st.just((1, 1)),
)
spacings = st.floats(0.2, 6.0).map(lambda value: round(value, 3))


@st.composite
def pairs(draw, filled=False):
    """(prediction, label, spacing); if `filled`, both have voxels."""
    shape = draw(shapes)
    chosen = masks(shape).filter(np.any) if filled else masks(shape)
    return draw(chosen), draw(chosen), [draw(spacings) for _ in shape]


def score(prediction, label, spacing, **options):
    (row,) = case_metrics(prediction, label, 2, spacing=spacing, **options)
    return row


@given(pairs(filled=True))
def test_equals_medpy(pair):
    prediction, label, spacing = pair
    expected = {
        "dice": medpy.dc(prediction, label),
        "jaccard": medpy.jc(prediction, label),
        "hd95": medpy.hd95(prediction, label, spacing),
        "asd": medpy.asd(prediction, label, spacing),
        "assd": medpy.assd(prediction, label, spacing),
        "absent": 0,
        "missed": 0,
        "spurious": 0,
    }
    row = score(*pair)
    assert 0 <= row.pop("nsd") <= 1  # which medpy does not have
    assert row == pytest.approx(expected, abs=1e-9)


@given(pairs(filled=True))
def test_equals_monai(pair):
    prediction, label, spacing = pair
    both = [torch.from_numpy(mask)[None, None] for mask in (prediction, label)]
    row = score(*pair, hd95="directed")
    assert row["dice"] == pytest.approx(compute_dice(*both).item(), abs=1e-6)
    assert row["jaccard"] == pytest.approx(compute_iou(*both).item(), abs=1e-6)
    hd95 = compute_hausdorff_distance(
        *both, include_background=True, percentile=95, spacing=spacing
    ).item()
    assert row["hd95"] == pytest.approx(hd95, rel=1e-4, abs=1e-4)
    forward = compute_average_surface_distance(
        *both, include_background=True, spacing=spacing
    ).item()
    assert row["asd"] == pytest.approx(forward, rel=1e-4, abs=1e-4)


@given(pairs(), st.sampled_from(["pooled", "directed"]))
def test_symmetry(pair, definition):
    """Everything but asd is symmetric; asd is d(P -> G), so the other one is that of the exchanged
    masks.
    """
    prediction, label, spacing = pair
    there, back = (
        score(*masks, spacing, hd95=definition)
        for masks in ((prediction, label), (label, prediction))
    )
    for key in ("dice", "jaccard", "hd95", "assd"):
        assert there[key] == pytest.approx(back[key], rel=1e-12, nan_ok=True)
    assert (there["missed"], there["spurious"], there["absent"]) == (
        back["spurious"],
        back["missed"],
        back["absent"],
    )
    if prediction.any() and label.any():
        assert (
            min(there["asd"], back["asd"]) - 1e-9
            <= there["assd"]
            <= max(there["asd"], back["asd"]) + 1e-9
        )


def test_asd_is_one_sided_as_medpy_says():
    small, large = np.zeros((12, 12), np.uint8), np.ones((12, 12), np.uint8)
    small[5, 5] = 1
    there, back = score(small, large, [1.0, 1.0])["asd"], score(large, small, [1.0, 1.0])["asd"]
    assert there == pytest.approx(medpy.asd(small, large)) and back == pytest.approx(
        medpy.asd(large, small)
    )
    assert there < back


@given(pairs(), st.sampled_from(["pooled", "directed"]), st.sampled_from(["nan", "diag", "agree"]))
def test_bounds(pair, definition, empty):
    prediction, label, spacing = pair
    row = score(*pair, hd95=definition, empty=empty)
    assert row["absent"] + row["missed"] + row["spurious"] == int(
        not (prediction.any() and label.any())
    )
    if row["absent"] and empty != "agree":
        assert all(math.isnan(row[key]) for key in METRICS)
        return
    assert row["dice"] == pytest.approx(2 * row["jaccard"] / (1 + row["jaccard"]))
    assert (row["dice"] == 1) == np.array_equal(prediction, label)
    for key in DISTANCES:
        if row["missed"] or row["spurious"]:
            assert (
                row[key] == diagonal(label.shape, spacing)
                if empty == "diag"
                else math.isnan(row[key])
            )
        else:
            assert 0 <= row[key] < diagonal(label.shape, spacing)


@given(pairs(filled=True), st.floats(0.1, 10))
def test_distances_grow_with_the_spacing(pair, factor):
    prediction, label, spacing = pair
    one, other = score(*pair), score(prediction, label, [factor * value for value in spacing])
    for key in DISTANCES:
        assert other[key] == pytest.approx(factor * one[key], rel=1e-9, abs=1e-12)
    assert (one["dice"], one["jaccard"]) == (other["dice"], other["jaccard"])


# A missed organ


@st.composite
def cases_with_one_to_miss(draw):
    """Predictions and labels of some cases, their spacings; a case and a class of its label to be
    missed.
    """
    shape = draw(st.sampled_from([(6, 5, 4), (7, 8)]))
    ids = arrays.arrays(np.uint8, shape, elements=st.integers(0, NUM_CLASSES - 1), fill=st.just(0))
    labels = [draw(ids) for _ in range(draw(st.integers(1, 3)))]
    labels[0][(0,) * len(shape)] = 1  # so that there is an organ
    predictions = []
    # between noise and the truth, so that organs are missed, invented and found
    for label in labels:
        seed, wrong = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.0, 0.2, 0.9]))
        rng = np.random.default_rng(seed)
        predictions.append(
            np.where(rng.random(shape) < wrong, rng.integers(0, NUM_CLASSES, shape), label)
        )
    present = [(case, k) for case, label in enumerate(labels) for k in np.unique(label) if k]
    spacing = [draw(spacings) for _ in shape]
    return (
        [p.astype(np.uint8) for p in predictions],
        labels,
        spacing,
        draw(st.sampled_from(present)),
    )


def without(predictions, chosen):
    """The same predictions, one of which misses an organ."""
    case, organ = chosen
    missing = [prediction.copy() for prediction in predictions]
    missing[case][missing[case] == organ] = 0
    return missing


def clean_summary(predictions, labels, spacing, empty):
    rows = [
        {"case": f"case{k}", "class": name, "diagonal": diagonal(label.shape, spacing), **row}
        for k, (prediction, label) in enumerate(zip(predictions, labels))
        for name, row in zip(
            NAMES[1:], case_metrics(prediction, label, NUM_CLASSES, spacing=spacing, empty=empty)
        )
    ]
    return summarise(rows)


def protocol_summary(predictions, labels, protocol, empty):
    rows = [
        row
        for k, pair in enumerate(zip(predictions, labels))
        for row in reporting.case_rows(
            f"case{k}", *pair, NAMES, protocol=protocol, hd95="pooled", empty=empty
        )
    ]
    return reporting.summary_of(rows, protocol)


def means(summary):
    """(what, metric) -> value, higher is better, of everything a table prints: penalised where an
    organ failed.
    """
    failed = summary["counts"]["missed"] + summary["counts"]["spurious"]
    found = {}
    for what, entry in [("mean", summary["mean"]), *summary["classes"].items()]:
        penalised = (
            summary["penalised"]["mean"]
            if what == "mean"
            else summary["penalised"]["classes"][what]
        )
        for metric in ("dice", "jaccard"):
            found[what, metric] = entry[metric]
        for metric in ("hd95", "asd"):
            value = penalised[metric] if failed else entry[metric]
            found[what, metric] = None if value is None else -value
    return found


def assert_no_better(before, after):
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert value is not None or before[key] is None, key
        assert before[key] is None or value <= before[key] + 1e-9, key


@given(cases_with_one_to_miss(), st.sampled_from(["nan", "diag", "agree"]))
def test_a_missed_organ_improves_no_mean(drawn, empty):
    predictions, labels, spacing, chosen = drawn
    before, after = (
        clean_summary(p, labels, spacing, empty)
        for p in (predictions, without(predictions, chosen))
    )
    assert_no_better(means(before), means(after))
    assert after["counts"]["missed"] >= max(1, before["counts"]["missed"])


@given(
    cases_with_one_to_miss(), st.sampled_from(PROTOCOLS), st.sampled_from(["nan", "diag", "agree"])
)
def test_a_missed_organ_improves_no_mean_of_either_protocol(drawn, protocol, empty):
    predictions, labels, _, chosen = drawn
    before, after = (
        protocol_summary(p, labels, protocol, empty)
        for p in (predictions, without(predictions, chosen))
    )
    assert_no_better(means(before), means(after))


@given(cases_with_one_to_miss())
def test_a_missed_organ_improves_neither_validation_nor_the_published_figures(drawn):
    predictions, labels, _, chosen = drawn
    missing = without(predictions, chosen)

    def validation(predictions):
        scores = [class_dice(p, label, NUM_CLASSES) for p, label in zip(predictions, labels)]
        return {k: None if math.isnan(v) else v for k, v in mean_dice(scores, NAMES[1:]).items()}

    assert_no_better(validation(predictions), validation(missing))
    case = chosen[0]
    before, after = (
        reporting.published_case(p[case], labels[case], NUM_CLASSES, False)
        for p in (predictions, missing)
    )
    assert after["dice"] <= before["dice"]
    assert after["hd95_voxels_penalised"] >= before["hd95_voxels_penalised"]


SELECTED = {"checkpoint": "best.pt", "selected_on_reported": False}


def printed(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function(*arguments)
    return out.getvalue()


@given(cases_with_one_to_miss(), st.sampled_from(PROTOCOLS))
def test_every_table_prints_the_number_of_misses_and_the_penalised_means(drawn, protocol):
    predictions, labels, spacing, chosen = drawn
    missing = without(predictions, chosen)
    native = protocol_summary(missing, labels, protocol, "agree")
    run = {
        "checkpoint": "best.pt",
        "step": 1,
        "max_steps": 2,
        "split": "test",
        "selected_on_reported": False,
        "protocol": protocol,
        "unit": "voxels",
        "native": native,
        "labelled": 3,
        "student": "vnet",
        "method": "crkd",
        "preset": "clean",
        "tag": "",
        "parameters": 1,
        "gmacs": 1.0,
        "ms_per_volume": 1.0,
        "seed": 0,
    }
    marked = [f"{native['penalised']['mean'][metric]:.2f}" for metric in ("hd95", "asd")]
    table = printed(reporting.report, run)
    (mean,) = [line.split() for line in table.splitlines() if line.startswith("mean ")]
    assert mean[-2:] == marked and "HD95*" in table and "compare runs by these" in table
    assert f"{native['counts']['missed']} missed" in table

    both = clean_summary(missing, labels, spacing, "nan")
    full = {"resampled": both, "native": both, "empty_policy": "nan", "unit": "mm"} | SELECTED
    table = printed(reporting.report_spaces, full, ("resampled", "native"))
    (mean,) = [line.split()[3:] for line in table.splitlines() if line.startswith("mean of cases")]
    assert (
        [f"{both['penalised']['mean'][metric]:.2f}" for metric in ("hd95", "asd")]
        == mean[5:7]
        == mean[12:]
    )
    assert f"{both['counts']['missed']} missed" in table and "compare runs by these" in table

    header, (cells,) = tables.runs_table([run], "native")
    cells = dict(zip(header, cells))
    assert [cells[f"{name} voxels"].split(" / ")[1] for name in ("HD95", "ASD")] == [
        f"{value}*" for value in marked
    ]
    assert cells["missed"] == f"{native['counts']['missed']}/{native['counts']['pairs']}"
    row = tables.row_of(run)
    assert tables.shown([row], "hd95").endswith(f" ({marked[0]}*)")
    assert tables.failed_fields([row], {"hd95": "hd95"})["hd95_penalised"] == marked[0]
    shown = tables.kd_cell([tables.row_of(run | full, "native")])
    assert f" / {both['penalised']['mean']['hd95']:.2f}*" in shown
    assert shown.endswith(f", missed {both['counts']['missed']}/{both['counts']['pairs']}")


def test_a_table_without_failures_has_no_marks():
    label = np.zeros((6, 5, 4), np.uint8)
    label[1:3], label[3:5], label[5:] = 1, 2, 3
    summary = clean_summary([label], [label], [1.0, 1.0, 1.0], "nan")
    run = {"resampled": summary, "native": summary, "empty_policy": "nan", "unit": "mm"} | SELECTED
    table = printed(reporting.report_spaces, run, ("resampled", "native"))
    assert "*" not in table and "0 missed" in table
