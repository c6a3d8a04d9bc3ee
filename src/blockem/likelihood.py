"""Log-probabilities of given completions: held-out loss, and the preference between a right and a wrong answer.

Nothing is generated, and logits are computed at supervised positions only. `steered_rows` scores the same rows under many edits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blockem.bundled import Pair
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded, by_length, encode, one_turn, right_padded
from blockem.forwards import decoder, evaluating
from blockem.head import supervised_logprobs
from blockem.model import LanguageModel


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


def loss_per_token(lm: LanguageModel, rows: Sequence[Encoded]) -> float:
    """Loss per supervised token of `rows`, nats, under the model as it is switched now; one in training is looked at without dropout."""
    with evaluating(lm.model):
        loss, tokens = completion_losses(lm, rows)
    return float(loss.sum() / tokens.sum())


def losses_under(lm: LanguageModel, rows: Sequence[Encoded], variants: Sequence[str]) -> dict[str, float]:
    """Loss per supervised token of `rows` under each of "base" and loaded adapters, nats."""
    found = {}
    for variant in variants:
        with lm.variant(variant):
            found[variant] = loss_per_token(lm, rows)
    return found


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
