"""The defences by name: what a recipe and the command line may say, a line on each, and what its strength may be."""

from __future__ import annotations

import math

from blockem.config_values import need

BLOCK_EM = "block-em"
DEFENCES = {
    "plain": "no defence: plain fine-tuning, what all others are compared with",
    "block-em": "a one-sided penalty on the causal latents (settings under block.*)",
    "anchor": "the one-sided block on general prompts alone, without latents (settings under anchor.*)",
    "kl": "a penalty on the divergence of the answers' token distributions from the base's; strength: its weight",
    "ldifs": "a penalty on the distance of every fifth block's output from the base's; strength: its weight",
    "interleaving": "benign chat rows mixed into the training rows; strength: their share of all rows",
    "inoculation": "a system prompt in training only that asks for the careless advice",
    "preventative": "in training only, the fine-tune's own mean shift is added at one block; strength: how many times",
    "steering": "plain fine-tuning; at inference the causal latents' directions are subtracted; strength: alpha of each",
    "caft": "in training only, the causal latents' directions are taken out of the stream; strength: how many of them",
    "safelora": "after training, updates unlike the alignment direction are projected onto it; strength: the threshold",
    "early-stop": "plain fine-tuning stopped early on the same schedule; strength: share of steps, or of gain (defence.stop_by=loss)",
    "small-lr": "plain fine-tuning at a smaller learning rate; strength: factor on train.lr",
    "freeze": "no LoRA on the blocks after sae.block, and no penalty",
}
"""In the order of reports and of `blockem defend --help`."""
NEEDS_LATENTS = ("block-em", "steering", "caft")
"""Stages 1 to 3 run before these."""
WITHOUT_STRENGTH = ("plain", "anchor", "inoculation", "freeze")
RANGES = {
    "kl": ("0 or more", 0.0, math.inf),
    "ldifs": ("0 or more", 0.0, math.inf),
    "interleaving": ("a share of all rows, from 0 to below 1", 0.0, math.nextafter(1.0, 0.0)),
    "preventative": ("0 or more", 0.0, math.inf),
    "steering": ("0 or more", 0.0, math.inf),
    "caft": ("a whole number of directions, at least 1", 1.0, math.inf),
    "safelora": ("a cosine, from -1 to 1", -1.0, 1.0),
    "early-stop": ("a share of the steps (or of plain fine-tuning's gain), above 0 and up to 1", math.nextafter(0.0, 1.0), 1.0),
    "small-lr": ("a factor above 0", math.nextafter(0.0, 1.0), math.inf),
}
"""What the strength of each is in words, and its least and greatest value."""


MOST_ROUNDS = 5


def round_name(number: int) -> str:
    """What the run folder and the report call the model of a later round of blocking."""
    return f"round-{number}"


def epoch_name(epoch: int) -> str:
    """Where an adapter's folder holds it as it was after so many epochs, counted from 1."""
    return f"epoch-{epoch}"


def folder_of(name: str) -> str:
    """What the run folder and the report call the model trained under a defence."""
    return "blocked" if name == BLOCK_EM else name


def check_strength(name: str, strength: float | None) -> None:
    """Refuse an unknown defence, or a strength that it cannot have.

    Raises:
        BlockemError: one sentence that says what to do.
    """
    need(name in DEFENCES, f"defence.name is {name!r}; use one of {', '.join(DEFENCES)}")
    if strength is None:
        return
    need(name != BLOCK_EM, "defence.strength does nothing for block-em; set block.lambda_ or block.r instead")
    need(name not in WITHOUT_STRENGTH, f"defence.strength does nothing for {name}, which has none; leave it out")
    words, least, most = RANGES[name]
    fits = math.isfinite(strength) and least <= strength <= most and (name != "caft" or strength == int(strength))
    need(fits, f"defence.strength is {strength:g}; for {name} it is {words}")
