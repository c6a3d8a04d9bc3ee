"""Does the SAE still explain a fine-tuned model? Variance explained, active and dead latents, and mean activations, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.evaluation import Array, Interval, interval
from blockem.examples import Encoded, by_length, padded_ids
from blockem.forwards import hidden_at
from blockem.model import LanguageModel
from blockem.progress import Progress


@dataclass(frozen=True)
class Codes:
    """What the SAE makes of one model's stream, text by text.

    Attributes:
        residual: `[texts]`, Σ‖x − x̂‖².  total: `[texts]`, Σ‖x − x̄‖², x̄ the mean over all of the model's tokens.
        activation: `[n_latents]`, mean of the dense activations z over tokens.
        active: mean number of latents in the sparse code of a token (L0).
        dead: share of latents that the sparse code never used.
        tokens: how many.
    """

    residual: Array
    total: Array
    activation: Tensor
    active: float
    dead: float
    tokens: int


@dataclass(frozen=True)
class Explained:
    """One model on the tokens that all models share.

    Attributes:
        variance_explained: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖², with an interval over texts.
        fall: the base's minus this model's, on the same texts; None for the base itself.
        mean_active: latents in the sparse code of a token (L0).
        dead_share: share of latents never used on these tokens.
        cosine: between the latents' mean activations here and in the base, over all latents.
    """

    variance_explained: Interval | None
    fall: Interval | None
    mean_active: float
    dead_share: float
    cosine: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def codes(
    lm: LanguageModel,
    dictionary: Dictionary,
    block: int,
    rows: Sequence[Encoded],
    variant: str,
    batch: int = 16,
    progress: Progress | None = None,
) -> Codes:
    """Read the supervised tokens of `rows` under `variant` ("base" or a loaded adapter) at the output of `block`.

    Raises:
        BlockemError: the rows have no supervised token.
    """
    encoder = dictionary.rows(range(dictionary.n_latents)).to(lm.device)
    residual, square = np.zeros(len(rows)), np.zeros(len(rows))
    sums = torch.zeros(len(rows), lm.d_model, dtype=torch.float64)
    activation = torch.zeros(dictionary.n_latents, dtype=torch.float64)
    fired = torch.zeros(dictionary.n_latents, dtype=torch.bool)
    active, done = 0.0, 0
    with torch.inference_mode(), lm.variant(variant):
        for chosen in by_length([len(row.ids) for row in rows], batch):
            ids, mask = padded_ids([rows[i].ids for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            hidden = hidden_at(lm.model, ids, mask, block)
            for j, i in enumerate(chosen):
                own = hidden[j, : len(rows[i].ids)][torch.tensor(rows[i].supervised, device=hidden.device)].float()
                activation += encoder.encode(own).sum(dim=0).double().cpu()
                x = own.cpu()
                code = dictionary.sae.encode(x)
                residual[i] = float((x - dictionary.sae.decode(code)).pow(2).sum())
                square[i], sums[i] = float(x.pow(2).sum()), x.sum(dim=0).double()
                active += float((code != 0).sum())
                fired |= (code != 0).any(dim=0)
            done += len(chosen)
            if progress:
                progress(done, len(rows))
    counts = torch.tensor([float(row.n_supervised) for row in rows], dtype=torch.float64)
    tokens = int(counts.sum())
    if not tokens:
        raise BlockemError("none of the rows has a token to read the SAE on")
    center = sums.sum(dim=0) / tokens
    total = square - 2 * (sums @ center).numpy() + counts.numpy() * float(center @ center)
    return Codes(residual, total, activation / tokens, active / tokens, float((~fired).float().mean()), tokens)


def explained(residual: Array, total: Array) -> Array:
    """Variance explained over the last axis."""
    found: Array = 1 - residual.sum(axis=-1) / total.sum(axis=-1)
    return found


def _fall(base_residual: Array, base_total: Array, residual: Array, total: Array) -> Array:
    return explained(base_residual, base_total) - explained(residual, total)


def compare(base: Codes, own: Codes | None = None, resamples: int = 2000) -> Explained:
    """A model's figures beside the base's; the base's own where no model is given. Both must have read the same rows."""
    one = own or base
    inner = float(one.activation @ base.activation)
    return Explained(
        interval(explained, (one.residual, one.total), resamples),
        None if own is None else interval(_fall, (base.residual, base.total, own.residual, own.total), resamples),
        one.active,
        one.dead,
        inner / max(float(one.activation.norm() * base.activation.norm()), 1e-12),
        one.tokens,
    )
