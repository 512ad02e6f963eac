"""Rows become pairs by the format that is recognised, and looked at anew when a column appears that was not there."""

from collections.abc import Callable
from typing import Any, Protocol

from preference_tuning.data import formats
from preference_tuning.data.pair import Pair, Unpaired


class Format(Protocol):
    """How the rows of a source are read."""

    @property
    def format(self) -> str:
        """Its name."""

    @property
    def description(self) -> str:
        """How it was recognised."""

    def convert(self, values: dict[str, Any]) -> list[Pair] | list[Unpaired]:
        """Return the pairs of a row, or raise FlawError."""


Recognise = Callable[[list[dict[str, Any]]], Format]


class Converter:
    """Converts rows by the format of those seen so far.

    JSON rows need not have the same fields. One that first appears late in a file (``system``, say) would else be
    left out of the prompt without a word.
    """

    def __init__(self, recognise: Recognise, sample: list[dict[str, Any]]) -> None:
        self._recognise, self._sample = recognise, sample
        self._columns = {column for row in sample for column in row}
        self.format = recognise(sample)

    def __call__(self, values: dict[str, Any]) -> list[Pair] | list[Unpaired]:
        """Return the pairs of a row.

        Raises:
            FlawError: the row cannot be used.
            DataError: it has a column that makes the format ambiguous.
        """
        if not values.keys() <= self._columns:
            new = values.keys() - self._columns
            self._columns |= new
            if formats.matters(new):
                self._sample.append(values)
                self.format = self._recognise(self._sample)
        return self.format.convert(values)
