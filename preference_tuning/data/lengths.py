"""Rows in tokens, against the limits: exactly, and without tokenising the rows that cannot reach them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from preference_tuning.data.content import TextRules
from preference_tuning.data.pair import Messages, Pair
from preference_tuning.models import chat

MARKER = re.compile(r"<\|[^|<>\s]+\|>")
NORMALISED = 3
"""Bytes that a tokenizer's Unicode normalisation (NFC) may make of one."""


class Examined(NamedTuple):
    """What tokens make of a pair."""

    problems: list[tuple[str, str]]
    """Each with its detail."""
    lengths: list[int] | None = None
    """Of the prompt and of each answer, in tokens, before any cut; None where nobody had to count."""


class TokenRules:
    """Checks pairs against the room that training gives them."""

    def __init__(self, tokenizer: chat.Tokenizer, room: chat.Room, sft_length: int) -> None:
        self.tokenizer, self.room = tokenizer, room
        self._sft_length = sft_length
        self._template = str(tokenizer.chat_template)
        self._overheads: dict[tuple[str, ...], int | chat.Refused] = {}
        self._normalises = tokenizer.backend_tokenizer.normalizer is not None

    def for_sft(self) -> "TokenRules":
        """Return the rules for answers that only SFT trains on."""
        return TokenRules(self.tokenizer, replace(self.room, max_length=self._sft_length), self._sft_length)

    def text_rules(self) -> TextRules:
        """Return the rules for text under this tokenizer: its special tokens, and the markers of its template."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return TextRules(special | set(MARKER.findall(self._template)))

    def examine(self, pairs: Sequence[Pair]) -> list[Examined]:
        """Return for each pair what the limits and the template make of it."""
        found = [Examined([]) for _ in pairs]
        long: list[int] = []
        for i, pair in enumerate(pairs):
            overhead = self._overhead(pair)
            if isinstance(overhead, chat.Refused):
                found[i].problems.append((overhead.problem, overhead.detail))
                continue
            if unseen := self._unseen(pair):
                found[i].problems.append(("no_tools", unseen))
            if pair.tools or not self._fits(pair, overhead):
                long.append(i)
        conversations = [
            chat.Conversation(p.prompt, [side for side in (p.chosen, p.rejected) if side], p.tools)
            for p in (pairs[i] for i in long)
        ]
        for i, encoded in zip(long, chat.encode(self.tokenizer, conversations, self.room), strict=True):
            found[i] = Examined(found[i].problems + self._of(encoded), lengths_of(encoded))
        return found

    def _of(self, row: chat.Encoded | chat.Refused) -> list[tuple[str, str]]:
        if isinstance(row, chat.Refused):
            return [(row.problem, row.detail)]
        found = []
        if row.prompt_cut:
            found.append(("long_prompt", f"the prompt is cut to its last {len(row.prompt_ids)} tokens"))
        answer_room = self.room.max_length - len(row.prompt_ids)
        if any(row.answer_cut):
            detail = f"prompt and answer have {max(row.lengths)} tokens, and max_length is {self.room.max_length}"
            found.append(("answer_cut", detail))
            if len(row.answer_ids) == 2 and row.answer_ids[0] == row.answer_ids[1]:
                found.append(("identical_after_cut", f"the answers differ only after their first {answer_room} tokens"))
        return found

    def _fits(self, pair: Pair, overhead: int) -> bool:
        """Whether a pair cannot reach a limit: no token of a byte-level vocabulary covers less than a byte."""
        prompt = self._bytes(pair.prompt) + overhead
        answer = max(self._bytes(pair.chosen), self._bytes(pair.rejected))
        bound = self.room.max_prompt_length or self.room.max_length
        return prompt <= bound and prompt + answer <= self.room.max_length

    def _bytes(self, messages: Messages) -> int:
        text = "".join(message["content"] for message in messages)
        if text.isascii():
            return len(text)
        return len(text.encode()) * (NORMALISED if self._normalises else 1)

    def _overhead(self, pair: Pair) -> int | chat.Refused:
        """Return the bytes that the template adds to turns of these roles, rendered once for each order of roles."""
        roles = tuple(message["role"] for message in pair.prompt)
        if any("tool_calls" in message for message in pair.prompt) or len(pair.chosen) + len(pair.rejected) > 2:
            return self.room.max_length  # rare enough to be tokenised
        if roles not in self._overheads:
            self._overheads[roles] = self._measured(roles)
        return self._overheads[roles]

    def _measured(self, roles: Sequence[str]) -> int | chat.Refused:
        turns: Messages = [{"role": role, "content": "x"} for role in (*roles, "assistant")]
        row = chat.Conversation(turns[:-1], [turns[-1:]])
        (encoded,) = chat.encode(self.tokenizer, [row], chat.Room(max_length=1_000_000))
        if isinstance(encoded, chat.Refused):
            return encoded
        return max(len(chat.render(self.tokenizer, turns).encode()), max(encoded.lengths)) - len(turns)

    def _unseen(self, pair: Pair) -> str | None:
        """Return what of a pair's tools the template would not show to the model."""
        if pair.tools and "tools" not in self._template:
            return "the chat template has no place for the tools of the row"
        calls = any("tool_calls" in m for side in (pair.prompt, pair.chosen, pair.rejected) for m in side)
        if calls and "tool_calls" not in self._template:
            return "the chat template does not show tool calls"
        return None


def lengths_of(row: chat.Encoded | chat.Refused) -> list[int] | None:
    """Return the tokens of a row's prompt and of each answer, before any cut."""
    if isinstance(row, chat.Refused):
        return None
    return [row.prompt_length, *(length - row.prompt_length for length in row.lengths)]


def measure(rows: Sequence[dict[str, Any]], tokens: TokenRules | None) -> dict[str, list[int]]:
    """Return the lengths of prompt, chosen and rejected of stored rows: tokens, or characters without a tokenizer.

    Args:
        rows: as spooled; those with ``lengths`` were counted when they were read.
        tokens: the rules with the tokenizer.
    """
    sides = ("prompt", "chosen", "rejected")
    if tokens is None:
        return {side: [sum(len(m["content"]) for m in row[side]) for row in rows] for side in sides}
    uncounted = [conversation_of(row) for row in rows if row["lengths"] is None]
    encoded = iter(chat.encode(tokens.tokenizer, uncounted, chat.Room(max_length=10**9)))
    counted = [row["lengths"] or lengths_of(next(encoded)) for row in rows]
    return {side: [row[i] for row in counted if row] for i, side in enumerate(sides)}


def conversation_of(row: dict[str, Any]) -> chat.Conversation:
    """Return a stored row as templates take it."""
    prompt, *answers = (chat.read_messages(row[side]) for side in ("prompt", "chosen", "rejected"))
    return chat.Conversation(prompt, answers, chat.read_tools(row["tools"]))
