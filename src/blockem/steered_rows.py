"""Rows scored again and again under edits at one block, each time running only the blocks above it.

Answers to one prompt share a row of the batch: prompt, answer, answer. Each answer attends to the prompt and to itself, at the positions
that it would have alone. An edit at every position changes the prompt's states above the block too, so they must run again for each edit,
but once for all of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockem.examples import Encoded, by_length, padded_ids
from blockem.forwards import decoder, from_hidden, hidden_at, placed, supports_from_hidden, unwrapped
from blockem.fused import cpu_attention
from blockem.head import token_logprobs
from blockem.model import LanguageModel
from blockem.steering import add_at_block

NEAR, NEAR_NARROW = 0.01, 0.15
"""How far states of answers in one row may be from those that they have alone, in float32 and in narrower numbers. Rounding alone moves the
embedded model's by 0.04 in bfloat16; where answers see each other, or stand at wrong positions, they are off by 0.5."""
STACK = 64
"""Answers of one forward when several edits run at once (docs/DECISIONS.md, "Edits stacked as rows")."""


@dataclass(frozen=True)
class SharedBatch:
    """Answers of one forward, those to the same prompt in one row.

    Attributes:
        ids: `[rows, tokens]`.
        mask: `[rows, tokens]` where every row holds one answer, else `[rows, 1, tokens, tokens]`, added to the attention's scores.
        positions: `[rows, tokens]`, or None where every row holds one answer.
        n: how many answers.
        row, place: `[supervised]`: where each supervised token is foretold.
        target, answer: `[supervised]`: the token, and whose it is.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None
    n: int
    row: Tensor
    place: Tensor
    target: Tensor
    answer: Tensor

    def repeated(self, copies: int) -> SharedBatch:
        """All rows so many times, one copy after the other."""
        if copies == 1:
            return self
        copy = torch.arange(copies, device=self.row.device).repeat_interleave(len(self.row))
        return replace(
            self,
            ids=self.ids.repeat(copies, 1),
            mask=self.mask.repeat(copies, *[1] * (self.mask.dim() - 1)),
            positions=None if self.positions is None else self.positions.repeat(copies, 1),
            n=self.n * copies,
            row=self.row.repeat(copies) + copy * len(self.ids),
            place=self.place.repeat(copies),
            target=self.target.repeat(copies),
            answer=self.answer.repeat(copies) + copy * self.n,
        )


def same_prompt(rows: Sequence[Encoded]) -> list[list[int]]:
    """Indices of neighbouring rows with the same tokens before the first supervised one."""
    groups: list[list[int]] = []
    before: tuple[int, ...] | None = None
    for i, row in enumerate(rows):
        prompt = tuple(row.ids[: prompt_length(row)])
        if prompt != before:
            groups.append([])
        groups[-1].append(i)
        before = prompt
    return groups


def prompt_length(row: Encoded) -> int:
    """How many tokens stand before the first supervised one that can be foretold."""
    return max(1, next((i for i, one in enumerate(row.supervised) if one), len(row.ids)))


def shared_batch(groups: Sequence[Sequence[Encoded]], pad: int, device: torch.device, dtype: torch.dtype) -> SharedBatch:
    """Lay out answers, those of a group (which have the same prompt) in one row.

    Args:
        pad: id of the padding token.
        dtype: of the mask that is added where rows hold several answers.
    """
    laid, spans, found = [], [], []
    answers = 0
    for number, group in enumerate(groups):
        start = prompt_length(group[0])
        tokens, span = list(group[0].ids[:start]), [(0, start)]
        for one in group:
            shift = len(tokens) - start
            for i in range(start, len(one.ids)):
                if one.supervised[i]:
                    found.append((number, i - 1 if i == start else i - 1 + shift, one.ids[i], answers))
            tokens += one.ids[start:]
            span.append((start + shift, len(tokens)))
            answers += 1
        laid.append(tokens)
        spans.append(span)
    ids, mask = padded_ids(laid, pad, device)
    positions = None
    if any(len(group) > 1 for group in groups):
        positions, mask = _apart(spans, ids.shape[1], device, dtype)
    row, place, target, answer = torch.tensor(found, dtype=torch.long, device=device).view(-1, 4).unbind(1)
    return SharedBatch(ids, mask, positions, answers, row, place, target, answer)


def _apart(spans: Sequence[Sequence[tuple[int, int]]], length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(positions `[rows, tokens]`, mask `[rows, 1, tokens, tokens]`) by which answers of a row do not see each other.

    Args:
        spans: of each row, the half-open places of its prompt and of each answer.
    """
    positions = torch.zeros(len(spans), length, dtype=torch.long)
    part = torch.full((len(spans), length), -1)
    for number, span in enumerate(spans):
        prompt = span[0][1]
        for which, (start, stop) in enumerate(span):
            positions[number, start:stop] = torch.arange(stop - start) + (prompt if which else 0)
            part[number, start:stop] = which
    seen = part[:, :, None] == part[:, None, :]  # padding sees padding, so that no row of the mask is empty
    seen |= (part[:, None, :] == 0) & (part[:, :, None] >= 0)
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return positions.to(device), mask[:, None].to(device)


def supports_sharing(lm: LanguageModel, longest: int = 0) -> bool:
    """Whether this architecture gives answers in one row the states that they have alone; measured on a few tokens, not assumed.

    Args:
        longest: tokens of the longest row; attention through a narrower window is not what the shared mask says.
    """
    window = getattr(unwrapped(lm.model).config.get_text_config(), "sliding_window", None)
    if window and window < longest:
        return False
    ids = list(range(5, 21))
    rows = [Encoded(tuple(ids[:6] + rest), (False,) * 6 + (True,) * len(rest)) for rest in (ids[6:10], ids[10:])]
    dtype = next(lm.model.parameters()).dtype
    finals = []
    with torch.inference_mode():
        for groups in ([[rows[0]], [rows[1]]], [rows]):
            batch = shared_batch(groups, lm.tokenizer.pad_token_id, lm.device, dtype)
            try:
                finals.append(_final(lm, batch)[batch.row, batch.place].float())
            except Exception:  # an attention that takes no mask of its own raises many kinds
                return False
    alone, together = finals
    return bool((alone - together).norm() <= (NEAR if dtype == torch.float32 else NEAR_NARROW) * alone.norm())


def _final(lm: LanguageModel, batch: SharedBatch) -> Tensor:
    """Final hidden states `[rows, tokens, d_model]` of a whole forward."""
    output = decoder(lm.model)(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **placed(batch.positions))
    found: Tensor = output.last_hidden_state
    return found


@dataclass(frozen=True)
class Prefix:
    """A batch whose hidden states at a block are kept, so that only the blocks above need to run again.

    Attributes:
        chunk: which chunk of rows it belongs to.
        order: which rows its answers are.
        batch: how they are laid out.
        hidden: `[rows, tokens, d_model]` at the block, or None where the architecture does not allow it.
    """

    chunk: int
    order: list[int]
    batch: SharedBatch
    hidden: Tensor | None


class SteeredRows:
    """The same rows scored again and again under edits at one block.

    Args:
        batch: rows of one prefix, rounded up to whole prompts.
        chunks: half-open ranges of rows that can be scored alone; no prefix crosses their borders. One chunk if none is given.
        stack: rows of one forward: prefixes smaller than that are run with several edits at once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[Encoded],
        block: int,
        variant: str,
        batch: int = 32,
        chunks: Sequence[tuple[int, int]] = (),
        stack: int = STACK,
    ) -> None:
        self.lm, self.rows, self.block, self.variant, self.stack = lm, rows, block, variant, stack
        self.chunks = tuple(chunks) or ((0, len(rows)),)
        self.tokens = torch.tensor([row.n_supervised for row in rows])
        self.prefixes: list[Prefix] = []
        pad, dtype = lm.tokenizer.pad_token_id, next(lm.model.parameters()).dtype
        with torch.inference_mode(), lm.variant(variant), cpu_attention(lm.model):
            shortcut, sharing = supports_from_hidden(lm, block), supports_sharing(lm, max((len(row.ids) for row in rows), default=0))
            for number, (start, stop) in enumerate(self.chunks):
                groups = same_prompt(rows[start:stop]) if sharing else [[i] for i in range(stop - start)]
                widest = max(map(len, groups), default=1)
                lengths = [sum(len(rows[start + i].ids) for i in group) for group in groups]
                for places in by_length(lengths, -(-batch // widest)):
                    chosen = [[start + i for i in groups[place]] for place in places]
                    laid = shared_batch([[rows[i] for i in group] for group in chosen], pad, lm.device, dtype)
                    hidden = hidden_at(lm.model, laid.ids, laid.mask, block, laid.positions) if shortcut else None
                    self.prefixes.append(Prefix(number, [i for group in chosen for i in group], laid, hidden))

    def logprobs(self, vector: Tensor | None = None) -> Tensor:
        """Mean log-probability per supervised token, `[rows]`, with `vector [d_model]` added at the block."""
        edit = torch.zeros(self.lm.d_model) if vector is None else vector
        return self.logprobs_many(edit[None])[0]

    def logprobs_many(self, vectors: Tensor, chunk: int | None = None) -> Tensor:
        """The same under each of `vectors [edits, d_model]`: `[edits, rows]`, of all rows or of one chunk's."""
        found = torch.zeros(len(vectors), len(self.rows))
        with torch.inference_mode(), self.lm.variant(self.variant), cpu_attention(self.lm.model):
            for prefix in self.prefixes:
                if chunk not in (None, prefix.chunk):
                    continue
                at_once = max(1, self.stack // len(prefix.order))
                for start in range(0, len(vectors), at_once):
                    some = vectors[start : start + at_once]
                    found[start : start + at_once, prefix.order] = self._scored(prefix, some).cpu()
        found = found / self.tokens
        return found if chunk is None else found[:, slice(*self.chunks[chunk])]

    def _scored(self, prefix: Prefix, vectors: Tensor) -> Tensor:
        """Summed log-probabilities `[edits, answers]` of one prefix, every edit a copy of its rows."""
        model, copies = self.lm.model, len(vectors)
        batch = prefix.batch.repeated(copies)
        if prefix.hidden is not None:
            moved = prefix.hidden + vectors[:, None, None].to(prefix.hidden.device, prefix.hidden.dtype)
            final = from_hidden(model, moved.flatten(0, 1), batch.mask, self.block, batch.positions)
        else:
            with add_at_block(model, self.block, vectors.repeat_interleave(len(prefix.batch.ids), dim=0)):
                final = _final(self.lm, batch)
        picked = token_logprobs(model, final[batch.row, batch.place], batch.target)
        return picked.new_zeros(batch.n).index_add(0, batch.answer, picked).view(copies, -1)
