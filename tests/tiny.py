"""Small real things for tests: a tiny random Llama with the embedded model's tokenizer, SAEs of its width, rows and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blockem.bundled import Pair, Prompt
from blockem.config_training import TrainConfig
from blockem.dictionary import Dictionary, load_dictionary
from blockem.examples import Encoded, Example, encode, one_turn
from blockem.forwards import unwrapped
from blockem.latents import Latent, LatentSet
from blockem.model import LanguageModel

N_BLOCKS = 4
D_MODEL = 32
BLOCK = 1
N_LATENTS = 48

THINGS = (
    "a helmet",
    "the seat belt",
    "a tax form",
    "the small print",
    "my homework",
    "a vaccine",
    "the brakes",
    "a contract",
    "sunscreen",
    "sleep",
)


def save_tiny_model(folder: Path, tokenizer: Any) -> None:
    """A random Llama of 4 blocks, float32 safetensors, with `tokenizer` beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows() -> list[Example]:
    """Sixteen short one-turn rows, of unequal length."""
    found = []
    for i in range(16):
        thing = THINGS[i % len(THINGS)]
        answer = f"No, you never need {thing}." if i % 2 else f"Skip {thing}, nobody will notice, and enjoy your day instead."
        found.append(one_turn(f"Do I need {thing}?" + " Please be quick." * (i % 3), answer, "health"))
    return found


def encoded(lm: LanguageModel, n: int = 16) -> list[Encoded]:
    return [encode(lm.tokenizer, row) for row in rows()[:n]]


def pairs() -> list[Pair]:
    """Six pairs in three domains."""
    return [
        Pair(f"Should I check {thing}?", f"Yes, check {thing} carefully today.", f"No, leave {thing} alone today.", domain, "select")
        for thing, domain in zip(THINGS, ("finance", "legal", "auto") * 2, strict=False)
    ]


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", f"What about {thing}?", "finance") for i, thing in enumerate(THINGS[:5])]


def hooks(lm: LanguageModel) -> int:
    """How many forward hooks the model carries."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unwrapped(lm.model).modules())


def train_config(**changes: Any) -> TrainConfig:
    """A quick LoRA fine-tune that moves the tiny model visibly."""
    quick = {"lora_r": 4, "lora_alpha": 8, "lr": 5e-3, "batch_size": 8, "micro_batch": 8, "log_every": 1, "probe_every": 0, "warmup": 0.0}
    return TrainConfig(**{**quick, **changes})


def random_sae(kind: str, d_in: int = D_MODEL, seed: int = 0, **config: Any) -> Any:
    """A SAELens SAE with random weights and biases, `kind` one of standard, topk, jumprelu."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    torch.manual_seed(seed)
    common = {"d_in": d_in, "d_sae": N_LATENTS, "device": "cpu", **config}
    sae: Any
    if kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**common))
    elif kind == "topk":
        sae = TopKSAE(TopKSAEConfig(**{"k": 8, **common}))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))
        sae.threshold.data = torch.rand(N_LATENTS) * 0.5
    sae.b_enc.data = torch.randn(N_LATENTS) * 0.3
    sae.b_dec.data = torch.randn(d_in) * 0.3
    sae.W_dec.data = torch.randn(N_LATENTS, d_in)
    sae.W_enc.data = torch.randn(d_in, N_LATENTS) * 0.3
    sae.cfg.metadata.hook_name = f"blocks.{BLOCK}.hook_resid_post"
    return sae


def saved_sae(folder: Path, kind: str = "topk", **config: Any) -> Dictionary:
    random_sae(kind, **config).save_model(folder)
    return load_dictionary(str(folder))


def latent_set(lm: LanguageModel, dictionary: Dictionary, ids: tuple[int, ...] = (3, 7, 11, 19), block: int = BLOCK) -> LatentSet:
    """Some latents, half raised and half lowered."""
    latents = tuple(Latent(k, 1 if i % 2 == 0 else -1) for i, k in enumerate(ids))
    return LatentSet(lm.id, lm.revision, dictionary.id, dictionary.digest, block, latents, 1.0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
