"""How a Hugging Face hub is talked to: with timeouts, without hidden retries, and with errors that say what to do.

huggingface_hub's own client waits for ever on a server that is silent, sleeps for as long as a ``Retry-After`` says,
and creates repositories in an endless loop on some conflicts. Its client is replaced, by the way that it has for that,
for the time of a push; all trying again is in ``patience``.
"""

import contextlib
import functools
import re
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError, find
from preference_tuning.failures import STATUS_CODES
from preference_tuning.registry.pushing.patience import RETRY_AFTER

SILENCE = httpx.Timeout(60.0, connect=10.0)
"""Seconds; a large file may take any time as long as it moves."""
BRIEF = httpx.Timeout(10.0)
"""For a look before a run."""

_one_at_a_time = threading.RLock()


class _Client(httpx.Client):
    """Raises what passes as ``TransientError``, which huggingface_hub hands on and ``patience`` waits for."""

    def send(self, request: httpx.Request, **how: Any) -> httpx.Response:
        place = f"{request.method} {request.url.copy_with(query=None, fragment=None)}"
        try:
            response = super().send(request, **how)
        except httpx.UnsupportedProtocol as error:
            raise ConfigError(f"HF_ENDPOINT: {error}") from None
        except httpx.TransportError as error:
            raise TransientError(f"{place}: {str(error) or type(error).__name__}") from error
        if response.status_code in STATUS_CODES or _is_busy(response):
            response.close()
            raise TransientError(f"{place}: {_status(response)}", {RETRY_AFTER: _seconds(response)})
        return response


@contextlib.contextmanager
def session(timeout: httpx.Timeout | None = None) -> Iterator[None]:
    """Let huggingface_hub use our client and be silent; both are of the whole process, so pushes take their turns."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    with _one_at_a_time:
        verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
        logging.set_verbosity_error()
        disable_progress_bars()
        set_client_factory(lambda: _Client(follow_redirects=True, timeout=timeout or SILENCE, verify=_certificates()))
        try:
            yield
        finally:
            set_client_factory(default_client_factory)
            logging.set_verbosity(verbosity)
            if bars:
                enable_progress_bars()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read the certificates once; it takes longer than many a request."""
    return httpx.create_ssl_context()


def explained(error: Exception, token: str) -> PreferenceTuningError:
    """Return an error of huggingface_hub as one of ours: one line, and never with the token in it.

    Raises:
        Exception: the error itself, if it is none of a hub.
    """
    known = find(error)
    if known is not None:
        return type(known)(_line(str(known), token), known.facts)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx.HTTPError):
        cause = cause.__cause__
    if isinstance(cause, httpx.HTTPError):
        return PreferenceTuningError(_line(_told(cause), token))
    if isinstance(error, ValueError):  # what the hub answered is not what it should be, or refuses a file
        return PreferenceTuningError(_line(str(error), token))
    raise error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of huggingface_hub stands for."""
    response = getattr(error, "response", None)
    return response.status_code if isinstance(response, httpx.Response) else None


def _told(error: httpx.HTTPError) -> str:
    """Return what was asked and what the hub said to it."""
    response = getattr(error, "response", None)
    if not isinstance(response, httpx.Response):
        return str(error) or type(error).__name__
    said = getattr(error, "server_message", None) or ""
    request = response.request
    place = f"{request.method} {request.url.copy_with(query=None, fragment=None)}"
    return f"{place}: {_status(response)}{': ' + said if said else ''}"


def _is_busy(response: httpx.Response) -> bool:
    """Whether a conflict is one that huggingface_hub's `create_repo` would try again without an end or a pause."""
    return response.status_code == 409 and response.is_closed and "conflicting operation" in response.text


def _status(response: httpx.Response) -> str:
    return f"{response.status_code} {response.reason_phrase}".strip()


def _seconds(response: httpx.Response) -> float:
    """Return for how long the server wants to be left alone; 0 if it does not say."""
    # The IETF draft's header, which huggingface.co sends: `"api";r=0;t=55`.
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", response.headers.get("ratelimit", ""))
    text = limit.group(1) if limit else response.headers.get("retry-after", "")
    return float(text) if text.isdigit() else 0.0


def _line(text: str, token: str) -> str:
    """Return a text in one line of reasonable length, without the token: a server may send back what it was sent."""
    return " ".join(text.replace(token, "***").split())[:500]
