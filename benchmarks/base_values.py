"""How far do base values that were computed before differ from those computed on the way? `python benchmarks/base_values.py PLAIN_ADAPTER`

The same tokens in another batch are summed in another order, which in bfloat16 shows in the third digit. What counts is what that does to
the penalty: the training starts at λ · penalty = 0 with on-line values, and at what this prints with kept ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from blockem import bundled
from blockem.base_values import collect
from blockem.config_training import BlockConfig, TrainConfig
from blockem.defences.block_em import Blocker, block_loss, penalty_of, portable_lambda
from blockem.dictionary import load_dictionary
from blockem.examples import encode_all, right_padded
from blockem.forwards import unwrapped
from blockem.fused import cpu_attention
from blockem.latents import LatentSet
from blockem.likelihood import completion_losses
from blockem.model import load_model
from blockem.training import add_lora


def measure(adapter: Path, latents: Path, n: int, batch: int) -> dict[str, float]:
    """Differences over `n` training rows in batches of `batch`, and what they weigh at the λ of the portable rule."""
    lm, dictionary = load_model(), load_dictionary()
    rows, _ = encode_all(lm.tokenizer, bundled.training_rows("health", None, n, 0))
    blocker = Blocker.from_latents(LatentSet.load(latents), dictionary)
    blocker.to(lm.device)
    kept = collect(lm, blocker.read, blocker.blocks, blocker.key, rows)
    lm.add_adapter(adapter, "plain")
    losses = {}
    for variant in ("base", "plain"):
        with lm.variant(variant):
            loss, tokens = completion_losses(lm, rows)
            losses[variant] = float(loss.sum() / tokens.sum())
    p_mis = penalty_of(lm, "plain", blocker, rows)
    lambda_ = portable_lambda(BlockConfig().r, losses["base"] - losses["plain"], p_mis)
    lm.drop_adapters()
    model = add_lora(lm, TrainConfig(), range(lm.n_blocks), 0)
    apart, size, start, tokens = 0.0, 0.0, 0.0, 0
    with torch.no_grad(), blocker.attached(model), cpu_attention(model):
        for first in range(0, len(rows), batch):
            padded = right_padded(rows[first : first + batch], lm.tokenizer.pad_token_id)
            fresh, known = blocker.base_values(padded), kept.of(padded)
            apart += float((fresh - known).pow(2).sum())
            size += float(fresh.pow(2).sum())
            start += float(block_loss(fresh, known, blocker.signs).sum())
            tokens += len(fresh)
    lm.model = unwrapped(model.unload())
    return {
        "rows": len(rows),
        "tokens": tokens,
        "relative_difference_of_z": (apart / size) ** 0.5,
        "penalty_at_start_share_of_p_mis": start / tokens / p_mis,
        "lambda": lambda_,
        "lambda_times_penalty_at_start_nats": lambda_ * start / tokens,
        "sft_loss_of_base_nats": losses["base"],
        "seconds_to_collect": round(kept.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="a plain fine-tune (`blockem sft`)")
    parser.add_argument("--latents", type=Path, required=True, help="its LatentSet (`blockem discover`)")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    print(json.dumps(measure(options.adapter, options.latents, options.rows, options.batch), indent=1))


if __name__ == "__main__":
    main()
