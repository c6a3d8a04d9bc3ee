"""Directions from the shift that fine-tuning makes: the moments, the leading directions, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from blockem.defences.block_em import Blocker, penalty_of
from blockem.defences.defence import Defence
from blockem.directions import BOTH, Directions, DirectionSet, Shift, leading, shifts
from blockem.errors import BlockemError
from blockem.examples import IGNORED, right_padded
from blockem.forwards import hidden_at
from blockem.model import LanguageModel
from blockem.training import fine_tune


def plain(lm: LanguageModel, folder: Path) -> None:
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(), Defence(), folder)
    lm.add_adapter(folder, "plain")


def test_shifts_are_the_moments_of_the_difference_at_supervised_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    plain(lm, tmp_path / "plain")
    rows = tiny.encoded(lm, 7)
    batch = right_padded(rows, lm.tokenizer.pad_token_id)
    where = batch["labels"] != IGNORED
    found = shifts(lm, "plain", rows, [0, 2], batch=3)
    for block in (0, 2):
        states = []
        for name in ("plain", "base"):
            with torch.no_grad(), lm.variant(name):
                states.append(hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block)[where].double())
        moved = states[0] - states[1]
        assert found[block].tokens == len(moved)
        assert torch.allclose(found[block].mean, moved.mean(dim=0), atol=1e-6)
        assert torch.allclose(found[block].second, moved.T @ moved / len(moved), atol=1e-6)
        assert found[block].rms == pytest.approx(float(moved.pow(2).sum(dim=1).mean().sqrt()), rel=1e-4)


def test_the_leading_directions_are_the_mean_and_the_widest_spread_around_it() -> None:
    torch.manual_seed(0)
    mean = torch.tensor([3.0, 0, 0, 0, 0], dtype=torch.float64)
    moved = mean + torch.randn(4000, 5, dtype=torch.float64) * torch.tensor([5.0, 2.0, 0.1, 1.0, 0.1], dtype=torch.float64)
    found = leading(Shift(moved.mean(dim=0), moved.T @ moved / len(moved), len(moved)), 2)
    assert found.signs == (1, BOTH, BOTH)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(3), atol=1e-5)
    assert float(found.vectors[0] @ mean.float()) > 2.9
    assert abs(float(found.vectors[1, 1])) > 0.95 and abs(float(found.vectors[2, 3])) > 0.95


def test_a_direction_of_both_signs_is_read_twice() -> None:
    weights, signs = Directions(torch.eye(3)[:2], (-1, BOTH), 2.0).readout()
    assert signs == (-1, 1, -1)
    assert torch.equal(weights, torch.eye(3)[[0, 1, 1]] / 2)
    with pytest.raises(ValueError, match="do not go together"):
        Directions(torch.eye(3), (1,), 1.0)


def test_a_model_that_did_not_move_has_no_directions() -> None:
    with pytest.raises(BlockemError, match="moves nothing"):
        leading(Shift(torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), 9), 2)


def test_a_set_is_read_as_it_was_written_and_refuses_what_it_was_not_made_for(lm: LanguageModel, tmp_path: Path) -> None:
    made = DirectionSet(lm.id, lm.revision, {1: Directions(torch.eye(lm.d_model)[:2], (1, BOTH), 0.5)}, {"rows": 3})
    made.save(tmp_path / "set.safetensors")
    read = DirectionSet.load(tmp_path / "set.safetensors")
    assert (read.model, read.revision, read.provenance, len(read)) == (lm.id, lm.revision, {"rows": 3}, 2)
    assert torch.equal(read.blocks[1].vectors, made.blocks[1].vectors) and read.blocks[1].signs == (1, BOTH)
    read.check(lm)
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]
    with pytest.raises(BlockemError, match="were made for another"):
        DirectionSet("another", "x", made.blocks).check(lm)
    with pytest.raises(BlockemError, match="block 9 is out of range"):
        DirectionSet(lm.id, lm.revision, {9: made.blocks[1]}).check(lm)
    with pytest.raises(BlockemError, match="width 3"):
        DirectionSet(lm.id, lm.revision, {1: Directions(torch.eye(3), (1, 1, 1), 1.0)}).check(lm)


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such DirectionSet"):
        DirectionSet.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(BlockemError, match="not a DirectionSet"):
        DirectionSet.load(tmp_path / "bad")


def test_a_blocker_of_directions_charges_what_they_move(lm: LanguageModel, tmp_path: Path) -> None:
    plain(lm, tmp_path / "plain")
    rows = tiny.encoded(lm, 6)
    found = shifts(lm, "plain", rows, [1, 2])
    kept = DirectionSet(lm.id, lm.revision, {block: leading(one, 3) for block, one in found.items()})
    blocker = Blocker.from_directions(kept)
    assert blocker.blocks == [1, 2] and len(blocker.signs) == 2 * (1 + 2 * 3)
    paid = penalty_of(lm, "plain", blocker, rows)
    by_hand = 0.0
    for block, one in kept.blocks.items():
        moved = found[block].second
        spread = sum(float(v.double() @ moved @ v.double()) for v in one.vectors[1:]) / one.scale**2
        batch = right_padded(rows, lm.tokenizer.pad_token_id)
        where = batch["labels"] != IGNORED
        states = []
        for name in ("plain", "base"):
            with torch.no_grad(), lm.variant(name):
                states.append(hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block)[where] @ one.vectors[0])
        by_hand += spread + float(((states[0] - states[1]) / one.scale).clamp_min(0).pow(2).mean())
    assert paid == pytest.approx(by_hand, rel=1e-3)
    assert penalty_of(lm, "base", blocker, rows) == 0.0
