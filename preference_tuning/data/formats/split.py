"""One pair from two values: two answers to a prompt, or two conversations that share one."""

from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.messages import check_answer, check_prompt, is_conversation, read, turns_of
from preference_tuning.data.formats.prompts import PromptReader
from preference_tuning.data.formats.texts import TextForm, split_at
from preference_tuning.data.formats.tools import read_definitions
from preference_tuning.data.formats.values import text_of
from preference_tuning.data.pair import FlawError, Messages, Pair


def read_answer(value: Any, where: str) -> Messages:
    """Return an answer: a text, a message, or a list of one.

    Raises:
        FlawError: what an answer may have.
    """
    if type(value) is str or type(value) not in (list, dict):
        return [{"role": "assistant", "content": text_of(value, where)}]
    return check_answer(read(turns_of(value, where), where), where)


def split(chosen: Any, rejected: Any, names: tuple[str, str]) -> tuple[Messages, Messages, Messages]:
    """Return what two conversations share, and the answer each ends with.

    Raises:
        FlawError: identical, diverging, or what a turn may have.
    """
    better, worse = (turns_of(value, f"`{name}`") for value, name in zip((chosen, rejected), names, strict=True))
    shared = 0
    while shared < min(len(better), len(worse)) and better[shared] == worse[shared]:
        shared += 1
    prompt = read(better[:shared], f"`{names[0]}`")
    left = read(better[shared:], f"`{names[0]}`", prompt, shared + 1)
    right = read(worse[shared:], f"`{names[1]}`", prompt, shared + 1)
    # Turns can be the same and carry different extra fields, such as a loss weight.
    while left and right and left[0] == right[0]:
        prompt.append(left.pop(0))
        right.pop(0)
        shared += 1
    return _parted(prompt, left, right, names, shared)


def _parted(
    prompt: Messages, left: Messages, right: Messages, names: tuple[str, str], shared: int
) -> tuple[Messages, Messages, Messages]:
    if not left and not right:
        raise FlawError("identical", f"`{names[0]}` and `{names[1]}` are the same conversation")
    if not left or not right:
        shorter, longer = names if not left else names[::-1]
        raise FlawError("diverging", f"`{longer}` goes on after turn {shared}, where `{shorter}` ends")
    if not prompt and "system" in (left[0]["role"], right[0]["role"]):
        raise FlawError("diverging", f"`{names[0]}` and `{names[1]}` have different system turns")
    if not prompt:
        raise FlawError("diverging", f"`{names[0]}` and `{names[1]}` differ from the first turn on")
    check_answer(left, f"`{names[0]}`", shared + 1)
    check_answer(right, f"`{names[1]}`", shared + 1)
    return check_prompt(prompt), left, right


@dataclass(frozen=True, slots=True)
class Pairer:
    """Makes the pair of a row, once it is known which column holds the better answer."""

    prompt: PromptReader
    tools: str | None = None
    form: TextForm | None = None
    separator: str | None = None

    def __call__(self, values: dict[str, Any], better: str, worse: str) -> Pair:
        """Return the pair.

        Raises:
            FlawError: what a row may have.
        """
        chosen, rejected = values.get(better), values.get(worse)
        if self.form is not None:
            chosen, rejected = self.form.read(chosen, f"`{better}`"), self.form.read(rejected, f"`{worse}`")
        if self.separator is not None:
            text, left, right = split_at(self.separator, chosen, rejected, (better, worse))
            prompt = self.prompt.confirm(values, [_turn("user", text)])
            pair = Pair(prompt, [_turn("assistant", left)], [_turn("assistant", right)])
        elif self.prompt.column is None or is_conversation(chosen) or is_conversation(rejected):
            shared, first, second = split(_turns(chosen, better), _turns(rejected, worse), (better, worse))
            pair = Pair(self.prompt.confirm(values, shared), first, second)
        else:
            pair = Pair(self.prompt(values), read_answer(chosen, f"`{better}`"), read_answer(rejected, f"`{worse}`"))
        if self.tools is not None:
            pair.tools = read_definitions(values.get(self.tools), f"`{self.tools}`")
        return pair


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _turns(value: Any, column: str) -> Any:
    # Beside a conversation, a text that is an answer alone has no prompt of its own.
    if type(value) is str:
        text_of(value, f"`{column}`")
        raise FlawError("diverging", f"`{column}` is a text without the turns before it, where a conversation belongs")
    return value
