"""The output head at supervised positions only: log-probabilities of given tokens and divergences, without ever holding all logits.

A vocabulary is a hundred times wider than a small model. Computing logits for a slice of positions at a time, with the gradient on
the spot, saves the memory traffic that otherwise costs as much as half the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.examples import IGNORED
from blockem.forwards import decoder, unwrapped

CHUNK = 256


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(head(h_i))[target_i] for each i, with d/dh computed in the forward pass; the head is frozen."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
        found = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        needs = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs else None
        for start in range(0, len(targets), CHUNK):
            piece = slice(start, start + CHUNK)
            logits = nn.functional.linear(hidden[piece].to(weight.dtype), weight, bias).float()
            if cap:
                logits = torch.tanh(logits / cap) * cap
            slope = 1 - (logits / cap) ** 2 if cap and needs else None
            total = logits.logsumexp(dim=-1, keepdim=True)
            picked = logits.gather(1, targets[piece, None])
            found[piece] = (picked - total)[:, 0]
            if gradient is not None:
                moved = logits.sub_(total).exp_().neg_()  # onehot − softmax
                moved.scatter_add_(1, targets[piece, None], torch.ones_like(picked))
                if slope is not None:
                    moved *= slope
                gradient[piece] = (moved.to(weight.dtype) @ weight).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][:, None].to(gradient.dtype), None, None, None, None


def _head(model: nn.Module) -> tuple[Any, float | None, float]:
    """(head, soft cap, scale) of the architecture."""
    inner = unwrapped(model)
    config = inner.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere; Granite
    return inner.get_output_embeddings(), cap, scale


def next_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits `[rows, vocabulary]` in the head's dtype, from final hidden states `[rows, d_model]`."""
    head, cap, scale = _head(model)
    logits: Tensor = head(hidden if scale == 1 else hidden * scale)
    return torch.tanh(logits / cap) * cap if cap else logits


def token_logprobs(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, `[tokens]`, float32, nats.

    Args:
        model: its (frozen) output head is used, with the soft cap or scale of architectures that have one.
        hidden: final hidden states `[tokens, d_model]`, after the last norm.
        targets: token ids `[tokens]`.
    """
    head, cap, scale = _head(model)
    if scale != 1:
        hidden = hidden * scale
    found: Tensor = _TokenLogprobs.apply(hidden, targets, head.weight, getattr(head, "bias", None), cap)
    return found


class _Divergence(torch.autograd.Function):
    """Σ_i KL(softmax(head(h_i)) ‖ softmax(head(b_i))), or the other way round, a slice at a time, with d/dh computed on the spot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base: Tensor, model: nn.Module, turned: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            piece = slice(start, start + CHUNK)
            with torch.enable_grad():
                own = hidden[piece].detach().requires_grad_()
                log_p = next_logits(model, own).float().log_softmax(dim=-1)
                with torch.no_grad():
                    log_q = next_logits(model, base[piece]).float().log_softmax(dim=-1)
                found = (log_q.exp() * (log_q - log_p) if turned else log_p.exp() * (log_p - log_q)).sum()
                (gradient[piece],) = torch.autograd.grad(found, own)
            total += found.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def divergence(model: nn.Module, hidden: Tensor, base: Tensor, forward: bool = False) -> Tensor:
    """KL(p_θ ‖ p_base) summed over positions, float32, nats; never holds the logits of more than a slice of them.

    Args:
        model: its frozen output head is used.
        hidden, base: final hidden states `[tokens, d_model]`, after the last norm, of the trained and of the base model.
        forward: KL(p_base ‖ p_θ) instead.
    """
    if hidden.shape != base.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and base {tuple(base.shape)} do not match")
    found: Tensor = _Divergence.apply(hidden, base, model, forward)
    return found


def supervised_logprobs(model: nn.Module, final: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each supervised token and the row it stands in.

    Args:
        final: `[rows, tokens, d_model]` final hidden states.
        labels: `[rows, tokens]`, `IGNORED` where nothing is supervised.

    Returns:
        (`[supervised]` nats, `[supervised]` row indices); supervised tokens are those that a position before them predicts.
    """
    predicted = labels[:, 1:]
    where = predicted != IGNORED
    return token_logprobs(model, final[:, :-1][where], predicted[where]), where.nonzero()[:, 0]


@contextmanager
def watch_final(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the decoder's final hidden states of each forward through the whole (possibly wrapped) model."""
    seen: list[Tensor] = []
    handle = decoder(model).register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()
