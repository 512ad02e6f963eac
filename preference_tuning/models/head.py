"""The head of a language model on chosen positions: log-probabilities of given tokens, never whole logits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEAD_TILE = 128
"""Answer tokens whose logits exist at once."""


@dataclass(frozen=True)
class Head:
    """The last layer of a language model, from hidden states to logits."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None
    softcap: float | None
    scale: float | None

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """Return the head of a causal language model, or of the one inside a PeftModel."""
        causal_lm = unwrap(model)
        layer, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, layer.bias, softcap, getattr(config, "logit_scale", None))

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the logits [n, V] in fp32 of hidden states [n, H]; the product is in ``dtype``."""
        product = hidden.to(dtype) @ self.weight.to(dtype).T
        return _finish_logits(product, self.bias, self.softcap, self.scale).float()


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


def compare_heads(
    states: Mapping[str, tuple[Tensor, Head]], references: Mapping[str, str], targets: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the log-probabilities [N] of the targets under several models, and the divergences from references.

    A divergence is KL(model || reference) of the two predictions over the whole vocabulary, in nats, [N] fp32. Needs no
    gradient.

    Args:
        states: of each model, its hidden states [N, H] at the answer tokens, and its head.
        references: the reference of each model that has one; both are in ``states``.
        targets: [N] the answer tokens.
        dtype: precision of the matrix products.
    """
    logps = {name: targets.new_empty(len(targets), dtype=torch.float32) for name in states}
    divergences = {name: targets.new_empty(len(targets), dtype=torch.float32) for name in references}
    for tile in _tiles(targets):
        logits, odds, normalisers = {}, {}, {}
        for name, (hidden, head) in states.items():
            logits[name] = head.logits(hidden[tile], dtype)
            largest = logits[name].amax(-1, keepdim=True)
            odds[name] = (logits[name] - largest).exp_()
            normalisers[name] = (largest + odds[name].sum(-1, keepdim=True).log())[:, 0]
            logps[name][tile] = logits[name].gather(-1, targets[tile, None])[:, 0] - normalisers[name]
        for name, other in references.items():
            gain = torch.linalg.vecdot(odds[name], logits[name].sub(logits[other])) / odds[name].sum(-1)
            # Rounding may leave a hair below zero of what is never negative.
            divergences[name][tile] = (gain - normalisers[name] + normalisers[other]).clamp_(min=0)
    return logps, divergences


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
