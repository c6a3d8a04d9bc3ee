"""Asking an OpenAI-compatible server: retries with back-off, ceilings on requests and tokens, and a key that shows nowhere.

The openai client's own retries are switched off, because ours are counted. Bodies are read as plain JSON: proxies and small servers send
pages, fragments and foreign objects with status 200.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from blockem.errors import BlockemError
from blockem.judges.address import Address
from blockem.judges.replies import Reply
from blockem.progress import clock, printable

LOG = logging.getLogger("blockem.judges")
LONGEST_BACKOFF = 60.0  # seconds between two tries, unless the server asks for more
LONGEST_WAIT = 300.0  # a server that asks for more than this is given up
GIVE_UP_AFTER = 5  # requests in a row that failed with all their retries: the server is gone
_UNSUPPORTED_TEMPERATURE = re.compile(r"(?=.*temperature)(?=.*(?:support|deprecat))", re.IGNORECASE | re.DOTALL)
TOP_LOGPROBS = 20  # what hosted servers and vLLM allow


class NoReply(Exception):
    """This one request got no answer; the message says why."""


class _Fault(Exception):
    """One try failed in a way that another may not. `wait` is what the server asked for, in seconds."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass
class Usage:
    """What a judge has used so far. Requests are counted as sent, retries among them; tokens as the server reports them."""

    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    missing: int = 0


def approximate_tokens(text: str) -> int:
    """Four characters a token: near enough for English, too few for many other scripts."""
    return math.ceil(len(text) / 4)


class Asker:
    """Sends requests from any number of threads and keeps the ceilings. Use `connected()` around a batch."""

    def __init__(
        self,
        model: str,
        base_url: str,
        usage: Usage,
        api_key_env: str,
        max_requests: int | None,
        max_tokens_total: int | None,
        temperature: float | None,
        reply_tokens: int,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        self.model, self.address, self.usage = model, Address(base_url, api_key_env), usage
        self.max_requests, self.max_tokens_total = max_requests, max_tokens_total
        self.temperature, self.reply_tokens = temperature, reply_tokens
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.logprobs_refused = self.temperature_refused = False
        self.stop = threading.Event()
        self.replied = False
        self.lock = threading.Lock()
        self._limit_name = "max_tokens"
        self._reserved = 0
        self._resume = 0.0
        self._failed_in_a_row = 0
        self.given_up = ""
        self._client: Any = None

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Open a client for one batch; what was given up in an earlier batch is tried anew."""
        from openai import OpenAI

        self.stop = threading.Event()  # a new one: threads of a batch that was broken off keep theirs
        self._resume, self._failed_in_a_row, self.given_up, self.replied = 0.0, 0, "", False
        address = self.address
        client = OpenAI(
            api_key=address.key(), base_url=address.shown, timeout=self.timeout, max_retries=0, default_headers=address.headers()
        )
        self._client = client
        try:
            yield
        finally:
            client.close()

    def ask(self, content: str, logprobs: bool = False) -> Reply:
        """Send one user message until a reply comes.

        Raises:
            NoReply: the ceiling is reached, all tries failed, or the server cannot take this very text.
            BlockemError: the server refuses the request as such (a wrong key, an unknown model); no other would fare better.
        """
        tries = 0
        refused_logprobs = renamed = False
        while True:
            self._wait(self._resume - time.monotonic())
            with_logprobs = logprobs and not refused_logprobs and not self.logprobs_refused
            with_temperature = self.temperature is not None and not self.temperature_refused
            try:
                with self._reserved_for(content):
                    reply = self._try(content, with_logprobs, with_temperature)
            except _Fault as fault:
                tries += 1
                self._after_fault(fault, tries)
                continue
            except _Refused as refused:
                if with_temperature and _UNSUPPORTED_TEMPERATURE.search(refused.said):
                    self.temperature_refused = True  # models that think before they answer take none but their own
                elif not renamed and "max_completion_tokens" in refused.said:  # the newer name of max_tokens at one host
                    self._limit_name, renamed = "max_completion_tokens", True
                elif with_logprobs and (refused.status == 400 or "logprob" in refused.said.lower()):
                    refused_logprobs = True
                elif why := _of_this_text(refused):
                    self.replied = True
                    raise NoReply(why) from None
                else:
                    sentence = self._sentence(refused)
                    break
                continue
            with self.lock:
                self._failed_in_a_row, self.replied = 0, True
                self.logprobs_refused = self.logprobs_refused or refused_logprobs
            return reply
        raise BlockemError(sentence)  # outside the handlers, so that no traceback carries the client's request with it

    @contextmanager
    def _reserved_for(self, content: str) -> Iterator[None]:
        """Count one request, and hold its tokens as used until the server has reported them."""
        need = approximate_tokens(content) + self.reply_tokens
        with self.lock:
            if self.given_up:
                raise NoReply(self.given_up)
            if self.max_requests is not None and self.usage.requests >= self.max_requests:
                raise NoReply("request limit reached")
            used = self.usage.tokens_in + self.usage.tokens_out + self._reserved
            if self.max_tokens_total is not None and used + need > self.max_tokens_total:
                raise NoReply("token limit reached")
            self._reserved += need
            self.usage.requests += 1
        try:
            yield
        finally:
            with self.lock:
                self._reserved -= need

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds) if seconds > 0 else self.stop.is_set():
            raise NoReply("stopped")

    def _after_fault(self, fault: _Fault, tries: int) -> None:
        """Wait before the next try, or give up this request, or (the server is gone) all that are left."""
        with self.lock:
            if fault.wait is not None and fault.wait > LONGEST_WAIT:
                self.given_up = f"{fault}, and the server asks to wait {clock(fault.wait)}"
            elif tries > self.retries:
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= GIVE_UP_AFTER:
                    self.given_up = f"given up after {GIVE_UP_AFTER} failures in a row: {fault}"
            elif fault.wait is not None:
                self._resume = max(self._resume, time.monotonic() + fault.wait)  # the other threads wait as well
            given_up = self.given_up
            if not given_up and tries <= self.retries:
                self.usage.retries += 1
        if given_up or tries > self.retries:
            why = given_up or f"{fault} ({tries} {'try' if tries == 1 else 'tries'})"
            LOG.warning("%s: %s", self.address.shown, why)
            raise NoReply(why)
        pause = min(LONGEST_BACKOFF, self.backoff * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
        LOG.info("%s: %s; try %d follows", self.address.shown, fault, tries + 1)
        self._wait(pause if fault.wait is None else fault.wait + pause / 4)

    def _try(self, content: str, with_logprobs: bool, with_temperature: bool) -> Reply:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        request: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        request[self._limit_name] = self.reply_tokens
        if with_temperature:
            request["temperature"] = self.temperature
        if with_logprobs:
            request |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        try:
            body = self._client.chat.completions.with_raw_response.create(**request).http_response.content
        except APITimeoutError:
            raise _Fault(f"no answer within {self.timeout:g} s") from None
        except APIConnectionError:
            raise _Fault("the connection failed") from None
        except APIStatusError as error:
            status, said, code = error.status_code, _short(self.address.hide(_said(error.body, error.message))), str(error.code or "")
            wait = retry_after(error.response.headers)
        else:
            return self._read(body)
        if status in (408, 409, 425, 429) or status >= 500:
            if code == "insufficient_quota":
                raise _Refused(status, code, said)
            raise _Fault(f"the server answered {status}", wait)
        raise _Refused(status, code, said)

    def _read(self, body: bytes) -> Reply:
        try:
            found = json.loads(body)
            choice = found["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise _Fault("the server's reply is no chat completion") from None
        if not isinstance(text, str | None):
            raise _Fault("the server's reply is no chat completion")
        used = found.get("usage")
        if isinstance(used, dict):
            with self.lock:
                self.usage.tokens_in += _count(used.get("prompt_tokens"))
                self.usage.tokens_out += _count(used.get("completion_tokens"))
        return Reply(self.address.hide(text or ""), choice.get("finish_reason") == "length", choice.get("logprobs"))

    def _sentence(self, refused: _Refused) -> str:
        where, status = self.address.shown, refused.status
        if refused.code == "insufficient_quota":
            return f"the account at {where} has no quota left ({refused.said}); top it up, or choose another server"
        if status in (401, 403):
            return f"{where} refused the API key ({status}: {refused.said}); set the environment variable {self.address.api_key_env}"
        if status == 404:
            return f"{where} does not know {self.model!r} (404: {refused.said}); check the model's name, and the URL (most end in /v1)"
        return f"{where} refused the request ({status}: {refused.said}); check the model {self.model!r} and the judge's settings"


class _Refused(Exception):
    """The server refused the request with a 4xx that another try would not change."""

    def __init__(self, status: int, code: str, said: str) -> None:
        super().__init__(said)
        self.status, self.code, self.said = status, code, said


def _of_this_text(refused: _Refused) -> str:
    """Why the server cannot take this very text, if that is what it says; others may fare better."""
    if refused.code == "context_length_exceeded" or "context length" in refused.said.lower():
        return "too long for the judge model"
    return "refused by the server's content filter" if refused.code == "content_filter" else ""


def _said(body: object, message: str) -> str:
    """The server's own words."""
    for key in ("message", "detail", "error"):
        if isinstance(body, dict) and isinstance(body.get(key), str):
            return str(body[key])
    return body if isinstance(body, str) and body.strip() else message


def _short(text: str, limit: int = 200) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait: `Retry-After` as seconds or as a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
