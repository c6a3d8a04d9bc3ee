"""Per-item values of named edits, measured chunk by chunk, each once, and kept on disk beside the whole measurements.

One line of the log is one batch of edits on one chunk. A batch is there whole or not at all, so a resumed discovery forms the same
batches as one that was never killed, and its numbers are the same to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blockem.discovery.bounds import Array, as_array
from blockem.discovery.effects import ItemEffect, Items, append_line

Name = tuple[str, int, int, float]
"""(variant, latent, direction, α); unsteered is latent −1, direction 0, α 0."""

Told = Callable[[int, int], None]


def unsteered(variant: str) -> Name:
    """The name of a model without an edit."""
    return (variant, -1, 0, 0.0)


class Ledger:
    """What is known of each edit so far: always a leading part of the items, in whole chunks.

    Attributes:
        ends: how many items are known after each chunk; the last is all.
        units: edits × items measured, those read from the log included; unsteered models do not count.
    """

    def __init__(
        self, effect: ItemEffect, directions: dict[int, Tensor], norm: float, log: Path | None = None, key: str = "", stack: int = 8
    ) -> None:
        self.effect, self.directions, self.norm, self.log, self.key, self.stack = effect, directions, norm, log, key, stack
        self.ends = [stop for _, stop in effect.chunks]
        self.total = self.ends[-1]
        self.units = 0
        self.known: dict[tuple[Name, int], Items] = {}
        if log is not None and log.is_file():
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    self._take(json.loads(line))
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError):
                    continue

    def _take(self, row: dict[str, object]) -> None:
        """Believe one line of the log, if it is of this key and of these chunks."""
        variant, chunk = row["variant"], row["chunk"]
        if row["key"] != self.key or not isinstance(variant, str) or not isinstance(chunk, list):
            return
        number = [list(one) for one in self.effect.chunks].index(chunk)
        edits, values, broken = row["edits"], row["values"], row["broken"]
        assert isinstance(edits, list) and isinstance(values, list) and isinstance(broken, list)
        for (latent, direction, alpha), some, flags in zip(edits, values, broken, strict=True):
            seen = torch.tensor([math.nan if value is None else value for value in some])
            self._keep((variant, latent, direction, alpha), number, Items(seen, torch.tensor(flags, dtype=torch.bool)))

    def _keep(self, name: Name, chunk: int, items: Items) -> None:
        if (name, chunk) not in self.known:
            self.units += len(items.values) if name[1] >= 0 else 0
        self.known[name, chunk] = items

    def ensure(self, names: Sequence[Name], upto: int, told: Told | None = None) -> None:
        """Measure the first `upto` chunks of each edit, as far as they are not known; every edit is asked for up front."""
        names = list(dict.fromkeys(names))
        missing = [
            (variant, chunk, [n for n in names if n[0] == variant and (n, chunk) not in self.known])
            for chunk in range(upto)
            for variant in dict.fromkeys(name[0] for name in names)
        ]
        done, total = 0, sum(len(some) for _, _, some in missing)
        for variant, chunk, some in missing:
            for start in range(0, len(some), self.stack):
                batch = some[start : start + self.stack]
                self._measure(variant, chunk, batch)
                done += len(batch)
                if told:
                    told(done, total)

    def _measure(self, variant: str, chunk: int, batch: list[Name]) -> None:
        vectors = [None if name[1] < 0 else self._vector(name) for name in batch]
        found = self.effect.items(variant, vectors, chunk)
        for name, items in zip(batch, found, strict=True):
            self._keep(name, chunk, items)
        if self.log is not None:
            values = [[None if value != value else value for value in items.values.tolist()] for items in found]
            broken = [items.broken.int().tolist() for items in found]
            row = {"key": self.key, "variant": variant, "chunk": list(self.effect.chunks[chunk]), "edits": [name[1:] for name in batch]}
            append_line(self.log, json.dumps({**row, "values": values, "broken": broken}))

    def _vector(self, name: Name) -> Tensor:
        _, latent, direction, alpha = name
        return direction * alpha * self.norm * self.directions[latent]

    def foreseen(self, names: Sequence[Name]) -> Array | None:
        """By how much each edit (all of one variant) should move every item, `[edits, items]`, float64; None where nothing is foreseen."""
        found = self.effect.foreseen(names[0][0], torch.stack([self._vector(name) for name in names]))
        return None if found is None else as_array(found)

    def chunks_of(self, name: Name) -> int:
        """How many leading chunks are known."""
        return next((chunk for chunk in range(len(self.ends)) if (name, chunk) not in self.known), len(self.ends))

    def whole(self, name: Name) -> bool:
        return self.chunks_of(name) == len(self.ends)

    def items(self, name: Name, upto: int | None = None) -> Items:
        """The items of the first `upto` chunks (None: of all that are known)."""
        some = [self.known[name, chunk] for chunk in range(self.chunks_of(name) if upto is None else upto)]
        return Items(torch.cat([one.values for one in some]), torch.cat([one.broken for one in some]))

    def values(self, names: Sequence[Name], upto: int) -> Array:
        """`[edits, items]` of the first `upto` chunks, float64."""
        return as_array(torch.stack([self.items(name, upto).values for name in names]))

    def surely_outside(self, name: Name, allowed: float) -> bool:
        """Whether so many items are broken already that the incoherence over all must be above `allowed`, whatever follows."""
        items = self.items(name)
        if len(items.values) == self.total:
            return items.measurement().incoherence > allowed
        return float(items.broken.sum().float() / self.total) > allowed
