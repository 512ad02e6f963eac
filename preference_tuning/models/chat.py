"""Chat templates, and pairs as tokens: rendered once, in one way, for SFT, DPO, evaluation and serving."""

import hashlib
from pathlib import Path
from typing import Any, TypedDict

from preference_tuning.errors import ConfigError

Message = dict[str, str]
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


def encode_prompt(tokenizer: Tokenizer, prompt: list[Message]) -> list[int]:
    """Return the token ids of a prompt, up to where the assistant begins to answer."""
    return _ids(tokenizer, prompt, add_generation_prompt=True)


def encode_pair(
    tokenizer: Tokenizer, prompt: list[Message], chosen: list[Message], rejected: list[Message], max_length: int
) -> PairTokens | None:
    """Return a pair as tokens, or None if the prompt leaves no room for an answer within ``max_length``.

    Each answer is cut to what fits beside the prompt. The prompt ends where the rendered conversations part from it,
    as TRL does it (trl/trainer/dpo_trainer.py, ``tokenize_fn``).
    """
    alone = encode_prompt(tokenizer, prompt)
    with_chosen = _ids(tokenizer, prompt + chosen)
    with_rejected = _ids(tokenizer, prompt + rejected)
    end = min(_common_prefix(alone, with_chosen), _common_prefix(alone, with_rejected))
    if end >= max_length or end == 0:
        return None
    return PairTokens(
        prompt_ids=alone[:end],
        chosen_ids=with_chosen[end:max_length],
        rejected_ids=with_rejected[end:max_length],
    )


def _ids(tokenizer: Tokenizer, messages: list[Message], **kwargs: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return list(encoded["input_ids"])


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
