"""Edits of the residual stream."""

from __future__ import annotations

import pytest
import tiny
import torch

from blockem.examples import content_start, template_ids
from blockem.forwards import blocks, hidden_at
from blockem.model import LanguageModel
from blockem.steering import add_at_block, median_norm

IDS = torch.arange(10, 34).reshape(3, 8)
MASK = torch.ones_like(IDS)


def test_the_edit_is_added_to_the_output_of_the_block_at_every_position(lm: LanguageModel) -> None:
    vector = torch.randn(tiny.D_MODEL)
    with torch.inference_mode():
        before = hidden_at(lm.model, IDS, MASK, 2)
        with add_at_block(lm.model, 2, vector):
            assert torch.allclose(hidden_at(lm.model, IDS, MASK, 2), before + vector, atol=1e-6)
        with add_at_block(lm.model, 3, vector):
            assert torch.equal(hidden_at(lm.model, IDS, MASK, 2), before)
        with add_at_block(lm.model, 1, vector):
            assert not torch.allclose(hidden_at(lm.model, IDS, MASK, 2), before)


def test_each_row_gets_its_own_edit(lm: LanguageModel) -> None:
    vectors = torch.randn(3, tiny.D_MODEL)
    with torch.inference_mode():
        before = hidden_at(lm.model, IDS, MASK, 2)
        with add_at_block(lm.model, 2, vectors):
            after = hidden_at(lm.model, IDS, MASK, 2)
    assert torch.allclose(after, before + vectors[:, None, :], atol=1e-6)


def test_edits_of_the_wrong_number_or_shape_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="2 edits for a batch of 3 rows"), add_at_block(lm.model, 2, torch.zeros(2, tiny.D_MODEL)):
        hidden_at(lm.model, IDS, MASK, 2)
    with pytest.raises(ValueError, match="vectors must be"), add_at_block(lm.model, 2, torch.zeros(1, 1, tiny.D_MODEL)):
        pass


def test_the_median_norm_is_over_the_prompts_own_tokens(misaligned: LanguageModel) -> None:
    lm, examples, norms = misaligned, tiny.rows()[:5], []
    for example in examples:
        prompt = example.chat()[:1]
        ids = torch.tensor(template_ids(lm.tokenizer, prompt, generation_prompt=True))[None]
        seen: list[torch.Tensor] = []
        handle = blocks(lm.model)[1].register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        with torch.inference_mode(), lm.variant("base"):
            lm.model(input_ids=ids)
        handle.remove()
        norms.append(seen[0][0, content_start(lm.tokenizer, prompt) :].norm(dim=-1))
    with lm.variant("plain"):  # it is always the base model's norm
        assert median_norm(lm, examples, 1, batch=2) == pytest.approx(float(torch.cat(norms).median()), rel=1e-5)
