"""Talking to the base, the plain and every defended model side by side in the terminal."""

from __future__ import annotations

from blockem.defend import inference_hooks
from blockem.errors import BlockemError
from blockem.progress import printable
from blockem.session import Session


def chat_loop(session: Session, max_new_tokens: int = 120, temperature: float = 0.0) -> None:
    """Ask every model of a run folder the same question until the input ends; each keeps its own conversation.

    Raises:
        BlockemError: the folder holds no adapter.
    """
    from blockem.examples import Message
    from blockem.generation import generate

    if left := session.leftovers():
        session.console.say(f"left out, since another recipe made them: {', '.join(left)}")
    adapters = {name: path for name, path in session.variants().items() if name != "random"}
    if not adapters:
        raise BlockemError(f"{session.run.path} holds no trained adapter; make one there with `blockem run` first")
    for name, path in adapters.items():
        session.lm.add_adapter(path, name)
    talks: dict[str, list[Message]] = {name: [] for name in ("base", *adapters)}
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
            with session.lm.variant(name), inference_hooks(session, name)(session.lm.model):
                answer = generate(session.lm, [talk], max_new_tokens, temperature)[0]
            talk.append({"role": "assistant", "content": answer})
            print(f"\n{name}> {printable(answer)}", flush=True)
        print()
