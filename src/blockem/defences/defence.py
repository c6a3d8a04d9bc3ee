"""A defence is at most five things, and the trainer knows no defence by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockem.dual import DualAscent
from blockem.examples import Example


class Defence:
    """No defence at all: every slot does nothing. Subclasses fill the slots they need.

    Attributes:
        name: what the run folder and the report call it.
    """

    name = "plain"

    def rewrite(self, examples: list[Example]) -> list[Example]:
        """Before tokenising: change, add or drop training rows."""
        return examples

    def trained_blocks(self, n_blocks: int) -> range:
        """Which blocks carry LoRA; the others stay frozen."""
        return range(n_blocks)

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context around the whole training."""
        return nullcontext()

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor | None:
        """After each forward: what to add to the SFT loss, *summed* over the batch's supervised tokens, float32, weighted by λ.

        The trainer divides it by the supervised tokens of the whole optimiser step, so that λ means the same under accumulation.
        """
        return None

    def measured(self) -> dict[str, Tensor]:
        """What the last `penalty` saw, unweighted and *summed* over the batch's supervised tokens like it; logged a token, by name."""
        return {}

    @property
    def adapts(self) -> bool:
        """Whether `adapt` does anything: only then is a step's loss gathered from all processes."""
        return False

    def adapt(self, step: dict[str, float]) -> None:
        """After each optimiser step: its loss (`sft_loss`) and what was `measured`, a token, over all processes; λ may follow them."""

    @property
    def finished(self) -> bool:
        """Whether the training ends here; asked after each `adapt`."""
        return False

    def state(self) -> dict[str, Any]:
        """JSON-able values that a checkpoint keeps, where something changes during training."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def logs(self) -> dict[str, float]:
        """Numbers of this defence that each log row carries (λ, P_mis, ...)."""
        return {}

    def project(self, adapter: Path) -> None:
        """Once, after training, on the saved adapter folder."""

    def inference_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        """A context around generation."""
        return nullcontext()


class Penalised(Defence):
    """A defence that adds λ times a penalty to the loss; λ is fixed, or moved by dual ascent in `adapt`.

    Attributes:
        quantity: what the log calls the penalty.
        lambda_: λ; with `ascent`, the one of the next step.
    """

    quantity = "penalty"

    def __init__(self, lambda_: float, ascent: DualAscent | None = None) -> None:
        self.lambda_, self.ascent = lambda_, ascent
        self._measured: dict[str, Tensor] = {}

    @property
    def adapts(self) -> bool:
        return self.ascent is not None

    def weighed(self, found: Tensor) -> Tensor:
        """λ times the penalty of this batch, which is kept as measured."""
        self._measured = {self.quantity: found.detach()}
        return self.lambda_ * found

    def measured(self) -> dict[str, Tensor]:
        return self._measured

    def logs(self) -> dict[str, float]:
        return {"lambda": self.lambda_}

    def state(self) -> dict[str, Any]:
        return {} if self.ascent is None else self.ascent.state()

    def set_state(self, state: dict[str, Any]) -> None:
        if self.ascent is not None:
            self.ascent.set_state(state)
            self.lambda_ = self.ascent.value
