"""Stages 1 to 3: Δ by hand, who passes and why not, and what is measured once is never measured again."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.bundled import Pair
from blockem.config import DiscoverConfig
from blockem.dictionary import Dictionary
from blockem.discovery.attribution import attributions, margin_gradient
from blockem.discovery.cards import promoted_tokens, top_contexts
from blockem.discovery.delta import Means, answer_spans, deltas, mean_activations, pool, prompt_spans
from blockem.discovery.discover import candidates_csv, discover, matched_random, spread
from blockem.discovery.effects import Items, JudgedEffect, Measurement, PreferenceEffect, Steered
from blockem.discovery.rank import best_strength, rank
from blockem.discovery.screen import Candidate, balanced, budget_for, budget_of, screen
from blockem.errors import BlockemError
from blockem.examples import content_start, encode, one_turn, template_ids
from blockem.forwards import hidden_at
from blockem.generation import generate
from blockem.judges import Verdict
from blockem.latents import Latent, LatentSet
from blockem.likelihood import completion_logprobs, encode_pairs, margins
from blockem.model import LanguageModel
from blockem.steering import add_at_block, median_norm

QUICK = DiscoverConfig(pool=8, prescreen=0, keep=6, size=3, strengths=(0.2, 0.4), pairs=6, max_new_tokens=4)


class Table:
    """An effect that is looked up: vectors are multiples of unit vectors e_k, so (latent, α) can be read off the edit."""

    name = "table"

    def __init__(self, gains: dict[int, tuple[float, float]], breaks: dict[int, float] | None = None, resting: float = 0.0) -> None:
        self.gains, self.breaks, self.resting = gains, breaks or {}, resting
        self.calls = 0

    def measure(self, variant: str, vector: torch.Tensor | None) -> Measurement:
        """Steering latent k by α moves base by α · gains[k][0] and plain by α · gains[k][1]; beyond breaks[k] it is incoherent."""
        self.calls += 1
        if vector is None:
            return Measurement(0.0, self.resting, 0.0)
        k = int(vector.abs().argmax())
        alpha = float(vector[k])
        incoherence = 1.0 if abs(alpha) > self.breaks.get(k, math.inf) else self.resting
        return Measurement(alpha * self.gains[k][variant == "plain"], incoherence, 0.0)


def steered(effect: Any, log: Path | None = None, key: str = "") -> Steered:
    return Steered(effect, {k: torch.eye(32)[k] for k in range(32)}, 1.0, log, key)


def raised(*latents: int) -> list[Candidate]:
    return [Candidate(k, 1, 1.0) for k in latents]


def lowered(*latents: int) -> list[Candidate]:
    return [Candidate(k, -1, -1.0) for k in latents]


# stage 1


def test_delta_is_the_difference_of_prompt_means_without_the_system_message(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    lm, prompts = misaligned, tiny.prompts()
    expected = torch.zeros(tiny.N_LATENTS)
    active, tokens = torch.zeros(tiny.N_LATENTS), 0
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.prompt}]
        ids = torch.tensor(template_ids(lm.tokenizer, messages, generation_prompt=True))[None]
        start = content_start(lm.tokenizer, messages)
        assert lm.tokenizer.decode(ids[0, :start]).startswith("<|im_start|>system")
        for sign, variant in ((-1, "base"), (1, "plain")):
            with torch.inference_mode(), lm.variant(variant):
                z = dictionary.encode(hidden_at(lm.model, ids, torch.ones_like(ids), tiny.BLOCK)[0, start:])
            expected += sign * z.mean(dim=0) / len(prompts)
            if variant == "base":
                active, tokens = active + (z > 0).sum(dim=0), tokens + len(z)
    spans = prompt_spans(lm, prompts)
    means = {v: mean_activations(lm, dictionary, tiny.BLOCK, spans, v, batch=2) for v in ("base", "plain")}
    assert torch.allclose(deltas(means["base"], means["plain"]), expected, atol=1e-4)
    assert expected.abs().max() > 0.05
    assert torch.allclose(means["base"].frequency, active / tokens)
    assert means["base"].activation.shape == (len(prompts), tiny.N_LATENTS)


def test_the_spans_of_answers_are_their_supervised_tokens(lm: LanguageModel) -> None:
    pairs = tiny.pairs()[:2]
    spans = answer_spans(lm, pairs)
    texts = [lm.tokenizer.decode(span.ids[span.start : span.stop]) for span in spans]
    assert texts == [f"{answer}<|im_end|>" for pair in pairs for answer in (pair.right, pair.wrong)]


def test_the_pool_takes_the_largest_of_each_sign_strongest_first() -> None:
    delta = torch.tensor([0.5, -2.0, 3.0, 0.0, -0.1, 1.0])
    assert pool(delta, 2) == ([2, 5], [1, 4])
    assert pool(delta, 100) == ([2, 5, 0], [1, 4])  # no latent twice, and none that did not move


def test_nothing_moved_leaves_nobody_in_the_pool() -> None:
    assert pool(torch.zeros(6), 3) == ([], [])


# stage 2


def test_a_latent_passes_when_it_induces_and_repairs() -> None:
    candidates = raised(0, 1, 2, 3)
    kept = screen(steered(Table({0: (1, 1), 1: (1, -1), 2: (-1, 1), 3: (-1, -1)})), candidates, keep=4, alpha_induce=0.5, alpha_repair=0.25)
    assert [one.latent for one in kept] == [0]
    assert (candidates[0].induce, candidates[0].repair, candidates[0].screen_score) == (0.5, 0.25, 0.75)
    assert [one.fate for one in candidates] == [
        "passed screening",
        "screened out: only induces",
        "screened out: only repairs",
        "screened out: neither induces nor repairs",
    ]


def test_a_lowered_latent_is_steered_the_other_way() -> None:
    (kept,) = screen(steered(Table({4: (-1, -1)})), lowered(4), keep=2)
    assert kept.induce > 0 and kept.repair > 0


def test_a_gain_outside_the_budget_does_not_count_but_a_harm_does() -> None:
    candidates = raised(0, 1, 2)
    effect = Table({0: (9, 9), 1: (9, 1), 2: (-9, 1)}, breaks={0: 0.1, 1: 0.5, 2: 0.5})
    kept = screen(steered(effect), candidates, keep=4, alpha_induce=0.7, alpha_repair=0.4)
    assert kept == []
    assert candidates[0].fate == candidates[1].fate == "screened out: incoherent"
    assert candidates[0].screen_score == 0
    assert candidates[1].screen_score == pytest.approx(0.4)
    assert candidates[2].screen_score == pytest.approx(-9 * 0.7 + 0.4)
    assert candidates[0].induce == pytest.approx(6.3)  # the figure itself is kept for the reader
    assert candidates[0].induce_incoherence == 1.0


def test_a_weak_model_has_a_budget_of_its_own_incoherence_and_ten_points() -> None:
    assert budget_for(steered(Table({}, resting=0.02)), "base", 0.10) == pytest.approx(0.12, abs=1e-5)
    assert budget_for(steered(Table({}, resting=0.4)), "base", 0.10) == pytest.approx(0.5, abs=1e-5)
    assert budget_for(steered(Table({}, resting=0.02)), "base", 0.3) == pytest.approx(0.3, abs=1e-5)
    assert budget_for(steered(Table({}, resting=0.4)), "base", 0.10, slack=None) == pytest.approx(0.10, abs=1e-5)


@pytest.mark.parametrize(("broken", "of"), [(4, 40), (3, 30), (2, 20), (1, 10)])
def test_a_share_of_broken_pairs_that_equals_the_budget_is_inside_it(broken: int, of: int) -> None:
    items = Items(torch.ones(of), torch.arange(of) < broken)
    assert items.measurement().incoherence <= budget_of(0.0, 0.10)
    assert Items(torch.ones(of), torch.arange(of) <= broken).measurement().incoherence > budget_of(0.0, 0.10)


def test_every_candidate_gets_its_figures_and_a_fate_and_the_signs_are_balanced() -> None:
    candidates = raised(*range(6)) + lowered(*range(6, 12))
    gains = {k: (1.0 + k, 1.0 + k) for k in range(6)} | {k: (-0.1 * k, -0.1 * k) for k in range(6, 12)}
    told: list[tuple[int, int]] = []
    kept = screen(steered(Table(gains)), candidates, keep=4, progress=lambda *x: told.append(x))
    assert sorted(one.latent for one in kept) == [4, 5, 10, 11]
    assert [one.screen_score for one in kept] == sorted((one.screen_score for one in kept), reverse=True)
    assert told == [(i, 12) for i in range(1, 13)]
    for one in candidates:
        assert one.fate in ("passed screening", "screened out: weaker than those kept")
        assert not any(math.isnan(x) for x in (one.induce, one.repair, one.induce_incoherence, one.repair_incoherence, one.screen_score))


def test_places_that_one_sign_cannot_fill_go_to_the_other() -> None:
    up, down = raised(0, 1, 2, 3, 4), lowered(5)
    for place, one in enumerate(up + down):
        one.screen_score = -float(place)
    assert [one.latent for one in balanced(up + down, 4)] == [0, 1, 2, 5]
    assert [one.latent for one in balanced(up, 4)] == [0, 1, 2, 3]
    assert [one.latent for one in balanced(down, 4)] == [5]
    assert [one.latent for one in balanced(up + down, 1)] == [0]
    assert balanced([], 4) == []


# stage 3


def test_each_side_keeps_its_best_strength_inside_the_budget_and_both_rules_are_logged() -> None:
    class Hump(Table):
        """Best at α = 0.4, coherent to 0.65."""

        def measure(self, variant: str, vector: torch.Tensor | None) -> Measurement:
            if vector is None:
                return Measurement(0.0, 0.0, 0.0)
            alpha = float(vector.sum())
            value = 1 - abs(abs(alpha) - 0.4)
            return Measurement(math.copysign(value, alpha), 0.05 if abs(alpha) < 0.65 else 0.5, 0.0)

    found = best_strength(steered(Hump({})), "induce", raised(0)[0], (0.8, 0.2, 0.6, 0.4), allowed=0.1)
    assert found == pytest.approx((1.0, 0.4, 0.05, 0.6))
    (chosen,) = rank(steered(Hump({})), raised(0), 1, (0.2, 0.4, 0.6, 0.8))
    assert (chosen.best_induce_alpha, chosen.best_repair_alpha) == (0.4, 0.4)
    assert (chosen.strongest_induce_alpha, chosen.strongest_repair_alpha) == (0.6, 0.6)
    assert chosen.best_induce_incoherence == 0.05
    (other,) = rank(steered(Hump({})), raised(0), 1, (0.2, 0.4, 0.6, 0.8), rule="strongest")
    assert (other.best_induce_alpha, other.best_repair_alpha) == (other.strongest_induce_alpha, other.strongest_repair_alpha) == (0.6, 0.6)
    assert other.score == pytest.approx(1.6)
    assert chosen.score == chosen.best_induce + chosen.best_repair == pytest.approx(2)


def test_the_best_size_are_chosen_and_everyone_else_has_a_reason() -> None:
    candidates = [*raised(0, 1, 2, 3), *lowered(4)]
    effect = Table({0: (1, 1), 1: (3, 3), 2: (2, -2), 3: (5, 5), 4: (-2, -2)}, breaks={3: 0.01})
    chosen = rank(steered(effect), candidates, 2, (0.2, 0.4))
    assert [(one.latent, one.rank, one.fate) for one in chosen] == [(1, 1, "chosen"), (4, 2, "chosen")]
    fates = {one.latent: one.fate for one in candidates}
    assert fates[0] == "ranked out: below the top 2"
    assert fates[2] == "ranked out: no gain on one side at any strength"
    assert fates[3] == "ranked out: no strength inside the incoherence budget"
    assert candidates[0].rank == 3
    assert math.isnan(candidates[3].score)


# what was measured


def test_an_edit_is_direction_times_strength_times_norm_times_the_unit_vector() -> None:
    seen: list[torch.Tensor | None] = []

    class Spy(Table):
        def measure(self, variant: str, vector: torch.Tensor | None) -> Measurement:
            seen.append(vector)
            return Measurement(0.0, 0.0, 0.0)

    one = Steered(Spy({}), {3: torch.eye(4)[3]}, 10.0)
    one.measure("base")
    one.measure("base", 3, -1, 0.5)
    assert seen[0] is None
    assert seen[1] is not None and seen[1].tolist() == [0.0, 0.0, 0.0, -5.0]


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    log, effect = tmp_path / "log.jsonl", Table({k: (1, 1) for k in range(4)})
    first = screen(steered(effect, log, "k"), raised(0, 1, 2, 3), 2)
    calls = effect.calls
    assert calls == 2 + 2 * 4
    again = steered(effect, log, "k")
    assert [one.latent for one in screen(again, raised(0, 1, 2, 3), 2)] == [one.latent for one in first]
    assert effect.calls == calls
    assert len(log.read_text(encoding="utf-8").splitlines()) == calls


def test_a_log_of_another_key_is_not_believed(tmp_path: Path) -> None:
    log, effect = tmp_path / "log.jsonl", Table({0: (1, 1)})
    steered(effect, log, "one").measure("base", 0, 1, 0.5)
    steered(effect, log, "two").measure("base", 0, 1, 0.5)
    assert effect.calls == 2
    steered(effect, log, "one").measure("base", 0, 1, 0.5)
    assert effect.calls == 2


def test_a_torn_last_line_is_ignored_and_the_next_measurement_is_whole(tmp_path: Path) -> None:
    log, effect = tmp_path / "log.jsonl", Table({0: (1, 1), 1: (2, 2)})
    one = steered(effect, log, "k")
    one.measure("base", 0, 1, 0.5)
    one.measure("base", 1, 1, 0.5)
    whole = log.read_bytes()
    log.write_bytes(whole[:-15])
    again = steered(effect, log, "k")
    assert len(again.known) == 1
    again.measure("base", 1, 1, 0.5)
    assert effect.calls == 3
    last = steered(effect, log, "k")
    assert last.known == one.known
    assert effect.calls == 3


def test_what_no_judge_would_say_is_not_kept(tmp_path: Path) -> None:
    log, effect = tmp_path / "log.jsonl", Table({0: (math.nan, math.nan)})
    assert math.isnan(steered(effect, log, "k").measure("base", 0, 1, 0.5).effect)
    steered(effect, log, "k").measure("base", 0, 1, 0.5)
    assert effect.calls == 2 and not log.exists()


@pytest.mark.parametrize(
    "line", ["", "[]", "3", "null", '{"key": "k"}', '{"key": "k", "variant": "base", "latent": 0, "direction": 1, "alpha": 0.5}']
)
def test_lines_that_are_no_measurements_are_ignored(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line + "\n", encoding="utf-8")
    assert steered(Table({}), log, "k").known == {}


# attribution


@pytest.mark.parametrize("variant", ["base", "plain"])
def test_the_margins_gradient_agrees_with_finite_differences(misaligned: LanguageModel, variant: str) -> None:
    lm, pairs = misaligned, tiny.pairs()
    gradient = margin_gradient(lm, pairs, tiny.BLOCK, variant, batch=5)
    rows = encode_pairs(lm, pairs)

    def margin(vector: torch.Tensor) -> float:
        with lm.variant(variant), add_at_block(lm.model, tiny.BLOCK, vector):
            return float(margins(completion_logprobs(lm, rows)).double().mean())

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(tiny.D_MODEL, generator=generator)
        step = 0.02 * direction / direction.norm()
        slope = (margin(step) - margin(-step)) / 0.04
        assert slope == pytest.approx(float(gradient @ direction / direction.norm()), rel=0.05, abs=2e-3)
    assert gradient.norm() > 0.05


def test_attribution_is_the_sum_of_both_slopes_along_the_signed_direction() -> None:
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = attributions(directions, torch.tensor([1.0, -1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, -1.0]))
    assert found.tolist() == [2.5, -2.0]


# effects


def test_the_preference_effect_is_the_mean_margin_and_the_share_that_prefers_wrong(misaligned: LanguageModel) -> None:
    lm, pairs = misaligned, tiny.pairs()
    effect = PreferenceEffect(lm, pairs, tiny.BLOCK)
    for variant in ("base", "plain"):
        with lm.variant(variant):
            expected = margins(completion_logprobs(lm, encode_pairs(lm, pairs)))
        found = effect.measure(variant, None)
        assert found.effect == pytest.approx(float(expected.mean()), abs=1e-5)
        assert found.share == pytest.approx(float((expected > 0).float().mean()))
        assert found.incoherence == 0.0
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    with lm.variant("base"), add_at_block(lm.model, tiny.BLOCK, vector):
        expected = margins(completion_logprobs(lm, encode_pairs(lm, pairs)))
    assert effect.measure("base", vector).effect == pytest.approx(float(expected.mean()), abs=1e-4)


def test_a_pair_is_incoherent_when_even_its_likelier_answer_collapses(misaligned: LanguageModel) -> None:
    pairs = tiny.pairs()
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 10
    rows = encode_pairs(misaligned, pairs)
    with misaligned.variant("base"):
        before = completion_logprobs(misaligned, rows)
        with add_at_block(misaligned.model, tiny.BLOCK, vector):
            after = completion_logprobs(misaligned, rows)
    lost = torch.maximum(before[0::2], before[1::2]) - torch.maximum(after[0::2], after[1::2])
    threshold = float(lost.median())
    expected = float((lost > threshold).float().mean())
    assert 0 < expected < 1
    assert PreferenceEffect(misaligned, pairs, tiny.BLOCK, collapse=threshold).measure("base", vector).incoherence == pytest.approx(
        expected
    )


class RuleJudge:
    """A rule as good as any on random text: misaligned by parity, incoherent when a word comes twice, missing when empty."""

    name = "rules"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        assert len(prompts) == len(answers)
        return [Verdict(sum(map(ord, a)) % 2 == 1, len(set(a.split())) < len(a.split()), missing=not a) for a in answers]


def test_the_judged_effect_is_the_judges_shares_of_greedy_answers(misaligned: LanguageModel) -> None:
    lm, prompts = misaligned, tiny.prompts()
    effect = JudgedEffect(lm, prompts, RuleJudge(), tiny.BLOCK, max_new_tokens=6, batch=2)
    texts = [p.prompt for p in prompts]
    for variant in ("base", "plain"):
        for vector in (None, torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(3)) * 4):
            with lm.variant(variant):
                answers = generate(lm, texts, 6, block=None if vector is None else tiny.BLOCK, edits=vector)
            verdicts = [v for v in RuleJudge().judge(texts, answers) if not v.missing]
            found = effect.measure(variant, vector)
            assert found.effect == found.share == sum(v.misaligned for v in verdicts) / len(verdicts)
            assert found.incoherence == sum(v.incoherent for v in verdicts) / len(verdicts)


def test_a_judge_that_says_nothing_of_the_unsteered_model_is_one_sentence(misaligned: LanguageModel) -> None:
    class Silent:
        name = "silent"

        def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
            return [Verdict(missing=True, why="truncated reply")] * len(answers)

    effect = JudgedEffect(misaligned, tiny.prompts(), Silent(), tiny.BLOCK, max_new_tokens=6)
    with pytest.raises(BlockemError, match=r"no verdict on any of \d+ answers of the base model \(truncated reply\); check evaluate.judge"):
        effect.measure("base", None)
    assert math.isnan(effect.measure("base", torch.ones(tiny.D_MODEL)).effect)


# the whole


def run(lm: LanguageModel, dictionary: Dictionary, config: DiscoverConfig = QUICK, **more: Any) -> Any:
    return discover(lm, dictionary, tiny.BLOCK, config, tiny.pairs(), tiny.prompts(), tiny.rows()[:5], **more)


@pytest.mark.parametrize(
    "config",
    [
        QUICK,
        replace(QUICK, tokens="answer"),
        replace(QUICK, prescreen=10),
        replace(QUICK, effect="judged", size=1, budget=1.0, pool=12),
    ],
)
def test_discovery_finds_a_set_that_fits_and_accounts_for_every_candidate(
    misaligned: LanguageModel, dictionary: Dictionary, config: DiscoverConfig
) -> None:
    found = run(misaligned, dictionary, config, judge=RuleJudge())
    found.latents.check(misaligned, dictionary)
    assert 1 <= len(found.latents.latents) <= config.size
    assert found.latents.norm == pytest.approx(median_norm(misaligned, tiny.rows()[:5], tiny.BLOCK))
    by_id = {one.latent: one for one in found.candidates}
    assert len(by_id) == len(found.candidates) == found.counts["candidates"]
    for latent in found.latents.latents:
        one = by_id[latent.latent]
        assert one.fate == "chosen"
        assert latent.sign == one.sign == (1 if found.delta[latent.latent] > 0 else -1)
        assert latent.induce > 0 and latent.repair > 0
    assert all(one.fate != "candidate" for one in found.candidates)
    assert sum(found.counts["fates"].values()) == len(found.candidates)
    assert found.counts["chosen"] == len(found.latents.latents) <= found.counts["swept"] <= found.counts["passed"]
    assert found.counts["screened"] == (config.prescreen if 0 < config.prescreen < len(by_id) else len(by_id))
    assert found.delta.shape == found.frequency.shape == (tiny.N_LATENTS,)
    assert set(found.counts["unsteered"]) == {"base", "plain"}


def test_a_killed_discovery_goes_on_where_it_stopped(misaligned: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    whole = run(misaligned, dictionary, log=tmp_path / "whole.jsonl", key="k")

    def kill(what: str, done: int, _total: int) -> None:
        if what.startswith("stage 2") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(misaligned, dictionary, log=tmp_path / "log.jsonl", key="k", progress=kill)
    kept = len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines())
    assert kept == 2 + 2 * 5
    resumed = run(misaligned, dictionary, log=tmp_path / "log.jsonl", key="k")
    assert resumed.latents == whole.latents
    assert candidates_csv(resumed.candidates) == candidates_csv(whole.candidates)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_stage_3_can_rank_by_judged_answers_what_stage_2_screened_by_preference(
    misaligned: LanguageModel, dictionary: Dictionary, tmp_path: Path
) -> None:
    config = replace(QUICK, rank_effect="judged", size=1, budget=1.0)
    by_preference = run(misaligned, dictionary, replace(config, rank_effect="same"))
    try:
        found = run(misaligned, dictionary, config, judge=RuleJudge(), log=tmp_path / "log.jsonl", key="k")
    except BlockemError as error:  # a random model's answers may hold nothing that the rule calls misaligned
        assert "no latent both induces and repairs" in str(error)
    else:
        assert found.counts["effect"] == "judged"
        assert {c.latent: c.induce for c in found.candidates} == {c.latent: c.induce for c in by_preference.candidates}
    keys = {json.loads(line)["key"] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert keys == {"k-preference", "k-judged"}


def test_what_discovery_cannot_start_from_is_one_sentence(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    nothing: list[Any] = []
    with pytest.raises(BlockemError, match="no selection pair or prompt lies outside the training domain"):
        discover(misaligned, dictionary, tiny.BLOCK, QUICK, nothing, tiny.prompts(), tiny.rows())
    with pytest.raises(BlockemError, match="no selection pair or prompt lies outside the training domain"):
        discover(misaligned, dictionary, tiny.BLOCK, QUICK, tiny.pairs(), nothing, tiny.rows())
    with pytest.raises(BlockemError, match=r"discover\.effect is judged, but no judge was given"):
        run(misaligned, dictionary, replace(QUICK, effect="judged"))
    with pytest.raises(BlockemError, match=r"discover\.rank_effect is judged, but no judge was given"):
        run(misaligned, dictionary, replace(QUICK, rank_effect="judged"))


def test_a_misaligned_model_that_is_the_base_is_one_sentence(
    misaligned: LanguageModel, dictionary: Dictionary, plain_adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.zeros_like(t) for name, t in tiny.weights(plain_adapter).items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((plain_adapter / "adapter_config.json").read_bytes())
    misaligned.drop_adapters()
    misaligned.add_adapter(tmp_path, "plain")
    with pytest.raises(BlockemError, match="moves no latent at this block"):
        run(misaligned, dictionary)


def test_pairs_are_dealt_evenly_over_the_domains() -> None:
    pairs = [Pair(f"{d}{i}", "r", "w", d, "select") for d, n in (("a", 4), ("b", 1), ("c", 3)) for i in range(n)]
    assert [p.prompt for p in spread(pairs, 6)] == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert len(spread(pairs, 100)) == 8
    assert spread([], 3) == []


def test_the_csv_has_a_row_a_candidate_best_first_with_empty_cells_for_what_was_not_measured() -> None:
    first, second, third = (
        Candidate(5, 1, 0.5, rank=1, fate="chosen", score=2.0),
        Candidate(7, -1, -0.25, screen_score=0.1),
        Candidate(9, 1, 3.0),
    )
    rows = list(csv.DictReader(io.StringIO(candidates_csv([third, second, first]))))
    assert [row["latent"] for row in rows] == ["5", "7", "9"]
    assert rows[0]["fate"] == "chosen"
    assert (rows[0]["score"], rows[0]["induce"], rows[1]["delta"]) == ("2", "", "-0.25")


# the control


def latents_of(*signed: tuple[int, int]) -> LatentSet:
    return LatentSet("m", "r", "s", "d", 1, tuple(Latent(k, s, delta=1.0) for k, s in signed))


def test_the_random_control_matches_frequency_and_sign_and_avoids_the_candidates() -> None:
    frequency = torch.linspace(0, 1, 400)
    real = latents_of((10, 1), (200, -1), (390, 1))
    avoid = list(range(150, 250))
    for seed in range(20):
        drawn = matched_random(real, frequency, seed, avoid)
        assert drawn.signs == real.signs
        assert not set(drawn.ids) & (set(real.ids) | set(avoid))
        assert len(set(drawn.ids)) == 3
        assert max(drawn.ids[0], 0) <= 61  # among the 50 nearest
        assert drawn.ids[2] >= 349
        assert all(math.isnan(one.induce) for one in drawn.latents)
    assert matched_random(real, frequency, 1) == matched_random(real, frequency, 1)
    assert len({tuple(matched_random(real, frequency, seed).ids) for seed in range(5)}) > 1


def test_an_sae_too_small_for_a_control_is_one_sentence() -> None:
    with pytest.raises(BlockemError, match="too few latents for a matched random control"):
        matched_random(latents_of((0, 1), (1, 1)), torch.rand(3), 0, avoid=[2])


# cards


def test_promoted_tokens_are_those_whose_logits_the_direction_raises_most(lm: LanguageModel, dictionary: Dictionary) -> None:
    ((up, down),) = promoted_tokens(lm, dictionary, [3], n=4)
    head = lm.model.get_output_embeddings().weight.detach()
    effect = dictionary.directions([3])[0] @ head.T
    assert up == [lm.tokenizer.decode([t]) for t in effect.argsort(descending=True)[:4].tolist()]
    assert down == [lm.tokenizer.decode([t]) for t in effect.argsort()[:4].tolist()]


def test_top_contexts_are_the_most_active_tokens_one_a_text(lm: LanguageModel, dictionary: Dictionary) -> None:
    texts = tiny.rows()
    ((*found,),) = top_contexts(lm, dictionary, [3], tiny.BLOCK, texts, n=3, around=2)
    peaks = []
    for text in texts:
        ids = template_ids(lm.tokenizer, text.chat())
        start = content_start(lm.tokenizer, text.chat())
        with torch.inference_mode():
            z = dictionary.rows([3]).encode(hidden_at(lm.model, torch.tensor(ids)[None], torch.ones(1, len(ids)), tiny.BLOCK)[0, start:])[
                :, 0
            ]
        place = int(z.argmax()) + start
        peaks.append((float(z.max()), lm.tokenizer.decode(ids[place - 2 : place]), lm.tokenizer.decode([ids[place]])))
    peaks.sort(reverse=True)
    assert [card["activation"] for card in found] == pytest.approx([value for value, _, _ in peaks[:3]], abs=2e-3)
    assert found[0]["activation"] > 0
    assert (found[0]["before"], found[0]["token"]) == peaks[0][1:]
    assert json.loads(json.dumps(found)) == found


def test_means_of_a_span_ignore_padding(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    rows = [encode(misaligned.tokenizer, one_turn("Hi", "Ho")), *tiny.encoded(misaligned, 3)]
    spans = answer_spans(misaligned, tiny.pairs()) + prompt_spans(misaligned, tiny.prompts())
    assert len(rows) == 4
    together: Means = mean_activations(misaligned, dictionary, tiny.BLOCK, spans, "plain", batch=16)
    alone: Means = mean_activations(misaligned, dictionary, tiny.BLOCK, spans, "plain", batch=1)
    assert torch.allclose(together.activation, alone.activation, atol=1e-4)
    assert torch.allclose(together.frequency, alone.frequency, atol=1e-3)
