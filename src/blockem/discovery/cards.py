"""What a latent is about: the tokens its direction promotes through the unembedding, and the texts where it is most active."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import torch

from blockem.dictionary import Dictionary
from blockem.examples import Example, by_length, content_start, padded_ids, template_ids
from blockem.forwards import hidden_at, unwrapped
from blockem.model import LanguageModel


def promoted_tokens(lm: LanguageModel, dictionary: Dictionary, latents: Sequence[int], n: int = 8) -> list[tuple[list[str], list[str]]]:
    """For each latent the `n` tokens whose logits its direction raises most, and the `n` it lowers most."""
    head = unwrapped(lm.model).get_output_embeddings().weight.detach().float().cpu()
    effect = dictionary.directions(latents).cpu() @ (head - head.mean(dim=0)).T
    found = []
    for row in effect:
        up, down = row.topk(n).indices.tolist(), (-row).topk(n).indices.tolist()
        found.append(([lm.tokenizer.decode([t]) for t in up], [lm.tokenizer.decode([t]) for t in down]))
    return found


def top_contexts(
    lm: LanguageModel, dictionary: Dictionary, latents: Sequence[int], block: int, texts: Sequence[Example], n: int = 4, around: int = 12
) -> list[list[dict[str, Any]]]:
    """For each latent its `n` most active tokens in the base model over `texts`, one a text, with the words around them."""
    rows = dictionary.rows(latents).to(lm.device)
    ids = [template_ids(lm.tokenizer, text.chat())[:256] for text in texts]
    starts = [content_start(lm.tokenizer, text.chat()) for text in texts]
    best: list[list[tuple[float, int, int]]] = [[] for _ in latents]
    with torch.inference_mode(), lm.variant("base"):
        for chosen in by_length([len(row) for row in ids], 16):
            padded, mask = padded_ids([ids[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            hidden = hidden_at(lm.model, padded, mask, block)
            for j, i in enumerate(chosen):
                z = rows.encode(hidden[j, starts[i] : len(ids[i])]).cpu()
                if not len(z):
                    continue
                values, places = z.max(dim=0)
                for k, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
                    if value > 0:
                        heapq.heappush(best[k], (value, i, place + starts[i]))
                        if len(best[k]) > n:
                            heapq.heappop(best[k])
    cards = []
    for places_of in best:
        card = []
        for value, i, place in sorted(places_of, reverse=True):
            row = ids[i]
            decode = lm.tokenizer.decode
            card.append(
                {
                    "before": decode(row[max(0, place - around) : place]),
                    "token": decode(row[place : place + 1]),
                    "after": decode(row[place + 1 : place + 1 + around]),
                    "activation": round(value, 3),
                }
            )
        cards.append(card)
    return cards
