"""The judge over a server under faults: no verdict wrong, doubled or lost, and nothing asked twice."""

from __future__ import annotations

import email.utils
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_server import FAULTS, TRANSPORT, FaultServer, differing, labelled, serving

from blockem.errors import BlockemError
from blockem.judges.asking import retry_after
from blockem.judges.judge import Verdict, from_label, from_scores
from blockem.judges.server import ServerJudge

KEY = "sk-very-secret-0123456789"
QUICK: dict[str, Any] = {"backoff": 0.002, "timeout": 5, "api_key_env": "TEST_JUDGE_KEY"}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)


def once(fault: str, *texts: str) -> Callable[[int, str], str]:
    """A script: the first request about each of these texts fails."""
    left = list(texts)

    def script(number: int, content: str) -> str:
        for text in left:
            if text in content:
                left.remove(text)
                return fault
        return ""

    return script


# faults


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_once_is_mended(fault: str, tmp_path: Path) -> None:
    prompts, answers, right = labelled(9)
    with serving(once(fault, "answer 0 ", "answer 4 "), slow=0.3) as server:
        options = {**QUICK, "timeout": 0.15 if fault == "slow" else 5}
        judge = ServerJudge("m", server.url, cache=tmp_path / "v.db", **options)
        assert judge.judge(prompts, answers) == right
        assert len(server.seen) == 11 == judge.usage.requests
        assert judge.usage.retries == (2 if fault in TRANSPORT else 0)
        assert ServerJudge("m", server.url, cache=tmp_path / "v.db", **QUICK).judge(prompts, answers) == right and len(server.seen) == 11


@pytest.mark.parametrize("fault", FAULTS[7:])
def test_an_unreadable_reply_is_asked_again_once_and_then_missing(fault: str, tmp_path: Path) -> None:
    with serving(lambda _, content: fault if "poison" in content else "") as server:
        judge = ServerJudge("m", server.url, cache=tmp_path / "v.db", reasks=1, **QUICK)
        got = judge.judge(["q", "q"], ["poison want=4", "want=1"])
        assert got[0].missing and got[0] == Verdict(missing=True, why=got[0].why) and "asked 2 times" in got[0].why
        assert got[1] == from_label("1") and len(server.seen) == 3 and judge.usage.missing == 1
        server.script = lambda *_: ""  # a failed verdict is not kept: the next run asks again, that one alone
        assert judge.judge(["q", "q"], ["poison want=4", "want=1"]) == [from_label("4"), from_label("1")]
        assert len(server.seen) == 4


def test_many_faults_at_random(tmp_path: Path) -> None:
    """Three in ten requests fail in every way there is; nothing is wrong, doubled or lost, and reruns ask for what is missing alone."""
    prompts, answers, right = labelled(180)
    dice = random.Random(0)
    with serving(lambda *_: dice.choice(FAULTS) if dice.random() < 0.3 else "", slow=0.01) as server:
        missing = len(right)
        for _ in range(4):
            before = len(server.seen)
            judge = ServerJudge("m", server.url, cache=tmp_path / "v.db", **QUICK)
            got = judge.judge(prompts, answers)
            assert len(got) == 180 and not differing(got, right)
            assert judge.usage.requests == len(server.seen) - before
            assert judge.usage.cache_hits == 180 - missing
            missing = judge.usage.missing
            assert missing == sum(v.missing for v in got) and all(v.why for v in got if v.missing)
        assert missing == 0
    with sqlite3.connect(tmp_path / "v.db") as database:
        assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (180,)
    database.close()


def test_faults_under_scores_never_mix_the_two_numbers() -> None:
    pairs = [(i % 101, (i * 37) % 101) for i in range(60)]
    dice = random.Random(1)
    with serving(lambda *_: dice.choice(FAULTS) if dice.random() < 0.3 else "", slow=0.01) as server:
        got = ServerJudge("m", server.url, "scores", reasks=4, **QUICK).judge(["q"] * 60, [f"want={a}/{c} {a}.{c}" for a, c in pairs])
        assert not differing(got, [from_scores(a, c) for a, c in pairs]) and sum(v.missing for v in got) <= 2


def test_retry_after_is_honoured() -> None:
    with serving(lambda n, _: "429" if n == 0 else "") as server:
        server.retry_after = "0.4"
        began = time.monotonic()
        assert ServerJudge("m", server.url, concurrency=1, **QUICK).judge(["q"], ["want=2"]) == [from_label("2")]
        assert time.monotonic() - began >= 0.39


def test_retry_after_is_seconds_or_a_date() -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    got = [retry_after({"retry-after": value}) for value in ("7", date, "-1", "nan", "soon")]
    assert got == [7, pytest.approx(100, abs=5), 0, None, None] and retry_after({}) is None


def test_a_server_that_asks_for_an_hour_is_given_up() -> None:
    with serving(lambda n, _: "429" if n > 2 else "") as server:
        server.retry_after = "3600"
        prompts, answers, right = labelled(9)
        got = ServerJudge("m", server.url, concurrency=1, **QUICK).judge(prompts, answers)
        assert got[:3] == right[:3] and all(v.missing and "asks to wait 1:00:00" in v.why for v in got[3:]) and len(server.seen) == 4


def test_an_answer_that_always_breaks_the_server_is_missing_alone() -> None:
    prompts, answers, right = labelled(20)
    answers[7] += " poison"
    with serving(lambda _, content: "500" if "poison" in content else "") as server:
        got = ServerJudge("m", server.url, retries=2, **QUICK).judge(prompts, answers)
        assert got[7] == Verdict(missing=True, why="the server answered 500 (3 tries)") and got[:7] + got[8:] == right[:7] + right[8:]


def test_a_server_that_dies_leaves_the_rest_missing_soon(tmp_path: Path) -> None:
    prompts, answers, right = labelled(60)
    with serving(lambda n, _: "drop" if n >= 20 else "") as server:
        options = {**QUICK, "retries": 1, "concurrency": 2, "cache": tmp_path / "v.db"}
        judge = ServerJudge("m", server.url, **options)
        got = judge.judge(prompts, answers)
        assert sum(not v.missing for v in got) == 20 and not differing(got, right) and len(server.seen) < 40
        assert "failures in a row" in judge.given_up
        known = [i for i, v in enumerate(got) if not v.missing]
        assert not any(v.missing for v in judge.judge([prompts[i] for i in known], [answers[i] for i in known])) and judge.given_up == ""
        with pytest.raises(BlockemError, match=r"answered no request: .*the connection failed.*check the address"):
            ServerJudge("m", server.url, **options).judge(prompts, answers)
        server.script = lambda *_: ""
        before = len(server.seen)
        assert ServerJudge("m", server.url, **options).judge(prompts, answers) == right and len(server.seen) - before == 40


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(BlockemError, match=r"http://127\.0\.0\.1:9/v1 answered no request: the connection failed"):
        ServerJudge("m", "http://127.0.0.1:9/v1", retries=1, **QUICK).judge(["q"], ["a"])


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"error": {"message": f"bad key {KEY}"}}, r"refused the API key \(401: bad key \*\*\*\); set .*TEST_JUDGE_KEY"),
        (403, {"error": {"message": "no"}}, "refused the API key"),
        (404, {"detail": "Not Found"}, r"does not know 'm' \(404: Not Found\); check"),
        (400, {"error": {"message": "bad temperature"}}, r"refused the request \(400: bad temperature\)"),
        (422, {"error": "odd"}, r"refused the request \(422: odd\)"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "no quota left"),
    ],
)
def test_a_refused_request_stops_at_once(status: int, body: dict[str, Any], says: str) -> None:
    prompts, answers, _ = labelled(50)
    with serving(lambda *_: str(status)) as server:
        server.status_body = body
        with pytest.raises(BlockemError, match=says) as raised:
            ServerJudge("m", server.url, concurrency=2, **QUICK).judge(prompts, answers)
        assert len(server.seen) <= 2 and raised.value.__context__ is None


@pytest.mark.parametrize(
    "said", [{"code": "context_length_exceeded"}, {"message": "exceeds the maximum context length"}, {"code": "content_filter"}]
)
def test_a_text_that_the_server_cannot_take_is_missing_alone(said: dict[str, str]) -> None:
    with serving(lambda _, content: "400" if "poison" in content else "") as server:
        server.status_body = {"error": {"message": "no", **said}}
        got = ServerJudge("m", server.url, **QUICK).judge(["q", "q"], ["want=4 poison", "want=4"])
        assert got[0].missing and got[1] == from_label("4")


# interruptions and several processes

RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with Ctrl-C ignored
from blockem.judges.server import ServerJudge
judge = ServerJudge("m", sys.argv[1], cache=sys.argv[2], concurrency=4, backoff=0.002, api_key_env="TEST_JUDGE_KEY")
n = int(sys.argv[3])
labels = ["1", "2", "3", "4", "5"]
got = judge.judge([f"q{i}" for i in range(n)], [f"{i} want={labels[i % 5]}" for i in range(n)])
print([v.label for v in got] == [labels[i % 5] for i in range(n)], judge.usage.requests, flush=True)
"""


def process(server: FaultServer, cache: Path, n: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, server.url, str(cache), str(n)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_what_was_answered(tmp_path: Path, how: signal.Signals) -> None:
    with serving(lambda *_: "slow", slow=0.03) as server:
        run = process(server, tmp_path / "v.db", 80)
        while len(server.seen) < 12:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.send_signal(how)
        run.communicate(timeout=120)
        assert run.returncode != 0
        asked = len(server.seen)
        assert asked < 70
        server.slow = 0
        again = process(server, tmp_path / "v.db", 80)
        printed, errors = again.communicate(timeout=120)
        assert printed.startswith("True"), errors
        twice = [content for content, times in Counter(server.contents).items() if times > 1]
        assert len(twice) <= (0 if how == signal.SIGINT else 4)  # a kill loses what was under way, at most


def test_several_processes_on_one_cache(tmp_path: Path) -> None:
    dice = random.Random(2)
    with serving(lambda *_: dice.choice(TRANSPORT) if dice.random() < 0.2 else "", slow=0.01) as server:
        runs = [process(server, tmp_path / "v.db", 60) for _ in range(2)]
        outputs = [run.communicate(timeout=120) for run in runs]
        assert all(out.startswith("True") for out, _ in outputs), outputs
        before = len(server.seen)
        assert process(server, tmp_path / "v.db", 60).communicate(timeout=120)[0] == "True 0\n" and len(server.seen) == before
    with sqlite3.connect(tmp_path / "v.db") as database:
        assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (60,)
    database.close()


def test_an_error_in_the_progress_line_ends_the_threads() -> None:
    def broken(done: int, total: int) -> None:
        raise ZeroDivisionError

    prompts, answers, _ = labelled(50)
    with serving() as server:
        with pytest.raises(ZeroDivisionError):
            ServerJudge("m", server.url, progress=broken, concurrency=2, **QUICK).judge(prompts, answers)
        assert len(server.seen) < 50 and not [t for t in threading.enumerate() if t.name.startswith("judge-")]
