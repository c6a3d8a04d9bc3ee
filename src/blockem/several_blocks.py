"""SAEs at several blocks (`sae.more`): a session on each of them, and stages 1 to 3 at each.

What belongs to `sae.block` lies in the run folder itself, what belongs to another block in `blocks/<block>` of it, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.errors import BlockemError, NoLatents
from blockem.session import Session, beside
from blockem.store import write_json

if TYPE_CHECKING:
    from blockem.config import SaeConfig

NONE = "no-latents"
"""The step that records a discovery which ended without a set, so that it is not done again."""
DISCOVERED = ("latents.json", "latents.csv", "cards.json", "deltas.safetensors")


@contextmanager
def at_block(session: Session, sae: SaeConfig) -> Iterator[Session]:
    """The session on one of `recipe.sae.each`: for `sae.block` the run's own."""
    if sae.block == session.recipe.sae.block:
        yield session
        return
    folder = block_folder(session, sae)
    folder.mkdir(parents=True, exist_ok=True)
    with beside(session, replace(session.recipe, sae=sae), folder) as other:
        other.run = replace(session.run, path=folder)  # of the same kind: a comparison's cells share steps
        yield other


def block_folder(session: Session, sae: SaeConfig) -> Path:
    """Where the files of one of `recipe.sae.each` lie."""
    return session.run.path if sae.block == session.recipe.sae.block else session.run / "blocks" / str(sae.block)


def at_each(session: Session, step: Callable[[Session], Any]) -> list[Any]:
    """A step at every block of the recipe, `sae.block` first."""
    found = []
    for sae in session.recipe.sae.each:
        if session.recipe.sae.more:
            session.console.say(f"block {sae.block}, {sae.id}")
        with at_block(session, sae) as here:
            found.append(step(here))
    return found


def discover_each(session: Session, key: Callable[[Session], str], discover: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
    """Stages 1 to 3 at every block; a block at which no latent passes is left out.

    Args:
        key: what a discovery in a session depends on.
        discover: stages 1 to 3 in a session.

    Returns:
        What each block's discovery found, by block (`why` where it ends without a set).

    Raises:
        BlockemError: no block has a set.
    """

    def attempt(here: Session) -> dict[str, Any]:
        wanted = key(here)
        record = here.run.finished(NONE, wanted, [])
        found: dict[str, Any] = record["result"] if record else {}
        if not found:
            try:
                return discover(here)
            except NoLatents as error:
                for name in (*DISCOVERED, "steps/discover.json"):  # of another recipe
                    (here.run / name).unlink(missing_ok=True)
                found = {"why": str(error)}
                write_json(here.run / "steps" / f"{NONE}.json", {"step": NONE, "key": wanted, "outputs": [], "result": found})
        here.console.say(f"  block {here.recipe.sae.block} is left out: {found['why']}")
        return found

    blocks = [sae.block for sae in session.recipe.sae.each]
    results = dict(zip(map(str, blocks), at_each(session, attempt), strict=True))
    if all("why" in one for one in results.values()):
        why = results[str(blocks[0])]["why"]
        raise BlockemError(f"no latent passes at any of blocks {', '.join(map(str, blocks))}; at block {blocks[0]}: {why}")
    return {"blocks": results}


def set_files(session: Session) -> dict[int, Path]:
    """The LatentSets that discovery left, by block in the recipe's order, without blocks at which no latent passed.

    Raises:
        BlockemError: a block was not discovered yet, or none has a set.
    """
    found = {}
    for sae in session.recipe.sae.each:
        folder = block_folder(session, sae)
        if (folder / "latents.json").is_file():
            found[sae.block] = folder / "latents.json"
        elif not (folder / "steps" / f"{NONE}.json").is_file():
            raise BlockemError(f"{folder / 'latents.json'}: no such LatentSet; run `blockem discover` with this recipe first")
    if not found:
        raise BlockemError(f"{session.run.path} holds no LatentSet at any block: no latent passed; change discover.*, or the SAEs")
    return found
