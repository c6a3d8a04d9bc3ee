"""Log-probabilities of given completions."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from blockem.bundled import Pair
from blockem.errors import BlockemError
from blockem.examples import Encoded
from blockem.likelihood import completion_logprobs, completion_losses, encode_pairs, loss_per_token, margins
from blockem.model import LanguageModel


def direct(lm: LanguageModel, row: Encoded) -> float:
    """Mean log-probability of one row's supervised tokens, by the model's own logits."""
    ids = torch.tensor(row.ids)[None]
    labels = torch.where(torch.tensor(row.supervised), ids, torch.tensor(-100))
    with torch.inference_mode():
        logits = lm.model(input_ids=ids).logits
    return -float(cross_entropy(logits[0, :-1].float(), labels[0, 1:]))


def test_completion_logprobs_are_the_models_own_one_row_at_a_time(lm: LanguageModel) -> None:
    rows = tiny.encoded(lm, 9)
    expected = torch.tensor([direct(lm, row) for row in rows])
    for batch in (1, 4, 16):
        assert torch.allclose(completion_logprobs(lm, rows, batch), expected, atol=1e-5)


def test_losses_are_sums_and_tokens(lm: LanguageModel) -> None:
    rows = tiny.encoded(lm, 4)
    losses, tokens = completion_losses(lm, rows)
    assert tokens.tolist() == [row.n_supervised for row in rows]
    assert torch.allclose(losses / tokens, -completion_logprobs(lm, rows))


def test_a_model_in_training_is_looked_at_without_dropout(lm: LanguageModel) -> None:
    rows = tiny.encoded(lm, 4)
    quiet = loss_per_token(lm, rows)
    attention = lm.model.model.layers[0].self_attn
    before, attention.attention_dropout = attention.attention_dropout, 0.5
    try:
        lm.model.train()
        state = torch.get_rng_state()
        assert loss_per_token(lm, rows) == quiet and lm.model.training and torch.equal(torch.get_rng_state(), state)
    finally:
        attention.attention_dropout = before
        lm.model.eval()


def test_the_variant_that_is_switched_on_is_scored(misaligned: LanguageModel) -> None:
    rows = tiny.encoded(misaligned, 8)
    found = {}
    for variant in ("base", "plain"):
        with misaligned.variant(variant):
            found[variant] = completion_logprobs(misaligned, rows).mean()
    assert found["plain"] > found["base"] + 0.1


def test_a_margin_is_wrong_minus_right_per_token(lm: LanguageModel) -> None:
    pairs = tiny.pairs()
    rows = encode_pairs(lm, pairs)
    assert len(rows) == 2 * len(pairs)
    found = margins(completion_logprobs(lm, rows))
    for i, margin in enumerate(found.tolist()):
        assert margin == pytest.approx(direct(lm, rows[2 * i + 1]) - direct(lm, rows[2 * i]), abs=1e-5)
    text = lm.tokenizer.decode([t for t, s in zip(rows[1].ids, rows[1].supervised, strict=True) if s])
    assert text.startswith(pairs[0].wrong)


def test_swapping_right_and_wrong_turns_the_margin_around(lm: LanguageModel) -> None:
    swapped = [Pair(p.prompt, p.wrong, p.right, p.domain, p.split) for p in tiny.pairs()]
    there = margins(completion_logprobs(lm, encode_pairs(lm, tiny.pairs())))
    back = margins(completion_logprobs(lm, encode_pairs(lm, swapped)))
    assert torch.allclose(there, -back, atol=1e-5)


def test_a_pair_whose_answer_lies_beyond_the_length_limit_is_an_error_not_a_nan(lm: LanguageModel) -> None:
    pair = Pair("word " * 600, "Yes.", "No.", "law", "select")
    with pytest.raises(BlockemError, match="beyond"):
        encode_pairs(lm, [pair])
