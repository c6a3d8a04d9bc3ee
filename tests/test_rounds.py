"""Blocking in rounds on the tiny model: what makes it go on, what makes it end, and that it is done once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_defend import recipe, session  # noqa: F401 - fixtures

from blockem import blocking_rounds
from blockem.blocking_rounds import rounds_step, said, selection_step, share_left
from blockem.config import Recipe
from blockem.errors import BlockemError, NoLatents
from blockem.latents import Latent, LatentSet
from blockem.pipeline import open_session
from blockem.reemergence.rounds import _inputs
from blockem.session import Session, last_blocked
from blockem.store import read_json


def going_round(session: Session, budget: int = 3, target: float = 0.0, **changes: Any) -> Session:  # noqa: F811
    """The session with selection pairs of its own, and rounds."""
    pairs = session.run / "selection.jsonl"
    pairs.write_text("".join(json.dumps(p.__dict__) + "\n" for p in tiny.pairs()))
    wanted = {"rounds.budget": budget, "rounds.target": target, "data.pairs": str(pairs), "block.r": 1.0, **changes}
    other = replace(session, recipe=session.recipe.with_values(wanted))
    other.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
    return other


@pytest.fixture
def half_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's first round leaves nothing; here every round leaves half."""
    monkeypatch.setattr(blocking_rounds, "share_left", lambda *_given: 0.5)


class Discovery:
    """Stands for stages 1 to 3: names the latents that it is given, one set a call."""

    def __init__(self, *sets: tuple[int, ...]) -> None:
        self.sets, self.asked = list(sets), []  # type: ignore[var-annotated]

    def __call__(self, session: Session, misaligned: Path | None) -> dict[str, Any]:  # noqa: F811
        assert misaligned is not None
        self.asked.append(misaligned.name)
        ids = self.sets[len(self.asked) - 1]
        if not ids:
            raise NoLatents("no latent passes")
        found = tiny.latent_set(session.lm, session.dictionary)
        replace(found, latents=tuple(Latent(k, 1) for k in ids)).save(session.run / "latents.json")
        return {"seconds": 1.5}


def test_each_round_blocks_the_union_against_the_model_before_it(session: Session, half_left: None) -> None:  # noqa: F811
    discovery = Discovery((3, 21), (22, 23))
    found = rounds_step(going_round(session), discovery)
    assert discovery.asked == ["blocked", "round-2"]
    assert [row["name"] for row in found["rounds"]] == ["blocked", "round-2", "round-3"] and found["last"] == "round-3"
    assert [row["n_latents"] for row in found["rounds"]] == [4, 5, 7]
    assert LatentSet.load(session.run / "round-3-latents.json").ids == [3, 7, 11, 19, 21, 22, 23]
    assert found["why"] == "the budget of 3 rounds is used"
    assert all((session.run / name / "adapter_model.safetensors").is_file() for name in ("blocked", "round-2", "round-3"))
    assert read_json(session.run / "rounds.json") == found
    assert going_round(session).main == "round-3"
    assert last_blocked(going_round(session).recipe, session.run.path) == "round-3"
    assert last_blocked(session.recipe, session.run.path) == session.main == "blocked"


def test_training_on_starts_from_what_the_last_round_blocked(session: Session, half_left: None, tmp_path: Path) -> None:  # noqa: F811
    several = going_round(session).recipe
    rounds_step(going_round(session), Discovery((3, 21), (22, 23)))
    found = _inputs(open_session(several, tmp_path / "on", quiet=True), session.run.path)
    assert found.latents == session.run / "round-3-latents.json" and found.blocked == session.run / "round-3"
    once = replace(several, rounds=replace(several.rounds, budget=1))
    found = _inputs(open_session(once, tmp_path / "once", quiet=True), session.run.path)
    assert found.latents == session.run / "blocked-latents.json" and found.blocked == session.run / "blocked"


def test_what_an_ablation_left_of_the_set_stays_as_it_is_in_later_rounds(session: Session, half_left: None) -> None:  # noqa: F811
    found = rounds_step(going_round(session, 2, **{"block.size": 2, "block.signs": "shuffled"}), Discovery((21,)))
    first, second = (LatentSet.load(session.run / f"{name}-latents.json").latents for name in ("blocked", "round-2"))
    assert [row["n_latents"] for row in found["rounds"]] == [2, 3]
    assert second[:2] == first and second[2].latent == 21


def test_the_same_again_redoes_nothing(session: Session, half_left: None) -> None:  # noqa: F811
    rounds_step(going_round(session, 2), Discovery((21,)))
    stamps = {path: path.stat().st_mtime_ns for path in session.run.path.rglob("*.safetensors")}
    rounds_step(going_round(session, 2), Discovery((21,)))
    assert {path: path.stat().st_mtime_ns for path in session.run.path.rglob("*.safetensors")} == stamps


def test_it_ends_when_little_enough_is_left(session: Session) -> None:  # noqa: F811
    found = rounds_step(going_round(session, 5, target=1e9), Discovery())
    assert [row["name"] for row in found["rounds"]] == ["blocked"] and "is left" in found["why"]


@pytest.mark.parametrize("sets", [((3, 7),), ((),)])
def test_it_ends_when_discovery_finds_nothing_new(session: Session, half_left: None, sets: tuple[tuple[int, ...], ...]) -> None:  # noqa: F811
    found = rounds_step(going_round(session, 5), Discovery(*sets))
    assert len(found["rounds"]) == 1 and "nothing that is not blocked already" in found["why"]


def test_with_anchors_a_round_also_learns_from_what_the_last_model_says(session: Session, half_left: None) -> None:  # noqa: F811
    with_anchors = going_round(session, 2, **{"anchor.watch": "answers", "anchor.max_new_tokens": 4, "anchor.share": 1.0})
    found = rounds_step(with_anchors, Discovery(()))  # nothing new is discovered, yet there are new answers
    assert found["last"] == "round-2"
    first, second = ((session.run / f"{name}-contrasts.jsonl").read_text().splitlines() for name in ("blocked", "round-2"))
    assert len(second) >= len(first) >= 1 and second[: len(first)] == first


def test_what_is_left_is_the_worse_of_both_measures_and_never_below_nothing() -> None:
    base, plain = {"margin": 0.0, "em": 0.1}, {"margin": 1.0, "em": 0.6}
    assert share_left({"margin": 0.2, "em": 0.5}, base, plain) == pytest.approx(0.8)
    assert share_left({"margin": 0.2, "em": None}, {**base, "em": None}, {**plain, "em": None}) == pytest.approx(0.2)
    assert share_left({"margin": -3.0, "em": 0.0}, base, plain) == 0.0
    with pytest.raises(BlockemError, match="nothing to go round for"):
        share_left(base, plain, base)


def test_a_round_in_words() -> None:
    row = {"n_latents": 20, "left": 0.25, "margin": 0.1, "em": None, "seconds": 65.0}
    assert said(row) == "20 latents, 25% of the rise on the selection set is left (margin +0.10), 1:05"
    assert "EM 40%" in said({**row, "em": 0.4})


def test_the_selection_measure_is_that_of_the_pairs_alone(session: Session) -> None:  # noqa: F811
    found = selection_step(going_round(session), "base", None)
    assert found["em"] is None and math.isfinite(found["margin"]) and 0 <= found["preference"] <= 1


@pytest.mark.parametrize("budget", [0, 6])
def test_a_budget_out_of_range_is_refused(budget: int) -> None:
    with pytest.raises(BlockemError, match="use 1 to 5"):
        Recipe().with_values({"rounds.budget": budget})
