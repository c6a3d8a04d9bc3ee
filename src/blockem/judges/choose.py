"""Which judge a name means: the local one, a folder, or a server."""

from __future__ import annotations

from pathlib import Path

from blockem.config import EvaluateConfig
from blockem.errors import BlockemError
from blockem.judges.judge import Judge
from blockem.progress import Progress


def judge_of(wanted: EvaluateConfig, cache: Path, progress: Progress | None = None) -> Judge | None:
    """The judge that a recipe names."""
    return open_judge(wanted.judge, wanted.judge_model, cache=cache, progress=progress, reply_tokens=wanted.judge_reply_tokens)


def open_judge(
    name: str,
    model: str | None = None,
    protocol: str = "labelled",
    rubric: Path | None = None,
    cache: Path | None = None,
    max_requests: int | None = None,
    max_tokens: int | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
    reply_tokens: int = 16,
) -> Judge | None:
    """The judge that a recipe or a command line names; cheap, nothing is loaded or asked yet.

    Args:
        name: `none`, `local` (the bundled one), a folder that `blockem judge train` wrote, or the address of an OpenAI-compatible server.
        model, protocol, rubric, cache, max_requests, max_tokens, concurrency, reply_tokens: of a server (see `ServerJudge`).

    Raises:
        BlockemError: there is no such judge.
    """
    if name == "none":
        return None
    if not name.startswith(("http://", "https://")):
        from blockem.judges.local import LocalJudge

        return LocalJudge(None if name == "local" else name, progress=progress)
    from blockem.judges.server import ServerJudge

    if not model:
        raise BlockemError("the judge is a server, so name the model that it shall judge with (--judge-model, or evaluate.judge_model)")
    if protocol not in ("labelled", "scores"):
        raise BlockemError(f"unknown judge protocol {protocol!r}: use labelled or scores")
    return ServerJudge(
        model,
        name,
        protocol="scores" if protocol == "scores" else "labelled",
        rubric=rubric,
        cache=cache,
        max_requests=max_requests,
        max_tokens_total=max_tokens,
        concurrency=concurrency,
        reply_tokens=reply_tokens,
        progress=progress,
    )
