"""Freezing downstream blocks, a control: what BLOCK-EM's `freeze_downstream` does by itself, without any penalty."""

from __future__ import annotations

from blockem.defences.defence import Defence


class Freeze(Defence):
    """LoRA on the blocks up to `block` alone.

    Args:
        block: the last trained block, index from 0; for a fair control, the highest one at which BLOCK-EM blocks.
    """

    name = "freeze"

    def __init__(self, block: int) -> None:
        self.block = block

    def trained_blocks(self, n_blocks: int) -> range:
        return range(min(self.block + 1, n_blocks))
