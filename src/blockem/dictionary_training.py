"""Training a small SAE with SAELens on the activations of any model at any block, in minutes on a CPU."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockem.dictionary import Dictionary, Fit, activations_at, load_dictionary, measure_fit
from blockem.errors import BlockemError
from blockem.examples import Example
from blockem.model import LanguageModel
from blockem.store import write_json


@dataclass(frozen=True)
class SaeTraining:
    """Settings of one SAE training.

    Attributes:
        block: block whose output is read.
        n_latents: size of the dictionary.
        k: active latents a token (Top-K only).
        architecture: `topk` or `jumprelu`.
        l0_coefficient: weight of the sparsity loss (JumpReLU only).
        epochs: passes over the activations.
        lr: Adam's learning rate, decayed linearly to 0 over the last fifth.
        max_activations: the most tokens to collect.
        held_out: share of the *rows* kept apart for the fit in the card.
    """

    block: int
    n_latents: int = 4608
    k: int = 64
    architecture: str = "topk"
    l0_coefficient: float = 1.0
    epochs: float = 2.0
    lr: float = 1e-3
    batch: int = 1024
    max_tokens: int = 256
    max_activations: int = 1_500_000
    held_out: float = 0.05
    seed: int = 0
    store_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.architecture not in ("topk", "jumprelu"):
            raise BlockemError(f"unknown SAE architecture {self.architecture!r}: use topk or jumprelu")
        if not 0 < self.k <= self.n_latents:
            raise BlockemError(f"k = {self.k} must lie between 1 and the {self.n_latents} latents")


def train_dictionary(
    lm: LanguageModel,
    examples: Sequence[Example],
    settings: SaeTraining,
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Dictionary, Fit]:
    """Train an SAE, write it to `out` in SAELens format with `card.json`, and measure it on rows it never saw.

    The folder appears whole or not at all. Returns the SAE as loaded back from disk, and its fit on held-out tokens.
    """
    return train_dictionaries(lm, examples, {settings.block: out}, settings, progress)[settings.block]


def train_dictionaries(
    lm: LanguageModel,
    examples: Sequence[Example],
    outs: Mapping[int, Path],
    settings: SaeTraining,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[int, tuple[Dictionary, Fit]]:
    """The same at several blocks, from one pass over the data, whose activations are all in memory at once.

    Args:
        outs: the folder to write, by block; `settings.block` is not looked at.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    n_held = max(1, math.ceil(settings.held_out * len(examples)))
    if len(examples) <= n_held:
        raise BlockemError(f"{len(examples)} rows are too few to train an SAE on and hold some out")
    bar = progress or (lambda _what, _done, _total: None)
    blocks = list(outs)
    held = activations_at(lm, [examples[i] for i in order[:n_held]], blocks, settings.max_tokens)
    acts = activations_at(
        lm,
        [examples[i] for i in order[n_held:]],
        blocks,
        settings.max_tokens,
        settings.max_activations,
        progress=lambda done, total: bar("activations", done, total),
    )
    found = {}
    for block, out in outs.items():
        found[block] = _train(lm, acts.pop(block), held.pop(block), replace(settings, block=block), out, bar)
    return found


def _train(
    lm: LanguageModel, acts: Tensor, held: Tensor, settings: SaeTraining, out: Path, bar: Callable[[str, int, int], None]
) -> tuple[Dictionary, Fit]:
    """One SAE on its activations `[tokens, d_model]`, measured on those of held-out rows."""
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    torch.manual_seed(settings.seed)
    common: dict[str, Any] = {"d_in": lm.d_model, "d_sae": settings.n_latents, "device": "cpu", "apply_b_dec_to_input": True}
    sae: Any
    if settings.architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=settings.k))
    else:
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, l0_coefficient=settings.l0_coefficient))
    # trained on activations of unit scale: Adam's steps then suit biases and weights alike; undone by `_unscale` below
    scale = float(acts[:100_000].float().norm(dim=-1).median()) / math.sqrt(lm.d_model)
    sae.b_dec.data = acts[:100_000].float().mean(dim=0) / scale
    total = int(settings.epochs * len(acts)) // settings.batch * settings.batch
    if total == 0:
        raise BlockemError(f"{len(acts)} activations do not fill one batch of {settings.batch}; give more text or a smaller batch")
    steps = total // settings.batch
    config = SAETrainerConfig(
        total_training_samples=total,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=0.0,
        lr_warm_up_steps=max(1, steps // 50),
        lr_decay_steps=steps // 5,
        dead_feature_window=max(20, steps // 10),
        logger=LoggingConfig(log_to_wandb=False),
    )

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(settings.seed)
        done = 0
        while True:
            shuffled = torch.randperm(len(acts), generator=generator)
            for chosen in shuffled[: len(acts) // settings.batch * settings.batch].split(settings.batch):
                bar("training", min(done, total), total)
                yield acts[chosen].float() / scale
                done += settings.batch

    trained = SAETrainer(config, sae, batches()).fit()
    _unscale(trained, scale)
    trained.cfg.metadata.hook_name = f"blocks.{settings.block}.hook_resid_post"
    trained.cfg.metadata.model_name = lm.id
    scratch = out.with_name(out.name + ".making")
    shutil.rmtree(scratch, ignore_errors=True)
    trained.save_inference_model(scratch)
    _store_as(scratch / "sae_weights.safetensors", settings.store_dtype)
    dictionary = load_dictionary(str(scratch))
    fit = measure_fit(dictionary, held)
    seen = measure_fit(dictionary, acts[:200_000])
    write_json(
        scratch / "card.json",
        {
            "model": lm.id,
            "revision": lm.revision,
            "settings": asdict(settings),
            "activations": len(acts),
            "held_out": asdict(fit),
            "training_sample": asdict(seen),
        },
    )
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return load_dictionary(str(out)), fit


@torch.no_grad()
def _unscale(sae: Any, scale: float) -> None:
    """Turn an SAE of h / scale into one of h: its activations grow by `scale`, so only biases and thresholds change."""
    for name in ("b_dec", "b_enc", "threshold"):
        if isinstance(getattr(sae, name, None), Tensor):
            getattr(sae, name).mul_(scale)


def _store_as(path: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
