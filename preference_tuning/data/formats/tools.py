"""Tools: their definitions, and the calls an assistant makes, in OpenAI's form."""

import json
from typing import Any

from preference_tuning.data.formats.values import decoded, is_blank, type_name
from preference_tuning.data.pair import FlawError

Call = dict[str, Any]


def read_definitions(value: Any, where: str) -> list[Any] | None:
    """Return the definitions of the tools, also of those written as JSON in a text.

    Raises:
        FlawError: not_text.
    """
    definitions = decoded(value, where)
    if definitions is None or definitions in ([], {}) or (type(definitions) is str and is_blank(definitions)):
        return None
    if type(definitions) is dict:
        definitions = [definitions]
    if type(definitions) is not list or any(type(tool) is not dict for tool in definitions):
        raise FlawError("not_text", f"{where} is {type_name(definitions)}, not a list of tool definitions")
    # Chat templates ask for {"type": "function", "function": ...}; ShareGPT data has what stands inside.
    return [{"type": "function", "function": tool} if _is_bare(tool) else tool for tool in definitions]


def read_calls(value: Any, where: str) -> list[Call] | None:
    """Return the tool calls of a message, None if it makes none.

    Raises:
        FlawError: not_text.
    """
    if value is None or value == []:
        return None
    calls = _calls(value)
    if calls is None:
        raise FlawError("not_text", f"the tool_calls of {where} are not a list of functions with name and arguments")
    return calls


def calls_in(text: Any) -> list[Call] | None:
    """Return the calls that a text holds as JSON, one or a list of them; None if it is anything else."""
    if type(text) is not str:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return _calls([value] if type(value) is dict else value) or None


def _is_bare(tool: dict[str, Any]) -> bool:
    return type(tool.get("name")) is str and "function" not in tool


def _calls(value: Any) -> list[Call] | None:
    if type(value) is not list:
        return None
    calls = [_call(item) for item in value]
    return None if None in calls else [call for call in calls if call is not None]


def _call(item: Any) -> Call | None:
    if type(item) is not dict:
        return None
    function = item.get("function", item)
    if type(function) is not dict or type(function.get("name")) is not str:
        return None
    if type(function.get("arguments", {})) not in (dict, str, type(None)):
        return None
    call = {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments") or {}}}
    return {"id": item["id"], **call} if type(item.get("id")) is str else call
