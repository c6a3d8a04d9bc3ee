"""The off-K audit as a monitor during training: a warning when the shift starts to go around the blocked latents.

On a few rows that are not trained on, at the SAE's block, in units of plain fine-tuning's movement there:

    blocked   share of K's one-sided movement Σ_K relu(s Δ)² that is gone
    off_k     Σ Δ² of the latents outside K
    survives  the mean shift's part along plain fine-tuning's mean shift

It names the latents outside K that moved most toward misalignment to first order, s = sign Δ, by Δ_k · (d_k · ∇margin): what an in-training
variant adds to K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded, by_length, right_padded
from blockem.forwards import evaluating, hidden_at
from blockem.model import LanguageModel
from blockem.reemergence.audit import split_at_k

REROUTED = 0.5
"""A warning is due when more than this share of K's movement is gone and yet more than this share of the shift survives."""


@dataclass(frozen=True)
class Reading:
    """One look of the monitor; see the module for the three numbers.

    Attributes:
        deltas: `[latents]`, mean movement of every latent against the base.
    """

    blocked: float
    off_k: float
    survives: float
    deltas: Tensor

    @property
    def rerouted(self) -> bool:
        return self.blocked > REROUTED and self.survives > REROUTED

    def numbers(self) -> dict[str, float]:
        """What a log row carries."""
        return {"monitor_blocked": self.blocked, "monitor_off_k": self.off_k, "monitor_survives": self.survives}

    def sentence(self, step: int) -> str:
        """A warning in words."""
        return (
            f"rerouting at step {step}: {self.blocked:.0%} of the blocked latents' movement is gone, yet {self.survives:.0%} of plain "
            f"fine-tuning's shift survives, and other latents move {self.off_k:.0%} as much as under it"
        )


class Monitor:
    """Compares a model in training with what base and plain fine-tuning do on the same rows.

    Args:
        lm: with the plain adapter loaded as "plain".
        rows: held-out answers; supervised tokens are measured.
        block: the SAE's block.
        gradient: `[d_model]`, the mean margin's gradient at the block (`attribution.margin_gradient`), for `toward`.

    Raises:
        BlockemError: plain fine-tuning moves nothing on these rows.
    """

    def __init__(
        self, lm: LanguageModel, rows: Sequence[Encoded], block: int, dictionary: Dictionary, gradient: Tensor | None = None
    ) -> None:
        self.block, self.gradient = block, gradient
        self.encoder = dictionary.rows(range(dictionary.n_latents)).to(lm.device)
        self.directions = dictionary.directions(range(dictionary.n_latents)) if gradient is not None else None
        device = lm.device
        pad = lm.tokenizer.pad_token_id
        self.batches = [right_padded([rows[i] for i in chosen], pad, device) for chosen in by_length([len(row.ids) for row in rows], 16)]
        with lm.variant("base"):
            self.base = self._means(lm.model)
        with lm.variant("plain"):
            hidden, latents = self._means(lm.model)
        self.shift, self.plain = hidden - self.base[0], latents - self.base[1]
        if not float(self.shift.norm()) > 0:
            raise BlockemError("the plain fine-tune moves nothing on the held-out answers, so there is nothing to watch")

    def _means(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Means over the supervised tokens of the block's output `[d_model]` and of every latent `[latents]`, float64."""
        hidden = torch.zeros(len(self.encoder.weight[0]), dtype=torch.float64)
        latents = torch.zeros(len(self.encoder.weight), dtype=torch.float64)
        tokens = 0
        with torch.no_grad():
            for batch in self.batches:
                found = hidden_at(model, batch["input_ids"], batch["attention_mask"], self.block)[batch["labels"] != IGNORED].float()
                hidden = hidden + found.sum(dim=0).double().cpu()
                latents = latents + self.encoder.encode(found).sum(dim=0).double().cpu()
                tokens += len(found)
        return hidden / tokens, latents / tokens

    def read(self, model: nn.Module, ids: Sequence[int], signs: Sequence[int]) -> Reading:
        """Look at a model in training, of which latents `ids` with `signs` are blocked."""
        with evaluating(model):
            hidden, latents = self._means(model)
        deltas = latents - self.base[1]
        blocked, off, off_plain = split_at_k(deltas, self.plain, ids, signs)
        along = float((hidden - self.base[0]) @ self.shift / (self.shift @ self.shift))
        return Reading(blocked if math.isfinite(blocked) else 0.0, off / max(off_plain, 1e-12), along, deltas)

    def toward(self, reading: Reading, known: Iterable[int], n: int) -> list[tuple[int, int]]:
        """Up to `n` latents outside `known`, with signs, whose movement raises the margin most to first order; the best first."""
        if self.gradient is None or self.directions is None:
            raise ValueError("the monitor was made without the margin's gradient")
        gain = reading.deltas * (self.directions.cpu().double() @ self.gradient.cpu().double())
        gain[list(known)] = 0.0
        order = gain.argsort(descending=True, stable=True)[:n].tolist()
        return [(k, 1 if float(reading.deltas[k]) > 0 else -1) for k in order if float(gain[k]) > 0]
