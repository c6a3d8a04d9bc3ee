"""What finished cells of a comparison say, item by item, read from their run folders and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockem import bundled
from blockem.errors import BlockemError
from blockem.evaluation import RATES, Array
from blockem.grid import Cell, Grid, Setting
from blockem.resampling import Ratio
from blockem.store import read_json

ANSWERS, TASK_ANSWERS = "answers.jsonl", "task-answers.jsonl"


@dataclass(frozen=True)
class Measured:
    """What one cell's run folder says: each measure of its base, plain and defended model, item by item."""

    variant: str
    models: dict[str, dict[str, Ratio]]

    def of(self, measure: str, model: str = "") -> Ratio | None:
        return self.models[model or self.variant].get(measure)


MeasuredCells = dict[Setting, dict[tuple[str, int], Measured]]
"""Cells by setting, then by domain and seed."""


def variant_of(summary: Mapping[str, Any]) -> str:
    """Which of a run's models a cell is about: its main one, else the last that is neither base nor plain, if there is one."""
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
    evaluations = {name: folder / "steps" / f"evaluate-{name}.json" for name in summed["models"]}
    results = {name: check_evaluation(path, recipe.data.pairs) for name, path in evaluations.items()}
    losses = {name: found[1] for name, found in results.items()}
    if len({len(one) for one in losses.values()}) > 1:
        raise BlockemError(f"{folder}: its models were measured on different held-out rows")
    answers = _answers(folder / ANSWERS, len(bundled.final_prompts(recipe.data.prompts)) if recipe.evaluate.answers else 0)
    asked = read_json(evaluations["base"], "step record")["result"].get("task_answers")  # none in a folder of before there were any
    task = _answers(folder / TASK_ANSWERS, len(asked)) if isinstance(asked, list) and asked else []
    gained = losses["base"] - losses["plain"] if "plain" in losses else np.zeros(0)
    rows = f"rows of {cell.domain}"
    models: dict[str, dict[str, Ratio]] = {}
    for name, (margins, _) in results.items():
        try:
            file = ANSWERS
            verdicts = _verdicts(answers, name, recipe.data.domain)
            file = TASK_ANSWERS
            verdicts |= _task(task, name, cell.domain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BlockemError(f"{folder / file}: its verdicts on {name} cannot be read ({_reason(error)})") from error
        models[name] = {
            "preference": Ratio("pairs", (margins > 0) * outside, outside),
            "margin": Ratio("pairs", margins * outside, outside),
            **verdicts,
        }
        if gained.sum() > 0:
            models[name]["kept"] = Ratio(rows, losses["base"] - losses[name], gained)
    return Measured(variant_of(summed), models)


def check_evaluation(path: Path, pairs: str | None) -> tuple[Array, Array]:
    """Read the record of one model's evaluation: margins `[pairs]`, and the losses of held-out rows `[rows]`.

    Args:
        pairs: the recipe's `data.pairs`.

    Raises:
        BlockemError: it is missing, broken, or of other pairs.
    """
    record = read_json(path, "step record")
    try:
        margins, losses = (np.array(one, dtype=float) for one in (record["result"]["margins"], record["result"]["heldout"][0]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BlockemError(f"{path}: not the record of a model's evaluation ({_reason(error)})") from error
    n = len(bundled.evaluation_pairs(pairs))
    if margins.shape != (n,) or losses.ndim != 1:
        raise BlockemError(f"{path}: not an evaluation on the recipe's {n} pairs")
    return margins, losses


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


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _verdicts(answers: list[dict[str, Any]], name: str, domain: str) -> dict[str, Ratio]:
    """Judged rates; answers without a verdict, and the training domain, do not count."""
    found = {}
    for prefix, places in (("", answers), ("cued_", [row.get("cued") or {} for row in answers])):
        said = _said(places, name)
        if all(verdict["missing"] for verdict in said):
            continue
        had = np.array([float(not v["missing"] and row["domain"] != domain) for row, v in zip(answers, said, strict=True)])
        for rate, key in RATES.items():
            found[prefix + rate] = Ratio("prompts", np.array([float(v.get(key, False)) for v in said]) * had, had)
    return found


def _said(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A model's verdict in each row."""
    return [(row.get("verdicts") or {}).get(name) or {"missing": True} for row in rows]


def _task(rows: list[dict[str, Any]], name: str, domain: str) -> dict[str, Ratio]:
    """The share of the domain's own held-out questions that are answered misaligned: where the task is wrong advice, how much is done."""
    said = _said(rows, name)
    had = np.array([float(not verdict["missing"]) for verdict in said])
    misaligned = np.array([float(verdict.get("misaligned", False)) for verdict in said])
    return {"task": Ratio(f"questions of {domain}", misaligned * had, had)} if had.any() else {}


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
