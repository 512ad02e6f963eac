"""Keys in a run config: ZenML keeps the whole config in its database, so a key in it is a key given away.

What looks like one, by its name or by its shape, is refused, and the message never repeats the value.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str | int, ...]

VARIABLE = re.compile(r"(?:^|_)(?:key|token|pass|passwd|password|pwd|secret|credentials?|access_key_id)$")
"""Names of environment variables that hold keys."""
SETTING = re.compile(
    r"(?:^|_)(?:(?:access|account|api|auth|encryption|private|secret|signing)_?key|token|passwd|password|secret|credentials?)$"
)
"""Names of settings that hold keys; a plain ``key`` names many other things."""
PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
"""What ZenML replaces by an environment variable's value before it stores the config."""
SHAPES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
INSTEAD = (
    "it would be stored in ZenML's database; set it in the environment of the process that runs the steps, or make a "
    "ZenML secret of it and name that under `secrets: [NAME]`"
)


def problems(document: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield ``(path of the value, message)`` for what looks like a key in a run config."""
    yield from _in((), document)


def looks_like(text: str) -> str | None:
    """Return what a text holds by its shape, such as ``a GitHub token``, or None."""
    return next((kind for kind, shape in SHAPES.items() if re.search(shape, text)), None)


def _in(path: Path, value: Any) -> Iterator[tuple[Path, str]]:
    if isinstance(value, Mapping):
        yield from _of_pair(path, value)
        for name, inner in value.items():
            yield from _in((*path, name), inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _in((*path, number), inner)
    elif value not in (None, "", True, False) and (message := _of_value(path, str(value))):
        yield path, message


def _of_value(path: Path, text: str) -> str | None:
    if kind := looks_like(text):
        return f"looks like {kind}: {INSTEAD}"
    if any(VARIABLE.search(name.lower()) for name in PLACEHOLDER.findall(text)):
        return f"ZenML would put the variable's value in its place: {INSTEAD}"
    # The sections of our own have no field for a key, and check addresses themselves.
    if path[:1] == ("parameters",):
        return None
    if re.search(r"://[^/\s]*@", text):
        return f"an address with a user in it: {INSTEAD}"
    names = VARIABLE if len(path) > 1 and _of_variables(path[-2]) else SETTING
    return f"by its name this is a key: {INSTEAD}" if names.search(_words(str(path[-1]))) else None


def _of_pair(path: Path, value: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Look at a variable as Kubernetes writes it: ``{name: HF_TOKEN, value: ...}``."""
    if isinstance(value.get("name"), str) and value.get("value") and VARIABLE.search(value["name"].lower()):
        yield (*path, "value"), f"by its name this is a key: {INSTEAD}"


def _of_variables(part: str | int) -> bool:
    """Return whether a mapping of this name holds environment variables."""
    return str(part).lower().rpartition("_")[2] in ("env", "environment", "environments", "vars")


def _words(name: str) -> str:
    """Return a name in the form of ``snake_case``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-.]", "_", name).lower()
