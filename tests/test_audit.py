"""The off-K audit: what its numbers are on models whose shift is known, and what it says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from blockem.defences.block_em import BlockEM, Blocker
from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.model import LanguageModel
from blockem.reemergence.audit import BlockShift, LatentShift, Rerouting, audit, verdict
from blockem.report import audit as page
from blockem.training import fine_tune

IDS = (3, 7, 11, 19)


@pytest.fixture
def audited(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> LanguageModel:
    rows = tiny.encoded(lm)
    config = tiny.train_config(epochs=3)
    fine_tune(lm, rows, config, Defence(), tmp_path / "plain")
    latents = tiny.latent_set(lm, dictionary, IDS)
    fine_tune(lm, rows, config, BlockEM(Blocker.from_latents(latents, dictionary), 1e4), tmp_path / "blocked")
    for name in ("plain", "blocked"):
        lm.add_adapter(tmp_path / name, name)
    return lm


def test_plain_fine_tuning_is_the_unit_and_a_blocked_one_gives_up_what_it_blocks(audited: LanguageModel, dictionary: Dictionary) -> None:
    rows = tiny.encoded(audited)
    sets = {name: tiny.latent_set(audited, dictionary, IDS) for name in ("plain", "blocked")}
    found = audit(audited, rows, ["blocked"], tiny.BLOCK, dictionary, sets, batch=5)
    assert found.tokens == sum(row.n_supervised for row in rows)
    for one in found.shifts["plain"]:
        assert (one.length, one.along, one.cosine) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    assert [one.block for one in found.shifts["blocked"]] == list(range(tiny.N_BLOCKS))
    plain, blocked = found.rerouting["plain"], found.rerouting["blocked"]
    assert (plain.blocked, plain.off_k, plain.new) == (pytest.approx(0), pytest.approx(1), pytest.approx(0))
    assert plain.top == [] and plain.unexplained == pytest.approx(plain.unexplained_plain)
    assert blocked.blocked > 0.5
    assert blocked.unexplained_plain == pytest.approx(plain.unexplained)
    assert all(one.latent not in IDS for one in blocked.top)
    assert set(found.verdicts) == {"blocked"}


def test_without_an_sae_the_blocks_are_compared_alone(audited: LanguageModel) -> None:
    found = audit(audited, tiny.encoded(audited, 4), ["blocked"], tiny.BLOCK)
    assert found.rerouting == {} and len(found.shifts["blocked"]) == tiny.N_BLOCKS


def test_batches_do_not_matter(audited: LanguageModel) -> None:
    rows = tiny.encoded(audited, 7)
    one, many = (audit(audited, rows, ["blocked"], tiny.BLOCK, batch=batch).shifts["blocked"] for batch in (1, 7))
    for left, right in zip(one, many, strict=True):
        assert left.length == pytest.approx(right.length, rel=1e-3) and left.along == pytest.approx(right.along, abs=1e-3)


def test_a_plain_model_that_did_not_move_cannot_be_audited_against(lm: LanguageModel, tmp_path: Path) -> None:
    fine_tune(lm, tiny.encoded(lm, 4), tiny.train_config(lr=1e-30), Defence(), tmp_path / "plain")
    lm.add_adapter(tmp_path / "plain", "plain")
    for parameter in lm.model.parameters():
        parameter.data = parameter.data
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(BlockemError, match="moves nothing"):
        audit(lm, tiny.encoded(lm, 4), [], tiny.BLOCK)


def shifts(here: float, last: float) -> list[BlockShift]:
    return [BlockShift(0, 1.0, here, 1.0), BlockShift(1, 1.0, last, 1.0)]


def test_the_verdict_says_where_it_went() -> None:
    gone = Rerouting(0.9, 0.95, 0.2, 0.3, 0.3)
    assert verdict(shifts(0.9, 0.9), gone, 0).startswith("rerouted at the same block: 90% of the blocked latents' movement is gone")
    assert verdict(shifts(0.2, 0.9), gone, 0).startswith("rerouted downstream")
    assert verdict(shifts(0.2, 0.2), gone, 0).startswith("held at the block")
    assert verdict(shifts(0.9, 0.9), Rerouting(0.1, 1.0, 0.1, 0.3, 0.3), 0).startswith("hardly blocked")
    assert "more comes back after it" in verdict(shifts(0.2, 0.9), None, 0)


def test_the_report_draws_the_audit_and_does_without_it(audited: LanguageModel, dictionary: Dictionary) -> None:
    sets = {"blocked": tiny.latent_set(audited, dictionary, IDS)}
    summary = {"audit": audit(audited, tiny.encoded(audited, 4), ["blocked"], tiny.BLOCK, dictionary, sets).to_dict()}
    assert len(page.figures(summary, {"plain": "plain", "blocked": "blocked"})) == 2
    assert [name for name, _ in page.verdicts(summary)] == ["blocked"]
    assert page.tables(summary)[0].rows
    for broken in (
        {},
        {"audit": None},
        {"audit": {"shifts": 3, "verdicts": [], "rerouting": "x"}},
        {"audit": {"shifts": {"a": [{"block": "x"}]}}},
    ):
        assert page.figures(broken, {}) == [] and page.verdicts(broken) == [] and page.tables(broken) == []
    assert LatentShift(1, 1, 0.0, 0.1).latent == 1
