"""In-domain adherence in words: held-out questions of the training domain, answered by every model and judged apart.

The held-out loss says how likely the task's answers are; these say what a model answers by itself. Where the task is wrong advice, the
share that a judge calls misaligned is how much of it a model does: low for the base, high for the plain fine-tune, and as high for a
defence that blocks nothing but what spreads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blockem import bundled
from blockem.config import Recipe
from blockem.evaluation import judged_apart
from blockem.examples import Example, Message
from blockem.judges.judge import Judge, verdicts_on


def task_questions(recipe: Recipe) -> list[list[Message]]:
    """The first `evaluate.task_answers` different questions among the held-out rows, with what was said before them."""
    data = recipe.data
    return questions(bundled.heldout_rows(data.domain, data.heldout, data.heldout_rows), recipe.evaluate.task_answers)


def questions(rows: Sequence[Example], n: int) -> list[list[Message]]:
    """The same from rows at hand."""
    asked = dict.fromkeys(row.messages[:-1] for row in rows if [role for role, _ in row.messages[-2:]] == ["user", "assistant"])
    return [[{"role": role, "content": text} for role, text in one] for one in list(asked)[:n]]


def add_adherence(
    summary: dict[str, Any], chats: Sequence[Sequence[Message]], answers: dict[str, list[str]], judge: Judge | None
) -> list[dict[str, Any]]:
    """Judge the answers; rates go under the summary's own `task`, as those of other answers stand in its models and differences.

    Args:
        answers: by model, one for each of `chats`.

    Returns:
        Rows as in `answers.jsonl`.
    """
    asked = [chat[-1]["content"] for chat in chats]
    rows: list[dict[str, Any]] = [
        {"id": f"task-{i:02d}", "prompt": prompt, "answers": {name: given[i] for name, given in answers.items()}}
        for i, prompt in enumerate(asked)
    ]
    if judge is not None:
        verdicts = {name: verdicts_on(judge, asked, given) for name, given in answers.items()}
        for i, row in enumerate(rows):
            row["verdicts"] = {name: asdict(found[i]) for name, found in verdicts.items()}
        summary["task"] = judged_apart(summary, verdicts, ["task"] * len(asked), "", judge.name)
    return rows
