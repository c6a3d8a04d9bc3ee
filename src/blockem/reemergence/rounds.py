"""`blockem reemerge`, from file to file: train on until misalignment comes back, ask where it came back, block that too, train again.

    plain, latents → blocked for N epochs → audit, patching, decoding, drift → verdicts
                   → stages 1–3 against the re-emerged model → union of the latent sets → blocked for N epochs → evaluation → page

Each step has a key over what it depends on and is done once, as in `pipeline.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.errors import BlockemError, NoLatents
from blockem.pipeline import discover_step, evaluate_step, sae_step, start_run
from blockem.reemergence.epochs import adapters, bounded_prompts, curves, measured_recipe, rise, train_epochs
from blockem.reemergence.measures import Inputs, audit_step, decoding_step, drift_step, patching_step, penalties_step
from blockem.session import BLOCKED, Session, adapter_key, beside, last_blocked, taken_file, trained_in
from blockem.store import read_json, strict, write_json
from blockem.trainings import sft_step

if TYPE_CHECKING:
    from blockem.evaluation import Interval
    from blockem.latents import LatentSet
    from blockem.reemergence.verdict import Hypothesis

FOUND = "latents.json"
"""What discovery found, of which a training takes what block.select, size and signs leave."""


def reemerge(session: Session, source: Path | None = None, retrain: bool = True) -> dict[str, Any]:
    """Every step in order; returns what `reemergence.json` holds, which `reemergence.html` shows.

    Args:
        source: a finished run folder to start from, which stays as it is; without one, plain fine-tuning and discovery are done here.
        retrain: go on to the union of the latent sets.

    Raises:
        BlockemError: bad input, in one sentence.
    """
    from blockem.latents import LatentSet
    from blockem.report.reemergence import render_reemergence

    recipe = session.recipe
    if recipe.block.directions:
        raise BlockemError("blockem reemerge unites latent sets, and block.directions blocks none; set block.directions=0")
    if recipe.sae.more:
        raise BlockemError("blockem reemerge follows what is blocked at one block; leave sae.more out of the recipe")
    if source is not None and source.resolve() == session.run.path.resolve():
        raise BlockemError(f"--out is the run folder {source} itself, whose models would be overwritten; choose another --out")
    with session.run.locked():
        if source is not None:
            _check_source(source)
        start_run(session)
        bounded_prompts(session, 1)
        _check_blocks(session)
        inputs = _inputs(session, source)
        used_before = inputs.latents.name != FOUND
        blocked = train_epochs(session, inputs.latents, inputs.plain, chosen=used_before)
        inputs = replace(inputs, latents=session.run / BLOCKED)  # what block.select, size and signs left of the set
        latents = LatentSet.load(inputs.latents)
        models = adapters(session.run.path, recipe.reemerge.epochs, "epoch")
        last = list(models.values())[-1]
        shares = penalties_step(session, "penalties", session.run.path, models, _paid(blocked))
        found = {
            "audit": audit_step(session, inputs, latents, models),
            "patching": patching_step(session, inputs, last),
            "decoding": decoding_step(session, inputs, last),
            "drift": drift_step(session, inputs, models),
        }
        again: dict[str, Any] | None = None
        if retrain:
            again = _again(session, inputs, latents, last)
            if "why" not in again:
                folder = session.run / "again"
                more = adapters(folder, recipe.reemerge.epochs, "union")
                shares |= penalties_step(session, "penalties-union", folder, more, again["p_mis"])
                models |= more
        evaluation, margins = _evaluate(session, inputs, models)
        result = _gather(session, inputs, source, found, again, evaluation, margins, shares)
        write_json(session.run / "reemergence.json", result)
        render_reemergence(session.run.path)
    return result


def _check_source(source: Path) -> None:
    """Raise before any long work where the run folder lacks what is started from."""
    adapter_key(source / "plain")
    if not (source / "latents.json").is_file():
        raise BlockemError(f"{source} holds no latents.json; run `blockem discover` there first")


def _check_blocks(session: Session) -> None:
    wanted = session.recipe.reemerge
    for name in ("patch_blocks", "decode_blocks"):
        wrong = [block for block in getattr(wanted, name) if not 0 <= block < session.lm.n_blocks]
        if wrong:
            raise BlockemError(f"reemerge.{name} names block {wrong[0]}, but {session.lm.id} has blocks 0 to {session.lm.n_blocks - 1}")


def _inputs(session: Session, source: Path | None) -> Inputs:
    sae_step(session)
    if source is None:
        sft_step(session)
        discover_step(session)
        latents, plain, blocked = session.run / FOUND, session.run / "plain", None
    else:
        last = last_blocked(session.recipe, source)
        used, blocked = source / taken_file(last), trained_in(source).get(last)
        latents, plain = used if used.is_file() else source / FOUND, source / "plain"
    block: int = read_json(latents, "LatentSet")["block"]
    return Inputs(plain, latents, blocked, block)


def _again(session: Session, inputs: Inputs, latents: LatentSet, last: Path) -> dict[str, Any]:
    """Stages 1 to 3 against the re-emerged model, the union, and the blocked training on it; `why` where there is nothing more to block."""
    from blockem.latents import LatentSet

    folder = session.run / "again"
    folder.mkdir(exist_ok=True)
    with beside(session, session.recipe, folder) as other:
        try:
            discover_step(other, last)
        except NoLatents as error:  # an outcome, not a mistake
            return {"why": f"the second discovery ends without a set: {error}"}
    new = LatentSet.load(folder / "latents.json")
    union = latents.union(new)
    counts = {"first": len(latents.latents), "second": len(new.latents), "union": len(union.latents), "added": union.provenance["added"]}
    facts = {**counts, "conflicts": union.provenance["conflicts"]}
    union.save(folder / "union.json")
    if not facts["added"]:
        return {**facts, "why": "the second discovery names only latents that are blocked already"}
    trained = train_epochs(session, folder / "union.json", inputs.plain, folder, chosen=True)
    return {**facts, "lambda": trained["lambda"], "p_mis": _paid(trained)}


def _paid(trained: Mapping[str, Any]) -> float | None:
    """What plain fine-tuning would pay for all that a training blocked in the end."""
    found: float | None = trained.get("p_mis_grown", trained["p_mis"])
    return found


def _evaluate(session: Session, inputs: Inputs, models: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """All models on the same items: the evaluation, and each model's margins."""
    chosen = {"plain": inputs.plain, **({"blocked": inputs.blocked} if inputs.blocked else {}), **models}
    with beside(session, measured_recipe(session)) as measured:
        evaluate_step(measured, chosen)
    margins = {name: read_json(session.run / "steps" / f"evaluate-{name}.json")["result"]["margins"] for name in ("base", *chosen)}
    return read_json(session.run / "evaluation.json", "evaluation"), margins


def _gather(
    session: Session,
    inputs: Inputs,
    source: Path | None,
    found: dict[str, Any],
    again: dict[str, Any] | None,
    evaluation: dict[str, Any],
    margins: dict[str, list[float]],
    shares: dict[str, float | None],
) -> dict[str, Any]:
    from blockem.reemergence.verdict import reemergence, retraining

    recipe = session.recipe
    n = recipe.reemerge.epochs
    outside = [p.domain != recipe.data.domain for p in bundled.evaluation_pairs(recipe.data.pairs)]

    def change(later: str, earlier: str) -> Interval | None:
        return rise(margins, later, earlier, outside, recipe.evaluate.resamples)

    came_back = change(f"epoch{n}", "epoch1")
    if again is not None and "why" not in again:
        moved = change(f"union{n}", f"epoch{n}")
        again = {**again, "change": asdict(moved) if moved else None, "said": retraining(moved, again["added"])}
    gathered: dict[str, Any] = strict(
        {
            "blockem": version("blockem"),
            "recipe": recipe.to_dict(),
            "training_domain": recipe.data.domain,
            "source": None if source is None else str(source),
            "model": recipe.model.id,
            "block": inputs.block,
            "epochs": n,
            "said": reemergence(came_back, n),
            "rise": asdict(came_back) if came_back else None,
            "hypotheses": [one.to_dict() for one in _verdicts(session, inputs, found, f"epoch{n}")],
            "models": curves(evaluation, shares),
            **found,
            "union": again,
        }
    )
    return gathered


def _verdicts(session: Session, inputs: Inputs, found: dict[str, Any], last: str) -> list[Hypothesis]:
    from blockem.reemergence.verdict import Evidence, weigh

    patched, drifted, audited = found["patching"]["reemerged"], found["drift"][last], found["audit"]
    shifts, route = audited["shifts"][last], audited["rerouting"].get(last, {})
    later = inputs.block < shifts[-1]["block"]
    return weigh(
        Evidence(
            gap=_interval(patched["gap"]),
            fall=_interval(drifted["fall"]),
            cosine=drifted["cosine"],
            upstream=_interval(patched["upstream"]),
            downstream=_interval(patched["downstream"]),
            difference=_interval(patched["difference"]),
            held=_number(route.get("blocked")),
            off_k=_number(route.get("off_k")),
            here=shifts[inputs.block]["along"],
            last=shifts[-1]["along"] if later else None,
            frozen=session.recipe.block.freeze_downstream and later,
            block=inputs.block,
            after=shifts[-1]["block"] - inputs.block,
        )
    )


def _number(value: float | None) -> float | None:
    """The number, unless it is none (a latent set that plain fine-tuning does not move has no share)."""
    return value if value is not None and math.isfinite(value) else None


def _interval(row: dict[str, Any] | None) -> Interval | None:
    from blockem.evaluation import Interval

    return Interval(**row) if row else None
