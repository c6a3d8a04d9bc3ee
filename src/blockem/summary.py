"""`summary.json`: everything that a run folder holds, for the report and for whoever reads it next."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from blockem.session import ROUNDS, VARIANTS, Session, environment
from blockem.several_blocks import block_folder
from blockem.store import read_json, write_json

if TYPE_CHECKING:
    from blockem.config import SaeConfig


def write_summary(session: Session) -> dict[str, Any]:
    """Gather everything the run folder holds into `summary.json`."""
    run, recipe = session.run, session.recipe

    def record(step: str) -> dict[str, Any]:
        path = run / "steps" / f"{step}.json"
        found: dict[str, Any] = read_json(path)["result"] if path.is_file() else {}
        return found

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (run / f"training-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    evaluation = read_json(run / "evaluation.json", "evaluation (run `blockem evaluate` first)")
    cards = {card["latent"]: card for card in read_json(run / "cards.json")} if (run / "cards.json").is_file() else {}
    latents = read_json(run / "latents.json")["latents"] if (run / "latents.json").is_file() else []
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
        "latents": [{**one, **{k: v for k, v in cards.get(one["latent"], {}).items() if k != "latent"}} for one in latents],
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


def _found_at(session: Session, sae: SaeConfig) -> dict[str, Any]:
    """What the run holds of one of the further SAEs: its fit, the latents that passed, and the counts of the stages."""
    folder = block_folder(session, sae)
    records = {step: folder / "steps" / f"{step}.json" for step in ("sae", "discover")}
    fit, found = (read_json(path)["result"] if path.is_file() else {} for path in records.values())
    passed = (folder / "latents.json").is_file()
    latents = read_json(folder / "latents.json")["latents"] if passed else []
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
