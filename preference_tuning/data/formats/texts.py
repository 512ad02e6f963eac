"""Conversations inside one text: transcripts, ChatML, and two texts that begin with the same prompt."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preference_tuning.data.formats.values import is_blank, shown, text_of
from preference_tuning.data.pair import FlawError, Messages

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class TextForm:
    """A way to write a conversation as one text."""

    name: str
    begins: Callable[[str], bool]
    turns: Callable[[str, str], Messages]
    clean: Callable[[str], str]
    """Takes the end marker from an answer that stands alone."""

    def holds(self, value: Any) -> bool:
        """Say whether a value is a conversation in this form."""
        return type(value) is str and self.begins(value)

    def read(self, value: Any, where: str) -> Any:
        """Return the turns of a text that is a conversation, the bare text of one that is not; all else as it is."""
        if type(value) is not str:
            return value
        return self.turns(value, where) if self.begins(value) else self.clean(value)

    def prompt(self, text: str, where: str) -> Messages:
        """Return the turns of a prompt, without the empty one that asks for the answer."""
        turns = self.turns(text, where) if self.begins(text) else [{"role": "user", "content": text}]
        return turns[:-1] if turns[-1]["role"] == "assistant" and is_blank(turns[-1]["content"]) else turns


def _begins_transcript(text: str) -> bool:
    return text[:200].lstrip().startswith(("Human:", "Assistant:"))


def _transcript(text: str, where: str) -> Messages:
    pieces = SPEAKER.split("\n\n" + text.lstrip())
    return [
        {"role": TRANSCRIPT_ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _begins_chatml(text: str) -> bool:
    return text[:200].lstrip().startswith(IM_START)


def _chatml(text: str, where: str) -> Messages:
    turns: Messages = []
    for number, piece in enumerate(text.split(IM_START)[1:], 1):
        role, _, rest = piece.partition("\n")
        content, _, outside = rest.partition(IM_END)
        if not is_blank(outside):
            found = shown(outside.strip())
            raise FlawError("role_order", f"turn {number} of {where} is followed by {found} outside of any turn")
        turns.append({"role": role.strip(), "content": content})
    return turns


def _chatml_answer(text: str) -> str:
    bare = text.rstrip()
    return bare.removesuffix(IM_END) if bare.endswith(IM_END) else text


TRANSCRIPTS = TextForm("transcripts", _begins_transcript, _transcript, str.strip)
CHATML = TextForm("chatml", _begins_chatml, _chatml, _chatml_answer)
TEXT_FORMS = {form.name: form for form in (TRANSCRIPTS, CHATML)}


def split_at(separator: str, chosen: Any, rejected: Any, names: tuple[str, str]) -> tuple[str, str, str]:
    """Split two texts behind the last separator that both share: the prompt with it, and the two rests.

    Raises:
        FlawError: identical, diverging, blank, or what a text may have.
    """
    better, worse = text_of(chosen, f"`{names[0]}`"), text_of(rejected, f"`{names[1]}`")
    if better == worse:
        raise FlawError("identical", f"`{names[0]}` and `{names[1]}` are the same text")
    place = better.rfind(separator, 0, _common_length(better, worse))
    if place < 0:
        raise FlawError("diverging", f"{separator!r} is not in what `{names[0]}` and `{names[1]}` both begin with")
    end = place + len(separator)
    if is_blank(better[:place]):
        raise FlawError("blank", f"nothing comes before {separator!r}")
    rests = [text_of(text[end:].strip(), f"the answer in `{n}`") for text, n in ((better, names[0]), (worse, names[1]))]
    return better[:end].strip(), rests[0], rests[1]


def _common_length(one: str, other: str) -> int:
    # Halving compares slices at memory speed; a loop over characters takes seconds on a long text.
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
