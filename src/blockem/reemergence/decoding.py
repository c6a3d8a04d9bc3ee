"""Answers while one block is patched at each decoding step, in both directions, with a judge's rates (BLOCK-EM, re-emergence)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blockem.evaluation import RATES, rate
from blockem.examples import template_ids
from blockem.judges import Judge
from blockem.judges.judge import Verdict, verdicts_on
from blockem.model import LanguageModel
from blockem.reemergence.patching import decode_patched


@dataclass(frozen=True)
class Decoding:
    """Where, how and how long: blocks to patch one at a time, which positions, new tokens."""

    blocks: tuple[int, ...]
    positions: str
    tokens: int


def decode_all(
    lm: LanguageModel,
    prompts: Sequence[str],
    model: str,
    settings: Decoding,
    judge: Judge | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Greedy answers of the base and of the loaded adapter `model`, unpatched and patched from each other.

    Returns:
        A table, a row a condition: `source`, `target`, `block` (None: unpatched), `changed` (share of answers that are not the unpatched
        target's) and, with a judge, `em`, `incoherent`, `refusal` with intervals over prompts and `missing`; and a row a prompt with every
        answer.
    """
    ids = [template_ids(lm.tokenizer, [{"role": "user", "content": prompt}], generation_prompt=True) for prompt in prompts]
    conditions: list[tuple[str, str, int | None]] = [("base", "base", None), (model, model, None)]
    conditions += [(source, target, block) for source, target in (("base", model), (model, "base")) for block in settings.blocks]
    table: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}, "verdicts": {}} for prompt in prompts]
    unpatched: dict[str, list[str]] = {}
    for number, (source, target, block) in enumerate(conditions):
        if progress:
            progress("decoding under patches", number, len(conditions))
        where = settings.blocks[0] if block is None else block  # a model patched with itself is itself
        new = decode_patched(lm, ids, source, target, where, settings.positions, settings.tokens)
        answers = [str(lm.tokenizer.decode(one, skip_special_tokens=True)).strip() for one in new]
        if block is None:
            unpatched[target] = answers
        label = target if block is None else f"{source} → {target}, block {block}"
        row: dict[str, Any] = {"source": source, "target": target, "block": block}
        row["changed"] = sum(a != b for a, b in zip(answers, unpatched[target], strict=True)) / len(answers)
        verdicts = verdicts_on(judge, prompts, answers) if judge else []
        table.append({**row, **rates(verdicts)})
        for place, answer in enumerate(answers):
            rows[place]["answers"][label] = answer
            if verdicts:
                rows[place]["verdicts"][label] = asdict(verdicts[place])
    if progress:
        progress("decoding under patches", len(conditions), len(conditions))
    return table, rows


def rates(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Judged rates with intervals over prompts; nothing without a judge. Missing verdicts are counted, and in no rate."""
    if not verdicts:
        return {}
    had = [one for one in verdicts if not one.missing]
    found: dict[str, Any] = {"missing": len(verdicts) - len(had)}
    for which, field in RATES.items():
        one = rate(np.array([float(getattr(verdict, field)) for verdict in had]))
        found[which] = asdict(one) if one else None
    return found
