"""A pair's content: what identifies it, which group it belongs to, and what its text must not hold."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from preference_tuning import fingerprint
from preference_tuning.data.pair import FlawError, Messages, Pair

CONTROL = bytes(code for code in (*range(32), 127) if chr(code) not in "\t\n\r")
CONTROL_CHARACTER = re.compile("[" + re.escape(CONTROL.decode()) + "]")

MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|begin_of_text|>", "<|end|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
"""Looked for where no tokenizer says which tokens are special: they stand in no ordinary text."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode


@dataclass(slots=True)
class Keys:
    """What a pair is compared by."""

    content: bytes
    """sha256 of the pair: prompt, chosen, rejected and tools."""
    answers: bytes
    """Hash of the prompt and both answers, whichever is preferred."""
    swapped: bool
    """Whether chosen is the second of the two answers in the order of their hashes."""
    prompt: bytes
    """Hash of the prompt, white space and case aside."""
    group: str
    """Rows of one group stay on one side of the split."""
    size: int
    """Bytes of the text, as UTF-8."""


def keys_of(pair: Pair) -> Keys:
    """Return the keys of a pair, or of an SFT answer: a pair without a rejected one.

    Raises:
        FlawError: its text holds half a surrogate pair, which is no text, or the answers are identical.
    """
    try:
        prompt = _encode([pair.prompt, pair.tools] if pair.tools else pair.prompt).encode()
        chosen, rejected = _encode(pair.chosen).encode(), _encode(pair.rejected).encode()
    except UnicodeEncodeError:
        raise FlawError("not_text", f"{_where_surrogate(pair)} holds half of a surrogate pair") from None
    if pair.rejected and chosen == rejected:
        raise FlawError("identical", "`chosen` and `rejected` are the same")
    prompt_hash, chosen_hash, rejected_hash = (hashlib.sha256(part).digest() for part in (prompt, chosen, rejected))
    swapped = chosen_hash > rejected_hash
    answers = (rejected_hash, chosen_hash) if swapped else (chosen_hash, rejected_hash)
    by_prompt = group_of_prompt(pair.prompt)
    return Keys(
        content=hashlib.sha256(prompt_hash + chosen_hash + rejected_hash).digest(),
        answers=hashlib.blake2b(prompt_hash + b"".join(answers), digest_size=16).digest(),
        swapped=swapped,
        prompt=bytes.fromhex(by_prompt),
        group=by_prompt if pair.group is None else fingerprint.of_value(["column", pair.group])[:32],
        size=len(prompt) + len(chosen) + len(rejected),
    )


def group_of_prompt(prompt: Messages) -> str:
    """Return the hash, 32 hex digits, that prompts share which differ only in white space and case."""
    return fingerprint.of_value([[m["role"], " ".join(m["content"].casefold().split())] for m in prompt])[:32]


def share_of(group: str, seed: int, purpose: str = "") -> float:
    """Return a number in [0, 1) that only the group, the seed and the purpose decide.

    Equal groups stay together, and new rows never move old ones.
    """
    key = seed.to_bytes(8, "big") if seed < 2**64 else str(seed).encode()[:64]
    digest = hashlib.blake2b(group.encode(), key=key, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


class TextRules:
    """What the text of a pair must not hold, and that its answers differ in more than white space and case."""

    def __init__(self, special_tokens: Iterable[str] = MARKERS) -> None:
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        # Nearly no text holds even the beginnings; so most rows never meet the regular expression.
        self._beginnings = sorted({token[:2] for token in tokens})
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def problems(self, pair: Pair) -> list[tuple[str, str]]:
        """Return ``(problem, detail)`` of what is wrong with the text of a pair."""
        text = "\n".join(m["content"] for side in (pair.prompt, pair.chosen, pair.rejected) for m in side)
        found = []
        raw = text.encode()
        if len(raw.translate(None, CONTROL)) != len(raw):
            where, match = _first(pair, CONTROL_CHARACTER)
            found.append(("control_characters", f"{where} holds U+{ord(match):04X}"))
        if any(beginning in text for beginning in self._beginnings) and self._special.search(text):
            where, match = _first(pair, self._special)
            found.append(("special_tokens", f"{where} holds {match}"))
        if pair.rejected and _same(pair.chosen, pair.rejected):
            found.append(("identical_folded", "`chosen` and `rejected` differ only in white space or case"))
        return found


def _first(pair: Pair, pattern: re.Pattern[str]) -> tuple[str, str]:
    for name in ("prompt", "chosen", "rejected"):
        for message in getattr(pair, name):
            if match := pattern.search(message["content"]):
                return f"`{name}`", match.group()
    raise AssertionError("the pattern was found in the joined text")


def _same(chosen: Messages, rejected: Messages) -> bool:
    """Whether two answers are equal but for white space and case."""
    one, other = chosen[0]["content"], rejected[0]["content"]
    # Most answers differ in their first letter already.
    if one.lstrip()[:1].casefold() != other.lstrip()[:1].casefold() or len(chosen) != len(rejected):
        return False
    pairs = zip(chosen, rejected, strict=True)
    return all(
        a.get("tool_calls") == b.get("tool_calls")
        and a["content"].casefold().split() == b["content"].casefold().split()
        for a, b in pairs
    )


def _where_surrogate(pair: Pair) -> str:
    for name in ("prompt", "chosen", "rejected"):
        if any("\ud800" <= character <= "\udfff" for m in getattr(pair, name) for character in m["content"]):
            return f"`{name}`"
    return "a tool call"
