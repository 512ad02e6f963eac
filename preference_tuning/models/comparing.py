"""Several models on the same pairs: log-probabilities of every answer token, and how far each model is from another.

Adapters share the base model's weights, so a batch runs under all of them in turn, and their heads see its answer
tokens together: the divergence of two predictions needs both of them at once. Full models are read one after the other;
what a later one is compared with (hidden states at answer tokens, and the head) is kept in memory until then.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preference_tuning.models import scoring
from preference_tuning.models.family import Family
from preference_tuning.models.head import Head, compare_heads

BASE = "base"
"""The name of the base model among the models."""

State = tuple[Tensor, Head]


@dataclass(frozen=True)
class Compared:
    """A batch of b pairs under the models. Answers are numbered as in ``scoring.pair_rows``.

    Attributes:
        numbers: [b] the rows of the batch.
        answer: [N] which answer of the batch each token belongs to.
        logps: of each model, [N] log-probabilities of the answer tokens, nats.
        divergences: of each model with a reference, [N] KL(model || reference) at these tokens, nats.
    """

    numbers: list[int]
    answer: Tensor
    logps: dict[str, Tensor]
    divergences: dict[str, Tensor]


class Comparison:
    """The models of a family on pairs, in batches of similar length."""

    def __init__(
        self,
        family: Family,
        references: Mapping[str, str],
        pairs: Any,
        batch_size: int,
        shared: bool,
    ) -> None:
        """Prepare to score.

        Args:
            family: the base model and what was tuned from it.
            references: by the name of a model, that of the one it is compared with.
            pairs: token rows, as ``models.rows`` makes them.
            batch_size: pairs at once.
            shared: as token trees; else a sequence a row.
        """
        self._family, self._references, self._shared = family, dict(references), shared
        self._pairs = pairs
        self._batches = list(scoring.batches(pairs, batch_size))

    def run(self, names: Sequence[str]) -> Iterator[Compared]:
        """Yield every batch under the models ``names``, once for all of them or several times for some of them each."""
        with torch.no_grad():
            yield from self._together(names) if self._family.shares else self._in_turn(names)

    def _together(self, names: Sequence[str]) -> Iterator[Compared]:
        for numbers in self._batches:
            rows = self._rows(numbers)
            states = {name: self._state(name, rows) for name in names}
            yield self._compared(numbers, rows, states, self._references)

    def _in_turn(self, names: Sequence[str]) -> Iterator[Compared]:
        kept: dict[str, list[State]] = {}
        for place, name in enumerate(names):
            reference = self._references.get(name)
            later = [self._references.get(other) for other in names[place + 1 :]]
            states = []
            for number, numbers in enumerate(self._batches):
                rows = self._rows(numbers)
                both = {name: self._state(name, rows)}
                if reference is not None:
                    both[reference] = kept[reference][number]
                found = self._compared(numbers, rows, both, {name: reference} if reference is not None else {})
                found.logps.pop(reference or "", None)
                yield found
                states.append(both[name])
            kept = {other: values for other, values in kept.items() if other in later}
            if name in later:
                kept[name] = states

    def _rows(self, numbers: list[int]) -> scoring.Rows:
        base = self._family.base
        pad_id = base.tokenizer.pad_token_id
        return scoring.pair_rows([self._pairs[i] for i in numbers], self._shared, pad_id).to(base.device)

    def _state(self, name: str, rows: scoring.Rows) -> State:
        with self._family.member(None if name == BASE else name) as model:
            return scoring.answer_states(model, rows, self._family.base.dtype), Head.of(model)

    def _compared(
        self, numbers: list[int], rows: scoring.Rows, states: dict[str, State], references: Mapping[str, str]
    ) -> Compared:
        logps, divergences = compare_heads(states, references, rows.targets, self._family.base.dtype)
        return Compared(numbers, rows.answer, logps, divergences)
