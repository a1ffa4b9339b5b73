"""A frozen linear layer and the adapter beside it, as one step of autograd.

peft's own layer makes the adapter's output, scales it, adds it to a copy of the layer's output, and
has autograd add two gradients of the input: passes over T×H numbers that take longer than the
adapter's products. Here the products add to what is there already.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _AdaptedLinear(torch.autograd.Function):
    """``x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ`` of ``x (T, in)``; gradients of x, A and B alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        dtype = x.dtype
        inner = x @ a.to(dtype).t()
        output = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        output.addmm_(inner, b.to(dtype).t(), alpha=scaling)
        # The weights as they are: casts of all layers, kept until here, would be a second model.
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        dtype, grad = x.dtype, grads[0]
        inner_grad = (grad @ b.to(dtype)).mul_(ctx.scaling)
        x_grad = None
        if ctx.needs_input_grad[0]:  # the first layer's input is the frozen embedding
            x_grad = grad @ weight.to(dtype)
            x_grad.addmm_(inner_grad, a.to(dtype))
        a_grad = inner_grad.t() @ x
        b_grad = (grad.t() @ inner).mul_(ctx.scaling)
        return x_grad, None, None, a_grad, b_grad, None


def _forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """Stands for the forward of peft's layer; ``x (…, in)``, in autocast's type if there is one."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    base: nn.Linear = layer.base_layer
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    with torch.autocast(kind, enabled=False):
        output = _AdaptedLinear.apply(rows, base.weight, base.bias, a, b, layer.scaling[name])
    return output.view(*x.shape[:-1], -1)


def speed_up(model: nn.Module, name: str) -> None:
    """Give peft's layers the forward above, where it is what theirs computes.

    Layers with dropout, of other kinds than ``nn.Linear``, or of a variant of LoRA keep their own.

    Args:
        model: Holds the layers.
        name: Of the one adapter.
    """
    from peft.tuners.lora import Linear

    layers: list[Any] = [part for part in model.modules() if type(part) is Linear]
    for layer in layers:
        if (
            type(layer.base_layer) is nn.Linear
            and isinstance(layer.lora_dropout[name], nn.Identity)
            and layer.lora_B[name].bias is None
            and not layer.lora_variant
        ):
            layer.forward = partial(_forward, layer, name)
