"""The report's section on where the shift went: the off-K audit as curves over blocks, verdicts and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockem.report.charts import Series
from blockem.report.making import drawn, rows_of
from blockem.report.results import Figure, Table
from blockem.report.words import dig, finite, share, significant


def models(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The audited models' shifts by block; empty where there was no audit."""
    found = dig(summary, "audit", "shifts")
    return {str(name): rows_of(rows) for name, rows in found.items()} if isinstance(found, Mapping) else {}


def figures(summary: Mapping[str, Any], tone: Mapping[str, str]) -> list[Figure]:
    """Length of the shift, and what is left of plain fine-tuning's, over blocks."""
    shown = models(summary)
    wanted = (
        ("length", "Length of the shift", "Root mean square, at each block; 1 is plain fine-tuning's own."),
        ("along", "What is left of plain fine-tuning's shift", "Along its mean direction, at each block; 1: all of it."),
    )
    made = []
    for name, title, caption in wanted:
        series = []
        for model, rows in shown.items():
            points = [(x, y) for row in rows if (x := finite(row.get("block"))) is not None and (y := finite(row.get(name))) is not None]
            series.append(Series(model, tone.get(model, "other-0"), points))
        made.append(drawn(title, caption, series, unit="block"))
    return [figure for figure in made if figure.chart is not None]


def verdicts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(model, sentence) for each audited model but the plain one."""
    found = dig(summary, "audit", "verdicts")
    said = [(str(name), str(words)) for name, words in found.items()] if isinstance(found, Mapping) else []
    for one in further(summary):
        words = dig(one, "verdicts")
        named = words.items() if isinstance(words, Mapping) else ()
        said += [(f"{name} at block {one.get('block')}", str(sentence)) for name, sentence in named]
    return said


def further(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was audited at further blocked blocks."""
    return rows_of(dig(summary, "audit", "further"))


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """What happened at each SAE's block, and the latents outside the set that moved most beyond plain fine-tuning."""
    return [table for one in (summary.get("audit"), *further(summary)) for table in _tables_at(one)]


def _tables_at(audited: Any) -> list[Table]:
    found = dig(audited, "rerouting")
    if not isinstance(found, Mapping) or not found:
        return []
    names = [str(name) for name in found]

    def cells(key: str) -> list[tuple[str, str] | None]:
        values = [finite(dig(found, name, key)) for name in names]
        return [None if value is None else (share(value), "") for value in values]

    block = finite(dig(audited, "block"))
    where = f" at block {block:.0f}" if block is not None else ""
    rows = [
        ("Movement of the blocked latents that is gone", "", cells("blocked")),
        ("Movement of all other latents, plain = 100 %", "", cells("off_k")),
        ("… of it along latents that plain fine-tuning moves less", "", cells("new")),
        ("Shift that no latent explains", "", cells("unexplained")),
    ]
    made = [Table(f"Latents{where}", [(name, None) for name in names], rows)]
    for name in names:
        top = rows_of(dig(found, name, "top"))
        if name != "plain" and top:
            listed: list[tuple[str, str, list[tuple[str, str] | None]]] = []
            for row in top:
                plain, moved = finite(row.get("plain")), finite(row.get("moved"))
                if plain is not None and moved is not None:
                    listed.append((f"latent {row.get('latent')}", "", [(significant(plain), ""), (significant(moved), "")]))
            made.append(
                Table(f"Not blocked, and moved most beyond plain fine-tuning: {name}", [("Δ plain", None), (f"Δ {name}", None)], listed)
            )
    return made
