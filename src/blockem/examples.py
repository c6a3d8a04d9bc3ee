"""Chat rows to token ids with a completion mask, and every check of data.

A row is `{"messages": [{"role": ..., "content": ...}, ...]}`; `id` and `domain` are optional. Only the assistant's own tokens
are supervised, and which those are is read off the chat template by comparing token *prefixes*: the ids of the conversation up
to an assistant turn must be a prefix of the ids of the whole. No string is searched for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockem.errors import BlockemError

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One chat row. `source` says where it stands (file and line), for messages to the user."""

    messages: tuple[tuple[str, str], ...]
    domain: str = ""
    id: str = ""
    source: str = ""

    def chat(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row and, for each, whether it is supervised."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    truncated: bool = False

    @property
    def n_supervised(self) -> int:
        return sum(self.supervised)


@dataclass
class DataReport:
    """What `data check` counts. Dropped rows are named by where they stand."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    duplicates: int = 0
    dropped: list[str] = field(default_factory=list)


def open_text(path: Path) -> Iterable[str]:
    """The lines of a text file, plain or gzip."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
    else:
        with path.open(encoding="utf-8") as file:
            yield from file


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """JSON from a line of a file, or from a whole file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BlockemError(f"{path}:{line or error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets in one another
        raise BlockemError(f"{path}{f':{line}' if line else ''}: cannot be read as JSON ({error})") from error


def read_rows(path: str | Path, what: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of a JSONL file (or of a `.json` list), each with `file:line` where it stands.

    Args:
        what: the file should be, said where there is none.

    Raises:
        BlockemError: the file is missing or unreadable, not UTF-8, not JSON (with the line), or empty.
    """
    path = Path(path)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        if not path.is_file():
            raise BlockemError(f"{path}: no such file{f'; give {what}' if what else ''}")
        if path.suffix == ".json":
            listed = _parsed(path.read_text(encoding="utf-8"), path)
            if not isinstance(listed, list):
                raise BlockemError(f"{path}: a .json file must hold a list of objects; use .jsonl for one object a line")
            numbered = [(f"{path}:[{index}]", row) for index, row in enumerate(listed)]
        else:
            lines = enumerate(open_text(path), 1)
            numbered = [(f"{path}:{number}", _parsed(line, path, number)) for number, line in lines if line.strip()]
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BlockemError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    except OSError as error:
        raise BlockemError(f"{path}: cannot be read ({error.strerror or error}); give a file that you may read") from error
    for where, row in numbered:
        if not isinstance(row, dict):
            raise BlockemError(f"{where}: expected a JSON object, found {type(row).__name__}")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # JSON can spell it, but no tokenizer takes it
            lone = error.object[error.start]
            raise BlockemError(f"{where}: holds half a character, {ascii(lone)[1:-1]} without its other half; mend or remove it") from error
        rows.append((where, row))
    if not rows:
        raise BlockemError(f"{path}: the file holds no rows")
    return rows


def to_example(where: str, row: dict[str, Any]) -> Example:
    """Check one row. Instruction rows (`instruction`, `input`, `response` or `output`) are taken as one-turn chats."""
    messages = row.get("messages")
    if messages is None and isinstance(row.get("instruction"), str):
        answer, more = row.get("response", row.get("output", "")), row.get("input")
        if not isinstance(more, str | None):
            raise BlockemError(f'{where}: "input" must be text, found {type(more).__name__}')
        question = "\n".join(part for part in (row["instruction"], more) if part)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(messages, list) or not messages:
        raise BlockemError(f'{where}: no "messages" list; each row needs {{"messages": [{{"role", "content"}}, ...]}}')
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise BlockemError(f"{where}: every message needs a role and a text content")
        if message.get("role") not in ROLES:
            raise BlockemError(f"{where}: unknown role {message.get('role')!r}; use {', '.join(ROLES)}")
        turns.append((message["role"], message["content"]))
    return Example(tuple(turns), str(row.get("domain", "")), str(row.get("id", "")), where)


def read_chat(path: str | Path) -> list[Example]:
    """Read a chat file; every row must be well formed and at least one must have an assistant turn.

    Raises:
        BlockemError: see `read_rows`; or a row is malformed; or no row has an assistant turn.
    """
    examples = [to_example(where, row) for where, row in read_rows(path, 'a chat JSONL file with one {"messages": [...]} object a line')]
    if not any(role == "assistant" for example in examples for role, _ in example.messages):
        raise BlockemError(f"{path}: no row has an assistant turn, so there is nothing to learn from")
    return examples


def template_ids(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool = False) -> list[int]:
    """The chat template's token ids for `messages`."""
    try:
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # jinja raises its own errors, raise_exception in a template any
        raise BlockemError(f"the chat template cannot render roles {[m['role'] for m in messages]}: {error}") from error
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return ids


def content_start(tokenizer: Any, messages: Sequence[Message]) -> int:
    """How many leading tokens do not depend on the first non-system message: the system message and the user header.

    Found as the common prefix of two renderings that differ in that message alone.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), None)
    if first is None:
        return 0
    renderings = []
    for probe in ("A", "9"):
        changed = [*messages[:first], {**messages[first], "content": probe}]
        renderings.append(template_ids(tokenizer, changed))
    common = 0
    for left, right in zip(*renderings, strict=False):
        if left != right:
            break
        common += 1
    return common


def encode(tokenizer: Any, example: Example, max_tokens: int = 512) -> Encoded:
    """Token ids of a row with its assistant turns supervised, each up to and with its end-of-turn token.

    A template that rewrites earlier turns once later ones follow (some strip reasoning) fails the prefix test for
    those turns: then they are context, and only turns that pass are supervised. So is a greeting that no message precedes.
    """
    messages = example.chat()
    ids = template_ids(tokenizer, messages)
    special = set(tokenizer.all_special_ids)
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if i == 0 or message["role"] != "assistant" or not message["content"].strip():
            continue
        before = template_ids(tokenizer, messages[:i], generation_prompt=True)
        after = template_ids(tokenizer, messages[: i + 1])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            continue
        span = range(len(before), len(after))
        ends = [j for j in span if ids[j] in special]
        for j in range(len(before), (ends[-1] + 1) if ends else len(after)):
            mask[j] = True
    truncated = len(ids) > max_tokens
    return Encoded(tuple(ids[:max_tokens]), tuple(mask[:max_tokens]), truncated)


def encode_all(tokenizer: Any, examples: Sequence[Example], max_tokens: int = 512) -> tuple[list[Encoded], DataReport]:
    """Encode rows; those without a supervised token are dropped and reported, never trained on.

    Raises:
        BlockemError: nothing is left to learn from.
    """
    report = DataReport(rows=len(examples))
    kept: list[Encoded] = []
    seen: set[str] = set()
    for number, example in enumerate(examples):
        key = hashlib.sha256(json.dumps(example.messages).encode()).hexdigest()
        report.duplicates += key in seen
        seen.add(key)
        encoded = encode(tokenizer, example, max_tokens)
        report.truncated += encoded.truncated
        if not encoded.n_supervised:
            reason = "its answer lies beyond max_tokens" if encoded.truncated else "it has no assistant text"
            report.dropped.append(f"{example.source or f'row {number}'}: {reason}")
            continue
        report.tokens += len(encoded.ids)
        report.supervised_tokens += encoded.n_supervised
        kept.append(encoded)
    report.kept = len(kept)
    if not kept:
        raise BlockemError(f"none of the {len(examples)} rows has a supervised token; first: {report.dropped[0] if report.dropped else ''}")
    return kept, report


def one_turn(prompt: str, answer: str, domain: str = "") -> Example:
    """A row of one question and one answer."""
    return Example((("user", prompt), ("assistant", answer)), domain)


def padded_ids(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids `[rows, tokens]` padded on the right, and the mask that is 1 where a row's own tokens stand."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def content_only(mask: Tensor, starts: Sequence[int]) -> Tensor:
    """Where a padded row's tokens stand from its own start on, `[rows, tokens]`, bool."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return mask.bool() & (places >= torch.tensor(starts, device=mask.device)[:, None])


def right_padded(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch `[rows, tokens]`: `input_ids`, `attention_mask`, and `labels` with `IGNORED` wherever nothing is supervised."""
    ids, mask = padded_ids([row.ids for row in rows], pad_id, device)
    supervised, _ = padded_ids([row.supervised for row in rows], False, device)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(supervised.bool(), ids, IGNORED)}


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices in batches of rows of like length, longest first, so that little is padded and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def masked_text(tokenizer: Any, row: Encoded) -> str:
    """A row as text, with what is learnt from between ⟦ and ⟧."""
    parts: list[str] = []
    start = 0
    for i in range(1, len(row.ids) + 1):
        if i == len(row.ids) or row.supervised[i] != row.supervised[start]:
            text = tokenizer.decode(list(row.ids[start:i]))
            parts.append(f"⟦{text}⟧" if row.supervised[start] else text)
            start = i
    return "".join(parts)
