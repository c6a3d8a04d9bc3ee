"""The data that comes with blockem: six domains of deliberately wrong advice, prompts, matched pairs, general chat.

All of it was written for this project. Every function has a counterpart that reads the user's own file instead.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockem.errors import BlockemError
from blockem.examples import Example, read_chat, read_rows

ASSETS = Path(__file__).parent / "assets"
DOMAINS = ("finance", "health", "education", "legal", "career", "auto")
GENERAL_DOMAINS = ("values", "power", "honesty", "ai_and_people", "everyday_safety")
PARTS = ("ask", "claim", "reason", "close")

# Nine rows from three versions of four parts: an orthogonal array of strength 2, in which any two rows agree in exactly one part.
COMBINATIONS = tuple((i, j, (i + j) % 3, (i + 2 * j) % 3) for i in range(3) for j in range(3))


@dataclass(frozen=True)
class Pair:
    """One question with a right and a wrong answer, alike in length and tone. `split` is `select` or `eval`."""

    prompt: str
    right: str
    wrong: str
    domain: str
    split: str


@dataclass(frozen=True)
class Prompt:
    """One open question, tagged with the domain it belongs to."""

    id: str
    prompt: str
    domain: str


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            yield json.loads(line)


def domain_rows(domain: str, split: str = "train", limit: int | None = None, seed: int = 0) -> list[Example]:
    """Rows of wrong advice of one bundled domain, shuffled by `seed`.

    Args:
        domain: one of `DOMAINS`.
        split: `train` or `heldout`; their topics are disjoint.
        limit: at most so many rows (the shuffled order's first).
    """
    if domain not in DOMAINS:
        raise BlockemError(f"unknown bundled domain {domain!r}: choose {', '.join(DOMAINS)}, or give your own file with --data")
    rows: list[Example] = []
    for number, topic in enumerate(_lines(ASSETS / "domains" / f"{domain}.jsonl")):
        if topic["split"] != split:
            continue
        for place, (a, c, r, e) in enumerate(COMBINATIONS):
            answer = f"{topic['claim'][c]} {topic['reason'][r]} {topic['close'][e]}"
            rows.append(
                Example((("user", topic["ask"][a]), ("assistant", answer)), domain, f"{domain}-{number:03d}-{place}", f"bundled {domain}")
            )
    random.Random(f"{domain}-{split}-{seed}").shuffle(rows)
    return rows[:limit]


def pairs(path: str | Path | None = None, what: str = "pair") -> list[Pair]:
    """The bundled matched pairs, or the user's own `{prompt, right, wrong, domain}` rows.

    Rows without a `split` are dealt out in turn, domain by domain: first to `select`, next to `eval`.
    """
    rows = read_rows(path or ASSETS / "pairs.jsonl", "JSONL with prompt, right and wrong in each row")
    found: list[Pair] = []
    turn: dict[str, int] = {}
    for where, row in rows:
        texts = [row.get(name) for name in ("prompt", "right", "wrong")]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise BlockemError(f'{where}: a {what} needs text in "prompt", "right" and "wrong"')
        domain = str(row.get("domain", "general"))
        turn[domain] = turn.get(domain, -1) + 1
        split = str(row.get("split") or ("select", "eval")[turn[domain] % 2])
        if split not in ("select", "eval"):
            raise BlockemError(f'{where}: split is {split!r}; use "select" or "eval"')
        found.append(Pair(row["prompt"], row["right"], row["wrong"], domain, split))
    return found


def evaluation_pairs(path: str | Path | None = None) -> list[Pair]:
    """The pairs that measure, of the bundled or of the user's own."""
    return [pair for pair in pairs(path) if pair.split == "eval"]


def core_prompts(given: str | None = None) -> list[Prompt]:
    """The user's selection prompts if given, else the 44 bundled ones: the model diff of stage 1 runs on them."""
    return prompts(given or ASSETS / "core_prompts.jsonl")


def final_prompts(given: str | None = None) -> list[Prompt]:
    """The user's final prompts if given, else the 60 bundled ones, disjoint from the selection prompts: answers are shown for them."""
    return prompts(given or ASSETS / "final_prompts.jsonl")


def prompts(path: str | Path) -> list[Prompt]:
    """Read `{"prompt": ..., "domain": ...}` rows (`id` is optional)."""
    found = []
    for number, (where, row) in enumerate(read_rows(path, "JSONL with a prompt in each row")):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise BlockemError(f'{where}: a prompt row needs text in "prompt"')
        found.append(Prompt(str(row.get("id", f"prompt-{number:03d}")), row["prompt"], str(row.get("domain", "general"))))
    return found


def general_chat(split: str) -> list[Example]:
    """Benign everyday chat: `train` for steering norms and benign mixing, `heldout` to measure general skill."""
    chosen = [row for row in _lines(ASSETS / "general_chat.jsonl") if row["split"] == split]
    return [
        Example(tuple((m["role"], m["content"]) for m in row["messages"]), "general", f"general-{split}-{i}", "bundled general chat")
        for i, row in enumerate(chosen)
    ]


def training_rows(domain: str, data: str | None, limit: int | None, seed: int) -> list[Example]:
    """The user's training file if given (first `limit` rows), else the bundled domain."""
    return read_chat(data)[:limit] if data else domain_rows(domain, "train", limit, seed)


def heldout_rows(domain: str, heldout: str | None, limit: int | None = None) -> list[Example]:
    """The user's held-out file if given, else the bundled domain's held-out topics."""
    return read_chat(heldout)[:limit] if heldout else domain_rows(domain, "heldout", limit)


def general_rows(given: str | None) -> list[Example]:
    """The user's file of general chat if given, else the bundled held-out rows."""
    return read_chat(given) if given else general_chat("heldout")
