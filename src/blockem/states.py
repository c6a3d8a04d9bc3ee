"""Hidden states of the same tokens under several models: what the penalty, the shift and the audit all compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blockem.examples import IGNORED, Encoded, by_length, right_padded
from blockem.forwards import hidden_at_each
from blockem.model import LanguageModel
from blockem.progress import Progress

States = dict[str, dict[int, Tensor]]
"""By model and block: `[tokens, d_model]`, the same tokens in the same order everywhere."""


def supervised_states(
    lm: LanguageModel,
    rows: Sequence[Encoded],
    variants: Sequence[str],
    wanted: Sequence[int],
    batch: int = 16,
    progress: Progress | None = None,
) -> Iterator[States]:
    """The outputs of the `wanted` blocks at the supervised tokens of `rows`, a batch at a time, longest rows first.

    Args:
        variants: "base" and loaded adapters.
    """
    done = 0
    for chosen in by_length([len(row.ids) for row in rows], batch):
        padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
        where = padded["labels"] != IGNORED
        found: States = {}
        for name in variants:
            with torch.inference_mode(), lm.variant(name):
                hidden = hidden_at_each(lm.model, padded["input_ids"], padded["attention_mask"], wanted)
            found[name] = {block: output[where] for block, output in hidden.items()}
        yield found
        done += len(chosen)
        if progress:
            progress(done, len(rows))
