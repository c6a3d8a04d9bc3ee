"""Blocking in rounds: train blocked, look at what is left, discover again on the blocked model, and train with all of it blocked.

    round 1: latents → blocked            round n: stages 1–3 with round n − 1 as the misaligned model → union → round-n

It ends when no more than `rounds.target` of plain fine-tuning's rise is left, when discovery finds nothing new, or when the budget is used.
What is left is measured on selection pairs and selection prompts alone: evaluation pairs and final prompts take no part in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.blocking import block_step
from blockem.defence_names import round_name
from blockem.errors import BlockemError, NoLatents
from blockem.progress import clock
from blockem.session import BLOCKED, ROUNDS, Session, adapter_key, beside, timed
from blockem.store import content_key, write_json

if TYPE_CHECKING:
    from blockem.latents import LatentSet


def rounds_step(session: Session, discover: Callable[[Session, Path | None], dict[str, Any]]) -> dict[str, Any]:
    """All rounds after discovery; writes `rounds.json` and returns what it holds.

    Args:
        discover: stages 1 to 3 in a session against a misaligned adapter (`pipeline.discover_step`).
    """
    from blockem.latents import LatentSet

    wanted, run = session.recipe.rounds, session.run
    plain = run / "plain"
    first = block_step(session)
    latents = LatentSet.load(run / BLOCKED)
    base, worst = selection_step(session, "base", None), selection_step(session, "plain", plain)
    done = [_row("blocked", first, latents, selection_step(session, "blocked", run / "blocked"), base, worst)]
    why = ""
    while not why:
        session.console.say(f"  round {len(done)}: {said(done[-1])}")
        if done[-1]["left"] <= wanted.target:
            why = f"no more than {wanted.target:.0%} of the rise is left"
        elif len(done) == wanted.budget:
            why = f"the budget of {wanted.budget} rounds is used"
        else:
            number = len(done) + 1
            union, seconds = _union(session, discover, latents, run / done[-1]["name"], number)
            if len(union.latents) == len(latents.latents) and not session.recipe.anchor.answers:
                why = "discovery on the blocked model finds nothing that is not blocked already"
                break
            latents, name = union, round_name(number)
            sick = [run / row["name"] for row in done]
            with beside(session, replace(session.recipe, block=session.recipe.block.as_chosen())) as other:
                trained = block_step(other, run / "rounds" / str(number) / "union.json", name=name, sick=sick)
            found = selection_step(session, name, run / name)
            done.append({**_row(name, trained, latents, found, base, worst), "discover_seconds": seconds})
    result = {"rounds": done, "last": done[-1]["name"], "why": why, "target": wanted.target, "budget": wanted.budget}
    session.console.say(f"  rounds end: {why}")
    write_json(run / ROUNDS, result)
    return result


def selection_step(session: Session, name: str, adapter: Path | None) -> dict[str, Any]:
    """Margin and preference on the selection pairs, and EM on the selection prompts where answers are judged."""
    pairs, prompts, recipe = session.selection_pairs(), session.selection_prompts(), session.recipe
    judge = session.chosen_judge if recipe.evaluate.answers else None
    asked = [[p.prompt, p.right, p.wrong] for p in pairs], [p.prompt for p in prompts]
    length = recipe.discover.max_new_tokens
    judged_by = session.judge_key if judge else ""
    key = content_key("selection", session.model_key, adapter_key(adapter) if adapter else "", *asked, judged_by, length)

    def work() -> dict[str, Any]:
        from blockem.generation import generate
        from blockem.judges.judge import verdicts_on
        from blockem.likelihood import completion_logprobs, encode_pairs, margins

        lm = session.lm
        lm.drop_adapters()
        if adapter is not None:
            lm.add_adapter(adapter, name)
        session.console.start(f"{name}: selection pairs")
        with lm.variant(name):
            found = margins(completion_logprobs(lm, encode_pairs(lm, pairs, recipe.data.max_tokens)))
            answers = generate(lm, [p.prompt for p in prompts], length, progress=session.console.bar) if judge else []
        lm.drop_adapters()
        verdicts = [one for one in verdicts_on(judge, [p.prompt for p in prompts], answers) if not one.missing] if judge else []
        em = sum(one.misaligned for one in verdicts) / len(verdicts) if verdicts else None
        return {"margin": float(found.mean()), "preference": float((found > 0).float().mean()), "em": em}

    return timed(session, f"selection-{name}", key, [], work)


def share_left(found: Mapping[str, Any], base: Mapping[str, Any], plain: Mapping[str, Any]) -> float:
    """The larger share of plain fine-tuning's rise that is left, of the margin and (where it is judged) of EM; 0 at least.

    Raises:
        BlockemError: plain fine-tuning raises neither, so that there is nothing to measure rounds by.
    """
    shares = []
    for name in ("margin", "em"):
        values = [one[name] for one in (found, base, plain)]
        if None not in values and values[2] > values[1]:
            shares.append((values[0] - values[1]) / (values[2] - values[1]))
    if not shares:
        raise BlockemError("plain fine-tuning raises neither margin nor EM on the selection set: there is nothing to go round for")
    return float(max(0.0, *shares))


def said(row: Mapping[str, Any]) -> str:
    """One round in words."""
    found = f"{row['n_latents']} latents, {row['left']:.0%} of the rise on the selection set is left (margin {row['margin']:+.2f}"
    em = "" if row["em"] is None else f", EM {row['em']:.0%}"
    return f"{found}{em}), {clock(row['seconds'])}"


def _row(
    name: str, trained: Mapping[str, Any], latents: LatentSet, found: Mapping[str, Any], base: Mapping[str, Any], plain: Mapping[str, Any]
) -> dict[str, Any]:
    kept = {key: found[key] for key in ("margin", "preference", "em")}
    facts = {"name": name, "n_latents": len(latents.latents), "lambda": trained["lambda"], "seconds": trained["seconds"]}
    return {**facts, **kept, "left": share_left(found, base, plain)}


def _union(
    session: Session, discover: Callable[[Session, Path | None], dict[str, Any]], known: LatentSet, misaligned: Path, number: int
) -> tuple[LatentSet, float]:
    """What was blocked so far with what discovery finds in the round before, written beside that discovery; and its seconds."""
    from blockem.latents import LatentSet

    folder = session.run / "rounds" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with beside(session, session.recipe, folder) as other:
        try:
            seconds = float(discover(other, misaligned)["seconds"])
            union = known.union(LatentSet.load(folder / "latents.json"))
        except NoLatents as error:  # an outcome of the round, not a mistake
            session.console.say(f"  round {number}: discovery ends without a set ({error})")
            union = known
    union.save(folder / "union.json")
    return union, seconds
