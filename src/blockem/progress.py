"""Progress on stderr: what is being done, how far it is, and how long it will still take."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told (done, total) as work goes on."""


def clock(seconds: float) -> str:
    """12 s, 3:05, 1:02:03."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds_left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"


def printable(text: str) -> str:
    """`text` without control characters, for what models, servers and files say: a terminal obeys escape sequences.

    Blanks of any width stay: they do no harm, and some scripts write them between words.
    """
    return "".join(c for c in text if c in "\n\t" or c.isprintable() or unicodedata.category(c) == "Zs")


class Console:
    """One line a step, rewritten in place on a terminal, and every tenth of the way elsewhere.

    Args:
        quiet: print nothing.
        name: stands before every line, where several write at a time; none is then rewritten in place.
    """

    def __init__(self, quiet: bool = False, name: str = "") -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not name
        self.before = f"[{name}] " if name else ""
        self.label = ""
        self.began = time.monotonic()
        self._last = -1.0
        self._open = False

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            self.close()
            print(printable(self.before + text), file=sys.stderr, flush=True)

    def start(self, label: str) -> None:
        """Begin a piece of work that `bar` reports on."""
        self.close()
        self.label, self.began, self._last = label, time.monotonic(), -1.0

    def bar(self, done: int, total: int) -> None:
        """`done` of `total` units of the work that was started last."""
        if self.quiet or total <= 0:
            return
        spent = time.monotonic() - self.began
        share = done / total
        if not self.live and share < 1 and share - self._last < 0.1:
            return
        self._last = share
        left = f"{clock(spent / share - spent)} left" if 0 < share < 1 else clock(spent)
        line = printable(f"{self.before}  {self.label}  {done}/{total}  {share:4.0%}  {left}")
        if self.live:
            print(f"\r\033[K{line}", end="" if share < 1 else "\n", file=sys.stderr, flush=True)
            self._open = share < 1
        else:
            print(line, file=sys.stderr, flush=True)

    def stage(self, what: str, done: int, total: int) -> None:
        """`bar` for work in several pieces: another name begins another piece."""
        if what != self.label:
            self.start(what)
        self.bar(done, total)

    def close(self) -> None:
        """End an unfinished line."""
        if self._open and not self.quiet:
            print(file=sys.stderr, flush=True)
        self._open = False
