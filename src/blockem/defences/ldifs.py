"""LDIFS: stay near the base's residual stream (Mukhoti et al. 2023; for emergent misalignment Kaczér et al. 2025).

    L = L_SFT + λ · mean over supervised tokens t, and over every fifth block l, of ‖h_l^θ(t) − h_l^base(t)‖²

The square is summed over the stream's width, not divided by it: λ therefore belongs to the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.examples import IGNORED
from blockem.forwards import base_weights, blocks, hidden_at_each, watch_training

EVERY = 5


def watched_blocks(n_blocks: int) -> list[int]:
    """Every fifth block from 0: 4, 9, 14, …; the last one of a model that has fewer than five."""
    return list(range(EVERY - 1, n_blocks, EVERY)) or [n_blocks - 1]


def distance(hidden: dict[int, Tensor], base: dict[int, Tensor]) -> Tensor:
    """Squared distance summed over tokens and `d_model`, mean over blocks, float32; `[tokens, d_model]` by block in both."""
    gaps = [(hidden[block].float() - base[block].detach().float()).pow(2).sum() for block in hidden]
    return torch.stack(gaps).mean()


class LDIFS(Defence):
    """LDIFS as a defence.

    Args:
        lambda_: weight of the squared distance, a token.
    """

    name = "ldifs"

    def __init__(self, lambda_: float) -> None:
        self.lambda_ = lambda_
        self.model: nn.Module | None = None
        self._seen: dict[int, Tensor] = {}

    @contextmanager
    def training_hooks(self, model: nn.Module) -> Iterator[None]:
        listed = blocks(model)
        with watch_training({block: listed[block] for block in watched_blocks(len(listed))}) as self._seen:
            self.model = model
            try:
                yield
            finally:
                self.model = None

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        if self.model is None or not self._seen:
            raise RuntimeError("no forward was watched: call model(**batch) with gradients inside training_hooks(model) first")
        where = batch["labels"] != IGNORED
        own = {block: self._seen.pop(block)[where] for block in list(self._seen)}
        with torch.no_grad(), base_weights(self.model):
            base = hidden_at_each(self.model, batch["input_ids"], batch["attention_mask"], list(own))
        return self.lambda_ * distance(own, {block: hidden[where] for block, hidden in base.items()})

    def logs(self) -> dict[str, float]:
        return {"lambda": self.lambda_}
