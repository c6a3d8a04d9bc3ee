"""`blockem compare`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from blockem.cli_options import AsJson, Quiet

GridFile = Annotated[Path, typer.Argument(metavar="GRID", help="Grid in YAML: recipe, seeds, domains, defences, ablations, transfer.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the comparison. The same command again continues there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs, what they share and how many trainings they cost; run nothing.")]

Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, in processes of their own that divide cores and GPUs among them.")
]


def compare(
    grid: GridFile,
    out: Out = Path("runs/compare"),
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare defences on your own data: every strength, domain and seed as a run of its own, figures, and which setting to use.

    Leaves OUT/comparison.html and OUT/comparison.json, each figure as CSV and SVG in OUT/figures, and every run in OUT/cells. One failed
    run does not stop the rest; the exit code is then 1.
    """
    from blockem.grid import load_grid
    from blockem.sweep import plan

    read = load_grid(grid)
    if dry_run:
        planned = plan(read, out)
        print(json.dumps(planned, ensure_ascii=False) if as_json else "\n".join(plan_lines(planned)))
        return
    from blockem.executor import SideBySide
    from blockem.sweep import compare_all

    comparison, page = compare_all(read, out, quiet, SideBySide(jobs) if jobs > 1 else None)
    if as_json:
        print(json.dumps(comparison, ensure_ascii=False))
    else:
        print("\n".join([*comparison["sentences"]["recommendation"], comparison["sentences"]["comparisons"]]))
        print(f"\nComparison: {page}")
        for one in comparison["failed"]:
            print(f"failed: {one['cell']}: {one['reason']}")
    if comparison["failed"]:
        raise typer.Exit(1)


def plan_lines(planned: dict[str, Any]) -> list[str]:
    """A plan as people read it."""
    lines = []
    for place, cell in enumerate(planned["cells"], 1):
        notes = ["finished"] * cell["finished"]
        notes += [f"plain and its measures from {cell['shares_plain_with']}"] if cell["shares_plain_with"] else []
        notes += [f"latents of {cell['latents_of']}"] if cell["latents_of"] else []
        trainings = f"{cell['trainings']} training{'' if cell['trainings'] == 1 else 's'}"
        lines.append(f"{place:3d}  {cell['id']}: {'; '.join([trainings, *notes])}")
    lines.append(
        f"{len(planned['cells'])} runs, {planned['trainings']} trainings, {planned['plain_trainings']} plain fine-tunes among all runs"
    )
    return lines
