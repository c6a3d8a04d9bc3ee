"""Test-time steering: plain fine-tuning, and the causal latents subtracted while the model answers (Wang et al. 2025).

    h ← h − Σ_{k∈K} α_k · m · s_k · d_k   at the output of one block, at every position, at inference only

m is the median norm of the unsteered stream there. The terms add up: with many latents, strengths that are mild for one break the model.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.errors import BlockemError
from blockem.latents import LatentSet
from blockem.steering import add_at_block


def steering_vector(latents: LatentSet, directions: Tensor, alpha: float | None = None) -> Tensor:
    """−Σ_k α_k m s_k d_k, `[d_model]`, float32.

    Args:
        directions: d_k, `[latents, d_model]`, unit length, in the order of the set.
        alpha: one strength for all; None takes the strength at which stage 3 found each latent to repair best.

    Raises:
        BlockemError: the set lacks its norm or, where they are needed, its strengths.
    """
    if directions.shape[0] != len(latents.latents):
        raise ValueError(f"{tuple(directions.shape)} directions for {len(latents.latents)} latents")
    if not math.isfinite(latents.norm):
        raise BlockemError("this LatentSet holds no steering norm, which strengths are multiples of; run `blockem discover`")
    alphas = [one.repair_alpha if alpha is None else alpha for one in latents.latents]
    if not all(map(math.isfinite, alphas)):
        raise BlockemError("this LatentSet holds no strengths of its own (repair_alpha); give defence.strength")
    weights = torch.tensor([a * one.sign for a, one in zip(alphas, latents.latents, strict=True)])
    return -latents.norm * (weights[:, None] * directions.float().cpu()).sum(dim=0)


class Steering(Defence):
    """Test-time steering as a defence: nothing changes in training.

    Args:
        vector: what is added, `[d_model]` (`steering_vector`).
        block: block index from 0.
    """

    name = "steering"

    def __init__(self, vector: Tensor, block: int) -> None:
        self.vector, self.block = vector, block

    def inference_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        return add_at_block(model, self.block, self.vector)
