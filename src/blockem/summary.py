"""`summary.json`: everything that a run folder holds, for the report and for whoever reads it next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.errors import BlockemError, reason
from blockem.examples import read_rows
from blockem.session import ROUNDS, VARIANTS, Session, environment
from blockem.several_blocks import block_folder
from blockem.store import read_json, write_json

if TYPE_CHECKING:
    from blockem.config import SaeConfig


def write_summary(session: Session) -> dict[str, Any]:
    """Gather everything the run folder holds into `summary.json`."""
    run, recipe = session.run, session.recipe

    def record(step: str) -> dict[str, Any]:
        return _result(run / "steps" / f"{step}.json")

    def rows(name: str) -> list[dict[str, Any]]:
        return [row for _, row in read_rows(run / f"training-{name}.jsonl")]

    evaluation = read_json(run / "evaluation.json", "evaluation (run `blockem evaluate` first)")
    with made_by_blockem(run / "evaluation.json"):
        _ = evaluation["models"]["base"]
    cards = _by_latent(run / "cards.json")
    latents = _latents(run / "latents.json")
    sft, blocked, discovered = record("plain"), record("blocked"), record("discover")
    facts = {k: v for k, v in blocked.items() if k not in ("data", "task", "seconds", "base_values_seconds")}
    summary = {
        "blockem": version("blockem"),
        "recipe": recipe.to_dict(),
        "training_domain": recipe.data.domain,
        "environment": {**environment(session), "model": recipe.model.id, "model_key": session.model_key},
        "data": {"train": sft.get("data", {})},
        "sae": {k: v for k, v in record("sae").items() if k != "seconds"},
        **evaluation,
        "latents": [{**one, **cards.get(one["latent"], {})} for one in latents],
        "discovery": discovered.get("counts", {}),
        **({"further_blocks": [_found_at(session, sae) for sae in recipe.sae.each[1:]]} if recipe.sae.more else {}),
        "training": {name: rows(name) for name in VARIANTS[1:] if (run / f"training-{name}.jsonl").is_file()},
        "blocking": facts,
        **({"rounds": read_json(run / ROUNDS)} if recipe.rounds.budget > 1 and (run / ROUNDS).is_file() else {}),
        **({"defences_used": used} if (used := _defences_used(session, record)) else {}),
        **({"audit": read_json(run / "audit.json", "audit")} if (run / "audit.json").is_file() else {}),
        "seconds": {
            step: record(step).get("seconds")
            for step in ("sae", "plain", "discover", *VARIANTS[2:], *(f"evaluate-{n}" for n in VARIANTS), "audit")
            if record(step)
        },
    }
    write_json(run / "summary.json", summary)
    return summary


@contextmanager
def made_by_blockem(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the content of a run's file into a sentence that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{path}: not what blockem writes there ({reason(error)})"
        raise BlockemError(f"{what}; remove it and run the step that makes it again") from error


def _result(path: Path) -> dict[str, Any]:
    """The result of a step's record; empty where there is none."""
    if not path.is_file():
        return {}
    with made_by_blockem(path):
        found: dict[str, Any] = read_json(path, "step record")["result"]
        return dict(found)


def _latents(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with made_by_blockem(path):
        return [{**one, "latent": int(one["latent"])} for one in read_json(path, "LatentSet")["latents"]]


def _by_latent(path: Path) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    with made_by_blockem(path):
        return {card["latent"]: {name: value for name, value in card.items() if name != "latent"} for card in read_json(path, "cards")}


def _found_at(session: Session, sae: SaeConfig) -> dict[str, Any]:
    """What the run holds of one of the further SAEs: its fit, the latents that passed, and the counts of the stages."""
    folder = block_folder(session, sae)
    fit, found = (_result(folder / "steps" / f"{step}.json") for step in ("sae", "discover"))
    passed = (folder / "latents.json").is_file()
    latents = _latents(folder / "latents.json")
    return {
        "block": sae.block,
        "sae": {k: v for k, v in fit.items() if k != "seconds"},
        "latents": latents,
        "discovery": found.get("counts", {}) if passed else {},
    }


def _defences_used(session: Session, record: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What each defence but block-em was run with, by the model's name, where the run folder holds one."""
    found = {name: record(name) for name in session.variants() if "defence" in record(name)}
    return {name: {k: v for k, v in facts.items() if k not in ("data", "task", "seconds")} for name, facts in found.items()}
