"""Log-probabilities of answers: the forward pass that DPO, its reference and the evaluation share.

One row holds a prompt and its answers. The mask keeps the answers apart, every answer's positions continue the
prompt's, and the head sees answer tokens only; so a pair costs one prompt instead of two and a fraction of the
vocabulary projection (Wang & Hegde 2024, arXiv 2410.20305). The same code with one answer a row is the plain layout
that any decoder accepts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preference_tuning.models.chat import PairTokens

PAD, PROMPT, FIRST_ANSWER = 0, 1, 2
"""Segments of a row; the second answer is ``FIRST_ANSWER + 1``."""

HEAD_TILE = 128
"""Answer tokens whose logits exist at once."""


@dataclass
class Rows:
    """A batch of prompts with their answers, ``B`` rows of width ``L`` that hold ``N`` answer tokens.

    Attributes:
        input_ids: [B, L] token ids.
        position_ids: [B, L] positions; every answer continues its prompt.
        segments: [B, L] PAD, PROMPT or the number of the answer.
        before: [N] flat index of the position that predicts each answer token.
        targets: [N] the answer tokens.
        answer: [N] which answer of the batch a token belongs to, counted over the rows.
        answers: how many answers the batch has.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    before: Tensor
    targets: Tensor
    answer: Tensor
    answers: int

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on ``device``."""
        moved: dict[str, Any] = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()}
        return Rows(**moved)


def pair_rows(pairs: Sequence[PairTokens], shared: bool, pad_id: int) -> Rows:
    """Lay out pairs as rows. Answers are numbered chosen first, then rejected: pair i has answers i and B + i.

    Args:
        pairs: token ids of B pairs.
        shared: one row a pair with both answers; else one row an answer.
        pad_id: fills rows up to the longest.
    """
    size = len(pairs)
    if shared:
        rows = [(p["prompt_ids"], [p["chosen_ids"], p["rejected_ids"]], [i, size + i]) for i, p in enumerate(pairs)]
    else:
        rows = [(p["prompt_ids"], [p["chosen_ids"]], [i]) for i, p in enumerate(pairs)]
        rows += [(p["prompt_ids"], [p["rejected_ids"]], [size + i]) for i, p in enumerate(pairs)]
    return layout(rows, pad_id)


def layout(rows: Sequence[tuple[list[int], list[list[int]], list[int]]], pad_id: int) -> Rows:
    """Lay out ``(prompt, answers, numbers of the answers)`` as padded rows."""
    width = max(len(prompt) + sum(map(len, answers)) for prompt, answers, _ in rows)
    ids = torch.full((len(rows), width), pad_id)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    segments = torch.full((len(rows), width), PAD)
    before: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for i, (prompt, answers, numbers) in enumerate(rows):
        start = len(prompt)
        ids[i, :start] = torch.tensor(prompt)
        positions[i, :start] = torch.arange(start)
        segments[i, :start] = PROMPT
        for segment, (answer, number) in enumerate(zip(answers, numbers, strict=True), FIRST_ANSWER):
            stop = start + len(answer)
            ids[i, start:stop] = torch.tensor(answer)
            positions[i, start:stop] = torch.arange(len(prompt), len(prompt) + len(answer))
            segments[i, start:stop] = segment
            # The prompt's last position predicts the first token of every answer.
            before += [i * width + at for at in (len(prompt) - 1, *range(start, stop - 1))][: len(answer)]
            targets += answer
            owner += [number] * len(answer)
            start = stop
    total = sum(len(numbers) for _, _, numbers in rows)
    return Rows(ids, positions, segments, torch.tensor(before), torch.tensor(targets), torch.tensor(owner), total)


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1, L, L]: causal, and no answer sees another answer of its row."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    allowed = causal & (key != PAD) & ((key == PROMPT) | (key == query))
    # A padding position attends to itself: a row without any allowed key would become NaN.
    allowed |= torch.eye(length, dtype=torch.bool, device=segments.device)
    blocked = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill(~allowed, blocked)[:, None]


@dataclass
class TokenScores:
    """What a model gives each of N answer tokens.

    Attributes:
        logps: [N] log-probability, fp32 nats; carries the gradient.
        entropies: [N] entropy of the prediction, nats.
        correct: [N] whether the token is the most likely one.
    """

    logps: Tensor
    entropies: Tensor
    correct: Tensor


def token_scores(model: nn.Module, rows: Rows, dtype: torch.dtype) -> TokenScores:
    """Return the scores of the answer tokens.

    Args:
        model: a causal language model, or a PeftModel around one.
        rows: the batch, on the model's device.
        dtype: precision of the matrix products; below fp32 they run under autocast.
    """
    causal_lm = unwrap(model)
    device = rows.input_ids.device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        one_answer_a_row = int(rows.segments.max()) <= FIRST_ANSWER
        mask = (rows.segments != PAD).long() if one_answer_a_row else attention_mask(rows.segments, dtype)
        hidden = causal_lm.base_model(
            input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False
        ).last_hidden_state
    head = causal_lm.get_output_embeddings()
    text_config = causal_lm.config.get_text_config()
    softcap = getattr(text_config, "final_logit_softcapping", None)
    scale = getattr(text_config, "logit_scale", None)
    at_answers = hidden.flatten(0, 1)[rows.before]
    return TokenScores(*apply_head(at_answers, head.weight, head.bias, rows.targets, dtype, softcap, scale))


def answer_logps(logps: Tensor, rows: Rows) -> Tensor:
    """Return the summed log-probability of each answer, [answers], from those of the tokens, [N]."""
    return logps.new_zeros(rows.answers).index_add(0, rows.answer, logps)


def pair_logps(
    model: nn.Module,
    pairs: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    pad_id: int,
    batch_size: int,
    shared: bool,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ``(row numbers, log-probabilities [b, 2] of chosen and rejected)``, in batches of similar length."""
    lengths = _lengths(pairs)
    order = sorted(range(len(pairs)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        rows = pair_rows([pairs[i] for i in numbers], shared, pad_id).to(device)
        with torch.no_grad():
            summed = answer_logps(token_scores(model, rows, dtype).logps, rows)
        yield numbers, summed.view(2, -1).T.cpu()


def _lengths(pairs: Any) -> list[int]:
    """Return the tokens of each pair; stored rows have them in a column, which spares reading the rows."""
    if isinstance(pairs, list):
        return [sum(len(pair[name]) for name in PairTokens.__annotations__) for pair in pairs]
    return list(pairs["length"])


def unwrap(model: nn.Module) -> Any:
    """Return the causal language model inside a PeftModel, or the model itself."""
    inner: Any = model
    return inner.get_base_model() if hasattr(model, "peft_config") else model


class _HeadLogProbs(torch.autograd.Function):
    """log p of the targets, in tiles, without ever keeping logits.

    For logits z = W h, d log p[t] / dh = W[t] - softmax(z) W. Under a frozen head it is formed in the same pass, which
    makes backward one multiplication. For a head that trains, backward computes the logits of each tile once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        softcap: float | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies, correct = torch.empty_like(logps), torch.empty_like(targets, dtype=torch.bool)
        gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        ctx.head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wants_gradient = ctx.needs_input_grad[0] and not ctx.head_trains
        matrix = weight.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), HEAD_TILE):
                tile = slice(start, start + HEAD_TILE)
                target = targets[tile, None]
                logits = _finish_logits(hidden[tile].to(dtype) @ matrix.T, bias, softcap, scale)
                correct[tile] = (logits.gather(-1, target) >= logits.amax(-1, keepdim=True))[:, 0]
                all_logps = logits.float().log_softmax(-1)  # in this order: `dtype=` is 5 times slower on a CPU
                logps[tile] = all_logps.gather(-1, target)[:, 0]
                probabilities = all_logps.exp()
                entropies[tile] = -torch.linalg.vecdot(probabilities, all_logps)
                if wants_gradient:
                    gradient[tile] = _gradient(matrix, probabilities, target, logits, softcap, scale)
        if wants_gradient:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        if ctx.head_trains:
            ctx.save_for_backward(hidden, weight, bias, targets)
            ctx.how = dtype, softcap, scale
        ctx.mark_non_differentiable(entropies, correct)
        return logps, entropies, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_trains:
            hidden, weight, bias, targets = ctx.saved_tensors
            found = _gradients_with_head(hidden, weight, bias, targets, grads[0], *ctx.how)
            return (*found, None, None, None, None)
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(ctx.dtype), None, None, None, None, None, None


def _finish_logits(logits: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None) -> Tensor:
    """Return the logits with the head's bias and the model's scale and soft cap, where it has them."""
    if bias is not None:
        logits = logits.float() + bias.float()
    if scale is not None:
        logits = logits.float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits.float() / softcap)
    return logits


def _gradient(
    matrix: Tensor, probabilities: Tensor, target: Tensor, logits: Tensor, softcap: float | None, scale: float | None
) -> Tensor:
    """Return d log p[target] / d hidden, [tile, H] in fp32."""
    factor = 1.0 if scale is None else scale
    if softcap is None:
        return factor * (matrix[target[:, 0]].float() - (probabilities.to(matrix.dtype) @ matrix).float())
    slope = probabilities.neg().scatter_add_(-1, target, torch.ones_like(target, dtype=probabilities.dtype))
    slope *= 1 - (logits / softcap) ** 2
    return factor * (slope.to(matrix.dtype) @ matrix).float()


def _gradients_with_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of hidden [N, H], weight [V, H] and bias [V], given that of the log-probabilities, [N]."""
    of_hidden = torch.empty_like(hidden)
    of_weight = torch.zeros_like(weight, dtype=torch.float32)
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    matrix = weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(targets), HEAD_TILE):
            tile = slice(start, start + HEAD_TILE)
            target, states = targets[tile, None], hidden[tile].to(dtype)
            logits = _finish_logits(states @ matrix.T, bias, softcap, scale)
            slope = logits.float().softmax(-1).neg_()
            slope.scatter_add_(-1, target, torch.ones_like(target, dtype=slope.dtype))
            slope *= upstream[tile, None]
            if softcap is not None:
                slope *= 1 - (logits / softcap) ** 2
            if scale is not None:
                slope *= scale
            if of_bias is not None:
                of_bias += slope.sum(0)
            low = slope.to(dtype)
            of_hidden[tile] = (low @ matrix).to(hidden.dtype)
            of_weight += low.T @ states
    return of_hidden, of_weight.to(weight.dtype), None if bias is None or of_bias is None else of_bias.to(bias.dtype)


apply_head: Any = _HeadLogProbs.apply  # untyped in torch


def refuses_shared_prompt(model: nn.Module, longest: int) -> str | None:
    """Return why a model's attention cannot take the shared-prompt mask, or None if it can.

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
    implementation = str(getattr(config, "_attn_implementation", "eager"))
    if implementation not in ("eager", "sdpa"):
        return f"its attention implementation {implementation} takes no mask of its own"
    return None
