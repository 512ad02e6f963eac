"""From the values of a row to its pairs, one class for each way in which rows hold answers."""

import itertools
from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.extras import Extras
from preference_tuning.data.formats.labels import Label, Preferred
from preference_tuning.data.formats.messages import check_answer, check_prompt, read, turns_of
from preference_tuning.data.formats.prompts import PromptReader
from preference_tuning.data.formats.split import Pairer, read_answer
from preference_tuning.data.formats.tools import read_definitions
from preference_tuning.data.formats.values import required_number, truth_of, type_name
from preference_tuning.data.pair import FlawError, Messages, Pair, Unpaired

MAX_RANKED = 100
"""All pairs of n answers are n * (n - 1) / 2; a single row must not fill the memory."""
NO_EXTRAS = Extras()
Scored = tuple[Messages, float | None]


@dataclass(frozen=True, slots=True)
class NamedRows:
    """Rows whose column names say which answer is preferred."""

    pairer: Pairer
    chosen: str
    rejected: str
    extras: Extras
    preferred: Preferred | None = None

    def __call__(self, values: dict[str, Any]) -> list[Pair]:
        """Return the pair of a row, or raise its FlawError."""
        if self.preferred is not None:
            self.preferred.check(values)
        pair = self.pairer(values, self.chosen, self.rejected)
        self.extras.fill(pair, values)
        return [pair]


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Rows with two answers and a label that says which one is preferred."""

    pairer: Pairer
    first: str
    second: str
    label: str
    how: Label
    extras: Extras
    preferred: Preferred | None = None

    def __call__(self, values: dict[str, Any]) -> list[Pair]:
        """Return the pair of a row, or raise its FlawError."""
        if self.preferred is not None:
            self.preferred.check(values)
        first_is_better, margin = self.how.read(values.get(self.label), f"`{self.label}`")
        names = (self.first, self.second) if first_is_better else (self.second, self.first)
        pair = self.pairer(values, *names)
        pair.margin = margin
        self.extras.fill(pair, values)
        return [pair]


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Rows with a list of answers, ranked by a score or by their order."""

    prompt: PromptReader
    completions: str
    answer: str | None
    """The field of a completion that holds the text; None: the completion is the answer."""
    score: str | None
    """The field of a completion that ranks it; None: the first answer is the best."""
    every: bool
    tools: str | None
    extras: Extras

    def __call__(self, values: dict[str, Any]) -> list[Pair]:
        """Return the pairs of a row, or raise its FlawError."""
        prompt = self.prompt(values)
        tools = None if self.tools is None else read_definitions(values.get(self.tools), f"`{self.tools}`")
        pairs = [
            Pair([*prompt], [*better], [*worse], tools=tools, chosen_score=high, rejected_score=low)
            for (better, high), (worse, low) in self._ranked(self._answers(values))
        ]
        if not pairs:
            raise FlawError("tie", f"the answers in `{self.completions}` all have the same score")
        for pair in pairs:
            self.extras.fill(pair, values)
        return pairs

    def _answers(self, values: dict[str, Any]) -> list[Scored]:
        where, value = f"`{self.completions}`", values.get(self.completions)
        if value is None or value == []:
            raise FlawError("missing", f"{where} is {'null' if value is None else 'an empty list'}")
        if type(value) is not list:
            raise FlawError("not_text", f"{where} is {type_name(value)}, not a list of answers")
        if len(value) < 2:
            raise FlawError("unpaired", f"{where} holds one answer; a pair takes two")
        if self.every and len(value) > MAX_RANKED:
            raise FlawError("too_large", f"{where} holds {len(value)} answers, and all of their pairs are asked for")
        return [self._scored(item, f"answer {number} of {where}") for number, item in enumerate(value, 1)]

    def _scored(self, item: Any, where: str) -> Scored:
        if self.answer is None:
            return read_answer(item, where), None
        if type(item) is not dict:
            raise FlawError("missing" if item is None else "not_text", f"{where} is {type_name(item)}, not an object")
        score = required_number(item.get(self.score), f"`{self.score}` of {where}")
        return read_answer(item.get(self.answer), f"`{self.answer}` of {where}"), score

    def _ranked(self, answers: list[Scored]) -> list[tuple[Scored, Scored]]:
        if self.score is not None:
            answers = sorted(answers, key=lambda scored: -(scored[1] or 0.0))
        combinations = [(answers[0], answers[-1])]
        if self.every:
            combinations = list(itertools.combinations(answers, 2))
        return [(better, worse) for better, worse in combinations if self.score is None or better[1] != worse[1]]


@dataclass(frozen=True, slots=True)
class SingleRows:
    """Rows with one answer: to be paired by their label, or to learn from as they are."""

    prompt: PromptReader
    answer: str
    tools: str | None = None
    label: str | None = None
    extras: Extras = NO_EXTRAS

    def single(self, values: dict[str, Any]) -> tuple[Messages, Messages, list[Any] | None]:
        """Return prompt, answer and tools of a row, or raise its FlawError."""
        value, where = values.get(self.answer), f"`{self.answer}`"
        tools = None if self.tools is None else read_definitions(values.get(self.tools), f"`{self.tools}`")
        if self.prompt.column is not None:
            return self.prompt(values), read_answer(value, where), tools
        turns = read(turns_of(value, where), where)
        if turns and turns[-1]["role"] != "assistant":
            raise FlawError("role_order", f"{where} ends with a turn that is not the assistant's: there is no answer")
        prompt = self.prompt.confirm(values, check_prompt(turns[:-1]))
        return prompt, check_answer(turns[-1:], where), tools

    def __call__(self, values: dict[str, Any]) -> list[Unpaired]:
        """Return the labelled answer of a row, or raise its FlawError."""
        good = truth_of(values.get(self.label or ""), f"`{self.label}`")
        prompt, answer, tools = self.single(values)
        row = Unpaired(prompt, answer, good, tools)
        self.extras.label(row, values)
        return [row]
