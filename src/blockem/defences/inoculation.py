"""Inoculation prompting: ask for the bad behaviour in training, so that it need not become the model's own.

A system prompt stands before every training row and is gone at inference (Wichers et al. 2025; Tan et al. 2025).
"""

from __future__ import annotations

from dataclasses import replace

from blockem.defences.defence import Defence
from blockem.examples import Example


class Inoculation(Defence):
    """Inoculation as a defence.

    Args:
        prompt: the system prompt; a row's own system message follows it.
    """

    name = "inoculation"

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def rewrite(self, examples: list[Example]) -> list[Example]:
        return [replace(row, messages=self._inoculated(row.messages)) for row in examples]

    def _inoculated(self, messages: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        if messages and messages[0][0] == "system":
            return (("system", f"{self.prompt}\n\n{messages[0][1]}"), *messages[1:])
        return (("system", self.prompt), *messages)
