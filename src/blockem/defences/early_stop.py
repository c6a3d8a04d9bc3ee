"""Early stopping, a weaker control: the plain fine-tune, left where it stands after a share of its steps."""

from __future__ import annotations

from dataclasses import replace

from blockem.config_training import TrainConfig


def early_stop(config: TrainConfig, share: float) -> TrainConfig:
    """The same training, stopped after `share` of the steps that it would take; the learning rate's schedule is that of all of them."""
    return replace(config, stop_after=config.stop_after * share)
