"""What a run folder takes for its own: files that another recipe left or replaced, models that diverged, a judge that went away."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_defend import recipe, session  # noqa: F401 - fixtures

from blockem.config import Recipe
from blockem.errors import BlockemError
from blockem.judges import Verdict
from blockem.judges.judge import verdicts_on
from blockem.pipeline import _check_finite, open_session, run_all
from blockem.session import LATER_ROUNDS, Session
from blockem.store import RunFolder
from blockem.trainings import sft_step


def test_a_step_whose_sealed_file_was_replaced_is_done_again(tmp_path: Path) -> None:
    run, done = RunFolder(tmp_path), []

    def work() -> str:
        done.append(1)
        (tmp_path / "set.json").write_text("mine")
        return "result"

    for times in (1, 1):  # the second finds it done
        assert run.step("train", "key", ["set.json"], work, sealed=["set.json", "none.json"])[0] == "result" and len(done) == times
    (tmp_path / "set.json").write_text("another recipe's, killed before its training was done")
    assert run.step("train", "key", ["set.json"], work, sealed=["set.json"]) == ("result", False) and len(done) == 2
    (tmp_path / "steps" / "train.json").write_text('{"key": "key"}')  # a record without a result is none
    assert run.step("train", "key", ["set.json"], work)[1] is False


def test_models_of_another_recipe_are_left_out(session: Session) -> None:  # noqa: F811
    sft_step(session)
    for name in ("blocked", LATER_ROUNDS[0]):  # folders without a record can be told by their names alone
        (session.run / name).mkdir()
        (session.run / name / "adapter_model.safetensors").write_bytes(b"x")
    assert session.leftovers() == [LATER_ROUNDS[0]] and list(session.trained()) == ["plain", "blocked"]
    other = replace(session, recipe=session.recipe.with_values({"seed": 7}))
    assert other.leftovers() == ["plain", LATER_ROUNDS[0]] and list(other.trained()) == ["blocked"]
    longer = replace(session, recipe=session.recipe.with_values({"rounds.budget": 2}))
    assert longer.leftovers() == []


def test_a_model_that_diverged_does_not_pass_for_a_cured_one() -> None:
    _check_finite("plain", [0.1, -0.2])
    with pytest.raises(BlockemError, match="the model blocked gives log-probabilities that are no numbers: its training diverged"):
        _check_finite("blocked", [0.1, math.nan])


class Leaving:
    """A judge whose server goes away after the first answer."""

    name = "leaving"
    given_up = ""

    def judge(self, prompts: list[str], answers: list[str]) -> list[Verdict]:
        self.given_up = "given up after 5 failures in a row: the connection failed"
        return [Verdict(), *(Verdict(missing=True) for _ in answers[1:])]


def test_verdicts_that_a_lost_server_owes_are_not_kept_as_missing() -> None:
    with pytest.raises(BlockemError, match=r"stopped answering \(given up after .*\); 1 of 3 verdicts are there"):
        verdicts_on(Leaving(), ["a", "b", "c"], ["1", "2", "3"])


def test_directions_need_no_sae_and_no_discovery(recipe: Recipe, tmp_path: Path) -> None:  # noqa: F811
    values = {"block.directions": 2, "block.direction_blocks": "1,2", "sae.id": str(tmp_path / "none"), "sae.block": 99}
    found = open_session(recipe.with_values({**values, "block.r": 1.0}), tmp_path / "without", quiet=True)
    summary = run_all(found)
    assert summary["blocking"]["n_latents"] == 6 and summary["latents"] == []  # the mean and two around it, at two blocks
    assert (found.run / "report.html").is_file() and not (found.run / "latents.csv").exists()
