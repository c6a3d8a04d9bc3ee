"""Stages 1 to 3 in order: from a base and a misaligned model to a LatentSet, with every candidate's fate."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from blockem.bundled import Pair, Prompt
from blockem.config import DiscoverConfig
from blockem.config_values import keyed
from blockem.dictionary import Dictionary
from blockem.discovery.attribution import attributions, margin_gradient
from blockem.discovery.bounds import looks
from blockem.discovery.delta import Means, answer_spans, deltas, mean_activations, pool, prompt_spans
from blockem.discovery.effects import Chunks, ItemEffect, JudgedEffect, PreferenceEffect, Steered
from blockem.discovery.groups import Group, best_of_both, groups_of, without_number
from blockem.discovery.halving import rank_halving, screen_halving
from blockem.discovery.ledger import Ledger, unsteered
from blockem.discovery.rank import rank
from blockem.discovery.screen import Candidate, halves, screen
from blockem.errors import BlockemError, NoLatents
from blockem.examples import Example
from blockem.judges import Judge
from blockem.latents import Latent, LatentSet
from blockem.leakage import check_outside
from blockem.model import LanguageModel
from blockem.steering import median_norm
from blockem.store import content_key, write_text

Dealt = TypeVar("Dealt", Pair, Prompt)
Staged = tuple[list[Candidate], list[Candidate], dict[str, Any]]
"""Who went on from stage 2, the chosen, and facts for the counts."""


@dataclass(frozen=True)
class Measuring:
    """With what stages 2 and 3 measure: effects by name, edits of directions at a norm, and where measurements are kept.

    Attributes:
        directions: `[d_model]` each, by latent (or by a group's number).
        log, key: the file of measurements, and what they depend on.
        bar: told of progress: what, how many are done, of how many.
    """

    effects: dict[str, ItemEffect]
    directions: dict[int, Tensor]
    norm: float
    log: Path | None
    key: str
    bar: Callable[[str, int, int], None]


Stages = Callable[[Measuring, list[Candidate], DiscoverConfig], Staged]


@dataclass(frozen=True)
class Discovery:
    """What the three stages found.

    Attributes:
        latents: the chosen set.
        candidates: everyone who was in the pool, with figures and fate.
        delta, frequency: `[n_latents]`, Δ_k and the base model's activation frequency.
        counts: how many were left after each stage.
    """

    latents: LatentSet
    candidates: list[Candidate]
    delta: Tensor
    frequency: Tensor
    counts: dict[str, Any]


def spread(items: Sequence[Dealt], n: int) -> list[Dealt]:
    """`n` pairs or prompts dealt evenly over the domains, in the order given."""
    by_domain: dict[str, list[Dealt]] = {}
    for item in items:
        by_domain.setdefault(item.domain, []).append(item)
    rounds = [one for i in range(max(map(len, by_domain.values()), default=0)) for one in (d[i] for d in by_domain.values() if i < len(d))]
    return rounds[:n]


def dealt(items: Sequence[Dealt], seed: int = 0) -> list[Dealt]:
    """All items in a random order, in which every leading part is balanced where the domains have equally many.

    Where they have not, the order is a plain random one: a balanced part would hold too much of the small domains, and bounds for the
    mean over all items, which take it for a fair sample, would be wrong.
    """
    order = random.Random(f"dealt-{seed}").sample(list(items), len(items))
    return spread(order, len(order)) if len(set(Counter(item.domain for item in items).values())) == 1 else order


def discover(
    lm: LanguageModel,
    dictionary: Dictionary,
    block: int,
    config: DiscoverConfig,
    pairs: Sequence[Pair],
    prompts: Sequence[Prompt],
    general: Sequence[Example],
    judge: Judge | None = None,
    log: Path | None = None,
    key: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Discovery:
    """Find the latents of `block` that carry misalignment.

    With `config.group`, where fewer than `config.keep` latents pass stage 2, groups of those that failed are tested like single ones
    (groups.py); stages 2 and 3 of groups follow those of single latents.

    Args:
        lm: the base model with the misaligned adapter loaded under the name "plain".
        pairs: selection pairs, training domain left out.
        prompts: selection prompts (stage 1, and generations when `config.effect` is "judged"), training domain left out.
        general: chat rows for the steering norm m.
        judge: needed when `config.effect` is "judged".
        log: JSONL of measurements, for resuming; `key` names what they depend on.

    Raises:
        BlockemError: no pair or prompt is left, or no latent passes.
    """
    bar = progress or (lambda _what, _done, _total: None)
    check_outside(pairs, prompts)
    chosen_pairs = spread(pairs, config.pairs)
    spans = prompt_spans(lm, prompts) if config.tokens == "prompt" else answer_spans(lm, chosen_pairs)
    means = {}
    for place, variant in enumerate(("base", "plain")):
        bar("stage 1: model diff", place, 2)
        means[variant] = mean_activations(lm, dictionary, block, spans, variant)
    bar("stage 1: model diff", 2, 2)
    delta = deltas(means["base"], means["plain"])
    candidates = _candidates(delta, means["base"], config.pool)
    if not candidates:
        raise NoLatents("the misaligned model moves no latent at this block: is the adapter trained, and sae.block right?")
    norm = median_norm(lm, general, block)
    counts: dict[str, Any] = {"n_latents": dictionary.n_latents, "candidates": len(candidates), "effect": config.effects[1]}

    tested = candidates
    if config.effect == "preference" and config.prescreen and config.prescreen < len(candidates):
        tested = _prescreen(lm, dictionary, block, chosen_pairs, candidates, config.prescreen)
    directions = {one.latent: d for one, d in zip(tested, dictionary.directions([one.latent for one in tested]), strict=True)}

    def effect_by(name: str) -> ItemEffect:
        if name == "judged" and judge is None:
            field = "effect" if config.effect == "judged" else "rank_effect"
            raise BlockemError(f"discover.{field} is judged, but no judge was given; use discover.{field}=preference or pass a judge")
        if judge is not None and name == "judged":
            some = dealt(prompts) if config.halving else prompts
            return JudgedEffect(lm, some, judge, block, config.max_new_tokens, chunks=_chunks(config, len(prompts)))
        some_pairs = dealt(chosen_pairs) if config.halving else chosen_pairs
        return PreferenceEffect(lm, some_pairs, block, chunks=_chunks(config, len(chosen_pairs)))

    effects = {name: effect_by(name) for name in dict.fromkeys(config.effects)}
    kept, chosen, facts = screen_and_rank(Measuring(effects, directions, norm, log, key, bar), tested, config)
    passed = len(kept) + sum("weaker" in one.fate for one in tested)
    counts |= {"screened": len(tested), "passed": passed, "swept": len(kept), "chosen": len(chosen)}
    counts["fates"] = dict(Counter(without_number(one.fate) for one in candidates))
    counts |= facts
    if not chosen:
        raise NoLatents(
            f"no latent both induces and repairs ({counts['fates']}); try more discover.pool or discover.pairs, "
            f"{'' if config.group else 'groups of latents (discover.group=2), '}another sae.block, or a stronger fine-tune"
        )
    latents = tuple(
        Latent(one.latent, one.sign, one.delta, one.best_induce, one.best_repair, one.best_induce_alpha, one.best_repair_alpha, one.score)
        for one in chosen
    )
    provenance = {"stage": "discover", "config": keyed(config), "pairs": len(chosen_pairs), "prompts": len(prompts)}
    found = LatentSet(lm.id, lm.revision, dictionary.id, dictionary.digest, block, latents, norm, provenance)
    return Discovery(found, candidates, delta, means["base"].frequency, counts)


def _chunks(config: DiscoverConfig, n: int) -> Chunks:
    return looks(config.rungs, n) if config.halving else ((0, n),)


def screen_and_rank(how: Measuring, tested: list[Candidate], config: DiscoverConfig) -> Staged:
    """Stages 2 and 3, of single latents and then of groups: (who went on from stage 2, the chosen, facts for the counts)."""
    stages = _halving if config.halving else _exhaustive
    kept, chosen, facts = stages(how, tested, config)
    room = (config.keep - len(kept)) // config.group if config.group else 0
    groups = groups_of(tested, kept, config.group) if room else []
    if not groups:
        return kept, chosen, facts
    for_groups = replace(config, keep=room, size=room, error=0.0, group=0)
    members, units, facts["groups"] = _grouped(stages, how, groups, for_groups)
    facts["units"] += units
    return kept + members, best_of_both(kept, groups, config.size), facts


def _exhaustive(how: Measuring, tested: list[Candidate], config: DiscoverConfig) -> Staged:
    """Stages 2 and 3 on all pairs: (who went on from stage 2, the chosen, facts for the counts)."""
    by = {name: Steered(effect, how.directions, how.norm, how.log, f"{how.key}-{name}") for name, effect in how.effects.items()}
    first, last = (by[name] for name in config.effects)
    kept = screen(
        first,
        tested,
        config.keep,
        config.alpha_induce,
        config.alpha_repair,
        config.budget,
        config.budget_slack,
        lambda done, total: how.bar("stage 2: induce and repair", done, total),
    )
    chosen = rank(
        last,
        kept,
        config.size,
        config.strengths,
        config.budget,
        config.budget_slack,
        lambda done, total: how.bar("stage 3: strengths", done, total),
        config.rule,
    )
    n_first, n_last = (how.effects[name].chunks[-1][1] for name in config.effects)
    for one in tested:
        one.pairs = n_first
    for one in kept:
        one.pairs = n_last
    units = sum(how.effects[name].chunks[-1][1] * sum(known[1] >= 0 for known in one.known) for name, one in by.items())
    return kept, chosen, {"units": units, "unsteered": {variant: asdict(last.measure(variant)) for variant in ("base", "plain")}}


def _halving(how: Measuring, tested: list[Candidate], config: DiscoverConfig) -> Staged:
    """The same with halving; each stage may spend half the error."""
    by = {name: Ledger(effect, how.directions, how.norm, how.log, f"{how.key}-{name}") for name, effect in how.effects.items()}
    first, last = (by[name] for name in config.effects)
    half = config.error / 2
    kept = screen_halving(
        first, tested, config.keep, config.alpha_induce, config.alpha_repair, config.budget, config.budget_slack, half, how.bar
    )
    chosen = rank_halving(
        last, kept, config.size, config.strengths, config.budget, config.budget_slack, half, config.stop_incoherent, how.bar
    )
    resting = {variant: asdict(last.items(unsteered(variant)).measurement()) for variant in ("base", "plain")}
    return kept, chosen, {"units": sum(one.units for one in by.values()), "unsteered": resting}


def _grouped(stages: Stages, how: Measuring, groups: list[Group], config: DiscoverConfig) -> tuple[list[Candidate], int, dict[str, int]]:
    """Stages 2 and 3 on groups: (members that went on from stage 2, best group first; units measured; counts).

    `config` is that of the groups: its `keep` says how many whole ones there is room for, and error 0 that with halving none is dropped
    but on what is certain. Measurements have a key over the members of all groups, with a group's number for a latent.
    """
    units, size = [group.unit for group in groups], len(groups[0].members)
    members = content_key([[(one.latent, one.sign) for one in group.members] for group in groups])
    of_groups = replace(
        how,
        directions={group.unit.latent: group.direction(how.directions) for group in groups},
        key=f"{how.key}-groups-{members}",
        bar=lambda what, done, total: how.bar(f"{what}, groups of {size}", done, total),
    )
    kept, _, facts = stages(of_groups, units, config)
    for group in groups:
        group.tell()
    went_on = [one for unit in kept for one in groups[unit.latent - 1].members]
    passed = len(kept) + sum("weaker" in unit.fate for unit in units)
    return went_on, facts["units"], {"size": size, "tested": len(groups), "passed": passed}


def _candidates(delta: Tensor, base: Means, a_side: int) -> list[Candidate]:
    raised, lowered = pool(delta, a_side)
    signed = [(k, 1) for k in raised] + [(k, -1) for k in lowered]
    return [Candidate(k, sign, float(delta[k]), float(base.frequency[k])) for k, sign in signed]


def _prescreen(
    lm: LanguageModel, dictionary: Dictionary, block: int, pairs: Sequence[Pair], candidates: list[Candidate], keep: int
) -> list[Candidate]:
    """Keep the candidates with the largest first-order induce + repair, half of each sign."""
    ids = [one.latent for one in candidates]
    signs = torch.tensor([float(one.sign) for one in candidates])
    gradients = [margin_gradient(lm, pairs, block, variant) for variant in ("base", "plain")]
    for one, value in zip(candidates, attributions(dictionary.directions(ids), signs, *gradients).tolist(), strict=True):
        one.attribution = value
        one.fate = "left out before screening: small first-order effect"
    ranked = sorted(candidates, key=lambda one: -one.attribution)
    chosen = halves(ranked, keep)
    for one in chosen:
        one.fate = "candidate"
    return chosen


def candidates_csv(candidates: Sequence[Candidate]) -> str:
    """`latents.csv`: one row a candidate with every figure and its fate, best first.

    The columns `group` (empty for none) and `dropped` (`True` or empty) are there where groups were tested: a group tells its members'
    fate anew, and else the fate says it.
    """
    order = sorted(
        candidates, key=lambda one: (one.rank or 1_000_000, -(one.screen_score if one.screen_score == one.screen_score else -1e9))
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    grouped = any(one.group for one in candidates)
    only = ("group", "dropped")
    names = [one.name for one in fields(Candidate) if grouped or one.name not in only]
    writer.writerow(names)
    for one in order:
        values = [(getattr(one, name) or "") if name in only else getattr(one, name) for name in names]
        writer.writerow(["" if isinstance(v, float) and v != v else f"{v:.6g}" if isinstance(v, float) else v for v in values])
    return text.getvalue()


def write_candidates(path: Path, candidates: Sequence[Candidate]) -> None:
    """Write `latents.csv` atomically."""
    write_text(path, candidates_csv(candidates))


def matched_random(latents: LatentSet, frequency: Tensor, seed: int, avoid: Sequence[int] = ()) -> LatentSet:
    """A control: for each latent a random other one among the 50 nearest in activation frequency, with the same sign.

    Args:
        frequency: `[n_latents]`, share of tokens on which each latent is active in the base model.
        avoid: latents that may not be drawn (the candidates of stage 1).
    """
    generator = random.Random(f"matched-{seed}")
    taken = set(latents.ids) | set(avoid)
    drawn = []
    for one in latents.latents:
        distance = (frequency - frequency[one.latent]).abs()
        near = [k for k in distance.argsort(stable=True).tolist() if k not in taken][:50]
        if not near:
            raise BlockemError("the SAE has too few latents for a matched random control")
        pick = generator.choice(near)
        taken.add(pick)
        drawn.append(Latent(pick, one.sign))
    provenance = {"stage": "control", "control": "random latents matched in activation frequency", "seed": seed}
    return LatentSet(
        latents.model, latents.revision, latents.sae, latents.sae_digest, latents.block, tuple(drawn), latents.norm, provenance
    )
