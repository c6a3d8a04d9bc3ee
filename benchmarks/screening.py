"""Teacher-forced screening against the straightforward way, steering by row, and how cost grows with the work."""

from __future__ import annotations

import torch
from measuring import Measure, in_turn, ratio
from torch import Tensor

from blockem.bundled import Pair, pairs
from blockem.dictionary import load_dictionary
from blockem.examples import IGNORED, by_length, right_padded
from blockem.forwards import hidden_at
from blockem.likelihood import encode_pairs, margins
from blockem.model import LanguageModel, load_model
from blockem.steered_rows import SteeredRows
from blockem.steering import add_at_block

BLOCK, PAIRS, STRENGTH = 18, 20, 8.0


def chosen_pairs(n: int) -> list[Pair]:
    return [pair for pair in pairs() if pair.split == "select" and pair.domain != "health"][:n]


def straightforward(lm: LanguageModel, chosen: list[Pair], vector: Tensor, batch: int = 32) -> Tensor:
    """Margins `[pairs]` by a hook, whole forwards and all logits."""
    rows = encode_pairs(lm, chosen)
    found = torch.zeros(len(rows))
    with torch.inference_mode(), add_at_block(lm.model, BLOCK, vector):
        for places in by_length([len(row.ids) for row in rows], batch):
            padded = right_padded([rows[i] for i in places], lm.tokenizer.pad_token_id)
            logits = lm.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
            targets = padded["labels"][:, 1:]
            logprobs = logits[:, :-1].float().log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
            kept = targets != IGNORED
            found[places] = (logprobs * kept).sum(1) / kept.sum(1)
    return margins(found)


def measure(repeat: int) -> list[Measure]:
    lm, dictionary = load_model(), load_dictionary()
    directions = STRENGTH * dictionary.directions(range(40, 56))
    few = chosen_pairs(PAIRS)
    effect = SteeredRows(lm, encode_pairs(lm, few), BLOCK, "base")

    def ours(vectors: Tensor, using: SteeredRows) -> list[float]:
        return [float(margins(using.logprobs(vector)).mean()) for vector in vectors]

    apart = [abs(a - float(straightforward(lm, few, v).mean())) for a, v in zip(ours(directions[:2], effect), directions[:2], strict=True)]
    assert max(apart) < 0.02, f"the two ways differ by {max(apart):.3f} nats"
    more = SteeredRows(lm, encode_pairs(lm, chosen_pairs(4 * PAIRS)), BLOCK, "base")
    works = {
        "ours": lambda: ours(directions[:4], effect),
        "by hooks": lambda: [straightforward(lm, few, vector) for vector in directions[:4]],
        "4 x candidates": lambda: ours(directions, effect),
        "4 x pairs": lambda: ours(directions[:4], more),
    }
    taken = in_turn(works, repeat)
    return [
        ratio("teacher-forced screening, candidates a second", "hook and whole forward", taken["by hooks"], taken["ours"], 3.0, False),
        ratio("screening 4 times the candidates", "once", taken["4 x candidates"], taken["ours"], 4.2),
        ratio("screening 4 times the pairs", "once", taken["4 x pairs"], taken["ours"], 4.2),
        *steering(lm, repeat),
    ]


def steering(lm: LanguageModel, repeat: int) -> list[Measure]:
    """A forward with an edit of its own for each row, and without."""
    rows = encode_pairs(lm, chosen_pairs(16))
    padded = right_padded(rows, lm.tokenizer.pad_token_id)
    edits = torch.randn(len(rows), lm.d_model)

    def forward() -> None:
        with torch.inference_mode():
            hidden_at(lm.model, padded["input_ids"], padded["attention_mask"], lm.n_blocks - 1)

    def steered() -> None:
        with add_at_block(lm.model, BLOCK, edits):
            forward()

    taken = in_turn({"steered": steered, "not": forward}, max(repeat, 9))
    return [ratio("forward with an edit a row", "the same batch unsteered", taken["steered"], taken["not"], 1.03)]
