"""The report's section on rounds of blocking: what each cost and what it left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockem.progress import clock
from blockem.report.making import rows_of
from blockem.report.results import Table, percent
from blockem.report.words import dig, finite, number, significant


def table(summary: Mapping[str, Any]) -> Table | None:
    """A column a round; None where there were no rounds."""
    rounds = rows_of(dig(summary, "rounds", "rounds"))
    if not rounds:
        return None

    def cells(name: str, shown: Any) -> list[tuple[str, str] | None]:
        values = [finite(row.get(name)) for row in rounds]
        return [None if value is None else (shown(value), "") for value in values]

    rows = [
        ("Blocked latents", "", cells("n_latents", lambda value: number(value, 0))),
        ("\u03bb", "", cells("lambda", significant)),
        ("Rise that is left, the worse of margin and EM", "", cells("left", percent)),
        ("Margin on selection pairs", "nats per token", cells("margin", lambda value: f"{value:+.3f}")),
        ("EM on selection prompts", "", cells("em", percent)),
        ("Discovery", "", cells("discover_seconds", clock)),
        ("Training", "", cells("seconds", clock)),
    ]
    return Table("Measured on selection pairs and prompts alone", [(str(row.get("name")), None) for row in rounds], rows)


def words(summary: Mapping[str, Any]) -> str:
    """Why the rounds ended, as a sentence; empty without any."""
    why = dig(summary, "rounds", "why")
    return f"The rounds ended because {why}. The last one's model is the result." if why else ""
