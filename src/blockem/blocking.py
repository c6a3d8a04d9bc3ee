"""The blocked training of a run, from file to file: what is blocked, with which λ, and what watches beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.anchoring import interleaving, make_anchor, prepare_anchor
from blockem.errors import BlockemError
from blockem.session import BLOCKED, Session, adapter_key, existing, source_key, taken_file
from blockem.several_blocks import at_block, block_folder, set_files
from blockem.store import content_key, file_key
from blockem.trainings import train_step

if TYPE_CHECKING:
    from blockem.config import SaeConfig
    from blockem.defences.block_em import BlockEM, Blocker
    from blockem.defences.defence import Defence
    from blockem.defences.watchdog import Watchdog
    from blockem.dual import DualAscent, PlainCurve
    from blockem.examples import Encoded
    from blockem.latents import LatentSet

MONITORED_ROWS = 16
"""Held-out rows that the monitor looks at: about 700 answer tokens, a fraction of a training step."""


def block_step(
    session: Session,
    latents_file: Path | None = None,
    misaligned: Path | None = None,
    keep_epochs: bool = False,
    name: str = "",
    sick: Sequence[Path] = (),
) -> dict[str, Any]:
    """Fine-tune again with the latents blocked; under `block.control: random`, with matched random ones; or with directions blocked.

    With `sae.more` the sets of all its blocks are blocked together, with one λ; `latents_file` is that of `sae.block`.

    The adapter goes to `blocked` (or `random`). The portable λ and directions need the misaligned adapter, to see what it gained and would
    pay, and how it moves the stream. With `keep_epochs` the adapter of each epoch stays in
    `blocked/epoch-1`, … A later round has a `name` of its own, and anchors also against what the blocked models before it (`sick`) say.
    """
    from blockem.latents import LatentSet

    recipe = session.recipe
    config = recipe.block
    name = name or ("random" if config.control == "random" else "blocked")
    by_rule = config.lambda_ is None
    adapter = misaligned or session.run / "plain"
    matched = name == "random" and not by_rule and (adapter / "adapter_model.safetensors").is_file()
    files = {} if config.directions else _set_files(session, latents_file)
    sets = {block: LatentSet.load(path) for block, path in files.items()}
    if recipe.sae.more and (wrong := [(block, one.block) for block, one in sets.items() if one.block != block]):
        raise BlockemError(f"{files[wrong[0][0]]} is a set of block {wrong[0][1]}, not of block {wrong[0][0]}; give that of sae.block")
    if config.monitor_every and recipe.sae.block not in files:
        raise BlockemError(f"block.monitor_every watches block {recipe.sae.block}, where no latent passed; set block.monitor_every=0")
    first, *further = (_set_parts(session, sae, files.get(sae.block), name == "random") for sae in recipe.sae.each)
    extra = content_key(  # in the order that a key of one set has always had
        *first[:2],
        asdict(config),
        adapter_key(adapter) if by_rule or config.directions or config.follows or matched else "",
        *first[2:],
        prepare_anchor(session, adapter, name, sick),
        *further,
        *(_monitor_parts(session) if config.monitor_every else ()),
    )

    def make(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        from blockem.defences.block_em import BlockEM, matched_lambda, penalty_of, portable_lambda
        from blockem.defences.together import Together
        from blockem.likelihood import losses_under

        lm = session.lm
        sample = rows[: config.rule_rows]
        lm.drop_adapters()
        if (adapter / "adapter_model.safetensors").is_file():
            lm.add_adapter(adapter, "plain")
        if config.directions:
            blocker, what, count = _direction_blocker(session, sample)
        else:
            blocker, what, count = _latent_blocker(session, sets, name)
        blocker.two_sided, blocker.tokens = config.two_sided, config.tokens
        facts: dict[str, Any] = {
            "lambda": config.lambda_,
            "rule": "given" if not by_rule else "r · ΔSFT / P_mis",
            "r": config.r if by_rule else None,
            "delta_sft": None,
            "p_mis": None,
            "freeze_downstream": config.freeze_downstream,
            "n_latents": count,
            "blocks": blocker.blocks,
        }
        if recipe.sae.more:
            facts["n_by_block"] = {str(watch.block): len(watch.signs) for watch in blocker.watches}
        losses: dict[str, float] = {}
        paid_by_set: float | None = None
        if "plain" in getattr(lm.model, "peft_config", {}):
            losses = losses_under(lm, sample, ("base", "plain"))
            facts["delta_sft"] = losses["base"] - losses["plain"]
            facts["p_mis"] = penalty_of(lm, "plain", blocker, sample)
            if matched:
                paid_by_set = penalty_of(lm, "plain", _latent_blocker(session, sets, None)[0], sample)
            lm.drop_adapters()
        if by_rule:
            facts["lambda"] = portable_lambda(config.r, facts["delta_sft"], facts["p_mis"])
        elif paid_by_set is not None:
            facts |= {"lambda": matched_lambda(config.lambda_ or 0.0, paid_by_set, facts["p_mis"]), "p_mis_matched": paid_by_set}
            facts["rule"] = "given, times P_mis of the set / P_mis of the random latents"
        elif name == "random":
            session.console.say("  note: there is no plain fine-tune to weigh the random latents with, so λ is as given")
        if config.base_values == "cached":
            facts["base_values_seconds"] = _keep_base_values(session, name, blocker, rows)
        session.console.say(f"  λ = {facts['lambda']:.4g} ({facts['rule']}), {what}")
        ascent, curve = _ascent(session, facts, losses.get("base"), adapter)
        blocking = BlockEM(blocker, facts["lambda"], config.freeze_downstream, facts["p_mis"], ascent, curve)
        parts: list[Defence] = [blocking]
        if config.monitor_every:
            parts.append(_watchdog(session, name, blocking, adapter, sample, facts))
        if recipe.anchor.watch != "none":
            anchor, facts["anchor"] = make_anchor(session, adapter, name, facts["delta_sft"] or 0.0, blocker)
            parts.append(anchor)
        return Together(parts) if len(parts) > 1 else parts[0], facts

    return train_step(session, name, extra, make, rewrite=interleaving(session), keep_epochs=keep_epochs)


def _monitor_parts(session: Session) -> list[str]:
    """What a training with the monitor depends on besides: the rows that it looks at, and the pairs whose margin growing raises."""
    data = session.recipe.data
    return [content_key("monitor", session.heldout_key, data.domain, data.heldout_rows, source_key(data.pairs, "pairs.jsonl"))]


def _ascent(session: Session, facts: dict[str, Any], start: float | None, adapter: Path) -> tuple[DualAscent | None, PlainCurve | None]:
    """What lets λ follow a ceiling or a floor, where the recipe states one; `facts` then say so.

    Args:
        start: the base's loss per token on training rows.
        adapter: the plain fine-tune, with the log of its training beside it.
    """
    from blockem.dual import DualAscent, PlainCurve

    config = session.recipe.block
    target = config.ceiling or config.floor
    if target is None:
        return None, None
    if not facts["lambda"] > 0 or start is None or not facts["p_mis"]:
        raise BlockemError("a λ that follows needs the plain fine-tune, to see what it gains and would pay; run `blockem sft` first")
    facts["target"] = {"ceiling": config.ceiling} if config.ceiling else {"floor": config.floor}
    curve = None
    if config.floor:
        path = adapter.parent / f"training-{adapter.name}.jsonl"
        if not path.is_file():
            raise BlockemError(f"{path}: no such file; block.floor compares with plain fine-tuning's own losses, run `blockem sft` first")
        curve = PlainCurve(start, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    return DualAscent(facts["lambda"], target, floor=config.floor is not None), curve


def _watchdog(session: Session, name: str, blocking: BlockEM, adapter: Path, sample: Sequence[Encoded], facts: dict[str, Any]) -> Watchdog:
    """The monitor beside a training. Whenever it adds latents, `grown` of the facts gets a row, the set beside the adapter is written anew,
    and P_mis, to which a ceiling relates the penalty, grows by what plain fine-tuning would pay for them on `sample`.
    """
    from blockem.defences.block_em import paid_by_latent
    from blockem.defences.watchdog import Watchdog
    from blockem.discovery.attribution import margin_gradient
    from blockem.latents import Latent, LatentSet
    from blockem.reemergence.monitor import Monitor

    recipe, lm = session.recipe, session.lm
    config = recipe.block
    if not (adapter / "adapter_model.safetensors").is_file():
        raise BlockemError("block.monitor_every compares with plain fine-tuning, and there is none; run `blockem sft` first")
    rows = session.heldout(MONITORED_ROWS)
    lm.drop_adapters()
    lm.add_adapter(adapter, "plain")
    gradient = margin_gradient(lm, session.selection_pairs(), recipe.sae.block, "plain") if config.grow else None
    monitor = Monitor(lm, rows, recipe.sae.block, session.dictionary, gradient)
    paid = paid_by_latent(lm, "plain", blocking.blocker, monitor.encoder, monitor.block, sample) if config.grow else None
    lm.drop_adapters()
    facts["grown"] = []
    file = session.run / taken_file(name)
    blocked = LatentSet.load(file)

    def added(step: int, new: list[tuple[int, int]]) -> None:
        facts["grown"].append({"step": step, "latents": [list(one) for one in new]})
        if paid is not None and blocking.p_mis is not None:
            blocking.p_mis += sum(float(paid[0 if sign > 0 else 1, k]) for k, sign in new)
            facts["p_mis_grown"] = blocking.p_mis
        known = LatentSet.load(file)
        replace(known, latents=known.latents + tuple(Latent(k, sign) for k, sign in new if k not in known.ids)).save(file)

    pairs = list(zip(blocked.ids, blocked.signs, strict=True))
    return Watchdog(blocking.blocker, monitor, session.dictionary, pairs, config.monitor_every, config.grow, session.console.say, added)


def _set_files(session: Session, given: Path | None) -> dict[int, Path]:
    """The LatentSets that are blocked, by block; `given` is that of `sae.block`."""
    sae = session.recipe.sae
    own = {sae.block: given or session.run / "latents.json"}
    if sae.more:
        return {**set_files(session), **(own if given else {})}
    if not own[sae.block].is_file():
        raise BlockemError(f"{own[sae.block]}: no such LatentSet; run `blockem discover` first, or give one with --latents")
    return own


def _set_parts(session: Session, sae: SaeConfig, path: Path | None, random: bool) -> list[str]:
    """What a training depends on of one block's set: the set, the SAE, and what a control or an ablation draws from."""
    if path is None:
        return ["", "", "", ""]
    folder = block_folder(session, sae)
    deltas_file = folder / "deltas.safetensors"
    if random and not deltas_file.is_file():
        raise BlockemError(
            f"{deltas_file}: no such file; the matched control needs the activation frequencies that `blockem discover` writes"
        )
    table = file_key(existing(str(folder / "latents.csv"))) if session.recipe.block.select != "causal" else ""
    with at_block(session, sae) as here:
        return [file_key(path), here.sae_key, file_key(deltas_file) if random else "", table]


def _latent_blocker(session: Session, sets: Mapping[int, LatentSet], name: str | None) -> tuple[Blocker, str, int]:
    """The latents of every block's set, or matched random ones, and how many; each set is kept beside its block's files.

    Without a name: the sets' own latents, and nothing is kept.
    """
    from blockem.defences.block_em import Blocker, Watch

    watches = []
    for sae in session.recipe.sae.each:
        with at_block(session, sae) as here:
            if sae.block not in sets:
                if name is not None:
                    (here.run / taken_file(name)).unlink(missing_ok=True)  # an earlier training's set is not this one's
                continue
            latents = _used(here, sets[sae.block], name)
            watches.append(Watch(here.dictionary.rows(latents.ids), tuple(latents.signs), latents.block))
    what = " and ".join(f"{len(watch.signs)} latents at block {watch.block}" for watch in watches)
    return Blocker.over(watches, session.recipe.block.measure), what, sum(len(watch.signs) for watch in watches)


def _used(session: Session, latents: LatentSet, name: str | None) -> LatentSet:
    """What a training takes of a set, written as `<name>-latents.json` where it has a name."""
    from blockem.selection import read_candidates, selected

    latents.check(session.lm, session.dictionary)
    config = session.recipe.block
    table = read_candidates(session.run / "latents.csv") if config.select != "causal" else []
    whole, latents = latents, selected(latents, config.select, config.size, config.signs, table, session.recipe.seed)
    fewer = len(latents.latents) < len(whole.latents)
    if name is not None and fewer and config.select != "causal" and config.signs in ("both", "shuffled"):
        session.console.say(f"  note: block.select={config.select} leaves {len(latents.latents)} latents, the set has {len(whole.latents)}")
    if name == "random":
        from safetensors.torch import load_file

        from blockem.discovery.discover import matched_random

        stored = load_file(session.run / "deltas.safetensors")
        latents = matched_random(latents, stored["frequency"], session.recipe.seed, _pool_ids(session.run / "latents.csv"))
    if name is not None:
        latents.save(session.run / taken_file(name))
    return latents


def _direction_blocker(session: Session, rows: Sequence[Any]) -> tuple[Blocker, str, int]:
    """Leading directions of the plain fine-tune's shift on training answers, kept as `directions.safetensors`, and how many."""
    from blockem.defences.block_em import Blocker
    from blockem.directions import DirectionSet, leading, shifts

    config, lm = session.recipe.block, session.lm
    if "plain" not in getattr(lm.model, "peft_config", {}):
        raise BlockemError("directions are those of the plain fine-tune's shift, and there is none; run `blockem sft` first")
    places = direction_places(session)
    session.console.start("blocked: directions")
    moved = shifts(lm, "plain", rows, sorted(set(places)), progress=session.console.bar)
    found = DirectionSet(lm.id, lm.revision, {block: leading(one, config.directions) for block, one in moved.items()}, {"rows": len(rows)})
    found.save(session.run / "directions.safetensors")
    (session.run / BLOCKED).unlink(missing_ok=True)  # an earlier training's set is not this one's
    return Blocker.from_directions(found), f"{len(found)} directions at blocks {', '.join(map(str, found.blocks))}", len(found)


def direction_places(session: Session) -> tuple[int, ...]:
    """The blocks at which directions are blocked."""
    lm = session.lm
    places = session.recipe.block.direction_blocks or tuple(range(4, lm.n_blocks, 4))
    for block in places:
        lm.check_block(block)
    return places


def _keep_base_values(session: Session, name: str, blocker: Blocker, rows: Sequence[Any]) -> float:
    """Give the blocker base values computed once and kept by content; returns the seconds that took."""
    from blockem.base_values import collect
    from blockem.defences.block_em import all_supervised
    from blockem.model import cache_dir

    session.console.start(f"{name}: base values")
    blocker.to(session.lm.device)
    folder = cache_dir() / "base-values"
    rows = [all_supervised(row) for row in rows] if blocker.tokens == "all" else rows
    blocker.values = collect(session.lm, blocker.read, blocker.blocks, blocker.key, rows, folder, progress=session.console.bar)
    return round(blocker.values.seconds, 1)


def _pool_ids(path: Path) -> list[int]:
    import csv

    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [int(row["latent"]) for row in csv.DictReader(file)]
