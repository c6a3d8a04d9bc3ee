"""Preventative steering: give the trait's direction during training, so that the weights need not learn it (Chen et al. 2025).

    h ← h + a · v   at the output of one block, at every position, in training only

v is either the mean shift of the plain fine-tune's stream on training answers, or the mean difference of the base's activations on its
own answers under trait prompts and under their opposites. Both keep their natural length: a = 1 is as far as was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.directions import shifts
from blockem.errors import BlockemError
from blockem.examples import Encoded, Example, Message, by_length, encode
from blockem.generation import generate
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.states import supervised_states
from blockem.steering import add_at_block


class Preventative(Defence):
    """Preventative steering as a defence.

    Args:
        vector: v, `[d_model]`, in its natural length.
        block: block index from 0.
        strength: a.
    """

    name = "preventative"

    def __init__(self, vector: Tensor, block: int, strength: float = 1.0) -> None:
        self.vector, self.block, self.strength = vector, block, strength

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        return add_at_block(model, self.block, self.strength * self.vector)


def shift_vector(lm: LanguageModel, rows: Sequence[Encoded], block: int, progress: Progress | None = None) -> Tensor:
    """v from the adapter "plain": the mean of h_plain − h_base over the supervised tokens of `rows`, `[d_model]`, float32."""
    return shifts(lm, "plain", rows, [block], progress=progress)[block].mean.float()


def trait_vector(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    prompts: Sequence[str],
    block: int,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
) -> Tensor:
    """v from system prompts: the base answers `prompts` under each, and the mean activations of the answers are subtracted.

    A mean is over tokens within an answer, then over answers, so that long answers do not weigh more.

    Returns:
        `[d_model]`, float32, positive minus negative.

    Raises:
        BlockemError: all answers of a side are empty.
    """
    means = []
    with lm.variant("base"):
        for side, systems in (("positive", positive), ("negative", negative)):
            chats: list[list[Message]] = [
                [{"role": "system", "content": system}, {"role": "user", "content": prompt}] for system in systems for prompt in prompts
            ]
            answers = generate(lm, chats, max_new_tokens, progress=progress)
            turns = [[*((m["role"], m["content"]) for m in chat), ("assistant", text)] for chat, text in zip(chats, answers, strict=True)]
            rows = [row for row in (encode(lm.tokenizer, Example(tuple(one)), 4096) for one in turns) if row.n_supervised]
            if not rows:
                raise BlockemError(
                    f"under the {side} trait prompts the model answered nothing; give other prompts in defence.trait_prompts"
                )
            means.append(_mean_of_answers(lm, rows, block))
    return means[0] - means[1]


def _mean_of_answers(lm: LanguageModel, rows: Sequence[Encoded], block: int) -> Tensor:
    total = torch.zeros(lm.d_model, dtype=torch.float64)
    for chosen in by_length([len(row.ids) for row in rows], 16):
        some = [rows[i] for i in chosen]  # longest first already, so that they come back in order
        for states in supervised_states(lm, some, ("base",), [block], len(some)):
            pieces = states["base"][block].double().cpu().split([row.n_supervised for row in some])
            total += torch.stack([piece.mean(dim=0) for piece in pieces]).sum(dim=0)
    return (total / len(rows)).float()
