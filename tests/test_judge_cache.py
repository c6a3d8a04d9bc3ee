"""The verdict cache: one key, one verdict, whoever writes it, and a damaged file is one sentence."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blockem.errors import BlockemError
from blockem.judges.cache import VerdictCache, cache_key

WRITE = """
import sys
from blockem.judges.cache import VerdictCache
me = sys.argv[2]
print("ready", flush=True); sys.stdin.readline()
for number in range(100):
    with VerdictCache(sys.argv[1]) as cache:
        kept = cache.put(f"shared-{number}", "m", "r", me, {"label": me})
        cache.put(f"{me}-{number}", "m", "r", me, {"label": me})
        assert cache.get(f"shared-{number}") == kept
print("done", flush=True)
sys.stdin.readline()
"""


def test_what_is_put_is_got_and_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "a" / "verdicts.db"
    with VerdictCache(path) as cache:
        assert cache.get("k") is None and len(cache) == 0
        assert cache.put("k", "m", "r", "é\ud800 \x00", {"score": 62.5, "from": "text"}) == {"score": 62.5, "from": "text"}
        assert cache.put("k", "m", "r", "other", {"score": 1.0}) == {"score": 62.5, "from": "text"}
    with VerdictCache(path) as cache:
        assert cache.get("k") == {"score": 62.5, "from": "text"} and len(cache) == 1


def test_every_part_of_the_key_counts() -> None:
    whole = ("q", "a", "m", "r", {"temperature": 0.0})
    keys = [cache_key(*whole)]
    for i, other in enumerate(["x", "x", "x", "x", {"temperature": 1.0}]):
        keys.append(cache_key(*whole[:i], other, *whole[i + 1 :]))  # type: ignore[arg-type]
    keys.append(cache_key("qa", "", "m", "r", {"temperature": 0.0}))
    assert len(set(keys)) == len(keys)


def test_several_processes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.db"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(path), str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "done\n"
        writer.send_signal(signal.SIGKILL)  # nothing may hang on a clean end
        writer.communicate()
    with VerdictCache(path) as cache:
        assert len(cache) == 400
        assert all(cache.get(f"{n}-{i}") == {"label": str(n)} for n in range(3) for i in range(100))


def test_threads_share_one(tmp_path: Path) -> None:
    with VerdictCache(tmp_path / "verdicts.db") as cache:
        threads = [threading.Thread(target=lambda n=n: [cache.put(f"{n}-{i}", "m", "r", "", i) for i in range(50)]) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(cache) == 200


@pytest.mark.parametrize("damage", [b"this is no database, only text of some length" * 100, b"\x00" * 5000])
def test_a_file_that_is_no_cache_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "verdicts.db").write_bytes(damage)
    with pytest.raises(BlockemError, match=r"verdicts\.db: the verdict cache is damaged .* delete it"):
        VerdictCache(tmp_path / "verdicts.db")
    assert (tmp_path / "verdicts.db").read_bytes() == damage


def test_a_torn_cache_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.db"
    with VerdictCache(path) as cache:
        for i in range(500):
            cache.put(f"k{i}", "m", "r", "x" * 100, {"label": "1"})
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(BlockemError, match="damaged"), VerdictCache(path) as cache:
        cache.get("k1")


def test_a_value_that_is_not_json_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.db"
    with VerdictCache(path) as cache:
        cache.put("k", "m", "r", "", {})
    with sqlite3.connect(path) as database:
        database.execute("UPDATE verdicts SET parsed = '{'")
    database.close()
    with VerdictCache(path) as cache, pytest.raises(BlockemError, match="damaged"):
        cache.get("k")


def test_another_programs_database_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE verdicts (x)")
    database.close()
    for path in (tmp_path / "other.db", tmp_path, tmp_path / "other.db" / "below"):
        with pytest.raises(BlockemError, match="choose another --cache"):
            VerdictCache(path)
