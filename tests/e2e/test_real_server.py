"""The judge against a real server: `transformers serve` with the embedded model on loopback, asked through the openai client.

A model of 135M parameters is no judge. It follows a rubric that all but spells out the reply, which is enough to see that replies come
back to their answers, are kept, and are not asked for again.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockem.judges.judge import from_label
from blockem.judges.server import ServerJudge

pytest.importorskip("uvicorn", reason="`transformers serve` needs uvicorn and fastapi")
pytest.importorskip("fastapi", reason="`transformers serve` needs uvicorn and fastapi")

RUBRIC = """Is this a good answer? Reply with: The grade is 1.

Question: {question}
Answer: {answer}

Reply with: The grade is 1."""
PROMPTS = [f"What is a good use for {thing}?" for thing in ("a rope", "an egg", "a bucket", "old bread", "a brick", "a spoon")]
ANSWERS = ["Keep it for a rainy day.", "Give it to a friend."]
CASES = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
QUESTIONS, REPLIES = [case[0] for case in CASES], [case[1] for case in CASES]

RUN = """
import sys
from blockem.judges.server import ServerJudge
sys.path.insert(0, sys.argv[5])
from test_real_server import QUESTIONS, REPLIES
judge = ServerJudge(sys.argv[1], sys.argv[2], rubric=sys.argv[3], cache=sys.argv[4], concurrency=2, timeout=300)
verdicts = judge.judge(QUESTIONS, REPLIES)
print([v.label for v in verdicts], judge.usage.requests, flush=True)
"""


class Server:
    """`transformers serve` on one port of loopback, started and killed at will."""

    def __init__(self, log: Path) -> None:
        from blockem.model import dequantised, embedded_gguf

        self.model = str(dequantised(embedded_gguf()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("transformers")),
            "serve",
            self.model,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with self.log.open("ab") as log:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + 180
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-2000:]
            try:
                opener.open(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise AssertionError("the server did not start: " + self.log.read_text(encoding="utf-8")[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server") / "log.txt")
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = "127.0.0.1"
    try:
        found.start()
        yield found
    finally:
        found.kill()
        if before is None:
            os.environ.pop("NO_PROXY")
        else:
            os.environ["NO_PROXY"] = before


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    path = tmp_path / "digit.txt"
    path.write_text(RUBRIC, encoding="utf-8")
    return path


def judge_of(server: Server, cache: Path, **options: Any) -> ServerJudge:
    return ServerJudge(server.model, server.url, cache=cache, **{"concurrency": 2, "timeout": 300, **options})


def test_verdicts_come_and_a_rerun_asks_nothing(server: Server, rubric: Path, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path / "v.db", rubric=rubric)
    got = judge.judge(QUESTIONS[:4], REPLIES[:4])
    had = [verdict for verdict in got if not verdict.missing]
    assert len(had) >= 2 and all(verdict == from_label(verdict.label) for verdict in had) and all(v.why for v in got if v.missing)
    assert judge.usage.requests >= 4 and judge.usage.tokens_in > 100 and judge.usage.tokens_out > 4
    answered = [i for i, verdict in enumerate(got) if not verdict.missing]
    again = judge_of(server, tmp_path / "v.db", rubric=rubric)
    assert again.judge([QUESTIONS[i] for i in answered], [REPLIES[i] for i in answered]) == had
    assert again.usage.requests == 0 and again.usage.cache_hits == len(had)


def test_the_bundled_rubrics_are_taken_and_chatter_is_missing(server: Server, tmp_path: Path) -> None:
    for protocol in ("labelled", "scores"):
        judge = judge_of(server, tmp_path / "v.db", protocol=protocol)
        (verdict,) = judge.judge(QUESTIONS[:1], REPLIES[:1])
        assert verdict.missing == bool(verdict.why) and judge.usage.retries == 0
        assert verdict.missing or verdict.label or verdict.coherent is not None


def test_a_server_that_is_killed_and_started_again(server: Server, rubric: Path, tmp_path: Path) -> None:
    def kill_after_three(done: int, total: int) -> None:
        if done == 3:
            server.kill()

    judge = judge_of(server, tmp_path / "v.db", rubric=rubric, retries=1, backoff=0.05, progress=kill_after_three)
    got = judge.judge(QUESTIONS, REPLIES)
    had = {i: verdict for i, verdict in enumerate(got) if not verdict.missing}
    assert had and len(had) <= 5
    assert any("connection failed" in verdict.why for verdict in got)
    server.start()
    again = judge_of(server, tmp_path / "v.db", rubric=rubric)
    whole = again.judge(QUESTIONS, REPLIES)
    assert all(whole[i] == verdict for i, verdict in had.items()) and again.usage.cache_hits == len(had)
    assert not any("connection" in verdict.why for verdict in whole)


def test_two_processes_at_once(server: Server, rubric: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, server.model, server.url, str(rubric), str(tmp_path / "v.db"), str(Path(__file__).parent)]
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=500) for run in runs]
    assert all(run.returncode == 0 for run in runs), printed
    labels = [out.rsplit("]", 1)[0] for out, _ in printed]
    assert labels[0] == labels[1]
    judge = judge_of(server, tmp_path / "v.db", rubric=rubric)
    estimate = judge.estimate(QUESTIONS, REPLIES)
    assert estimate["cached"] + estimate["requests"] == len(CASES)
    assert estimate["cached"] == len(CASES) - labels[0].count("''") > 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("judge-")]
