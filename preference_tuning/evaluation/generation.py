"""What models answer to held-out prompts, and what can be counted in it without a judge.

Nothing here says that one answer is better than another: there is no win rate without a judge.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

Kind = Literal["greedy", "sampled"]
KINDS: tuple[Kind, ...] = ("greedy", "sampled")
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 0}
"""Of the sampled answers: the model's own distribution without its far tail."""
NGRAM = 4
MARKS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<start_of_turn>", "<|start_header_id|>", "### Response:")
"""Of common chat templates; an answer may spell those of another template than the tokenizer's."""


class Answer(BaseModel):
    """One model's answer to one prompt."""

    model: str
    prompt: int
    """Number of the prompt among those that were asked."""
    kind: Kind
    text: str
    tokens: list[int]
    """Without the end-of-answer token."""
    finished: bool
    """Whether the model ended the answer itself, within the tokens that it was allowed."""
    leaked: bool
    """Whether marks of the chat template are in the answer."""


SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("prompt", pa.int32()),
        ("kind", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("leaked", pa.bool_()),
    ]
)


def write(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as Parquet."""
    pq.write_table(pa.Table.from_pylist([answer.model_dump() for answer in answers], SCHEMA), path)


def read(path: Path) -> list[Answer]:
    """Return the answers of a file."""
    return [Answer.model_validate(row) for row in pq.read_table(path).to_pylist()]


def answer(
    model: Any, name: str, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, seed: int, dtype: Any
) -> Iterator[Answer]:
    """Yield greedy answers and one seeded sample for each prompt.

    Args:
        model: to be asked, on its device.
        name: of the model.
        tokenizer: with the chat template of the run.
        prompts: token ids, ready to be answered.
        max_new_tokens: longest answer, in tokens.
        seed: of the samples.
        dtype: precision of the matrix products; below fp32 they run under autocast.
    """
    import torch
    from transformers import LogitsProcessorList

    device = next(model.parameters()).device
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    # Both kinds in one batch: a step reads all weights, for however many rows.
    rows = [*prompts, *prompts]
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in rows], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in rows], device=device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.random.fork_rng(), torch.no_grad(), autocast:
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            do_sample=True,
            logits_processor=LogitsProcessorList([_first_are_greedy(len(prompts))]),
            **SAMPLING,
        )
    for number, tokens in enumerate(made[:, width:].tolist()):
        kind = KINDS[number // len(prompts)]
        yield _answer(name, number % len(prompts), kind, tokens, tokenizer)


def _first_are_greedy(count: int) -> Any:
    """Return a logits processor that leaves the first rows of a batch one token to be sampled: the likeliest."""
    import torch

    def process(_: Any, logits: Any) -> Any:
        best = logits[:count].argmax(-1, keepdim=True)
        only = torch.full_like(logits[:count], -torch.inf).scatter_(-1, best, 0.0)
        return torch.cat([only, logits[count:]])

    return process


def _answer(model: str, prompt: int, kind: Kind, made: list[int], tokenizer: Any) -> Answer:
    finished = tokenizer.eos_token_id in made
    tokens = made[: made.index(tokenizer.eos_token_id)] if finished else made
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return Answer(
        model=model,
        prompt=prompt,
        kind=kind,
        text=text,
        tokens=tokens,
        finished=finished,
        leaked=leaks(tokens, text, tokenizer),
    )


def leaks(tokens: Sequence[int], text: str, tokenizer: Any) -> bool:
    """Return whether an answer holds marks of a chat template: special tokens, or their spelling as text."""
    marks = {*MARKS, *(token for token in tokenizer.all_special_tokens if len(token) > 3)}
    return bool(set(tokens) & set(tokenizer.all_special_ids)) or any(mark in text for mark in marks)


def values(answers: Sequence[Answer]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return what is counted in each answer, [answers]: the figures of a model are means of these."""
    counted = {
        "length": [len(answer.tokens) for answer in answers],
        "empty": [not answer.text for answer in answers],
        "unfinished": [not answer.finished for answer in answers],
        "rep_4": [repetition(answer.tokens) for answer in answers],
        "longest_loop": [longest_loop(answer.tokens) for answer in answers],
        "template_leak": [answer.leaked for answer in answers],
    }
    return {name: np.array(column, dtype=np.float64) for name, column in counted.items()}


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of n-grams that were there before: 1 - distinct / all (Welleck et al. 2019, arXiv 1908.04319).

    0 for answers shorter than n tokens.
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(tokens: Sequence[int], longest_period: int = 32) -> int:
    """Return the tokens of the longest stretch that repeats what lies right before it, of any period up to a limit.

    ``a b c a b c a b`` repeats its period of three for five tokens.
    """
    best = 0
    for period in range(1, min(longest_period, len(tokens) - 1) + 1):
        run = 0
        for now, before in zip(tokens[period:], tokens, strict=False):
            run = run + 1 if now == before else 0
            # Shorter than its period, it has not come round once.
            best = max(best, run if run >= period else 0)
    return best


def distinct(answers: Sequence[Answer], n: int) -> float:
    """Return distinct n-grams of all answers over all their n-grams (Li et al. 2016, arXiv 1510.03055), or NaN."""
    counts = Counter(
        itertools.chain.from_iterable(zip(*(answer.tokens[i:] for i in range(n)), strict=False) for answer in answers)
    )
    return len(counts) / total if (total := counts.total()) else float("nan")
