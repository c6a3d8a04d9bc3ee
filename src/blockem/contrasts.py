"""Contrasts: a healthy and a sick answer to the same general prompt, from nothing but the two models that discovery compares.

The base answers the selection prompts, the misaligned fine-tune answers them, and where they differ the two answers say what must not
become likelier. No label is needed, and none of the prompts is of the training domain or an evaluation prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from blockem.bundled import Pair, Prompt, pairs
from blockem.errors import BlockemError
from blockem.generation import generate
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.store import write_jsonl


def own_contrasts(
    lm: LanguageModel, sick: str, prompts: Sequence[Prompt], max_new_tokens: int, progress: Progress | None = None
) -> list[Pair]:
    """The base's greedy answer as `right`, the adapter `sick`'s as `wrong`, for each prompt at which both say something and differ.

    Raises:
        BlockemError: they differ nowhere.
    """
    said: dict[str, list[str]] = {}
    asked = [prompt.prompt for prompt in prompts]
    for part, name in enumerate(("base", sick)):
        with lm.variant(name):

            def tell(done: int, total: int, part: int = part) -> None:
                if progress:
                    progress(part * total + done, 2 * total)

            said[name] = generate(lm, asked, max_new_tokens, progress=tell)
    found = [
        Pair(prompt.prompt, healthy, answer, prompt.domain, "select")
        for prompt, healthy, answer in zip(prompts, said["base"], said[sick], strict=True)
        if healthy.strip() and answer.strip() and healthy.strip() != answer.strip()
    ]
    if not found:
        raise BlockemError("the fine-tune answers every selection prompt just as the base does: there is nothing to anchor against")
    return found


def merged(*sets: Sequence[Pair]) -> list[Pair]:
    """All contrasts of several sets in order, each prompt and sick answer once."""
    found: dict[tuple[str, str], Pair] = {}
    for one in (one for several in sets for one in several):
        found.setdefault((one.prompt, one.wrong), one)
    return list(found.values())


def save(path: Path, contrasts: Sequence[Pair]) -> None:
    """Write them as JSONL, in the form of pairs."""
    write_jsonl(path, [asdict(one) for one in contrasts])


def load(path: Path) -> list[Pair]:
    """Read what `save` wrote.

    Raises:
        BlockemError: the file is missing or no set of contrasts.
    """
    return pairs(path, "contrast")
