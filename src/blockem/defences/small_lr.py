"""A smaller learning rate, a weaker control: as many steps, each a shorter one."""

from __future__ import annotations

from dataclasses import replace

from blockem.config_training import TrainConfig


def small_lr(config: TrainConfig, factor: float) -> TrainConfig:
    """The same training with `factor` times the learning rate."""
    return replace(config, lr=config.lr * factor)
