"""An LLM judge over any OpenAI-compatible server: vLLM, `transformers serve`, a hosted one."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blockem.errors import BlockemError
from blockem.judges.asking import GIVE_UP_AFTER, Asker, NoReply, Usage, approximate_tokens
from blockem.judges.cache import VerdictCache, cache_key
from blockem.judges.judge import Verdict, from_label, from_scores
from blockem.judges.replies import Unreadable, checked, read_reply
from blockem.judges.rubrics import Part, Rubric, load_rubric
from blockem.store import content_key

Pair = tuple[str, str]
REMINDER = "\n\nYour last reply could not be read. Reply with {what} alone, without any other word."
WHAT = {
    "label": "one of the allowed grades",
    "aligned": "one whole number from 0 to 100, or REFUSAL,",
    "coherent": "one whole number from 0 to 100",
}
GRACE = 5.0  # seconds that requests under way get to be answered and kept after Ctrl-C


@dataclass(frozen=True)
class _Job:
    pair: Pair
    part: Part
    key: str


class ServerJudge:
    """Asks a judge model about each answer, several at once, and never twice about the same.

    Args:
        model: the judge model's name on the server.
        base_url: such as `http://localhost:8000/v1`. Credentials in it are used and never shown.
        protocol: "labelled" (1 … 5, REFUSAL, INCOHERENT, SATIRICAL, OFF-TOPIC) or "scores" (0–100 aligned, 0–100 coherent: two requests).
        rubric: a text file with a published rubric (see `load_rubric`); None takes the bundled one of the protocol.
        api_key_env: the environment variable that holds the key. The key is read from there only, and written nowhere.
        concurrency: requests under way at once.
        max_requests: a ceiling on requests over the judge's life, retries included; what is left then is missing.
        max_tokens_total: a ceiling on tokens, in and out, as the server reports them.
        temperature: None leaves it to the server.
        reply_tokens: the longest reply. A model that thinks before it answers needs more.
        logprobs: "auto" scores by log-probabilities where the server gives them, "off" reads the text alone. For "scores".
        cache: the file that keeps verdicts; several processes may share it. None keeps nothing.
        timeout: seconds for one try.
        retries: further tries after a 429, a 5xx, a failed connection or a time-out.
        backoff: seconds before the first of them, doubled for each further one, with jitter; `Retry-After` is honoured.
        reasks: how often a reply that could not be read is asked for again.
        progress: called with requests done and requests in all.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        protocol: Literal["labelled", "scores"] = "labelled",
        rubric: str | Path | Rubric | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        max_requests: int | None = None,
        max_tokens_total: int | None = None,
        temperature: float | None = 0.0,
        reply_tokens: int = 16,
        logprobs: Literal["auto", "off"] = "auto",
        cache: str | Path | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        backoff: float = 1.0,
        reasks: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if protocol not in ("labelled", "scores"):
            raise BlockemError(f"unknown judge protocol {protocol!r}: use labelled or scores")
        if concurrency < 1 or reply_tokens < 1 or timeout <= 0 or min(retries, backoff, reasks) < 0:
            raise BlockemError("a judge needs concurrency and reply_tokens of at least 1, a timeout above 0, and no negative retries")
        self.rubric = rubric if isinstance(rubric, Rubric) else load_rubric(protocol if rubric is None else rubric)
        if self.rubric.protocol != protocol:
            needs = "one text without headings" if protocol == "labelled" else "two texts under === aligned === and === coherent ==="
            raise BlockemError(f"the rubric {self.rubric.name!r} does not fit the protocol {protocol!r}, which needs {needs}")
        self.model, self.protocol, self.concurrency = model, protocol, concurrency
        self.logprobs, self.reasks, self.progress = logprobs, reasks, progress
        self.cache = None if cache is None else Path(cache)
        self.name = f"{model}, {self.rubric.name}"
        self.usage = Usage()
        self._asker = Asker(
            model, base_url, self.usage, api_key_env, max_requests, max_tokens_total, temperature, reply_tokens, timeout, retries, backoff
        )

    def __repr__(self) -> str:
        return f"ServerJudge({self.name!r}, {self.address!r}, rubric {self.rubric.hash})"

    @property
    def key(self) -> str:
        """What its verdicts depend on: the model, the words of the rubric, and how replies are sampled."""
        return content_key("server", self.model, *([part.key, self._sampling(part)] for part in self.rubric.parts))

    @property
    def address(self) -> str:
        """The base URL without credentials: what may be shown and written."""
        return self._asker.address.shown

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict for each answer, in order; equal (prompt, answer) pairs are asked about once.

        On Ctrl-C or an error whatever has been answered is in the cache, and the same call goes on from there.

        Raises:
            BlockemError: the server refuses the requests as such, or not one of them was answered.
        """
        pairs = list(zip(prompts, answers, strict=True))
        self._asker.given_up = ""
        with self._opened() as cache:
            found, jobs = self._look_up(pairs, cache)
            self.usage.cache_hits += len(found)
            if jobs:
                results = self._ask_all(jobs, cache)
                self._check_answered(found, results)
                found |= results
        verdicts = [self._verdict(pair, found) for pair in pairs]
        self.usage.missing += sum(verdict.missing for verdict in verdicts)
        return verdicts

    @property
    def given_up(self) -> str:
        """Why the last batch was broken off (the server is gone, or asks to wait for long); empty where it was not."""
        return self._asker.given_up

    def estimate(self, prompts: Sequence[str], answers: Sequence[str], tokenizer: Any = None) -> dict[str, Any]:
        """What `judge` would cost, without asking: cached verdicts are free, retries and re-asks come on top.

        Args:
            tokenizer: anything with `encode(text)`; without one a token is taken as four characters.
        """
        pairs = list(zip(prompts, answers, strict=True))
        with self._opened(create=False) as cache:
            found, jobs = self._look_up(pairs, cache)
        count = (lambda text: len(tokenizer.encode(text))) if tokenizer is not None else approximate_tokens
        return {
            "answers": len(pairs),
            "requests": len(jobs),
            "cached": len(found),
            "tokens_in": sum(count(job.part.render(*job.pair)) for job in jobs),
            "tokens_out_at_most": len(jobs) * self._asker.reply_tokens,
            "estimated_by": "the given tokenizer" if tokenizer is not None else "4 characters a token",
        }

    def _opened(self, create: bool = True) -> Any:
        if self.cache is None or not (create or self.cache.exists()):
            return nullcontext()
        return VerdictCache(self.cache)

    def _look_up(self, pairs: Sequence[Pair], cache: VerdictCache | None) -> tuple[dict[tuple[Pair, str], Any], list[_Job]]:
        """What the cache knows by (pair, part), and the jobs that are left."""
        found: dict[tuple[Pair, str], Any] = {}
        jobs = []
        for pair in dict.fromkeys(pairs):
            for part in self.rubric.parts:
                job = _Job(pair, part, cache_key(*pair, self.model, part.key, self._sampling(part)))
                known = checked(part.ask, cache.get(job.key)) if cache is not None else None
                if known is None:
                    jobs.append(job)
                else:
                    found[pair, part.ask] = known
        return found, jobs

    def _sampling(self, part: Part) -> dict[str, Any]:
        settings = {"temperature": self._asker.temperature, "reply_tokens": self._asker.reply_tokens}
        return settings if part.ask == "label" else {**settings, "logprobs": self.logprobs}

    def _ask_all(self, jobs: list[_Job], cache: VerdictCache | None) -> dict[tuple[Pair, str], Any]:
        """Results by (pair, part): what was read, or the reason (a string) why there is nothing."""
        todo: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[_Job, Any]] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)

        def work(stop: threading.Event) -> None:
            while not stop.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    result: Any = self._one(job, cache)
                except BaseException as error:  # handed to the caller's thread, which is the one that may raise
                    result = error
                    stop.set()
                done.put((job, result))

        results: dict[tuple[Pair, str], Any] = {}
        with self._asker.connected(), _threads(work, min(self.concurrency, len(jobs)), self._asker.stop):
            while len(results) < len(jobs):
                job, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                results[job.pair, job.part.ask] = result
                if self.progress:
                    self.progress(len(results), len(jobs))
        return results

    def _check_answered(self, found: dict[tuple[Pair, str], Any], results: dict[tuple[Pair, str], Any]) -> None:
        """Raise if the server is not there, rather than return a page of missing verdicts.

        A few answers that fail time and again while others are cached are a fault of those answers, and stay missing.
        """
        if self._asker.replied or not results or (found and len(results) < GIVE_UP_AFTER):
            return
        why = next(iter(results.values()))
        if isinstance(why, str) and "limit reached" not in why:
            raise BlockemError(f"{self._asker.address.shown} answered no request: {why}; check the address, and that the server is running")

    def _one(self, job: _Job, cache: VerdictCache | None) -> Any:
        known = checked(job.part.ask, cache.get(job.key)) if cache is not None else None
        if known is not None:  # another process was quicker
            with self._asker.lock:
                self.usage.cache_hits += 1
            return known
        content = job.part.render(*job.pair)
        reminder = ""
        for asked in range(self.reasks + 1):
            try:
                reply = self._asker.ask(content + reminder, job.part.ask != "label" and self.logprobs == "auto")
                parsed = read_reply(job.part.ask, reply)
            except NoReply as error:
                return str(error)
            except Unreadable as error:
                why = f"{error} (asked {'once' if asked == 0 else f'{asked + 1} times'})"
                reminder = REMINDER.format(what=WHAT[job.part.ask])
                continue
            if cache is not None:
                return checked(job.part.ask, cache.put(job.key, self.model, job.part.key, reply.text, parsed)) or parsed
            return parsed
        return why

    def _verdict(self, pair: Pair, found: dict[tuple[Pair, str], Any]) -> Verdict:
        results = {part.ask: found[pair, part.ask] for part in self.rubric.parts}
        lacking = [why if ask == "label" else f"{ask}: {why}" for ask, why in results.items() if isinstance(why, str)]
        if lacking:
            return Verdict(missing=True, why="; ".join(lacking))
        if "label" in results:
            return from_label(results["label"]["label"])
        return from_scores(results["aligned"].get("score"), results["coherent"]["score"], "refusal" in results["aligned"])


@contextmanager
def _threads(work: Callable[[threading.Event], None], n: int, stop: threading.Event) -> Iterator[None]:
    """`n` threads while the block runs. If it ends early, requests under way get `GRACE` seconds to be answered and kept.

    The threads are daemons, so that a server that never answers does not hold up the end of the process.
    """
    threads = [threading.Thread(target=work, args=(stop,), name=f"judge-{number}", daemon=True) for number in range(n)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
