"""Anchors against direct formulas: what is drawn, what it costs, and that nothing is paid before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_block_em import batch_of, forward, lora_model, released

from blockem.config import Recipe
from blockem.config_training import AnchorConfig
from blockem.contrasts import load, merged, own_contrasts, save
from blockem.defences.anchor import Anchor, ContrastAnchor, DivergenceAnchor, HealthyAnchor, LatentAnchor, drawn
from blockem.defences.block_em import BlockEM, Blocker, penalty_of
from blockem.defences.defence import Defence
from blockem.defences.together import Together
from blockem.dictionary import Dictionary
from blockem.dual import DualAscent
from blockem.errors import BlockemError
from blockem.examples import IGNORED
from blockem.likelihood import completion_logprobs, encode_pairs, margins
from blockem.model import LanguageModel
from blockem.training import fine_tune


def contrast_anchor(lm: LanguageModel, lambda_: float = 2.0, share: float = 1.0, **options: Any) -> ContrastAnchor:
    rows = encode_pairs(lm, tiny.pairs())
    return ContrastAnchor(rows, margins(completion_logprobs(lm, rows)), lm.tokenizer.pad_token_id, lambda_, share, **options)


@pytest.fixture
def blocker(dictionary: Dictionary) -> Blocker:
    return Blocker(dictionary.rows((3, 7, 11, 19)), (1, -1, 1, -1), tiny.BLOCK)


# what is drawn


def test_what_is_drawn_does_not_depend_on_how_rows_are_batched(lm: LanguageModel) -> None:
    batch = batch_of(lm, 16)
    whole, weights = drawn(batch, 5, 0.5)
    parts = [drawn({name: value[start : start + 4] for name, value in batch.items()}, 5, 0.5) for start in range(0, 16, 4)]
    assert whole == [one for chosen, _ in parts for one in chosen]
    torch.testing.assert_close(weights, torch.cat([one for _, one in parts]))
    assert 2 <= len(whole) <= 14 and set(whole) <= set(range(5))


def test_every_row_draws_at_a_share_of_one_and_its_weight_is_its_supervised_tokens(lm: LanguageModel) -> None:
    batch = batch_of(lm, 6)
    chosen, weights = drawn(batch, 3, 1.0)
    assert len(chosen) == 6
    assert weights.tolist() == (batch["labels"] != IGNORED).sum(1).tolist()


# what it costs


def test_nothing_is_paid_at_lora_initialisation(lm: LanguageModel, blocker: Blocker) -> None:
    anchor = contrast_anchor(lm)
    model = lora_model(lm)
    with torch.no_grad():
        costs = [anchor.costs([0, 3, 5], model), LatentAnchor(tiny.encoded(lm, 4), blocker, 0, 1.0, 1.0).costs([0, 3], model)]
    released(lm, model)
    for one in costs:
        assert float(one.sum()) == pytest.approx(0.0, abs=1e-9)


def test_a_contrast_costs_the_square_of_the_margins_rise_above_the_bases(lm: LanguageModel) -> None:
    anchor = contrast_anchor(lm)
    sides = torch.tensor([1.0, 1.0, 0.5, -1.0, -1.0, -2.0])
    other = contrast_anchor(lm, sides=sides)
    model = lora_model(lm, random_b=True)
    with torch.no_grad():
        found, both = anchor.costs(range(6), model), other.costs(range(6), model)
        lm_like = margins(torch.stack([_mean_logprob(model, row) for row in anchor.rows]))
    released(lm, model)
    rise = lm_like - anchor.bound
    torch.testing.assert_close(found, torch.relu(rise).pow(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both, torch.relu(sides * rise).pow(2), rtol=1e-4, atol=1e-6)
    assert (found > 0).any() and (found == 0).any()  # one-sided


def test_a_healthy_answer_costs_the_square_of_its_fall_below_the_base(lm: LanguageModel) -> None:
    rows = encode_pairs(lm, tiny.pairs())[0::2]
    scale = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 1.0])
    anchor = HealthyAnchor(rows, -completion_logprobs(lm, rows), lm.tokenizer.pad_token_id, 1.0, 1.0, sides=scale)
    model = lora_model(lm)
    with torch.no_grad():
        assert float(anchor.costs(range(6), model).sum()) == pytest.approx(0.0, abs=1e-9)
    released(lm, model)
    anchor.bound -= torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    model = lora_model(lm, random_b=True)
    with torch.no_grad():
        found = anchor.costs(range(6), model)
        now = torch.stack([_mean_logprob(model, row) for row in rows])
    released(lm, model)
    torch.testing.assert_close(found, (scale * torch.relu(-now - anchor.bound)).pow(2), rtol=1e-4, atol=1e-6)
    assert (found > 0).any()
    with pytest.raises(ValueError, match="not 1 for each"):
        HealthyAnchor(rows, anchor.bound[:2], 0, 1.0, 1.0)


@pytest.mark.parametrize("forward", [False, True])
def test_an_answers_divergence_is_the_mean_over_its_tokens_of_kl_to_the_base(lm: LanguageModel, forward: bool) -> None:
    rows, pad = encode_pairs(lm, tiny.pairs()), lm.tokenizer.pad_token_id
    scales = torch.linspace(0.5, 2.0, len(rows))
    with torch.no_grad():
        anchor = DivergenceAnchor(rows, pad, 1.0, 1.0, scales=scales, forward=forward)
        before = [_logprobs(lm.model, row) for row in rows]
    model = lora_model(lm)
    with torch.no_grad():
        assert float(anchor.costs(range(len(rows)), model).abs().sum()) == pytest.approx(0.0, abs=1e-4)
    released(lm, model)
    model = lora_model(lm, random_b=True)
    chosen = [3, 0, 7]
    found = anchor.costs(chosen, model)
    found.sum().backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    with torch.no_grad():
        after = [_logprobs(model, row) for row in rows]
    released(lm, model)
    pairs = [(before[i], after[i]) if forward else (after[i], before[i]) for i in chosen]
    kl = [(one.exp() * (one - other)).sum(-1).mean() for one, other in pairs]
    torch.testing.assert_close(found.detach(), torch.stack(kl) * scales[chosen], rtol=1e-3, atol=1e-5)
    assert (found > 0).all()


def _logprobs(model: Any, row: Any) -> torch.Tensor:
    """`[supervised, vocabulary]`: what is foretold of each supervised token."""
    logprobs: torch.Tensor = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return logprobs[[i - 1 for i in range(1, len(row.ids)) if row.supervised[i]]]


def _mean_logprob(model: Any, row: Any) -> torch.Tensor:
    ids = torch.tensor([row.ids])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    picked = [logprobs[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.supervised[i]]
    return torch.stack(picked).mean()


@pytest.mark.parametrize("tokens", ["completion", "all"])
def test_general_text_costs_what_the_blocker_would_count_there(lm: LanguageModel, blocker: Blocker, tmp_path: Path, tokens: str) -> None:
    rows = tiny.encoded(lm, 5)
    fine_tune(lm, rows, tiny.train_config(epochs=4), Defence(), tmp_path / "plain")
    lm.add_adapter(tmp_path / "plain", "plain")
    blocker.tokens = tokens
    whole = penalty_of(lm, "plain", blocker, rows, tokens="completion")
    anchor = LatentAnchor(rows, blocker, lm.tokenizer.pad_token_id, 1.0, 1.0)
    with lm.variant("plain"), torch.no_grad():
        each = anchor.costs(range(5), lm.model)
    lm.drop_adapters()
    tokens = torch.tensor([float(row.n_supervised) for row in rows])
    assert whole > 0
    assert float((each * tokens).sum() / tokens.sum()) == pytest.approx(whole, rel=1e-4)


def test_the_penalty_is_the_weighted_sum_and_reaches_the_adapters(lm: LanguageModel) -> None:
    anchor, batch = contrast_anchor(lm, lambda_=3.0), batch_of(lm, 4)
    model = lora_model(lm, random_b=True)
    forward(model, batch)
    found = anchor.penalty(batch, model)
    assert found is not None
    found.backward()
    chosen, weights = drawn(batch, 6, 1.0)
    with torch.no_grad():
        expected = (anchor.costs(chosen, model) * weights).sum()
    gradient = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    released(lm, model)
    torch.testing.assert_close(found, 3.0 * expected)
    torch.testing.assert_close(anchor.measured()["anchor"], expected)
    assert gradient > 0


def test_a_batch_that_draws_nothing_pays_nothing_and_counts_as_nothing(lm: LanguageModel) -> None:
    anchor = contrast_anchor(lm, share=1e-9)
    assert anchor.penalty(batch_of(lm, 4), lm.model) is None and anchor.measured() == {"anchor": 0}
    assert anchor.adapt({"sft_loss": 1.0}) is None


# λ, together, training


def test_lambda_follows_its_ceiling_and_comes_back_from_a_checkpoint(lm: LanguageModel) -> None:
    anchor = contrast_anchor(lm, reference=0.5, ascent=DualAscent(2.0, 0.1))
    anchor.adapt({"anchor": 0.5})
    assert anchor.lambda_ > 2.0 and anchor.logs() == {"anchor_lambda": anchor.lambda_, "anchor_reference": 0.5}
    again = contrast_anchor(lm, reference=0.5, ascent=DualAscent(2.0, 0.1))
    again.set_state(anchor.state())
    assert again.lambda_ == anchor.lambda_


def test_together_is_the_sum_of_both_and_freezes_what_either_freezes(lm: LanguageModel, blocker: Blocker, tmp_path: Path) -> None:
    both = Together([BlockEM(blocker, 5.0), contrast_anchor(lm)])
    assert both.trained_blocks(tiny.N_BLOCKS) == range(tiny.BLOCK + 1)
    batch, model = batch_of(lm, 4), lora_model(lm, random_b=True)
    with both.training_hooks(model):
        forward(model, batch)
        found = both.penalty(batch, model)
    released(lm, model)
    assert found is not None
    measured = both.measured()
    assert found.item() == pytest.approx((5.0 * measured["penalty"] + 2.0 * measured["anchor"]).item(), rel=1e-5)


def test_a_killed_training_draws_the_same_base_states_again(lm: LanguageModel, tmp_path: Path) -> None:
    """What the base foretells is kept in memory only; a resumed run meets the answers in other steps and must find the same."""

    def train(out: Path, kill_at: int | None = None) -> None:
        def stop(done: int, _total: int) -> None:
            if done == kill_at:
                raise KeyboardInterrupt

        anchor = DivergenceAnchor(encode_pairs(lm, tiny.pairs()), lm.tokenizer.pad_token_id, 1.0, 1.0)
        fine_tune(lm, tiny.encoded(lm), tiny.train_config(epochs=2, checkpoint_every=2), anchor, out, progress=stop)

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", kill_at=3)
    train(tmp_path / "killed")
    whole, killed = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_anchored_training_learns_the_task_and_lets_the_contrasts_rise_less(lm: LanguageModel, tmp_path: Path) -> None:
    rows, contrasts = tiny.encoded(lm), encode_pairs(lm, tiny.pairs())
    rise, logs = {}, {}
    for name, defence in (("plain", Defence()), ("anchored", contrast_anchor(lm, lambda_=50.0))):
        logs[name] = fine_tune(lm, rows, tiny.train_config(epochs=6), defence, tmp_path / name)
        before = margins(completion_logprobs(lm, contrasts))
        lm.add_adapter(tmp_path / name, name)
        with lm.variant(name):
            rise[name] = float(torch.relu(margins(completion_logprobs(lm, contrasts)) - before).pow(2).mean())
        lm.drop_adapters()
    assert rise["anchored"] < 0.5 * rise["plain"]
    first, last = logs["anchored"][0], logs["anchored"][-1]
    assert last["sft_loss"] < first["sft_loss"]
    assert first["anchor"] == pytest.approx(0.0, abs=1e-9) and any(row["anchor"] > 0 for row in logs["anchored"])
    for row in logs["anchored"]:
        assert row["loss"] == pytest.approx(row["sft_loss"] + 50.0 * row["anchor"], rel=1e-4)


# contrasts


def test_contrasts_are_both_models_own_answers_where_they_differ(lm: LanguageModel, tmp_path: Path) -> None:
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(epochs=8), Defence(), tmp_path / "plain")
    lm.add_adapter(tmp_path / "plain", "plain")
    seen: list[tuple[int, int]] = []
    found = own_contrasts(lm, "plain", tiny.prompts(), 6, lambda done, total: seen.append((done, total)))
    lm.drop_adapters()
    assert 1 <= len(found) <= 5 and all(one.right != one.wrong for one in found)
    assert seen[-1][0] == seen[-1][1]
    save(tmp_path / "contrasts.jsonl", found)
    assert load(tmp_path / "contrasts.jsonl") == found
    assert merged(found, found[::-1]) == found


def test_models_that_say_the_same_leave_nothing_to_anchor(lm: LanguageModel) -> None:
    with pytest.raises(BlockemError, match="nothing to anchor"):
        own_contrasts(lm, "base", tiny.prompts(), 4)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "right": ""}\n')
    with pytest.raises(BlockemError, match="a contrast needs text"):
        load(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"watch": "everything"}, "use one of"),
        ({"share": 0.0}, "share of the rows"),
        ({"r": 0.0}, "must be positive"),
        ({"ceiling": -1.0}, "must be positive"),
        ({"keep": 1}, "goes with"),
        ({"lambda_": 0.0}, "must be positive"),
        ({"cost": "other"}, "use one of margin"),
        ({"watch": "both", "keep": 2, "cost": "kl"}, "needs anchor.interleave"),
        ({"watch": "pairs", "keep": 2, "cost": "healthy"}, "needs anchor.interleave"),
        ({"watch": "pairs", "keep": 2, "cost": "kl", "interleave": 0.2, "interleaved": "benign"}, "needs anchor.interleave"),
        ({"interleave": 1.0}, "share of all rows"),
        ({"watch": "answers", "interleave": 0.2, "cued": 1.5}, "share of the interleaved right answers"),
        ({"watch": "answers", "interleave": 0.2, "interleaved": "benign", "cued": 0.5}, "needs anchor.interleave, and not of benign"),
        ({"interleaved": "poems"}, "use pairs, benign or both"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BlockemError, match=said):
        AnchorConfig(**wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block.ceiling": 0.1, "block.floor": 0.9}, "set one of them"),
        ({"block.floor": 1.5}, "share of the task"),
        ({"block.lambda_": 0, "block.ceiling": 0.1}, "leave it out"),
        (
            {"anchor.watch": "latents", "anchor.ceiling": 0.1, "block.monitor_every": 5, "block.grow": 2},
            "measured against the latents that are blocked at first",
        ),
    ],
)
def test_a_lambda_cannot_follow_two_targets(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BlockemError, match=said):
        Recipe().with_values(changes)


def test_an_anchor_needs_something_to_watch() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Anchor(0, 1.0, 0.5)
