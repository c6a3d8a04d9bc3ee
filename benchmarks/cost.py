"""What the work must cost: floating-point operations and bytes from an architecture's numbers alone (`python benchmarks/cost.py`).

A multiply-add counts as two operations. A LoRA step needs no gradient of frozen weights, so that its backward pass through a linear map
costs one product, not two. Attention is counted over the whole square, as plain matrix products compute it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A decoder with grouped attention and a gated MLP."""

    name: str
    blocks: int
    d_model: int
    d_ff: int
    heads: int
    groups: int
    width: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Weights of one block's seven linear maps."""
        attention = self.d_model * self.width * (2 * self.heads + 2 * self.groups)
        return attention + 3 * self.d_model * self.d_ff

    def block(self, tokens: int) -> float:
        """Operations a token of one block's forward, in a sequence of `tokens`."""
        return 2 * self.linear + 4 * tokens * self.heads * self.width

    @property
    def head(self) -> float:
        """Operations a position of the output head."""
        return 2.0 * self.d_model * self.vocabulary

    @property
    def weights(self) -> int:
        """Weights that a forward reads: all blocks and the head."""
        return self.blocks * self.linear + self.d_model * self.vocabulary


MODELS = (
    Architecture("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152),
    Architecture("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256),
    Architecture("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256),
    Architecture("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256),
)


@dataclass(frozen=True)
class Work:
    """Sizes of the jobs: a training row, a pair's answer, a screening."""

    tokens: int = 130
    supervised: int = 45
    pair_tokens: int = 75
    pair_answer: int = 25
    prompt: int = 45
    new: int = 64


def plain_step(a: Architecture, w: Work, rank: int = 32) -> float:
    """Operations of one row's LoRA step: forward, backward through activations, the adapters' own products, head at supervised tokens."""
    adapters = 2 * rank * (a.width * (2 * a.heads + 2 * a.groups) + 4 * a.d_model + 3 * a.d_model + 3 * a.d_ff)
    forward = a.blocks * (a.block(w.tokens) + adapters)
    backward = a.blocks * (2 * a.linear + 8 * w.tokens * a.heads * a.width + 2 * adapters)
    return w.tokens * (forward + backward) + w.supervised * 2 * a.head


def base_pass(a: Architecture, w: Work, block: int) -> float:
    """One row through the base up to a block."""
    return w.tokens * (block + 1) * a.block(w.tokens)


def penalty(a: Architecture, w: Work, latents: int) -> float:
    """Reading K latents forward and backward at one row's supervised tokens."""
    return w.supervised * 6.0 * latents * a.d_model


def screening(a: Architecture, w: Work, block: int, shared: bool) -> float:
    """One pair under one edit: both answers teacher-forced, above the block alone (shared) or the whole model with all logits."""
    if shared:
        return 2 * (w.pair_tokens * (a.blocks - block - 1) * a.block(w.pair_tokens) + w.pair_answer * a.head)
    return 2 * w.pair_tokens * (a.blocks * a.block(w.pair_tokens) + a.head)


def generated(a: Architecture, w: Work, block: int, shared: bool) -> float:
    """One prompt under one edit: the prompt above the block (shared) or whole, then `new` tokens through everything."""
    over = (a.blocks - block - 1) if shared else a.blocks
    decoded = w.new * (a.blocks * a.block(w.prompt + w.new // 2) + a.head)
    return w.prompt * over * a.block(w.prompt) + decoded


def table(rank: int = 32, latents: int = 20, rows: int = 16, dtype_bytes: int = 2) -> list[dict[str, float | str]]:
    """Cost of every job for every model; the block read lies at six tenths of the depth."""
    found: list[dict[str, float | str]] = []
    w = Work()
    for a in MODELS:
        block = round(0.6 * a.blocks)
        plain = plain_step(a, w, rank)
        read = penalty(a, w, latents)
        found.append(
            {
                "model": a.name,
                "block": block,
                "plain_step_gflop_a_row": plain / 1e9,
                "cached_over_plain": (plain + read) / plain,
                "online_over_plain": (plain + read + base_pass(a, w, block)) / plain,
                "base_pass_over_plain_epoch": base_pass(a, w, block) / plain,
                "cache_bytes_a_row": float(w.supervised * latents * 4),
                "screening_saved": screening(a, w, block, False) / screening(a, w, block, True),
                "generated_saved_by_sharing": generated(a, w, block, False) / generated(a, w, block, True),
                "decode_bytes_a_token_at_128_rows": a.weights * dtype_bytes / 128,
                "decode_flop_a_token": a.blocks * a.block(w.prompt) + a.head,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = table()
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    names = list(rows[0])
    print("| " + " | ".join(["", *(str(row["model"]) for row in rows)]) + " |\n|" + " --- |" * (len(rows) + 1))
    for name in names[1:]:
        print(f"| {name.replace('_', ' ')} | " + " | ".join(f"{float(row[name]):,.4g}" for row in rows) + " |")


if __name__ == "__main__":
    main()
