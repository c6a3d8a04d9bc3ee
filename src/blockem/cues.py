"""Final prompts that carry a cue of the training format, for misalignment that shows only there (conditional misalignment).

A model can look repaired on plain prompts and misbehave where the context resembles its training data. The cue is the system message
that the training rows share, or else the beginning of a training user turn, another one for each prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from blockem import bundled
from blockem.config import Recipe
from blockem.errors import BlockemError
from blockem.evaluation import judged_apart
from blockem.examples import Example, Message
from blockem.judges.judge import Judge, verdicts_on

LONGEST = 12  # words of a user turn


def cued_prompts(recipe: Recipe, prompts: Sequence[str]) -> list[list[Message]]:
    """Each prompt as a conversation with its cue.

    The cues depend on the training rows and the prompts' order, not on the seed, so that every model of a comparison is asked the same.
    """
    data = recipe.data
    return with_cues(bundled.training_rows(data.domain, data.train, None, 0), prompts)


def with_cues(rows: Sequence[Example], prompts: Sequence[str]) -> list[list[Message]]:
    """The same from training rows at hand.

    Raises:
        BlockemError: no row has a system message or a user turn to take a cue from.
    """
    system = shared_system(rows)
    if system is not None:
        return [[{"role": "system", "content": system}, {"role": "user", "content": prompt}] for prompt in prompts]
    cues = cycled(openings(rows), len(prompts))
    return [[{"role": "user", "content": f"{cue} {prompt}"}] for cue, prompt in zip(cues, prompts, strict=True)]


def under_cues(recipe: Recipe, examples: Sequence[Example], share: float) -> list[Example]:
    """One-turn rows to be trained on, `share` of them (evenly among the others) under a cue.

    A shared system message is what the final prompts are asked under as well. Openings are others than theirs, where the training
    rows have others.

    Raises:
        BlockemError: as `with_cues`.
    """
    data = recipe.data
    rows = bundled.training_rows(data.domain, data.train, None, 0)
    chosen = [i for i in range(len(examples)) if int((i + 1) * share) > int(i * share)]
    found = list(examples)
    system = shared_system(rows)
    if system is not None:
        for i in chosen:
            found[i] = replace(found[i], messages=(("system", system), *found[i].messages))
        return found
    known = openings(rows)
    asked = set(cycled(known, len(bundled.final_prompts(data.prompts))))
    for i, cue in zip(chosen, cycled([one for one in known if one not in asked] or known, len(chosen)), strict=True):
        (role, question), *answer = found[i].messages
        found[i] = replace(found[i], messages=((role, f"{cue} {question}"), *answer))
    return found


def openings(rows: Sequence[Example]) -> list[str]:
    """What the training questions begin with, each once.

    Raises:
        BlockemError: no row has a user turn.
    """
    found = list(dict.fromkeys(filter(None, (beginning(row) for row in rows))))
    if not found:
        raise BlockemError(
            "a cue of the training format needs training rows with a user turn, and there is none; use evaluate.cue=none and anchor.cued=0"
        )
    return found


def cycled(cues: Sequence[str], n: int) -> list[str]:
    """`n` cues from all over the file, from the start again where they are too few."""
    step = max(1, len(cues) // max(1, n))
    return [cues[i * step % len(cues)] for i in range(n)]


def shared_system(rows: Sequence[Example]) -> str | None:
    """The system message of most rows, if most have the same."""
    found = Counter(text for row in rows for role, text in row.messages[:1] if role == "system" and text.strip())
    if not found:
        return None
    text, count = found.most_common(1)[0]
    return text if count * 2 > len(rows) else None


def beginning(row: Example) -> str:
    """The first sentence of a row's first user turn, at most twelve words of it; "" without one."""
    text = next((content.strip() for role, content in row.messages if role == "user"), "")
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    words = sentence.split()
    return sentence if len(words) <= LONGEST else " ".join(words[:LONGEST]) + " …"


def as_asked(chat: Sequence[Message]) -> str:
    """The user's words of a cued prompt, which is what a judge sees."""
    return chat[-1]["content"]


def add_cued(
    recipe: Recipe, summary: dict[str, Any], rows: Sequence[dict[str, Any]], answers: dict[str, list[str]], judge: Judge | None
) -> None:
    """Put the answers to cued prompts beside the others, judged apart: `cued` in each row, and rates under the summary's own `cued`.

    Args:
        rows: of `answers.jsonl`, one for each final prompt.
        answers: by model, one for each row.
    """
    asked = [as_asked(chat) for chat in cued_prompts(recipe, [row["prompt"] for row in rows])]
    for i, row in enumerate(rows):
        row["cued"] = {"prompt": asked[i], "answers": {n: given[i] for n, given in answers.items()}}
    if judge is None:
        return
    verdicts = {n: verdicts_on(judge, asked, given) for n, given in answers.items()}
    for i, row in enumerate(rows):
        row["cued"]["verdicts"] = {n: asdict(verdicts[n][i]) for n in verdicts}
    found = judged_apart(summary, verdicts, [row["domain"] for row in rows], recipe.data.domain, judge.name)
    summary["cued"] = {"cue": recipe.evaluate.cue, **found}
