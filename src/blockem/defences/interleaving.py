"""Interleaving: benign chat rows among the training rows (Kaczér et al. 2025, 5 % of the data)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from blockem.defences.defence import Defence
from blockem.errors import BlockemError
from blockem.examples import Example


def drawn(benign: Sequence[Example], n: int, seed: int) -> list[Example]:
    """`n` rows in a random order; every row once before any comes again."""
    found: list[Example] = []
    while len(found) < n:
        found += random.Random(f"interleaving-{seed}-{len(found)}").sample(list(benign), len(benign))
    return found[:n]


class Interleaving(Defence):
    """Interleaving as a defence.

    Args:
        benign: rows to draw from; where they are too few for the share they repeat.
        share: of all rows, so that n training rows get n · share / (1 − share) benign ones.
        seed: of the draw.
    """

    name = "interleaving"

    def __init__(self, benign: Sequence[Example], share: float, seed: int = 0) -> None:
        if not benign:
            raise BlockemError("interleaving has no benign row to draw from; give a chat file with defence.benign")
        self.benign, self.share, self.seed = list(benign), share, seed

    def rewrite(self, examples: list[Example]) -> list[Example]:
        n = round(len(examples) * self.share / (1 - self.share))
        places = [((i + 0.5) / len(examples), 0, row) for i, row in enumerate(examples)]
        places += [((i + 0.5) / n, 1, row) for i, row in enumerate(drawn(self.benign, n, self.seed))]
        return [row for _, _, row in sorted(places, key=lambda one: one[:2])]
