"""The two trainings of a run, plain and blocked, each from file to file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.errors import BlockemError
from blockem.session import Session, adapter_key, timed
from blockem.store import claim_scratch, content_key, file_key, write_jsonl

if TYPE_CHECKING:
    from blockem.defences.block_em import Blocker
    from blockem.latents import LatentSet


def sft_step(session: Session) -> dict[str, Any]:
    """Plain fine-tuning: the misaligned model."""
    return _train(session, "plain", content_key("plain"), _plain_defence)


def _plain_defence(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    from blockem.defences.defence import Defence

    return Defence(), {}


def _train(
    session: Session,
    name: str,
    extra_key: str,
    make: Callable[[Session, Sequence[Any]], tuple[Any, dict[str, Any]]],
    keep_epochs: bool = False,
) -> dict[str, Any]:
    recipe = session.recipe
    key = content_key(name, session.model_key, session.data_key, asdict(recipe.train), recipe.seed, extra_key)

    def work() -> dict[str, Any]:
        from blockem.examples import encode_all
        from blockem.training import fine_tune

        examples = bundled.training_rows(recipe.data.domain, recipe.data.train, recipe.data.rows, recipe.seed)
        rows, report = encode_all(session.lm.tokenizer, examples, recipe.data.max_tokens)
        if report.dropped:
            session.console.say(f"  {len(report.dropped)} rows have nothing to learn from and were dropped, first: {report.dropped[0]}")
        claim_scratch(session.run / f"{name}.making", key)
        defence, facts = make(session, rows)
        session.console.start(f"{name}: steps")
        log = fine_tune(session.lm, rows, recipe.train, defence, session.run / name, recipe.seed, session.console.bar, keep_epochs)
        write_jsonl(session.run / f"training-{name}.jsonl", log)
        return {"data": asdict(report), **facts}

    kept = [f"{name}/epoch-{epoch}/adapter_model.safetensors" for epoch in range(1, int(recipe.train.epochs) + 1)] if keep_epochs else []
    return timed(session, name, key, [f"{name}/adapter_model.safetensors", f"training-{name}.jsonl", *kept], work)


def block_step(
    session: Session, latents_file: Path | None = None, misaligned: Path | None = None, keep_epochs: bool = False
) -> dict[str, Any]:
    """Fine-tune again with the latents blocked; under `block.control: random`, with matched random ones; or with directions blocked.

    The adapter goes to `blocked` (or `random`). The portable λ and directions need the misaligned adapter, to see what it gained and would
    pay, and how it moves the stream. With `keep_epochs` the adapter of each epoch stays in `blocked/epoch-1`, …
    """
    from blockem.latents import LatentSet

    recipe = session.recipe
    config = recipe.block
    name = "random" if config.control == "random" else "blocked"
    by_rule = config.lambda_ is None
    adapter = misaligned or session.run / "plain"
    path = latents_file or session.run / "latents.json"
    latents = None if config.directions else LatentSet.load(path)
    deltas_file = session.run / "deltas.safetensors"
    if name == "random" and not deltas_file.is_file():
        raise BlockemError(
            f"{deltas_file}: no such file; the matched control needs the activation frequencies that `blockem discover` writes"
        )
    extra = content_key(
        "" if latents is None else file_key(path),
        "" if latents is None else session.sae_key,
        asdict(config),
        adapter_key(adapter) if by_rule or latents is None else "",
        file_key(deltas_file) if name == "random" else "",
    )

    def make(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        from blockem.defences.block_em import BlockEM, penalty_of, portable_lambda
        from blockem.likelihood import completion_losses

        lm = session.lm
        sample = rows[: config.rule_rows]
        lm.drop_adapters()
        if (adapter / "adapter_model.safetensors").is_file():
            lm.add_adapter(adapter, "plain")
        if latents is None:
            blocker, what = _direction_blocker(session, sample)
        else:
            blocker, what = _latent_blocker(session, latents, name, deltas_file)
        facts: dict[str, Any] = {
            "lambda": config.lambda_,
            "rule": "given" if not by_rule else "r · ΔSFT / P_mis",
            "r": config.r if by_rule else None,
            "delta_sft": None,
            "p_mis": None,
            "freeze_downstream": config.freeze_downstream,
            "n_latents": len(blocker.signs),
            "blocks": blocker.blocks,
        }
        if "plain" in getattr(lm.model, "peft_config", {}):
            losses = {}
            for variant in ("base", "plain"):
                with lm.variant(variant):
                    loss, tokens = completion_losses(lm, sample)
                    losses[variant] = float(loss.sum() / tokens.sum())
            facts["delta_sft"] = losses["base"] - losses["plain"]
            facts["p_mis"] = penalty_of(lm, "plain", blocker, sample)
            lm.drop_adapters()
        if by_rule:
            facts["lambda"] = portable_lambda(config.r, facts["delta_sft"], facts["p_mis"])
        if config.base_values == "cached":
            facts["base_values_seconds"] = _keep_base_values(session, name, blocker, rows)
        session.console.say(f"  λ = {facts['lambda']:.4g} ({facts['rule']}), {what}")
        return BlockEM(blocker, facts["lambda"], config.freeze_downstream, facts["p_mis"]), facts

    return _train(session, name, extra, make, keep_epochs)


def _latent_blocker(session: Session, latents: LatentSet, name: str, deltas_file: Path) -> tuple[Blocker, str]:
    """The latents of a set, or matched random ones; the set that is used is kept beside the adapter."""
    from blockem.defences.block_em import Blocker

    latents.check(session.lm, session.dictionary)
    if name == "random":
        from safetensors.torch import load_file

        from blockem.discovery.discover import matched_random

        stored = load_file(deltas_file)
        latents = matched_random(latents, stored["frequency"], session.recipe.seed, _pool_ids(session.run / "latents.csv"))
    latents.save(session.run / f"{name}-latents.json")
    blocker = Blocker.from_latents(latents, session.dictionary, session.recipe.block.measure)
    return blocker, f"{len(latents.latents)} latents at block {latents.block}"


def _direction_blocker(session: Session, rows: Sequence[Any]) -> tuple[Blocker, str]:
    """Leading directions of the plain fine-tune's shift on training answers, kept as `directions.safetensors`."""
    from blockem.defences.block_em import Blocker
    from blockem.directions import DirectionSet, leading, shifts

    config, lm = session.recipe.block, session.lm
    if "plain" not in getattr(lm.model, "peft_config", {}):
        raise BlockemError("directions are those of the plain fine-tune's shift, and there is none; run `blockem sft` first")
    places = config.direction_blocks or tuple(range(4, lm.n_blocks, 4))
    for block in places:
        lm.check_block(block)
    session.console.start("blocked: directions")
    moved = shifts(lm, "plain", rows, sorted(set(places)), progress=session.console.bar)
    found = DirectionSet(lm.id, lm.revision, {block: leading(one, config.directions) for block, one in moved.items()}, {"rows": len(rows)})
    found.save(session.run / "directions.safetensors")
    (session.run / "blocked-latents.json").unlink(missing_ok=True)  # an earlier training's set is not this one's
    return Blocker.from_directions(found), f"{len(found)} directions at blocks {', '.join(map(str, found.blocks))}"


def _keep_base_values(session: Session, name: str, blocker: Blocker, rows: Sequence[Any]) -> float:
    """Give the blocker base values computed once and kept by content; returns the seconds that took."""
    from blockem.base_values import collect
    from blockem.model import cache_dir

    session.console.start(f"{name}: base values")
    blocker.to(session.lm.device)
    folder = cache_dir() / "base-values"
    blocker.values = collect(session.lm, blocker.read, blocker.blocks, blocker.key, rows, folder, progress=session.console.bar)
    return round(blocker.values.seconds, 1)


def _pool_ids(path: Path) -> list[int]:
    import csv

    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [int(row["latent"]) for row in csv.DictReader(file)]
