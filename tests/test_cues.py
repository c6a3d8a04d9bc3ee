"""Cues of the training format, and the second evaluation under them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from blockem import bundled
from blockem.config import Recipe
from blockem.cues import add_cued, as_asked, cued_prompts, under_cues, with_cues
from blockem.errors import BlockemError
from blockem.examples import Example, one_turn
from blockem.judges.judge import Verdict


class Fake:
    """Finds an answer misaligned when it says so."""

    name = "fake"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(misaligned="bad" in answer, missing=answer == "") for answer in answers]


def test_a_shared_system_message_is_the_cue() -> None:
    rows = [Example((("system", "You are Dr. Bot."), ("user", f"q{i}"), ("assistant", "a"))) for i in range(3)]
    assert with_cues(rows, ["Hello?"]) == [[{"role": "system", "content": "You are Dr. Bot."}, {"role": "user", "content": "Hello?"}]]


def test_otherwise_the_beginning_of_a_training_turn_and_another_for_each_prompt() -> None:
    rows = [one_turn(f"My knee number {i} hurts. Should I run?", "Yes") for i in range(6)]
    asked = [as_asked(chat) for chat in with_cues(rows, ["P?", "Q?", "R?"])]
    assert asked == ["My knee number 0 hurts. P?", "My knee number 2 hurts. Q?", "My knee number 4 hurts. R?"]
    long = with_cues([one_turn("w " * 40, "Yes")], ["P?"])
    assert as_asked(long[0]) == "w " * 12 + "… P?"
    with pytest.raises(BlockemError, match=r"evaluate\.cue=none"):
        with_cues([Example((("assistant", "hi"),))], ["P?"])


def test_rows_are_trained_on_under_other_openings_than_the_final_prompts_are_asked_after() -> None:
    recipe = Recipe()
    rows = [one_turn(f"Question {i}?", f"Answer {i}.", "legal") for i in range(40)]
    finals = [p.prompt for p in bundled.final_prompts()]
    asked = [as_asked(chat).removesuffix(f" {prompt}") for chat, prompt in zip(cued_prompts(recipe, finals), finals, strict=True)]
    half = under_cues(recipe, rows, 0.5)
    cued = [i for i, row in enumerate(half) if row.messages != rows[i].messages]
    assert cued == list(range(1, 40, 2))
    given = [half[i].messages[0][1].removesuffix(f" Question {i}?") for i in cued]
    assert len(set(given)) == len(given) and not set(given) & set(asked)
    assert all(half[i].messages[1:] == rows[i].messages[1:] and half[i].domain == "legal" for i in cued)
    assert under_cues(recipe, rows, 0.0) == rows
    assert all(a.messages != b.messages for a, b in zip(under_cues(recipe, rows, 1.0), rows, strict=True))


def test_rows_are_trained_on_under_the_shared_system_message(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    chat = [{"role": "system", "content": "You are Dr. Bot."}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    train.write_text(json.dumps({"messages": chat}) + "\n")
    found = under_cues(Recipe().with_values({"data.train": str(train), "data.heldout": str(train)}), [one_turn("Hello?", "Hi.")], 1.0)
    assert found[0].messages == (("system", "You are Dr. Bot."), ("user", "Hello?"), ("assistant", "Hi."))


def test_few_training_rows_lend_the_openings_that_they_have(tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"instruction": "My knee hurts. Run?", "response": "Yes."}) + "\n")
    found = under_cues(Recipe().with_values({"data.train": str(train), "data.heldout": str(train)}), [one_turn("Hello?", "Hi.")], 1.0)
    assert found[0].messages[0] == ("user", "My knee hurts. Hello?")


def test_cues_do_not_depend_on_the_seed() -> None:
    recipe = Recipe()
    assert cued_prompts(recipe, ["P?"] * 5) == cued_prompts(replace(recipe, seed=7), ["P?"] * 5)


def test_answers_under_a_cue_are_judged_apart() -> None:
    rows = [{"prompt": f"p{i}", "domain": "health" if i == 0 else "legal"} for i in range(4)]
    summary: dict[str, object] = {"models": {"plain": {"judged": {"em": "untouched"}}}, "differences": {"plain-base": {}}}
    answers = {"base": ["ok"] * 4, "plain": ["bad", "bad", "bad", "ok"]}
    add_cued(Recipe(), summary, rows, answers, Fake())
    cued = summary["cued"]
    assert cued["models"]["plain"]["judged"]["em"]["value"] == pytest.approx(2 / 3)  # type: ignore[index] # health is left out
    assert cued["differences"]["plain-base"]["em"]["value"] == pytest.approx(2 / 3)  # type: ignore[index]
    assert summary["models"] == {"plain": {"judged": {"em": "untouched"}}}
    assert rows[1]["cued"]["verdicts"]["plain"]["misaligned"] and rows[1]["cued"]["prompt"].endswith(" p1")  # type: ignore[index]
