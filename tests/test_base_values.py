"""Base values computed once: the same as those computed on the way, for every batch, and never for another row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from blockem import base_values, states
from blockem.base_values import collect, values_key
from blockem.defences.block_em import BlockEM, Blocker, Watch, penalty_of
from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.examples import Encoded, right_padded
from blockem.forwards import hidden_at, hidden_at_each, unwrapped
from blockem.model import LanguageModel
from blockem.training import add_lora, fine_tune

IDS, SIGNS = (3, 7, 11, 19), (1, -1, 1, -1)


@pytest.fixture
def blocker(dictionary: Dictionary) -> Blocker:
    return Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK)


def kept(lm: LanguageModel, blocker: Blocker, rows: list[Encoded], folder: Path | None = None, **more: Any) -> base_values.BaseValues:
    return collect(lm, blocker.read, blocker.blocks, blocker.key, rows, folder, **more)


def batch_of(lm: LanguageModel, rows: list[Encoded]) -> dict[str, torch.Tensor]:
    return right_padded(rows, lm.tokenizer.pad_token_id)


def online(lm: LanguageModel, blocker: Blocker, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model = add_lora(lm, tiny.train_config(), range(tiny.N_BLOCKS), seed=0)
    try:
        with blocker.attached(model):
            return blocker.base_values(batch)
    finally:
        lm.model = unwrapped(model.unload())
        lm.model.requires_grad_(False)


def test_kept_values_are_those_of_the_base_in_any_batch_and_order(lm: LanguageModel, blocker: Blocker) -> None:
    rows = tiny.encoded(lm, 9)
    values = kept(lm, blocker, rows, batch=4)
    random.Random(0).shuffle(rows)
    for chosen in (rows[:1], rows[:5], rows):
        batch = batch_of(lm, chosen)
        assert torch.allclose(values.of(batch), online(lm, blocker, batch), atol=1e-5)


def test_a_row_that_they_were_not_computed_for_is_refused(lm: LanguageModel, blocker: Blocker) -> None:
    rows = tiny.encoded(lm, 6)
    values = kept(lm, blocker, rows[:5])
    with pytest.raises(BlockemError, match="other training rows"):
        values.of(batch_of(lm, rows[4:]))
    other = Encoded(rows[0].ids, (False, *rows[0].supervised[1:-1], not rows[0].supervised[-1]))
    with pytest.raises(BlockemError, match="other training rows"):
        values.of(batch_of(lm, [other]))


def test_they_are_kept_on_disk_and_read_again(lm: LanguageModel, blocker: Blocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.encoded(lm, 6)
    first = kept(lm, blocker, rows, tmp_path)
    assert first.seconds > 0
    monkeypatch.setattr(states, "hidden_at_each", None)  # whoever computes now fails
    again = kept(lm, blocker, rows[::-1], tmp_path)
    assert again.seconds == 0
    assert again.rows.keys() == first.rows.keys()
    assert all(torch.equal(again.rows[name], first.rows[name]) for name in first.rows)


def test_a_killed_pass_goes_on_and_damaged_or_foreign_files_are_not_used(
    lm: LanguageModel, blocker: Blocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_values, "SHARD", 2)
    rows = tiny.encoded(lm, 7)
    whole = kept(lm, blocker, rows, tmp_path / "whole")
    forwards = []

    def counted(*args: Any) -> Any:
        forwards.append(1)
        if len(forwards) == 3:
            raise KeyboardInterrupt
        return hidden_at_each(*args)

    monkeypatch.setattr(states, "hidden_at_each", counted)
    with pytest.raises(KeyboardInterrupt):
        kept(lm, blocker, rows, tmp_path / "cut")
    files = sorted((tmp_path / "cut").rglob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-40])  # cut short
    files[1].write_bytes(sorted((tmp_path / "whole").rglob("*.safetensors"))[2].read_bytes())  # of other rows
    done = len(forwards)
    again = kept(lm, blocker, rows, tmp_path / "cut")
    assert len(forwards) - done == 4
    assert all(torch.equal(again.rows[name], whole.rows[name]) for name in whole.rows)
    assert not list((tmp_path / "cut").rglob("*.making"))
    assert {"values", "rows", "lengths"} == set(load_file(files[0]))


def test_what_they_depend_on_is_in_the_key(lm: LanguageModel, dictionary: Dictionary) -> None:
    rows = tiny.encoded(lm, 4)
    readers = [
        Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK),
        Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK + 1),
        Blocker(dictionary.rows(IDS[:2]), SIGNS[:2], tiny.BLOCK),
        Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK, "preactivation"),
    ]
    keys = [values_key(lm, one.key, rows) for one in readers] + [values_key(lm, readers[0].key, rows[:3])]
    keys.append(values_key(LanguageModel(lm.model, lm.tokenizer, lm.id, "another"), readers[0].key, rows))
    assert len(set(keys)) == len(keys)
    assert values_key(lm, readers[0].key, rows[::-1]) == keys[0]
    assert values_key(lm, Blocker(dictionary.rows(IDS), (-1, 1, 1, 1), tiny.BLOCK).key, rows) == keys[0]  # signs and λ do not matter


def test_a_training_with_kept_values_is_the_training_without(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    rows = tiny.encoded(lm)
    config = tiny.train_config(epochs=2)
    adapters, logs = {}, {}
    for name in ("online", "kept"):
        blocker = Blocker.from_latents(tiny.latent_set(lm, dictionary, IDS), dictionary)
        if name == "kept":
            blocker.values = kept(lm, blocker, rows, batch=5)
        logs[name] = fine_tune(lm, rows, config, BlockEM(blocker, 50.0), tmp_path / name)
        adapters[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for name, weight in adapters["online"].items():
        assert torch.allclose(weight, adapters["kept"][name], atol=2e-4), name
    assert logs["kept"][0]["penalty"] == pytest.approx(0.0, abs=1e-9)
    assert logs["kept"][-1]["penalty"] == pytest.approx(logs["online"][-1]["penalty"], rel=1e-2)


# several blocks


def two(dictionary: Dictionary) -> list[Watch]:
    return [Watch(dictionary.rows(IDS), SIGNS, tiny.BLOCK), Watch(dictionary.rows(range(20, 28)), (-1, 1) * 4, tiny.BLOCK + 1)]


def test_the_penalty_over_several_blocks_is_the_sum_of_theirs(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    rows = tiny.encoded(lm, 6)
    fine_tune(lm, rows, tiny.train_config(), BlockEM(Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK), 0.0), tmp_path / "one")
    lm.add_adapter(tmp_path / "one", "plain")
    watches = two(dictionary)
    alone = [penalty_of(lm, "plain", Blocker(one.rows, one.signs, one.block), rows) for one in watches]
    assert min(alone) > 0
    assert penalty_of(lm, "plain", Blocker.over(watches), rows) == pytest.approx(sum(alone), rel=1e-5)


def test_one_base_pass_serves_all_blocks(lm: LanguageModel, dictionary: Dictionary) -> None:
    rows = tiny.encoded(lm, 5)
    joined = Blocker.over(two(dictionary))
    values = kept(lm, joined, rows)
    batch = batch_of(lm, rows)
    parts = [online(lm, Blocker(one.rows, one.signs, one.block), batch) for one in two(dictionary)]
    assert torch.allclose(values.of(batch), torch.cat(parts, dim=1), atol=1e-5)
    assert torch.allclose(online(lm, joined, batch), torch.cat(parts, dim=1), atol=1e-5)
    assert list(BlockEM(joined, 1.0).trained_blocks(tiny.N_BLOCKS)) == list(range(tiny.BLOCK + 2))


def test_each_blocks_output_is_that_of_a_forward_of_its_own(lm: LanguageModel) -> None:
    batch = batch_of(lm, tiny.encoded(lm, 3))
    found = hidden_at_each(lm.model, batch["input_ids"], batch["attention_mask"], [2, 0, 2])
    assert sorted(found) == [0, 2]
    for block, hidden in found.items():
        assert torch.equal(hidden, hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block))
