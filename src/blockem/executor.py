"""Who carries out many jobs: a small interface, and two that do them on this machine, one after the other or side by side.

A job is plain data and the work a module's function, so that an executor may send both to another machine. Work that fails is an
outcome like any other; the rest goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

from blockem.config_values import need
from blockem.errors import BlockemError


class Named(Protocol):
    """What every job has."""

    @property
    def id(self) -> str: ...


J = TypeVar("J", bound=Named)


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
    """Carries out jobs that do not depend on each other, in any order.

    Attributes:
        mixed: several are at work at a time, so a line of progress must say whose it is.
    """

    @property
    def mixed(self) -> bool: ...

    def run(self, work: Callable[[J], Outcome], jobs: Sequence[J]) -> Iterator[Outcome]:
        """One outcome for each job, as they end. `work` raises nothing but what should stop everything (Ctrl-C)."""
        ...


class OneByOne:
    """In this process, in order: what is loaded for one job serves the next."""

    mixed = False

    def run(self, work: Callable[[J], Outcome], jobs: Sequence[J]) -> Iterator[Outcome]:
        for job in jobs:
            yield work(job)


@dataclass(frozen=True)
class SideBySide:
    """In several processes of this machine, each with its share of the processor's cores, and a GPU of its own where there are GPUs.

    What a process has loaded for one job serves its next. One that is killed, by the system for want of memory say, fails its own job
    alone; none outlives the process that started it. A variable that is set already (`OMP_NUM_THREADS`) is left as it is.

    Attributes:
        processes: how many at most.
    """

    processes: int
    mixed = True

    def __post_init__(self) -> None:
        need(self.processes >= 1, f"{self.processes} jobs at a time; use at least 1")

    def run(self, work: Callable[[J], Outcome], jobs: Sequence[J]) -> Iterator[Outcome]:
        crew = [_Worker(work, surroundings) for surroundings in _surroundings(min(self.processes, len(jobs)))]
        try:
            waiting, idle, busy = list(jobs), list(crew), dict[Connection, tuple[_Worker, J]]()
            while waiting or busy:
                while waiting and idle:
                    worker, job = idle.pop(0), waiting.pop(0)
                    worker.give(job)
                    busy[worker.pipe] = worker, job
                ready = wait(list(busy))
                for pipe in [one for one in busy if one in ready]:
                    worker, job = busy.pop(pipe)
                    outcome = worker.outcome(job)
                    idle.append(worker)
                    yield outcome
        finally:
            for worker in crew:
                worker.end()


class _Worker:
    """A process that does one job after the other, and is started again when it has died."""

    def __init__(self, work: Callable[[J], Outcome], surroundings: dict[str, str]) -> None:
        self._work, self._surroundings = work, surroundings
        self._start()

    def _start(self) -> None:
        self._busy = False
        context = multiprocessing.get_context("spawn")  # a fork would share threads and devices that do not bear it
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._work, self._surroundings), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Named) -> None:
        if not self._process.is_alive():
            self.end()
            self._start()
        self._busy = True
        with suppress(BrokenPipeError):  # died just now: `outcome` will say so
            self.pipe.send(job)

    def outcome(self, job: Named) -> Outcome:
        """How the job ended; waits for it."""
        try:
            found: Outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            why = f"its process died (exit code {code}{', killed, perhaps for want of memory' if code == -signal.SIGKILL else ''})"
            return Outcome(job.id, f"{why}; the same command tries it again")
        self._busy = False
        return found

    def end(self) -> None:
        """Let a process that has nothing to do end by itself, which closes what it has open, and stop one that is at work."""
        self.pipe.close()
        if not self._busy:
            self._process.join(timeout=20)
        self._process.terminate()
        self._process.join()


def _surroundings(processes: int) -> list[dict[str, str]]:
    """The environment variables of each process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // max(1, processes)))
    gpus = _gpus()
    each = [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {} for place in range(processes)]
    return [{"OMP_NUM_THREADS": threads, **one} for one in each]


def _gpus() -> list[str]:
    """The GPUs that may be used, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip()]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]


def _serve(pipe: Connection, work: Callable[[Any], Outcome], surroundings: dict[str, str]) -> None:
    """What a process does: jobs as they come, until there are no more."""
    os.environ.update(surroundings)  # before anything reads them: work that loads torch does so when it is called
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which then ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(work(pipe.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


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
