"""Edits of the residual stream as context managers, one edit a row.

Steering latent k with strength α adds α · m · s_k · d_k to a block's output at every position, prompt and generated, where m is the
median norm of the unsteered stream at that block (BLOCK-EM, stage 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.examples import Example, by_length, content_only, content_start, padded_ids, template_ids
from blockem.forwards import block_output, blocks, hidden_at
from blockem.model import LanguageModel


@contextmanager
def add_at_block(model: nn.Module, block: int, vectors: Tensor) -> Iterator[None]:
    """Add `vectors` to the output of `block` at every position while the context lasts.

    Args:
        model: any transformers causal LM, with or without adapters.
        block: block index from 0.
        vectors: `[d_model]` for one edit of all rows, or `[rows, d_model]`: row i of the batch gets vector i.
    """
    if vectors.dim() not in (1, 2):
        raise ValueError(f"vectors must be [d_model] or [rows, d_model], not {tuple(vectors.shape)}")

    def moved(hidden: Tensor) -> Tensor:
        if vectors.dim() == 2 and vectors.shape[0] != hidden.shape[0]:
            raise ValueError(f"{vectors.shape[0]} edits for a batch of {hidden.shape[0]} rows")
        edit = vectors if vectors.dim() == 1 else vectors[:, None, :]
        return hidden + edit.to(hidden.device, hidden.dtype)

    with edit_at_block(model, block, moved):
        yield


@contextmanager
def edit_at_block(model: nn.Module, block: int, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put `edit(hidden)` in the place of the output `[rows, tokens, d_model]` of `block` while the context lasts."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        moved = edit(block_output(output))
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = blocks(model)[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def median_norm(lm: LanguageModel, examples: Sequence[Example], block: int, batch: int = 16) -> float:
    """m: the median L2 norm of the base model's stream at `block` over the prompts' own tokens (system message left out)."""
    norms: list[Tensor] = []
    rows = []
    for example in examples:
        prompt = [m for m in example.chat() if m["role"] != "assistant"]
        rows.append((template_ids(lm.tokenizer, prompt, generation_prompt=True), content_start(lm.tokenizer, prompt)))
    with torch.inference_mode(), lm.variant("base"):
        for chosen in by_length([len(ids) for ids, _ in rows], batch):
            ids, mask = padded_ids([rows[i][0] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            keep = content_only(mask, [rows[i][1] for i in chosen])
            hidden = hidden_at(lm.model, ids, mask, block)
            norms.append(hidden[keep].float().norm(dim=-1).cpu())
    return float(torch.cat(norms).median())
