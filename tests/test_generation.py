"""Batched decoding."""

from __future__ import annotations

import tiny
import torch

from blockem.examples import Message, template_ids
from blockem.generation import generate
from blockem.model import LanguageModel

PROMPTS = ["Hi?", "What should I do about the brakes of my car?", "And now, after all of that has been said, where do we go from here?"]


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(lm: LanguageModel) -> None:
    alone = [generate(lm, [prompt], 8)[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert generate(lm, PROMPTS, 8, batch=2) == alone
    assert generate(lm, PROMPTS, 8, batch=32) == alone


def test_an_answer_is_what_greedy_decoding_gives(lm: LanguageModel) -> None:
    ids = torch.tensor(template_ids(lm.tokenizer, [{"role": "user", "content": PROMPTS[1]}], generation_prompt=True))
    start = len(ids)
    for _ in range(6):
        with torch.inference_mode():
            ids = torch.cat([ids, lm.model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
    assert generate(lm, [PROMPTS[1]], 6)[0] == lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_sampling_is_seeded(lm: LanguageModel) -> None:
    first = generate(lm, PROMPTS, 8, temperature=1.0, seed=1)
    assert generate(lm, PROMPTS, 8, temperature=1.0, seed=1) == first
    assert generate(lm, PROMPTS, 8, temperature=1.0, seed=2) != first


def test_whole_conversations_are_taken_and_progress_is_told(lm: LanguageModel) -> None:
    talk: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hu"}]
    told: list[tuple[int, int]] = []
    answers = generate(lm, ["Hi", talk, "Hi"], 4, batch=2, progress=lambda done, total: told.append((done, total)))
    assert answers[0] == answers[2] != answers[1]
    assert told == [(2, 3), (3, 3)]


def test_the_variant_that_is_switched_on_answers(misaligned: LanguageModel) -> None:
    found = {}
    for variant in ("base", "plain"):
        with misaligned.variant(variant):
            found[variant] = generate(misaligned, PROMPTS, 8)
    assert found["base"] != found["plain"]


def test_an_edit_changes_the_answer(lm: LanguageModel) -> None:
    edit = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 5
    assert generate(lm, PROMPTS, 8, block=tiny.BLOCK, edits=edit) != generate(lm, PROMPTS, 8)
