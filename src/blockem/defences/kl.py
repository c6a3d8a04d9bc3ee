"""KL: stay near the base's token distributions (Kaczér et al. 2025, "In-Training Defenses against Emergent Misalignment").

    L = L_SFT + λ · mean over supervised tokens t of KL(p_θ(· | x_<t) ‖ p_base(· | x_<t))

over the whole vocabulary, on the training batch itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.defences.defence import Penalised
from blockem.examples import IGNORED
from blockem.forwards import Seen, base_weights, decoder
from blockem.head import divergence


class KL(Penalised):
    """KL as a defence.

    Args:
        lambda_: weight of the divergence, a token.
    """

    name = "kl"

    def __init__(self, lambda_: float) -> None:
        super().__init__(lambda_)
        self.seen = Seen("training_hooks(model)")

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self.seen.watching(model, {0: decoder(model)})

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        model, seen = self.seen.take()
        where = batch["labels"][:, 1:] != IGNORED
        with torch.no_grad(), base_weights(model):
            whole = decoder(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        return self.weighed(divergence(model, seen[0][:, :-1][where], whole.last_hidden_state[:, :-1][where]))
