"""λ by itself: the user states what must hold, and λ follows during training (dual ascent on log λ).

    minimise L_SFT  subject to  c(θ) ≤ c*          λ ← λ · exp(η · clip(c̄ / c* − 1, −1, 1))     (a ceiling)
    maximise λ      subject to  k(θ) ≥ k*          λ ← λ · exp(η · clip((k̄ − k*) / (1 − k*), −1, 1))     (a floor)

c is a penalty or a rise, k the share of the task kept so far; the bar is a running mean over steps. On log λ, because λ's scale belongs to
the SAE and may be off by orders of magnitude at the start; clipped, so that one odd batch changes λ by a factor of e^η at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MEMORY = 0.9
"""Weight of the past in the running mean: about ten steps."""
LEAST, MOST = 1e-6, 1e12
"""λ stays between these multiples of its first value."""


@dataclass
class DualAscent:
    """One λ that follows one constraint.

    Args:
        value: λ to begin with.
        target: c* or k*.
        rate: η; λ changes by a factor of e^η a step at most.
        floor: the measured number shall stay at or above the target, not below.
    """

    value: float
    target: float
    rate: float = 0.1
    floor: bool = False
    mean: float | None = None

    def __post_init__(self) -> None:
        if not (self.value > 0 and self.target > 0 and self.rate > 0) or (self.floor and self.target >= 1):
            raise ValueError(f"λ {self.value}, target {self.target} and rate {self.rate} must be positive, and a floor below 1")
        self._range = (self.value * LEAST, self.value * MOST)

    def update(self, measured: float) -> float:
        """Take in this step's measurement and return the λ of the next step. A measurement that is no number changes nothing."""
        if not math.isfinite(measured):
            return self.value
        self.mean = measured if self.mean is None else MEMORY * self.mean + (1 - MEMORY) * measured
        gap = (self.mean - self.target) / (1 - self.target) if self.floor else self.mean / self.target - 1
        self.value = min(max(self.value * math.exp(self.rate * min(max(gap, -1.0), 1.0)), self._range[0]), self._range[1])
        return self.value

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value, "mean": self.mean}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.value, self.mean = state["value"], state["mean"]


MEASURABLE = 0.05
"""Nats per token that plain fine-tuning must have gained before a share of its gain means something."""


class PlainCurve:
    """Plain fine-tuning's loss by step: how much of its gain another training with the same rows in the same order has kept so far.

    Args:
        start: loss per token before training.
        log: rows with `step` and `sft_loss`, the mean since the row before; the order of data must be the same.
    """

    def __init__(self, start: float, log: Sequence[dict[str, float]]) -> None:
        if not log:
            raise ValueError("the plain fine-tune's log is empty")
        self.start = start
        self.rows = sorted((int(row["step"]), float(row["sft_loss"])) for row in log)

    def kept(self, step: int, loss: float) -> float:
        """Share of plain fine-tuning's gain at `step` that a loss of `loss` is; not a number while that gain is too small to tell."""
        plain = next((value for until, value in self.rows if until >= step), self.rows[-1][1])
        gain = self.start - plain
        return (self.start - loss) / gain if gain > MEASURABLE else math.nan
