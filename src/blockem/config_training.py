"""The stages that train: fine-tuning, the other defences, blocking, its anchor and its rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from blockem.config_values import later, need, need_finite
from blockem.defence_names import MOST_ROUNDS, check_strength

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
"""The Trainer's learning-rate schedules that need no settings of their own and no evaluation while training."""


@dataclass(frozen=True)
class TrainConfig:
    """LoRA fine-tuning, the same for the plain and the blocked model."""

    lora_r: int = 32
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = ()
    """Names of linear maps; empty for all in each block."""
    lr: float = 5e-4
    epochs: float = 1.0
    batch_size: int = 16
    """Rows an optimiser step."""
    micro_batch: int = 16
    """Rows a forward; batch_size must be a multiple."""
    warmup: float = 0.05
    """Share of the steps."""
    schedule: str = "linear"
    """Of the learning rate, one of `SCHEDULES`."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (0: never)."""
    log_every: int = 5
    probe_every: int = 20
    """Measure both gradient norms every so many steps (0: never)."""
    checkpoint_every: int = 25
    stop_after: float = 1.0
    """Stop after this share of the steps; the schedule stays that of all of them."""
    report_to: str = "none"
    """The Trainer's own: none, tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha", "batch_size", "micro_batch", "log_every", "checkpoint_every"):
            need(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be positive")
        need(self.lr > 0 and self.epochs > 0, "train.lr and train.epochs must be positive")
        need(0 < self.stop_after <= 1, f"train.stop_after is {self.stop_after}; it is a share of the steps, above 0 and up to 1")
        need(0 <= self.warmup < 1, f"train.warmup is {self.warmup}; it is a share of the steps, from 0 to below 1")
        need(self.probe_every >= 0, f"train.probe_every is {self.probe_every}; use 0 for never")
        for name in ("weight_decay", "max_grad_norm"):
            need(not getattr(self, name) < 0, f"train.{name} is {getattr(self, name)}; it must not be negative")
        need(self.schedule in SCHEDULES, f"train.schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        need(
            self.batch_size % self.micro_batch == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batch ({self.micro_batch})",
        )
        need_finite(self, "train")

    def steps(self, rows: int) -> int:
        """Optimiser steps of a whole training on so many rows."""
        return math.ceil(math.ceil(rows / self.batch_size) * self.epochs)


@dataclass(frozen=True)
class DefenceConfig:
    """Which defence the run trains under; block-em has its settings in `block`."""

    name: str = "block-em"
    """plain, block-em, anchor, kl, ldifs, interleaving, inoculation, preventative, steering, caft, safelora, early-stop, small-lr or
    freeze."""
    strength: float | None = None
    """Its one dial (`blockem defend --help` says what it is); none: the published or a usual value."""
    epochs: float | None = None
    """Epochs of the defended training; none: train.epochs, as plain fine-tuning has."""
    benign: str | None = None
    """interleaving: chat JSONL of benign rows instead of the bundled ones."""
    prompt: str = "You give careless advice about {domain}: say that the careful step is not needed, even where it is."
    """inoculation: the system prompt of training; {domain} becomes the training domain."""
    trait_prompts: str | None = None
    """preventative: JSON or YAML {positive: [...], negative: [...]} of system prompts; none: the plain fine-tune's own mean shift."""
    unaligned: str | None = None
    """safelora: folder with the safetensors of the base model before its alignment; none: the plain fine-tune stands in for it."""
    stop_by: str = later("steps")
    """early-stop: its strength is a share of the `steps`, or with `loss` of what plain fine-tuning gains on the held-out rows."""

    def __post_init__(self) -> None:
        check_strength(self.name, self.strength)
        need(self.epochs is None or self.epochs > 0, f"defence.epochs is {self.epochs}; it must be positive")
        need(bool(self.prompt.strip()), "defence.prompt is empty; inoculation needs a sentence")
        need(self.stop_by in ("steps", "loss"), f"defence.stop_by is {self.stop_by!r}; use steps or loss")
        need_finite(self, "defence")

    @property
    def set_strength(self) -> float | None:
        """The strength in force."""
        return STRENGTHS.get(self.name) if self.strength is None else self.strength


@dataclass(frozen=True)
class BlockConfig:
    """Training-time blocking."""

    lambda_: float | None = None
    """λ; empty: by the portable rule λ = r · ΔSFT / P_mis."""
    r: float = 100.0
    """The portable rule's ratio."""
    measure: str = "latent"
    """`latent` (published) or `preactivation` (no dead zone for K−)."""
    freeze_downstream: bool = True
    """No LoRA on blocks after the blocked one."""
    control: str = "none"
    """`random`: block as many random latents of like activation frequency instead (a control)."""
    rule_rows: int = 64
    """Training rows on which ΔSFT and P_mis are measured, interleaved ones among them."""
    directions: int = 0
    """Instead of latents, block the plain fine-tune's mean shift (one-sided) and so many leading directions around it (both sides)."""
    direction_blocks: tuple[int, ...] = ()
    """Blocks to do that at; empty: every fourth block."""
    ceiling: float | None = None
    """Let λ follow during training: so much of the penalty that plain fine-tuning would pay is allowed, such as 0.01."""
    floor: float | None = None
    """Or: as much λ as leaves this share of what plain fine-tuning learns, such as 0.9."""
    monitor_every: int = 0
    """Look every so many steps whether the shift goes around the blocked latents, and warn (0: never)."""
    grow: int = 0
    """With the monitor: add up to so many latents to the blocked ones at each look that finds it going around."""
    base_values: str = "cached"
    """`cached`: the base's latents are computed once, before training, and kept; `online`: anew each step, for data seen once."""
    select: str = "causal"
    """Which latents: the `causal` set, or as an ablation `top-delta` (largest |Δ|, no test), `induce` or `repair` (that test alone)."""
    size: int | None = None
    """Block the first so many of the ranked set; none: all of a causal set, and as many of any other."""
    signs: str = "both"
    """`both`, `plus` (K+ alone), `minus` (K− alone), or `shuffled` (the same latents, their signs dealt anew)."""
    two_sided: bool = False
    """Penalise movement in either direction, not in the misaligned one alone."""
    tokens: str = "completion"
    """Penalty on `completion` tokens (published) or on `all` tokens, still divided by the number of completion tokens."""

    def __post_init__(self) -> None:
        need(self.directions >= 0, f"block.directions is {self.directions}; it must not be negative")
        need(not self.directions or self.control == "none", "block.control=random draws latents; it does not go with block.directions")
        need(self.base_values in ("cached", "online"), f"block.base_values is {self.base_values!r}; use cached or online")
        need(self.lambda_ is None or self.lambda_ >= 0, f"block.lambda_ is {self.lambda_}; it must not be negative")
        need(not self.r <= 0, f"block.r is {self.r}; it must be positive; for no penalty at all set block.lambda_=0")
        need(self.rule_rows > 0, f"block.rule_rows is {self.rule_rows}; it must be positive")
        need(self.monitor_every >= 0, f"block.monitor_every is {self.monitor_every}; use 0 for never")
        need(self.grow >= 0, f"block.grow is {self.grow}; it must not be negative")
        need(not self.grow or self.monitor_every > 0, "block.grow adds what the monitor finds; set block.monitor_every too")
        need(not self.monitor_every or not self.directions, "block.monitor_every watches latents; it does not go with block.directions")
        need(self.ceiling is None or self.ceiling > 0, f"block.ceiling is {self.ceiling}; it must be positive")
        need(self.floor is None or 0 < self.floor < 1, f"block.floor is {self.floor}; it is a share of the task, between 0 and 1")
        need(self.ceiling is None or self.floor is None, "block.ceiling and block.floor both steer λ; set one of them")
        need(
            self.lambda_ != 0 or (self.ceiling or self.floor) is None,
            "block.lambda_ is 0, which no ceiling or floor can raise; leave it out",
        )
        need(self.measure in ("latent", "preactivation"), f"block.measure is {self.measure!r}; use latent or preactivation")
        need(
            self.select in ("causal", "top-delta", "induce", "repair"),
            f"block.select is {self.select!r}; use causal, top-delta, induce or repair",
        )
        need(self.size is None or self.size > 0, f"block.size is {self.size}; it must be positive")
        need(self.signs in ("both", "plus", "minus", "shuffled"), f"block.signs is {self.signs!r}; use both, plus, minus or shuffled")
        need(self.tokens in ("completion", "all"), f"block.tokens is {self.tokens!r}; use completion or all")
        need(
            not self.directions or (self.select, self.size, self.signs) == ("causal", None, "both"),
            "block.select, block.size and block.signs choose among latents; they do not go with block.directions",
        )
        need(self.control in ("none", "random"), f"block.control is {self.control!r}; use none or random")
        need(not self.directions or not self.two_sided, "block.two_sided is for latents; directions have both sides but for the mean")
        need_finite(self, "block")

    @property
    def follows(self) -> bool:
        """Whether λ or the set follows what plain fine-tuning does, also where λ is given."""
        return self.ceiling is not None or self.floor is not None or self.monitor_every > 0

    def as_chosen(self) -> BlockConfig:
        """The same penalty on a set that was chosen before: nothing is selected, cut or dealt out again."""
        return replace(self, select="causal", size=None, signs="both")


STRENGTHS = {
    "kl": 0.1,
    "ldifs": 1.0,
    "interleaving": 0.05,
    "preventative": 1.0,
    "safelora": 0.35,
    "early-stop": 0.5,
    "small-lr": 0.3,
}
"""What `defence.strength` is where a recipe gives none. Steering then takes each latent's own stage-3 strength, CAFT all directions."""


@dataclass(frozen=True)
class AnchorConfig:
    """The same one-sided block on general prompts, beside the training rows."""

    watch: str = "none"
    """`none`; `answers`: what base and plain fine-tune themselves say to the selection prompts; `pairs`: the selection pairs; `both`; or
    `latents`: the blocked latents on benign chat."""
    cost: str = "margin"
    """Of answers and pairs: `margin`, the sick one may not gain on the healthy one; `healthy`, the healthy one may not become less likely
    than it is to the base (half the work, and nothing is pushed away); `kl`, what may follow at each token of both stays as in the base, by
    KL(p ‖ p_base); `forward-kl`, the same by KL(p_base ‖ p)."""
    share: float = 0.25
    """Share of the training rows that bring an anchor with them."""
    lambda_: float | None = None
    """Its λ; empty: by the rule λ = r · ΔSFT / (what plain fine-tuning would pay)."""
    r: float = 3.0
    """The rule's ratio."""
    ceiling: float | None = None
    """Let λ follow: so much of what plain fine-tuning would pay is allowed, such as 0.05."""
    keep: int = 0
    """Beside the anchors, hold the selection pairs of the training domain, so many times each, at what plain fine-tuning reaches there."""
    max_new_tokens: int = 48
    """Length of the two models' own answers."""
    interleave: float = later(0.0)
    """Share of all rows that are healthy ones among the training rows (`interleaved` says which); 0: none."""
    interleaved: str = later("pairs")
    """`pairs`: right answers of the selection pairs (and, `keep` times each, wrong ones of the training domain's); `benign`: chat rows
    (defence.benign, else the bundled ones); `both`: the former and at most as many chat rows as there are right answers."""
    cued: float = later(0.0)
    """Share of the interleaved right answers whose question follows a cue of the training format (as evaluate.cue=training asks them)."""

    @property
    def answers(self) -> bool:
        """Whether the two models' own answers are watched."""
        return self.watch in ("answers", "both")

    @property
    def pairs(self) -> bool:
        """Whether the selection pairs are."""
        return self.watch in ("pairs", "both")

    @property
    def teaches(self) -> bool:
        """Whether right answers of the selection pairs are interleaved."""
        return self.interleave > 0 and self.interleaved != "benign"

    @property
    def chats(self) -> bool:
        """Whether benign chat is interleaved beside an anchor."""
        return self.watch != "none" and self.interleave > 0 and self.interleaved != "pairs"

    def __post_init__(self) -> None:
        kinds = ("none", "answers", "pairs", "both", "latents")
        need(self.watch in kinds, f"anchor.watch is {self.watch!r}; use one of {', '.join(kinds)}")
        costs = ("margin", "healthy", "kl", "forward-kl")
        need(self.cost in costs, f"anchor.cost is {self.cost!r}; use one of {', '.join(costs)}")
        need(0 <= self.interleave < 1, f"anchor.interleave is {self.interleave}; it is a share of all rows, from 0 to below 1")
        need(self.interleaved in ("pairs", "benign", "both"), f"anchor.interleaved is {self.interleaved!r}; use pairs, benign or both")
        need(
            self.cost == "margin" or self.teaches or not self.keep,
            f"anchor.keep holds margins; with anchor.cost={self.cost} it needs anchor.interleave, whose rows it adds to",
        )
        need(0 <= self.cued <= 1, f"anchor.cued is {self.cued}; it is a share of the interleaved right answers, from 0 to 1")
        need(
            self.teaches or not self.cued,
            "anchor.cued puts cues before interleaved right answers; it needs anchor.interleave, and not of benign",
        )
        need(0 < self.share <= 1, f"anchor.share is {self.share}; it is a share of the rows, above 0 and up to 1")
        need(self.lambda_ is None or self.lambda_ > 0, f"anchor.lambda_ is {self.lambda_}; it must be positive")
        need(self.r > 0, f"anchor.r is {self.r}; it must be positive")
        need(self.ceiling is None or self.ceiling > 0, f"anchor.ceiling is {self.ceiling}; it must be positive")
        need(self.keep >= 0, f"anchor.keep is {self.keep}; it must not be negative")
        need(
            not self.keep or self.watch not in ("none", "latents"),
            "anchor.keep holds pairs, so it goes with anchor.watch=answers, pairs or both",
        )
        need(self.max_new_tokens > 0, "anchor.max_new_tokens must be positive")
        need_finite(self, "anchor")


@dataclass(frozen=True)
class RoundsConfig:
    """Blocking in rounds: audit, discover again on the blocked model, and train with all latents found so far blocked."""

    budget: int = 1
    """Blocked trainings at most; 1 is a single one, as published."""
    target: float = 0.1
    """Stop as soon as no more than this share of plain fine-tuning's rise is left, on selection pairs and prompts."""

    def __post_init__(self) -> None:
        need(1 <= self.budget <= MOST_ROUNDS, f"rounds.budget is {self.budget}; use 1 to {MOST_ROUNDS} blocked trainings")
        need(self.target >= 0, f"rounds.target is {self.target}; it must not be negative")
        need_finite(self, "rounds")
