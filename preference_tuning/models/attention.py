"""Attention along a token tree, as an attention function of transformers, so that every architecture may use it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from preference_tuning.models.tree import Tree

NAMES = {"sdpa": "token_tree_sdpa", "eager": "token_tree_eager"}
"""What transformers calls this attention, by the way that it computes (``attn_implementation``)."""

SHORT = 128
"""Keys up to which a CPU computes attention faster with its products spelled out than with torch's fused kernel."""


def install(config: Any) -> None:
    """Let the model of a (text) config attend along token trees; given none, it goes on as before."""
    if config._attn_implementation not in NAMES.values():
        config._attn_implementation = NAMES.get(config._attn_implementation, NAMES["sdpa"])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    eager: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the attention output [1, T, heads, D] of a tree; without one, that of the plain sequences.

    Args:
        module: the attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: as ``key``.
        attention_mask: of plain sequences.
        tree: the plan, which the model hands down to every layer.
        eager: spell the products out instead of calling torch's fused attention.
        scaling: of the products; 1 / sqrt(D) if None.
        dropout: probability.
        softcap: of the scores, in models that have one.
        others: what the model passes besides.
    """
    eager = eager or softcap is not None  # the fused one knows no cap
    if tree is None and not eager:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output, None

    def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        short = tree is not None and q.device.type == "cpu" and k.shape[2] <= SHORT
        if short and softcap is None and not dropout:
            factor = q.shape[-1] ** -0.5 if scaling is None else scaling
            out: Tensor = _short_attention(q, k, v, mask, factor)
            return out.transpose(1, 2)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if eager:
            return _eager(q, k, v, mask, scaling, dropout, softcap).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        ).transpose(1, 2)

    if tree is None:
        return attended(query, key, value, attention_mask).contiguous(), None
    outputs = [
        attended(_at(query, block.queries), _at(key, block.keys), _at(value, block.keys), block.mask).flatten(0, 1)
        for block in tree.blocks
    ]
    return torch.cat(outputs).index_select(0, tree.taken)[None], None


def _at(states: Tensor, nodes: Tensor) -> Tensor:
    """Return [S, heads, L, D], the states [1, heads, T, D] at the nodes [S, L]."""
    heads, _, width = states.shape[1:]
    rows = states[0].transpose(0, 1).flatten(1).index_select(0, nodes.flatten())
    return rows.view(*nodes.shape, heads, width).transpose(1, 2)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float, softcap: float | None
) -> Tensor:
    """Return the attention of [S, heads, Q, D] with its softmax in fp32; without a mask it is causal."""
    scores = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        # The last query sees every key, as in generation with a cache.
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(k.shape[2] - q.shape[2])
    # Not minus infinity: a padding position that sees nothing would become NaN, and spread.
    weights = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1).to(v.dtype)
    return functional.dropout(weights, dropout) @ v


class _ShortAttention(torch.autograd.Function):
    """Attention whose probabilities are kept for the backward pass: few, where sequences are short.

    Its sums run along whole rows, so that gradients are the same bits whatever the number of threads; those of
    torch's softmax are not. Heads that share a key head are stacked along the queries: keys are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        device = q.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
        sequences, heads, length, width = q.shape
        ctx.shapes, ctx.dtypes, ctx.scaling = (q.shape, k.shape), (q.dtype, k.dtype, v.dtype), scaling
        groups = heads // k.shape[1]
        causal = torch.ones(length, k.shape[2], dtype=torch.bool).tril()
        mask = causal if mask is None else mask[:, :, None]  # [S, 1, 1, Q, K]
        q = (q * scaling).to(dtype).reshape(-1, groups * length, width)
        k, v = (x.to(dtype).reshape(-1, *x.shape[2:]) for x in (k, v))
        with torch.autocast(device, enabled=False):
            scores = torch.bmm(q, k.transpose(1, 2)).float()
            scores.view(sequences, -1, groups, length, k.shape[1]).masked_fill_(~mask, float("-inf"))
            scores.sub_(scores.amax(-1, keepdim=True)).exp_()
            scores.div_(scores.sum(-1, keepdim=True))
            probabilities = scores.to(dtype)
            out = torch.bmm(probabilities, v)
        ctx.save_for_backward(q, k, v, probabilities, out)
        return out.view(sequences, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probabilities, out = ctx.saved_tensors
        grad = grads[0].reshape(out.shape).to(out.dtype)
        with torch.autocast(out.device.type, enabled=False):
            grad_v = torch.bmm(probabilities.transpose(1, 2), grad)
            # d score = p (d p - sum p d p), and that sum is the output times its gradient.
            grad_scores = torch.bmm(grad, v.transpose(1, 2)).float()
            grad_scores.sub_((grad.float() * out.float()).sum(-1, keepdim=True)).mul_(probabilities)
            grad_scores = grad_scores.to(out.dtype)
            grad_q = torch.bmm(grad_scores, k).mul_(ctx.scaling)
            grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        (of_q, of_k), (q_dtype, k_dtype, v_dtype) = ctx.shapes, ctx.dtypes
        return grad_q.view(of_q).to(q_dtype), grad_k.view(of_k).to(k_dtype), grad_v.view(of_k).to(v_dtype), None, None


_short_attention: Any = _ShortAttention.apply  # untyped in torch


for _kind, _name in NAMES.items():
    AttentionInterface.register(_name, partial(attend, eager=_kind == "eager"))
    AttentionMaskInterface.register(_name, sdpa_mask)
