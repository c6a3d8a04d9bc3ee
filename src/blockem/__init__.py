"""blockem: stop a fine-tuned language model from turning broadly misaligned.

`blockem.run(recipe, folder)` does the whole job; every part can also be had by itself. Names are loaded when they are first used, so
that `import blockem` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockem.config import Recipe, load_recipe
    from blockem.defences.block_em import Blocker, block_loss
    from blockem.dictionary import load_dictionary
    from blockem.errors import BlockemError
    from blockem.latents import Latent, LatentSet
    from blockem.model import load_model

_HOMES = {
    "BlockemError": "errors",
    "Blocker": "defences.block_em",
    "Latent": "latents",
    "LatentSet": "latents",
    "Recipe": "config",
    "block_loss": "defences.block_em",
    "load_dictionary": "dictionary",
    "load_model": "model",
    "load_recipe": "config",
}

__all__ = [
    "BlockemError",
    "Blocker",
    "Latent",
    "LatentSet",
    "Recipe",
    "block_loss",
    "load_dictionary",
    "load_model",
    "load_recipe",
    "run",
]


def run(recipe: Recipe, out: str, quiet: bool = False, judge: Any = None) -> dict[str, Any]:
    """Run every stage of a recipe into the folder `out` and return the summary; the same call again continues there.

    Args:
        recipe: what to run, e.g. `Recipe().with_values({"data.domain": "finance"})`.
        out: run folder; `report.html` and `summary.json` end up in it.
        quiet: no progress on stderr.
        judge: anything with the interface of `blockem.judges.Judge`; its rates then stand beside the preference.

    Raises:
        BlockemError: bad input, in one sentence.
    """
    from blockem.pipeline import open_session, run_all

    return run_all(open_session(recipe, out, quiet, judge))


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"blockem.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'blockem' has no attribute {name!r}")
