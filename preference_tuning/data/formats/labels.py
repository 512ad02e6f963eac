"""Labels that say which of two answers is the better one, and by how much."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.values import required_number, shown, text_of
from preference_tuning.data.pair import FlawError

NEAR_TIE = (1.4, 1.6)
"""Weighted annotators of AlpacaEval give 1 for the first answer, 2 for the second, and what lies between."""

Verdict = tuple[bool, float | None]
"""Whether the first answer is the better one, and the margin if the label tells it."""


@dataclass(frozen=True, slots=True)
class Label:
    """How a format says which answer is better."""

    first: str
    second: str
    column: str
    read: Callable[[Any, str], Verdict]
    meaning: str
    """For messages: how the label is read."""


def _tie(where: str, value: Any) -> FlawError:
    return FlawError("tie", f"{where} is {shown(value)}: no preference")


def _bit(value: Any, where: str) -> bool:
    # A truth value would be read the wrong way round by one of the two kinds of label, so neither takes it.
    number = required_number(value, where) if type(value) is not bool else None
    if number not in (0, 1):
        raise FlawError("not_text", f"{where} is {shown(value)}; a label is 0 or 1")
    return number == 1


def _one_is_first(value: Any, where: str) -> Verdict:
    return _bit(value, where), None


def _place(value: Any, where: str) -> Verdict:
    return not _bit(value, where), None


def _strength(value: Any, where: str) -> Verdict:
    strength = required_number(value, where)
    if strength == 0:
        raise _tie(where, value)
    return strength < 0, abs(strength)


def _from_one_to_two(value: Any, where: str) -> Verdict:
    preference = 0.0 if value is None else required_number(value, where)
    low, high = NEAR_TIE
    if preference == 0 or low <= preference <= high:
        raise _tie(where, value)
    if not 1 <= preference <= 2:
        raise FlawError("not_text", f"{where} is {shown(value)}; a preference lies between 1 and 2")
    return preference < low, None


def _winner(value: Any, where: str) -> Verdict:
    winner = text_of(value, where).strip().lower()
    if winner.startswith(("tie", "both")):
        raise _tie(where, value)
    if winner not in ("model_a", "model_b"):
        raise FlawError("not_text", f"{where} is {shown(value)}; a winner is model_a, model_b or tie")
    return winner == "model_a", None


LABELS = {
    "safe_rlhf": Label("response_0", "response_1", "better_response_id", _place, "0: the first answer, 1: the second"),
    "shp": Label("human_ref_A", "human_ref_B", "labels", _one_is_first, "1: the first answer, 0: the second"),
    "halos": Label("output_A", "output_B", "label", _one_is_first, "1: the first answer, 0: the second"),
    "helpsteer": Label(
        "response_1", "response_2", "preference_strength", _strength, "below 0: the first answer, above 0: the second"
    ),
    "alpaca_eval": Label(
        "output_1", "output_2", "preference", _from_one_to_two, "near 1: the first answer, near 2: the second"
    ),
    "arena": Label(
        "conversation_a", "conversation_b", "winner", _winner, "model_a: the first answer, model_b: the second"
    ),
}


@dataclass(frozen=True, slots=True)
class Preferred:
    """A column that has to say there is a preference at all."""

    column: str
    values: frozenset[str]

    def check(self, values: dict[str, Any]) -> None:
        """Refuse a row of another kind.

        Raises:
            FlawError: tie.
        """
        value = values.get(self.column)
        if type(value) is not str or value.strip().lower() not in self.values:
            raise FlawError("tie", f"`{self.column}` is {shown(value)}: no preference between two answers")
