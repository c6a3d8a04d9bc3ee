"""Jobs one after the other and side by side, of which some fail or die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from blockem.errors import BlockemError
from blockem.executor import OneByOne, Outcome, SideBySide, attempt

HELD: list[Any] = []


@dataclass(frozen=True)
class Named:
    id: str
    place: str = ""


def jobs(*ids: str, place: str = "") -> list[Named]:
    return [Named(one, place) for one in ids]


def work(job: Named, seen: list[str] | None = None) -> Outcome:
    """Fails, dies or waits by its name; `seen` is what this process has done so far."""

    def inner() -> None:
        if job.id.startswith("sentence"):
            raise BlockemError("no such file")
        if job.id.startswith("bug"):
            raise RuntimeError("broken\nin two lines")
        if job.id.startswith("locks"):
            HELD.append(multiprocessing.RLock())  # as progress bars of other libraries do
        if job.id.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.place:
            here = Path(job.place)
            (here / job.id).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
            deadline = time.monotonic() + 60
            while job.id.startswith("meets") and len(list(here.glob("meets*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
            while job.id.startswith("long"):
                time.sleep(0.02)

    found = attempt(job.id, inner)
    if seen is None:
        return found
    seen.append(job.id)
    return Outcome(found.job, found.error, " ".join(seen))


def with_this_module() -> dict[str, str]:
    """The environment of a script that imports this file."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be buried."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_job_that_fails_stops_no_other() -> None:
    found = list(OneByOne().run(work, jobs("fine", "sentence", "bug", "fine again")))
    assert [one.error for one in found] == [None, "no such file", "RuntimeError: broken", None]
    assert "Traceback" in found[2].details and found[1].details == ""


def test_jobs_side_by_side_run_at_the_same_time_and_divide_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    found = list(SideBySide(2).run(work, jobs("meets-a", "meets-b", place=str(tmp_path))))
    assert sorted(one.job for one in found) == ["meets-a", "meets-b"] and all(one.error is None for one in found)
    said = [(tmp_path / name).read_text().split() for name in ("meets-a", "meets-b")]
    assert len({pid for pid, _, _ in said}) == 2 and {gpu for _, _, gpu in said} == {"4", "7"}
    assert {int(threads) for _, threads, _ in said} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_a_process_that_dies_fails_its_own_job_alone_and_another_takes_its_place() -> None:
    ids = ["a", "dies", "sentence", "b", "c", "bug", "dies too", "d"]
    found = {one.job: one.error for one in SideBySide(2).run(work, jobs(*ids))}
    assert list(sorted(found)) == sorted(ids)
    assert all(found[name] is None for name in "abcd")
    assert found["sentence"] == "no such file" and found["bug"] == "RuntimeError: broken"
    assert found["dies"] is not None and found["dies"].startswith("its process died (exit code -9, killed") and found["dies too"]


def test_a_process_keeps_what_it_has_loaded_from_job_to_job() -> None:
    found = list(SideBySide(1).run(partial(work, seen=[]), jobs("a", "b")))
    assert [one.details for one in found] == ["a", "a b"]
    with pytest.raises(BlockemError, match="0 jobs at a time"):
        SideBySide(0)


def test_a_process_that_is_done_closes_what_it_has_open() -> None:
    script = "from test_executor import jobs, work; from blockem.executor import SideBySide\n"
    script += "if __name__ == '__main__': print([one.error for one in SideBySide(2).run(work, jobs('locks', 'locks too'))])"
    found = subprocess.run([sys.executable, "-c", script], env=with_this_module(), capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == ("[None, None]", "")  # no "leaked semaphore objects"


def test_no_process_outlives_who_started_it(tmp_path: Path) -> None:
    script = "import signal, sys; from test_executor import jobs, work; from blockem.executor import SideBySide\n"
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job is started deaf to it
    script += "if __name__ == '__main__': list(SideBySide(2).run(work, jobs('long-a', 'long-b', place=sys.argv[1])))"
    for end in (signal.SIGKILL, signal.SIGINT):
        here = tmp_path / end.name
        here.mkdir()
        command = [sys.executable, "-c", script, str(here)]
        parent = subprocess.Popen(command, env=with_this_module(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (pids := [one.read_text().split()[:1] for one in here.glob("long*")]) or len(pids) < 2 or [] in pids:
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.02)
        parent.send_signal(end)
        parent.wait(timeout=60)
        while any(alive(int(pid)) for (pid,) in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_ctrl_c_stops_everything() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("a", interrupted)
