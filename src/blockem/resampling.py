"""Bootstrap of many settings at once: prompts, pairs, rows and seeds are drawn once and weigh on every setting alike.

A statistic of one run is a ratio of two sums over items, Σ w·a / Σ w·b, with w how often the resample drew each item. Row 0 of every
array has w = 1 throughout: the estimate itself. Settings are therefore compared on the same prompts in every resample, and seeds are
drawn beside prompts, which all seeds share (crossed, not nested).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blockem.evaluation import Array, score_limits

Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Ratio:
    """A statistic of one run.

    Attributes:
        items: what is resampled: runs with equal `items` have the same ones in the same order.
        a, b: `[items]`, numerator and denominator; where b is 0 throughout a row of the resample, the statistic is NaN.
    """

    items: str
    a: Array
    b: Array

    @property
    def n(self) -> int:
        """Items that count."""
        return int((self.b != 0).sum())

    def minus(self, other: Ratio) -> Ratio:
        """The paired difference, on the items that both have."""
        if self.items != other.items or len(self.a) != len(other.a):
            raise ValueError("a paired difference needs the same items")
        both = (self.b != 0) & (other.b != 0)
        return Ratio(self.items, np.where(both, self.a - other.a, 0.0), np.where(both, self.b, 0.0))


@dataclass
class Draws:
    """Weights of every resample, drawn when first asked for and then the same for all."""

    resamples: int
    seed: int = 0
    _kept: dict[str, Array] = field(default_factory=dict)

    def weights(self, items: str, n: int) -> Array:
        """`[1 + resamples, n]`."""
        name = f"{items} {n}"
        if name not in self._kept:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=self.resamples) if n else np.zeros((self.resamples, 0))
            self._kept[name] = np.concatenate([np.ones((1, n)), drawn])
        return self._kept[name]

    def of(self, ratio: Ratio) -> Array:
        """The statistic in every resample, `[1 + resamples]`."""
        weights = self.weights(ratio.items, len(ratio.a))
        above, below = weights @ ratio.a, weights @ ratio.b
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(below != 0, above / below, np.nan)
        return found

    def difference(self, one: Ratio, other: Ratio) -> Array:
        """One statistic minus another in every resample, `[1 + resamples]`, on the items that both have.

        The denominators may differ: a share of what one plain fine-tune gained, and of what another did.
        """
        together = one.minus(other)
        both = together.b != 0
        if np.array_equal(one.b[both], other.b[both]):
            return self.of(together)  # the same number, and exactly 0 where nothing differs
        apart = [self.of(Ratio(each.items, np.where(both, each.a, 0.0), np.where(both, each.b, 0.0))) for each in (one, other)]
        found: Array = apart[0] - apart[1]
        return found

    def over(self, statistics: Mapping[tuple[str, int], Array], seeds: tuple[int, ...]) -> Array:
        """The mean over domains and seeds, `[1 + resamples]`; seeds are resampled, domains are not.

        Args:
            statistics: `[1 + resamples]` by (domain, seed); those that are missing are left out.
            seeds: all seeds of the comparison.
        """
        weights = self.weights("seeds", len(seeds))
        total, count = np.zeros(self.resamples + 1), np.zeros(self.resamples + 1)
        for place, seed in enumerate(seeds):
            stats = [one for (_, of_seed), one in statistics.items() if of_seed == seed]
            if stats:
                total += weights[:, place] * np.mean(stats, axis=0)
                count += weights[:, place]
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Array = np.where(count > 0, total / count, np.nan)
        return found


def summary(values: Array, n: int, share: bool = False) -> dict[str, Any] | None:
    """`{value, low, high, n}` with the 95 % percentile interval; None where there is no finite estimate.

    Args:
        share: the values are shares of `n` items, whose interval is at least as wide as one run's: 0 in 55 may be 6.5 % of many.
    """
    if not len(values) or not np.isfinite(values[0]):
        return None
    spread = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (values[0], values[0])
    if share:
        least, most = score_limits(float(values[0]), n)
        low, high = min(low, least), max(high, most)
    return {"value": float(values[0]), "low": float(low), "high": float(high), "n": n}


def front(worse: Array) -> Bools:
    """Which settings no other one dominates.

    Args:
        worse: `[settings, measures]` or `[settings, measures, resamples]`, less is better in each; NaN is on no front.

    Returns:
        `[settings]` or `[settings, resamples]`: dominated means that another is no worse in all measures and better in one.
    """
    here, there = worse[:, None], worse[None, :]
    no_worse: Bools = np.all(there <= here, axis=2)
    better: Bools = np.any(there < here, axis=2)
    dominated: Bools = np.any(no_worse & better, axis=1)
    found: Bools = ~dominated & np.all(np.isfinite(worse), axis=1)
    return found


@dataclass(frozen=True)
class Choice:
    """What was chosen, and how surely.

    Attributes:
        chosen: index of the setting; None where none qualifies.
        shares: `[settings]`, how often each is chosen over the resamples.
        none: how often none qualifies.
    """

    chosen: int | None
    shares: Array
    none: float
    qualified: tuple[bool, ...]


def choose(em: Array, kept: Array, more: Array | None, keep: float, most: float) -> Choice:
    """The least EM among settings that keep enough of the task and stay coherent, in the estimate and in every resample.

    Args:
        em, kept: `[settings, 1 + resamples]`; equal EM goes to the one that keeps more.
        more: incoherence above plain's, likewise; None where nothing was judged.
        keep, most: least `kept` and most `more` allowed.
    """
    slack = 1e-9  # plain keeps exactly all and is exactly as coherent as itself
    good: Bools = (kept >= keep - slack) & np.isfinite(em)
    if more is not None:
        good = good & (more <= most + slack)
    cost = np.where(good, em - 1e-9 * np.nan_to_num(kept), np.inf)
    best = cost.argmin(axis=0)
    any_good: Bools = np.any(good, axis=0)
    picks = best[1:][any_good[1:]]
    resamples = max(1, em.shape[1] - 1)
    shares = np.bincount(picks, minlength=len(em)) / resamples
    none = 1 - len(picks) / resamples
    return Choice(int(best[0]) if any_good[0] else None, shares, float(none), tuple(map(bool, good[:, 0])))
