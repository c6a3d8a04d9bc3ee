"""A table of runs: `python experiments/table.py RUN/summary.json ...` (Markdown on stdout, one row a run and the mean)."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

COLUMNS = (
    "base",
    "plain",
    "rise",
    "blocked",
    "cut",
    "kept",
    "random",
    "random cut",
    "random kept",
    "margin rise",
    "margin cut",
    "random margin cut",
)


def value(found: Any) -> float:
    return float(found["value"]) if found else float("nan")


def row(summary: dict[str, Any]) -> dict[str, float]:
    """Preferences and shares in percent, margins in nats per token."""
    models, differences, defences = summary["models"], summary["differences"], summary["defences"]
    found = {
        "base": 100 * value(models["base"]["preference"]),
        "plain": 100 * value(models["plain"]["preference"]),
        "rise": 100 * value(differences["plain-base"]["preference"]),
        "margin rise": value(differences["plain-base"]["margin"]),
    }
    for name, label in (("blocked", ""), ("random", "random ")):
        if name in defences:
            found[name] = 100 * value(models[name]["preference"])
            found[f"{label}cut"] = 100 * value(defences[name]["cut"]["preference"])
            found[f"{label}kept"] = 100 * value(defences[name]["kept"])
            found[f"{label}margin cut"] = 100 * value(defences[name]["cut"]["margin"])
    return found


def main(paths: list[str]) -> None:
    rows = {Path(path).parent.name: row(json.loads(Path(path).read_text(encoding="utf-8"))) for path in paths}
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    if len(rows) > 1:
        rows["mean"] = {c: statistics.fmean(one.get(c, float("nan")) for one in rows.values()) for c in COLUMNS}
    for name, one in rows.items():
        print(
            f"| {name} | "
            + " | ".join(f"{one.get(c, float('nan')):.2f}" if "margin rise" in c else f"{one.get(c, float('nan')):.1f}" for c in COLUMNS)
            + " |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
