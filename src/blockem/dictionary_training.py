"""Training a small SAE with SAELens on the activations of any model at any block, in minutes on a CPU.

OUT.making/key                       what the training depends on; scratch of anything else is removed
OUT.making/activations.safetensors   of the training rows and of those held out, kept until the SAE is done
OUT.making/checkpoint.safetensors    weights, optimizer and counters, about twenty times a training
"""

from __future__ import annotations

import json
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
from blockem.store import (
    check_replaceable,
    claim_scratch,
    content_key,
    is_scratch_of,
    made_with,
    read_json,
    scratch_of,
    write_json,
    write_tensors,
)

ACTIVATIONS, CHECKPOINT, CARD = "activations.safetensors", "checkpoint.safetensors", "card.json"
CHECKPOINTS = 20


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

    The folder appears whole or not at all. Returns the SAE as loaded back from disk, and its fit on held-out tokens. A killed training
    goes on where it was when it is asked for again, and one that is finished is only loaded.
    """
    return train_dictionaries(lm, examples, {settings.block: out}, settings, progress)[settings.block]


def train_dictionaries(
    lm: LanguageModel,
    examples: Sequence[Example],
    outs: Mapping[int, Path],
    settings: SaeTraining,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[int, tuple[Dictionary, Fit]]:
    """The same at several blocks, from one pass over the data, whose activations are all in memory and then on disk until they are used.

    Args:
        outs: the folder to write, by block; `settings.block` is not looked at.
    """
    outs = {block: out.resolve() for block, out in outs.items()}  # `.` has no name of its own
    for out in outs.values():
        check_replaceable(out, CARD, "SAE")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    n_held = max(1, math.ceil(settings.held_out * len(examples)))
    if len(examples) <= n_held:
        raise BlockemError(f"{len(examples)} rows are too few to train an SAE on and hold some out")
    bar = progress or (lambda _what, _done, _total: None)
    rows = [[list(part) for part in example.messages] for example in examples]
    keys = {block: content_key("sae", lm.id, lm.revision, rows, asdict(replace(settings, block=block))) for block in outs}
    todo = [block for block, out in outs.items() if not made_with(out / CARD, keys[block])]
    missing = [block for block in todo if not _has_activations(scratch_of(outs[block]), keys[block])]
    if missing:
        held = activations_at(lm, [examples[i] for i in order[:n_held]], missing, settings.max_tokens)
        acts = activations_at(
            lm,
            [examples[i] for i in order[n_held:]],
            missing,
            settings.max_tokens,
            settings.max_activations,
            progress=lambda done, total: bar("activations", done, total),
        )
        found = len(acts[missing[0]])
        if found < settings.batch:  # an epoch gives whole batches only
            raise BlockemError(f"{found} activations do not fill one batch of {settings.batch}; give more text or a smaller batch")
        for block in missing:
            scratch = scratch_of(outs[block])
            claim_scratch(scratch, keys[block])
            write_tensors(scratch / ACTIVATIONS, {"train": acts.pop(block), "held": held.pop(block)})
    for block in todo:
        _train(lm, replace(settings, block=block), keys[block], outs[block], bar)
    return {block: (load_dictionary(str(out)), Fit(**read_json(out / CARD, "card")["held_out"])) for block, out in outs.items()}


def _has_activations(scratch: Path, key: str) -> bool:
    return is_scratch_of(scratch, key) and (scratch / ACTIVATIONS).is_file()


def _train(lm: LanguageModel, settings: SaeTraining, key: str, out: Path, bar: Callable[[str, int, int], None]) -> None:
    """One SAE on the activations `[tokens, d_model]` in its scratch folder, measured on those of held-out rows."""
    from sae_lens import (
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from safetensors.torch import load_file

    scratch = scratch_of(out)
    kept = load_file(scratch / ACTIVATIONS)
    acts, held = kept["train"], kept["held"]
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
    steps = total // settings.batch
    config = SAETrainerConfig(
        total_training_samples=total,
        train_batch_size_samples=settings.batch,
        lr=settings.lr,
        lr_end=0.0,
        lr_warm_up_steps=max(1, steps // 50),
        lr_decay_steps=steps // 5,
        dead_feature_window=max(20, steps // 10),
        n_checkpoints=CHECKPOINTS,
        logger=LoggingConfig(log_to_wandb=False),
    )

    def batches() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(settings.seed)
        done = 0
        while True:
            shuffled = torch.randperm(len(acts), generator=generator)
            for chosen in shuffled[: len(acts) // settings.batch * settings.batch].split(settings.batch):
                if done >= trainer.n_training_samples:  # those before it were seen before the checkpoint
                    bar("training", min(done, total), total)
                    yield acts[chosen].float() / scale
                done += settings.batch

    trainer: Any = SAETrainer(config, sae, batches(), save_checkpoint_fn=lambda checkpoint_path: _save(trainer, scratch / CHECKPOINT))
    if (scratch / CHECKPOINT).is_file():
        _go_on(trainer, scratch / CHECKPOINT)
    trained = trainer.fit()
    _unscale(trained, scale)
    trained.cfg.metadata.hook_name = f"blocks.{settings.block}.hook_resid_post"
    trained.cfg.metadata.model_name = lm.id
    making = scratch / "sae"
    shutil.rmtree(making, ignore_errors=True)
    trained.save_inference_model(making)
    _store_as(making / "sae_weights.safetensors", settings.store_dtype)
    dictionary = load_dictionary(str(making))
    write_json(
        making / CARD,
        {
            "model": lm.id,
            "revision": lm.revision,
            "settings": asdict(settings),
            "activations": len(acts),
            "held_out": asdict(measure_fit(dictionary, held)),
            "training_sample": asdict(measure_fit(dictionary, acts[:200_000])),
            "key": key,
        },
    )
    shutil.rmtree(out, ignore_errors=True)
    making.rename(out)
    shutil.rmtree(scratch)


COUNTERS = ("act_freq_scores", "n_forward_passes_since_fired")


def _save(trainer: Any, path: Path) -> None:
    """A checkpoint in one file. SAELens calls this after a step and before it counts the step."""
    from blockem.checkpoints import optimizer_state

    tensors, record = optimizer_state(trainer.optimizer, trainer.lr_scheduler)
    named = {f"optimizer/{name}": one for name, one in tensors.items()}
    named |= {f"sae/{name}": one for name, one in trainer.sae.state_dict().items()}
    named |= {f"counter/{name}": getattr(trainer, name) for name in COUNTERS}
    record["samples"], record["steps"] = trainer.n_training_samples, trainer.n_training_steps + 1
    record["frac_active"] = trainer.n_frac_active_samples
    record["coefficients"] = {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()}
    write_tensors(path, named, {"state": json.dumps(record)})


def _go_on(trainer: Any, path: Path) -> None:
    """Take back what `_save` wrote."""
    from safetensors import safe_open

    from blockem.checkpoints import set_optimizer_state

    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["state"])
        parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "sae": {}, "counter": {}}
        names = file.keys()
        for name in names:
            kind, _, rest = name.partition("/")
            parts[kind][rest] = file.get_tensor(name)
    trainer.sae.load_state_dict(parts["sae"])
    set_optimizer_state(trainer.optimizer, trainer.lr_scheduler, parts["optimizer"], record)
    for name, one in parts["counter"].items():
        setattr(trainer, name, one)
    trainer.n_training_samples, trainer.n_training_steps = record["samples"], record["steps"]
    trainer.n_frac_active_samples = record["frac_active"]
    for name, state in record["coefficients"].items():
        trainer.coefficient_schedulers[name].load_state_dict(state)
    trainer.checkpoint_thresholds = [one for one in trainer.checkpoint_thresholds if one >= trainer.n_training_samples]


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
