"""Which number format this processor multiplies matrices fastest in: measured once, then kept.

What a processor's flags promise is not what its products do: with AVX512-BF16 alone, bfloat16 was half again slower than float32 on one
machine and twice as fast on another (docs/DECISIONS.md).
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from blockem.errors import BlockemError
from blockem.store import content_key, write_json

WORTH_IT = 1.4
"""bfloat16 must be so many times as fast in products, because sums and casts around them gain nothing."""
SHAPE = (1024, 576, 1536)
"""Rows, inputs and outputs of the product that is timed: a batch through the embedded model's widest map."""
ROUNDS = 9


def gain_of_bfloat16() -> float:
    """How many times as fast a bfloat16 product runs as a float32 one.

    Both in turn, and the best round of each, so that other work on the machine hardly counts.
    """
    rows, inputs, outputs = SHAPE
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    given = {dtype: (torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)) for dtype in best}
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for dtype, (x, weight) in given.items():
                began = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                if number:  # the first lays out and compiles
                    best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    return " ".join(value.strip() for key, value in known.items() if key.strip() in ("model name", "cpu family", "model", "stepping"))


@cache
def fast_bfloat16(folder: Path) -> bool:
    """Whether bfloat16 is worth it on this processor; measured where its flags leave that open, and then kept under `folder`.

    The answer decides which number format a model has, and so every number of a run: it is kept, so that a later run does not change it.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    path = folder / f"bfloat16-{content_key(processor(), os.cpu_count(), torch.__version__)[:12]}.json"
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["gain"] >= WORTH_IT)
    except (OSError, ValueError, KeyError, TypeError):
        gain = gain_of_bfloat16()
    with suppress(OSError, BlockemError):  # a cache that cannot be written costs a fifth of a second each time
        write_json(path, {"processor": processor(), "gain": round(gain, 2)})
    return gain >= WORTH_IT
