"""CAFT, concept ablation fine-tuning: train with the concept's directions taken out of the stream (Casademunt et al. 2025).

    h ← h − (hQ)Qᵀ   at the output of one block, at every position, in training only

The columns of Q are an orthonormal basis of the chosen decoder directions. Whatever is learnt cannot be learnt along them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.steering import edit_at_block


def basis(directions: Tensor) -> Tensor:
    """Q, `[d_model, directions]`, orthonormal columns, float32, from `[directions, d_model]` (QR)."""
    q: Tensor = torch.linalg.qr(directions.float().T)[0]
    return q


def ablated(hidden: Tensor, q: Tensor) -> Tensor:
    """h − (hQ)Qᵀ of `[..., d_model]`, computed in float32, in the dtype of `hidden`."""
    own = hidden.float()
    return (own - (own @ q) @ q.T).to(hidden.dtype)


class CAFT(Defence):
    """CAFT as a defence.

    Args:
        directions: `[directions, d_model]`, the decoder directions of the chosen latents.
        block: block index from 0.
    """

    name = "caft"

    def __init__(self, directions: Tensor, block: int) -> None:
        self.q, self.block = basis(directions), block

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        q = self.q.to(next(model.parameters()).device)
        return edit_at_block(model, self.block, lambda hidden: ablated(hidden, q))
