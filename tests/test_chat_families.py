"""Chat templates as Go templates: the Go text, run by a small interpreter, renders what the Jinja template renders."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from preference_tuning.errors import ConfigError
from preference_tuning.models import chat
from preference_tuning.registry.export import templates

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = CHATML.replace(
    "messages %}{{", "messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{",
)  # fmt: skip
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = LLAMA3.replace("\n\n'+ message", "\n\nToday Date: 26 Jul 2024\n\n'+ message")
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content']|trim + eos_token}}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token "
    "}}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif "
    "message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if "
    "loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

# name of the template, first token, end token, template, family, whether the runtime adds the first token
KNOWN: list[tuple[str, str, str, str, str, bool]] = [
    ("chatml", "<s>", "<|im_end|>", CHATML, "chatml", False),
    ("ours, ending with the tokenizer's own end", "<s>", "</s>", chat.CHATML.replace("END", "</s>"), "chatml", False),
    ("SmolLM2, whose first token begins turns", "<|im_start|>", "<|im_end|>", SMOLLM2, "chatml", False),
    ("chatml after a first token", "<s>", "<|im_end|>", "{{ bos_token }}" + CHATML, "chatml", True),
    ("Llama 3", "<|begin_of_text|>", "<|eot_id|>", LLAMA3, "llama3", True),
    ("Mistral 0.2", "<s>", "</s>", MISTRAL, "mistral", True),
    ("Mistral 0.3", "<s>", "</s>", MISTRAL_3, "mistral", True),
    ("Gemma", "<bos>", "<eos>", GEMMA, "gemma", True),
    ("Gemma 3", "<bos>", "<eos>", GEMMA3, "gemma", True),
    ("Phi-3", "<s>", "<|endoftext|>", PHI3, "phi3", False),
    ("Zephyr", "<s>", "</s>", ZEPHYR, "zephyr", False),
]
TALKS = [
    ["user"],
    ["user", "assistant", "user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


def tokenizer(bos: str, eos: str, template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos, eos_token=eos)
    made.chat_template = template
    return made


def talk(roles: list[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": f'{role} {n}: {{{{ .X }}}} "a"\nb'} for n, role in enumerate(roles)]


class Go:
    """The part of Go's text/template that the exported templates use, with Ollama's data."""

    def __init__(self, text: str, messages: list[dict[str, Any]]) -> None:
        self.parts = re.split(r"\{\{ (.*?) \}\}", text)
        assert not [part for part in self.parts[::2] if "{{" in part or "}}" in part]
        self.messages = messages
        self.values: dict[str, Any] = {"$.System": "\n\n".join(m["content"] for m in messages if m["role"] == "system")}

    def run(self) -> str:
        text, end = self.block(0, True)
        assert end == len(self.parts)
        return text

    def block(self, place: int, on: bool) -> tuple[str, int]:
        """Return what a block gives that begins with the text at ``place``, and the place of the action that ends it."""
        out = ""
        while True:
            out += self.parts[place] if on else ""
            place += 1
            if place == len(self.parts) or self.parts[place] == "end" or self.parts[place].startswith("else"):
                return out, place
            action = self.parts[place]
            if action.startswith("range"):
                given, place = self.loop(place + 1, on)
            elif action.startswith("if "):
                given, place = self.choice(place, on)
            else:
                given = self.action(action) if on else ""
            out, place = out + given, place + 1

    def loop(self, start: int, on: bool) -> tuple[str, int]:
        out, end = "", self.block(start, False)[1]
        for number, message in enumerate(self.messages if on else []):
            self.values |= {"$i": number, ".Role": message["role"], ".Content": message["content"]}
            out += self.block(start, True)[0]
        return out, end

    def choice(self, place: int, on: bool) -> tuple[str, int]:
        out, done = "", not on
        while self.parts[place] != "end":
            condition = self.parts[place].removeprefix("else").strip().removeprefix("if ")
            right = not done and bool(self.value(condition))
            given, place = self.block(place + 1, right)
            out, done = out + given, done or right
        return out, place

    def action(self, action: str) -> str:
        if assigned := re.fullmatch(r"(\$\w+) :?= (true|false)", action):
            self.values[assigned[1]] = assigned[2] == "true"
            return ""
        return str(self.value(action))

    def value(self, text: str) -> Any:
        words = list(self.words(text))
        if words[0] == "and":
            return next((v for word in words[1:] if not (v := self.value(word))), True)
        if words[0] == "eq":
            return self.value(words[1]) == self.value(words[2])
        if words[0] == "len":
            return len(self.value(words[1]))
        if words[0] == "slice":
            return self.messages[self.value(words[2]) :]
        if text.startswith('"'):
            return text.strip('"')
        return int(text) if text.isdigit() else self.messages if text == "$.Messages" else self.values[text]

    @staticmethod
    def words(text: str) -> Iterator[str]:
        depth, word = 0, ""
        for sign in f"{text} ":
            depth += {"(": 1, ")": -1}.get(sign, 0)
            if sign == " " and not depth:
                yield word[1:-1] if word.startswith("(") else word
                word = ""
            else:
                word += sign


@pytest.mark.parametrize(("bos", "eos", "template", "name", "added"), [k[1:] for k in KNOWN], ids=[k[0] for k in KNOWN])
def test_the_go_template_renders_as_the_models_own(bos: str, eos: str, template: str, name: str, added: bool) -> None:
    """On other conversations than those by which it was found, with what Ollama puts before them."""
    made = tokenizer(bos, eos, template)
    family, first = templates.fit(made)
    assert (family.name, first) == (name, added)
    for roles in TALKS:
        messages = talk(roles)
        if "system" in roles and family.system is None:
            continue
        wanted = chat.render(made, messages, answer=True)
        given = messages if "system" in roles or not family.default else [
            {"role": "system", "content": family.default}, *messages
        ]  # fmt: skip
        assert (bos if first else "") + Go(family.go(), given).run() == wanted


def test_a_template_of_no_known_family_is_refused_with_the_difference() -> None:
    with pytest.raises(ConfigError) as caught:
        templates.fit(tokenizer("<|begin_of_text|>", "<|eot_id|>", LLAMA31))
    told = str(caught.value)
    assert "of no known family (chatml, llama3, zephyr, phi3, gemma, mistral). The closest is llama3" in told
    assert "Today Date" in told
    assert "--template FILE" in told
    trimmed = CHATML.replace("message['content']", "message['content'][:9]")
    with pytest.raises(
        ConfigError, match=r"The closest is chatml: in a conversation of user the model has .*What is 7<"
    ):
        templates.fit(tokenizer("<s>", "<|im_end|>", trimmed))
