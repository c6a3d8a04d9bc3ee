"""Batched decoding of (prompt, edit) rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from blockem.examples import Message, by_length, template_ids
from blockem.model import LanguageModel
from blockem.steering import add_at_block


def generate(
    lm: LanguageModel,
    prompts: Sequence[str | list[Message]],
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    block: int | None = None,
    edits: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answers of the model as it is switched now, in the order of `prompts`.

    Args:
        prompts: one user message each, or whole conversations.
        temperature: 0 decodes greedily, else samples at this temperature, seeded.
        block, edits: add `edits [prompts, d_model]` (one a row) or `[d_model]` at the output of `block`, at every position.
    """
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    ids = [template_ids(lm.tokenizer, chat, generation_prompt=True) for chat in chats]
    answers = [""] * len(ids)
    torch.manual_seed(seed)
    done = 0
    for chosen in by_length([len(row) for row in ids], batch):
        width = max(len(ids[i]) for i in chosen)
        padded = torch.full((len(chosen), width), lm.tokenizer.pad_token_id)
        mask = torch.zeros_like(padded)
        for j, i in enumerate(chosen):
            padded[j, width - len(ids[i]) :] = torch.tensor(ids[i])
            mask[j, width - len(ids[i]) :] = 1
        if edits is None or block is None:
            steer: AbstractContextManager[None] = nullcontext()
        else:
            steer = add_at_block(lm.model, block, edits if edits.dim() == 1 else edits[chosen])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
        with torch.inference_mode(), steer:
            out = lm.model.generate(
                input_ids=padded.to(lm.device),
                attention_mask=mask.to(lm.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=lm.tokenizer.pad_token_id,
                **sampling,
            )
        for j, i in enumerate(chosen):
            answers[i] = lm.tokenizer.decode(out[j, width:], skip_special_tokens=True).strip()
        done += len(chosen)
        if progress:
            progress(done, len(ids))
    return answers
