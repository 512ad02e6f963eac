"""The head of a language model on chosen positions: log-probabilities of given tokens, never whole logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

HEAD_TILE = 128
"""Answer tokens whose logits exist at once."""


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        entropies, correct = torch.empty_like(logps), torch.empty_like(targets, dtype=torch.bool)
        ctx.trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        early = ctx.needs_input_grad[0] and not ctx.trained
        mean_logits = torch.empty_like(logps)
        gradient = torch.empty(hidden.shape if early else 0, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            for tile in _tiles(targets):
                target = targets[tile, None]
                logits = _finish_logits(hidden[tile].to(dtype) @ matrix.T, bias, softcap, scale).float()
                mean_logits[tile] = logits.mean(-1)
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
        ctx.mark_non_differentiable(entropies, correct, mean_logits)
        return logps, entropies, correct, mean_logits

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


head_scores: Any = _HeadLogProbs.apply  # untyped in torch
