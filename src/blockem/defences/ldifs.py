"""LDIFS: stay near the base's residual stream (Mukhoti et al. 2023; for emergent misalignment Kaczér et al. 2025).

    L = L_SFT + λ · mean over supervised tokens t, and over every fifth block l, of ‖h_l^θ(t) − h_l^base(t)‖²

The square is summed over the stream's width, not divided by it: λ therefore belongs to the model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.defences.defence import Penalised
from blockem.examples import IGNORED
from blockem.forwards import Seen, base_weights, blocks, hidden_at_each

EVERY = 5


def watched_blocks(n_blocks: int) -> list[int]:
    """Every fifth block from 0: 4, 9, 14, …; the last one of a model that has fewer than five."""
    return list(range(EVERY - 1, n_blocks, EVERY)) or [n_blocks - 1]


def distance(hidden: dict[int, Tensor], base: dict[int, Tensor]) -> Tensor:
    """Squared distance summed over tokens and `d_model`, mean over blocks, float32; `[tokens, d_model]` by block in both."""
    gaps = [(hidden[block].float() - base[block].detach().float()).pow(2).sum() for block in hidden]
    return torch.stack(gaps).mean()


class LDIFS(Penalised):
    """LDIFS as a defence.

    Args:
        lambda_: weight of the squared distance, a token.
    """

    name = "ldifs"

    def __init__(self, lambda_: float) -> None:
        super().__init__(lambda_)
        self.seen = Seen("training_hooks(model)")

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        listed = blocks(model)
        return self.seen.watching(model, {block: listed[block] for block in watched_blocks(len(listed))})

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        model, seen = self.seen.take()
        where = batch["labels"] != IGNORED
        with torch.no_grad(), base_weights(model):
            base = hidden_at_each(model, batch["input_ids"], batch["attention_mask"], list(seen))
        return self.weighed(distance({b: h[where] for b, h in seen.items()}, {b: h[where] for b, h in base.items()}))
