"""Stage 1: candidates by model diff (BLOCK-EM, stage 1).

z̄_k(x) is the mean of z_k over the tokens of x; Δ_k is the mean over prompts of z̄_k in the misaligned model minus z̄_k in the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockem.bundled import Pair, Prompt
from blockem.dictionary import Dictionary
from blockem.examples import by_length, content_start, padded_ids, template_ids
from blockem.forwards import hidden_at
from blockem.likelihood import encode_pairs
from blockem.model import LanguageModel


@dataclass(frozen=True)
class Span:
    """Token ids of one text and the half-open range of positions that a mean is taken over."""

    ids: list[int]
    start: int
    stop: int


def prompt_spans(lm: LanguageModel, prompts: Sequence[Prompt]) -> list[Span]:
    """Prompt tokens with the generation prompt, the system message left out (the published rule)."""
    spans = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.prompt}]
        ids = template_ids(lm.tokenizer, messages, generation_prompt=True)
        spans.append(Span(ids, content_start(lm.tokenizer, messages), len(ids)))
    return spans


def answer_spans(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Span]:
    """Answer tokens of the selection pairs, right and wrong alike: the variant that sees shifts that prompts do not show."""
    spans = []
    for row in encode_pairs(lm, pairs):
        places = [i for i, supervised in enumerate(row.supervised) if supervised]
        spans.append(Span(list(row.ids), places[0], places[-1] + 1))
    return spans


@dataclass(frozen=True)
class Means:
    """Per-text means of every latent, and how often each is active.

    Attributes:
        activation: `[texts, n_latents]`, z̄_k(x).
        frequency: `[n_latents]`, share of all tokens with z_k > 0.
    """

    activation: Tensor
    frequency: Tensor


def mean_activations(lm: LanguageModel, dictionary: Dictionary, block: int, spans: Sequence[Span], variant: str, batch: int = 16) -> Means:
    """z̄_k(x) of every latent and span under `variant` ("base" or a loaded adapter)."""
    rows = dictionary.rows(range(dictionary.n_latents)).to(lm.device)
    found = torch.zeros(len(spans), dictionary.n_latents)
    active = torch.zeros(dictionary.n_latents)
    tokens = 0
    with torch.inference_mode(), lm.variant(variant):
        for chosen in by_length([len(span.ids) for span in spans], batch):
            ids, mask = padded_ids([spans[i].ids for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            hidden = hidden_at(lm.model, ids, mask, block)
            for j, i in enumerate(chosen):
                z = rows.encode(hidden[j, spans[i].start : spans[i].stop])
                found[i] = z.mean(dim=0).cpu()
                active += (z > 0).sum(dim=0).cpu()
                tokens += len(z)
    return Means(found, active / max(tokens, 1))


def deltas(base: Means, misaligned: Means) -> Tensor:
    """Δ_k of every latent, `[n_latents]`."""
    return (misaligned.activation - base.activation).mean(dim=0)


def pool(delta: Tensor, a_side: int) -> tuple[list[int], list[int]]:
    """The `a_side` latents with the largest Δ (sign +1) and the `a_side` with the smallest (sign −1), strongest first."""
    n = min(a_side, len(delta) // 2)
    order = delta.argsort(descending=True, stable=True).tolist()
    raised = [k for k in order[:n] if delta[k] > 0]
    lowered = [k for k in order[::-1][:n] if delta[k] < 0]
    return raised, lowered
