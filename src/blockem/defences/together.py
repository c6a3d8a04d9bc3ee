"""Several defences as one: their rows one after the other, their penalties summed, their blocks those that all of them train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.examples import Example


class Together(Defence):
    """Defences side by side.

    Args:
        parts: in the order in which they rewrite, hook and project.
    """

    def __init__(self, parts: Sequence[Defence]) -> None:
        self.parts_of = list(parts)
        self.name = "+".join(part.name for part in parts)

    def rewrite(self, examples: list[Example]) -> list[Example]:
        for part in self.parts_of:
            examples = part.rewrite(examples)
        return examples

    def trained_blocks(self, n_blocks: int) -> range:
        return range(min(part.trained_blocks(n_blocks).stop for part in self.parts_of))

    @contextmanager
    def training_hooks(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts_of:
                stack.enter_context(part.training_hooks(model))
            yield

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor | None:
        found = [one for part in self.parts_of if (one := part.penalty(batch, model)) is not None]
        return sum(found[1:], found[0]) if found else None

    def measured(self) -> dict[str, Tensor]:
        return {name: value for part in self.parts_of for name, value in part.measured().items()}

    @property
    def adapts(self) -> bool:
        return any(part.adapts for part in self.parts_of)

    def adapt(self, step: dict[str, float]) -> None:
        for part in self.parts_of:
            part.adapt(step)

    @property
    def finished(self) -> bool:
        return any(part.finished for part in self.parts_of)

    def logs(self) -> dict[str, float]:
        return {name: value for part in self.parts_of for name, value in part.logs().items()}

    def state(self) -> dict[str, Any]:
        return {str(i): part.state() for i, part in enumerate(self.parts_of)}

    def set_state(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts_of):
            part.set_state(state[str(i)])

    def project(self, adapter: Path) -> None:
        for part in self.parts_of:
            part.project(adapter)

    @contextmanager
    def inference_hooks(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts_of:
                stack.enter_context(part.inference_hooks(model))
            yield
