"""Halving: bounds that hold, the exhaustive answer for a fraction of the work, and every drop with its reason."""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from blockem.bundled import Pair
from blockem.config import DiscoverConfig, Recipe
from blockem.dictionary import Dictionary
from blockem.discovery.attribution import margin_gradient, pair_gradients
from blockem.discovery.bounds import FEWEST, Likeness, looks, upper_count, upper_differences, upper_gains, upper_mean
from blockem.discovery.discover import candidates_csv, dealt, discover
from blockem.discovery.effects import Items, JudgedEffect, PreferenceEffect, Steered
from blockem.discovery.halving import rank_halving, screen_halving
from blockem.discovery.ledger import Ledger
from blockem.discovery.rank import rank
from blockem.discovery.screen import Candidate, screen
from blockem.errors import BlockemError
from blockem.judges import Verdict
from blockem.likelihood import encode_pairs
from blockem.model import LanguageModel
from blockem.steered_rows import SteeredRows

PAIRS = 40


class Simulated:
    """An effect with known values: edits are multiples of unit vectors e_k, so (latent, α) can be read off them.

    Steering latent k by α moves pair i of the base by gain(α) · moves[0, k, i] and of the plain model by gain(α) · moves[1, k, i]; pair i
    breaks beyond strength breaks[k, i]. The gain rises to α = 0.5 and falls from there, or goes on rising (`hump=False`).
    """

    name = "simulated"

    def __init__(
        self, moves: np.ndarray[Any, Any], rungs: tuple[int, ...] = (), breaks: np.ndarray[Any, Any] | None = None, hump: bool = False
    ) -> None:
        self.moves, self.breaks, self.hump = moves, breaks, hump
        self.chunks = looks(rungs, moves.shape[2])
        self.calls: list[tuple[str, int, float, int]] = []
        self.guess: np.ndarray[Any, Any] | None = None
        self.stop_after: int | None = None

    def read(self, vector: torch.Tensor) -> tuple[int, float]:
        k = int(vector.abs().argmax())
        return k, float(vector[k])

    def all_items(self, variant: str, vector: torch.Tensor | None) -> Items:
        if vector is None:
            return Items(torch.zeros(self.moves.shape[2]), torch.zeros(self.moves.shape[2], dtype=torch.bool))
        k, alpha = self.read(vector)
        gain = math.copysign(abs(alpha) - (max(0.0, abs(alpha) - 0.5) * 2 if self.hump else 0), alpha)
        values = torch.tensor(gain * self.moves[int(variant == "plain"), k], dtype=torch.float32)
        broken = torch.zeros(len(values), dtype=torch.bool) if self.breaks is None else torch.tensor(abs(alpha) > self.breaks[k] + 1e-6)
        return Items(values, broken)

    def measure(self, variant: str, vector: torch.Tensor | None) -> Any:
        return self.all_items(variant, vector).measurement()

    def items(self, variant: str, vectors: Sequence[torch.Tensor | None], chunk: int) -> list[Items]:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        part = slice(*self.chunks[chunk])
        self.calls += [(variant, *((-1, 0.0) if v is None else self.read(v)), chunk) for v in vectors]
        found = [self.all_items(variant, v) for v in vectors]
        return [Items(one.values[part], one.broken[part]) for one in found]

    def foreseen(self, variant: str, vectors: torch.Tensor) -> torch.Tensor | None:
        if self.guess is None:
            return None
        return torch.tensor(np.stack([a * self.guess[int(variant == "plain"), k] for k, a in map(self.read, vectors)]))


def ledger(effect: Any, log: Path | None = None, key: str = "k", **more: Any) -> Ledger:
    n = effect.moves.shape[1]
    return Ledger(effect, {k: torch.eye(n)[k] for k in range(n)}, 1.0, log, key, **more)


def steered(effect: Any) -> Steered:
    n = effect.moves.shape[1]
    return Steered(effect, {k: torch.eye(n)[k] for k in range(n)}, 1.0)


def pool(n: int) -> list[Candidate]:
    return [Candidate(k, 1 if k % 2 else -1, 1.0) for k in range(n)]


def world(seed: int, n: int = 60, good: int = 8, noise: float = 0.2, pairs: int = PAIRS) -> np.ndarray[Any, Any]:
    """Per-pair moves `[2, latents, pairs]` in the direction of each latent's sign: a few good latents, many indifferent or harmful."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(-0.1, 0.15, (2, n))
    mean[:, :good] = rng.uniform(0.3, 0.6, (2, good))[:, :n]
    sign = np.array([one.sign for one in pool(n)])
    return sign[None, :, None] * (mean[:, :, None] + noise * rng.normal(size=(2, n, pairs)))


def fates(candidates: Sequence[Candidate]) -> dict[int, str]:
    return {one.latent: one.fate for one in candidates}


# bounds


def test_bounds_hold_as_often_as_they_say_and_narrow_to_the_mean() -> None:
    rng = np.random.default_rng(0)
    failed = n_bounds = 0
    for _ in range(200):
        whole = rng.normal(rng.normal(size=(20, 1)), np.exp(rng.normal(0, 0.5, (20, 1))), (20, PAIRS))
        failed += int((upper_mean(whole[:, :8], PAIRS, 0.05) < whole.mean(axis=1)).sum())
        n_bounds += 20
    assert 0.02 < failed / n_bounds < 0.06
    assert np.array_equal(upper_mean(whole, PAIRS, 0.05), whole.mean(axis=1))
    assert np.isinf(upper_mean(whole[:, :8], PAIRS, 0.0)).all()
    widths = [float((upper_mean(whole[:, :n], PAIRS, 0.01) - whole[:, :n].mean(axis=1)).mean()) for n in (8, 16, 32)]
    assert widths == sorted(widths, reverse=True) and widths[2] < widths[0] / 3


def test_a_guess_narrows_the_bounds_and_a_wrong_one_does_no_harm() -> None:
    rng = np.random.default_rng(1)
    failed = {"good": 0, "useless": 0}
    width = {"good": 0.0, "useless": 0.0, "none": 0.0}
    for _ in range(200):
        told = rng.normal(size=(20, PAIRS))
        whole = 0.7 * told + 0.5 * rng.normal(size=(20, PAIRS))
        for name, guess in (("good", told + 5), ("useless", rng.normal(size=(20, PAIRS)))):
            bound = upper_mean(whole[:, :8], PAIRS, 0.05, Likeness(foreseen=guess))
            failed[name] += int((bound < whole.mean(axis=1)).sum())
            width[name] += float((bound - whole.mean(axis=1)).mean())
        width["none"] += float((upper_mean(whole[:, :8], PAIRS, 0.05) - whole.mean(axis=1)).mean())
    assert all(count / 4000 < 0.06 for count in failed.values())
    assert width["good"] < 0.7 * width["none"]
    assert width["useless"] < 1.1 * width["none"]


def test_few_rows_learn_nothing_in_common() -> None:
    rng = np.random.default_rng(2)
    few = rng.normal(size=(FEWEST - 1, PAIRS))
    alone = np.array([upper_mean(row[None, :8], PAIRS, 0.01)[0] for row in few])
    assert np.allclose(upper_mean(few[:, :8], PAIRS, 0.01, Likeness(foreseen=few)), alone)


def test_the_bound_of_a_count_is_exact() -> None:
    # 3 hits among 10 of 40: the largest total that leaves 3 or fewer a probability above 5 %, by simulation
    found = upper_count(3, 10, 40, 0.05)
    rng = np.random.default_rng(0)
    share = [float((rng.hypergeometric(m, 40 - m, 10, 20_000) <= 3).mean()) for m in (found, found + 1)]
    assert share[0] > 0.045 and share[1] < 0.055 and share[0] > share[1]
    assert upper_count(3, 40, 40, 0.05) == 3
    assert upper_count(0, 10, 40, 0.0) == 30


def test_verdicts_have_exact_bounds_also_when_all_agree() -> None:
    before = np.zeros(40)
    none = upper_gains(np.zeros((1, 8)), before, 1, 0.001)
    assert none[0] == upper_count(0, 8, 40, 0.001) / 40 > 0.3  # eight times no is not never
    lost = np.array([[1.0, math.nan, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert upper_gains(lost, before, 1, 0.05)[0] == pytest.approx(upper_count(1, 7, 39, 0.05) / 39)
    assert upper_gains(np.ones((1, 40)), np.ones(40), -1, 0.05)[0] == pytest.approx(0)
    apart = upper_differences(np.zeros((1, 20)), np.ones((1, 20)), 40, 0.01)
    assert -1 <= apart[0] < 0


def test_looks_are_the_rungs_below_all_and_all() -> None:
    assert looks((8, 16), 40) == ((0, 8), (8, 16), (16, 40))
    assert looks((16, 8, 8), 16) == ((0, 8), (8, 16))
    assert looks((8, 16), 6) == ((0, 6),)
    assert looks((), 6) == ((0, 6),)


# stage 2


def test_halving_keeps_what_the_exhaustive_way_keeps_for_a_third_of_the_work() -> None:
    wrong, share = 0, []
    for seed in range(30):
        effect = Simulated(world(seed), (8, 16, 24, 32))
        full, halved = pool(60), pool(60)
        expected = [one.latent for one in screen(steered(effect), full, 6, 0.5, 0.5)]
        one = ledger(effect)
        wrong += [c.latent for c in screen_halving(one, halved, 6, 0.5, 0.5, error=0.05)] != expected
        share.append(one.units / (2 * 60 * PAIRS))
    assert wrong <= 3  # 30 trials at 5 % leave more than 3 wrong with a probability of 6 % at most; none is usual
    assert np.mean(share) < 0.45


def test_a_guess_of_every_pair_saves_more() -> None:
    moves = world(3, noise=0.5)
    units = {}
    for name, guess in (("none", None), ("guess", moves + 0.2 * np.random.default_rng(0).normal(size=moves.shape))):
        effect = Simulated(moves, (8, 16, 24, 32))
        effect.guess = guess
        one = ledger(effect)
        kept = screen_halving(one, pool(60), 6, 0.5, 0.5)
        assert [c.latent for c in kept] == [c.latent for c in screen(steered(effect), pool(60), 6, 0.5, 0.5)]
        units[name] = one.units
    assert units["guess"] < 0.8 * units["none"]


def test_the_harmful_go_first_and_say_so() -> None:
    moves = world(0)
    moves[:, 20] *= 0
    moves[:, 20] -= 2.0 * pool(60)[20].sign
    moves[0, 21], moves[1, 21] = 2.0 * pool(60)[21].sign, -2.0 * pool(60)[21].sign
    effect = Simulated(moves, (8, 16))
    candidates = pool(60)
    screen_halving(ledger(effect), candidates, 6, 0.5, 0.5)
    assert candidates[20].fate == "dropped after 8 pairs: neither induces nor repairs"
    assert candidates[21].fate == "dropped after 8 pairs: does not repair"
    assert candidates[20].pairs == candidates[21].pairs == 8
    assert candidates[20].induce == pytest.approx(-1.0)
    assert {chunk for _, k, _, chunk in effect.calls if k == 20} == {0}
    assert all(one.pairs in (8, 16, 40) and one.fate != "candidate" for one in candidates)
    assert all(one.pairs == 40 for one in candidates if not one.fate.startswith("dropped"))
    assert any("cannot be among the 6 that go on" in one.fate for one in candidates)


def test_what_broke_too_many_pairs_already_is_dropped_without_error() -> None:
    moves = world(0, n=12)
    breaks = np.full((12, PAIRS), 9.0)
    breaks[0, :5] = 0.1  # five of forty, all among the first eight
    breaks[1, :3] = 0.1
    candidates = pool(12)
    screen_halving(ledger(Simulated(moves, (8, 16), breaks)), candidates, 6, 0.5, 0.5, error=0.0)
    assert candidates[0].fate == "dropped after 8 pairs: incoherent"
    assert candidates[1].pairs == 40


@pytest.mark.parametrize("seed", range(4))
def test_without_error_everything_is_measured_and_equal(seed: int) -> None:
    effect = Simulated(world(seed, n=20, noise=0.6), (8, 16))
    full, halved = pool(20), pool(20)
    expected = screen(steered(effect), full, 6, 0.5, 0.4)
    one = ledger(effect)
    found = screen_halving(one, halved, 6, 0.5, 0.4, error=0.0)
    assert [c.latent for c in found] == [c.latent for c in expected]
    assert fates(halved) == fates(full)
    assert [c.screen_score for c in halved] == pytest.approx([c.screen_score for c in full])
    assert one.units == 2 * 20 * PAIRS
    chosen, again = rank(steered(effect), expected, 3, (0.2, 0.4)), rank_halving(one, found, 3, (0.2, 0.4), error=0.0)
    assert [(c.latent, c.rank, c.best_induce_alpha) for c in again] == [(c.latent, c.rank, c.best_induce_alpha) for c in chosen]


def test_fewer_pairs_than_a_rung_are_one_look() -> None:
    effect = Simulated(world(0, n=10, pairs=5), (8, 16))
    one = ledger(effect)
    candidates = pool(10)
    kept = screen_halving(one, candidates, 4, 0.5, 0.5)
    assert [c.latent for c in kept] == [c.latent for c in screen(steered(effect), pool(10), 4, 0.5, 0.5)]
    assert one.units == 2 * 10 * 5 and all(c.pairs == 5 for c in candidates)


def test_ties_are_never_dropped_and_fall_as_in_the_exhaustive_way() -> None:
    moves = np.zeros((2, 12, PAIRS))
    moves += 0.5 * np.array([one.sign for one in pool(12)])[None, :, None]
    effect = Simulated(moves, (8, 16))
    kept = screen_halving(ledger(effect), pool(12), 4, 0.5, 0.5, error=0.5)
    assert [c.latent for c in kept] == [c.latent for c in screen(steered(effect), pool(12), 4, 0.5, 0.5)]


@pytest.mark.parametrize("keep", [1, 2, 5, 40])
def test_the_signs_share_the_places_as_in_the_exhaustive_way(keep: int) -> None:
    moves = world(5, n=40, good=10)
    moves[:, 1:10:4] *= -1  # fewer good ones of one sign
    effect = Simulated(moves, (8, 16, 24))
    kept = screen_halving(ledger(effect), pool(40), keep, 0.5, 0.5)
    assert [c.latent for c in kept] == [c.latent for c in screen(steered(effect), pool(40), keep, 0.5, 0.5)]


# stage 3

STRENGTHS = tuple(round(0.05 * i, 2) for i in range(1, 16))


def test_a_sweep_of_fifteen_strengths_costs_a_few() -> None:
    wrong, share = 0, []
    for seed in range(8):
        moves = world(seed, n=12, good=12)
        breaks = np.full((12, PAIRS), 0.62)
        effect = Simulated(moves, (8, 16, 24, 32), breaks, hump=True)
        full, halved = pool(12), pool(12)
        expected = rank(steered(effect), full, 4, STRENGTHS)
        one = ledger(effect)
        found = rank_halving(one, halved, 4, STRENGTHS, error=0.05)
        figures = [
            [(c.latent, c.rank, c.best_induce_alpha, c.best_repair_alpha, round(c.score, 5)) for c in some] for some in (found, expected)
        ]
        wrong += figures[0] != figures[1]
        share.append(one.units / (2 * 12 * 15 * PAIRS))
    assert wrong <= 1
    assert np.mean(share) < 0.45


@pytest.mark.parametrize(("stop", "measured"), [(True, {0.2, 0.4}), (False, {0.2, 0.4, 0.6})])
def test_beyond_a_broken_strength_none_is_measured_unless_told_to(stop: bool, measured: set[float]) -> None:
    breaks = np.full((4, PAIRS), 0.32)
    breaks[:, ::4] = 9.0  # six of the first eight pairs break beyond 0.3
    effect = Simulated(world(0, n=4, good=4), (8,), breaks)
    candidates = pool(4)
    rank_halving(ledger(effect), candidates, 2, (0.2, 0.4, 0.6), stop_incoherent=stop)
    assert {round(abs(alpha), 2) for _, k, alpha, _ in effect.calls if k >= 0} == measured
    assert {round(abs(alpha), 2) for _, k, alpha, chunk in effect.calls if k >= 0 and chunk} == {0.2}
    assert {one.best_induce_alpha for one in candidates} == {0.2}


def test_dropped_strengths_and_candidates_say_after_how_many_pairs() -> None:
    moves = world(0, n=12, good=4)
    moves[:, 4:] = 0.05 * np.array([c.sign for c in pool(12)])[None, 4:, None] + 0.01 * np.random.default_rng(0).normal(size=(2, 8, PAIRS))
    candidates = pool(12)
    breaks = np.full((12, PAIRS), 9.0)
    breaks[11] = 0.01
    chosen = rank_halving(ledger(Simulated(moves, (8, 16), breaks)), candidates, 3, (0.2, 0.4))
    assert len(chosen) == 3 and {c.latent for c in chosen} <= {0, 1, 2, 3}
    assert all(c.pairs == PAIRS and c.fate == "chosen" for c in chosen)
    assert candidates[5].fate == "dropped in stage 3 after 8 pairs: cannot reach the top 3"
    assert (candidates[5].pairs, candidates[5].rank) == (8, 0)
    assert candidates[11].fate == "dropped in stage 3 after 8 pairs: no strength inside the incoherence budget"
    rows = {row["latent"]: row for row in csv.DictReader(io.StringIO(candidates_csv(candidates)))}
    assert (rows["5"]["pairs"], rows["5"]["fate"]) == ("8", candidates[5].fate)


# what was measured


def test_a_killed_rung_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def whole(effect: Simulated, log: Path) -> tuple[list[Candidate], list[Candidate]]:
        one, candidates = ledger(effect, log, stack=4), pool(30)
        kept = screen_halving(one, candidates, 6, 0.5, 0.5)
        return rank_halving(one, kept, 3, (0.3, 0.5)), candidates

    expected = whole(Simulated(world(1, n=30), (8, 16)), tmp_path / "whole.jsonl")
    log = tmp_path / "log.jsonl"
    for stop_after in (3, 20, 20, 10):
        effect = Simulated(world(1, n=30), (8, 16))
        effect.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            whole(effect, log)
        log.write_bytes(log.read_bytes()[:-7])  # and its last line is torn
    effect = Simulated(world(1, n=30), (8, 16))
    found = whole(effect, log)
    assert found == expected
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert lines == (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines()
    before = len(effect.calls)
    assert whole(effect, log) == expected and len(effect.calls) == before


def test_a_log_of_another_key_or_of_other_rungs_is_not_believed(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    name = ("base", 0, 1, 0.5)
    ledger(Simulated(world(0, n=4), (8,)), log, "one").ensure([name], 1)
    assert ledger(Simulated(world(0, n=4), (8,)), log, "one").whole(name) is False
    assert ledger(Simulated(world(0, n=4), (8,)), log, "one").chunks_of(name) == 1
    assert ledger(Simulated(world(0, n=4), (8,)), log, "two").chunks_of(name) == 0
    assert ledger(Simulated(world(0, n=4), (9,)), log, "one").chunks_of(name) == 0
    with log.open("a", encoding="utf-8") as file:
        file.write(
            '[]\n3\n{"key": "one"}\n{"key": "one", "variant": "base", "chunk": [0, 8], "edits": [[0]], "values": [], "broken": []}\n'
        )
    assert ledger(Simulated(world(0, n=4), (8,)), log, "one").chunks_of(name) == 1


def test_a_missing_verdict_survives_the_log(tmp_path: Path) -> None:
    moves = world(0, n=2)
    moves[0, 0, 1] = math.nan
    name = ("base", 0, 1, 0.5)
    ledger(Simulated(moves, (8,)), tmp_path / "log.jsonl").ensure([name], 2)
    again = ledger(Simulated(moves, (8,)), tmp_path / "log.jsonl")
    assert again.whole(name)
    assert again.items(name).values.isnan().tolist() == [i == 1 for i in range(PAIRS)]
    assert again.items(name).measurement().effect == pytest.approx(0.5 * float(np.nanmean(moves[0, 0])), abs=1e-6)


# real models

QUICK = DiscoverConfig(pool=8, prescreen=0, keep=6, size=3, strengths=(0.2, 0.4), pairs=6, max_new_tokens=4)


def run(lm: LanguageModel, dictionary: Dictionary, config: DiscoverConfig, **more: Any) -> Any:
    return discover(lm, dictionary, tiny.BLOCK, config, tiny.pairs(), tiny.prompts(), tiny.rows()[:5], **more)


def test_chunks_and_stacked_edits_equal_one_edit_on_all_rows(misaligned: LanguageModel) -> None:
    rows = encode_pairs(misaligned, tiny.pairs())
    vectors = torch.randn(3, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    whole = SteeredRows(misaligned, rows, tiny.BLOCK, "plain")
    parts = SteeredRows(misaligned, rows, tiny.BLOCK, "plain", batch=3, chunks=((0, 4), (4, 12)), stack=7)
    expected = torch.stack([whole.logprobs(vector) for vector in vectors])
    assert torch.allclose(parts.logprobs_many(vectors), expected, atol=1e-5)
    assert torch.allclose(torch.cat([parts.logprobs_many(vectors, chunk) for chunk in (0, 1)], dim=1), expected, atol=1e-5)
    assert expected.std(dim=0).min() > 1e-3


def test_the_gradient_of_each_pair_adds_up_to_the_margins(misaligned: LanguageModel) -> None:
    found = pair_gradients(misaligned, tiny.pairs(), tiny.BLOCK, "plain", batch=5)
    assert found.shape == (6, tiny.D_MODEL)
    assert torch.allclose(found.mean(dim=0), margin_gradient(misaligned, tiny.pairs(), tiny.BLOCK, "plain"), atol=1e-4)


def test_the_items_of_a_preference_add_up_to_its_measure(misaligned: LanguageModel) -> None:
    effect = PreferenceEffect(misaligned, tiny.pairs(), tiny.BLOCK, chunks=((0, 2), (2, 6)))
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 0.1
    for edit in (None, vector):
        some = [effect.items("plain", [None, edit], chunk)[1] for chunk in (0, 1)]
        whole = Items(torch.cat([one.values for one in some]), torch.cat([one.broken for one in some])).measurement()
        expected = effect.measure("plain", edit)
        assert (whole.effect, whole.incoherence, whole.share) == pytest.approx(
            (expected.effect, expected.incoherence, expected.share), abs=1e-5
        )
    foreseen = effect.foreseen("plain", vector[None])
    assert foreseen is not None
    moved = torch.cat([effect.items("plain", [vector], c)[0].values - effect.items("plain", [None], c)[0].values for c in (0, 1)])
    assert torch.corrcoef(torch.stack([foreseen[0], moved]))[0, 1] > 0.9


def test_halving_off_is_the_old_way_and_without_error_it_finds_the_same(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    """The old way written out: whole measurements of all pairs in file order, one edit at a time."""
    exhaustive = run(misaligned, dictionary, QUICK)
    effect = PreferenceEffect(misaligned, tiny.pairs(), tiny.BLOCK)
    fresh = [Candidate(c.latent, c.sign, c.delta, c.frequency) for c in exhaustive.candidates]
    directions = {c.latent: d for c, d in zip(fresh, dictionary.directions([c.latent for c in fresh]), strict=True)}
    old = Steered(effect, directions, exhaustive.latents.norm)
    chosen = rank(old, screen(old, fresh, 6, QUICK.alpha_induce, QUICK.alpha_repair), 3, QUICK.strengths)
    assert [(c.latent, c.score) for c in chosen] == [(c.latent, c.score) for c in exhaustive.latents.latents]
    for one, before in zip(exhaustive.candidates, fresh, strict=True):
        assert one.pairs == 6
        assert repr(replace(one, pairs=0)) == repr(replace(before, pairs=0))
    halved = run(misaligned, dictionary, replace(QUICK, halving=True, error=0.0, rungs=(2, 4), stop_incoherent=False))
    assert halved.latents.ids == exhaustive.latents.ids
    assert [c.fate for c in halved.candidates] == [c.fate for c in exhaustive.candidates]
    assert [c.score for c in halved.latents.latents] == pytest.approx([c.score for c in exhaustive.latents.latents], abs=1e-4)
    assert halved.counts["units"] == exhaustive.counts["units"]


def test_halving_on_a_real_model_is_deterministic_and_resumes(misaligned: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    config = replace(QUICK, halving=True, error=0.5, rungs=(3, 4))
    whole = run(misaligned, dictionary, config, log=tmp_path / "whole.jsonl", key="k")

    def kill(what: str, done: int, _total: int) -> None:
        if what.startswith("stage 2: induce and repair, 4") and done:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):  # where nobody is left for the second rung there is nothing to kill
        run(misaligned, dictionary, config, log=tmp_path / "log.jsonl", key="k", progress=kill)
    resumed = run(misaligned, dictionary, config, log=tmp_path / "log.jsonl", key="k")
    assert resumed.latents == whole.latents
    assert candidates_csv(resumed.candidates) == candidates_csv(whole.candidates)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


class RuleJudge:
    """Misaligned by parity of the letters, missing when empty."""

    name = "rules"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        assert len(prompts) == len(answers)
        return [Verdict(sum(map(ord, a)) % 2 == 1, missing=not a) for a in answers]


def test_judged_items_are_verdicts_prompt_by_prompt(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    effect = JudgedEffect(misaligned, tiny.prompts(), RuleJudge(), tiny.BLOCK, max_new_tokens=4, chunks=((0, 2), (2, 5)))
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(3)) * 4
    for edit in (None, vector):
        some = [effect.items("plain", [edit, None], chunk)[0] for chunk in (0, 1)]
        whole = Items(torch.cat([one.values for one in some]), torch.cat([one.broken for one in some])).measurement()
        assert whole.effect == pytest.approx(effect.measure("plain", edit).effect)
    config = replace(QUICK, effect="judged", halving=True, rungs=(2,), size=1, budget=1.0)
    try:
        found = run(misaligned, dictionary, config, judge=RuleJudge())
    except BlockemError as error:  # a random model's answers may hold nothing that the rule calls misaligned
        assert "no latent both induces and repairs" in str(error)
    else:
        assert all(c.pairs in (2, 5) for c in found.candidates)


def test_any_leading_part_of_the_dealt_pairs_is_balanced() -> None:
    pairs = [Pair(f"{d}{i}", "r", "w", d, "select") for d in "abcd" for i in range(5)]
    order = dealt(pairs)
    assert sorted(p.prompt for p in order) == sorted(p.prompt for p in pairs)
    assert order == dealt(pairs) != pairs
    assert order != dealt(pairs, seed=1)
    for n in (4, 8, 12):
        counts = [sum(p.domain == d for p in order[:n]) for d in "abcd"]
        assert max(counts) == min(counts)


def test_pairs_of_uneven_domains_are_a_fair_sample_of_all() -> None:
    pairs = [Pair(f"{d}{i}", "r", "w", d, "select") for d, n in [("a", 22), *((d, 2) for d in "bcdefghij")] for i in range(n)]
    shares = [np.mean([p.domain == "a" for p in dealt(pairs, seed)[:16]]) for seed in range(200)]
    assert np.mean(shares) == pytest.approx(22 / 40, abs=0.03)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("discover.error", 1.0, "discover.error is 1.0; it is a probability"),
        ("discover.error", -0.1, "discover.error is -0.1"),
        ("discover.rungs", "1,8", "discover.rungs must be numbers of pairs, at least 2 each"),
    ],
)
def test_wrong_settings_are_one_sentence(field: str, value: Any, said: str) -> None:
    with pytest.raises(BlockemError, match=said):
        Recipe().with_values({field: value})
