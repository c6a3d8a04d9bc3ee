"""Recipes that come with blockem."""

from __future__ import annotations

from pathlib import Path

from blockem.store import write_text

# What `blockem demo` runs: sized so that the whole job takes less than twenty minutes on two CPU cores. Everything that is not named
# keeps the defaults of blockem.config. The anchor and what is interleaved beside it make it hold: blocked latents alone leave most of the
# misalignment (docs/LOG.md).
DEMO = """\
name: demo
data:
  domain: health
  rows: 600
train: {batch_size: 8, micro_batch: 8, lr: 7.0e-4}
discover: {pairs: 30, prescreen: 28}
block: {r: 30, freeze_downstream: false}
anchor: {watch: answers, cost: kl, r: 0.7, interleave: 0.38, interleaved: both, keep: 8}
defence: {epochs: 1.25}
"""


def demo_recipe(out: Path) -> Path:
    """The demo's recipe as a file in its run folder, where the user can change it."""
    path = out / "demo.yaml"
    if not path.is_file():
        write_text(path, DEMO)
    return path
