"""The general-behaviour anchor: stay with the base on text that the fine-tune has no business with.

The training rows watch the blocked latents on the task alone; elsewhere nobody looks. The anchor runs the trained model on a few rows of
other text beside each batch (unlabelled: nothing in them is learnt) and charges the squared distance of its residual stream from the
base's at a few blocks, in units of what plain fine-tuning would move it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockem.base_values import BaseValues
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded, right_padded
from blockem.model import hidden_at_each


@dataclass(frozen=True)
class StreamReader:
    """The residual stream itself at several blocks, each divided by its scale.

    Attributes:
        scales: by block index from 0, what counts as one unit there: the root mean square length of plain fine-tuning's shift.
    """

    scales: dict[int, float]

    def __post_init__(self) -> None:
        if not self.scales or not all(scale > 0 for scale in self.scales.values()):
            raise BlockemError("the anchor needs blocks that plain fine-tuning moves; choose other block.anchor_blocks")

    @property
    def blocks(self) -> list[int]:
        return sorted(self.scales)

    @property
    def key(self) -> str:
        """Names what is read, for keeping base values."""
        return hashlib.sha256(repr(sorted(self.scales.items())).encode()).hexdigest()[:16]

    def read(self, hidden: dict[int, Tensor]) -> Tensor:
        """`[tokens, blocks · d_model]`, float32, from the outputs `[tokens, d_model]` of the blocks."""
        return torch.cat([hidden[block].float() / self.scales[block] for block in self.blocks], dim=-1)


class Anchor:
    """The penalty on general text.

    Args:
        rows: the text; `supervised` marks the tokens that are watched, nothing is learnt from them.
        reader: what is read of the stream.
        values: the base's values of every row (`base_values.collect`).
        weight: λ of the anchor.
        batch: rows beside each training batch.
        pad_id: the tokenizer's padding id.
    """

    def __init__(self, rows: Sequence[Encoded], reader: StreamReader, values: BaseValues, weight: float, batch: int, pad_id: int) -> None:
        if not rows:
            raise BlockemError("the anchor has no text; give block.anchor a file with at least one row")
        self.rows, self.reader, self.values = list(rows), reader, values
        self.weight, self.batch, self.pad_id = weight, min(batch, len(rows)), pad_id
        self.last = 0.0

    def chosen(self, batch: dict[str, Tensor]) -> list[int]:
        """Which rows go with a training batch: drawn by its content, so that a resumed run draws the same."""
        digest = hashlib.blake2b(batch["input_ids"].cpu().numpy().tobytes(), digest_size=8).hexdigest()
        return random.Random(digest).sample(range(len(self.rows)), self.batch)

    def distance(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Mean over watched tokens of the squared distance from the base, summed over blocks; 1 a block is plain fine-tuning's own."""
        device = batch["input_ids"].device
        padded = right_padded([self.rows[i] for i in self.chosen(batch)], self.pad_id, device)
        where = padded["labels"] != IGNORED
        hidden = hidden_at_each(model, padded["input_ids"], padded["attention_mask"], self.reader.blocks)
        z = self.reader.read({block: output[where] for block, output in hidden.items()})
        return (z - self.values.of(padded)).pow(2).sum(dim=-1).mean()

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """Weighted, and multiplied by the batch's supervised tokens, as the trainer wants it (see `Defence.penalty`)."""
        found = self.distance(batch, model)
        self.last = float(found.detach())
        return self.weight * found * (batch["labels"] != IGNORED).sum()
