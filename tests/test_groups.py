"""Groups of latents: what alone does nothing and together passes, whole groups only, and the same after a kill."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.config import DiscoverConfig, Recipe
from blockem.config_values import keyed, plain
from blockem.dictionary import Dictionary
from blockem.discovery.bounds import looks
from blockem.discovery.discover import Measuring, candidates_csv, discover, screen_and_rank
from blockem.discovery.effects import Items, Measurement, PreferenceEffect, Steered
from blockem.discovery.groups import Group, best_of_both, groups_of, without_number
from blockem.discovery.ledger import Ledger
from blockem.discovery.screen import Candidate
from blockem.errors import BlockemError
from blockem.judges import Verdict
from blockem.latents import LatentSet
from blockem.model import LanguageModel
from blockem.report.making import funnel
from blockem.selection import read_candidates

ITEMS = 12
SMALL = DiscoverConfig(alpha_induce=0.4, alpha_repair=0.4, strengths=(0.2, 0.4), budget=0.1, keep=6, size=4, group=2)
QUICK = DiscoverConfig(pool=8, prescreen=0, keep=8, size=6, strengths=(0.2, 0.4), pairs=6, max_new_tokens=4, budget=1.0, group=2)


class Partners:
    """An effect of unit vectors e_k: latent 0 works alone, 1 and 2 only together, 3 and 4 only together and only in the base.

    Two that work together move every item by twice the smaller of both, each taken in its own sign. An edit by latent 5 works alone and
    breaks every item; any other does nothing.
    """

    name = "partners"

    def __init__(self, signs: Sequence[int], rungs: tuple[int, ...] = ()) -> None:
        self.signs, self.chunks = torch.tensor(signs, dtype=torch.float32), looks(rungs, ITEMS)

    def all_items(self, variant: str, vector: torch.Tensor | None) -> Items:
        moved = torch.zeros(len(self.signs)) if vector is None else self.signs * vector
        value = float(moved[0] + moved[5])
        for a, b in ((1, 2), (3, 4))[: 2 if variant == "base" else 1]:
            pair = moved[[a, b]]
            if bool((pair > 0).all() or (pair < 0).all()):
                value += 2 * float(pair.sign()[0] * pair.abs().min())
        return Items(torch.full((ITEMS,), value), torch.full((ITEMS,), bool(moved[5])))

    def measure(self, variant: str, vector: torch.Tensor | None) -> Measurement:
        return self.all_items(variant, vector).measurement()

    def items(self, variant: str, vectors: Sequence[torch.Tensor | None], chunk: int) -> list[Items]:
        part = slice(*self.chunks[chunk])
        return [Items(one.values[part], one.broken[part]) for one in (self.all_items(variant, v) for v in vectors)]

    def foreseen(self, variant: str, vectors: torch.Tensor) -> None:
        return None


def seven() -> list[Candidate]:
    """Latents 0 to 6, the largest |Δ| first, every other one lowered."""
    return [Candidate(k, -1 if k % 2 else 1, (9.0 - k) * (-1 if k % 2 else 1)) for k in range(7)]


def found(candidates: list[Candidate], config: DiscoverConfig, log: Path | None = None, bar: Any = None) -> Any:
    effect: Any = Partners([one.sign for one in candidates], config.rungs if config.halving else ())
    directions = {k: torch.eye(len(candidates))[k] for k in range(len(candidates))}
    tell = bar or (lambda _what, _done, _total: None)
    return screen_and_rank(Measuring({config.effect: effect}, directions, 1.0, log, "k", tell), candidates, config)


# what a group is


def test_the_edit_of_a_group_is_the_sum_of_signed_directions_with_the_norm_of_a_single_edit(dictionary: Dictionary) -> None:
    ids, signs = (3, 7, 11), (1, -1, 1)
    directions = {k: d for k, d in zip(ids, dictionary.directions(list(ids)), strict=True)}
    group = Group([Candidate(k, s, 1.0) for k, s in zip(ids, signs, strict=True)], Candidate(1, 1, 0.0))
    seen: list[torch.Tensor] = []

    class Spy:
        name = "spy"

        def measure(self, variant: str, vector: torch.Tensor | None) -> Measurement:
            assert vector is not None
            seen.append(vector)
            return Measurement(0.0, 0.0, 0.0)

    one = Steered(Spy(), {1: group.direction(directions)}, 10.0)
    one.measure("base", 1, 1, 0.5)
    one.measure("plain", 1, -1, 0.2)
    total = directions[3] - directions[7] + directions[11]
    assert torch.allclose(seen[0], 5.0 * total / total.norm(), atol=1e-5)
    assert torch.allclose(seen[1], -2.0 * total / total.norm(), atol=1e-5)
    assert float(seen[0].norm()) == pytest.approx(5.0, abs=1e-4)


def test_members_that_cancel_make_an_edit_of_nothing() -> None:
    group = Group([Candidate(0, 1, 1.0), Candidate(1, -1, 1.0)], Candidate(1, 1, 0.0))
    assert group.direction({0: torch.ones(3), 1: torch.ones(3)}).tolist() == [0.0, 0.0, 0.0]


def test_groups_are_cut_from_those_that_failed_strongest_first_without_the_incoherent() -> None:
    some = [Candidate(k, 1 if k % 2 else -1, float(k if k % 2 else -k), fate="screened out: only induces") for k in range(1, 9)]
    some[6].fate = "dropped after 8 pairs: incoherent"
    kept = [some[7]]
    assert [[one.latent for one in group.members] for group in groups_of(some, kept, 2)] == [[6, 5], [4, 3], [2, 1]]
    assert [[one.latent for one in group.members] for group in groups_of(some, kept, 4)] == [[6, 5, 4, 3]]  # the rest stays out
    for place, one in enumerate(some):
        one.attribution = -float(place)
    assert [[one.latent for one in group.members] for group in groups_of(some, kept, 2)] == [[1, 2], [3, 4], [5, 6]]
    assert [group.unit.latent for group in groups_of(some, kept, 2)] == [1, 2, 3]
    assert groups_of(some, kept, 7) == []


# stages 2 and 3


@pytest.mark.parametrize("halving", [False, True])
def test_two_that_do_nothing_alone_pass_together(halving: bool) -> None:
    candidates = seven()
    kept, chosen, facts = found(candidates, replace(SMALL, halving=halving, error=0.0, rungs=(8,), stop_incoherent=False))
    assert [one.latent for one in kept] == [0, 1, 2]
    assert {one.latent: one.fate for one in candidates} == {
        0: "chosen",
        1: "chosen in group 1",
        2: "chosen in group 1",
        3: "screened out: group 2 only induces",
        4: "screened out: group 2 only induces",
        5: "dropped after 8 pairs: incoherent" if halving else "screened out: incoherent",
        6: "screened out: neither induces nor repairs",
    }
    assert [one.group for one in candidates] == [0, 1, 1, 2, 2, 0, 0]
    first, second = candidates[1:3]
    assert (first.induce, first.repair, first.screen_score) == (0, 0, 0)  # its own figures of stage 2
    for one in (first, second):
        assert one.best_induce == pytest.approx(2 * 0.4 / math.sqrt(2)) and one.best_repair == pytest.approx(2 * 0.4 / math.sqrt(2))
        assert (one.best_induce_alpha, one.best_repair_alpha, one.strongest_induce_alpha, one.pairs) == (0.4, 0.4, 0.4, ITEMS)
        assert one.score == pytest.approx((one.best_induce + one.best_repair) / 2)
    assert [(one.latent, one.rank) for one in chosen] == [(0, 1), (1, 2), (2, 3)]
    assert facts["groups"] == {"size": 2, "tested": 2, "passed": 1}
    assert facts["units"] == ITEMS * (2 * 7 + 2 + 2 * 2 + 2) - 2 * 4 * halving  # stage 3 adds α = 0.2; halving drops the incoherent after 8


def test_a_group_goes_on_whole_or_not_at_all() -> None:
    candidates = seven()
    kept, chosen, _ = found(candidates, replace(SMALL, size=2))
    assert [one.latent for one in kept] == [0, 1, 2] and [one.latent for one in chosen] == [0]
    assert {one.fate for one in candidates[1:3]} == {"ranked out: no room for group 1 in the top 2"}
    # one place is left beside latent 0: none is tested
    candidates, plain = seven(), seven()
    kept, chosen, facts = found(candidates, replace(SMALL, keep=2))
    assert "groups" not in facts and [one.latent for one in chosen] == [0]
    found(plain, replace(SMALL, keep=2, group=0))
    assert candidates_csv(candidates) == candidates_csv(plain)


def test_single_latents_and_groups_are_ranked_by_score_and_later_ones_may_fit() -> None:
    singles = [Candidate(k, 1, 1.0, score=score, rank=1) for k, score in ((0, 5.0), (1, 1.0), (2, 0.5))]
    groups = [
        Group([Candidate(k, 1, 1.0, group=n, score=score) for k in ids], Candidate(n, 1, 0.0, rank=1))
        for n, ids, score in ((1, (3, 4), 3.0), (2, (5, 6), 2.0))
    ]
    dropped = Candidate(9, 1, 1.0, score=9.0, fate="dropped in stage 3")
    assert [one.latent for one in best_of_both([dropped, *singles], groups, 4)] == [0, 3, 4, 1]
    assert [one.rank for one in singles] == [1, 6, 7] and dropped.rank == 0
    assert groups[1].members[0].fate == "ranked out: no room for group 2 in the top 4"
    assert singles[2].fate == "ranked out: below the top 4"


@pytest.mark.parametrize("halving", [False, True])
def test_a_killed_test_of_groups_goes_on_where_it_stopped(tmp_path: Path, halving: bool) -> None:
    config = replace(SMALL, halving=halving, rungs=(8,))
    whole, resumed = seven(), seven()
    found(whole, config, tmp_path / "whole.jsonl")
    keys = {json.loads(line)["key"] for line in (tmp_path / "whole.jsonl").read_text().splitlines()}
    assert "k-preference" in keys and len(keys) == 2 and any(key.startswith("k-groups-") for key in keys)

    def kill(what: str, done: int, _total: int) -> None:
        if what.startswith("stage 2: induce and repair") and what.endswith("groups of 2") and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found(seven(), config, tmp_path / "log.jsonl", kill)
    found(resumed, config, tmp_path / "log.jsonl")
    assert candidates_csv(resumed) == candidates_csv(whole)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# real models


def run(lm: LanguageModel, dictionary: Dictionary, config: DiscoverConfig, **more: Any) -> Any:
    return discover(lm, dictionary, tiny.BLOCK, config, tiny.pairs(), tiny.prompts(), tiny.rows()[:5], **more)


def test_groups_measured_together_equal_one_at_a_time(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    ids = list(range(6))
    directions = dict(zip(ids, dictionary.directions(ids), strict=True))
    members = [Candidate(k, 1 if k % 2 else -1, 1.0) for k in ids]
    groups = [Group(members[2 * i : 2 * i + 2], Candidate(i + 1, 1, 0.0)) for i in range(3)]
    one_of = {group.unit.latent: group.direction(directions) for group in groups}
    effect = PreferenceEffect(misaligned, tiny.pairs(), tiny.BLOCK)
    together, alone = Ledger(effect, one_of, 8.0), Steered(effect, one_of, 8.0)
    names = [("plain", number, -1, 0.4) for number in one_of]
    together.ensure(names, 1)
    values = [together.items(name).measurement().effect for name in names]
    assert values == pytest.approx([alone.measure(*name).effect for name in names], abs=1e-5)
    assert max(values) - min(values) > 1e-3


class RuleJudge:
    """Misaligned by parity of the letters, missing when empty."""

    name = "rules"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(sum(map(ord, a)) % 2 == 1, missing=not a) for a in answers]


@pytest.mark.parametrize("effect", ["preference", "judged"])
def test_a_killed_discovery_with_groups_is_the_same(misaligned: LanguageModel, dictionary: Dictionary, tmp_path: Path, effect: str) -> None:
    config = replace(QUICK, effect=effect)
    told: list[str] = []
    whole = run(
        misaligned,
        dictionary,
        config,
        judge=RuleJudge(),
        log=tmp_path / "whole.jsonl",
        key="k",
        progress=lambda what, *_: told.append(what),
    )
    assert "stage 2: induce and repair, groups of 2" in told

    def kill(what: str, done: int, _total: int) -> None:
        if what == "stage 2: induce and repair, groups of 2" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(misaligned, dictionary, config, judge=RuleJudge(), log=tmp_path / "log.jsonl", key="k", progress=kill)
    again = run(misaligned, dictionary, config, judge=RuleJudge(), log=tmp_path / "log.jsonl", key="k")
    assert again.latents == whole.latents
    assert candidates_csv(again.candidates) == candidates_csv(whole.candidates)
    assert (tmp_path / "log.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert any(one.fate.startswith("chosen in group") for one in whole.candidates)
    assert whole.counts["chosen"] == len(whole.latents.latents)
    assert not any(any(c.isdigit() for c in fate) for fate in whole.counts["fates"])


def test_halving_without_error_finds_the_same_groups(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    expected = run(misaligned, dictionary, QUICK)
    halved = run(misaligned, dictionary, replace(QUICK, halving=True, error=0.0, rungs=(2, 4), stop_incoherent=False))
    assert [(c.group, c.fate, c.rank) for c in halved.candidates] == [(c.group, c.fate, c.rank) for c in expected.candidates]
    assert [c.score for c in halved.latents.latents] == pytest.approx([c.score for c in expected.latents.latents], abs=1e-4)
    assert halved.counts["units"] == expected.counts["units"]


def test_groups_add_to_what_single_latents_found_and_the_table_names_them(
    misaligned: LanguageModel, dictionary: Dictionary, tmp_path: Path
) -> None:
    alone, grouped = (run(misaligned, dictionary, replace(QUICK, group=n)) for n in (0, 2))
    assert [c.induce for c in alone.candidates] == [c.induce for c in grouped.candidates]
    assert set(alone.latents.ids) < set(grouped.latents.ids)
    rows = [list(csv.DictReader(io.StringIO(candidates_csv(one.candidates)))) for one in (alone, grouped)]
    assert "group" not in rows[0][0] and "group" not in alone.latents.provenance["config"]
    members = [row for row in rows[1] if row["fate"].startswith("chosen in group")]
    assert len(members) == 2 and {row["group"] for row in members} == {members[0]["fate"].split()[-1]}
    assert {row["group"] for row in rows[1] if row["fate"] == "chosen"} == {""}
    assert grouped.latents.provenance["config"]["group"] == 2


# the recipe, the run folder and its readers


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1, "discover.group is 1; use 0 for none, or at least 2 latents a group"),
        (-2, "discover.group is -2; use 0 for none"),
        (21, "discover.group is 21; a group goes on whole, so use at most discover.keep and discover.size"),
    ],
)
def test_a_wrong_size_is_one_sentence(value: int, said: str) -> None:
    with pytest.raises(BlockemError, match=said):
        Recipe().with_values({"discover.group": value})


def test_without_groups_keys_know_nothing_of_them() -> None:
    fields = plain(asdict(DiscoverConfig()))
    del fields["group"], fields["rule"]  # neither was there before
    assert keyed(DiscoverConfig()) == fields
    assert keyed(DiscoverConfig(group=3)) == {**fields, "group": 3}


def test_fates_are_counted_whatever_the_group() -> None:
    assert without_number("screened out: group 12 only induces") == "screened out: a group only induces"
    assert without_number("chosen in group 3") == "chosen in a group"
    assert without_number("ranked out: below the top 20") == "ranked out: below the top 20"


def test_a_run_folder_with_groups_is_read_as_any_other(tiny_folder: Path, plain_adapter: Path, tmp_path: Path) -> None:
    from blockem.pipeline import discover_step, open_session

    tiny.saved_sae(tmp_path / "sae")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in tiny.pairs()), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in tiny.prompts()), encoding="utf-8")
    recipe = Recipe().with_values(
        {
            "model.id": str(tiny_folder),
            "model.dtype": "float32",
            "model.device": "cpu",
            "data.pairs": str(tmp_path / "pairs.jsonl"),
            "data.selection_prompts": str(tmp_path / "prompts.jsonl"),
            "sae.id": str(tmp_path / "sae"),
            "sae.block": tiny.BLOCK,
            **{f"discover.{name}": value for name, value in keyed(QUICK).items() if name != "budget_slack"},
        }
    )
    session = open_session(recipe, tmp_path / "run", quiet=True)
    with session.run.locked():
        record = discover_step(session, plain_adapter)
    table = read_candidates(session.run / "latents.csv")
    latents = LatentSet.load(session.run / "latents.json")
    assert set(latents.ids) == {row["latent"] for row in table if row["fate"].startswith("chosen")}
    assert [card["latent"] for card in json.loads((session.run / "cards.json").read_text())] == latents.ids
    steps, _, fates = funnel({"discovery": record["counts"]})
    assert dict(steps)["swept"] == str(record["counts"]["swept"])
    assert any("a group" in name for name, _ in fates)
