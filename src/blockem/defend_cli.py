"""`blockem defend`: fine-tune under any defence by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockem.cli_options import AsJson, Data, Domain, Heldout, Model, Quiet, Rows, Seed, Set
from blockem.defence_names import DEFENCES

if TYPE_CHECKING:
    from blockem.session import Session

Stage = Callable[[Path | None, Path, dict[str, Any], list[str] | None, "Callable[[Session], Any]"], None]

HELP = """Fine-tune under a defence; the adapter goes to OUT/NAME (block-em: OUT/blocked).

`blockem evaluate` then compares it with base, plain and every other model in OUT. Defences and what their strength is:

\b
{lines}

steering and caft take OUT/latents.json (`blockem discover`); steering, preventative,
safelora and early-stop with defence.stop_by=loss take OUT/plain (`blockem sft`).
"""


def help_text() -> str:
    """The command's help, with a line for each defence."""
    return HELP.format(lines="\n".join(f"{name:<13} {words}" for name, words in DEFENCES.items()))


def add_defend(app: typer.Typer, stage: Stage) -> None:
    """Put the command into `app`; `stage` opens the run folder and does one stage in it."""

    @app.command("defend", help=help_text())
    def defend(
        recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe in YAML; default: the run folder's own.")] = None,
        out: Annotated[Path, typer.Option("--out", "-o", help="Run folder. The same command again redoes nothing.")] = Path("runs/run"),
        defence: Annotated[str | None, typer.Option(help="One of the names above (default: the recipe's defence.name).")] = None,
        strength: Annotated[float | None, typer.Option(help="Its strength (default: the published or a usual value).")] = None,
        sets: Set = None,
        model: Model = None,
        data: Data = None,
        heldout: Heldout = None,
        domain: Domain = None,
        rows: Rows = None,
        seed: Seed = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        from blockem.defend import defend_step

        options = dict(locals())
        chosen = list(sets or [])
        if defence is not None:  # the recipe's strength is that of the recipe's defence
            chosen = ["defence.strength=none", *chosen, f"defence.name={defence}"]
        if strength is not None:
            chosen.append(f"defence.strength={strength}")
        stage(recipe, out, options, chosen, defend_step)
