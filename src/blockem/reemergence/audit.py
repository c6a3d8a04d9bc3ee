"""The off-K audit: where does a blocked fine-tune go instead?

On the same held-out answers, the shift of each model's residual stream against the base, block by block: how long it is, how much of plain
fine-tuning's own shift survives along its direction; and at the SAE's block, latent by latent: what the blocked set gave up, what other
latents took over, and how much of the shift no latent explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.examples import Encoded
from blockem.latents import LatentSet
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.states import supervised_states


@dataclass(frozen=True)
class BlockShift:
    """One model's shift against the base at one block.

    Attributes:
        block: index from 0.
        length: root mean square length, in units of plain fine-tuning's there.
        along: the mean shift's part along plain fine-tuning's mean shift, in units of that shift's length; 1: all of it survives.
        cosine: between the two mean shifts.
    """

    block: int
    length: float
    along: float
    cosine: float


@dataclass(frozen=True)
class LatentShift:
    """How far one latent moved in the mean over the tokens: under plain fine-tuning, and under the audited model."""

    latent: int
    sign: int
    plain: float
    moved: float


@dataclass(frozen=True)
class Rerouting:
    """One model at the SAE's block; shares are of plain fine-tuning's movement there.

    Attributes:
        blocked: share of K's one-sided movement, Σ_K relu(s Δ)², that is gone.
        off_k: Σ Δ² of the latents outside K, in units of plain fine-tuning's: 1 means that they move as they would without a defence.
        new: share of the model's own movement outside K that goes along latents that plain fine-tuning moves less, or the other way.
        unexplained: share of the shift's mean square length that the SAE's reconstruction leaves out.
        unexplained_plain: the same of plain fine-tuning.
        top: the latents outside K that moved most beyond what plain fine-tuning does.
    """

    blocked: float
    off_k: float
    new: float
    unexplained: float
    unexplained_plain: float
    top: list[LatentShift] = field(default_factory=list)


@dataclass(frozen=True)
class Audit:
    """Every audited model's shift by block and, with an SAE, its rerouting; `verdicts` say it in words."""

    block: int
    shifts: dict[str, list[BlockShift]]
    rerouting: dict[str, Rerouting]
    verdicts: dict[str, str]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Sums:
    mean: dict[int, Tensor]
    square: dict[int, float]
    latents: Tensor | None = None
    unexplained: float = 0.0
    tokens: int = 0


def audit(
    lm: LanguageModel,
    rows: Sequence[Encoded],
    models: Sequence[str],
    block: int,
    dictionary: Dictionary | None = None,
    latents: Mapping[str, LatentSet] | None = None,
    batch: int = 16,
    top: int = 12,
    progress: Progress | None = None,
) -> Audit:
    """Audit loaded adapters against the one named "plain".

    Args:
        rows: held-out answers; supervised tokens are measured.
        models: adapter names; "plain" is measured in any case.
        block: the blocked block.
        dictionary, latents: the SAE of that block and the set that each model blocked; a model without one is compared by blocks alone.

    Raises:
        BlockemError: the plain adapter moves nothing.
    """
    names = list(dict.fromkeys(["plain", *models]))
    sums = _measure(lm, rows, names, block, dictionary, batch, progress)
    reference = sums["plain"]
    n = reference.tokens
    if not n or not any(float(one.norm()) > 0 for one in reference.mean.values()):
        raise BlockemError("the plain fine-tune moves nothing on these answers, so there is nothing to audit against")
    found: dict[str, list[BlockShift]] = {name: [] for name in names}
    for name in names:
        for place, mean in sums[name].mean.items():
            own, other = mean / n, reference.mean[place] / n
            inner, length = float(own @ other), float(other.norm())
            found[name].append(
                BlockShift(
                    place,
                    (sums[name].square[place] / max(reference.square[place], 1e-12)) ** 0.5,
                    inner / max(length**2, 1e-12),
                    inner / max(float(own.norm()) * length, 1e-12),
                )
            )
    routes = {}
    if dictionary is not None:
        routes = {name: _rerouting(sums[name], reference, block, one, top) for name, one in (latents or {}).items() if name in sums}
    verdicts = {name: verdict(found[name], routes.get(name), block) for name in names if name != "plain"}
    return Audit(block, found, routes, verdicts, n)


def _measure(
    lm: LanguageModel,
    rows: Sequence[Encoded],
    names: Sequence[str],
    block: int,
    dictionary: Dictionary | None,
    batch: int,
    progress: Progress | None,
) -> dict[str, _Sums]:
    every = range(lm.n_blocks)
    sums = {name: _Sums({b: torch.zeros(lm.d_model, dtype=torch.float64) for b in every}, dict.fromkeys(every, 0.0)) for name in names}
    encoder = dictionary.rows(range(dictionary.n_latents)).to(lm.device) if dictionary else None
    with torch.inference_mode():
        for states in supervised_states(lm, rows, ("base", *names), every, batch, progress):
            here = {name: one[block].float() for name, one in states.items()}
            known = (encoder.encode(here["base"]), dictionary.reconstruct(here["base"].cpu())) if encoder and dictionary else None
            for name in names:
                own = sums[name]
                own.tokens += len(here[name])
                for b in every:
                    moved = states[name][b].float() - states["base"][b].float()
                    own.mean[b] += moved.sum(dim=0).double().cpu()
                    own.square[b] += float(moved.pow(2).sum())
                if encoder and dictionary and known:
                    change = (encoder.encode(here[name]) - known[0]).sum(dim=0).double().cpu()
                    own.latents = change if own.latents is None else own.latents + change
                    rebuilt = dictionary.reconstruct(here[name].cpu()) - known[1]
                    own.unexplained += float(((here[name] - here["base"]).cpu() - rebuilt).pow(2).sum())
    return sums


def split_at_k(moved: Tensor, plain: Tensor, ids: Sequence[int], signs: Sequence[int]) -> tuple[float, float, float]:
    """What became of the latents in K and of the others.

    Args:
        moved, plain: `[latents]`, Δ of every latent against the base, of a model and of plain fine-tuning, float64.

    Returns:
        The share of K's one-sided movement, Σ_K relu(s Δ)², that is gone (no number where plain fine-tuning has none); and Σ Δ² outside K
        of the model and of plain fine-tuning.
    """
    inside, side = list(ids), torch.tensor([float(sign) for sign in signs], dtype=torch.float64)
    left, was = (float((side * one[inside]).clamp_min(0).pow(2).sum()) for one in (moved, plain))
    outside = torch.ones(len(moved), dtype=torch.bool)
    outside[inside] = False
    off, off_plain = (float(one[outside].pow(2).sum()) for one in (moved, plain))
    return 1 - left / was if was > 0 else math.nan, off, off_plain


def _rerouting(own: _Sums, reference: _Sums, block: int, latents: LatentSet, top: int) -> Rerouting:
    if own.latents is None or reference.latents is None:
        raise ValueError("latents were not measured")
    moved, plain = own.latents / own.tokens, reference.latents / reference.tokens
    blocked, off, off_plain = split_at_k(moved, plain, latents.ids, latents.signs)
    toward = torch.sign(plain)
    beyond = torch.where(moved * toward > 0, (moved.abs() - plain.abs()).clamp_min(0), moved.abs())
    beyond[latents.ids] = 0.0
    order = beyond.argsort(descending=True, stable=True)[:top].tolist()
    listed = [LatentShift(k, 1 if moved[k] > 0 else -1, float(plain[k]), float(moved[k])) for k in order if float(beyond[k]) > 0]
    return Rerouting(
        blocked=blocked,
        off_k=off / max(off_plain, 1e-12),
        new=float(beyond.pow(2).sum()) / max(off, 1e-12),
        unexplained=own.unexplained / max(own.square[block], 1e-12),
        unexplained_plain=reference.unexplained / max(reference.square[block], 1e-12),
        top=listed,
    )


def verdict(shifts: Sequence[BlockShift], route: Rerouting | None, block: int) -> str:
    """One sentence: what was blocked, what went on at the same block, and what came back after it."""
    here = shifts[block]
    last = shifts[-1]
    parts = []
    if route is not None and route.blocked == route.blocked:
        parts.append(f"{route.blocked:.0%} of the blocked latents' movement is gone")
        parts.append(f"other latents of block {block} move {route.off_k:.0%} as much as under plain fine-tuning")
    parts.append(f"{here.along:.0%} of plain fine-tuning's shift survives at block {block}")
    if last.block != block:
        change = last.along - here.along
        tail = "more comes back after it" if change > 0.1 else "no more comes back after it" if change > -0.1 else "less is left after it"
        parts.append(f"{last.along:.0%} at the last block: {tail}")
    rerouted = route is not None and route.blocked > 0.5 and here.along > 0.5
    lead = "rerouted at the same block" if rerouted else "held at the block" if here.along < 0.5 else "hardly blocked"
    if here.along < 0.5 and last.along > here.along + 0.25:
        lead = "rerouted downstream"
    return f"{lead}: " + "; ".join(parts)
