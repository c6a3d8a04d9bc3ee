"""The written-out LoRA and attention give PEFT's and PyTorch's own values and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockem.config_training import TrainConfig
from blockem.fused import LONGEST, attention, cpu_attention, fuse_lora
from blockem.training import add_lora


def lora(lm: Any, **settings: Any) -> Any:
    """The tiny model under LoRA whose B is no longer 0."""
    model = add_lora(lm, TrainConfig(lora_r=4, lora_alpha=12, **settings), range(lm.n_blocks), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def outcome(model: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits of a padded batch and the gradient of every adapter weight."""
    ids = torch.arange(24).view(2, 12) + 7
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits.float()[mask.bool()]
    weights = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), list(torch.autograd.grad(logits.logsumexp(-1).mean(), weights))


def test_fused_lora_equals_peft_in_values_and_gradients(lm: Any) -> None:
    model = lora(lm)
    try:
        plain = outcome(model)
        assert fuse_lora(model) == 7 * lm.n_blocks
        fused = outcome(model)
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(fused[1], plain[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    finally:
        lm.model = model.unload()


def test_a_fused_adapter_can_still_be_switched_off_and_merged(lm: Any) -> None:
    model = lora(copy.deepcopy(lm))  # merging and unmerging rounds the base weights
    ids = torch.arange(9)[None] + 7
    with torch.no_grad():
        fuse_lora(model)
        moved = model(input_ids=ids).logits
        with model.disable_adapter():
            still = model(input_ids=ids).logits
        torch.testing.assert_close(still, lm.model(input_ids=ids).logits)
        assert not torch.allclose(moved, still)
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids).logits, moved, rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_plain_lora_keep_pefts_forward(lm: Any) -> None:
    import peft

    model = peft.get_peft_model(lm.model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1))
    try:
        assert fuse_lora(model) == 0
    finally:
        lm.model = model.unload()


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_equals_torchs_in_values_and_gradients(groups: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 5, 8, requires_grad=True)
    k, v = (torch.randn(2, groups, 5, 8, requires_grad=True) for _ in range(2))
    mask = torch.full((2, 1, 5, 5), 0.0).masked_fill(torch.ones(5, 5).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[1, :, :, 4] = torch.finfo(torch.float32).min
    ours, _ = attention(nn.Identity(), q, k, v, mask, scaling=0.3)
    repeated = [one.repeat_interleave(6 // groups, dim=1) for one in (k, v)]
    theirs = nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(one.square().sum(), (q, k, v)) for one in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cpu_attention_serves_bfloat16_on_a_cpu_alone_and_is_put_back(lm: Any) -> None:
    with cpu_attention(lm.model):
        assert lm.model.config._attn_implementation == "sdpa"  # float32: PyTorch's own is the quicker one
    ids = torch.arange(24).view(2, 12) + 7
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    half = copy.deepcopy(lm.model).to(torch.bfloat16)
    with torch.no_grad():
        expected = half(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
        with cpu_attention(half):
            assert half.config._attn_implementation != "sdpa"
            found = half(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    assert half.config._attn_implementation == "sdpa"
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_long_sequences_go_to_torchs_own_attention() -> None:
    class Layer(nn.Module):
        is_causal = True
        num_key_value_groups = 1

    q, k, v = (torch.randn(1, 1, LONGEST + 1, 4) for _ in range(3))
    ours, _ = attention(Layer(), q, k, v, None, scaling=0.5)
    theirs = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
