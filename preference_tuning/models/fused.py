"""LoRA layers as one operation each, with gradients written by hand.

peft computes ``x W' + scaling (x A') B'`` in five operations, each of which reads and writes whole activations, and
autograd adds the two gradients of ``x``. Here the products accumulate in place. The values are peft's, within rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + scaling (x A') B' for a frozen W [out, in], A [rank, in] and B [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, a, scaled = weight.to(dtype), a.to(dtype), (b * scaling).to(dtype)
        with torch.autocast(device, enabled=False):
            low = rows @ a.T
            out = rows @ weight.T if bias is None else torch.addmm(bias.to(dtype), rows, weight.T)
            out.addmm_(low, scaled.T)
        ctx.save_for_backward(rows, weight, a, scaled, low)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, scaled, low = ctx.saved_tensors
        of_x, of_weights = ctx.dtypes
        grad = grads[0].reshape(-1, weight.shape[0]).to(rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            grad_low = grad @ scaled
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight).addmm_(grad_low, a).view(*grads[0].shape[:-1], -1).to(of_x)
            grad_a = (grad_low.T @ rows).to(of_weights) if ctx.needs_input_grad[3] else None
            grad_b = (grad.T @ low).to(of_weights).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_a, grad_b, None


_lora_linear: Any = _LoraLinear.apply  # untyped in torch


def fuse(model: nn.Module) -> int:
    """Fuse the plain LoRA layers of a PeftModel and return how many there are.

    Left as they are: quantised and embedding layers, and variants (DoRA, dropout, a bias in B): they are other
    formulas.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in model.modules() if type(module) is Linear and type(module.base_layer) is nn.Linear]
    for layer in layers:
        layer.forward = _Forward(layer)
    return len(layers)


class _Forward:
    """The forward of one layer: fused where its active adapter is plain, else peft's own."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._plain = layer, layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        name = self._fusible()
        if name is None or args or kwargs:
            return self._plain(x, *args, **kwargs)
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        return _lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])

    def _fusible(self) -> str | None:
        """Return the adapter that is active alone and plain, or None."""
        layer = self._layer
        if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
            return None
        name: str = layer.active_adapters[0]
        if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
            return None
        dropout = layer.lora_dropout[name]
        idle = isinstance(dropout, nn.Identity) or not dropout.training
        return name if idle and not layer.base_layer.weight.requires_grad else None
