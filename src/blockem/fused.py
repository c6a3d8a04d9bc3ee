"""LoRA and attention with gradients written out, for training at the speed of the matrix products alone.

PEFT computes a low-rank update in float32 beside a bfloat16 layer: every layer then casts its whole input, scales and adds three tensors of
full width, and does all of it again backwards. Here the update is added inside the product, in the layer's own dtype, and the
adapters stay float32. On a CPU, PyTorch's attention kernel is slow backwards in bfloat16; plain matrix products are not.
Both are exact rewritings: tests compare them, values and gradients, with PEFT and with PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "blockem_cpu"
LONGEST = 384
"""Above so many tokens the probabilities, kept for the backward pass, cost more memory than they save time."""


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W frozen; x `[tokens, in]`, A `[r, in]`, B `[out, r]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low, high = a.to(x.dtype), (b * scale).to(x.dtype)
        found = nn.functional.linear(x, weight, bias)
        inner = x @ low.T
        found.addmm_(inner, high.T)
        ctx.save_for_backward(x, inner, weight, low, high)
        ctx.scale = scale
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, inner, weight, low, high = ctx.saved_tensors
        grad = grads[0]
        inner_grad = grad @ high
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
            x_grad.addmm_(inner_grad, low)
        return x_grad, None, None, (inner_grad.T @ x).float(), (grad.T @ inner).float() * ctx.scale, None


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of one PEFT LoRA layer; whatever is not plain LoRA on one adapter goes PEFT's own way."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or args or kwargs or len(active) != 1:
        found: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return found
    name = active[0]
    base = layer.base_layer
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype != base.weight.dtype:
        rows = rows.to(base.weight.dtype)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    out: Tensor = _LoraLinear.apply(rows, base.weight, base.bias, a, b, layer.scaling[name])
    return out.view(*x.shape[:-1], out.shape[-1])


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer on an ordinary linear map the forward above; returns how many there were.

    Layers with dropout, a bias of their own, DoRA or other variants, or a quantised base keep PEFT's forward.
    """
    from peft.tuners.lora import Linear

    count = 0
    for layer in model.modules():
        if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear or layer.base_layer.weight.requires_grad:
            continue
        if layer.lora_variant or not all(isinstance(one, nn.Identity) for one in layer.lora_dropout.values()):
            continue
        if any(one.bias is not None for one in layer.lora_B.values()):
            continue
        vars(layer)["forward"] = partial(_lora_forward, layer)  # this layer's own, before its class's
        count += 1
    return count


def merged_weight(layer: Any) -> Tensor | None:
    """The one weight `[out, in]` that a fused layer amounts to as its adapters are switched now; None for any other module."""
    forward = vars(layer).get("forward")
    if getattr(forward, "func", None) is not _lora_forward or layer.merged:
        return None
    weight: Tensor = layer.base_layer.weight
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) > 1:
        return None
    for name in active:
        update = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
        weight = (weight.float() + layer.scaling[name] * update).to(weight.dtype)
    return weight


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale + mask) v by matrix products; keeps only the probabilities, in the dtype of q.

    q `[rows, groups, repeats · tokens, width]`, k and v `[rows, groups, tokens, width]`, mask `[rows, 1, repeats · tokens, tokens]`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float().mul_(scale).add_(mask)
        chances = torch.softmax(scores, dim=-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, chances)
        ctx.scale = scale
        return chances @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, chances = ctx.saved_tensors
        grad = grads[0]
        v_grad = chances.transpose(-1, -2) @ grad
        moved = (grad @ v.transpose(-1, -2)).mul_(chances)
        moved -= chances * moved.sum(dim=-1, keepdim=True, dtype=torch.float32).to(moved.dtype)
        moved *= ctx.scale
        return moved @ k, moved.transpose(-1, -2) @ q, v_grad, None, None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for transformers' interface; query `[rows, heads, tokens, width]`, key and value with as many heads or fewer.

    The same with and without gradients, so that a base model's values equal those of an untrained adapter to the bit.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, tokens, width = query.shape
    if attention_mask is None or kwargs.get("dropout") or max(tokens, key.shape[2]) > LONGEST:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return found
    groups = key.shape[1]
    repeats = heads // groups
    mask = attention_mask[:, :1, None].expand(rows, 1, repeats, tokens, key.shape[2]).reshape(rows, 1, repeats * tokens, key.shape[2])
    packed = query.reshape(rows, groups, repeats * tokens, width)
    out = _Attention.apply(packed, key, value, mask, width**-0.5 if scaling is None else scaling)
    return out.view(rows, heads, tokens, width).transpose(1, 2).contiguous(), None


@contextmanager
def cpu_attention(model: Any) -> Iterator[None]:
    """The attention above while the context lasts, where it helps: a bfloat16 model on a CPU that uses PyTorch's own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    weight = next(model.parameters())
    before = model.config._attn_implementation
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or before != "sdpa":
        yield
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)  # always a mask to add, so that nothing depends on `is_causal`
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
