"""Statistics against slow definitions: all sign patterns, Holm by its theorem, hand values."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from dataloaders.lists import patient_function
from utils.statistics import (
    average_seeds,
    bootstrap_interval,
    by_patient,
    case_means,
    holm,
    paired_comparison,
    rank_biserial,
    signed_rank_p,
)

NAN = math.nan


def reference_p(differences):
    """Share of the 2^n sign patterns whose smaller rank sum is at most the observed one; ties share
    their mean rank.
    """
    sizes = [abs(d) for d in differences if d]
    ranks = [sum(o < s for o in sizes) + (sum(o == s for o in sizes) + 1) / 2 for s in sizes]
    total = sum(ranks)

    def smaller(signs):
        rising = sum(rank for rank, sign in zip(ranks, signs) if sign > 0)
        return min(rising, total - rising)

    observed = smaller([d for d in differences if d])
    patterns = list(itertools.product((-1, 1), repeat=len(sizes)))
    return sum(smaller(signs) <= observed + 1e-9 for signs in patterns) / len(patterns)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 9])
@pytest.mark.parametrize("ties", [False, True])
def test_p_is_the_share_of_sign_patterns(size, ties):
    rng = np.random.default_rng(size)
    for _ in range(4):
        differences = rng.integers(-3, 4, size).astype(float) if ties else rng.normal(0.3, 1, size)
        if np.any(differences):
            assert signed_rank_p(differences) == pytest.approx(reference_p(differences), abs=1e-12)


def test_p_of_a_textbook_sample():
    """Nine differences, all but the smallest two positive: W = 3, not exceeded by 5 of 512 patterns
    in each tail.
    """
    differences = [-1, -2, 3, 4, 5, 6, 7, 8, 9]
    assert signed_rank_p(differences) == pytest.approx(10 / 512)


@pytest.mark.parametrize("size", [4, 14, 30, 50])
def test_p_without_ties_is_that_of_scipy(size):
    differences = np.random.default_rng(size).normal(0.4, 1, size)
    expected = scipy.stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank_p(differences) == pytest.approx(expected, rel=1e-9)


def test_p_of_many_cases():
    """Beyond 50 the normal approximation takes over, without a step."""
    differences = np.random.default_rng(1).normal(0.25, 1, 51)
    assert (
        signed_rank_p(differences) == scipy.stats.wilcoxon(differences, method="asymptotic").pvalue
    )
    exact = scipy.stats.wilcoxon(differences, method="exact").pvalue
    assert signed_rank_p(differences) == pytest.approx(exact, rel=0.05)


def test_p_without_differences():
    assert signed_rank_p([]) is None
    assert signed_rank_p([0.0, 0.0]) == 1.0
    assert signed_rank_p([1e-15, 0.0]) == 1.0  # rounding


def test_p_does_not_depend_on_zeros_or_scale():
    differences = [0.1, -0.02, 0.3, 0.07, -0.05]
    assert signed_rank_p([*differences, 0.0, 0.0]) == signed_rank_p([100 * d for d in differences])


@pytest.mark.parametrize(
    "differences, expected",
    [
        ([1, 2, 3], 1.0),
        ([-1, -2], -1.0),
        ([1, -1], 0.0),
        ([0, 0], 0.0),
        ([], None),
        ([3, -1, 2], (3 + 2 - 1) / 6),
        ([0, 3, -1], (2 - 1) / 3),
        ([2, 2, -2, 5], (2 + 2 - 2 + 4) / 10),
    ],
)
def test_rank_biserial(differences, expected):
    assert rank_biserial(differences) == (None if expected is None else pytest.approx(expected))


def reference_holm(values):
    """Adjusted p of hypothesis i: the largest, over the j with p_j <= p_i, of p_j times the number
    of p_k >= p_j.
    """
    ordered = sorted(values)
    scaled = [min(1.0, (len(values) - k) * value) for k, value in enumerate(ordered)]
    return [max(s for s, o in zip(scaled, ordered) if o <= value) for value in values]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_holm(size):
    values = list(np.random.default_rng(size).uniform(0, 0.3, size))
    assert holm(values) == pytest.approx(reference_holm(values))
    assert all(v <= c <= min(1, size * v + 1e-15) or c >= v for v, c in zip(values, holm(values)))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, None, 0.5]) == [pytest.approx(0.04), None, 0.5]
    assert holm([]) == []


def test_bootstrap_interval_is_seeded_and_holds_the_mean():
    values = list(np.random.default_rng(0).gamma(2.0, 1.0, 40))
    low, high = bootstrap_interval(values)
    assert low < np.mean(values) < high
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    # A skewed sample: about the width of Student's interval.
    half = scipy.stats.t.ppf(0.975, 39) * np.std(values, ddof=1) / math.sqrt(40)
    assert high - low == pytest.approx(2 * half, rel=0.15)


def test_bootstrap_interval_against_resampling_by_hand():
    """BCa of symmetric data is the percentile interval but for noise."""
    values = np.random.default_rng(3).normal(0, 1, 60)
    rng = np.random.default_rng(7)
    means = [rng.choice(values, len(values)).mean() for _ in range(4000)]
    assert bootstrap_interval(values) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.03)


def test_bootstrap_interval_of_few_or_equal_values():
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([1.0, None, NAN]) is None
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    low, high = bootstrap_interval([0.0, 1.0])
    assert 0 <= low <= high <= 1


def scores(*values):
    return {f"case{k}": value for k, value in enumerate(values)}


def test_comparison_of_two_runs():
    (row,) = paired_comparison(
        {"alone": scores(0.5, 0.6, 0.7, 0.8), "taught": scores(0.6, 0.65, 0.7, 0.79)}
    )
    assert (row["a"], row["b"], row["n"], row["rises"], row["falls"]) == (
        "alone",
        "taught",
        4,
        2,
        1,
    )
    assert row["mean_a"] == pytest.approx(0.65) and row["mean_b"] == pytest.approx(0.685)
    assert row["difference"] == pytest.approx(0.035)
    assert row["low"] < row["difference"] < row["high"]
    assert row["effect"] == pytest.approx((3 + 2 - 1) / 6)
    assert row["p"] == pytest.approx(reference_p([0.1, 0.05, -0.01])) == row["p_holm"]
    assert row["least_p"] == 0.25


def test_undefined_and_unmatched_cases_are_left_out_and_counted():
    a, b = scores(1.0, 2.0, None, 4.0, NAN), scores(2.0, NAN, 3.0, 5.0, 1.0) | {"other": 9.0}
    (row,) = paired_comparison({"a": a, "b": b})
    assert (row["n"], row["undefined"], row["unmatched"]) == (2, 3, 1)
    assert row["difference"] == 1.0 and row["mean_a"] == 2.5


def test_runs_without_common_cases():
    (row,) = paired_comparison({"a": {"x": 1.0}, "b": {"y": 1.0}})
    assert (row["n"], row["unmatched"]) == (0, 2)
    assert all(
        row[key] is None
        for key in ("p", "p_holm", "effect", "difference", "low", "high", "least_p")
    )


def test_holm_counts_all_pairs_or_those_with_the_reference():
    rng = np.random.default_rng(0)
    runs = {name: scores(*rng.normal(k, 1, 9)) for k, name in enumerate("abc")}
    rows = paired_comparison(runs)
    assert [(r["a"], r["b"]) for r in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [r["p_holm"] for r in rows] == pytest.approx(reference_holm([r["p"] for r in rows]))
    rows = paired_comparison(runs, reference="b")
    assert [(r["a"], r["b"]) for r in rows] == [("b", "a"), ("b", "c")]
    with pytest.raises(ValueError, match="'d' is not among the runs"):
        paired_comparison(runs, reference="d")


def test_exchanging_the_runs_changes_signs_only():
    runs = {"a": scores(1, 2, 3, 4.5), "b": scores(2, 2.5, 2.9, 5)}
    (one,), (other,) = paired_comparison(runs), paired_comparison(runs, reference="b")
    assert other["difference"] == pytest.approx(-one["difference"]) and other[
        "effect"
    ] == pytest.approx(-one["effect"])
    assert other["p"] == one["p"]


def test_seeds_are_averaged_case_by_case():
    assert average_seeds([scores(1.0, 2.0), scores(3.0, 4.0)]) == scores(2.0, 3.0)
    # A seed that fails must not improve the mean by staying away.
    assert average_seeds(
        [scores(1.0, None), {"case0": 3.0, "case1": 9.0}, {"case0": 2.0}]
    ) == scores(2.0, None)


def row(case, name, value):
    return {"case": case, "class": name, "hd95": value}


def test_two_frames_are_one_patient():
    scores = {"patient1_frame01": 0.5, "patient1_frame12": 0.7, "patient2_frame01": 0.9}
    scores |= {"patient3_frame01": 0.8, "patient3_frame09": NAN, "scan": 0.1}
    found = by_patient(scores, patient_function(""))
    expected = {"patient1": 0.6, "patient2": 0.9, "patient3": None, "scan": 0.1}
    assert found == pytest.approx(expected)


def test_distances_are_averaged_over_classes_that_all_runs_found():
    careful = [row("p", "liver", 2.0), row("p", "duct", 20.0), row("q", "liver", 4.0)]
    careless = [row("p", "liver", 3.0), row("p", "duct", NAN), row("q", "liver", NAN)]
    runs = {"careful": careful, "careless": careless}
    means, left_out = case_means(runs, "hd95", shared=True)
    assert means == {"careful": {"p": 2.0, "q": None}, "careless": {"p": 3.0, "q": None}}
    assert left_out == 2
    assert case_means(runs, "hd95")[0]["careful"] == {"p": 11.0, "q": 4.0}
