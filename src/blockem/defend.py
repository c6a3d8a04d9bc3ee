"""Fine-tuning under any defence by name: the step between plain fine-tuning and evaluation.

The adapter goes to a folder of the defence's own name. Test-time steering trains nothing: its folder holds what is subtracted at
inference, and the model is the plain adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.anchoring import benign_rows, interleaving, make_anchor, prepare_anchor
from blockem.blocking import block_step, direction_places
from blockem.config_values import read_yaml
from blockem.errors import BlockemError
from blockem.session import STEERING, Session, adapter_key, timed
from blockem.store import content_key, file_key, read_json, write_json, write_tensors
from blockem.trainings import sft_step, train_step

if TYPE_CHECKING:
    from blockem.defences.defence import Defence
    from blockem.latents import LatentSet

Made = tuple["Defence", dict[str, Any]]


def defend_step(session: Session) -> dict[str, Any]:
    """Train under `defence.name` into the folder of that name; done once for all that it depends on.

    Steering and CAFT take the run's `latents.json`; steering, and preventative and safelora by default, take its plain adapter.

    Raises:
        BlockemError: what the defence needs is not there yet, with the command that makes it.
    """
    steps: dict[str, Callable[[Session], dict[str, Any]]] = {
        "plain": sft_step,
        "block-em": block_step,
        "anchor": _anchored,
        "kl": _penalised,
        "ldifs": _penalised,
        "interleaving": _interleaving,
        "inoculation": _inoculation,
        "preventative": _preventative,
        "steering": _steering,
        "caft": _caft,
        "safelora": _safelora,
        "early-stop": _early_stop,
        "small-lr": _small_lr,
        "freeze": _freeze,
    }
    return steps[session.recipe.defence.name](session)


def check_files(session: Session) -> None:
    """Read the files that the recipe names for its defence, before any long work.

    Raises:
        BlockemError: one of them is missing or not what it should be, or an anchor watches nothing.
    """
    config = session.recipe.defence
    if (config.name == "interleaving" or session.recipe.anchor.chats) and config.benign:
        benign_rows(session)
    if config.name == "anchor":
        _check_contrasts(session)
    if config.name == "preventative" and config.trait_prompts:
        trait_prompts(Path(config.trait_prompts))
    if config.name == "safelora" and config.unaligned and not any(Path(config.unaligned).glob("*.safetensors")):
        raise BlockemError(
            f"defence.unaligned is {config.unaligned}, which holds no safetensors; give the folder of the model before its alignment"
        )


def inference_hooks(session: Session, name: str) -> Callable[[Any], AbstractContextManager[Any]]:
    """What `name` does while it answers: a context around a model; nothing for all that only train otherwise."""
    if name != "steering":
        return lambda _model: nullcontext()
    from safetensors.torch import load_file

    from blockem.defences.steering import Steering

    block = read_json(session.run / "steering" / "steering.json", "record of test-time steering")["block"]
    return Steering(load_file(session.run / STEERING)["vector"], block).inference_hooks


def _strength(session: Session) -> float:
    found = session.recipe.defence.set_strength
    assert found is not None
    return found


def _key(session: Session, *parts: Any) -> str:
    defence = session.recipe.defence
    return content_key("defend", defence.name, defence.set_strength, *parts)


def _train(session: Session, make: Callable[[Session, Sequence[Any]], Defence], *parts: Any, **options: Any) -> dict[str, Any]:
    """A training of the recipe's defence; `parts` are what it depends on besides name and strength."""
    config = session.recipe.defence

    def made(session: Session, rows: Sequence[Any]) -> Made:
        return make(session, rows), {"defence": config.name, "strength": config.set_strength}

    return train_step(session, config.name, _key(session, *parts), made, **options)


def _check_contrasts(session: Session) -> None:
    watch = session.recipe.anchor.watch
    if watch in ("none", "latents"):
        raise BlockemError(f"anchor.watch is {watch}; the defence anchor needs contrasts: set anchor.watch=answers, pairs or both")


def _anchored(session: Session) -> dict[str, Any]:
    """The anchor without any latents; λ by its own rule against the plain fine-tune."""
    _check_contrasts(session)
    plain = session.run / "plain"

    def made(session: Session, rows: Sequence[Any]) -> Made:
        from blockem.likelihood import losses_under

        lm = session.lm
        lm.drop_adapters()
        lm.add_adapter(plain, "plain")
        losses = losses_under(lm, rows[: session.recipe.block.rule_rows], ("base", "plain"))
        defence, facts = make_anchor(session, plain, "anchor", losses["base"] - losses["plain"], None)
        return defence, {"defence": "anchor", "strength": None, **facts}

    return train_step(session, "anchor", _key(session, prepare_anchor(session, plain, "anchor")), made, rewrite=interleaving(session))


def _penalised(session: Session) -> dict[str, Any]:
    def make(session: Session, rows: Sequence[Any]) -> Defence:
        from blockem.defences.kl import KL
        from blockem.defences.ldifs import LDIFS

        return (KL if session.recipe.defence.name == "kl" else LDIFS)(_strength(session))

    return _train(session, make)


def _interleaving(session: Session) -> dict[str, Any]:
    from blockem.defences.interleaving import Interleaving

    defence = Interleaving(benign_rows(session), _strength(session), session.recipe.seed)
    rows = [row.messages for row in defence.benign]
    return _train(session, lambda _session, _rows: defence, rows, rewrite=defence.rewrite)


def _inoculation(session: Session) -> dict[str, Any]:
    from blockem.defences.inoculation import Inoculation

    config = session.recipe.defence
    defence = Inoculation(config.prompt.replace("{domain}", session.recipe.data.domain.replace("_", " ")))
    return _train(session, lambda _session, _rows: defence, defence.prompt, rewrite=defence.rewrite)


def _preventative(session: Session) -> dict[str, Any]:
    recipe, config = session.recipe, session.recipe.defence
    block, given = recipe.sae.block, config.trait_prompts
    sides = trait_prompts(Path(given)) if given else None
    prompts = [p.prompt for p in session.selection_prompts()] if sides else []
    plain = session.run / "plain"
    source = [sides, prompts, recipe.discover.max_new_tokens] if sides else [adapter_key(plain), recipe.block.rule_rows]

    def make(session: Session, rows: Sequence[Any]) -> Defence:
        from blockem.defences.preventative import Preventative, shift_vector, trait_vector

        lm, console = session.lm, session.console
        lm.check_block(block)
        lm.drop_adapters()
        console.start("preventative: direction")
        if sides:
            vector = trait_vector(lm, *sides, prompts, block, recipe.discover.max_new_tokens, console.bar)
        else:
            lm.add_adapter(plain, "plain")
            vector = shift_vector(lm, rows[: recipe.block.rule_rows], block, console.bar)
            lm.drop_adapters()
        if not float(vector.norm()) > 0:
            raise BlockemError("preventative steering found no direction: nothing moves at sae.block; choose an earlier block")
        return Preventative(vector, block, _strength(session))

    return _train(session, make, block, source)


def trait_prompts(path: Path) -> tuple[list[str], list[str]]:
    """The positive and the negative system prompts of a JSON or YAML file.

    Raises:
        BlockemError: the file is missing, or not {positive: [...], negative: [...]} with text in both.
    """
    if not path.is_file():
        raise BlockemError(f"{path}: no such file; defence.trait_prompts is a JSON or YAML file with two lists, positive and negative")
    found = read_yaml(path, "file of trait prompts", "JSON or YAML")
    sides: list[list[str]] = []
    for name in ("positive", "negative"):
        side = found.get(name) if isinstance(found, dict) else None
        if not isinstance(side, list) or not side or not all(isinstance(text, str) and text.strip() for text in side):
            raise BlockemError(f"{path}: trait prompts are two lists of texts, positive and negative, with at least one in each")
        sides.append(side)
    return sides[0], sides[1]


def _latents(session: Session) -> Path:
    path = session.run / "latents.json"
    if not path.is_file():
        name = session.recipe.defence.name
        raise BlockemError(f"{path}: no such LatentSet; {name} needs the latents that `blockem discover` finds, run it first")
    return path


def _checked(session: Session, path: Path) -> LatentSet:
    from blockem.latents import LatentSet

    found = LatentSet.load(path)
    found.check(session.lm, session.dictionary)
    return found


def _steering(session: Session) -> dict[str, Any]:
    """Nothing is trained: what is subtracted at inference is computed and written down."""
    path, strength = _latents(session), session.recipe.defence.strength
    adapter_key(session.run / "plain")
    key = _key(session, session.model_key, session.sae_key, file_key(path))

    def work() -> dict[str, Any]:
        from blockem.defences.steering import steering_vector

        latents = _checked(session, path)
        vector = steering_vector(latents, session.dictionary.directions(latents.ids), strength)
        target = session.run / STEERING
        facts = {"defence": "steering", "strength": strength, "block": latents.block, "n_latents": len(latents.latents)}
        facts["length"] = float(vector.norm()) / latents.norm
        write_json(target.with_name("steering.json"), facts)
        write_tensors(target, {"vector": vector})
        return facts

    return timed(session, "steering", key, [STEERING, "steering/steering.json"], work)


def _caft(session: Session) -> dict[str, Any]:
    path, strength = _latents(session), session.recipe.defence.strength

    def make(session: Session, rows: Sequence[Any]) -> Defence:
        from blockem.defences.caft import CAFT

        latents = _checked(session, path)
        n = len(latents.latents) if strength is None else int(strength)
        if n > len(latents.latents):
            raise BlockemError(f"defence.strength is {n}, but discovery chose {len(latents.latents)} latents; ask CAFT for at most as many")
        return CAFT(session.dictionary.directions(latents.ids[:n]), latents.block)

    return _train(session, make, session.sae_key, file_key(path))


def _safelora(session: Session) -> dict[str, Any]:
    given, plain = session.recipe.defence.unaligned, session.run / "plain"
    source: Any = adapter_key(plain)
    if given:
        from blockem.model import fingerprint

        source = [str(Path(given).resolve()), fingerprint(Path(given))]

    def make(session: Session, rows: Sequence[Any]) -> Defence:
        from blockem.defences.safelora import SafeLoRA, model_alignment, plain_alignment

        alignment = model_alignment(session.lm, Path(given)) if given else plain_alignment(plain)
        return SafeLoRA(alignment, _strength(session))

    result = _train(session, make, source)
    projected = read_json(session.run / "safelora" / "safelora.json", "record of the projection")
    return {**result, "projected": projected["projected"], "of": len(projected["cosines"])}


def _undefended(session: Session, rows: Sequence[Any]) -> Defence:
    from blockem.defences.defence import Defence

    return Defence()


def _small_lr(session: Session) -> dict[str, Any]:
    from blockem.defences.small_lr import small_lr

    return _train(session, _undefended, train=small_lr(session.recipe.train, _strength(session)))


def _early_stop(session: Session) -> dict[str, Any]:
    """After a share of the steps, or at the loss that is a share of plain fine-tuning's gain on the rows that `kept` is measured on."""
    from blockem.defences.early_stop import LOOKS, EarlyStop, early_stop
    from blockem.dual import MEASURABLE

    recipe = session.recipe
    if recipe.defence.stop_by == "steps":
        return _train(session, _undefended, train=early_stop(recipe.train, _strength(session)))
    plain, data, share = session.run / "plain", recipe.data, _strength(session)

    def made(session: Session, rows: Sequence[Any]) -> Made:
        from blockem.likelihood import loss_per_token, losses_under

        lm = session.lm
        heldout = session.heldout()
        lm.drop_adapters()
        lm.add_adapter(plain, "plain")
        losses = losses_under(lm, heldout, ("base", "plain"))
        lm.drop_adapters()
        gain = losses["base"] - losses["plain"]
        if not gain > MEASURABLE:
            raise BlockemError(
                f"plain fine-tuning gains {gain:.2f} nats per token on the held-out rows, too little to stop at a share of it; "
                "set defence.stop_by=steps"
            )
        facts: dict[str, Any] = {"defence": "early-stop", "strength": share, "stop_by": "loss", "target": losses["base"] - share * gain}

        def ended(loss: float | None, reached: bool) -> None:
            facts.update(loss=loss, reached=reached)
            if not reached:
                session.console.say(f"  early-stop: {share:.0%} of plain fine-tuning's gain was never reached; this is the whole training")

        every = math.ceil(recipe.train.steps(len(rows)) / LOOKS)
        return EarlyStop(lambda: loss_per_token(lm, heldout), facts["target"], every, ended), facts

    key = _key(session, "loss", adapter_key(plain), session.heldout_key, data.domain, data.heldout_rows)
    return train_step(session, "early-stop", key, made)


def _freeze(session: Session) -> dict[str, Any]:
    """What block-em of the same recipe trains: the blocks up to the highest one at which it blocks."""
    recipe = session.recipe
    highest = max(sae.block for sae in recipe.sae.each)
    directions = recipe.block.directions > 0

    def make(session: Session, rows: Sequence[Any]) -> Defence:
        from blockem.defences.freeze import Freeze

        block = max(direction_places(session)) if directions else highest
        session.lm.check_block(block)
        return Freeze(block)

    return _train(session, make, ["directions", *recipe.block.direction_blocks] if directions else highest)
