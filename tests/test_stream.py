"""A stream of rows decodes as one row at a time does, whatever shares the batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem import generation, packing, stream
from blockem.forwards import blocks, decoder
from blockem.generation import generate
from blockem.model import LanguageModel, load_model
from blockem.packing import can_pack, packed_weights
from blockem.slots import attention, step_mask
from blockem.steering import add_at_block
from blockem.stream import Row, can_stream, decode

PROMPTS = [tuple(range(40, 40 + n)) for n in (9, 3, 17)] + [(7, 300, 21, 5)]


def edit(seed: int) -> torch.Tensor:
    return torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(seed)) * 4


def mixed() -> list[Row]:
    """Rows of all kinds: every prompt under several edits, a zero edit, none, and limits from 1 to 9."""
    edits = [None, torch.zeros(tiny.D_MODEL), edit(0), edit(1)]
    return [Row(ids, 1 + (3 * i + 4 * j) % 9, edits[j]) for i, ids in enumerate(PROMPTS) for j in range(4)]


def alone(lm: LanguageModel, row: Row, block: int = tiny.BLOCK) -> list[int]:
    """The row by itself through transformers' `generate`."""
    ids = torch.tensor([row.ids])
    vector = torch.zeros(tiny.D_MODEL) if row.edit is None else row.edit
    with torch.inference_mode(), add_at_block(lm.model, block, vector):
        out = lm.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=row.limit, do_sample=False, pad_token_id=0
        )
    found: list[int] = out[0, len(row.ids) :].tolist()
    return found


@pytest.fixture
def ends(lm: LanguageModel) -> Any:
    """Sets the tokens that end a row."""
    settings = lm.model.generation_config
    before = settings.eos_token_id

    def set_ends(*tokens: int) -> None:
        settings.eos_token_id = list(tokens)

    yield set_ends
    settings.eos_token_id = before


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_rows_decode_as_each_does_alone(lm: LanguageModel, slots: int) -> None:
    rows = mixed()
    expected = [alone(lm, row) for row in rows]
    ended: list[int] = []
    assert decode(lm, rows, tiny.BLOCK, slots, finished=ended.append) == expected
    assert sorted(ended) == list(range(len(rows)))
    assert expected[0] != expected[2][: len(expected[0])]  # the edits do something


@pytest.mark.parametrize("block", [0, tiny.N_BLOCKS - 1])
def test_the_first_and_the_last_block_can_be_edited(lm: LanguageModel, block: int) -> None:
    rows = [Row(ids, 5, edit(i)) for i, ids in enumerate(PROMPTS)]
    assert decode(lm, rows, block, 3) == [alone(lm, row, block) for row in rows]


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_rows_that_end_early_make_room(lm: LanguageModel, ends: Any, slots: int) -> None:
    rows = [Row(row.ids, 6, row.edit) for row in mixed()]
    full = [alone(lm, row) for row in rows]
    ends(full[0][0], full[2][1], full[7][3])  # a first token, so some rows end at once, and two later ones
    expected = [alone(lm, row) for row in rows]
    assert len({len(one) for one in expected}) > 2 and min(map(len, expected)) == 1
    assert decode(lm, rows, tiny.BLOCK, slots) == expected


def test_rows_that_all_end_with_the_prompt(lm: LanguageModel) -> None:
    rows = [Row(row.ids, 1, row.edit) for row in mixed()]
    assert decode(lm, rows, tiny.BLOCK, 3) == [alone(lm, row) for row in rows]


def test_no_rows_and_rows_that_cannot_be(lm: LanguageModel) -> None:
    assert decode(lm, []) == []
    with pytest.raises(ValueError, match="at least one new token"):
        decode(lm, [Row((5, 6), 0)])
    with pytest.raises(ValueError, match="no block to add them at"):
        decode(lm, [Row((5, 6), 2, edit(0))])


def test_very_different_lengths_and_short_pieces(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PROMPT_TOKENS", 20)
    rows = [Row(tuple(range(30, 30 + n)), 4, edit(n)) for n in (150, 3, 5, 140, 30, 4)]
    assert len(stream._like_lengths(rows, [0, 3, 4, 2, 5, 1])) == 2
    assert decode(lm, rows, tiny.BLOCK, 4) == [alone(lm, row) for row in rows]


def test_what_rows_share_runs_once(lm: LanguageModel) -> None:
    read: dict[int, int] = {0: 0, tiny.N_BLOCKS - 1: 0}
    handles = []
    for block in read:

        def count(_module: Any, _inputs: Any, output: torch.Tensor, block: int = block) -> None:
            read[block] += output.shape[0] if output.shape[1] > 1 else 0

        handles.append(blocks(lm.model)[block].register_forward_hook(count))
    rows = [Row(ids, 3, edit(j)) for ids in PROMPTS for j in range(5)]
    decode(lm, rows, tiny.BLOCK, 4)
    assert read == {0: len(PROMPTS), tiny.N_BLOCKS - 1: len(rows)}
    decode(lm, [Row(ids, 3) for ids in PROMPTS for _ in range(5)], None, 4)
    for handle in handles:
        handle.remove()
    assert read == {0: 2 * len(PROMPTS), tiny.N_BLOCKS - 1: len(rows) + len(PROMPTS)}


def test_sampled_rows_do_not_depend_on_their_company(lm: LanguageModel) -> None:
    rows = [Row(row.ids, 6, row.edit) for row in mixed()]
    found = decode(lm, rows, tiny.BLOCK, 1, temperature=1.0, seed=3)
    assert decode(lm, rows, tiny.BLOCK, 5, temperature=1.0, seed=3) == found
    assert decode(lm, rows[:6], tiny.BLOCK, 64, temperature=1.0, seed=3) == found[:6]
    assert decode(lm, rows, tiny.BLOCK, 5, temperature=1.0, seed=4) != found
    same = decode(lm, [Row(PROMPTS[0], 6)] * 8, temperature=1.0)
    assert len(set(map(tuple, same))) > 1


def test_sampling_follows_the_models_distribution(lm: LanguageModel) -> None:
    with torch.inference_mode():
        chances = torch.softmax(lm.model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].float() / 0.3, dim=-1)
    top = int(chances.argmax())
    n = 2000
    share = sum(new == [top] for new in decode(lm, [Row(PROMPTS[1], 1)] * n, temperature=0.3)) / n
    assert share == pytest.approx(float(chances[top]), abs=4 * float(chances[top] * (1 - chances[top]) / n) ** 0.5 + 1e-9)


@pytest.mark.parametrize("variant", ["base", "plain"])
def test_the_adapter_that_is_switched_on_decodes(misaligned: LanguageModel, variant: str) -> None:
    rows = mixed()
    with misaligned.variant(variant):
        assert decode(misaligned, rows, tiny.BLOCK, 5) == [alone(misaligned, row) for row in rows]


def test_a_penalty_for_repeating_is_kept(lm: LanguageModel) -> None:
    rows = [Row(row.ids, 8, row.edit) for row in mixed()]
    without = decode(lm, rows, tiny.BLOCK, 5)
    settings = lm.model.generation_config
    settings.repetition_penalty = 1.3
    try:
        expected = [alone(lm, row) for row in rows]
        assert decode(lm, rows, tiny.BLOCK, 5) == expected != without
    finally:
        settings.repetition_penalty = None


def test_the_model_is_left_as_it_was(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(stream, "_choose", broken)
    with pytest.raises(RuntimeError, match="broken"):
        decode(lm, mixed(), tiny.BLOCK, 3)
    assert lm.model.config._attn_implementation == "sdpa"
    assert len(blocks(lm.model)) == tiny.N_BLOCKS
    assert tiny.hooks(lm) == 0


# where it does not apply


@pytest.fixture
def foreign(tokenizer: Any) -> LanguageModel:
    """A random Gemma 2, whose attention windows and soft caps a stream does not know."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LanguageModel(Gemma2ForCausalLM(config).eval(), tokenizer, "foreign", "main")


def test_an_architecture_that_it_does_not_know_goes_transformers_way(lm: LanguageModel, foreign: LanguageModel) -> None:
    assert can_stream(lm) and can_stream(lm, 0) and can_stream(lm, tiny.BLOCK)
    assert not can_stream(foreign) and not can_stream(foreign, 1)
    texts = ["Hi?", "And what should I do about the brakes of my car?"]
    edits = torch.randn(2, 16)
    both = generate(foreign, texts, 5, block=1, edits=edits)
    assert both == [generate(foreign, [text], 5, block=1, edits=one)[0] for text, one in zip(texts, edits, strict=True)]


@pytest.mark.parametrize("edits", [None, edit(0), torch.stack([edit(1), edit(2)])])
def test_both_ways_give_the_same_answers(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, edits: torch.Tensor | None) -> None:
    texts = ["Hi?", "And what should I do about the brakes of my car?"]
    streamed = generate(lm, texts, 8, block=tiny.BLOCK, edits=edits)
    monkeypatch.setattr(generation, "can_stream", lambda *_: False)
    assert generate(lm, texts, 8, block=tiny.BLOCK, edits=edits) == streamed


def test_settings_that_it_does_not_know_go_transformers_way(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: Any, **_more: Any) -> None:
        raise AssertionError("streamed")

    monkeypatch.setattr(generation, "decode", never)
    settings = lm.model.generation_config
    settings.no_repeat_ngram_size = 2
    try:
        assert len(generate(lm, ["Hi?"], 4)) == 1
    finally:
        settings.no_repeat_ngram_size = None


def test_edits_of_a_wrong_shape_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="edits must be"):
        generate(lm, ["Hi?"], 4, block=tiny.BLOCK, edits=torch.zeros(2, tiny.D_MODEL))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [2, 6])
def test_one_query_attends_as_pytorch_has_it(dtype: str, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = getattr(torch, dtype)
    query, key, value = (torch.randn(3, n, t, 8, generator=generator).to(numbers) for n, t in ((heads, 1), (2, 20), (2, 20)))
    mask = step_mask(torch.tensor([19, 4, 11]), 16, numbers)
    key, value = key[:, :, :16], value[:, :, :16]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    found, _ = attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    assert found.shape == (3, 1, heads, 8)
    assert torch.allclose(found.transpose(1, 2).float(), expected.float(), atol=1e-5 if dtype == "float32" else 2e-2)


# weights laid out anew


@pytest.mark.parametrize("variant", ["base", "plain"])
def test_packed_weights_are_the_models_own_with_its_adapter(tiny_folder: Path, plain_adapter: Path, variant: str) -> None:
    lm = load_model(str(tiny_folder), dtype="bfloat16", device="cpu")
    lm.add_adapter(plain_adapter, "plain")
    if not can_pack(lm.model):
        pytest.skip("this processor is not fast at bfloat16")

    def final() -> torch.Tensor:
        found: torch.Tensor = decoder(lm.model)(input_ids=torch.tensor([PROMPTS[2]]), use_cache=False).last_hidden_state.float()
        return found

    with torch.inference_mode():
        with lm.variant("plain" if variant == "base" else "base"):
            other = final()
        with lm.variant(variant):
            before = final()
            assert len(packing._weights(lm.model)) == 7 * tiny.N_BLOCKS + 1
            with packed_weights(lm.model, 8):
                packed = final()
            assert torch.equal(final(), before)
    assert (other - before).norm() > 0.1 * before.norm()
    assert (packed - before).norm() < 0.03 * before.norm()


def test_a_long_stream_packs_and_a_short_one_does_not(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []

    def watch(_model: Any, rows: int) -> Any:
        packed.append(rows)
        return nullcontext()

    monkeypatch.setattr(stream, "packed_weights", watch)
    monkeypatch.setattr(stream, "WORTH_PACKING", 20)
    decode(lm, [Row(PROMPTS[1], 3)] * 5)
    assert packed == []
    decode(lm, [Row(PROMPTS[1], 3)] * 7, slots=4)
    assert packed == [4]
