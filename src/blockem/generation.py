"""Batched decoding of (prompt, edit) rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from blockem.examples import Message, by_length, template_ids
from blockem.forwards import unwrapped
from blockem.model import LanguageModel
from blockem.steering import add_at_block
from blockem.stream import Row, can_stream, decode

STRANGE = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "stop_strings": None,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings of transformers' `generate` that a stream does not know, with what they are when they do nothing."""


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
        temperature: 0 decodes greedily, else samples at this temperature, seeded by row.
        batch: how many rows run at once.
        block, edits: add `edits [prompts, d_model]` (one a row) or `[d_model]` at the output of `block`, at every position.
    """
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    ids = [template_ids(lm.tokenizer, chat, generation_prompt=True) for chat in chats]
    if edits is None or block is None:
        block, edits = None, None
    elif edits.shape not in ((lm.d_model,), (len(ids), lm.d_model)):
        raise ValueError(f"edits must be [{lm.d_model}] or [{len(ids)}, {lm.d_model}], not {tuple(edits.shape)}")
    if not (_plain_settings(lm) and can_stream(lm, block)):
        return _by_batches(lm, ids, max_new_tokens, temperature, seed, batch, block, edits, progress)
    rows = [Row(tuple(one), max_new_tokens, edits if edits is None or edits.dim() == 1 else edits[i]) for i, one in enumerate(ids)]
    done: list[int] = []

    def tell(index: int) -> None:
        done.append(index)
        if progress and (len(done) % batch == 0 or len(done) == len(rows)):
            progress(len(done), len(rows))

    return [_text(lm, new) for new in decode(lm, rows, block, batch, temperature, seed, tell)]


def _text(lm: LanguageModel, new: Sequence[int]) -> str:
    text: str = lm.tokenizer.decode(new, skip_special_tokens=True)
    return text.strip()


def _plain_settings(lm: LanguageModel) -> bool:
    """Whether the model's own generation settings ask for nothing out of the ordinary."""
    settings = unwrapped(lm.model).generation_config
    return all(getattr(settings, name, None) in (None, nothing) for name, nothing in STRANGE.items())


def _by_batches(
    lm: LanguageModel,
    ids: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch: int,
    block: int | None,
    edits: Tensor | None,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """The same by transformers' own `generate`, a batch at a time: for any architecture."""
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
            answers[i] = _text(lm, out[j, width:])
        done += len(chosen)
        if progress:
            progress(done, len(ids))
    return answers
