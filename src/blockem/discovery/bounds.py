"""Upper confidence bounds for the mean over all items, from the items seen so far.

The items are a finite population: all the pairs that the exhaustive way would measure. Those seen are a sample of it without
replacement, so a bound narrows faster than usual and vanishes when all are seen (finite population correction). `alpha` is always
one-sided, of one bound; callers divide their error among the bounds that must hold. `alpha` 0 gives infinite bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

Array = NDArray[np.float64]
FEWEST = 5  # independent rows from which something in common is learnt


@dataclass(frozen=True)
class Likeness:
    """What rows of measurements have in common, so that they can lend each other strength.

    Attributes:
        scale: `[rows]`, what the rows' deviations are expected to be proportional to (None: all alike).
        groups: how many independent rows these are worth, where several belong to one latent (None: all of them).
        foreseen: `[rows, items]`, a guess of every item's value, for the items not seen too (None: no guess).
    """

    scale: Array | None = None
    groups: int | None = None
    foreseen: Array | None = None


def upper_mean(seen: Array, total: int, alpha: float, alike: Likeness | None = None) -> Array:
    """Upper bounds `[rows]` for the mean over `total` items of each row of `seen [rows, n]`; Student's t, variances moderated.

    A guess that is known for every item takes out what it explains (the regression estimator of survey sampling, Cochran 1977, ch. 7):
    only the rest has to be learnt from the sample. Its slope is common to all rows, so that no row is fitted by its own few items.

    A variance from eight items is a poor guess, so rows lend each other strength (Smyth 2004, "Linear models and empirical Bayes
    methods"): each is drawn toward the common one by as much as the rows agree. It is never drawn down: a row that varies more than
    the others keeps its own.
    """
    rows, n = seen.shape
    if n >= total:
        exact: Array = seen.mean(axis=1)
        return exact
    if alpha <= 0 or n < 2:
        return np.full(rows, math.inf)
    alike = alike or Likeness()
    groups = min(alike.groups or rows, rows)
    scale = np.ones(rows) if alike.scale is None else alike.scale
    unit, known = seen / scale[:, None], np.zeros(rows)
    if alike.foreseen is not None and groups >= FEWEST:
        guess = alike.foreseen / scale[:, None]
        apart = guess[:, :n] - guess[:, :n].mean(axis=1, keepdims=True)
        slope = float((apart * unit).sum() / max((apart**2).sum(), 1e-30))
        unit, known = unit - slope * guess[:, :n], slope * guess.mean(axis=1)
    own = unit.var(axis=1, ddof=1)
    prior, common = _prior(own, n - 1) if groups >= FEWEST else (0.0, 0.0)
    moderated = common if math.isinf(prior) else (prior * common + (n - 1) * own) / (prior + n - 1)
    # the common variance is itself an estimate, from so many deviations
    df = min(prior + n - 1, groups * (n - 1))
    deviation = np.sqrt(np.maximum(own, moderated) / n * (1 - n / total))
    bound: Array = scale * (unit.mean(axis=1) + known + stats.t.isf(alpha, df) * deviation)
    return bound


def _prior(variances: Array, df: int) -> tuple[float, float]:
    """How many degrees of freedom the rows' common variance is worth (0: nothing, inf: all vary alike), and that variance."""
    positive = variances[variances > 0]
    if len(positive) < 3:
        return 0.0, 0.0
    logs = np.log(positive) - special.digamma(df / 2) + math.log(df / 2)
    spread = float(logs.var(ddof=1)) - float(special.polygamma(1, df / 2))
    if spread <= 1e-3:
        return math.inf, float(np.exp(logs.mean()))
    half = float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - spread, 1e-3, 1e6))
    return 2 * half, float(np.exp(logs.mean() + special.digamma(half) - math.log(half)))


def upper_count(hits: int, n: int, total: int, alpha: float) -> int:
    """The largest number of hits among `total` items that leaves `hits` or fewer among `n` drawn a probability above `alpha`.

    Exact (hypergeometric).
    """
    if n >= total:
        return hits
    possible = np.arange(hits, total - (n - hits) + 1)
    if alpha <= 0:
        return int(possible[-1])
    likely = possible[stats.hypergeom.cdf(hits, total, possible, n) > alpha]
    return int(likely[-1]) if len(likely) else hits


def is_binary(values: Array) -> bool:
    """Whether these are verdicts (0, 1, missing) and not measures."""
    return bool(np.isin(values[~np.isnan(values)], (0.0, 1.0)).all())


def upper_gains(after: Array, before: Array, sign: int, alpha: float, alike: Likeness | None = None) -> Array:
    """Upper bounds `[rows]` for sign · (mean of `after` − mean of `before`) over all items.

    Args:
        after: `[rows, n]`, steered, on the first n items.
        before: `[items]`, unsteered, on all items.
        sign: +1 where a rise is a gain (induce), −1 where a fall is (repair).
        alike: of the gains; not used for verdicts, whose bounds are exact.
    """
    total = len(before)
    if is_binary(after) and is_binary(before):
        had = before[~np.isnan(before)]
        resting = float(had.mean()) if len(had) else math.nan
        return np.array([_upper_share(row, total, sign, alpha) - sign * resting for row in after])
    return upper_mean(sign * (after - before[: after.shape[1]]), total, alpha, alike)


def _upper_share(row: Array, total: int, sign: int, alpha: float) -> float:
    """The largest likely sign · share of hits among all items; missing verdicts shrink the sample."""
    had = row[~np.isnan(row)]
    missing = len(row) - len(had)
    total -= missing
    if not total:
        return math.inf
    hits = int(had.sum()) if sign > 0 else int((1 - had).sum())
    share = upper_count(hits, len(had), total, alpha) / total
    return share if sign > 0 else share - 1


def upper_differences(arms: Array, against: Array, total: int, alpha: float, alike: Likeness | None = None) -> Array:
    """Upper bounds `[rows]` for the mean over all items of `arms` − `against`, both `[rows, n]`, item by item on the same items."""
    differences = arms - against
    if not (is_binary(np.abs(arms)) and is_binary(np.abs(against))):
        return upper_mean(differences, total, alpha, alike)
    found = []
    for row in differences:
        had = row[~np.isnan(row)]
        all_items = total - (len(row) - len(had))
        rises = upper_count(int((had > 0).sum()), len(had), all_items, alpha / 2)
        falls = all_items - upper_count(int((had >= 0).sum()), len(had), all_items, alpha / 2)
        found.append((rises - falls) / max(all_items, 1))
    return np.array(found)


def looks(rungs: tuple[int, ...], total: int) -> tuple[tuple[int, int], ...]:
    """The rungs below `total`, and `total`, as half-open chunks of items."""
    ends = [*(n for n in sorted(set(rungs)) if n < total), total]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def as_array(values: Any) -> Array:
    """float64 numpy, from a tensor or list."""
    return np.asarray(values, dtype=np.float64)
