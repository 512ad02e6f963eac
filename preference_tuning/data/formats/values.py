"""Single values of a row: text, numbers and labels, or the flaw that says what was found instead."""

import json
import math
from typing import Any

from preference_tuning.data.pair import FlawError

TYPE_NAMES: dict[type, str] = {
    str: "text",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def type_name(value: Any) -> str:
    """Return what a message calls the type of a value."""
    return TYPE_NAMES.get(type(value), f"of type {type(value).__name__}")


def shown(value: Any) -> str:
    """Return a value in short, for a message; nested and huge ones by their type only."""
    if type(value) is str:
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if type(value) is float or (type(value) is int and abs(value) < 10**12):
        return repr(value)
    return {True: "true", False: "false"}[value] if type(value) is bool else type_name(value)


def is_blank(text: str) -> bool:
    """Say whether there is nothing but white space; unlike strip, it stops at the first letter."""
    return not text or text.isspace()


def text_of(value: Any, where: str) -> str:
    """Return a value that has to be text.

    Raises:
        FlawError: missing, blank or not_text.
    """
    if type(value) is str:
        if not value or value.isspace():
            raise FlawError("blank", f"{where} is blank")
        return value
    if value is None:
        raise FlawError("missing", f"{where} is null")
    raise FlawError("not_text", f"{where} is {type_name(value)}, not text")


def optional_text(value: Any, where: str) -> str:
    """Return text, or '' for null and blank.

    Raises:
        FlawError: not_text.
    """
    if value is None or (type(value) is str and is_blank(value)):
        return ""
    return text_of(value, where)


def number_of(value: Any) -> float | None:
    """Return a finite number, also one written as text (CSV has no other); None for all else."""
    if type(value) not in (int, float, str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def required_number(value: Any, where: str) -> float:
    """Return a number that a preference hangs on.

    Raises:
        FlawError: missing or not_text.
    """
    if value is None:
        raise FlawError("missing", f"{where} is null")
    number = number_of(value)
    if number is None:
        raise FlawError("not_text", f"{where} is {shown(value)}, not a number")
    return number


def truth_of(value: Any, where: str) -> bool:
    """Return the label of an unpaired answer.

    Raises:
        FlawError: missing or not_text.
    """
    if type(value) is bool:
        return value
    if value is None:
        raise FlawError("missing", f"{where} is null")
    if type(value) is str and value.strip().lower() in TRUTHS:
        return TRUTHS[value.strip().lower()]
    if type(value) in (int, float) and value in (0, 1):
        return bool(value)
    raise FlawError("not_text", f"{where} is {shown(value)}; a label is true or false, or 1 or 0")


def decoded(value: Any, where: str) -> Any:
    """Return what JSON inside a text says; what is no text, or blank, as it is.

    Raises:
        FlawError: not_text, if the text is not JSON.
    """
    if type(value) is not str or is_blank(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise FlawError("not_text", f"{where} is text that is not JSON") from None
