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
from blockem.head import CHUNK, next_logits


class _Divergence(torch.autograd.Function):
    """Σ_i KL(softmax(head(h_i)) ‖ softmax(head(b_i))), a slice of positions at a time, with d/dh computed on the spot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base: Tensor, model: nn.Module) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            piece = slice(start, start + CHUNK)
            with torch.enable_grad():
                own = hidden[piece].detach().requires_grad_()
                log_p = next_logits(model, own).float().log_softmax(dim=-1)
                with torch.no_grad():
                    log_q = next_logits(model, base[piece]).float().log_softmax(dim=-1)
                found = (log_p.exp() * (log_p - log_q)).sum()
                (gradient[piece],) = torch.autograd.grad(found, own)
            total += found.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def divergence(model: nn.Module, hidden: Tensor, base: Tensor) -> Tensor:
    """KL(p_θ ‖ p_base) summed over positions, float32, nats; never holds the logits of more than a slice of them.

    Args:
        model: its frozen output head is used.
        hidden, base: final hidden states `[tokens, d_model]`, after the last norm, of the trained and of the base model.
    """
    if hidden.shape != base.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and base {tuple(base.shape)} do not match")
    found: Tensor = _Divergence.apply(hidden, base, model)
    return found


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
