"""Keys and values of a batch of slots, each at its own length, written in place; and the attention that reads them.

transformers' own caches give every row of a batch the same length and grow by concatenation. Here a slot is a row of its own: its
tokens stand at positions 0, 1, 2, … of the slot, whatever the slots beside it hold, so a finished row can be replaced in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from blockem.forwards import unwrapped

ATTENTION = "blockem_slots"
STEP = 16
"""Attention reads up to the longest row, rounded up to this, so that kernels meet few different shapes."""


class SlotCache(Cache):
    """One tensor of keys and one of values for all blocks, `[blocks, slots, groups, capacity, width]`.

    During a decoding step (`at` is set) a block's new keys and values go to each row's own position. Otherwise (a prompt) they are kept
    in `fresh`, for whoever runs the prompt to place. Masks are the caller's: always given to the model ready, `[rows, 1, queries, keys]`.
    """

    def __init__(self, n_blocks: int, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.n_blocks, self.slots, self.capacity = n_blocks, slots, capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.at: Tensor | None = None
        self.rows = self.bound = 0
        self.fresh: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.at is None:
            self.fresh[layer_idx] = (key_states, value_states)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        found = []
        for store, new in ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states)):
            store.view(-1, store.shape[-1]).index_copy_(0, self.at, new.reshape(-1, new.shape[-1]))
            found.append(store[: self.rows, :, : self.bound])
        return found[0], found[1]

    def take_fresh(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks that have just run, `[blocks, rows, groups, tokens, width]` each, and forget them."""
        keys, values = (torch.stack([self.fresh[i][part] for i in sorted(self.fresh)]) for part in (0, 1))
        self.fresh = {}
        return keys, values

    def place(self, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write a prompt's keys and values `[blocks, groups, tokens, width]` of the blocks from `start` on into a slot."""
        if self.keys is None:
            # zeros, not whatever the memory held: a masked NaN would still reach the sum
            shape = (self.n_blocks, self.slots, keys.shape[1], self.capacity)
            self.keys = keys.new_zeros((*shape, keys.shape[-1]))
            self.values = values.new_zeros((*shape, values.shape[-1]))
        assert self.values is not None
        self.keys[start : start + len(keys), slot, :, : keys.shape[2]] = keys
        self.values[start : start + len(values), slot, :, : values.shape[2]] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for store in (self.keys, self.values):
            assert store is not None
            store[:, target, :, :length] = store[:, source, :, :length]

    @contextmanager
    def writing_at(self, positions: Tensor, longest: int) -> Iterator[None]:
        """A decoding step of the first slots: row i's new key stands at `positions [rows]`, the last of them at `longest`."""
        assert self.keys is not None
        groups = self.keys.shape[2]
        self.rows = len(positions)
        self.bound = min(self.capacity, -(-(longest + 1) // STEP) * STEP)
        if positions.device.type == "cpu" and 2 * self.bound >= self.capacity:
            self.bound = self.capacity  # whole slots lie in one piece, parts are copied at every product
        starts = torch.arange(self.rows * groups, device=positions.device).view(self.rows, groups) * self.capacity
        self.at = (starts + positions[:, None]).view(-1)
        try:
            yield
        finally:
            self.at = None


def step_mask(positions: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """What to add to one step's scores, `[rows, 1, 1, keys]`: 0 up to each row's own position, the lowest number beyond."""
    beyond = torch.arange(keys, device=positions.device) > positions[:, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=positions.device).masked_fill_(beyond, torch.finfo(dtype).min)[:, None, None]


def causal_mask(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for whole prompts padded on the right, `[1, 1, tokens, tokens]`: padding comes after all that reads."""
    full = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device)
    return full.triu_(1)[None, None]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """PyTorch's attention on grouped heads as they are: transformers repeats keys and values where there is a mask, a copy a step."""
    if attention_mask is None or kwargs.get("dropout") or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise NotImplementedError("an attention that this one cannot stand in for")
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _one_query(query, key, value, attention_mask, scaling), None
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return found.transpose(1, 2).contiguous(), None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """A decoding step's attention as two batched products, the heads of a group together; returns `[rows, 1, heads, width]`.

    On a CPU PyTorch's fused kernel takes five to nine times as long for a single query in bfloat16.
    """
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width) * (width**-0.5 if scaling is None else scaling)
    scores = grouped @ key.transpose(2, 3) + mask
    return (scores.float().softmax(-1).to(value.dtype) @ value).view(rows, 1, heads, -1)


@contextmanager
def slot_attention(model: nn.Module) -> Iterator[None]:
    """The attention above while the context lasts, for models that let theirs be chosen."""
    from transformers import AttentionInterface

    inner = unwrapped(model)
    before = inner.config._attn_implementation
    if before != "sdpa":
        raise NotImplementedError(f"attention is {before}")
    AttentionInterface.register(ATTENTION, attention)
    inner.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
