"""The blocked training over several epochs: the adapter of each, what it pays, and the items that all of them are measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.blocking import block_step
from blockem.config import Recipe
from blockem.defence_names import epoch_name
from blockem.errors import BlockemError
from blockem.session import Session, beside
from blockem.store import write_jsonl

if TYPE_CHECKING:
    from blockem.defences.block_em import Blocker
    from blockem.evaluation import Interval
    from blockem.examples import Encoded
    from blockem.model import LanguageModel


def blocked_recipe(recipe: Recipe, chosen: bool = False) -> Recipe:
    """The recipe of the long blocked training; `chosen`: on a set that a training blocked before, or that holds one."""
    block = replace(recipe.block.as_chosen() if chosen else recipe.block, control="none")
    train = replace(recipe.train, epochs=float(recipe.reemerge.epochs))
    return replace(recipe, train=train, defence=replace(recipe.defence, epochs=None), block=block)


def train_epochs(session: Session, latents: Path, plain: Path, folder: Path | None = None, chosen: bool = False) -> dict[str, Any]:
    """Train with the latents blocked for all epochs; the adapters go to `blocked/epoch-1`, … of the folder. Returns what was blocked."""
    with beside(session, blocked_recipe(session.recipe, chosen), folder) as longer:
        return block_step(longer, latents, plain, keep_epochs=True)


def adapters(folder: Path, epochs: int, stem: str) -> dict[str, Path]:
    """Each epoch's adapter under the name that the evaluation gives it: `epoch1`, `epoch2`, …"""
    return {f"{stem}{epoch}": folder / "blocked" / epoch_name(epoch) for epoch in range(1, epochs + 1)}


def penalty_shares(
    lm: LanguageModel, blocker: Blocker, models: Mapping[str, Path], rows: Sequence[Encoded], p_mis: float | None
) -> dict[str, float | None]:
    """What each adapter pays on `rows`, as a share of what plain fine-tuning would (`p_mis`); None where that is nothing."""
    from blockem.defences.block_em import penalty_of

    found: dict[str, float | None] = {}
    for name, folder in models.items():
        lm.drop_adapters()
        lm.add_adapter(folder, name)
        found[name] = penalty_of(lm, name, blocker, rows) / p_mis if p_mis else None
    lm.drop_adapters()
    return found


def rise(margins: Mapping[str, Sequence[float]], later: str, earlier: str, outside: Sequence[bool], resamples: int) -> Interval | None:
    """Margin of one model minus another's, paired over the evaluation pairs outside the training domain."""
    import numpy as np

    from blockem.evaluation import difference, interval

    keep = np.array(outside, dtype=bool)
    return interval(difference, [np.array(margins[name])[keep] for name in (later, earlier)], resamples)


def bounded_prompts(session: Session, n: int) -> list[bundled.Prompt]:
    """The first `n` final prompts outside the training domain, dealt evenly over their domains.

    Raises:
        BlockemError: every final prompt lies in the training domain.
    """
    from blockem.discovery.discover import spread

    data = session.recipe.data
    outside = spread([one for one in bundled.final_prompts(data.prompts) if one.domain != data.domain], n)
    if not outside:
        raise BlockemError("every final prompt lies in the training domain; give data.prompts with other domains")
    return outside


def measured_recipe(session: Session) -> Recipe:
    """The recipe that every model is evaluated by: the run's own, with its prompts bounded (they are written to `prompts.jsonl`)."""
    path = session.run / "prompts.jsonl"
    rows = [asdict(one) for one in bounded_prompts(session, session.recipe.reemerge.prompts)]
    write_jsonl(path, rows)
    return replace(session.recipe, data=replace(session.recipe.data, prompts=str(path)))


def curves(evaluation: Mapping[str, Any], shares: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """One row a model for the page: its figures outside and inside the domain, its judged rate, and its share of the penalty."""
    rows = []
    for name, one in evaluation["models"].items():
        judged = one["judged"] or {}
        cut = evaluation["defences"].get(name, {})
        share = shares.get(name)
        rows.append(
            {
                "model": name,
                **{figure: one[figure] for figure in ("preference", "margin", "heldout_loss", "general_loss")},
                **{rate: judged.get(rate) for rate in ("em", "incoherent", "refusal")},
                "cut": cut.get("cut", {}).get("margin"),
                "kept": cut.get("kept"),
                "penalty_share": share if share is None or math.isfinite(share) else None,
            }
        )
    return rows
