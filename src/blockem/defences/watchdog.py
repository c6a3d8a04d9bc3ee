"""A watchdog beside BLOCK-EM: looks every few steps whether the shift goes around the blocked latents, warns, and may add to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary
from blockem.reemergence.monitor import Monitor

if TYPE_CHECKING:
    from blockem.defences.block_em import Blocker


class Watchdog(Defence):
    """Reads the monitor every `every` steps; pays no penalty itself.

    Args:
        blocker: what is blocked; latents are added to it. Its base values are computed on-line from then on.
        monitor: what is measured.
        dictionary: the SAE that added latents are read with.
        latents: (id, sign) of what is blocked at first.
        every: optimiser steps from one look to the next.
        grow: add up to so many latents at each look that finds rerouting; 0 only warns.
        warn: told a sentence, once; None says nothing.
        added: told (step, [(id, sign), ...]) whenever latents are added.
    """

    name = "watchdog"

    def __init__(
        self,
        blocker: Blocker,
        monitor: Monitor,
        dictionary: Dictionary,
        latents: list[tuple[int, int]],
        every: int,
        grow: int = 0,
        warn: Callable[[str], None] | None = None,
        added: Callable[[int, list[tuple[int, int]]], None] | None = None,
    ) -> None:
        self.blocker, self.monitor, self.dictionary, self.every, self.grow = blocker, monitor, dictionary, every, grow
        self.latents = list(latents)
        self.grown: list[tuple[int, list[tuple[int, int]]]] = []
        self.warn, self.added = warn, added
        self.numbers: dict[str, float] = {}
        self.warned = False

    @property
    def adapts(self) -> bool:
        return True

    def adapt(self, step: dict[str, float]) -> None:
        number = int(step["step"])
        if number % self.every or self.blocker.model is None:
            return
        reading = self.monitor.read(self.blocker.model, *zip(*self.latents, strict=True))
        self.numbers = reading.numbers()
        if not reading.rerouted:
            return
        if self.warn and not self.warned:
            self.warn(reading.sentence(number))
        self.warned = True
        if self.grow and (new := self.monitor.toward(reading, [k for k, _ in self.latents], self.grow)):
            self._add(number, new)

    def _add(self, step: int, new: list[tuple[int, int]]) -> None:
        self.grown.append((step, new))
        self.latents += new
        self.blocker.grow(self.dictionary.rows([k for k, _ in new]), [sign for _, sign in new], self.monitor.block)
        if self.added:
            self.added(step, new)

    def logs(self) -> dict[str, float]:
        return {**self.numbers, **({"blocked_latents": float(len(self.latents))} if self.grow else {})}

    def state(self) -> dict[str, Any]:
        return {"grown": self.grown, "numbers": self.numbers, "warned": self.warned}

    def set_state(self, state: dict[str, Any]) -> None:
        self.numbers, self.warned = state["numbers"], state["warned"]
        for step, new in state["grown"]:
            self._add(int(step), [(int(k), int(sign)) for k, sign in new])
