"""Pieces of work measured in turn, and rows of a table of ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Works = dict[str, Callable[[], object]]


def in_turn(works: Works, repeat: int) -> dict[str, list[float]]:
    """Seconds of each piece of work: one round that is not counted, then `repeat` rounds in which each has its turn."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    return taken


@dataclass(frozen=True)
class Measure:
    """One row: a ratio with its spread, and the mark that it is held against.

    Attributes:
        name, against: what is divided by what.
        value, low, high: median and quartiles over rounds; None with a `reason` where it was not measured.
        mark: the figure to reach.
        at_most: whether the ratio shall stay below the mark, or get above it.
    """

    name: str
    against: str
    value: float | None
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    at_most: bool = True
    reason: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None or self.mark is None:
            return None
        return self.value <= self.mark if self.at_most else self.value >= self.mark


def ratio(name: str, against: str, above: list[float], below: list[float], mark: float, at_most: bool = True) -> Measure:
    """Median and quartiles of the rounds' own ratios: both sides of one round had the same machine."""
    return spread(name, against, [a / b for a, b in zip(above, below, strict=True)], mark, at_most)


def spread(name: str, against: str, values: list[float], mark: float, at_most: bool = True) -> Measure:
    """Median and quartiles of values, one a round."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Measure(name, against, statistics.median(values), quartiles[0], quartiles[2], mark, at_most)


def missing(name: str, against: str, mark: float, at_most: bool, reason: str) -> Measure:
    return Measure(name, against, None, mark=mark, at_most=at_most, reason=reason)


def line(one: Measure) -> str:
    """A row of a Markdown table."""
    sign = "≤" if one.at_most else "≥"
    mark = "–" if one.mark is None else f"{sign} {one.mark:g}"
    if one.value is None:
        return f"| {one.name} | {one.against} | {mark} | – | not measured: {one.reason} |"
    spread = "" if one.low is None or one.high is None else f" [{one.low:.3g}, {one.high:.3g}]"
    said = {True: "reached", False: "missed", None: ""}[one.reached]
    return f"| {one.name} | {one.against} | {mark} | {one.value:.3g}{spread} | {said} |"
