"""Decoding on this machine with the embedded model, against its marks: `python benchmarks/decoding.py`.

Both sides of a ratio are taken in turn in one process, and a figure is the ratio of their medians. On a busy machine read the ratios of
processor seconds, which `--busy` takes instead of the clock's: they do not count what other programs were given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from blockem import bundled
from blockem.examples import template_ids
from blockem.forwards import decoder
from blockem.generation import _by_batches
from blockem.head import next_logits
from blockem.model import LanguageModel, load_model
from blockem.packing import packed_weights
from blockem.slots import slot_attention
from blockem.stream import Row, Slots, decode, largest

BLOCK = 18
CONDITIONS, PROMPTS, NEW = 16, 22, 48
ROWS, WIDTH = 128, 60
MARKS = {"screening_speedup": (">=", 4.0), "decode_over_prefill": (">=", 0.5), "edits_overhead": ("<=", 1.03)}


def medians(works: dict[str, Callable[[], object]], repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each piece of work, taken in turn; the first round is not counted where there are more."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeat + (repeat > 1)):
        for name, work in works.items():
            began = clock()
            work()
            taken[name].append(clock() - began)
    return {name: statistics.median(values[repeat > 1 :]) for name, values in taken.items()}


def screening(lm: LanguageModel, repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Conditions a second of generated screening: one stream, against transformers' `generate` a condition a batch."""
    ids = [template_ids(lm.tokenizer, [{"role": "user", "content": p.prompt}], True) for p in bundled.core_prompts()[:PROMPTS]]
    edits = torch.randn(CONDITIONS, lm.d_model, generator=torch.Generator().manual_seed(0)) * 2
    new = 0

    def stream() -> None:
        nonlocal new
        new = sum(map(len, decode(lm, [Row(tuple(one), NEW, edit) for edit in edits for one in ids], BLOCK)))

    def one_by_one() -> None:
        for edit in edits:
            _by_batches(lm, ids, NEW, 0.0, 0, 64, BLOCK, edit, None)

    taken = medians({"stream": stream, "one by one": one_by_one}, repeat, clock)
    return {
        "screening_conditions_per_second": CONDITIONS / taken["stream"],
        "screening_conditions_per_second_one_by_one": CONDITIONS / taken["one by one"],
        "screening_speedup": taken["one by one"] / taken["stream"],
        "screening_tokens_per_second": new / taken["stream"],
    }


def speeds(lm: LanguageModel, repeat: int, clock: Callable[[], float]) -> dict[str, float]:
    """Decoding at 128 rows against reading as many prompts of 60 tokens; and with an edit a row against without."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40_000, (ROWS, WIDTH), generator=generator)
    edits = torch.randn(ROWS, lm.d_model, generator=generator) * 0.1

    def prefill() -> None:
        decoder(lm.model)(input_ids=ids, use_cache=False)

    with torch.inference_mode():
        reading = medians({"prefill": prefill}, repeat, clock)["prefill"]
        with slot_attention(lm.model), packed_weights(lm.model, ROWS):
            batch = Slots(lm, BLOCK, ROWS, WIDTH + NEW)
            batch.enter([Row(tuple(one), NEW, edit) for one, edit in zip(ids.tolist(), edits, strict=True)], range(ROWS))

            def steps(edited: bool) -> None:
                batch.edited = edited
                tokens = [0] * ROWS
                for place in range(NEW):
                    tokens = largest(next_logits(lm.model, batch.step(tokens, [WIDTH + place] * ROWS)))

            taken = medians({"plain": lambda: steps(False), "edited": lambda: steps(True)}, repeat, clock)
        reading = statistics.median([reading, medians({"prefill": prefill}, repeat, clock)["prefill"]])
    return {
        "prefill_tokens_per_second": ROWS * WIDTH / reading,
        "decode_tokens_per_second": ROWS * NEW / taken["plain"],
        "decode_over_prefill": reading * NEW / (WIDTH * taken["plain"]),
        "edits_overhead": taken["edited"] / taken["plain"],
    }


def measure(repeat: int = 3, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """All figures; screening in one round, which takes minutes by itself."""
    lm = load_model()
    return {**speeds(lm, repeat, clock), **screening(lm, 1, clock)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="count processor seconds instead of the clock's")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.repeat, time.process_time if options.busy else time.perf_counter)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        sign, mark = MARKS.get(name, ("", 0.0))
        print(f"{name:45} {value:10.3f}" + (f"   mark {sign} {mark}" if sign else ""))


if __name__ == "__main__":
    main()
