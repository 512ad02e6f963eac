"""Probes: a few held-out pairs with the candidate's log-probability of every answer token, as they were measured.

They stay with the model when it is published. Whoever loads it later, from wherever, scores them again
(``registry.roundtrip``): other weights, another base model, tokenizer or chat template give other numbers.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from preference_tuning.models import chat
from preference_tuning.models.compute import Compute

COUNT = 4
"""Pairs: those that come first by the hash of their content, so that the same data has the same probes."""


class Probe(BaseModel):
    """One pair: its prompt as messages, as text and as tokens, and its answers as tokens with what they measured."""

    content: str
    """Hash of the pair."""
    messages: list[chat.Message]
    tools: list[Any] | None
    text: str
    """The prompt as the chat template renders it, up to where the assistant begins."""
    text_ids: list[int]
    prompt_ids: list[int]
    """What the model read: the text's tokens, perhaps cut, up to where the answers part."""
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_logps: list[float]
    """Nats, one a token."""
    rejected_logps: list[float]

    @property
    def answers(self) -> list[list[int]]:
        """The token ids of the answers."""
        return [self.chosen_ids, self.rejected_ids]

    @property
    def logps(self) -> list[list[float]]:
        """The log-probabilities of their tokens."""
        return [self.chosen_logps, self.rejected_logps]


class Probes(BaseModel):
    """The probes of an evaluation and what they were measured on."""

    candidate: str
    device: str
    dtype: str
    """Precision of the matrix products."""
    tolerance: float
    """Nats by which a token may differ where it is scored again in this precision."""
    template_hash: str
    probes: list[Probe]


def pick(
    tokens: Any, pairs: Any, table: pa.Table, candidate: str, tokenizer: chat.Tokenizer, compute: Compute
) -> Probes:
    """Return the probes of an evaluation.

    Args:
        tokens: the token rows that were scored, in the order of their content.
        pairs: the held-out pairs as messages.
        table: of the scores, a row for each of ``tokens``.
        candidate: name of the model in the table.
        tokenizer: with the chat template of the run.
        compute: what was scored on.
    """
    from preference_tuning.models import scoring

    first = tokens.select(range(min(COUNT, len(tokens))))
    wanted = set(first["content"])
    places = {content: place for place, content in enumerate(pairs["content"]) if content in wanted}
    probes = []
    for number, row in enumerate(first):
        pair = pairs[places[row["content"]]]
        messages, tools = chat.read_messages(pair["prompt"]), chat.read_tools(pair["tools"])
        probes.append(
            Probe(
                content=row["content"],
                messages=messages,
                tools=tools,
                text=chat.render(tokenizer, messages, tools, answer=True),
                text_ids=chat.encode_prompt(tokenizer, messages, tools),
                **{name: row[name] for name in chat.PairTokens.__annotations__},
                **{f"{s}_logps": table[f"{candidate}/{s}_token_logps"][number].as_py() for s in ("chosen", "rejected")},
            )
        )
    return Probes(
        candidate=candidate,
        device=compute.device,
        dtype=compute.dtype,
        tolerance=scoring.token_tolerance(compute.dtype),
        template_hash=chat.template_hash(tokenizer),
        probes=probes,
    )


def read(path: Path) -> Probes:
    """Return the probes of a file.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged.
    """
    return Probes.model_validate_json(path.read_text(encoding="utf-8"))
