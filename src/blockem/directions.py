"""Directions without any SAE: along which lines does fine-tuning move the residual stream?

At each chosen block the shift h_mis − h_base is measured on the same tokens. Its mean and its leading principal directions are what a
team that has no SAE can block, at as many blocks as it likes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockem.errors import BlockemError
from blockem.examples import Encoded
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.states import supervised_states
from blockem.store import write_tensors

FORMAT = "1"
BOTH = 0


@dataclass(frozen=True)
class Directions:
    """Signed directions at one block.

    Attributes:
        vectors: `[directions, d_model]`, unit length, float32.
        signs: +1 where misalignment raises the projection, −1 where it lowers it, 0 (`BOTH`) where it spreads both ways.
        scale: root mean square length of the whole shift here; projections are divided by it, so that blocks weigh alike.
    """

    vectors: Tensor
    signs: tuple[int, ...]
    scale: float

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or len(self.signs) != len(self.vectors) or not self.scale > 0:
            raise ValueError(f"{tuple(self.vectors.shape)} vectors, {len(self.signs)} signs and scale {self.scale} do not go together")

    def readout(self) -> tuple[Tensor, tuple[int, ...]]:
        """Weights `[rows, d_model]` and a sign, +1 or −1, for each row: a direction of both signs stands there twice."""
        twice = [i for i, sign in enumerate(self.signs) if sign == BOTH]
        weights = torch.cat([self.vectors, self.vectors[twice]]) / self.scale
        return weights, (*(sign or 1 for sign in self.signs), *(-1 for _ in twice))


@dataclass(frozen=True)
class DirectionSet:
    """Directions at several blocks of one model; what `LatentSet` is for latents.

    Attributes:
        model, revision: the base model it was made for.
        blocks: directions by block index from 0.
        provenance: how it was made.
    """

    model: str
    revision: str
    blocks: dict[int, Directions]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(one.signs) for one in self.blocks.values())

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically; signs and scales stand in its metadata."""
        facts = {
            "model": self.model,
            "revision": self.revision,
            "signs": {str(block): list(one.signs) for block, one in self.blocks.items()},
            "scales": {str(block): one.scale for block, one in self.blocks.items()},
            "provenance": self.provenance,
        }
        tensors = {f"block.{block}": one.vectors.float().cpu() for block, one in self.blocks.items()}
        write_tensors(Path(path), tensors, {"format": FORMAT, "directions": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> DirectionSet:
        """Read a set.

        Raises:
            BlockemError: the file is missing, damaged, or no DirectionSet.
        """
        from safetensors import safe_open

        if not Path(path).is_file():
            raise BlockemError(f"{path}: no such DirectionSet; `blockem directions` makes one")
        try:
            with safe_open(str(path), "pt") as file:  # type: ignore[no-untyped-call]
                facts = json.loads(file.metadata()["directions"])
                blocks = {
                    int(block): Directions(file.get_tensor(f"block.{block}"), tuple(signs), float(facts["scales"][block]))
                    for block, signs in facts["signs"].items()
                }
            return cls(facts["model"], facts["revision"], blocks, facts["provenance"])
        except Exception as error:  # damaged and foreign files raise many kinds
            raise BlockemError(f"{path}: not a DirectionSet ({type(error).__name__})") from error

    def check(self, lm: LanguageModel) -> None:
        """Refuse a model that the set was not made for.

        Raises:
            BlockemError: with what differs.
        """
        if (self.model, self.revision) != (lm.id, lm.revision):
            raise BlockemError(
                f"these directions were made for {self.model} (revision {self.revision}), not for {lm.id} ({lm.revision}); "
                "run `blockem directions` on this model"
            )
        for block, one in self.blocks.items():
            lm.check_block(block)
            if one.vectors.shape[1] != lm.d_model:
                raise BlockemError(f"these directions have width {one.vectors.shape[1]}, but {lm.id} has {lm.d_model}")


@dataclass
class Shift:
    """Moments of h_mis − h_base over tokens at one block, float64.

    Attributes:
        mean: `[d_model]`.  second: `[d_model, d_model]`, E[D Dᵀ].  tokens: how many.
    """

    mean: Tensor
    second: Tensor
    tokens: int

    @property
    def rms(self) -> float:
        """Root mean square length of the shift."""
        return float(self.second.diagonal().sum().clamp_min(0).sqrt())


def shifts(
    lm: LanguageModel, variant: str, rows: Sequence[Encoded], wanted: Sequence[int], batch: int = 16, progress: Progress | None = None
) -> dict[int, Shift]:
    """How `variant` moves the stream against the base at the supervised tokens of `rows`, for each of the `wanted` blocks."""
    sums = {block: torch.zeros(lm.d_model, dtype=torch.float64) for block in wanted}
    squares = {block: torch.zeros(lm.d_model, lm.d_model, dtype=torch.float64) for block in wanted}
    tokens = 0
    with torch.inference_mode():
        for states in supervised_states(lm, rows, (variant, "base"), wanted, batch, progress):
            for block in wanted:
                moved = (states[variant][block].float() - states["base"][block].float()).cpu()
                sums[block] += moved.sum(dim=0).double()
                squares[block] += (moved.T @ moved).double()
            tokens += len(moved)
    if not tokens:
        raise BlockemError("none of the rows has a token to measure the shift on")
    return {block: Shift(sums[block] / tokens, squares[block] / tokens, tokens) for block in wanted}


def leading(shift: Shift, n: int) -> Directions:
    """The mean shift (one-sided) and the `n` leading principal directions around it (both sides, strongest first).

    Raises:
        BlockemError: nothing moves at this block.
    """
    length = shift.mean.norm()
    if not float(length) > 0:
        raise BlockemError(
            "fine-tuning moves nothing at a block to take directions from: is the adapter trained, and the block before its last?"
        )
    first = shift.mean / length
    around = shift.second - torch.outer(shift.mean, shift.mean)
    apart = torch.eye(len(first), dtype=torch.float64) - torch.outer(first, first)
    _, vectors = torch.linalg.eigh(apart @ around @ apart)
    chosen = torch.cat([first[None], vectors.T.flip(0)[:n]]).float()
    return Directions(chosen, (1, *[BOTH] * min(n, len(first))), shift.rms)
