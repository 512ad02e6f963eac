"""What a row says beside its pair: scores, margin, topic, source, group, side of the split."""

from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.values import is_blank, number_of, shown, text_of
from preference_tuning.data.pair import FlawError, Pair, Unpaired

MAX_SOURCE_LENGTH = 80
"""A longer text in `source` or `domain` is a text to read, not the name of a source."""
HELD_OUT = {
    "train": False,
    "training": False,
    "test": True,
    "validation": True,
    "valid": True,
    "val": True,
    "eval": True,
    "dev": True,
}
NAMES = {
    "chosen_score": (
        "score_chosen", "chosen_score", "chosen-score", "chosen_rating", "rating_chosen", "chosen-rating",
        "chosen_reward", "reward_chosen",
    ),
    "rejected_score": (
        "score_rejected", "rejected_score", "rejected-score", "rejected_rating", "rating_rejected", "rejected-rating",
        "rejected_reward", "reward_rejected",
    ),
    "margin": ("margin",),
    "topic": ("topic", "category"),
    "source": ("source", "dataset", "subset", "domain"),
    "split": ("split",),
    "group": (),
}  # fmt: skip
"""Column names by which an extra is found; a group is only ever configured."""


@dataclass(frozen=True, slots=True)
class Extras:
    """The columns of the extras; None where there is none."""

    chosen_score: str | None = None
    rejected_score: str | None = None
    margin: str | None = None
    topic: str | None = None
    source: str | None = None
    split: str | None = None
    group: str | None = None

    def label(self, row: Pair | Unpaired, values: dict[str, Any]) -> None:
        """Fill in what pairs and single answers have in common.

        Raises:
            FlawError: missing or not_text, for a group or split that cannot be used.
        """
        if self.topic is not None:
            row.topic = _short(values.get(self.topic))
        if self.source is not None:
            row.source = _short(values.get(self.source))
        if self.group is not None:
            row.group = _group(values.get(self.group), f"`{self.group}`")
        if self.split is not None:
            row.held_out = _side(values.get(self.split), f"`{self.split}`")

    def fill(self, pair: Pair, values: dict[str, Any]) -> None:
        """Fill in a pair.

        Raises:
            FlawError: tie, or as in ``label``.
        """
        self.label(pair, values)
        if self.chosen_score is not None:
            pair.chosen_score = number_of(values.get(self.chosen_score))
        if self.rejected_score is not None:
            pair.rejected_score = number_of(values.get(self.rejected_score))
        if pair.chosen_score is not None and pair.rejected_score is not None:
            if pair.chosen_score == pair.rejected_score:
                raise FlawError("tie", f"chosen and rejected have the same score, {shown(pair.chosen_score)}")
            pair.margin = number_of(pair.chosen_score - pair.rejected_score)
        if self.margin is not None:
            margin = number_of(values.get(self.margin))
            pair.margin = pair.margin if margin is None else margin


def _short(value: Any) -> str | None:
    if type(value) is not str or len(value) > MAX_SOURCE_LENGTH or is_blank(value):
        return None
    # Half a surrogate pair is no name, and cannot be written.
    return value if value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value) else None


def _group(value: Any, where: str) -> str:
    if type(value) in (int, float, bool):
        # Python refuses to write an integer of more than 4300 digits in decimals.
        return hex(value) if type(value) is int and value.bit_length() > 1024 else str(value)
    return text_of(value, where)


def _side(value: Any, where: str) -> bool:
    side = text_of(value, where).strip().lower()
    if side not in HELD_OUT:
        raise FlawError("not_text", f"{where} is {shown(value)}; known: {', '.join(HELD_OUT)}")
    return HELD_OUT[side]
