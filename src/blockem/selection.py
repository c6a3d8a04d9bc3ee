"""Which latents of a discovery are blocked: the causal set, or an ablation of it (BLOCK-EM, ablations)."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockem.errors import BlockemError
from blockem.latents import Latent, LatentSet

Row = dict[str, Any]
DROPPED = "dropped after"  # the fate in tables that have no column for it
FIGURES = tuple(f"{side}{what}" for side in ("induce", "repair") for what in ("", "_incoherence", "_allowed"))


def read_candidates(path: Path) -> list[Row]:
    """The rows of a run's `latents.csv`: latent, sign, Δ, stage 2 (None where not measured), fate, and whether halving dropped it.

    Raises:
        BlockemError: the file is missing, or not what `blockem discover` writes.
    """
    if not path.is_file():
        raise BlockemError(f"{path}: no such file; block.select other than causal chooses from what `blockem discover` measured")
    try:
        with path.open(encoding="utf-8") as file:
            return [
                {
                    "latent": int(row["latent"]),
                    "sign": int(row["sign"]),
                    "delta": float(row["delta"]),
                    "fate": row["fate"],
                    "dropped": row.get("dropped") == "True" or row["fate"].startswith(DROPPED),
                    **{name: float(row[name]) if row[name] else None for name in FIGURES},
                }
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise BlockemError(f"{path}: not a table of candidates ({error}); run `blockem discover` again") from error


def selected(latents: LatentSet, select: str, size: int | None, signs: str, candidates: Sequence[Row], seed: int) -> LatentSet:
    """The set that is blocked; with `causal`, None and `both` the discovered one itself.

    Args:
        select: `causal`; `top-delta`, the largest |Δ| of all candidates; `induce` or `repair`, by that test alone: those that gain in it
            inside its incoherence budget, whatever the other said, the largest gain first. Halving drops some that it has not tested on all
            pairs; those are left out.
        size: the first so many; None for as many as the causal set has.
        signs: `both`, `plus` or `minus` (those of one sign, after the size was cut), or `shuffled` by `seed`.
        candidates: rows of `latents.csv`, for every `select` but causal.

    Raises:
        BlockemError: nothing is left, or there are fewer than `size`.
    """
    chosen = latents.latents
    if select != "causal":
        chosen = _ranked(candidates, select)[: size or len(latents.latents)]
        if size is not None and size > len(chosen):
            raise BlockemError(
                f"block.size is {size}, but block.select={select} has {len(chosen)} latents at block {latents.block}; ask for fewer"
            )
    elif size is not None and size > len(chosen):
        raise BlockemError(
            f"block.size is {size}, but discovery chose {len(chosen)} latents at block {latents.block}; "
            "discover more (discover.size), or ask for fewer"
        )
    chosen = chosen[:size]
    if signs in ("plus", "minus"):
        chosen = tuple(one for one in chosen if (one.sign > 0) == (signs == "plus"))
    elif signs == "shuffled":
        dealt = [one.sign for one in chosen]
        random.Random(f"signs-{seed}").shuffle(dealt)
        chosen = tuple(replace(one, sign=sign) for one, sign in zip(chosen, dealt, strict=True))
    if not chosen:
        raise BlockemError(f"block.select={select} with block.signs={signs} leaves no latent of block {latents.block}; choose others")
    if chosen == latents.latents:
        return latents
    provenance = {**latents.provenance, "ablation": {"select": select, "size": size, "signs": signs, "seed": seed}}
    return replace(latents, latents=chosen, provenance=provenance)


def _ranked(candidates: Sequence[Row], select: str) -> tuple[Latent, ...]:
    """Candidates as an ablation ranks them, best first."""
    if select == "top-delta":
        order = sorted(candidates, key=lambda row: -abs(row["delta"]))
    else:
        tested = [row for row in candidates if row[select] is not None and not row["dropped"]]
        passed = [row for row in tested if row[select] > 0 and row[f"{select}_incoherence"] <= row[f"{select}_allowed"]]
        order = sorted(passed, key=lambda row: -row[select])
    return tuple(Latent(row["latent"], row["sign"], row["delta"]) for row in order)
