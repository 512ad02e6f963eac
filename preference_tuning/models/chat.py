"""Chat templates, and pairs as tokens: rendered once, in one way, for SFT, DPO, evaluation and serving."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from preference_tuning.errors import ConfigError

Message = dict[str, Any]
Tokenizer = Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + 'END' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


END_OF_TURN = "<|im_end|>"


class PairTokens(TypedDict):
    """A pair as token ids; prompt + chosen and prompt + rejected are what the model reads."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Room:
    """How long a row may be, in tokens, and what happens to a prompt that takes too much of it."""

    max_length: int
    """Prompt plus answer; an answer is cut to what fits."""
    max_prompt_length: int | None = None
    """Upper bound of the prompt. None: whatever leaves room for an answer."""
    keep_end: bool = False
    """Cut the beginning of a prompt that is too long, instead of refusing the row."""

    def prompt(self, longest_answer: int) -> int:
        """Return how many tokens are left of a prompt that is too long, beside an answer of this length.

        An answer keeps what it needs, up to half of the row, so a bound on the prompt never empties an answer.
        """
        rest = self.max_length - min(longest_answer, max(1, self.max_length // 2))
        return min(rest, self.max_prompt_length or rest)


class Conversation(NamedTuple):
    """A prompt, one or two answers to it, and the tools that the prompt offers."""

    prompt: list[Message]
    answers: list[list[Message]]
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids, cut to its room."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]
    prompt_cut: bool
    answer_cut: list[bool]
    lengths: list[int]
    """Of prompt and each answer together, before any cut."""
    prompt_length: int
    """Of the prompt, before any cut."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a conversation cannot be trained on: a field of ``config.Problems``, and what exactly is wrong."""

    problem: str
    detail: str


def set_template(tokenizer: Tokenizer, template: str | None) -> None:
    """Give the tokenizer the chat template that the config asks for, and make sure that it has one and a padding token.

    ChatML turns end with ``<|im_end|>`` where the vocabulary has it as a token, and with the tokenizer's own end
    token where it does not: a base model then learns to stop at a token it already has, and no embedding is added.

    Raises:
        ConfigError: there is no template, or it cannot be rendered.
    """
    if template == "chatml":
        known = END_OF_TURN in tokenizer.get_vocab()
        if known:
            tokenizer.eos_token = END_OF_TURN
        tokenizer.chat_template = CHATML.replace("END", tokenizer.eos_token)
    elif template is not None:
        path = Path(template).expanduser()
        if not path.is_file():
            raise ConfigError(f"base_model.chat_template: no such file: {path.absolute()} (or write `chatml`)")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; set base_model.chat_template: chatml, or a Jinja file")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def template_hash(tokenizer: Tokenizer) -> str:
    """Return the sha256 of the chat template in use."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return the sha256 of everything that decides how a conversation becomes tokens."""
    parts = f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.chat_template}\0{tokenizer.special_tokens_map}"
    return hashlib.sha256(parts.encode()).hexdigest()


def read_messages(stored: list[dict[str, Any]]) -> list[Message]:
    """Return messages of an Arrow table, where each has every key and tool calls are JSON, as templates take them."""
    messages = [{key: value for key, value in message.items() if value is not None} for message in stored]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
    return messages


def read_tools(stored: str | None) -> list[Any] | None:
    """Return the tools of a row of an Arrow table, where they are JSON."""
    return json.loads(stored) if stored else None


def render(tokenizer: Tokenizer, messages: list[Message], tools: list[Any] | None = None, answer: bool = False) -> str:
    """Return a conversation as the text that is tokenised; with ``answer``, up to where the assistant begins.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
    """
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
    return text


def encode_prompt(tokenizer: Tokenizer, prompt: list[Message], tools: list[Any] | None = None) -> list[int]:
    """Return the token ids of a prompt, up to where the assistant begins to answer."""
    return list(tokenizer(render(tokenizer, prompt, tools, answer=True), add_special_tokens=False)["input_ids"])


def encode(tokenizer: Tokenizer, rows: Sequence[Conversation], room: Room) -> list[Encoded | Refused]:
    """Return each conversation as tokens, or why it has none.

    Each answer is cut to what fits beside the prompt. The prompt ends where the rendered conversations part from it,
    as TRL does it (trl/trainer/dpo_trainer.py, ``tokenize_fn``).
    """
    rendered = [_rendered(tokenizer, row) for row in rows]
    texts = [text for row in rendered if not isinstance(row, Refused) for text in row]
    only_ids = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids = iter(tokenizer(texts, **only_ids)["input_ids"] if texts else [])
    return [row if isinstance(row, Refused) else _cut(tokenizer, [next(ids) for _ in row], room) for row in rendered]


def _rendered(tokenizer: Tokenizer, row: Conversation) -> list[str] | Refused:
    import jinja2

    try:
        prompt = render(tokenizer, row.prompt, row.tools, answer=True)
        return [prompt, *(render(tokenizer, row.prompt + answer, row.tools) for answer in row.answers)]
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        return Refused("role_order", f"the chat template refuses the conversation: {error}")


def _cut(tokenizer: Tokenizer, ids: list[list[int]], room: Room) -> Encoded | Refused:
    alone, *whole = ids
    end = min(_common_prefix(alone, one) for one in whole)
    if end == 0:
        return Refused("role_order", "the chat template gives the prompt and the answers no common beginning")
    prompt, answers = alone[:end], [one[end:] for one in whole]
    most = min(room.max_length - 1, room.max_prompt_length or room.max_length)
    if end > most:
        if not room.keep_end:
            bound = "max_prompt_length" if room.max_prompt_length and end < room.max_length else "max_length"
            limit = room.max_prompt_length if bound == "max_prompt_length" else room.max_length
            return Refused("long_prompt", f"the prompt has {end} tokens ({bound} is {limit})")
        prompt = _end(prompt, room.prompt(max(map(len, answers))), tokenizer.bos_token_id)
    left = room.max_length - len(prompt)
    return Encoded(
        prompt_ids=prompt,
        answer_ids=[answer[:left] for answer in answers],
        prompt_cut=end > most,
        answer_cut=[len(answer) > left for answer in answers],
        lengths=[len(one) for one in whole],
        prompt_length=end,
    )


def _end(prompt: list[int], length: int, first: int | None) -> list[int]:
    """Return the last tokens of a prompt; a model that knows text only with its first token keeps that one."""
    if first is not None and prompt[0] == first and length > 1:
        return [first, *prompt[len(prompt) - length + 1 :]]
    return prompt[len(prompt) - length :]


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
