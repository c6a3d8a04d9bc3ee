"""Who carries out many jobs: a small interface, and the one that does them here, one after the other.

A job is plain data and the work a module's function, so that an executor may send both to another machine. Work that fails is an
outcome like any other; the rest goes on.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from blockem.errors import BlockemError

J = TypeVar("J")


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: its id.
        error: why it failed, in a sentence; None when it is done.
        details: the traceback of an error that is not the user's.
    """

    job: str
    error: str | None = None
    details: str = ""


class Executor(Protocol):
    """Carries out jobs that do not depend on each other, in any order."""

    def run(self, work: Callable[[J], Outcome], jobs: Sequence[J]) -> Iterator[Outcome]:
        """One outcome for each job, as they end. `work` raises nothing but what should stop everything (Ctrl-C)."""
        ...


class OneByOne:
    """In this process, in order: what is loaded for one job serves the next."""

    def run(self, work: Callable[[J], Outcome], jobs: Sequence[J]) -> Iterator[Outcome]:
        for job in jobs:
            yield work(job)


def attempt(job: str, work: Callable[[], object]) -> Outcome:
    """Do the work of one job; an error becomes its outcome."""
    try:
        work()
    except BlockemError as error:
        return Outcome(job, str(error))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        return Outcome(job, f"{type(error).__name__}: {first}" if first else type(error).__name__, traceback.format_exc())
    return Outcome(job)
