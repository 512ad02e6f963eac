"""Turns: from the names and shapes that sources use to ``role`` and ``content``, in the right order."""

from typing import Any

from preference_tuning.data.formats import tools
from preference_tuning.data.formats.values import optional_text, shown, text_of, type_name
from preference_tuning.data.pair import FlawError, Message, Messages

ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "agent": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
PLAIN_ROLES = frozenset({"system", "user", "assistant"})
FOLLOWERS = {
    "": frozenset({"system", "user"}),
    "system": frozenset({"user"}),
    "user": frozenset({"assistant"}),
    "assistant": frozenset({"user", "tool"}),
    "tool": frozenset({"assistant", "tool"}),
}
"""Which turns may come after which; that a tool answers a call is checked where turns are read."""


def role_of(turn: Any) -> str | None:
    """Return the role of what may be a turn, None if it says none that is known."""
    if type(turn) is not dict:
        return None
    name = _first(turn, ROLE_KEYS)
    return ROLE_NAMES.get(name.strip().lower()) if type(name) is str else None


def is_turn(value: Any) -> bool:
    """Say whether a value has the keys of a turn."""
    return type(value) is dict and any(key in value for key in ROLE_KEYS) and any(key in value for key in CONTENT_KEYS)


def is_conversation(value: Any) -> bool:
    """Say whether a value is a list of turns that begins before the answer."""
    return type(value) is list and bool(value) and is_turn(value[0]) and role_of(value[0]) != "assistant"


def turns_of(value: Any, where: str) -> list[Any]:
    """Return the raw turns of a column: a list, or one turn.

    Raises:
        FlawError: missing or not_text.
    """
    if type(value) is dict and value:
        return [value]
    if type(value) is list and value:
        return value
    if type(value) in (list, dict):
        raise FlawError("missing", f"{where} is empty")
    raise FlawError(
        "missing" if value is None else "not_text",
        f"{where} is null" if value is None else f"{where} is {type_name(value)}, not a list of messages",
    )


def read(turns: list[Any], where: str, earlier: Messages | None = None, number: int = 1) -> Messages:
    """Read raw turns; blank system turns are left out.

    Args:
        turns: as they lie in the source.
        where: how a message calls the column.
        earlier: the messages before them.
        number: of the first of the turns.

    Raises:
        FlawError: with the turn, counted from 1.
    """
    messages: Messages = []
    called = _awaits_tool(earlier[-1]) if earlier else False
    for place, turn in enumerate(turns, number):
        message = _plain(turn) or _message(turn, f"turn {place} of {where}")
        role = message["role"]
        if role == "tool" and not called:
            raise FlawError("role_order", f"turn {place} of {where} is a tool's, and no call comes before it")
        if role == "system" and not message["content"]:
            continue
        called = role in ("assistant", "tool") and (_awaits_tool(message) or _first(turn, ROLE_KEYS) == "function_call")
        messages.append(message)
    return messages


def check_prompt(prompt: Messages) -> Messages:
    """Return a prompt whose turns are in order and that waits for an answer.

    Raises:
        FlawError: role_order, or missing if nothing is left.
    """
    if not prompt:
        raise FlawError("missing", "the prompt holds no turn but a blank system one")
    before = ""
    for number, message in enumerate(prompt, 1):
        role = message["role"]
        if role not in FOLLOWERS[before]:
            place = f"after {_whose(before)} turn" if before else "first"
            raise FlawError("role_order", f"turn {number} of the prompt is {_whose(role)}, {place}")
        before = role
    if before not in ("user", "tool"):
        raise FlawError("role_order", f"the prompt ends with {_whose(before)} turn; it has to end with the user's")
    return prompt


def check_answer(answer: Messages, where: str, number: int = 1) -> Messages:
    """Return an answer that is one assistant turn.

    Raises:
        FlawError: diverging or role_order.
    """
    if not answer:
        raise FlawError("missing", f"{where} holds no turn but a blank system one")
    for place, message in enumerate(answer, number):
        if message["role"] != "assistant":
            raise FlawError("diverging", f"turn {place} of {where} is {_whose(message['role'])}, within the answer")
    if len(answer) > 1:
        raise FlawError("role_order", f"turns {number} and {number + 1} of {where} are both the assistant's")
    return answer


def _whose(role: str) -> str:
    return f"the {role}'s" if role in ("user", "assistant") else f"a {role}'s"


def _awaits_tool(message: Message) -> bool:
    return message["role"] == "tool" or "tool_calls" in message


def _plain(turn: Any) -> Message | None:
    # Nearly every turn there is; the way through _message takes five times as long.
    if type(turn) is dict and len(turn) == 2:
        role, content = turn.get("role"), turn.get("content")
        if type(role) is str and role in PLAIN_ROLES and type(content) is str and content and not content.isspace():
            return {"role": role, "content": content}
    return None


def _message(turn: Any, where: str) -> Message:
    if type(turn) is not dict:
        raise FlawError(
            "missing" if turn is None else "not_text",
            f"{where} is {type_name(turn)}, not a message with role and content",
        )
    name = _role_name(turn, where)
    role, content = ROLE_NAMES[name], _first(turn, CONTENT_KEYS)
    message: Message = {"role": role, "content": ""}
    calls = tools.read_calls(turn.get("tool_calls"), where)
    if name == "function_call" and calls is None:
        calls = tools.calls_in(content)
        content = content if calls is None else ""
    if calls is not None:
        message["tool_calls"] = calls
    may_be_blank = calls is not None or role == "system"
    text = "".join(_parts(content, where)) if type(content) is list else content
    message["content"] = optional_text(text, where) if may_be_blank else text_of(text, where)
    return message | {key: text_of(turn[key], where) for key in ("tool_call_id", "name") if turn.get(key) is not None}


def _role_name(turn: Message, where: str) -> str:
    name = text_of(_first(turn, ROLE_KEYS), f"the role of {where}").strip().lower()
    if name not in ROLE_NAMES:
        raise FlawError("role_order", f"{where} has the role {shown(name)}; known: {', '.join(ROLE_NAMES)}")
    return name


def _first(turn: Message, keys: tuple[str, ...]) -> Any:
    # A table with one type for all rows fills up keys with null.
    for key in keys:
        value = turn.get(key)
        if value is not None:
            return value
    return None


def _parts(content: list[Any], where: str) -> list[str]:
    return [_part(part, f"part {number} of {where}") for number, part in enumerate(content, 1)]


def _part(part: Any, where: str) -> str:
    if type(part) is not dict:
        raise FlawError("not_text", f"{where} is {type_name(part)}, not a part with type and text")
    kind = part.get("type", "text")
    if kind != "text":
        raise FlawError("not_text", f"{where} is of kind {shown(kind)}; only text can be trained on")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if type(text) is not str:
        text_of(text, where)
    return str(text)
