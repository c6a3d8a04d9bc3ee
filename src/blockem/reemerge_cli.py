"""`blockem reemerge`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from blockem.cli_options import AsJson, Quiet, Set, changed_fields
from blockem.errors import BlockemError


def reemerge(
    source: Annotated[Path, typer.Argument(metavar="RUN|RECIPE", help="A finished run folder, or a recipe in YAML to start afresh.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; the same command again continues there.")] = Path(
        "runs/reemerge"
    ),
    no_retrain: Annotated[bool, typer.Option("--no-retrain", help="Stop before stages 1 to 3 on the re-emerged model.")] = False,
    sets: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Does misalignment come back when blocked training goes on, and where? Then block that too, and train again.

    Trains the blocked model for reemerge.epochs epochs and measures each; patches prompts and decoding steps between base and last epoch;
    checks whether the SAE still explains it; weighs three hypotheses; discovers again against the last epoch and trains on the union of
    both latent sets. Writes OUT/reemergence.json and OUT/reemergence.html.
    """
    from blockem.config import load_recipe
    from blockem.pipeline import open_session
    from blockem.reemergence.rounds import reemerge as run

    folder = source if source.is_dir() else None
    if folder is not None and not (folder / "recipe.yaml").is_file():
        raise BlockemError(f"{folder} is no run folder: recipe.yaml is missing; run `blockem run` first, or give a recipe")
    recipe = load_recipe(folder / "recipe.yaml" if folder is not None else source)
    found = run(open_session(recipe.with_values(changed_fields(sets)), out, quiet), folder, not no_retrain)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"{found['said'][:1].upper()}{found['said'][1:]}.")
    for one in found["hypotheses"]:
        print(f"{one['name']} {one['verdict']}: {one['statement']} {one['why'][:1].upper()}{one['why'][1:]}.")
    union = found["union"] or {}
    if words := union.get("said") or union.get("why"):
        print(f"{words[:1].upper()}{words[1:]}.")
    print(f"\nPage: {out / 'reemergence.html'}")
