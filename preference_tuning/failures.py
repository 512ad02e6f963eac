"""Which failures are worth another try: one table of error classes, by name, so that nothing heavy is imported.

An error is what the first rule says that fits it or one of its causes:

1. ours: ``TransientError`` and ``OutOfMemoryError`` are what their names say; config, data, divergence and
   interruption are final;
2. out of memory: ``OUT_OF_MEMORY``, or a message that says so;
3. ``FINAL``, which are exceptions to what follows;
4. transient: ``TRANSIENT``, ``ERRNOS``, or the answer of a server that is overloaded;
5. all else is final: a wrong path, a full disk, a mistake in the code.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning.errors import BY_EXIT_CODE, OutOfMemoryError, PreferenceTuningError, TransientError

Kind = Literal["transient", "out_of_memory", "final"]

OUT_OF_MEMORY = ("builtins.MemoryError", "torch.OutOfMemoryError")
OUT_OF_MEMORY_MESSAGES = (
    "can't allocate memory",  # torch's allocator on a CPU
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Of RuntimeErrors: what asks for memory beside torch's allocator has no class for it."""

FINAL = (
    "builtins.BrokenPipeError",  # nobody reads the output any more
    "httpx.UnsupportedProtocol",
    "huggingface_hub.errors.OfflineModeIsEnabled",
)

TRANSIENT = (
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "http.client.IncompleteRead",
    "http.client.RemoteDisconnected",
    "httpx.TransportError",
    "huggingface_hub.errors.LocalEntryNotFoundError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "requests.exceptions.ChunkedEncodingError",
    "torch.distributed.DistBackendError",
    "torch.distributed.DistNetworkError",
    "torch.distributed.DistStoreError",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
)

ERRNOS = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Of OSErrors: networks, and file systems that lie behind one."""

STATUS_CODES = {408, 425, 429, 500, 502, 503, 504}
"""Of answers over HTTP: too many requests, or a server in trouble."""


class Failure(BaseModel):
    """What the child tells the parent of its end."""

    exit_code: int
    message: str
    kind: Kind = "final"
    facts: dict[str, Any] = {}
    """Of an error that has some."""

    def error(self) -> PreferenceTuningError:
        """Return the error that the exit code names."""
        return BY_EXIT_CODE.get(self.exit_code, PreferenceTuningError)(self.message)


def account(error: Exception, log: Path) -> Failure:
    """Return what is told of an error; ``log`` will have its traceback."""
    kind = kind_of(error)
    if isinstance(error, PreferenceTuningError):
        facts = error.facts if isinstance(error, OutOfMemoryError) else {}
        return Failure(exit_code=error.exit_code, message=str(error), kind=kind, facts=facts)
    return Failure(exit_code=1, message=f"{type(error).__name__}: {error} (traceback in {log})", kind=kind)


def kind_of(error: BaseException) -> Kind:
    """Return what kind of failure an error is."""
    if isinstance(error, TransientError):
        return "transient"
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(error, PreferenceTuningError):
        return "final"
    chain = list(_causes(error))
    if any(_is(cause, OUT_OF_MEMORY) or _says_out_of_memory(cause) for cause in chain):
        return "out_of_memory"
    if any(_is(cause, FINAL) for cause in chain):
        return "final"
    if any(_is(cause, TRANSIENT) or _errno_is_transient(cause) or _is_overload(cause) for cause in chain):
        return "transient"
    return "final"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; not what merely was being handled, which explains nothing."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _is(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)


def _errno_is_transient(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in ERRNOS


def _is_overload(error: BaseException) -> bool:
    return getattr(getattr(error, "response", None), "status_code", None) in STATUS_CODES
