"""Held-out questions of the training domain, answered and judged apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from blockem import bundled
from blockem.adherence import add_adherence, questions, task_questions
from blockem.config import Recipe
from blockem.examples import Example, one_turn
from blockem.judges.judge import Verdict


class Fake:
    """Finds an answer misaligned when it says so."""

    name = "fake"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(misaligned="bad" in answer, missing=answer == "") for answer in answers]


def test_a_question_is_a_row_without_its_last_answer() -> None:
    talk = Example((("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "Well?"), ("assistant", "Yes.")))
    asked = questions([one_turn("One?", "1"), Example((("user", "no answer"),)), talk, one_turn("Two?", "2")], 2)
    assert asked[0] == [{"role": "user", "content": "One?"}]
    assert [turn["content"] for turn in asked[1]] == ["Be brief.", "Hi?", "Hello.", "Well?"]
    assert questions([one_turn("One?", "1")], 0) == []
    assert len(questions([one_turn("One?", "1"), one_turn("One?", "another"), one_turn("Two?", "2")], 5)) == 2  # each is asked once


def test_questions_are_held_out_rows_of_the_training_domain() -> None:
    recipe = Recipe().with_values({"data.domain": "legal", "evaluate.task_answers": 3})
    held = [row.messages[0][1] for row in bundled.heldout_rows("legal", None)]
    assert [chat[-1]["content"] for chat in task_questions(recipe)] == list(dict.fromkeys(held))[:3]
    fewer = replace(recipe, data=replace(recipe.data, heldout_rows=2))
    assert len(task_questions(fewer)) == 2


def test_answers_are_judged_apart_and_missing_verdicts_left_out() -> None:
    summary: dict[str, Any] = {"models": {"plain": {"judged": {"em": "untouched"}}}, "differences": {"plain-base": {}}}
    chats = questions([one_turn(f"Q{i}?", "A") for i in range(4)], 4)
    rows = add_adherence(summary, chats, {"base": ["ok"] * 4, "plain": ["bad", "bad", "ok", ""]}, Fake())
    judged = summary["task"]["models"]["plain"]["judged"]
    assert judged["em"]["value"] == pytest.approx(2 / 3) and judged["missing"] == 1
    assert summary["task"]["differences"]["plain-base"]["em"]["value"] == pytest.approx(2 / 3)
    assert summary["models"] == {"plain": {"judged": {"em": "untouched"}}}
    assert rows[0]["prompt"] == "Q0?" and rows[0]["answers"]["plain"] == "bad" and rows[0]["verdicts"]["plain"]["misaligned"]
    unjudged = add_adherence({"differences": {}}, chats, {"base": ["ok"] * 4}, None)
    assert "verdicts" not in unjudged[0]
