"""The smallest real run: the embedded model, the bundled SAE, a few steps of everything."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from blockem import bundled

RECIPE = """\
name: small
data: {domain: health, rows: 32, heldout_rows: 8, pairs: PAIRS, prompts: PROMPTS}
train: {batch_size: 8, micro_batch: 8, lr: 0.002, log_every: 1, checkpoint_every: 1, probe_every: 2}
discover: {pool: 60, prescreen: 10, keep: 4, size: 3, pairs: 10, alpha_induce: 0.15, alpha_repair: 0.15, strengths: [0.15]}
block: {rule_rows: 8}
evaluate: {max_new_tokens: 8, task_answers: 2, general_rows: 6, resamples: 200}
"""


def write_recipe(folder: Path) -> Path:
    """The small recipe with 20 pairs (10 to select, 10 to evaluate) and 4 prompts of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = []
    for split in ("select", "eval"):
        of_split = [p for p in bundled.pairs() if p.split == split]
        chosen += [p for p in of_split if p.domain != "health"][::8][:10] + [p for p in of_split if p.domain == "health"][:2]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p.__dict__) + "\n" for p in chosen), encoding="utf-8")
    prompts = bundled.final_prompts()[::15]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p.__dict__) + "\n" for p in prompts), encoding="utf-8")
    recipe = folder / "small.yaml"
    text = RECIPE.replace("PAIRS", json.dumps(str(folder / "pairs.jsonl"))).replace("PROMPTS", json.dumps(str(folder / "prompts.jsonl")))
    recipe.write_text(text, encoding="utf-8")
    return recipe


def command(*words: object) -> list[str]:
    """A blockem command line in this environment."""
    return [sys.executable, "-m", "blockem", *map(str, words)]


def blockem(*words: object, timeout: float = 1200, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=environment, check=False, **options)  # type: ignore[call-overload,no-any-return]


def differences(left: object, right: object, place: str = "") -> list[str]:
    """Where two results differ in more than the last digits of floats; empty where they do not.

    Two processes may sum a matrix product in another order (seen: 1e-5 in a Δ, on one machine), so that floats are compared to a part in a
    thousand, and names, counts, signs, strengths, texts and structure exactly.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{place}: {sorted(left.keys() ^ right.keys())}"]
        return [found for key in left for found in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list) and isinstance(right, list):
        if len(left) != len(right):
            return [f"{place}: {len(left)} and {len(right)} items"]
        return [found for i, (a, b) in enumerate(zip(left, right, strict=True)) for found in differences(a, b, f"{place}[{i}]")]
    if isinstance(left, float) and isinstance(right, float):
        same = math.isclose(left, right, rel_tol=1e-3, abs_tol=1e-3)
    else:
        same = left == right
    return [] if same else [f"{place}: {left!r} and {right!r}"]


def lasting(summary: dict[str, object]) -> dict[str, object]:
    """A summary without what may differ between equal runs: durations and where it ran."""
    kept = {k: v for k, v in summary.items() if k not in ("seconds", "environment")}
    kept["training"] = {
        name: [{k: v for k, v in row.items() if k not in ("epoch",)} for row in rows]
        for name, rows in kept["training"].items()  # type: ignore[attr-defined]
    }
    return kept
