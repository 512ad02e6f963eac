"""Chat templates as Go templates: families as data, and a proof by rendering.

A Jinja template cannot be translated in general. Instead the families that models use are written down as what stands
around the text of each role; a family is right for a tokenizer if it renders conversations of every shape exactly as
the tokenizer's own template does. The Go template is made from the same data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from preference_tuning.errors import ConfigError
from preference_tuning.models import chat

Messages = Sequence[dict[str, Any]]
Shape = tuple[str, ...]
"""The roles of a conversation."""

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TEXTS = {SYSTEM: 'Answer briefly.\nAnd in "English".', USER: "What is 7 * 6?", ASSISTANT: "It is 42, {as} <ever>."}
SHAPES: tuple[Shape, ...] = ((USER,), (USER, ASSISTANT, USER), (SYSTEM, USER), (SYSTEM, USER, ASSISTANT, USER))
"""Conversations that a family is tried on; each ends where the assistant begins. None has white space at its ends:
some templates strip it, and Go templates cannot."""


class Turn(NamedTuple):
    """What stands around a text."""

    before: str
    after: str


@dataclass(frozen=True)
class Family:
    """A way to write a conversation down."""

    name: str
    user: Turn
    assistant: Turn
    opening: str
    """What makes the assistant begin."""
    system: Turn | None = None
    """None: there is no system role."""
    system_in: Literal["turn", "first", "last"] = "turn"
    """Where a system text stands: in a turn of its own, or before the text of the first or of the last user turn."""
    default: str = ""
    """System text of conversations that have none."""

    def render(self, messages: Messages) -> str | None:
        """Return a conversation as text, or None if the family has no system role and the conversation has one."""
        system = next((message["content"] for message in messages if message["role"] == SYSTEM), self.default)
        if system and self.system is None:
            return None
        turns = [message for message in messages if message["role"] != SYSTEM]
        told = self.system.before + system + self.system.after if self.system and system else ""
        place = {"turn": -1, "first": 0, "last": len(turns) - 1}[self.system_in]
        parts = [told] if self.system_in == "turn" else []
        for number, message in enumerate(turns):
            around = self.user if message["role"] == USER else self.assistant
            parts += [around.before, told if number == place else "", message["content"], around.after]
        return "".join([*parts, self.opening])

    def go(self) -> str:
        """Return it as a Go template over Ollama's ``.Messages``. Nothing in it trims white space."""
        user = f'{{{{ else if eq .Role "{USER}" }}}}{self.user.before}SYSTEM{{{{ .Content }}}}{self.user.after}'
        assistant = f'{{{{ else if eq .Role "{ASSISTANT}" }}}}{self.assistant.before}{{{{ .Content }}}}'
        start, told, system = "{{ range .Messages }}", "", ""
        if self.system is not None and self.system_in == "turn":
            system = f"{self.system.before}{{{{ .Content }}}}{self.system.after}"
        elif self.system is not None:
            around = f"{self.system.before}{{{{ $.System }}}}{self.system.after}"
            if self.system_in == "first":
                start = "{{ $first := true }}" + start
                told = f"{{{{ if and $first $.System }}}}{around}{{{{ end }}}}{{{{ $first = false }}}}"
            else:
                start = "{{ range $i, $_ := .Messages }}"
                last = "(eq (len (slice $.Messages $i)) 1)"
                told = f"{{{{ if and $.System {last} }}}}{around}{{{{ end }}}}"
        body = (
            f'{{{{ if eq .Role "{SYSTEM}" }}}}{system}{user.replace("SYSTEM", told)}{assistant}{self.assistant.after}'
        )
        return f"{start}{body}{{{{ end }}}}{{{{ end }}}}{self.opening}"


class Fitting(NamedTuple):
    """The family of a chat template."""

    family: Family
    bos: bool
    """Whether conversations begin with the tokenizer's first token, which the Go template leaves to the runtime."""


def fit(tokenizer: chat.Tokenizer) -> Fitting:
    """Return the family that renders as the chat template of a tokenizer does.

    Raises:
        ConfigError: none does, with where the closest one differs.
    """
    wanted = {shape: _rendered(tokenizer, shape) for shape in SHAPES}
    candidates = list(_candidates(tokenizer.eos_token or "", wanted))
    for family in candidates:
        if all(family.render(_conversation(shape)) == text for shape, text in wanted.items()):
            return Fitting(family, False)
    begin = tokenizer.bos_token
    if begin and all(text is None or text.startswith(begin) for text in wanted.values()):
        bare = {shape: text and text.removeprefix(begin) for shape, text in wanted.items()}
        candidates = list(_candidates(tokenizer.eos_token or "", bare))
        for family in candidates:
            if all(family.render(_conversation(shape)) == text for shape, text in bare.items()):
                return Fitting(family, True)
        wanted = bare
    raise ConfigError(_unknown(candidates, wanted))


def _candidates(eos: str, wanted: dict[Shape, str | None]) -> Iterator[Family]:
    """Yield each family as it is, without a system role, and with the default system text that a rendering shows."""
    for family in families(eos):
        yield family
        yield replace(family, system=None)
        if default := _default(family, wanted[USER,]):
            yield replace(family, default=default)


def _default(family: Family, text: str | None) -> str:
    """Return the system text with which a template begins a conversation that has none."""
    plain = family.render(_conversation((USER,))) or ""
    if family.system is None or family.system_in != "turn" or not text or not text.endswith(plain):
        return ""
    told = text.removesuffix(plain)
    before, after = family.system
    framed = told.startswith(before) and told.endswith(after) and len(told) > len(before) + len(after)
    return told[len(before) : len(told) - len(after)] if framed else ""


def families(eos: str) -> list[Family]:
    """Return the known families; some end turns with the tokenizer's own end token."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    found = [
        *(_alike("chatml", "<|im_start|>{}\n", f"{end}\n") for end in dict.fromkeys(["<|im_end|>", eos])),
        _alike("llama3", header, "<|eot_id|>"),
        _alike("zephyr", "<|{}|>\n", f"{eos}\n"),
        _alike("phi3", "<|{}|>\n", "<|end|>\n"),
    ]
    user, model = Turn("<start_of_turn>user\n", "<end_of_turn>\n"), Turn("<start_of_turn>model\n", "<end_of_turn>\n")
    found.append(Family("gemma", user, model, "<start_of_turn>model\n", Turn("", "\n\n"), "first"))
    return found + list(_mistral(eos))


def _alike(name: str, before: str, after: str) -> Family:
    """Return a family whose turns differ in the name of the role only."""
    system, user, assistant = (Turn(before.format(role), after) for role in (SYSTEM, USER, ASSISTANT))
    return Family(name, user, assistant, assistant.before, system)


def _mistral(eos: str) -> Iterator[Family]:
    """Yield the family whose spaces moved from release to release."""
    for user in (Turn("[INST] ", " [/INST]"), Turn("[INST] ", "[/INST]"), Turn("[INST]", "[/INST]")):
        for answer in (Turn("", eos), Turn(" ", eos), Turn("", f"{eos} "), Turn(" ", f"{eos} ")):
            yield Family("mistral", user, answer, "", Turn("", "\n\n"), "first")
            yield Family("mistral", user, answer, "", Turn("", "\n\n"), "last")
            yield Family("mistral", user, answer, "", Turn("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"))


def _conversation(shape: Shape) -> list[dict[str, Any]]:
    return [{"role": role, "content": TEXTS[role]} for role in shape]


def _rendered(tokenizer: chat.Tokenizer, shape: Shape) -> str | None:
    """Return a conversation as the tokenizer's template renders it, or None where it refuses it."""
    import jinja2

    try:
        return chat.render(tokenizer, _conversation(shape), answer=True)
    except jinja2.TemplateError:
        return None


def _unknown(candidates: list[Family], wanted: dict[Shape, str | None]) -> str:
    """Return the error for a template of no known family: where the closest one differs first."""
    differing = {family: _difference(family, wanted) for family in candidates}
    closest = max(differing, key=lambda family: differing[family][:2])
    _, place, shape = differing[closest]
    theirs, ours = wanted[shape], closest.render(_conversation(shape))
    shown = [repr(text[max(0, place - 20) : place + 40]) if text is not None else "nothing" for text in (theirs, ours)]
    known = ", ".join(dict.fromkeys(family.name for family in candidates))
    return (
        f"export: the model's chat template is of no known family ({known}). The closest is {closest.name}: in a "
        f"conversation of {', '.join(shape)} the model has {shown[0]} where it has {shown[1]}. Write a Go template for "
        "it, and give it with --template FILE"
    )


def _difference(family: Family, wanted: dict[Shape, str | None]) -> tuple[int, int, Shape]:
    """Return how many shapes fit, and in the first that does not, where it differs."""
    fitting, place, differing = 0, 0, SHAPES[0]
    for shape in reversed(SHAPES):
        theirs, ours = wanted[shape], family.render(_conversation(shape))
        if theirs == ours:
            fitting += 1
            continue
        both = zip(theirs or "", ours or "", strict=False)
        short = min(len(theirs or ""), len(ours or ""))
        place, differing = next((i for i, (a, b) in enumerate(both) if a != b), short), shape
    return fitting, place, differing
