"""Early stopping, a weaker control: the plain fine-tune, left where it stands after a share of its steps or at a given loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockem.config_training import TrainConfig
from blockem.defences.defence import Defence

LOOKS = 50
"""At a given loss: how often it is looked at in as many steps as plain fine-tuning takes."""


def early_stop(config: TrainConfig, share: float) -> TrainConfig:
    """The same training, stopped after `share` of the steps that it would take; the learning rate's schedule is that of all of them."""
    return replace(config, stop_after=config.stop_after * share)


class EarlyStop(Defence):
    """The same training, stopped at the first look that finds a loss of `target` or less: the control at another defence's SFT loss.

    Args:
        loss: of the model as it stands in training, nats per token on rows that it does not train on.
        target: where to stop.
        every: optimiser steps from one look to the next.
        ended: told, after the training, the loss of the last look (None: there was none) and whether the target was reached.
    """

    name = "early-stop"

    def __init__(
        self, loss: Callable[[], float], target: float, every: int = 1, ended: Callable[[float | None, bool], None] | None = None
    ) -> None:
        self.loss, self.target, self.every, self.ended = loss, target, every, ended
        self.seen: float | None = None

    @property
    def adapts(self) -> bool:
        return True

    def adapt(self, step: dict[str, float]) -> None:
        if int(step["step"]) % self.every == 0:
            self.seen = self.loss()

    @property
    def finished(self) -> bool:
        return self.seen is not None and self.seen <= self.target

    def logs(self) -> dict[str, float]:
        return {} if self.seen is None else {"heldout_loss": self.seen}

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def project(self, adapter: Path) -> None:
        if self.ended:
            self.ended(self.seen, self.finished)
