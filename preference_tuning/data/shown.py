"""Ten pairs as the model reads them: the template applied, and which tokens are trained on."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from preference_tuning.data.lengths import TokenRules, conversation_of
from preference_tuning.models import chat

SHOWN = 10
Kind = Literal["prompt", "chosen", "rejected", "cut"]


class Piece(BaseModel):
    """Some text of a row."""

    text: str
    kind: Kind
    """prompt: read and not trained on; chosen, rejected: trained on; cut: does not fit."""
    special: bool = False
    """Whether it is a special token."""


class Shown(BaseModel):
    """A pair as the model reads it."""

    source: str
    row: int
    split: str
    pieces: list[Piece]
    tokens: dict[str, int] | None
    """Tokens of each part; None where no tokenizer is known."""


def show(rows: Sequence[dict[str, Any]], split: str, tokens: TokenRules | None) -> list[Shown]:
    """Return stored rows as the model reads them; without a tokenizer, in plain ChatML."""
    return [_shown(row, split, tokens) if tokens else _plain(row, split) for row in rows]


def _shown(row: dict[str, Any], split: str, tokens: TokenRules) -> Shown:
    tokenizer = tokens.tokenizer
    conversation = conversation_of(row)
    encoded, whole = (
        chat.encode(tokenizer, [conversation], room)[0]
        for room in (tokens.room, chat.Room(max_length=10**9, keep_end=True))
    )
    if isinstance(encoded, chat.Refused) or isinstance(whole, chat.Refused):
        return _plain(row, split)
    special = set(tokenizer.all_special_ids)
    cut = len(whole.prompt_ids) - len(encoded.prompt_ids)
    pieces = _pieces(tokenizer, whole.prompt_ids[:cut] if encoded.prompt_cut else [], "cut", special)
    pieces += _pieces(tokenizer, encoded.prompt_ids, "prompt", special)
    kinds: tuple[Kind, Kind] = ("chosen", "rejected")
    for kind, ids, full in zip(kinds, encoded.answer_ids, whole.answer_ids, strict=True):
        pieces += _pieces(tokenizer, ids, kind, special) + _pieces(tokenizer, full[len(ids) :], "cut", special)
    counts = {"prompt": len(encoded.prompt_ids), **dict(zip(kinds, map(len, encoded.answer_ids), strict=True))}
    return Shown(source=row["source"] or "", row=row["row"], split=split, pieces=pieces, tokens=counts)


def _pieces(tokenizer: chat.Tokenizer, ids: list[int], kind: Kind, special: set[int]) -> list[Piece]:
    """Return token ids as text, special tokens apart."""
    pieces: list[Piece] = []
    start = 0
    for end in [*(i for i, token in enumerate(ids) if token in special), len(ids)]:
        if text := tokenizer.decode(ids[start:end]):
            pieces.append(Piece(text=text, kind=kind))
        if end < len(ids):
            pieces.append(Piece(text=tokenizer.decode([ids[end]]), kind=kind, special=True))
        start = end + 1
    return pieces


def _plain(row: dict[str, Any], split: str) -> Shown:
    pieces = [_turn(message, "prompt") for message in row["prompt"]]
    pieces += [_turn(message, "chosen") for message in row["chosen"]]
    pieces += [_turn(message, "rejected") for message in row["rejected"]]
    return Shown(source=row["source"] or "", row=row["row"], split=split, pieces=pieces, tokens=None)


def _turn(message: dict[str, Any], kind: Kind) -> Piece:
    content = message["content"] + (f"\n{message['tool_calls']}" if message.get("tool_calls") else "")
    return Piece(text=f"<|im_start|>{message['role']}\n{content}<|im_end|>\n", kind=kind)
