"""Statistics of scores of the same cases under several runs: paired tests, effect sizes, confidence
intervals.

A run is given as {case: score}; None or NaN is a score that is undefined, such as a distance to an
organ that was not found. A pair of which either side is undefined is left out of the comparison and
counted, never replaced.

- p: Wilcoxon's signed-rank test, two-sided, of the differences that are not zero: exact for up to
  50 of them, also where some are equal in size, which scipy's exact distribution does not allow;
  beyond, scipy's normal approximation.
- p_holm: Holm's step-down correction over the rows of one call.
- effect: matched-pairs rank-biserial correlation (Kerby 2014), (rank sum of rises - of falls) /
  rank sum, in [-1, 1].
- low, high: bias-corrected and accelerated bootstrap interval of the mean difference over cases,
  from a fixed seed.

Patients are the sample: seeds of one cell are averaged case by case first (`average_seeds`), then
the cases of one patient, such as two frames of a heart (`by_patient`), or the same patients would
count several times as if they were independent. Where a scan is a patient, cases are patients.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.stats

Scores = Mapping[str, float | None]
EXACT = 50  # differences up to which all sign patterns are counted
# decimals of a difference: what is smaller is rounding, and must neither break a tie nor count as
# a change
DIGITS = 12


def paired_comparison(
    scores: Mapping[str, Scores],
    reference: str | None = None,
    *,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> list[dict]:
    """Compare runs in pairs: of all of them, or each with `reference`; -> a row for each pair.

    Keys of a row: `a`, `b`, the runs (a is the reference or the earlier one); `n`, cases scored
    under both; `undefined`, cases of both left out because a score is undefined; `unmatched`, cases
    that only one of them has; `mean_a`, `mean_b`, `difference` (of the means, b - a) with `low` and
    `high`; `rises`, `falls`, the cases in which b scores higher or lower; `effect`; `p`, `p_holm`;
    `least_p`, the smallest p that so many differing cases can give. None where there are too few
    cases: two for an interval, one for the rest.
    """
    if reference is not None and reference not in scores:
        raise ValueError(
            f"reference: '{reference}' is not among the runs; choose from {', '.join(scores)}"
        )
    if reference is None:
        pairs = list(itertools.combinations(scores, 2))
    else:
        pairs = [(reference, run) for run in scores if run != reference]
    rows = [_compared(a, b, scores[a], scores[b], level, resamples, seed) for a, b in pairs]
    for row, corrected in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm"] = corrected
    return rows


def _compared(
    a: str, b: str, first: Scores, second: Scores, level: float, resamples: int, seed: int
) -> dict:
    shared = [case for case in first if case in second]
    pairs = [
        (first[case], second[case])
        for case in shared
        if _known(first[case]) and _known(second[case])
    ]
    before, after = (np.array(column, float) for column in (zip(*pairs) if pairs else ((), ())))
    differences = np.round(after - before, DIGITS)
    differing = int(np.count_nonzero(differences))
    low, high = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed) or (
        None,
        None,
    )
    return {
        "a": a,
        "b": b,
        "n": len(pairs),
        "undefined": len(shared) - len(pairs),
        "unmatched": len(first) + len(second) - 2 * len(shared),
        "mean_a": float(before.mean()) if pairs else None,
        "mean_b": float(after.mean()) if pairs else None,
        "difference": float(differences.mean()) if pairs else None,
        "low": low,
        "high": high,
        "rises": int((differences > 0).sum()),
        "falls": int((differences < 0).sum()),
        "effect": rank_biserial(differences),
        "p": signed_rank_p(differences),
        "least_p": min(1.0, 2.0 ** (1 - differing)) if pairs else None,
        "p_holm": None,
    }


def signed_rank_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test; 1 if all differences are zero, None if there is
    none.
    """
    values = np.round(np.asarray(differences, float), DIGITS)
    if not len(values):
        return None
    values = values[values != 0]
    if len(values) < 2:  # either sign alone is as extreme as the other
        return 1.0
    if len(values) > EXACT:
        return float(scipy.stats.wilcoxon(values, method="asymptotic").pvalue)
    # doubled: equal sizes share a half rank
    ranks = np.rint(2 * scipy.stats.rankdata(np.abs(values))).astype(int)
    # how many patterns of signs there are, by the sum of the ranks of the positive differences
    patterns = np.zeros(ranks.sum() + 1)
    patterns[0] = 1
    for rank in ranks:
        patterns[rank:] += patterns[:-rank].copy()
    smaller = min(ranks[values > 0].sum(), ranks[values < 0].sum())
    return min(1.0, float(2 * patterns[: smaller + 1].sum() / 2 ** len(values)))


def rank_biserial(differences: Sequence[float]) -> float | None:
    """(Rank sum of the positive - of the negative) / rank sum of the differences that are not zero;
    0 if all are.
    """
    values = np.round(np.asarray(differences, float), DIGITS)
    if not len(values):
        return None
    values = values[values != 0]
    if not len(values):
        return 0.0
    ranks = scipy.stats.rankdata(np.abs(values))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None is no test, stays None and does not count."""
    tested = sorted((value, k) for k, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for place, (value, k) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - place) * value))
        corrected[k] = largest
    return corrected


def bootstrap_interval(
    values: Sequence[float | None], *, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> tuple[float, float] | None:
    """(low, high) of the mean by the BCa bootstrap over the defined values; None for fewer than
    two.

    Where BCa is not defined, with values that are all equal, the interval is a point; where it
    fails on very few values, the percentile interval of the same seed.
    """
    known = np.array([value for value in values if _known(value)], float)
    if len(known) < 2:
        return None
    if np.ptp(known) == 0:
        return float(known[0]), float(known[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            interval = scipy.stats.bootstrap(
                (known,),
                np.mean,
                confidence_level=level,
                n_resamples=resamples,
                method=method,
                rng=np.random.default_rng(seed),
                batch=max(1, 10**6 // len(known)),
            ).confidence_interval
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            break
    return float(interval.low), float(interval.high)


def average_seeds(runs: Sequence[Scores]) -> dict[str, float | None]:
    """Scores of the seeds of one cell -> their mean for each case.

    A case that is undefined or missing in one seed is undefined: were it averaged over the others,
    a seed that failed would improve the mean.
    """
    cases = dict.fromkeys(case for run in runs for case in run)
    means = {}
    for case in cases:
        values = [run.get(case) for run in runs]
        means[case] = sum(values) / len(values) if all(map(_known, values)) else None
    return means


def by_patient(scores: Scores, patient: Callable[[str], str]) -> dict[str, float | None]:
    """Scores of cases -> of each patient the mean over its cases; undefined if one of them is.

    patient: case name -> patient (dataloaders/lists.py: patient_function).
    """
    cases: dict[str, list[float | None]] = {}
    for case, value in scores.items():
        cases.setdefault(patient(case), []).append(value)
    return {
        name: sum(values) / len(values) if all(map(_known, values)) else None
        for name, values in cases.items()
    }


def case_means(
    runs: Mapping[str, Sequence[Mapping]], metric: str, *, shared: bool = False
) -> tuple[dict[str, dict[str, float | None]], int]:
    """Rows of runs, each with `case`, `class` and `metric` -> the mean over classes of each case,
    and how many (case, class) pairs were left out as undefined in some run.

    shared: average over the classes that are defined in all the runs that have the case. Distances
    need it: a run that misses a hard organ would be averaged over its easy ones. Dice does not,
    since a missed organ counts as 0.
    """
    values = {
        run: {(row["case"], row["class"]): row[metric] for row in rows}
        for run, rows in runs.items()
    }
    undefined = {
        pair for scores in values.values() for pair, value in scores.items() if not _known(value)
    }
    means: dict[str, dict[str, float | None]] = {}
    for run, scores in values.items():
        kept: dict[str, list[float]] = {}
        for pair, value in scores.items():
            of_case = kept.setdefault(pair[0], [])
            if _known(value) and not (shared and pair in undefined):
                of_case.append(value)
        means[run] = {
            case: sum(of_case) / len(of_case) if of_case else None for case, of_case in kept.items()
        }
    return means, len(undefined)


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
