"""What is measured on the re-emerged model, each step from file to file: penalty, off-K audit, patching, decoding, drift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.errors import BlockemError
from blockem.reemergence.epochs import bounded_prompts, penalty_shares
from blockem.session import BLOCKED, Session, adapter_key, source_key, timed
from blockem.store import content_key, file_key, write_jsonl

if TYPE_CHECKING:
    from blockem.examples import Encoded
    from blockem.latents import LatentSet


@dataclass(frozen=True)
class Inputs:
    """What a re-emergence starts from: the plain fine-tune, the blocked set, and the run's own blocked model where there is one."""

    plain: Path
    latents: Path
    blocked: Path | None
    block: int


def _heldout(session: Session) -> tuple[list[Encoded], str]:
    """Held-out rows of the task, and what they depend on."""
    data = session.recipe.data
    return session.heldout(), content_key(session.heldout_key, data.heldout_rows, data.max_tokens, data.domain)


def _pairs(session: Session) -> list[bundled.Pair]:
    from blockem.discovery.discover import spread

    recipe = session.recipe
    given = [p for p in bundled.evaluation_pairs(recipe.data.pairs) if p.domain != recipe.data.domain]
    if not given:
        raise BlockemError("no evaluation pair lies outside the training domain; give --pairs with other domains")
    return spread(given, recipe.reemerge.patch_pairs)


def penalties_step(session: Session, step: str, folder: Path, models: Mapping[str, Path], p_mis: float | None) -> dict[str, float | None]:
    """The share of P_mis that each epoch's model pays on the training rows that P_mis was measured on."""
    from blockem.anchoring import interleaving

    recipe, rewrite = session.recipe, interleaving(session)
    latents = folder / BLOCKED
    parts = [adapter_key(path) for path in models.values()]
    key = content_key(
        step,
        session.model_key,
        session.sae_key,
        session.data_key,
        file_key(latents),
        parts,
        recipe.block.rule_rows,
        recipe.block.measure,
        p_mis,
        [recipe.block.two_sided, recipe.block.tokens],
        asdict(recipe.anchor) if rewrite else "",
    )

    def work() -> dict[str, Any]:
        from blockem.defences.block_em import Blocker
        from blockem.examples import encode_all
        from blockem.latents import LatentSet

        data, lm = recipe.data, session.lm
        examples = bundled.training_rows(data.domain, data.train, data.rows, recipe.seed)
        rows, _ = encode_all(lm.tokenizer, rewrite(examples) if rewrite else examples, data.max_tokens)
        blocker = Blocker.from_latents(LatentSet.load(latents), session.dictionary, recipe.block.measure)
        blocker.two_sided, blocker.tokens = recipe.block.two_sided, recipe.block.tokens
        return {"shares": penalty_shares(lm, blocker, models, rows[: recipe.block.rule_rows], p_mis)}

    shares: dict[str, float | None] = timed(session, step, key, [], work)["shares"]
    return shares


def audit_step(session: Session, inputs: Inputs, latents: LatentSet, models: Mapping[str, Path]) -> dict[str, Any]:
    """The off-K audit of the first and the last epoch's model."""
    rows, rows_key = _heldout(session)
    names = list(dict.fromkeys([next(iter(models)), list(models)[-1]]))
    chosen = {"plain": inputs.plain, **{name: models[name] for name in names}}
    parts = {name: adapter_key(path) for name, path in chosen.items()}
    key = content_key("audit", session.model_key, session.sae_key, rows_key, parts, file_key(inputs.latents))

    def work() -> dict[str, Any]:
        from blockem.reemergence.audit import audit

        lm = session.lm
        lm.drop_adapters()
        for name, path in chosen.items():
            lm.add_adapter(path, name)
        session.console.start("audit: held-out answers")
        sets = dict.fromkeys(names, latents)
        found = audit(lm, rows, names, inputs.block, session.dictionary, sets, progress=session.console.bar)
        lm.drop_adapters()
        return {"audit": found.to_dict()}

    done: dict[str, Any] = timed(session, "reemerge-audit", key, [], work)["audit"]
    return done


def patching_step(session: Session, inputs: Inputs, last: Path) -> dict[str, Any]:
    """Prompt patching of the re-emerged model, and, for comparison, of the plain fine-tune that nothing held back."""
    recipe = session.recipe
    wanted = recipe.reemerge
    pairs = _pairs(session)
    places = sorted(set(wanted.patch_blocks)) or list(range(session.lm.n_blocks))
    chosen = {"plain": inputs.plain, "reemerged": last}
    found = {}
    for name, path in chosen.items():
        key = content_key(
            "patching",
            session.model_key,
            adapter_key(path),
            inputs.block,
            places,
            [asdict(pair) for pair in pairs],
            recipe.data.max_tokens,
            recipe.evaluate.resamples,
        )

        def work(name: str = name, path: Path = path) -> dict[str, Any]:
            from blockem.reemergence.patching import patch_prompts

            lm = session.lm
            lm.drop_adapters()
            lm.add_adapter(path, name)
            session.console.start(f"patching: {name}, prompts")
            made = patch_prompts(
                lm,
                pairs,
                name,
                inputs.block,
                places,
                recipe.data.max_tokens,
                recipe.evaluate.resamples,
                progress=session.console.bar,
            )
            lm.drop_adapters()
            return {"patching": made.to_dict()}

        found[name] = timed(session, f"patching-{name}", key, [], work)["patching"]
    return found


def decoding_step(session: Session, inputs: Inputs, last: Path) -> list[dict[str, Any]]:
    """Answers while one block is patched at each step, judged; they go to `patched-answers.jsonl`."""
    recipe = session.recipe
    wanted = recipe.reemerge
    if not wanted.decode_prompts:
        return []
    n, block = session.lm.n_blocks, inputs.block
    places = sorted(set(wanted.decode_blocks)) or sorted({block // 2, block, (block + n - 1) // 2})
    prompts = bounded_prompts(session, wanted.decode_prompts)
    key = content_key(
        "decoding",
        session.model_key,
        adapter_key(last),
        places,
        wanted.decode_positions,
        wanted.decode_tokens,
        [asdict(prompt) for prompt in prompts],
        session.judge_key,
        recipe.evaluate.resamples,
    )

    def work() -> dict[str, Any]:
        from blockem.reemergence.decoding import Decoding, decode_all

        lm = session.lm
        lm.drop_adapters()
        lm.add_adapter(last, "reemerged")
        asked = [prompt.prompt for prompt in prompts]
        settings = Decoding(tuple(places), wanted.decode_positions, wanted.decode_tokens)
        table, rows = decode_all(lm, asked, "reemerged", settings, session.chosen_judge, session.console.stage)
        lm.drop_adapters()
        write_jsonl(session.run / "patched-answers.jsonl", rows)
        return {"decoding": table}

    done: list[dict[str, Any]] = timed(session, "decoding", key, ["patched-answers.jsonl"], work)["decoding"]
    return done


def drift_step(session: Session, inputs: Inputs, models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The SAE on every model, on held-out answers of the task and of general chat."""
    recipe = session.recipe
    rows, rows_key = _heldout(session)
    chosen = {"plain": inputs.plain, **({"blocked": inputs.blocked} if inputs.blocked else {}), **models}
    parts = {name: adapter_key(path) for name, path in chosen.items()}
    general = source_key(recipe.data.general, "general_chat.jsonl")
    settings = [inputs.block, recipe.evaluate.general_rows, recipe.evaluate.resamples]
    key = content_key("drift", session.model_key, session.sae_key, rows_key, general, settings, parts)

    def work() -> dict[str, Any]:
        from blockem.examples import encode_all
        from blockem.reemergence.drift import codes, compare

        lm = session.lm
        chat = bundled.general_rows(recipe.data.general)
        more, _ = encode_all(lm.tokenizer, chat[: recipe.evaluate.general_rows], recipe.data.max_tokens)
        texts = [*rows, *more]
        session.console.start("drift: the SAE on each model")
        base = codes(lm, session.dictionary, inputs.block, texts, "base")
        found = {"base": compare(base, resamples=recipe.evaluate.resamples).to_dict()}
        for place, (name, path) in enumerate(chosen.items(), 1):
            session.console.bar(place, len(chosen) + 1)
            lm.drop_adapters()
            lm.add_adapter(path, name)
            own = codes(lm, session.dictionary, inputs.block, texts, name)
            found[name] = compare(base, own, recipe.evaluate.resamples).to_dict()
        lm.drop_adapters()
        session.console.bar(len(chosen) + 1, len(chosen) + 1)
        return {"drift": found}

    done: dict[str, dict[str, Any]] = timed(session, "drift", key, [], work)["drift"]
    return done
