"""Ablations of what is blocked and how: which latents, which signs, which tokens, one side or both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem import Blocker, block_loss
from blockem.base_values import collect
from blockem.config_training import BlockConfig
from blockem.defences.block_em import all_supervised, paid_by_latent, penalty_of
from blockem.dictionary import Dictionary
from blockem.discovery.discover import write_candidates
from blockem.discovery.screen import Candidate, budget_of, settle
from blockem.errors import BlockemError
from blockem.examples import right_padded
from blockem.forwards import hidden_at, unwrapped
from blockem.latents import Latent, LatentSet
from blockem.model import LanguageModel
from blockem.selection import read_candidates, selected
from blockem.training import add_lora


def as_tested(latent: int, sign: int, delta: float, induce: tuple[float, float], repair: tuple[float, float]) -> Candidate:
    """As stage 2 leaves it: a gain and an incoherence on each side, 0.1 allowed."""
    found = Candidate(latent, sign, delta)
    (found.induce, found.induce_incoherence), (found.repair, found.repair_incoherence) = induce, repair
    settle(found, {"induce": budget_of(0.0, 0.1), "repair": budget_of(0.0, 0.1)})
    return found


SET = LatentSet("m", "r", "s", "d", 1, (Latent(5, 1), Latent(9, -1), Latent(2, 1), Latent(7, -1)), 3.0)
NAN = float("nan")
CANDIDATES = [
    as_tested(5, 1, 0.2, (0.3, 0.0), (0.1, 0.0)),
    as_tested(9, -1, -0.9, (-0.1, 0.0), (0.5, 0.1)),
    as_tested(2, 1, 0.5, (0.4, 0.0), (-0.2, 0.0)),
    as_tested(7, -1, -0.3, (0.9, 0.4), (0.9, 0.05)),  # breaks the base, but repairs cleanly
    as_tested(6, 1, 0.1, (0.95, 0.8), (-0.1, 0.0)),  # induces, but in a broken model
    replace(as_tested(4, -1, -0.1, (0.8, 0.0), (0.8, 0.0)), fate="dropped after 8 pairs: cannot be among the 4 that go on"),
    Candidate(8, 1, 0.7, fate="left out before screening: small first-order effect"),
]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    write_candidates(tmp_path / "latents.csv", CANDIDATES)
    return read_candidates(tmp_path / "latents.csv")


def ids(select: str, size: int | None, signs: str, rows: Any = (), seed: int = 0) -> list[tuple[int, int]]:
    return [(one.latent, one.sign) for one in selected(SET, select, size, signs, rows, seed).latents]


def test_the_defaults_are_the_set_itself() -> None:
    config = BlockConfig()
    assert selected(SET, config.select, config.size, config.signs, (), 0) is SET


def test_the_size_takes_the_first_of_the_ranked_set() -> None:
    assert ids("causal", 2, "both") == [(5, 1), (9, -1)]
    with pytest.raises(BlockemError, match=r"block\.size is 9, but discovery chose 4 latents"):
        ids("causal", 9, "both")


def test_top_delta_takes_the_largest_shifts_without_any_test(rows: Any) -> None:
    assert ids("top-delta", None, "both", rows) == [(9, -1), (8, 1), (2, 1), (7, -1)]
    assert ids("top-delta", 2, "both", rows) == [(9, -1), (8, 1)]
    assert len(ids("top-delta", len(CANDIDATES), "both", rows)) == len(CANDIDATES)


def test_an_ablation_of_a_size_that_is_not_there_is_refused(rows: Any) -> None:
    for select, there in (("top-delta", len(CANDIDATES)), ("induce", 2), ("repair", 3)):
        with pytest.raises(BlockemError, match=rf"block\.size is 99, but block\.select={select} has {there} latents at block 1"):
            ids(select, 99, "both", rows)


def test_what_halving_dropped_stays_out_whatever_became_of_it_in_a_group(tmp_path: Path) -> None:
    dropped = replace(as_tested(3, 1, 0.1, (0.99, 0.0), (0.99, 0.0)), dropped=True, group=1, fate="chosen in group 1")
    write_candidates(tmp_path / "latents.csv", [*CANDIDATES, dropped])
    assert ids("induce", None, "both", read_candidates(tmp_path / "latents.csv")) == [(2, 1), (5, 1)]


def test_one_test_alone_ranks_by_its_gain(rows: Any) -> None:
    assert ids("induce", None, "both", rows) == [(2, 1), (5, 1)]
    assert ids("repair", None, "both", rows) == [(7, -1), (9, -1), (5, 1)]


def test_signs_are_cut_or_dealt_anew() -> None:
    assert ids("causal", None, "plus") == [(5, 1), (2, 1)] and ids("causal", None, "minus") == [(9, -1), (7, -1)]
    shuffled = [ids("causal", None, "shuffled", seed=seed) for seed in range(8)]
    assert all([k for k, _ in one] == [5, 9, 2, 7] and sum(s for _, s in one) == 0 for one in shuffled)
    assert len({tuple(one) for one in shuffled}) > 1 and ids("causal", None, "shuffled", seed=3) == shuffled[3]
    with pytest.raises(BlockemError, match="leaves no latent"):
        ids("causal", 1, "minus")
    assert selected(SET, "causal", 2, "both", (), 0).provenance["ablation"]["size"] == 2


def test_a_missing_or_foreign_table_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such file"):
        read_candidates(tmp_path / "latents.csv")
    (tmp_path / "latents.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BlockemError, match="not a table of candidates"):
        read_candidates(tmp_path / "latents.csv")


@pytest.mark.parametrize(
    "changes",
    [{"select": "best"}, {"size": 0}, {"signs": "none"}, {"tokens": "prompt"}, {"directions": 2, "signs": "plus"}],
)
def test_a_wrong_ablation_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BlockemError, match=r"block\."):
        BlockConfig(**changes)


# the penalty


def test_two_sided_is_the_squared_gap_and_one_sided_stays_published() -> None:
    z, base, signs = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]), torch.tensor([1.0, -1.0])
    assert block_loss(z, base, signs).tolist() == [0.0]
    assert block_loss(z, base, signs, two_sided=True).tolist() == [4.0 + 2.25]


@pytest.mark.parametrize("tokens", ["completion", "all"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_penalty_is_the_direct_formula_on_the_watched_tokens(
    lm: LanguageModel, dictionary: Dictionary, tokens: str, two_sided: bool, cached: bool
) -> None:
    encoded = tiny.encoded(lm, 5)
    batch = right_padded(encoded, lm.tokenizer.pad_token_id)
    where = batch["attention_mask"].bool() if tokens == "all" else batch["labels"] != -100
    chosen = (3, 7, 11, 19)
    signs = (1, -1, 1, -1)
    blocker = Blocker(dictionary.rows(chosen), signs, tiny.BLOCK, two_sided=two_sided, tokens=tokens)
    if cached:
        seen = [all_supervised(row) for row in encoded] if tokens == "all" else encoded
        blocker.values = collect(lm, blocker.read, blocker.blocks, blocker.key, seen)
    with torch.no_grad():
        base = dictionary.encode(hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], tiny.BLOCK)[where])[:, list(chosen)]
    model = add_lora(lm, tiny.train_config(), range(tiny.N_BLOCKS), seed=0)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    with blocker.attached(model):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found = blocker.penalty(batch).item()
    with torch.no_grad():
        moved = dictionary.encode(hidden_at(model, batch["input_ids"], batch["attention_mask"], tiny.BLOCK)[where])[:, list(chosen)]
    gap = moved - base
    expected = gap.pow(2).sum() if two_sided else (gap * torch.tensor(signs)).clamp_min(0).pow(2).sum()
    lm.model = unwrapped(model.unload())
    lm.model.requires_grad_(False)
    assert found == pytest.approx(float(expected), rel=1e-4) and found > 0


def test_p_mis_counts_all_tokens_per_completion_token(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    rows = tiny.encoded(misaligned, 5)
    blocker = Blocker.from_latents(tiny.latent_set(misaligned, dictionary), dictionary)
    blocker.tokens = "all"
    found = penalty_of(misaligned, "plain", blocker, rows, batch=2)
    blocker.tokens = "completion"
    every = [replace(row, supervised=(True,) * len(row.ids)) for row in rows]
    total = penalty_of(misaligned, "plain", blocker, every) * sum(len(row.ids) for row in rows)
    assert found == pytest.approx(total / sum(row.n_supervised for row in rows), rel=1e-4)
    assert found > penalty_of(misaligned, "plain", blocker, rows)
    blocker.tokens = "all"
    assert penalty_of(misaligned, "plain", blocker, rows, tokens="completion") < found


@pytest.mark.parametrize(("two_sided", "tokens", "measure"), [(False, "completion", "latent"), (True, "all", "preactivation")])
def test_what_a_latent_adds_is_the_penalty_of_blocking_it_alone(
    misaligned: LanguageModel, dictionary: Dictionary, two_sided: bool, tokens: str, measure: str
) -> None:
    rows = tiny.encoded(misaligned, 5)
    every = dictionary.rows(range(dictionary.n_latents))
    alone = Blocker.from_latents(tiny.latent_set(misaligned, dictionary), dictionary, measure)
    alone.two_sided, alone.tokens = two_sided, tokens
    found = paid_by_latent(misaligned, "plain", alone, every, tiny.BLOCK, rows, batch=2)
    assert found.shape == (2, dictionary.n_latents) and float(found.sum()) > 0
    for k in (0, 5, 11):
        for side, sign in enumerate((1, -1)):
            one = Blocker(dictionary.rows([k]), [sign], tiny.BLOCK, measure)
            one.two_sided, one.tokens = two_sided, tokens
            assert float(found[side, k]) == pytest.approx(penalty_of(misaligned, "plain", one, rows), rel=1e-4, abs=1e-9)
