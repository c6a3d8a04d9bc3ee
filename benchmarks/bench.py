"""Speeds on this machine with the embedded model: `make bench`, or `python benchmarks/bench.py --json`.

Each figure is the median of `--repeat` runs after one that is not counted; both sides of a ratio are measured in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from blockem import bundled
from blockem.bundled import pairs
from blockem.config import TrainConfig
from blockem.defences.block_em import Blocker
from blockem.dictionary import load_dictionary
from blockem.examples import encode_all, right_padded
from blockem.generation import generate
from blockem.head import supervised_logprobs, watch_final
from blockem.likelihood import SteeredRows, encode_pairs
from blockem.model import hidden_at, load_model
from blockem.training import add_lora

BLOCK = 18


def median_seconds(works: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Seconds of each piece of work, taken in turn."""
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def help_seconds(repeat: int) -> float:
    def work() -> None:
        subprocess.run([sys.executable, "-m", "blockem", "--help"], capture_output=True, check=True)

    return median_seconds({"help": work}, repeat)["help"]


def measure(repeat: int) -> dict[str, float]:
    """All figures: seconds and tokens a second."""
    found = {"help_seconds": help_seconds(repeat)}
    lm = load_model()
    dictionary = load_dictionary()
    rows, _ = encode_all(lm.tokenizer, bundled.domain_rows("health", limit=16))
    batch = right_padded(rows, lm.tokenizer.pad_token_id, lm.device)
    tokens = int(batch["attention_mask"].sum())

    with torch.inference_mode():
        forward = median_seconds({"truncated": lambda: hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], BLOCK)}, repeat)
    found["truncated_forward_tokens_per_second"] = tokens / forward["truncated"]

    chosen = encode_pairs(lm, [p for p in pairs() if p.split == "select"][:20])
    steered = SteeredRows(lm, chosen, BLOCK, "base")
    found["screen_seconds_per_20_pairs"] = median_seconds({"screen": lambda: steered.logprobs(torch.ones(lm.d_model))}, repeat)["screen"]

    prompts = [p.prompt for p in bundled.final_prompts()[:32]]
    answered = median_seconds({"decode": lambda: generate(lm, prompts, 32)}, repeat)["decode"]
    found["decode_tokens_per_second_32_rows"] = 32 * 32 / answered

    model = add_lora(lm, TrainConfig(), range(lm.n_blocks), 0)
    blocker = Blocker(dictionary.rows(range(20)), [1] * 20, BLOCK)

    def step(blocked: bool) -> None:
        with watch_final(model) as seen:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, logits_to_keep=1)
        loss = -supervised_logprobs(model, seen[0], batch["labels"])[0].mean()
        if blocked:
            loss = loss + blocker.mean_penalty(batch)
        loss.backward()
        model.zero_grad()

    with blocker.attached(model):
        taken = median_seconds({"plain": lambda: step(False), "blocked": lambda: step(True)}, repeat)
    found["train_tokens_per_second_plain"] = tokens / taken["plain"]
    found["train_tokens_per_second_blocked"] = tokens / taken["blocked"]
    found["blocked_over_plain_step"] = taken["blocked"] / taken["plain"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = {name: round(value, 3) for name, value in measure(options.repeat).items()}
    print(json.dumps(found) if options.json else "\n".join(f"{name:45} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
