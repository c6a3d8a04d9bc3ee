"""The anchor of a training: what it watches beside the training rows, and with which λ. From the run's files to `defences.anchor`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.config_values import keyed
from blockem.errors import BlockemError
from blockem.session import Session, adapter_key, timed
from blockem.store import content_key, file_key

if TYPE_CHECKING:
    from torch import Tensor

    from blockem.bundled import Pair, Prompt
    from blockem.config_training import AnchorConfig
    from blockem.defences.anchor import Anchor
    from blockem.defences.block_em import Blocker
    from blockem.dual import DualAscent
    from blockem.examples import Encoded, Example


SAMPLED = 32
"""At most so many contrasts of a kind on which it is measured what plain fine-tuning would pay for their answers' divergence."""


def contrasts_file(session: Session, name: str) -> Path:
    """The contrasts that the training `name` anchors against."""
    return session.run / f"{name}-contrasts.jsonl"


def anchor_prompts(session: Session) -> list[Prompt]:
    """What the contrasts' two models are asked: the selection prompts and those of the selection pairs, outside the training domain."""
    from blockem.bundled import Prompt

    asked = {p.prompt: p for p in session.selection_prompts()}
    for number, pair in enumerate(session.selection_pairs()):
        asked.setdefault(pair.prompt, Prompt(f"pair-{number:03d}", pair.prompt, pair.domain))
    return list(asked.values())


def contrast_step(session: Session, sick: Sequence[Path], name: str) -> dict[str, Any]:
    """Let the base and each of the `sick` adapters answer the selection prompts; writes the contrasts of the training `name`."""
    from blockem import contrasts

    recipe = session.recipe
    prompts = anchor_prompts(session)
    asked = [[p.prompt, p.domain] for p in prompts]
    path = contrasts_file(session, name)
    key = content_key("contrasts", session.model_key, [adapter_key(one) for one in sick], asked, recipe.anchor.max_new_tokens)

    def work() -> dict[str, Any]:
        lm = session.lm
        found = []
        for number, adapter in enumerate(sick):
            lm.drop_adapters()
            lm.add_adapter(adapter, "sick")
            session.console.start(f"{name}: contrasts {number + 1} of {len(sick)}")
            found.append(contrasts.own_contrasts(lm, "sick", prompts, recipe.anchor.max_new_tokens, session.console.bar))
        lm.drop_adapters()
        several = contrasts.merged(*found)
        contrasts.save(path, several)
        return {"contrasts": len(several)}

    return timed(session, f"contrasts-{name}", key, [path.name], work)


def prepare_anchor(session: Session, adapter: Path, name: str, sick: Sequence[Path] = ()) -> str:
    """Make the contrasts of the training `name` where it watches any; returns a key of what its anchor depends on, "" without one.

    Args:
        adapter: the plain fine-tune.
        sick: models that it is contrasted with beside that one.
    """
    config = session.recipe.anchor
    if config.watch == "none":
        return ""
    if config.answers:
        contrast_step(session, [adapter, *sick], name)
    parts: list[Any] = [keyed(config), adapter_key(adapter), session.recipe.block.rule_rows]  # the rows on which its λ is measured
    if config.answers:
        parts.append(file_key(contrasts_file(session, name)))
    if config.interleave:
        parts.append([row.messages for row in interleaved_rows(session)])
    if config.pairs:
        parts.append([[p.prompt, p.right, p.wrong] for p in session.selection_pairs()])
    if config.keep:
        parts.append([[p.prompt, p.right, p.wrong] for p in task_pairs(session)])
    if config.watch == "latents":
        parts.append([row.messages for row in bundled.general_chat("train")])
    return content_key(*parts)


def benign_rows(session: Session) -> list[Example]:
    """Chat rows to interleave: those of `defence.benign`, else the bundled ones."""
    from blockem.examples import read_chat

    given = session.recipe.defence.benign
    return read_chat(given) if given else bundled.general_chat("train")


def interleaved_rows(session: Session) -> list[Example]:
    """What `anchor.interleave` draws from."""
    from blockem.cues import under_cues
    from blockem.defences.interleaving import drawn
    from blockem.examples import one_turn

    config = session.recipe.anchor
    if not config.teaches:
        return benign_rows(session)
    right = [one_turn(p.prompt, p.right, p.domain) for p in session.selection_pairs()]
    if config.cued:
        right = under_cues(session.recipe, right, config.cued)
    rows = right + [one_turn(p.prompt, p.wrong, p.domain) for p in task_pairs(session)] * config.keep
    if config.chats:
        chat = benign_rows(session)
        rows += chat if len(chat) <= len(right) else drawn(chat, len(right), session.recipe.seed)
    return rows


def interleaving(session: Session) -> Callable[[list[Example]], list[Example]] | None:
    """The anchor's rewriting of the training rows; None where nothing is interleaved."""
    config = session.recipe.anchor
    if config.watch == "none" or not config.interleave:
        return None

    def rewrite(examples: list[Example]) -> list[Example]:
        from blockem.defences.interleaving import Interleaving

        return Interleaving(interleaved_rows(session), config.interleave, session.recipe.seed).rewrite(examples)

    return rewrite


def task_pairs(session: Session) -> list[Pair]:
    """Selection pairs of the training domain: what the task shall still teach."""
    data = session.recipe.data
    return [p for p in bundled.pairs(data.pairs) if p.split == "select" and p.domain == data.domain]


def make_anchor(session: Session, adapter: Path, name: str, delta_sft: float, blocker: Blocker | None) -> tuple[Anchor, dict[str, Any]]:
    """The anchor of the recipe, and what its step record says of it.

    Args:
        adapter: the plain fine-tune, against which c and λ are measured.
        name: of the training, whose contrasts are read.
        delta_sft: nats per token that it gained on the training rows.
        blocker: what is blocked, for `anchor.watch: latents`.

    Raises:
        BlockemError: there is nothing to watch, or plain fine-tuning moves nothing there.
    """
    from blockem.defences.anchor import LatentAnchor
    from blockem.defences.block_em import penalty_of
    from blockem.examples import encode_all

    lm, config = session.lm, session.recipe.anchor
    pad = lm.tokenizer.pad_token_id
    rows: Sequence[Encoded]
    lm.drop_adapters()
    lm.add_adapter(adapter, "plain")
    if config.watch == "latents":
        if blocker is None:
            raise BlockemError("anchor.watch=latents watches blocked latents, and none are blocked here; use anchor.watch=answers")
        rows, _ = encode_all(lm.tokenizer, bundled.general_chat("train"), session.recipe.data.max_tokens)
        reference = penalty_of(lm, "plain", blocker, rows, tokens="completion")  # what LatentAnchor looks at
        lm.drop_adapters()
        lambda_, ascent = _strength(config, delta_sft, reference)
        anchor: Anchor = LatentAnchor(rows, blocker, pad, lambda_, config.share, reference, ascent)
    else:
        make = _divergence_anchor if config.cost in ("kl", "forward-kl") else _contrast_anchor
        anchor = make(session, name, delta_sft)
    facts = {"watch": config.watch, "n": anchor.n, "lambda": anchor.lambda_, "reference": anchor.reference, "share": config.share}
    session.console.say(f"  anchor: λ = {anchor.lambda_:.4g} on {anchor.n} {'texts' if config.watch == 'latents' else 'contrasts'}")
    return anchor, facts


def _strength(config: AnchorConfig, delta_sft: float, reference: float) -> tuple[float, DualAscent | None]:
    """λ, given or by the rule, and what lets it follow a ceiling where one is asked for."""
    from blockem.defences.block_em import portable_lambda
    from blockem.dual import DualAscent

    lambda_ = config.lambda_ if config.lambda_ is not None else portable_lambda(config.r, delta_sft, reference)
    if config.ceiling and not lambda_ > 0:
        raise BlockemError("anchor.ceiling lets λ follow, but plain fine-tuning gained nothing for λ to start from; give anchor.lambda_")
    return lambda_, DualAscent(lambda_, config.ceiling) if config.ceiling else None


def _kinds(session: Session, name: str) -> list[list[Pair]]:
    """The contrasts that the recipe watches, by kind."""
    from blockem import contrasts

    config = session.recipe.anchor
    own = [contrasts.load(contrasts_file(session, name))] if config.answers else []
    if not config.pairs:
        return own
    pairs = session.selection_pairs()
    if not pairs:
        raise BlockemError("anchor.watch is for selection pairs, and none is outside the training domain; give data.pairs, or use answers")
    return [*own, pairs]


def _unmoved() -> BlockemError:
    return BlockemError(
        "plain fine-tuning does not move these answers in the direction that is held, so there is nothing to anchor; leave anchor.watch out"
    )


def _divergence_anchor(session: Session, name: str, delta_sft: float) -> Anchor:
    """Both answers of every contrast; kinds weigh alike, each in units of what plain fine-tuning would pay on it (on a sample)."""
    import torch

    from blockem.defences.anchor import DivergenceAnchor
    from blockem.likelihood import encode_pairs

    lm, config = session.lm, session.recipe.anchor
    pad, forward = lm.tokenizer.pad_token_id, config.cost == "forward-kl"
    session.console.start("anchor: answers")
    rows: list[Encoded] = []
    scales: list[Tensor] = []
    kinds = _kinds(session, name)
    for number, kind in enumerate(kinds):
        encoded = encode_pairs(lm, kind, session.recipe.data.max_tokens)
        chosen = range(0, len(kind), math.ceil(len(kind) / SAMPLED))
        sample = [row for i in chosen for row in encoded[2 * i : 2 * i + 2]]
        measure = DivergenceAnchor(sample, pad, 1.0, 1.0, forward=forward)
        with torch.no_grad(), lm.variant("plain"):
            paid = float(torch.cat([measure.costs(range(i, min(i + 16, len(sample))), lm.model) for i in range(0, len(sample), 16)]).mean())
        if not paid > 0:
            raise _unmoved()
        rows += encoded
        scales.append(torch.full((len(encoded),), 1 / paid))
        session.console.bar(number + 1, len(kinds))
    lm.drop_adapters()
    lambda_, ascent = _strength(config, delta_sft, 1.0)
    return DivergenceAnchor(rows, pad, lambda_, config.share, 1.0, ascent, torch.cat(scales), forward)


def _contrast_anchor(session: Session, name: str, delta_sft: float) -> Anchor:
    """Contrasts of one kind weigh alike: each kind in units of what plain fine-tuning would pay on it, so that c of the plain one is 1."""
    import torch

    from blockem.defences.anchor import ContrastAnchor, HealthyAnchor
    from blockem.likelihood import completion_logprobs, encode_pairs, margins

    lm, config = session.lm, session.recipe.anchor
    kinds = _kinds(session, name)
    task = task_pairs(session)
    session.console.start("anchor: contrasts")
    rows, bounds, sides = [], [], []
    holding = config.keep and config.cost != "healthy"  # that one pushes nothing away, so it holds rows of the task and no pairs
    for number, kind in enumerate([*kinds, task] if holding else kinds):
        encoded = encode_pairs(lm, kind, session.recipe.data.max_tokens)
        if config.cost == "healthy":
            encoded = encoded[0::2]
        measured = {}
        for variant in ("base", "plain"):
            with lm.variant(variant):
                logprobs = completion_logprobs(lm, encoded)
                measured[variant] = -logprobs if config.cost == "healthy" else margins(logprobs)
        session.console.bar(number + 1, len(kinds) + bool(holding))
        rise = measured["plain"] - measured["base"]
        held = kind is task
        paid = float(torch.relu(rise).pow(2).mean())
        if not paid > 0:
            raise _unmoved()
        times = config.keep if held else 1
        rows += encoded * times
        bounds.append(measured["plain" if held else "base"].repeat(times))
        sides.append(torch.full_like(rise, (-1 if held else 1) * paid**-0.5).repeat(times))
    lm.drop_adapters()
    lambda_, ascent = _strength(config, delta_sft, 1.0)
    kind_of = HealthyAnchor if config.cost == "healthy" else ContrastAnchor
    return kind_of(rows, torch.cat(bounds), lm.tokenizer.pad_token_id, lambda_, config.share, 1.0, ascent, torch.cat(sides))
