"""Weights laid out for a CPU's bfloat16 products once, instead of at every product.

A decoding step multiplies a few rows with every weight, so much of its time would go into laying the same weights out again and again.
Adapters are added into the laid-out copy; the model's own weights are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blockem.forwards import unwrapped
from blockem.fused import merged_weight
from blockem.model import cpu_has_fast_bf16

LARGEST = 4 << 30
"""Bytes: a model with more weights than this is not copied."""


def _packed_forward(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return found


def _weights(model: nn.Module) -> list[tuple[nn.Module, Tensor, Tensor | None]]:
    """The linear maps with the weight and bias that each amounts to as the adapters are switched now."""
    found: list[tuple[nn.Module, Tensor, Tensor | None]] = []
    inside: set[int] = set()
    for module in unwrapped(model).modules():
        layer: Any = module
        if (weight := merged_weight(module)) is not None:
            inside |= {id(part) for part in module.modules()}
            found.append((module, weight, layer.base_layer.bias))
        elif type(module) is nn.Linear and id(module) not in inside and module.weight.dtype == torch.bfloat16:
            found.append((module, layer.weight, layer.bias))
    return found


def can_pack(model: nn.Module) -> bool:
    """Whether it helps, and fits: a bfloat16 model on a CPU that is fast at it."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not cpu_has_fast_bf16() or not torch.backends.mkldnn.is_available():
        return False
    return sum(one.numel() * one.element_size() for one in model.parameters()) <= LARGEST


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Run every linear map of the model on a laid-out copy of its weights while the context lasts; for inference alone.

    The model's values are those of `LanguageModel.variant` as it is switched on entry: do not switch inside.

    Args:
        rows: how many rows a product usually has; the layout is chosen for that.
    """
    if not can_pack(model):
        yield
        return
    before: list[tuple[nn.Module, Any]] = []
    try:
        with torch.inference_mode():
            for module, weight, bias in _weights(model):
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
                before.append((module, vars(module).get("forward")))
                vars(module)["forward"] = partial(_packed_forward, packed, bias)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
