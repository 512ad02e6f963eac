"""The batches of a stage, from the lengths of a sample of the rows: what the largest one holds, and what an epoch does.

Counted as the engine lays rows out (``models.tree``): a pair's prompt once, no padding in the linear layers, attention
over padded sequences.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SORTED_BATCHES = 8
"""Batches sorted together by length, as in ``training.trainers``."""


class Row(NamedTuple):
    """Tokens of a prompt and of its answers: one in SFT, two in DPO."""

    prompt: int
    answers: tuple[int, ...]

    @property
    def length(self) -> int:
        """What rows are sorted by."""
        return self.prompt + sum(self.answers)

    def cut(self, room: int) -> "Row":
        """Return the row as it is trained on: prompt and answer within ``room`` tokens."""
        prompt = min(self.prompt, room - 1)
        return Row(prompt, tuple(min(answer, room - prompt) for answer in self.answers))


class Attended(NamedTuple):
    """Sequences whose attention is computed together."""

    sequences: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once."""

    tokens: int
    """Positions of the linear layers."""
    answers: int
    """Positions of the head."""
    attention: tuple[Attended, ...]


def lay_out(rows: Sequence[Row], shared: bool) -> Batch:
    """Return the batch that the rows make; ``shared``: as a token tree, else a padded sequence an answer."""
    answers = sum(sum(row.answers) for row in rows)
    whole = [row.prompt + answer for row in rows for answer in row.answers[: None if not shared else 1]]
    if not shared:
        block = Attended(len(whole), max(whole), max(whole))
        return Batch(block.sequences * block.queries, answers, (block,))
    ends = []
    for row in rows:
        for answer in row.answers[1:]:
            # A sequence that is mostly known asks with its new end alone.
            if 2 * answer >= row.prompt + answer:
                whole.append(row.prompt + answer)
            else:
                ends.append((answer, row.prompt + answer))
    blocks = [Attended(len(whole), max(whole), max(whole))]
    if ends:
        blocks.append(Attended(len(ends), max(end for end, _ in ends), max(keys for _, keys in ends)))
    return Batch(sum(row.length for row in rows), answers, tuple(blocks))


def largest(rows: Sequence[Row], size: int, shared: bool, seed: int, by_length: bool = True) -> Batch:
    """Return the largest batch that rows in a random order make, sorted by length in windows as the trainer does it."""
    order = list(rows)
    random.Random(seed).shuffle(order)  # noqa: S311
    window = size * (SORTED_BATCHES if by_length else 1)
    batches = []
    for start in range(0, len(order), window):
        some = sorted(order[start : start + window], key=lambda row: row.length)
        batches += [some[i : i + size] for i in range(0, len(some), size)]
    return max((lay_out(batch, shared) for batch in batches), key=lambda batch: batch.tokens)
