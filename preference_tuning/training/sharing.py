"""One batch over several processes: the same rows, loss and metrics as in one process with a batch of that size.

A global batch is cut into shares, row by row, and each process runs its own. The last batch may be short: shares may
then differ by a row or be empty. No row is repeated to fill them up (accelerate's way, which counts rows twice).
"""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from preference_tuning.training import processes

ROWS = "rows_here"
"""The key of a batch that tells how many rows of it are real."""

LONGEST = "longest"
"""The key of a batch that tells how many tokens its longest row has, prompt and one answer."""

PIECES = "pieces"
"""The key of a batch under which its pieces lie, each a batch."""

WEIGHT = "weight"
"""The key of a piece that tells its share in the mean of its batch; a batch that is not cut has no such key."""

NOTES = (ROWS, LONGEST, WEIGHT)
"""What is no input of the model."""


class ShareOfBatches(Sampler[list[int]]):
    """The global batches of a sampler, of which this process takes every n-th row; some may be empty.

    accelerate reads ``batch_size`` and ``drop_last``, and sets the epoch of ``sampler``.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int) -> None:
        """Cut the order of ``sampler`` into global batches of ``batch_size`` rows."""
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, False
        self._batches = BatchSampler(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        assert isinstance(self._batches, Sized)
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[processes.rank() :: processes.count()]


class Counted:
    """A collator that tells how many rows it was given; for an empty share it lays out a stand-in that counts nothing.

    The stand-in keeps the processes in step: each must run the model, or the others would wait for it for ever.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], stand_in: dict[str, Any]) -> None:
        """Wrap ``collate``; ``stand_in`` is a row that it can lay out."""
        self._collate, self._stand_in = collate, stand_in

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Lay out the rows."""
        batch = self._collate(examples or [self._stand_in])
        if not examples:
            batch.update({name: batch[name][:0] for name in ("labels", "shift_labels") if name in batch})
        batch[ROWS] = len(examples)
        batch[LONGEST] = max(map(longest, examples), default=0)
        return batch


def longest(row: dict[str, Any]) -> int:
    """Return the tokens of a row's prompt and its longer answer."""
    answers = (len(row[name]) for name in ("chosen_ids", "rejected_ids") if name in row)
    return len(row["prompt_ids"]) + max(answers)


class Cut:
    """A collator that lays out a batch in pieces, each of every n-th row, so that memory has to hold one at a time.

    There are as many pieces in every process and of every batch, also where one has no row, so that all processes run
    the same passes.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], pieces: int) -> None:
        """Wrap ``collate``, which must take no rows too."""
        self._collate, self._pieces = collate, pieces

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Lay out the rows."""
        if self._pieces == 1:
            return self._collate(examples)
        pieces = [self._collate(examples[i :: self._pieces]) for i in range(self._pieces)]
        # Where the loop counts trained tokens, over the whole batch.
        counted = [name for name in ("labels", "shift_labels") if name in pieces[0]]
        return {PIECES: pieces, **{str(name): torch.cat([piece[name] for piece in pieces]) for name in counted}}


@dataclass(frozen=True)
class Shares:
    """How many rows of a global batch each process has."""

    rows: list[int]

    @classmethod
    def of(cls, here: int) -> "Shares":
        """Return the shares of a batch of which this process has ``here`` rows; every process must call it."""
        rows = torch.zeros(processes.count())
        rows[processes.rank()] = here
        return cls([int(number) for number in processes.total(rows).tolist()])

    @property
    def here(self) -> int:
        """Rows of this process."""
        return self.rows[processes.rank()]

    @property
    def weight(self) -> float:
        """The factor that makes the mean over processes of means over their rows the mean over all rows."""
        return self.here * len(self.rows) / sum(self.rows)

    @contextmanager
    def gathered(self, accelerator: Any) -> Iterator[None]:
        """Let ``accelerator.gather`` take one value a row from shares of any size, and sums of empty ones as 0.

        ``gather_for_metrics`` becomes the same: it would drop values of the last batches as if they were repeated rows.
        """
        if len(self.rows) == 1:
            yield
            return
        plain = accelerator.gather

        def gather(values: Tensor) -> Tensor:
            if values.dim() == 0:
                return plain(values * min(self.here, 1))  # type: ignore[no-any-return]
            padded = values.new_zeros(max(self.rows), *values.shape[1:])
            padded[: self.here] = values.detach()[: self.here]
            parts = plain(padded).split(max(self.rows))
            return torch.cat([part[:size] for part, size in zip(parts, self.rows, strict=True)])

        accelerator.gather = accelerator.gather_for_metrics = gather
        try:
            yield
        finally:
            del accelerator.gather, accelerator.gather_for_metrics
