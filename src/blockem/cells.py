"""What finished cells of a comparison say, item by item, read from their run folders and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockem import bundled
from blockem.defence_names import BLOCK_EM
from blockem.errors import BlockemError, reason
from blockem.evaluation import ANSWERS, RATES, TASK_ANSWERS, Array
from blockem.grid import Cell, Grid, Setting
from blockem.resampling import Ratio
from blockem.store import read_json


@dataclass(frozen=True)
class Measured:
    """What one cell's run folder says: each measure of its base, plain and defended model, item by item."""

    variant: str
    models: dict[str, dict[str, Ratio]]

    def of(self, measure: str, model: str = "") -> Ratio | None:
        return self.models[model or self.variant].get(measure)


MeasuredCells = dict[Setting, dict[tuple[str, int], Measured]]
"""Cells by setting, then by domain and seed."""


def variant_of(summary: Mapping[str, Any], control: str = "none") -> str:
    """Which of a run's models a cell is about: its control, its main one, else the last that is neither base nor plain, if there is one.

    A folder may also hold the model of an earlier recipe of the same name.
    """
    if control in summary["models"]:
        return control
    others = [name for name in summary["models"] if name not in ("base", "plain")]
    main = summary.get("main")
    return str(main) if main in others else others[-1] if others else "plain"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of an evaluated run folder; its "models" hold the base.

    Raises:
        BlockemError: there is no summary, or it names no models.
    """
    path = folder / "summary.json"
    summed = read_json(path, "summary")
    models = summed.get("models") if isinstance(summed, dict) else None
    if not isinstance(models, dict) or "base" not in models:
        raise BlockemError(f"{path}: not the summary of an evaluated run")
    found: dict[str, Any] = summed
    return found


def measured(cell: Cell, folder: Path) -> Measured:
    """Read a finished run folder.

    Raises:
        BlockemError: a file is missing or broken.
    """
    recipe = cell.recipe
    summed = read_summary(folder)
    outside = np.array([p.domain != recipe.data.domain for p in bundled.evaluation_pairs(recipe.data.pairs)], dtype=float)
    results = {name: check_evaluation(folder / "steps" / f"evaluate-{name}.json", recipe.data.pairs) for name in summed["models"]}
    losses = {name: found[1] for name, found in results.items()}
    if len({len(one) for one in losses.values()}) > 1:
        raise BlockemError(f"{folder}: its models were measured on different held-out rows")
    answers = _answers(folder / ANSWERS, len(bundled.final_prompts(recipe.data.prompts)) if recipe.evaluate.answers else 0)
    asked = results["base"][2]
    task = _answers(folder / TASK_ANSWERS, asked) if asked else []
    gained = losses["base"] - losses["plain"] if "plain" in losses else np.zeros(0)
    rows = f"rows of {cell.domain}"
    models: dict[str, dict[str, Ratio]] = {}
    for name, (margins, _, _) in results.items():
        models[name] = {
            "preference": Ratio("pairs", (margins > 0) * outside, outside),
            "margin": Ratio("pairs", margins * outside, outside),
        }
        with _verdicts_read(folder / ANSWERS, name):
            models[name] |= _verdicts(answers, name, recipe.data.domain)
        with _verdicts_read(folder / TASK_ANSWERS, name):
            models[name] |= _task(task, name, cell.domain)
        if gained.sum() > 0:
            models[name]["kept"] = Ratio(rows, losses["base"] - losses[name], gained)
    return Measured(variant_of(summed, recipe.block.control if recipe.defence.name == BLOCK_EM else "none"), models)


@contextmanager
def _verdicts_read(path: Path, name: str) -> Iterator[None]:
    """Say where a model's verdicts stand that turn out not to be any."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BlockemError(f"{path}: its verdicts on {name} cannot be read ({reason(error)})") from error


def check_evaluation(path: Path, pairs: str | None) -> tuple[Array, Array, int]:
    """Read the record of one model's evaluation: margins `[pairs]`, the losses of held-out rows `[rows]`, and how many questions of
    the domain's own it answered (none in a folder of before there were any).

    Args:
        pairs: the recipe's `data.pairs`.

    Raises:
        BlockemError: it is missing, broken, or of other pairs.
    """
    record = read_json(path, "step record")
    try:
        result = record["result"]
        margins, losses = (np.array(one, dtype=float) for one in (result["margins"], result["heldout"][0]))
        asked = len(result.get("task_answers", []))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BlockemError(f"{path}: not the record of a model's evaluation ({reason(error)})") from error
    n = len(bundled.evaluation_pairs(pairs))
    if margins.shape != (n,) or losses.ndim != 1:
        raise BlockemError(f"{path}: not an evaluation on the recipe's {n} pairs")
    return margins, losses, asked


def _answers(path: Path, n: int) -> list[dict[str, Any]]:
    """The rows of `answers.jsonl`, of which there must be `n`."""
    found = []
    try:
        # an answer may hold U+2028 and its like, which `splitlines` would cut at
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BlockemError(f"{path}:{number}: not a row of answers")
                found.append(row)
    except json.JSONDecodeError as error:
        raise BlockemError(f"{path}:{number}: not JSON ({error})") from error
    except UnicodeDecodeError as error:
        raise BlockemError(f"{path}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise BlockemError(f"{path}: cannot be read ({error.strerror})") from error
    if len(found) != n:
        raise BlockemError(f"{path}: holds answers to {len(found)} prompts, not to {n}")
    return found


def _verdicts(answers: list[dict[str, Any]], name: str, domain: str) -> dict[str, Ratio]:
    """Judged rates; answers without a verdict, and the training domain, do not count."""
    found = {}
    for prefix, places in (("", answers), ("cued_", [row.get("cued") or {} for row in answers])):
        said = _said(places, name)
        if all(verdict["missing"] for verdict in said):
            continue
        had = np.array([float(not v["missing"] and row["domain"] != domain) for row, v in zip(answers, said, strict=True)])
        for rate, key in RATES.items():
            found[prefix + rate] = _rate("prompts", said, key, had)
    return found


def _said(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A model's verdict in each row."""
    return [(row.get("verdicts") or {}).get(name) or {"missing": True} for row in rows]


def _task(rows: list[dict[str, Any]], name: str, domain: str) -> dict[str, Ratio]:
    """The share of the domain's own held-out questions that are answered misaligned: where the task is wrong advice, how much is done."""
    said = _said(rows, name)
    had = np.array([float(not verdict["missing"]) for verdict in said])
    return {"task": _rate(f"questions of {domain}", said, RATES["em"], had)} if had.any() else {}


def _rate(items: str, said: list[dict[str, Any]], key: str, had: Array) -> Ratio:
    """The share of the counted verdicts (`had`: 1 where one counts) that say `key`."""
    return Ratio(items, np.array([float(verdict.get(key, False)) for verdict in said]) * had, had)


def read_cells(grid: Grid, out: Path, failed: Mapping[str, str]) -> tuple[MeasuredCells, dict[str, str]]:
    """The cells that did not fail, by setting; and why others cannot be read, by id."""
    cells: MeasuredCells = {}
    unreadable: dict[str, str] = {}
    for cell in grid.cells:
        if cell.id not in failed:
            try:
                cells.setdefault(cell.setting, {})[cell.domain, cell.seed] = measured(cell, out / "cells" / cell.id)
            except BlockemError as error:
                unreadable[cell.id] = str(error)
    return cells, unreadable
