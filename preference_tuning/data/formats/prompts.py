"""The prompt: a text or turns, below what a system column and a history say, with its context under it."""

from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.messages import check_prompt, read, turns_of
from preference_tuning.data.formats.texts import TextForm
from preference_tuning.data.formats.values import optional_text, text_of
from preference_tuning.data.pair import FlawError, Message, Messages


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Reads the prompt of a row from its columns."""

    column: str | None
    """None: the prompt is inside of the conversations that the answers end."""
    context: str | None = None
    system: str | None = None
    history: str | None = None
    form: TextForm | None = None
    """How a conversation is written in the text, if it is one."""

    def __call__(self, values: dict[str, Any]) -> Messages:
        """Return the prompt, checked.

        Raises:
            FlawError: what a prompt may have.
        """
        value = values.get(self.column or "")
        if type(value) is str and self._is_plain():
            return [{"role": "user", "content": text_of(value, f"`{self.column}`")}]
        return check_prompt(self._system(values) + self._history(values) + self._asked(values, value))

    def _is_plain(self) -> bool:
        return self.context is None and self.system is None and self.history is None and self.form is None

    def confirm(self, values: dict[str, Any], shared: Messages) -> Messages:
        """Return what two conversations share, if the prompt columns agree with it.

        A system column is put above it when the conversations have no system turn.

        Raises:
            FlawError: diverging.
        """
        system = self._system(values)
        if system and shared[0]["role"] != "system":
            shared = system + shared
        elif system and system[0]["content"].strip() != shared[0]["content"].strip():
            raise FlawError("diverging", f"the system turn does not match the column `{self.system}`")
        if self.column is not None and not self._fits(values, shared):
            raise FlawError("diverging", f"the conversation does not match the prompt column `{self.column}`")
        return shared

    def _fits(self, values: dict[str, Any], shared: Messages) -> bool:
        value = values.get(self.column or "")
        asked = self._asked(values, value)
        if type(value) is str and (self.form is None or not self.form.begins(value)):
            return any(turn["role"] == "user" and _same(turn, asked[-1]) for turn in shared)
        return asked in (shared, shared[1:] if shared[0]["role"] == "system" else shared)

    def described(self) -> str:
        """Return the columns the prompt is made of."""
        parts = [
            "the prompt is what the conversations share" if self.column is None else f"the prompt is `{self.column}`"
        ]
        parts += [f"with `{self.context}` below it"] * (self.context is not None)
        above = [f"`{column}`" for column in (self.system, self.history) if column is not None]
        return " ".join(parts + [f"with {' and '.join(above)} above it"] * bool(above))

    def _asked(self, values: dict[str, Any], value: Any) -> Messages:
        where = f"`{self.column}`"
        if type(value) is str:
            text = text_of(value, where)
            turns = [{"role": "user", "content": text}]
            if self.form is not None:
                turns = read(self.form.prompt(text, where), where)
        else:
            turns = read(turns_of(value, where), where)
        context = optional_text(values.get(self.context), f"`{self.context}`") if self.context is not None else ""
        if context and turns:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{context}"
        return turns

    def _system(self, values: dict[str, Any]) -> Messages:
        text = optional_text(values.get(self.system), f"`{self.system}`") if self.system is not None else ""
        return [{"role": "system", "content": text}] if text else []

    def _history(self, values: dict[str, Any]) -> Messages:
        value = values.get(self.history) if self.history is not None else None
        if not value:
            return []
        where = f"`{self.history}`"
        if type(value) is list and type(value[0]) is list:
            return [message for number, pair in enumerate(value, 1) for message in _exchange(pair, number, where)]
        return read(turns_of(value, where), where)


def _same(one: Message, other: Message) -> bool:
    return bool(one["content"].strip() == other["content"].strip())


def _exchange(pair: Any, number: int, where: str) -> Messages:
    if type(pair) is not list or len(pair) != 2:
        raise FlawError("not_text", f"turn {number} of {where} is not [question, answer]")
    return [
        {"role": role, "content": text_of(text, f"the {role}'s part of turn {number} of {where}")}
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
