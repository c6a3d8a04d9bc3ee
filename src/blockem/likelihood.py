"""Log-probabilities of given completions: held-out loss, and the preference between a right and a wrong answer.

Nothing is generated. Logits are computed at supervised positions only, and a pass that starts at a block reuses the hidden states
of everything below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockem.bundled import Pair
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded, by_length, encode, one_turn, right_padded
from blockem.forwards import decoder, from_hidden, hidden_at, supports_from_hidden
from blockem.head import supervised_logprobs
from blockem.model import LanguageModel
from blockem.steering import add_at_block

STACK = 64
"""Rows of one forward when several edits run at once (docs/DECISIONS.md, "Edits stacked as rows")."""


@dataclass(frozen=True)
class Prefix:
    """A batch whose hidden states at a block are kept, so that only the blocks above need to run again.

    Attributes:
        chunk: which chunk of rows it belongs to.
        order: which rows these are.
        batch: the padded batch.
        hidden: `[rows, tokens, d_model]` at the block, or None where the architecture does not allow it.
    """

    chunk: int
    order: list[int]
    batch: dict[str, Tensor]
    hidden: Tensor | None


def summed_logprobs(model: nn.Module, final: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of the supervised tokens of each row, summed, `[rows]`, float32, nats, from final hidden states; with gradient."""
    picked, rows = supervised_logprobs(model, final, labels)
    return picked.new_zeros(len(labels)).index_add(0, rows, picked)


def _final(model: nn.Module, rows: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Final hidden states `[rows, tokens, d_model]` and labels `[rows, tokens]` of one batch, padded on the right."""
    padded = right_padded(rows, pad, next(model.parameters()).device)
    output = decoder(model)(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False)
    return output.last_hidden_state, padded["labels"]


def row_logprobs(model: nn.Module, rows: Sequence[Encoded], pad: int) -> Tensor:
    """Mean log-probability per supervised token of the rows of one batch, `[rows]`, float32, nats, with gradient."""
    sums = summed_logprobs(model, *_final(model, rows, pad))
    return sums / sums.new_tensor([float(row.n_supervised) for row in rows])


def final_states(model: nn.Module, rows: Sequence[Encoded], pad: int) -> list[Tensor]:
    """Final hidden states from which the supervised tokens of each row of one batch are foretold, `[supervised, d_model]` each."""
    final, labels = _final(model, rows, pad)
    return [states[at] for states, at in zip(final[:, :-1], labels[:, 1:] != IGNORED, strict=True)]


def completion_logprobs(lm: LanguageModel, rows: Sequence[Encoded], batch: int = 16) -> Tensor:
    """Mean log-probability per supervised token of each row, `[rows]`, nats, under the model as it is switched now."""
    found = torch.zeros(len(rows))
    with torch.inference_mode():
        for chosen in by_length([len(row.ids) for row in rows], batch):
            found[chosen] = row_logprobs(lm.model, [rows[i] for i in chosen], lm.tokenizer.pad_token_id).cpu()
    return found


def completion_losses(lm: LanguageModel, rows: Sequence[Encoded], batch: int = 16) -> tuple[Tensor, Tensor]:
    """Summed loss and number of supervised tokens of each row; their totals' ratio is the loss per token."""
    tokens = torch.tensor([float(row.n_supervised) for row in rows])
    return -completion_logprobs(lm, rows, batch) * tokens, tokens


def losses_under(lm: LanguageModel, rows: Sequence[Encoded], variants: Sequence[str]) -> dict[str, float]:
    """Loss per supervised token of `rows` under each of "base" and loaded adapters, nats."""
    found = {}
    for variant in variants:
        with lm.variant(variant):
            loss, tokens = completion_losses(lm, rows)
            found[variant] = float(loss.sum() / tokens.sum())
    return found


class SteeredRows:
    """The same rows scored again and again under edits at one block, each time running only the blocks above it.

    Args:
        batch: rows of one prefix.
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
        shortcut = supports_from_hidden(lm, block)
        self.prefixes: list[Prefix] = []
        with torch.inference_mode(), lm.variant(variant):
            for number, (start, stop) in enumerate(self.chunks):
                for places in by_length([len(row.ids) for row in rows[start:stop]], batch):
                    chosen = [start + place for place in places]
                    padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
                    hidden = hidden_at(lm.model, padded["input_ids"], padded["attention_mask"], block) if shortcut else None
                    self.prefixes.append(Prefix(number, chosen, padded, hidden))

    def logprobs(self, vector: Tensor | None = None) -> Tensor:
        """Mean log-probability per supervised token, `[rows]`, with `vector [d_model]` added at the block."""
        edit = torch.zeros(self.lm.d_model) if vector is None else vector
        return self.logprobs_many(edit[None])[0]

    def logprobs_many(self, vectors: Tensor, chunk: int | None = None) -> Tensor:
        """The same under each of `vectors [edits, d_model]`: `[edits, rows]`, of all rows or of one chunk's."""
        found = torch.zeros(len(vectors), len(self.rows))
        with torch.inference_mode(), self.lm.variant(self.variant):
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
        """Summed log-probabilities `[edits, rows]` of one prefix, every edit a copy of its rows."""
        model, copies = self.lm.model, len(vectors)
        mask = prefix.batch["attention_mask"].repeat(copies, 1)
        labels = prefix.batch["labels"].repeat(copies, 1)
        if prefix.hidden is not None:
            moved = prefix.hidden + vectors[:, None, None].to(prefix.hidden.device, prefix.hidden.dtype)
            final = from_hidden(model, moved.flatten(0, 1), mask, self.block)
        else:
            with add_at_block(model, self.block, vectors.repeat_interleave(len(prefix.order), dim=0)):
                ids = prefix.batch["input_ids"].repeat(copies, 1)
                final = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return summed_logprobs(model, final, labels).view(copies, -1)


def encode_pairs(lm: LanguageModel, pairs: Sequence[Pair], max_tokens: int = 512) -> list[Encoded]:
    """Right and wrong answers in turn: row 2i is pair i's right answer, row 2i + 1 its wrong one.

    Raises:
        BlockemError: an answer lies beyond `max_tokens`.
    """
    rows = []
    for pair in pairs:
        for answer in (pair.right, pair.wrong):
            row = encode(lm.tokenizer, one_turn(pair.prompt, answer), max_tokens)
            if not row.n_supervised:
                raise BlockemError(f"the pair {pair.prompt[:60]!r} is too long: its answer lies beyond {max_tokens} tokens; shorten it")
            rows.append(row)
    return rows


def margins(logprobs: Tensor) -> Tensor:
    """Wrong minus right, `[pairs]`, nats per token, from the rows of `encode_pairs`; positive prefers the wrong answer."""
    return logprobs[1::2] - logprobs[0::2]
