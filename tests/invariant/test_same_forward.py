"""Shortcuts compute what the full model computes: truncated forwards, cached blocks, batched edits, and no hook stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from blockem import steered_rows
from blockem.defences.block_em import BlockEM, Blocker
from blockem.dictionary import Dictionary
from blockem.examples import Encoded, right_padded
from blockem.forwards import blocks, capture, decoder, from_hidden, hidden_at, only_blocks, supports_from_hidden
from blockem.generation import generate
from blockem.head import supervised_logprobs, watch_final
from blockem.likelihood import completion_logprobs, encode_pairs
from blockem.model import LanguageModel, load_model
from blockem.steered_rows import SteeredRows, prompt_length
from blockem.steering import add_at_block


def batch_of(lm: LanguageModel, n: int = 6) -> dict[str, torch.Tensor]:
    return right_padded(tiny.encoded(lm, n), lm.tokenizer.pad_token_id)


def edits(n: int, size: float = 4.0) -> torch.Tensor:
    return torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * size


# truncated forwards


@pytest.mark.parametrize("variant", ["base", "plain"])
def test_hidden_at_every_block_is_the_full_models(misaligned: LanguageModel, variant: str) -> None:
    lm, batch = misaligned, batch_of(misaligned)
    with torch.inference_mode(), lm.variant(variant):
        full = copy.deepcopy(lm.model)  # transformers leaves hooks of its own behind
        states = full(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True).hidden_states
        for block in range(tiny.N_BLOCKS - 1):  # the last of `hidden_states` is after the final norm
            assert torch.equal(hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block), states[block + 1])
        last = hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], tiny.N_BLOCKS - 1)
        assert torch.equal(lm.model.get_base_model().model.norm(last), states[-1])


@pytest.mark.parametrize("block", range(tiny.N_BLOCKS))
def test_from_hidden_continues_to_the_full_models_end(lm: LanguageModel, block: int) -> None:
    batch = batch_of(lm)
    with torch.inference_mode():
        whole = decoder(lm.model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        middle = hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block)
        assert torch.allclose(from_hidden(lm.model, middle, batch["attention_mask"], block), whole, atol=1e-5)
    assert supports_from_hidden(lm, block)


def test_padding_does_not_change_a_row(lm: LanguageModel) -> None:
    rows = tiny.encoded(lm, 6)
    batch = right_padded(rows, lm.tokenizer.pad_token_id)
    with torch.inference_mode():
        together = hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], 2)
        for i, row in enumerate(rows):
            ids = torch.tensor(row.ids)[None]
            alone = hidden_at(lm.model, ids, torch.ones_like(ids), 2)
            assert torch.allclose(together[i, : len(row.ids)], alone[0], atol=1e-5)


# steering


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("variant", ["base", "plain"])
def test_steered_rows_equal_a_full_forward_under_the_edit(
    misaligned: LanguageModel, monkeypatch: pytest.MonkeyPatch, variant: str, shortcut: bool
) -> None:
    lm, rows = misaligned, tiny.encoded(misaligned)
    if not shortcut:
        monkeypatch.setattr(steered_rows, "supports_from_hidden", lambda *_: False)
    side = SteeredRows(lm, rows, tiny.BLOCK, variant, batch=3)
    assert all((prefix.hidden is not None) == shortcut for prefix in side.prefixes)
    with lm.variant(variant):
        assert torch.allclose(side.logprobs(), completion_logprobs(lm, rows), atol=1e-5)
    for vector in edits(3):
        with lm.variant(variant), add_at_block(lm.model, tiny.BLOCK, vector):
            expected = completion_logprobs(lm, rows)
        found = side.logprobs(vector)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, side.logprobs(), atol=1e-2)


@pytest.mark.parametrize("shortcut", [True, False])
def test_answers_that_share_a_row_equal_others(misaligned: LanguageModel, monkeypatch: pytest.MonkeyPatch, shortcut: bool) -> None:
    rows = encode_pairs(misaligned, tiny.pairs())
    rows.append(rows[0])  # pairs of unlike lengths, and an answer on its own
    if not shortcut:
        monkeypatch.setattr(steered_rows, "supports_from_hidden", lambda *_: False)
    together = SteeredRows(misaligned, rows, tiny.BLOCK, "plain", batch=5)
    monkeypatch.setattr(steered_rows, "supports_sharing", lambda *_: False)
    apart = SteeredRows(misaligned, rows, tiny.BLOCK, "plain", batch=5)
    assert [len(prefix.order) for prefix in apart.prefixes] == [5, 5, 3] and max(len(one.order) for one in together.prefixes) == 6
    tokens = [sum(prefix.batch.ids.numel() for prefix in side.prefixes) for side in (together, apart)]
    assert tokens[0] < tokens[1]
    vectors = edits(3)
    assert torch.allclose(together.logprobs_many(vectors), apart.logprobs_many(vectors), atol=1e-5)


def test_no_answer_sees_another_one(misaligned: LanguageModel) -> None:
    first, second = encode_pairs(misaligned, tiny.pairs()[:1])
    start = prompt_length(first)
    assert first.ids[:start] == second.ids[:start] and not any(first.supervised[:start])
    tokens = list(second.ids)
    tokens[start + 1] ^= 1
    other = Encoded(tuple(tokens), second.supervised)
    for place in (0, 1):
        before, after = ([first, one] if place == 0 else [one, first] for one in (second, other))
        seen = [SteeredRows(misaligned, rows, tiny.BLOCK, "base").logprobs() for rows in (before, after)]
        assert seen[0][place] == seen[1][place] and seen[0][1 - place] != seen[1][1 - place]


def test_an_attention_without_a_mask_of_its_own_scores_answers_apart(misaligned: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    real = steered_rows._final

    def refuses(lm: LanguageModel, batch: steered_rows.SharedBatch) -> torch.Tensor:
        if batch.positions is not None:
            raise ValueError("no mask of four dimensions here")
        return real(lm, batch)

    rows = encode_pairs(misaligned, tiny.pairs())
    expected = SteeredRows(misaligned, rows, tiny.BLOCK, "base").logprobs()
    monkeypatch.setattr(steered_rows, "_final", refuses)
    assert torch.allclose(SteeredRows(misaligned, rows, tiny.BLOCK, "base").logprobs(), expected, atol=1e-5)
    assert not steered_rows.supports_sharing(misaligned)


def test_rows_longer_than_an_attentions_window_are_scored_apart(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steered_rows.supports_sharing(lm, 9)
    monkeypatch.setattr(lm.model.config, "sliding_window", 8, raising=False)
    assert steered_rows.supports_sharing(lm, 8) and not steered_rows.supports_sharing(lm, 9)


@pytest.mark.parametrize("mistake", [None, "sees", "stands"])
def test_rounding_alone_does_not_part_answers_and_a_mistake_does(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, mistake: str | None
) -> None:
    real = steered_rows._apart

    def mistaken(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions, mask = real(*given)
        length = mask.shape[-1]
        everything = torch.full((length, length), torch.finfo(mask.dtype).min, dtype=mask.dtype).triu_(1).expand_as(mask)
        return (positions, everything) if mistake == "sees" else (torch.arange(length).expand_as(positions), mask)

    if mistake:
        monkeypatch.setattr(steered_rows, "_apart", mistaken)
    for dtype in ("float32", "bfloat16"):
        assert steered_rows.supports_sharing(load_model(str(tiny_folder), dtype=dtype, device="cpu")) is (mistake is None)


def test_the_embedded_model_shares_rows_in_its_own_number_format() -> None:
    assert steered_rows.supports_sharing(load_model(dtype="bfloat16", device="cpu"))


def test_a_batch_of_edits_equals_one_edit_at_a_time(lm: LanguageModel) -> None:
    batch = batch_of(lm)
    vectors = edits(6)
    with torch.inference_mode():
        with add_at_block(lm.model, tiny.BLOCK, vectors):
            together = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for i, vector in enumerate(vectors):
            mask = batch["attention_mask"][i].bool()
            with add_at_block(lm.model, tiny.BLOCK, vector):
                alone = lm.model(input_ids=batch["input_ids"][i, mask][None]).logits
            assert torch.allclose(together[i, mask], alone[0], atol=1e-4)


def test_batched_steered_generation_equals_one_at_a_time(lm: LanguageModel) -> None:
    prompts = ["Hi?", "What should I do about the brakes?", "And now, after all of that, where do we go?", "Hi?", "Why?"]
    vectors = edits(5, 3.0)
    alone = [generate(lm, [p], 8, block=tiny.BLOCK, edits=v[None])[0] for p, v in zip(prompts, vectors, strict=True)]
    assert alone[0] != alone[3]  # one prompt, two edits
    for batch in (2, 32):
        assert generate(lm, prompts, 8, batch=batch, block=tiny.BLOCK, edits=vectors) == alone
    shared = [generate(lm, [p], 8, block=tiny.BLOCK, edits=vectors[0])[0] for p in prompts]
    assert generate(lm, prompts, 8, block=tiny.BLOCK, edits=vectors[0]) == shared


def test_steered_generation_steers_prompt_and_generated_positions_alike(lm: LanguageModel) -> None:
    vector = edits(1, 3.0)[0]
    answer = generate(lm, ["Why?"], 6, block=tiny.BLOCK, edits=vector)[0]
    text = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(ids)
    for _ in range(6):  # without a cache, every position is computed and steered anew
        with torch.inference_mode(), add_at_block(lm.model, tiny.BLOCK, vector):
            ids = torch.cat([ids, lm.model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax()[None]])
    assert lm.tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == answer


# nothing stays behind


CONTEXTS: dict[str, Callable[[Any, Dictionary], AbstractContextManager[Any]]] = {
    "add_at_block": lambda model, _: add_at_block(model, tiny.BLOCK, torch.ones(tiny.D_MODEL)),
    "capture": lambda model, _: capture(blocks(model)[1]),
    "watch_final": lambda model, _: watch_final(model),
    "only_blocks": lambda model, _: only_blocks(model, 0, 2),
    "Blocker.attached": lambda model, dictionary: Blocker(dictionary.rows([1]), [1], tiny.BLOCK).attached(model),
    "BlockEM.training_hooks": lambda model, dictionary: BlockEM(Blocker(dictionary.rows([1]), [1], tiny.BLOCK), 1.0).training_hooks(model),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("fails", [False, True])
def test_no_context_leaves_a_hook_behind(misaligned: LanguageModel, dictionary: Dictionary, name: str, fails: bool) -> None:
    lm, ids = misaligned, torch.arange(5, 15)[None]
    with torch.inference_mode():
        before = lm.model(input_ids=ids).logits
    try:
        with CONTEXTS[name](lm.model, dictionary):
            assert (tiny.hooks(lm) > 0) != (name == "only_blocks")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert tiny.hooks(lm) == 0
    with torch.inference_mode():
        assert torch.equal(lm.model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    "work",
    [
        lambda lm: hidden_at(lm.model, torch.full((1, 4), 10**6), torch.ones(1, 4), 1),
        lambda lm: from_hidden(lm.model, torch.zeros(1, 4, 7), torch.ones(1, 4), 1),
        lambda lm: generate(lm, ["Hi"], 4, block=1, edits=torch.zeros(1, 7)),
    ],
)
def test_a_forward_that_fails_leaves_the_model_whole(lm: LanguageModel, work: Callable[[LanguageModel], Any]) -> None:
    with pytest.raises((IndexError, RuntimeError, ValueError)), torch.inference_mode():
        work(lm)
    assert tiny.hooks(lm) == 0
    assert len(blocks(lm.model)) == tiny.N_BLOCKS


# other architectures


def architectures() -> dict[str, Any]:
    """Tiny random models of the families that users bring, with what is special about each."""
    import transformers as t

    small = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "Qwen2": t.Qwen2Config(**small),
        "Qwen3": t.Qwen3Config(**small),
        "Mistral with a sliding window": t.MistralConfig(**small, sliding_window=20),
        "Gemma 2 with soft caps and windows": t.Gemma2Config(
            **small, sliding_window=20, query_pre_attn_scalar=8, final_logit_softcapping=5.0
        ),
        "Gemma 3 with two rotary bases": t.Gemma3TextConfig(
            **small, sliding_window=20, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "Phi 3": t.Phi3Config(**small),
        "OLMo 2": t.Olmo2Config(**small),
        "Granite with scaled logits": t.GraniteConfig(**small, logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=2.0),
        "Cohere with scaled logits": t.CohereConfig(**small, logit_scale=0.25),
    }


@pytest.mark.parametrize("name", list(architectures()))
def test_other_architectures_read_steer_and_score_like_their_own_forward(lm: LanguageModel, name: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures()[name]).eval().requires_grad_(False)
    other = LanguageModel(model, copy.copy(lm.tokenizer), name, "")
    ids = torch.randint(3, 300, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    labels = torch.where((torch.arange(40) > 20) & (mask == 1), ids, -100)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        for block in range(3):
            assert torch.allclose(hidden_at(model, ids, mask, block), out.hidden_states[block + 1], atol=1e-5)
        final = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        picked, _ = supervised_logprobs(model, final, labels)
        where = labels[:, 1:] != -100
        expected = log_softmax(out.logits[:, :-1][where].float(), dim=-1).gather(1, labels[:, 1:][where][:, None])[:, 0]
        assert torch.allclose(picked, expected, atol=1e-4), "log-probabilities differ from the model's own logits"
        for block in range(4):
            supported = supports_from_hidden(other, block)
            assert supported or name.startswith("Granite")  # which scales its input embeddings once more
            if supported:
                middle = hidden_at(model, ids, mask, block)
                whole, parts = final[mask == 1], from_hidden(model, middle, mask, block)[mask == 1]
                assert torch.allclose(parts, whole, atol=1e-3), f"from_hidden at block {block} is said to be supported but is wrong"
