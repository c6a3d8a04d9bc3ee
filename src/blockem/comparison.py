"""The numbers of a comparison: from finished cells to settings, figures and a recommendation. Words and pictures are the report's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from blockem.cells import Measured, MeasuredCells
from blockem.evaluation import Array
from blockem.grid import Cell, Grid, Setting
from blockem.resampling import Draws, choose, front, summary

MEASURES = ("em", "incoherent", "refusal", "preference", "margin", "kept", "task", "cued_em", "cued_incoherent")
SHARES = ("em", "incoherent", "refusal", "preference", "task", "cued_em", "cued_incoherent")  # of prompts, pairs or questions
CHANGES = ("em", "incoherent", "preference", "margin", "task", "cued_em")  # those whose difference to plain is told
ABLATED = ("em", "preference", "incoherent", "kept", "task")
BETTER_HIGH = ("kept", "task")
PLANES = (
    ("em-adherence", "em", "kept"),
    ("preference-adherence", "preference", "kept"),
    ("em-task", "em", "task"),
    ("em-incoherence", "em", "incoherent"),
    ("preference-incoherence", "preference", "incoherent"),
    ("cued-em-adherence", "cued_em", "kept"),
    ("cued-em-incoherence", "cued_em", "cued_incoherent"),
)
Cells = Mapping[tuple[str, int], Measured]


@dataclass
class Table:
    """Settings and the cells that were measured for each."""

    grid: Grid
    draws: Draws
    cells: MeasuredCells

    @property
    def judged(self) -> bool:
        return any("em" in one.models[one.variant] for cells in self.cells.values() for one in cells.values())

    def values(self, cells: Cells, measure: str, model: str = "", against: str = "") -> tuple[Array, int]:
        """A measure over a setting's cells `[1 + resamples]`, or its paired difference to the model `against`; and its items."""
        ratios = {}
        for place, cell in cells.items():
            one, other = cell.of(measure, model), cell.of(measure, against) if against else None
            if one is not None and not (against and other is None):
                ratios[place] = one.minus(other) if other is not None else one
        n = min((one.n for one in ratios.values()), default=0)
        return self._over({place: self.draws.of(one) for place, one in ratios.items()} if n else {}, n)

    def paired(self, left: Cells, right: Cells, measure: str) -> tuple[Array, int]:
        """The difference between two settings, on the same prompts, in the cells that both have."""
        statistics, items = {}, []
        for place in sorted(left.keys() & right.keys()):
            one, other = left[place].of(measure), right[place].of(measure)
            if one is not None and other is not None:
                statistics[place] = self.draws.difference(one, other)
                items.append(one.minus(other).n)
        return self._over(statistics, min(items, default=0))

    def _over(self, statistics: Mapping[tuple[str, int], Array], n: int) -> tuple[Array, int]:
        """The mean over cells `[1 + resamples]`, and the fewest items of one; not a number where there are none."""
        return (self.draws.over(statistics, self.grid.seeds) if n else np.full(self.draws.resamples + 1, np.nan)), n

    def references(self) -> dict[tuple[str, int], Measured]:
        """One cell for each domain and seed, for its base and plain."""
        found: dict[tuple[str, int], Measured] = {}
        for setting, cells in self.cells.items():
            if setting.kind == "defence":
                for place, cell in cells.items():
                    found.setdefault(place, cell)
        return dict(sorted(found.items()))

    def complete(self, setting: Setting) -> bool:
        return len(self.cells.get(setting, {})) == len(self.grid.domains) * len(self.grid.seeds)


def compare(grid: Grid, cells: MeasuredCells, failed: Mapping[str, str]) -> dict[str, Any]:
    """Everything that `comparison.json` holds but the sentences: settings, figures as tables, the recommendation, the failures.

    Args:
        cells: those that were measured (`read_cells`), at least one.
        failed: why the others are missing, by id.
    """
    table = Table(grid, Draws(grid.config.resamples), cells)
    settings = [_row(table, one) for one in grid.settings if one.kind != "transfer" and one in cells]
    figures = [*_planes(table), *_ablations(table), *_strengths(table), *_transfer(table)]
    told = sum(one["changes"][name] is not None for one in settings if not is_plain(one) for name in one["changes"])
    told += sum(len(one["rows"]) for one in figures if one["id"] == "ablations")
    for one in figures:
        if one["id"] == "transfer":
            places = [one["columns"].index(name) for name in ("change", "from_own")]
            told += sum(row[place] is not None for row in one["rows"] for place in places)
    return {
        "blockem": version("blockem"),
        "domains": list(grid.domains),
        "seeds": list(grid.seeds),
        "config": asdict(grid.config),
        "judge": next((str(one.recipe.evaluate.judge) for one in grid.cells), "none") if table.judged else "none",
        "cue": next((one.recipe.evaluate.cue for one in grid.cells), "none"),
        "references": {name: _measures(table, table.references(), name) for name in ("base", "plain")},
        "settings": settings,
        "cells": [_cell_row(table, cell, failed) for cell in grid.cells],
        "failed": [{"cell": cell, "reason": reason} for cell, reason in failed.items()],
        "figures": figures,
        "comparisons": told,
        "recommendation": _recommend(table),
    }


def is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a setting's row is that of no defence, which tables show as the reference."""
    return bool(row["kind"] == "defence" and row["name"] == "plain")


def _summary(found: tuple[Array, int], measure: str) -> dict[str, Any] | None:
    """A measure itself, not a difference."""
    return summary(*found, share=measure in SHARES)


def _measures(table: Table, cells: Cells, model: str = "") -> dict[str, Any]:
    return {name: _summary(table.values(cells, name, model), name) for name in MEASURES}


def _row(table: Table, setting: Setting) -> dict[str, Any]:
    cells = table.cells[setting]
    return {
        "label": setting.label,
        "kind": setting.kind,
        "name": setting.name,
        "field": setting.field,
        "strength": setting.strength,
        "cells": len(cells),
        "complete": table.complete(setting),
        "measures": _measures(table, cells),
        "changes": {name: summary(*table.values(cells, name, against="plain")) for name in CHANGES},
    }


def _cell_row(table: Table, cell: Cell, failed: Mapping[str, str]) -> dict[str, Any]:
    row = {"id": cell.id, "setting": cell.setting.label, "domain": cell.domain, "seed": cell.seed, "folder": f"cells/{cell.id}"}
    if cell.id in failed:
        return {**row, "state": "failed", "variant": None, "measures": {}}
    one = table.cells[cell.setting][cell.domain, cell.seed]
    seeds = replace(table.grid, seeds=(cell.seed,))
    alone = replace(table, grid=seeds)
    return {**row, "state": "finished", "variant": one.variant, "measures": _measures(alone, {(cell.domain, cell.seed): one})}


def _ends(found: dict[str, Any] | None) -> list[float | None]:
    return [None, None, None] if found is None else [found["value"], found["low"], found["high"]]


def _planes(table: Table) -> list[dict[str, Any]]:
    """EM or preference against adherence or incoherence: a row for each setting and both references, with the Pareto front."""
    shown = [one for one in table.grid.settings if one.kind == "defence" and one.name != "plain" and table.complete(one)]
    references = table.references()
    found = []
    for name, up, across in PLANES:
        points: list[tuple[Setting | None, str, tuple[Array, int], tuple[Array, int]]] = []
        for model in ("base", "plain"):
            points.append((None, model, table.values(references, up, model), table.values(references, across, model)))
        for one in shown:
            points.append((one, one.label, table.values(table.cells[one], up), table.values(table.cells[one], across)))
        points = [one for one in points if np.isfinite(one[2][0][0]) and np.isfinite(one[3][0][0])]
        ours = [place for place, one in enumerate(points) if one[1] != "base"]  # base learnt nothing, so it is no choice
        if not any(points[place][0] for place in ours):
            continue
        sign = -1.0 if across in BETTER_HIGH else 1.0
        worse = np.stack([np.stack([points[place][2][0], sign * points[place][3][0]]) for place in ours])
        on = front(worse)
        rows: list[list[Any]] = []
        for place, (setting, label, y, x) in enumerate(points):
            marks = [bool(on[ours.index(place), 0]), float(on[ours.index(place), 1:].mean())] if place in ours else [False, None]
            defence = setting.name if setting else label
            at = [end for one, measure in ((x, across), (y, up)) for end in _ends(_summary(one, measure))]
            rows.append([label, defence, setting.strength if setting else None, *at, *marks])
        ends = [f"{measure}{end}" for measure in (across, up) for end in ("", "_low", "_high")]
        columns = ["setting", "defence", "strength", *ends, "on_front", "front_share"]
        found.append({"id": name, "kind": "plane", "across": across, "up": up, "columns": columns, "rows": rows})
    return found


def _ablations(table: Table) -> list[dict[str, Any]]:
    """Each ablation minus the whole of block-em, on the same prompts, pairs and rows."""
    whole = table.grid.reference
    shown = [one for one in table.grid.settings if one.kind == "ablation" and one in table.cells]
    if whole not in table.cells or not shown:
        return []
    rows: list[list[Any]] = []
    for one in shown:
        both = table.cells[one].keys() & table.cells[whole].keys()
        pair = [{place: cells[place] for place in sorted(both)} for cells in (table.cells[one], table.cells[whole])]
        for measure in ABLATED:
            found = summary(*table.paired(pair[0], pair[1], measure))
            if found:
                values = [summary(*table.values(cells, measure)) for cells in pair]
                rows.append([one.label, measure, *_ends(found), *(each and each["value"] for each in values), found["n"], len(both)])
    columns = ["ablation", "measure", "difference", "low", "high", "value", "whole", "n", "cells"]
    cells = len(table.grid.domains) * len(table.grid.seeds)
    return [{"id": "ablations", "kind": "ablations", "whole": whole.label, "cells": cells, "columns": columns, "rows": rows}]


def _strengths(table: Table) -> list[dict[str, Any]]:
    """Three rates over the strengths of each defence that has several; EM by the preference where nothing was judged."""
    found = []
    up = "em" if table.judged else "preference"
    fields = dict.fromkeys((one.name, one.field) for one in table.grid.settings if one.kind == "defence" and one.field)
    for name, field in fields:
        group = [one for one in table.grid.settings if (one.kind, one.name, one.field) == ("defence", name, field) and one in table.cells]
        group = [one for one in group if isinstance(one.strength, (int, float)) and table.complete(one)]
        if len(group) < 2:
            continue
        measures = (up, "incoherent", "kept")
        rows = []
        for one in sorted(group, key=lambda each: float(each.strength)):
            ends = [end for measure in measures for end in _ends(_summary(table.values(table.cells[one], measure), measure))]
            rows.append([float(one.strength), *ends])
        columns = ["strength", *(f"{measure}{end}" for measure in measures for end in ("", "_low", "_high"))]
        what = {"id": f"strength-{name}", "kind": "strength", "defence": name, "field": field, "up": up}
        found.append({**what, "columns": columns, "rows": rows})
    return found


def _transfer(table: Table) -> list[dict[str, Any]]:
    """Latents of one domain while training in another: EM there, its paired change from plain and from the domain's own latents."""
    whole = table.grid.reference
    if not table.grid.config.transfer or whole is None:
        return []
    up = "em" if table.judged else "preference"
    rows: list[list[Any]] = []
    for source in table.grid.domains:
        moved = next((one for one in table.cells if one.kind == "transfer" and one.name == source), None)
        for domain in table.grid.domains:
            own = _inside(table.cells.get(whole, {}), domain)
            cells = own if source == domain else _inside(table.cells.get(moved, {}), domain) if moved else {}
            change = summary(*table.values(cells, up, against="plain"))
            kept = _summary(table.values(cells, "kept"), "kept")
            apart = None if source == domain else summary(*table.paired(cells, own, up))
            measures = [*_ends(_summary(table.values(cells, up), up)), *_ends(change), kept and kept["value"], *_ends(apart)]
            rows.append([source, domain, *measures])
    changes = ["change", "change_low", "change_high", "kept", "from_own", "from_own_low", "from_own_high"]
    columns = ["latents_of", "trained_on", up, "low", "high", *changes]
    return [{"id": "transfer", "kind": "transfer", "up": up, "columns": columns, "rows": rows}]


def _inside(cells: Cells, domain: str) -> dict[tuple[str, int], Measured]:
    """Those trained in one domain."""
    return {place: one for place, one in cells.items() if place[0] == domain}


def _recommend(table: Table) -> dict[str, Any]:
    """The setting with the least EM among those that keep the task and stay coherent; plain is one of the candidates."""
    config = table.grid.config
    up = "em" if table.judged else "preference"
    defences = [one for one in table.grid.settings if one.kind == "defence"]
    shown = [one for one in defences if table.complete(one) and one.name != "plain"]
    left_out = [one.label for one in defences if not table.complete(one)]
    candidates = [(table.references(), "plain"), *((table.cells[one], "") for one in shown)]
    labels = ["plain", *(one.label for one in shown)]
    em = np.stack([table.values(cells, up, model)[0] for cells, model in candidates])
    kept = np.stack([table.values(cells, "kept", model)[0] for cells, model in candidates])
    more = np.stack([table.values(cells, "incoherent", model, "plain")[0] for cells, model in candidates])
    choice = choose(em, kept, more if table.judged else None, config.keep_adherence, config.more_incoherence)
    found = None if choice.chosen is None else labels[choice.chosen]
    place = choice.chosen or 0
    cells, which = candidates[place]
    return {
        "measure": up,
        "setting": found,
        "share": float(choice.shares[place]) if found else None,
        "shares": {label: float(share) for label, share in zip(labels, choice.shares, strict=True)},
        "none": choice.none,
        "qualified": [label for label, good in zip(labels, choice.qualified, strict=True) if good],
        "candidates": len(labels),
        "left_out": left_out,
        "keep_adherence": config.keep_adherence,
        "more_incoherence": config.more_incoherence if table.judged else None,
        "resamples": config.resamples,
        "measures": _measures(table, cells, which) if found else {},
        "change": summary(*table.values(cells, up, which, "plain")) if found and place else None,
    }
