"""Comet's own client in a process of its own, with a deadline: for a host that is gone it would wait half a minute.

The question goes in as JSON, the answer comes out as the last line; the key is in the environment and nowhere else.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from preference_tuning import failures, fingerprint
from preference_tuning.errors import ConfigError, PreferenceTuningError, TransientError

KEY = "COMET_API_KEY"
QUIET = {
    "COMET_ERROR_TRACKING_ENABLE": "false",
    "COMET_INTERNAL_REPORTING": "false",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
}

Answer = TypeVar("Answer", bound=BaseModel)


def ask(module: str, question: BaseModel, answer: type[Answer], seconds: float) -> Answer:
    """Run ``python -m module`` on a question and return its answer.

    Raises:
        ConfigError: there is no key, or Comet does not know it.
        TransientError: Comet cannot be reached, or has not answered after ``seconds``.
        PreferenceTuningError: Comet refuses.
    """
    if not os.environ.get(KEY):
        raise ConfigError(f"Comet needs {KEY} in the environment")
    path = os.pathsep.join(filter(None, [str(fingerprint.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    try:
        child = subprocess.run(
            [sys.executable, "-m", module],
            input=question.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**QUIET, **os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise TransientError(f"Comet has not answered within {seconds:.0f} s") from None
    try:
        told = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise PreferenceTuningError(f"Comet's client ended with exit code {child.returncode} without a word") from None
    if "error" in told:
        raise {"key": ConfigError, "transient": TransientError}.get(told["kind"], PreferenceTuningError)(told["error"])
    return answer.model_validate(told)


def reply(work: Callable[[str], BaseModel]) -> None:
    """Be the child: read the question, do ``work`` on it, and write the answer, or why there is none."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed
    try:
        told = work(sys.stdin.read()).model_dump_json()
    except Exception as error:
        kind, text = _reason(error)
        told = json.dumps({"kind": kind, "error": text})
    out.write("\n" + told + "\n")
    out.close()
    # comet_ml's threads may still wait for a host that is gone.
    os._exit(0)


def _reason(error: Exception) -> tuple[str, str]:
    """Return the kind of an error and its text, without the key, which comet_ml puts into some of its own."""
    if isinstance(error, PreferenceTuningError):
        return failures.kind_of(error), str(error)
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403) or type(error).__name__ in ("InvalidAPIKey", "Unauthorized"):
        return "key", f"Comet does not accept the key in {KEY}" + (f" ({status})" if status else "")
    said = getattr(error, "safe_msg", None) or str(error) or type(error).__name__
    text = (f"{status}: " if status else "") + str(said).splitlines()[0][:300]
    key = os.environ.get(KEY, "")
    # A refused connection is a long text of three libraries.
    if status is None and failures.kind_of(error) == "transient":
        text = f"it cannot be reached ({type(error).__name__})"
    return failures.kind_of(error), f"Comet: {text}".replace(key, "***") if key else f"Comet: {text}"
