"""Verdicts kept on disk: one SQLite file that several processes may share. What is in it is never asked again.

Only replies that could be read are kept; a failed verdict is asked again by the next run. Each reply is written as it comes, in one
transaction, so that a killed run loses none. The file holds no address and no key.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockem.errors import BlockemError
from blockem.store import content_key

WAIT = 60.0  # seconds to wait for another process that is writing
TABLE = """CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, rubric TEXT NOT NULL, reply TEXT NOT NULL, parsed TEXT NOT NULL
) WITHOUT ROWID"""


def cache_key(prompt: str, answer: str, model: str, rubric: str, sampling: dict[str, Any]) -> str:
    """One key for one request: everything that its reply depends on."""
    return content_key(prompt, answer, model, rubric, sampling)


class VerdictCache:
    """An open cache file; use as a context manager.

    A connection must not be carried over a fork, so it is opened for one batch of verdicts and closed after it. Within a process the
    threads share it under a lock.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=WAIT, check_same_thread=False, isolation_level=None)
        try:
            with self._errors():
                self._set_up()
        except BaseException:
            self._db.close()
            raise

    def _set_up(self) -> None:
        # the switch to the write-ahead log does not wait for its turn as other statements do
        deadline = time.monotonic() + WAIT
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(TABLE)
        self._db.execute("SELECT key, model, rubric, reply, parsed FROM verdicts LIMIT 1").fetchone()

    def __enter__(self) -> VerdictCache:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._db.close()

    def get(self, key: str) -> Any | None:
        """The parsed result under `key`, or None."""
        with self._lock, self._errors():
            row = self._db.execute("SELECT parsed FROM verdicts WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])

    def put(self, key: str, model: str, rubric: str, reply: str, parsed: Any) -> Any:
        """Keep a reply and what was read from it, and return what is kept: the first of several processes wins, one key has one verdict."""
        row = (key, model, rubric, reply.encode("utf-8", "replace").decode(), json.dumps(parsed))
        with self._lock, self._errors():
            self._db.execute("INSERT INTO verdicts VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING", row)
            return json.loads(self._db.execute("SELECT parsed FROM verdicts WHERE key = ?", (key,)).fetchone()[0])

    def __len__(self) -> int:
        with self._lock, self._errors():
            return int(self._db.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BlockemError(f"{self.path}: the verdict cache cannot be opened ({error.strerror}); choose another --cache") from error
        except sqlite3.ProgrammingError:
            raise
        except sqlite3.OperationalError as error:
            said = str(error)
            if "full" in said:
                advice = "free some space and run the same command again"
            elif "locked" in said:
                advice = "another process has held it for a minute; stop that one or choose another --cache"
            else:
                advice = "choose another --cache"
            raise BlockemError(f"{self.path}: the verdict cache cannot be used ({said}); {advice}") from error
        except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
            raise BlockemError(
                f"{self.path}: the verdict cache is damaged ({error}); delete it, and its verdicts are asked again"
            ) from error
