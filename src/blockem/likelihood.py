"""Log-probabilities of given completions: held-out loss, and the preference between a right and a wrong answer.

Nothing is generated. Logits are computed at supervised positions only, and a pass that starts at a block reuses the hidden states
of everything below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockem.bundled import Pair
from blockem.errors import BlockemError
from blockem.examples import Encoded, by_length, encode, one_turn, right_padded
from blockem.head import supervised_logprobs
from blockem.model import LanguageModel, decoder, from_hidden, hidden_at, supports_from_hidden
from blockem.steering import add_at_block


@dataclass(frozen=True)
class Prefix:
    """A batch whose hidden states at a block are kept, so that only the blocks above need to run again.

    Attributes:
        order: which rows these are.
        batch: the padded batch.
        hidden: `[rows, tokens, d_model]` at the block, or None where the architecture does not allow it.
    """

    order: list[int]
    batch: dict[str, Tensor]
    hidden: Tensor | None


def _scores(lm: LanguageModel, final: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probability of the supervised tokens of each row, `[rows]`, from final hidden states."""
    picked, rows = supervised_logprobs(lm.model, final, labels)
    sums = torch.zeros(labels.shape[0], dtype=torch.float32, device=labels.device)
    return sums.index_add_(0, rows, picked)


def completion_logprobs(lm: LanguageModel, rows: Sequence[Encoded], batch: int = 16) -> Tensor:
    """Mean log-probability per supervised token of each row, `[rows]`, nats, under the model as it is switched now."""
    found = torch.zeros(len(rows))
    with torch.inference_mode():
        for chosen in by_length([len(row.ids) for row in rows], batch):
            padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            final = decoder(lm.model)(
                input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False
            ).last_hidden_state
            found[chosen] = _scores(lm, final, padded["labels"]).cpu()
    return found / torch.tensor([row.n_supervised for row in rows])


def completion_losses(lm: LanguageModel, rows: Sequence[Encoded], batch: int = 16) -> tuple[Tensor, Tensor]:
    """Summed loss and number of supervised tokens of each row; their totals' ratio is the loss per token."""
    tokens = torch.tensor([float(row.n_supervised) for row in rows])
    return -completion_logprobs(lm, rows, batch) * tokens, tokens


class SteeredRows:
    """The same rows scored again and again under edits at one block, each time running only the blocks above it."""

    def __init__(self, lm: LanguageModel, rows: Sequence[Encoded], block: int, variant: str, batch: int = 32) -> None:
        self.lm, self.rows, self.block, self.variant = lm, rows, block, variant
        self.tokens = torch.tensor([row.n_supervised for row in rows])
        shortcut = supports_from_hidden(lm, block)
        self.prefixes: list[Prefix] = []
        with torch.inference_mode(), lm.variant(variant):
            for chosen in by_length([len(row.ids) for row in rows], batch):
                padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
                hidden = hidden_at(lm.model, padded["input_ids"], padded["attention_mask"], block) if shortcut else None
                self.prefixes.append(Prefix(chosen, padded, hidden))

    def logprobs(self, vector: Tensor | None = None) -> Tensor:
        """Mean log-probability per supervised token, `[rows]`, with `vector [d_model]` added at the block."""
        found = torch.zeros(len(self.rows))
        edit = torch.zeros(self.lm.d_model) if vector is None else vector
        with torch.inference_mode(), self.lm.variant(self.variant):
            for prefix in self.prefixes:
                mask = prefix.batch["attention_mask"]
                if prefix.hidden is not None:
                    moved = prefix.hidden + edit.to(prefix.hidden.device, prefix.hidden.dtype)
                    final = from_hidden(self.lm.model, moved, mask, self.block)
                else:
                    with add_at_block(self.lm.model, self.block, edit):
                        final = decoder(self.lm.model)(
                            input_ids=prefix.batch["input_ids"], attention_mask=mask, use_cache=False
                        ).last_hidden_state
                found[prefix.order] = _scores(self.lm, final, prefix.batch["labels"]).cpu()
        return found / self.tokens


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
