"""Log-probabilities of answers: the forward pass that SFT, DPO, its reference and the evaluation share.

A batch is a token tree: what its sequences begin with (a pair's prompt, a common system turn) goes through the model
once (``models.tree``), and the head sees answer tokens only, a fraction of the vocabulary projection. The same code
with one sequence a row is the plain layout that any decoder accepts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preference_tuning.models import attention, tree
from preference_tuning.models.chat import PairTokens

HEAD_TILE = 128
"""Answer tokens whose logits exist at once."""


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
        moved = {name: v.to(device) if isinstance(v, Tensor | tree.Tree) else v for name, v in vars(self).items()}
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
        paths = [range(i * width, i * width + len(row)) for i, row in enumerate(sequences)]
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
    device = rows.input_ids.device
    how: dict[str, Any] = {"attention_mask": rows.padding}
    if rows.tree is not None:
        attention.install(causal_lm.config.get_text_config())
        # A mask of four dimensions keeps transformers from making one: the tree says who attends to whom.
        how = {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device), "tree": rows.tree}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        hidden = causal_lm.base_model(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **how
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
    """log p of the targets, in tiles of tokens, so that few logits exist at once.

    For logits z = W h, d log p[t] / dh = W[t] - softmax(z) W. Under a frozen head it is formed in the forward pass:
    backward is then one multiplication. A head that is trained needs the logits again, once the gradient is known.
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
        ctx.trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        early = ctx.needs_input_grad[0] and not ctx.trained
        gradient = torch.empty(hidden.shape if early else 0, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for tile in _tiles(targets):
                target = targets[tile, None]
                logits = _finish_logits(hidden[tile].to(dtype) @ matrix.T, bias, softcap, scale).float()
                largest = logits.amax(-1, keepdim=True)
                taken = logits.gather(-1, target)
                odds = (logits - largest).exp_()
                total = odds.sum(-1, keepdim=True)
                normaliser = largest + total.log()
                correct[tile] = (taken >= largest)[:, 0]
                logps[tile] = (taken - normaliser)[:, 0]
                entropies[tile] = normaliser[:, 0] - torch.linalg.vecdot(odds, logits) / total[:, 0]
                if early:
                    gradient[tile] = _gradient(matrix, odds.div_(total), target, logits, softcap, scale)
        if early:
            ctx.save_for_backward(gradient)
        elif ctx.trained:
            ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.dtypes, ctx.softcap, ctx.scale = (hidden.dtype, dtype), softcap, scale
        ctx.mark_non_differentiable(entropies, correct)
        return logps, entropies, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trained:
            return (*_trained_head(ctx, grads[0]), None, None, None, None)
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None]).to(ctx.dtypes[0]), None, None, None, None, None, None


def _tiles(targets: Tensor) -> Iterator[slice]:
    return (slice(start, start + HEAD_TILE) for start in range(0, len(targets), HEAD_TILE))


def _trained_head(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of the hidden states, the head's weight and its bias."""
    hidden, weight, bias, targets = ctx.saved_tensors
    of_hidden, dtype = ctx.dtypes
    matrix = weight.to(dtype)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for tile in _tiles(targets):
            target, rows = targets[tile, None], hidden[tile].to(dtype)
            logits = _finish_logits(rows @ matrix.T, bias, ctx.softcap, ctx.scale).float()
            slope = logits.softmax(-1).neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=torch.float32))
            slope *= grad[tile, None]
            if ctx.softcap is not None:
                slope *= 1 - (logits / ctx.softcap) ** 2
            slope *= 1.0 if ctx.scale is None else ctx.scale
            grad_hidden[tile] = (slope.to(dtype) @ matrix).to(of_hidden)
            grad_weight += (slope.to(dtype).T @ rows).float()
            if grad_bias is not None:
                grad_bias += slope.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype)


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
    if not getattr(type(unwrap(model)), "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    implementation = str(getattr(config, "_attn_implementation", "eager"))
    if implementation not in ("eager", "sdpa", *attention.NAMES.values()):
        return f"its attention implementation {implementation} knows no token trees"
    return None
