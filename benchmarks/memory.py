"""Peak memory of a few training steps, plain and blocked, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from measuring import Measure, ratio


def measure(repeat: int) -> list[Measure]:
    peaks = {name: [peak(name) for _ in range(min(repeat, 2))] for name in ("plain", "cached")}
    return [ratio("peak memory, blocked training", "plain SFT", peaks["cached"], peaks["plain"], 1.10)]


def peak(name: str) -> float:
    """MB."""
    done = subprocess.run([sys.executable, str(Path(__file__)), name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(name: str) -> None:
    from training import BATCH, BLOCK, LATENTS, rows_of, step, trainer_of

    from blockem.base_values import collect
    from blockem.defences.block_em import BlockEM, Blocker
    from blockem.defences.defence import Defence
    from blockem.dictionary import load_dictionary
    from blockem.examples import right_padded
    from blockem.model import load_model

    lm = load_model()
    rows = rows_of(lm, 3 * BATCH)
    defence = Defence()
    if name == "cached":
        blocker = Blocker(load_dictionary().rows(LATENTS), [1] * len(LATENTS), BLOCK)
        blocker.values = collect(lm, blocker.read, blocker.blocks, blocker.key, rows)
        defence = BlockEM(blocker, 1.0)
    with trainer_of(lm, rows, defence) as (trainer, model, optimiser):
        for start in range(0, len(rows), BATCH):
            step(trainer, model, optimiser, right_padded(rows[start : start + BATCH], lm.tokenizer.pad_token_id))
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss would keep the parent's peak
    assert found
    print(int(found[1]) / 1024)


if __name__ == "__main__":
    main(sys.argv[1])
