"""Activation patching between two models: the outputs of one block in one model are replaced by the other's on the same tokens.

Prompt (prefix) tokens, block by block, in both directions: base → re-emerged, which may repair it, and re-emerged → base, which may induce
misalignment (BLOCK-EM, re-emergence). And while decoding: at each step the source runs again on the same context, and its output at one
block replaces the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockem.bundled import Pair
from blockem.evaluation import Array, Interval, interval, mean
from blockem.examples import IGNORED, Encoded, by_length, padded_ids, right_padded
from blockem.forwards import decoder, from_hidden, hidden_at, hidden_at_each, supports_from_hidden, unwrapped
from blockem.head import next_logits
from blockem.likelihood import completion_logprobs, encode_pairs, margins, summed_logprobs
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.steering import edit_at_block

POSITIONS = ("last", "all")


def replace_at_block(model: nn.Module, block: int, values: Tensor, where: Tensor) -> AbstractContextManager[None]:
    """Replace the output of `block` by `values [rows, tokens, d_model]` where `where [rows, tokens]` says so, while the context lasts."""

    def patched(hidden: Tensor) -> Tensor:
        if hidden.shape != values.shape or hidden.shape[:2] != where.shape:
            raise ValueError(f"values {tuple(values.shape)} and where {tuple(where.shape)} do not fit an output {tuple(hidden.shape)}")
        return torch.where(where[..., None], values.to(hidden.device, hidden.dtype), hidden)

    return edit_at_block(model, block, patched)


def prompt_positions(labels: Tensor) -> Tensor:
    """Where the prompt stands, `[rows, tokens]`, bool: everything before a row's first supervised token."""
    return ~(labels != IGNORED).cumsum(dim=1).bool()


def patched_logprobs(
    lm: LanguageModel,
    rows: Sequence[Encoded],
    source: str,
    target: str,
    wanted: Sequence[int],
    batch: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Mean log-probability per supervised token of `target` with its prompt tokens patched from `source`, nats.

    Args:
        source, target: "base" or a loaded adapter.
        wanted: blocks to patch at.

    Returns:
        `[len(wanted) + 1, rows]`: patched at each of the blocks alone, and at all of them at once.
    """
    found = torch.zeros(len(wanted) + 1, len(rows))
    with lm.variant("base"):
        short = {block: supports_from_hidden(lm, block) for block in wanted}
    model, done = lm.model, 0
    with torch.inference_mode():
        for chosen in by_length([len(row.ids) for row in rows], batch):
            padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            ids, mask, labels = padded["input_ids"], padded["attention_mask"], padded["labels"]
            where = prompt_positions(labels)
            with lm.variant(source):
                given = hidden_at_each(model, ids, mask, wanted)
            with lm.variant(target):
                own = hidden_at_each(model, ids, mask, wanted)
                for place, block in enumerate(wanted):
                    if short[block]:
                        moved = torch.where(where[..., None], given[block], own[block])
                        final = from_hidden(model, moved, mask, block)
                    else:
                        final = _replaced(model, ids, mask, {block: given[block]}, where)
                    found[place, chosen] = summed_logprobs(model, final, labels).cpu()
                found[-1, chosen] = summed_logprobs(model, _replaced(model, ids, mask, given, where), labels).cpu()
            done += len(chosen)
            if progress:
                progress(done, len(rows))
    return found / torch.tensor([row.n_supervised for row in rows])


def _replaced(model: nn.Module, ids: Tensor, mask: Tensor, given: dict[int, Tensor], where: Tensor) -> Tensor:
    """Final hidden states `[rows, tokens, d_model]` of a whole forward with blocks patched."""
    with ExitStack() as stack:
        for block, values in given.items():
            stack.enter_context(replace_at_block(model, block, values, where))
        final: Tensor = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return final


@dataclass(frozen=True)
class PatchedBlock:
    """One block; shares of the gap in margin between the two models, with 95 % intervals over pairs.

    Attributes:
        block: index from 0.
        repaired: share of the gap that base → re-emerged closes.
        induced: share of the gap that re-emerged → base opens.
    """

    block: int
    repaired: Interval | None
    induced: Interval | None


@dataclass(frozen=True)
class Patching:
    """Prompt tokens patched block by block.

    Attributes:
        gap: margin of the re-emerged model minus the base's, nats per token, paired over pairs.
        blocks: each patched block.
        every: all of them at once, `block` −1: the most that the prompt's side can do.
        upstream, downstream: mean share repaired by blocks up to and with the SAE's, and by those after it; None without such blocks.
        difference: upstream − downstream, on the same pairs.
        pairs: how many.
    """

    gap: Interval | None
    blocks: list[PatchedBlock]
    every: PatchedBlock
    upstream: Interval | None
    downstream: Interval | None
    difference: Interval | None
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def patch_prompts(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    model: str,
    block: int,
    wanted: Sequence[int],
    max_tokens: int = 512,
    resamples: int = 2000,
    batch: int = 16,
    progress: Progress | None = None,
) -> Patching:
    """Patch the prompts of teacher-forced pairs between the base and the loaded adapter `model`, both ways.

    Args:
        block: the SAE's block, which parts upstream from downstream.
        wanted: blocks to patch at.
    """
    rows = encode_pairs(lm, pairs, max_tokens)
    own: dict[str, Array] = {}
    patched: dict[str, Array] = {}
    for turn, (source, target) in enumerate((("base", model), (model, "base"))):
        with lm.variant(target):
            own[target] = _margins(completion_logprobs(lm, rows, batch)[None])[0]

        def bar(done: int, total: int, turn: int = turn) -> None:
            if progress:
                progress(done + turn * total, 2 * total)

        patched[target] = _margins(patched_logprobs(lm, rows, source, target, wanted, batch, bar))
    return summarise(own["base"], own[model], patched[model], patched["base"], wanted, block, resamples)


def _margins(logprobs: Tensor) -> Array:
    """`[patches, rows]` of pairs in turn → `[patches, pairs]`, float64."""
    found: Array = np.stack([margins(one).double().numpy() for one in logprobs])
    return found


def summarise(
    base: Array, model: Array, repaired: Array, induced: Array, wanted: Sequence[int], block: int, resamples: int = 2000
) -> Patching:
    """Shares and their intervals from margins `[pairs]` of both models and `[len(wanted) + 1, pairs]` of the patched ones."""

    def shares(place: int, name: int) -> PatchedBlock:
        return PatchedBlock(
            name,
            interval(share_of_gap, (model, repaired[place], base), resamples),
            interval(share_of_gap, (base, induced[place], model), resamples),
        )

    sides: list[Array | None] = []
    for places in ([i for i, b in enumerate(wanted) if b <= block], [i for i, b in enumerate(wanted) if b > block]):
        sides.append(repaired[places].mean(axis=0) if places else None)
    up, down = sides
    return Patching(
        gap=interval(lambda a, b: mean(a) - mean(b), (model, base), resamples),
        blocks=[shares(place, name) for place, name in enumerate(wanted)],
        every=shares(len(wanted), -1),
        upstream=None if up is None else interval(share_of_gap, (model, up, base), resamples),
        downstream=None if down is None else interval(share_of_gap, (model, down, base), resamples),
        difference=None if up is None or down is None else interval(_share_between, (model, up, down, base), resamples),
        pairs=len(base),
    )


def share_of_gap(own: Array, patched: Array, other: Array) -> Array:
    """(own − patched) / (own − other) of mean margins: how far a patch takes a model toward the other one."""
    return _share_between(own, patched, own, other)


def _share_between(own: Array, patched: Array, less: Array, other: Array) -> Array:
    """(less − patched) / (own − other) of mean margins: how much more of the gap one patch closes than another."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = (mean(less) - mean(patched)) / (mean(own) - mean(other))
        return found


def decode_patched(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    source: str,
    target: str,
    block: int,
    positions: str = "last",
    max_new_tokens: int = 32,
    batch: int = 16,
    progress: Progress | None = None,
) -> list[list[int]]:
    """New tokens of `target`, decoded greedily while `source` is patched into it at `block`.

    At each step both read the whole context so far; the source's output at the block replaces the target's at the `last` position, or at
    `all` of them. Nothing is cached from step to step, so that at "last" the positions before it are the target's own.

    Args:
        prompts: token ids.

    Returns:
        New token ids of each prompt; an end-of-text token is kept, nothing comes after it.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; use last or all")
    settings = unwrapped(lm.model).generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    found: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    with torch.inference_mode():
        for step in range(max_new_tokens):
            contexts = [[*prompts[i], *found[i]] for i in running]
            for places in by_length([len(context) for context in contexts], batch):
                tokens = _next_tokens(lm, [contexts[j] for j in places], source, target, block, positions)
                for j, token in zip(places, tokens, strict=True):
                    found[running[j]].append(token)
            running = [i for i in running if found[i][-1] not in ends]
            if progress:
                progress(step + 1 if running else max_new_tokens, max_new_tokens)
            if not running:
                break
    return found


def _next_tokens(lm: LanguageModel, contexts: Sequence[Sequence[int]], source: str, target: str, block: int, positions: str) -> list[int]:
    """The likeliest next token of each context under the patched target."""
    ids, mask = padded_ids(contexts, lm.tokenizer.pad_token_id, lm.device)
    last = mask.sum(dim=1) - 1
    where = mask.bool() if positions == "all" else torch.arange(ids.shape[1], device=ids.device) == last[:, None]
    with lm.variant(source):
        given = hidden_at(lm.model, ids, mask, block)
    with lm.variant(target):
        final = _replaced(lm.model, ids, mask, {block: given}, where)
        chosen: list[int] = next_logits(lm.model, final[torch.arange(len(contexts)), last]).argmax(dim=-1).tolist()
    return chosen
