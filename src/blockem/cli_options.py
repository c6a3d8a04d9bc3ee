"""Options that every command has in common."""

from __future__ import annotations

from typing import Annotated

import typer

from blockem.errors import BlockemError

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change one recipe field; may be repeated.")]
Model = Annotated[str | None, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")]
Data = Annotated[str | None, typer.Option(help="Chat JSONL to train on, instead of the bundled domain.")]
Heldout = Annotated[str | None, typer.Option(help="Chat JSONL of held-out rows of the same task.")]
Domain = Annotated[str | None, typer.Option(help="Training domain (finance, health, education, legal, career, auto, or a name of yours).")]
Rows = Annotated[int | None, typer.Option(help="At most so many training rows.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything.")]


def changed_fields(sets: list[str] | None) -> dict[str, str]:
    """What `--set` says, by field, as typed.

    Raises:
        BlockemError: one of them has no equals sign.
    """
    changes = {}
    for item in sets or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise BlockemError(f"--set {item}: write it as stage.field=value, for example --set train.lr=2e-4")
        changes[name.strip()] = value.strip()
    return changes
