"""One conversation with an OpenAI-compatible endpoint: its pace, its patience, and a key that appears nowhere."""

import email.utils
import os
import random
import threading
import time
from typing import Any, NamedTuple

import httpx

from preference_tuning.config import JudgeConfig
from preference_tuning.errors import ConfigError, PreferenceTuningError

AGAIN = {408, 409, 425, 429}
"""Answers, beside those from 500 on, after which the same request may succeed."""
LONGEST_BACKOFF = 60.0
LONGEST_WAIT = 600.0
"""Seconds that a server may ask to be left alone; a longer pause is for whoever started the run."""


class Reply(NamedTuple):
    """What the judge wrote, and what it cost in tokens; None where the server does not say."""

    text: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class StoppedError(Exception):
    """Another request failed for good, and this one is no longer wanted."""


def key_of(config: JudgeConfig) -> str | None:
    """Return the key that the environment holds for the judge, or None: a server of one's own may need none."""
    return os.environ.get(config.api_key_env) or None


def check(config: JudgeConfig) -> str:
    """Return which judge will be asked, in a line, and whether there is a key for it."""
    if config.api_key_secret:
        key = "key in a ZenML secret"
    else:
        key = f"key in {config.api_key_env}" if key_of(config) else f"no key, {config.api_key_env} is not set"
    return f"judge {config.model} at {config.url}, {key}"


class Pace:
    """At most so many requests a minute, over all threads, evenly spread."""

    def __init__(self, per_minute: float) -> None:
        self._interval = 60 / per_minute
        self._next = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def wait(self) -> None:
        """Return when it is this request's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        self.sleep(turn - now)

    def hold(self, seconds: float) -> None:
        """Let nobody's turn come before so many seconds have passed."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Return after so many seconds.

        Raises:
            StoppedError: everybody was told to stop.
        """
        if self._stopped.wait(max(0.0, seconds)):
            raise StoppedError

    def stop(self) -> None:
        """Wake all who wait, and let nobody begin."""
        self._stopped.set()


class Client:
    """Asks the judge. May be used by several threads."""

    def __init__(self, config: JudgeConfig, key: str | None, seed: int) -> None:
        """Open the connection.

        Raises:
            ConfigError: the key has characters that no key has.
        """
        # httpx would quote such a key in its own error.
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("evaluation.judge: the key has characters that no key has, such as a line break")
        self._config, self._key = config, key
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._address = f"{config.url.rstrip('/')}/chat/completions"
        self._takes_format = True
        self._jitter = random.Random(seed)  # noqa: S311 (no secret)
        self.pace = Pace(config.requests_per_minute)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, messages: list[dict[str, str]]) -> Reply:
        """Return the reply to ``messages``, at temperature 0; what may pass is waited for and sent again.

        Raises:
            ConfigError: the server refuses the key, or knows no such model or address.
            PreferenceTuningError: it cannot be had, after all retries.
        """
        failures = 0
        while True:
            self.pace.wait()
            found = self._try(messages)
            if isinstance(found, Reply):
                return found
            if found.of_the_format:
                continue
            failures += 1
            if failures > self._config.max_retries:
                raise self._error(f"failed {failures} times, at last with: {found.reason}")
            self._wait(found, failures)

    def _wait(self, failure: "_Failure", failures: int) -> None:
        if failure.wait is None:
            backoff = min(LONGEST_BACKOFF, 2.0 ** (failures - 1))
            self.pace.sleep(backoff * self._jitter.uniform(0.5, 1))
        elif failure.wait > LONGEST_WAIT:
            raise self._error(f"asks to be left alone for {failure.wait:.0f} s ({failure.reason})")
        else:
            self.pace.hold(failure.wait)

    def _try(self, messages: list[dict[str, str]]) -> "Reply | _Failure":
        config = self._config
        body: dict[str, Any] = {
            "model": config.model, "messages": messages, "temperature": 0, "max_tokens": config.max_tokens,
        }  # fmt: skip
        formatted = self._takes_format
        if formatted:
            body["response_format"] = {"type": "json_object"}
        try:
            response = self._http.post(self._address, json=body)
        except httpx.TimeoutException:
            return _Failure(f"no answer within {config.timeout:g} s")
        except httpx.TransportError as error:
            return _Failure(self._plain(str(error)) or type(error).__name__)
        if response.status_code in (400, 422) and formatted:
            self._takes_format = False
            return _Failure("", of_the_format=True)
        if response.status_code in AGAIN or response.status_code >= 500:
            return _Failure(f"HTTP {response.status_code}", _retry_after(response))
        if response.status_code != 200:
            raise self._refusal(response)
        return _read(response)

    def _refusal(self, response: httpx.Response) -> PreferenceTuningError:
        told = self._plain(_message(response))
        variable = self._config.api_key_env
        about = f"answers HTTP {response.status_code}{f' ({told})' if told else ''}"
        if response.status_code in (401, 403):
            about += f"; it refuses the key, set {variable}" if self._key else f"; it wants a key, set {variable}"
        return ConfigError(f"evaluation.judge: {self._config.model} at {self._config.url} {about}")

    def _error(self, reason: str) -> PreferenceTuningError:
        return PreferenceTuningError(
            f"evaluation.judge: {self._config.model} at {self._config.url} {reason}. "
            "The replies so far are kept, and the same command continues behind them"
        )

    def _plain(self, text: str) -> str:
        """Return what somebody else wrote as one short line, without the key if it is quoted there."""
        line = " ".join(text.replace(self._key, "***").split() if self._key else text.split())
        return line[:200]


class _Failure(NamedTuple):
    reason: str
    wait: float | None = None
    """Seconds that the server asks for."""
    of_the_format: bool = False
    """Whether the server may only have refused ``response_format``."""


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds of a Retry-After header, which may be a number or a date."""
    value = response.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return ""


def _read(response: httpx.Response) -> Reply | _Failure:
    try:
        body = response.json()
        text, usage = body["choices"][0]["message"].get("content"), body.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return _Failure("an answer that is no chat completion")
    known = [count if isinstance(count, int) and count >= 0 else None for count in counts]
    return Reply(text if isinstance(text, str) else None, *known)
