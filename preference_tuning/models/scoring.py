"""Log-probabilities of answers: the forward pass that SFT, DPO, its reference and the evaluation share.

A batch is a token tree: what its sequences begin with (a pair's prompt, a common system turn) goes through the model
once (``models.tree``), and the head sees answer tokens only, a fraction of the vocabulary projection. The same code
with one sequence a row is the plain layout that any decoder accepts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preference_tuning.models import attention, tree
from preference_tuning.models.chat import PairTokens
from preference_tuning.models.head import Head, head_scores, unwrap

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Nats by which a summed log-probability may differ between two batches that hold the same pair.

In 16 bits a product may depend on the shape of its batch; over an answer of a hundred tokens that adds up to tenths
of a nat. A wrong reference (base model, other weights, other template) is off by tens.
"""

OF_TOKEN = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Nats by which the log-probability of one token may differ between two layouts, machines or versions of a library.

Measured over 959 tokens of SmolLM2-135M, trees against plain rows: at most 2.1e-5 in float32 and 0.21 in bfloat16
(0.30 between bfloat16 and float32).
"""
OF_MEAN = 0.2
"""Share of it that the mean over tokens may have (measured: 3.5e-6 and 0.038 nats): noise is rarely large."""

TRIED_ROWS = 2
"""Rows that are scored both ways before anything else, to see that the model takes token trees."""


@dataclass
class Rows:
    """A batch of prompts with their answers, as a token tree or as padded sequences, that hold ``N`` answer tokens.

    Attributes:
        input_ids: [1, T] the tree's nodes, or [S, L] a sequence a row.
        position_ids: of the same shape.
        padding: [S, L] 1 at tokens, 0 at padding; None for a tree, which has none.
        tree: who attends to whom; None where every sequence has a row of its own.
        before: [N] flat index of the position that predicts each answer token.
        targets: [N] the answer tokens.
        answer: [N] which answer of the batch a token belongs to.
        answers: how many answers the batch has.
        tokens: of all sequences together, each counted whole.
    """

    input_ids: Tensor
    position_ids: Tensor
    padding: Tensor | None
    tree: tree.Tree | None
    before: Tensor
    targets: Tensor
    answer: Tensor
    answers: int
    tokens: int

    def to(self, device: torch.device, **_: Any) -> "Rows":
        """Return the rows on ``device``."""
        moved: dict[str, Any] = {
            name: v.to(device) if isinstance(v, Tensor | tree.Tree) else v for name, v in vars(self).items()
        }
        return Rows(**moved)


def pair_rows(pairs: Sequence[PairTokens], shared: bool, pad_id: int) -> Rows:
    """Lay out B pairs. Answers are numbered chosen first, then rejected: pair i has answers i and B + i."""
    # In the order of the pairs, so that a rejected answer finds the prompt that its chosen one has just brought.
    prompts = [pair["prompt_ids"] for pair in pairs for _ in range(2)]
    answers = [pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]  # type: ignore[literal-required]
    numbers = [i + side * len(pairs) for i in range(len(pairs)) for side in range(2)]
    return layout(prompts, answers, shared, pad_id, numbers)


def layout(
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    shared: bool,
    pad_id: int,
    numbers: Sequence[int] | None = None,
) -> Rows:
    """Lay out answers, each with its prompt.

    Args:
        prompts: token ids, at least one each.
        answers: token ids.
        shared: as a token tree; else as padded sequences, which any decoder takes.
        pad_id: fills sequences up to the longest.
        numbers: of the answers; 0, 1, 2 ... if None.
    """
    numbers = range(len(answers)) if numbers is None else numbers
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    if shared:
        tokens, positions, paths, planned = tree.grow(sequences)
        ids, places, padding = torch.tensor([tokens]), torch.tensor([positions]), None
    else:
        width = max(map(len, sequences))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in sequences])
        padding = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
        places, planned = torch.arange(width).expand_as(ids), None
        paths = [list(range(i * width, i * width + len(row))) for i, row in enumerate(sequences)]
    before: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for prompt, answer, number, path in zip(prompts, answers, numbers, paths, strict=True):
        before += path[len(prompt) - 1 : -1] if answer else []
        targets += answer
        owner += [number] * len(answer)
    return Rows(
        input_ids=ids,
        position_ids=places,
        padding=padding,
        tree=planned,
        before=torch.tensor(before),
        targets=torch.tensor(targets),
        answer=torch.tensor(owner),
        answers=len(answers),
        tokens=sum(map(len, sequences)),
    )


@dataclass
class TokenScores:
    """What a model gives each of N answer tokens.

    Attributes:
        logps: [N] log-probability, fp32 nats; carries the gradient.
        entropies: [N] entropy of the prediction, nats.
        correct: [N] whether the token is the most likely one.
        mean_logits: [N] mean of the logits over the vocabulary, fp32; TRL logs it.
    """

    logps: Tensor
    entropies: Tensor
    correct: Tensor
    mean_logits: Tensor


def token_scores(model: nn.Module, rows: Rows, dtype: torch.dtype) -> TokenScores:
    """Return the scores of the answer tokens.

    Args:
        model: a causal language model, or a PeftModel around one.
        rows: the batch, on the model's device.
        dtype: precision of the matrix products; below fp32 they run under autocast.
    """
    head = Head.of(model)
    at_answers = answer_states(model, rows, dtype)
    return TokenScores(*head_scores(at_answers, head.weight, head.bias, rows.targets, dtype, head.softcap, head.scale))


def answer_states(model: nn.Module, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Return the hidden states [N, H] that predict the answer tokens; arguments as of ``token_scores``."""
    causal_lm = unwrap(model)
    device = rows.input_ids.device
    how: dict[str, Any] = {"attention_mask": rows.padding}
    if rows.tree is not None:
        attention.install(causal_lm.config.get_text_config())
        # A mask of four dimensions keeps transformers from making one: the tree says who attends to whom.
        how = {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device), "tree": rows.tree}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden: Tensor = causal_lm.base_model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **how
        ).last_hidden_state
    return hidden.flatten(0, 1)[rows.before]


def tree_error(model: nn.Module, examples: Sequence[tuple[list[int], list[int]]], dtype: torch.dtype) -> float:
    """Return by how much, in nats, log-probabilities of answers differ between a token tree and plain sequences.

    Args:
        model: on the device that it runs on.
        examples: prompts with an answer each; the tree also gets each answer's end alone, so that prompts are shared.
        dtype: precision of the matrix products.
    """
    prompts = [prompt for prompt, _ in examples for _ in range(2)]
    answers = [part for _, answer in examples for part in (answer, answer[-1:])]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [
            answer_logps(token_scores(model, laid, dtype).logps, laid)
            for laid in (layout(prompts, answers, shared, pad_id=0).to(device) for shared in (True, False))
        ]
    model.train(training)
    return (found[0] - found[1]).abs().max().item()


def answer_logps(logps: Tensor, rows: Rows) -> Tensor:
    """Return the summed log-probability of each answer, [answers], from those of the tokens, [N]."""
    return logps.new_zeros(rows.answers).index_add(0, rows.answer, logps)


def token_tolerance(dtype: str) -> float:
    """Return by how much a token may differ (``OF_TOKEN``) in a precision that is named."""
    return OF_TOKEN[getattr(torch, dtype)]


def rows_at_once(batch_size: int, parts: int) -> int:
    """Return how many rows the largest of ``parts`` pieces of a batch has."""
    return -(-batch_size // min(parts, batch_size))


def pair_logps(
    model: nn.Module,
    pairs: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    pad_id: int,
    batch_size: int,
    shared: bool,
    holding: Callable[[Sequence[Any]], AbstractContextManager[None]] = lambda pairs: nullcontext(),
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ``(row numbers, log-probabilities [b, 2] of chosen and rejected)``, in batches of similar length.

    ``holding`` is entered with the pairs of a batch while it is run.
    """
    for numbers in batches(pairs, batch_size):
        batch = [pairs[i] for i in numbers]
        rows = pair_rows(batch, shared, pad_id).to(device)
        with torch.no_grad(), holding(batch):
            summed = answer_logps(token_scores(model, rows, dtype).logps, rows)
        yield numbers, summed.view(2, -1).T.cpu()


def batches(pairs: Any, batch_size: int) -> Iterator[list[int]]:
    """Yield the row numbers of batches of similar length, the shortest first."""
    order = sorted(range(len(pairs)), key=_lengths(pairs).__getitem__)
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def _lengths(pairs: Any) -> list[int]:
    """Return the tokens of each pair; stored rows have them in a column, which spares reading the rows."""
    if isinstance(pairs, list):
        return [sum(len(pair[name]) for name in PairTokens.__annotations__) for pair in pairs]
    return list(pairs["length"])


def refuses_tree(model: nn.Module, rows: Any, dtype: torch.dtype) -> str | None:
    """Return why a model cannot read these token rows as trees, by rule or by a try on two of them; None if it can."""
    refusal = refuses_shared_prompt(model, max(rows["length"]))
    if refusal is not None:
        return refusal
    shortest = sorted(range(len(rows)), key=list(rows["length"]).__getitem__)[:TRIED_ROWS]
    error = tree_error(model, [(row["prompt_ids"], row["chosen_ids"]) for row in rows.select(shortest)], dtype)
    allowed = TOLERANCE[dtype]
    return None if error <= allowed else f"with a shared prompt its log-probabilities are off by {error:.3g} nats"


def refuses_shared_prompt(model: nn.Module, longest: int) -> str | None:
    """Return why a model cannot run token trees, or None if it can.

    Args:
        model: the policy.
        longest: width of the longest row, in tokens.
    """
    config = unwrap(model).config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    kinds = set(getattr(config, "layer_types", None) or [])
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    if strange:
        return f"it has layers of the kind {', '.join(strange)}"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window is not None and not kinds)
    if slides and window is not None and getattr(config, "use_sliding_window", True) and window < longest:
        return f"its sliding window of {window} tokens is shorter than the longest row ({longest})"
    if any(type(module).forward.__module__.startswith("unsloth") for module in model.modules()):
        return "unsloth brings its own attention"
    if not getattr(type(unwrap(model)), "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    implementation = str(getattr(config, "_attn_implementation", "eager"))
    if implementation not in ("eager", "sdpa", *attention.NAMES.values()):
        return f"its attention implementation {implementation} knows no token trees"
    return None
