"""Talking to the base, the plain and every defended model side by side in the terminal."""

from __future__ import annotations

from pathlib import Path

from blockem.config import Recipe
from blockem.errors import BlockemError
from blockem.progress import printable


def chat_loop(recipe: Recipe, run: Path, max_new_tokens: int = 120, temperature: float = 0.0) -> None:
    """Ask every model of a run folder the same question until the input ends; each keeps its own conversation.

    Raises:
        BlockemError: the folder holds no adapter.
    """
    from blockem.examples import Message
    from blockem.generation import generate
    from blockem.model import load_model
    from blockem.session import trained_in

    names = [name for name in trained_in(run) if name != "random"]
    if not names:
        raise BlockemError(f"{run} holds no trained adapter; make one there with `blockem run` first")
    lm = load_model(recipe.model.id, recipe.model.revision, recipe.model.dtype, recipe.model.device)
    for name in names:
        lm.add_adapter(run / name, name)
    talks: dict[str, list[Message]] = {name: [] for name in ("base", *names)}
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        for name, talk in talks.items():
            talk.append({"role": "user", "content": question})
            with lm.variant(name):
                answer = generate(lm, [talk], max_new_tokens, temperature)[0]
            talk.append({"role": "assistant", "content": answer})
            print(f"\n{name}> {printable(answer)}", flush=True)
        print()
