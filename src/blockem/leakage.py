"""What chooses latents must not be what they are measured on: a check that refuses overlaps."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

from blockem import bundled
from blockem.config import DataConfig
from blockem.errors import BlockemError


def normalised(text: str) -> str:
    """Text without case, punctuation and spacing: what counts as the same question."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def check_disjoint(selection: Mapping[str, Sequence[str]], final: Mapping[str, Sequence[str]]) -> None:
    """Refuse data in which a question that selects also measures.

    Args:
        selection, final: questions by where they come from, e.g. `{"data.prompts": [...]}`.

    Raises:
        BlockemError: a sentence that names the first overlap, in the order of `final`.
    """
    chosen = {normalised(text): place for place, texts in reversed(list(selection.items())) for text in texts}
    chosen.pop("", None)
    for place, texts in final.items():
        for text in texts:
            if (where := chosen.get(normalised(text))) is not None:
                shown = text if len(text) <= 80 else text[:79] + "…"
                raise BlockemError(
                    f"{place}: {shown!r} is also in {where}; what selects latents must not be what they are measured on, "
                    "so take it out of one of the two"
                )


def check_questions(
    data: DataConfig, prompts: Sequence[bundled.Prompt], pairs: Sequence[bundled.Pair], final: Sequence[bundled.Prompt]
) -> None:
    """The same for a run: its selection prompts and pairs against its final prompts and evaluation pairs."""
    source = data.pairs or "the bundled pairs"
    measured = [p.prompt for p in bundled.evaluation_pairs(data.pairs)]
    check_disjoint(
        {
            data.selection_prompts or "the bundled selection prompts": [p.prompt for p in prompts],
            f"{source} (select)": [p.prompt for p in pairs],
        },
        {data.prompts or "the bundled final prompts": [p.prompt for p in final], f"{source} (eval)": measured},
    )


def check_outside(pairs: Sequence[bundled.Pair], prompts: Sequence[bundled.Prompt]) -> None:
    """Refuse to discover from nothing.

    Args:
        pairs, prompts: the selection pairs and prompts that are left when those of the training domain are taken out.
    """
    if not pairs or not prompts:
        raise BlockemError(
            "no selection pair or prompt lies outside the training domain; give --pairs and --selection-prompts with other domains"
        )
