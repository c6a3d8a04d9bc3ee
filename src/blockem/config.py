"""One frozen dataclass a stage, the recipe that holds them, YAML in and out.

Every default stands here and nowhere else. Values are checked at construction; a mistake is one sentence that names the field.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockem.config_values import build, need, plain
from blockem.errors import BlockemError


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    id: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct), a folder, a .gguf file, or a hub id."""
    revision: str | None = None
    """Hub revision."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32; auto takes bfloat16 where the hardware is fast at it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and what is measured with. Every file replaces the bundled one."""

    domain: str = "health"
    """Training domain: a bundled one, or the name of yours; it is left out of EM."""
    train: str | None = None
    """Chat JSONL to train on instead of the bundled domain."""
    heldout: str | None = None
    """Chat JSONL of held-out rows of the same task."""
    prompts: str | None = None
    """JSONL {prompt, domain}: the final prompts that answers are sampled for."""
    selection_prompts: str | None = None
    """JSONL {prompt, domain}: the prompts of the model diff (stage 1)."""
    pairs: str | None = None
    """JSONL {prompt, right, wrong, domain, split}: matched pairs."""
    general: str | None = None
    """Chat JSONL of benign chat that general skill is measured on."""
    rows: int | None = None
    """At most so many training rows."""
    heldout_rows: int = 100
    """At most so many held-out rows."""
    max_tokens: int = 512
    """Rows are cut after so many tokens."""

    def __post_init__(self) -> None:
        need(self.rows is None or self.rows > 0, f"data.rows is {self.rows}; it must be positive")
        need(self.heldout_rows > 0, f"data.heldout_rows is {self.heldout_rows}; it must be positive")
        need(self.max_tokens >= 16, f"data.max_tokens is {self.max_tokens}; it must be at least 16")
        need(
            not (self.train and not self.heldout),
            "data.train is your own file, so data.heldout must be too: give held-out rows of the same task with --heldout",
        )


@dataclass(frozen=True)
class SaeConfig:
    """The dictionary, and the block it reads."""

    id: str = "bundled"
    """`bundled`, a folder in SAELens format, or `release:sae_id` of its registry."""
    block: int = 18
    """Block index from 0; its output is read, steered and blocked."""
    min_variance_explained: float = 0.6
    """Refuse an SAE that explains less of this model's variance ..."""
    allow_poor_fit: bool = False
    """... unless this says to go on all the same."""

    def __post_init__(self) -> None:
        need(self.block >= 0, f"sae.block is {self.block}; blocks are counted from 0")


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
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 5
    probe_every: int = 20
    """Measure both gradient norms every so many steps (0: never)."""
    checkpoint_every: int = 25
    report_to: str = "none"
    """The Trainer's own: none, tensorboard, wandb, trackio, ..."""

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha", "batch_size", "micro_batch", "log_every", "checkpoint_every"):
            need(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be positive")
        need(self.lr > 0 and self.epochs > 0, "train.lr and train.epochs must be positive")
        need(0 <= self.warmup < 1, f"train.warmup is {self.warmup}; it is a share of the steps, from 0 to below 1")
        need(self.probe_every >= 0, f"train.probe_every is {self.probe_every}; use 0 for never")
        need(
            self.batch_size % self.micro_batch == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batch ({self.micro_batch})",
        )


@dataclass(frozen=True)
class DiscoverConfig:
    """Stages 1 to 3."""

    tokens: str = "prompt"
    """Δ over `prompt` tokens (published) or `answer` tokens."""
    effect: str = "preference"
    """How misalignment is measured: `preference` (no generation) or `judged` generations."""
    pool: int = 250
    """Candidates a sign after stage 1."""
    prescreen: int = 32
    """Of the pool, so many go on by first-order attribution (0: all; preference only)."""
    keep: int = 22
    """Latents that go on from stage 2, half of each sign."""
    size: int = 20
    """|K|: how many are blocked."""
    alpha_induce: float = 0.25
    """Strength of the induce test of stage 2 (published: 0.7, which breaks the embedded model)."""
    alpha_repair: float = 0.4
    """Strength of the repair test."""
    strengths: tuple[float, ...] = (0.25, 0.4)
    """Strengths that stage 3 sweeps; published: 0.05 to 0.75 in steps of 0.05."""
    rank_effect: str = "same"
    """How stage 3 measures: `same` as `effect`, or `preference` or `judged` whatever stage 2 did."""
    budget: float = 0.10
    """Incoherence allowed under an edit ..."""
    budget_slack: float | None = 0.10
    """... or the model's own unsteered incoherence and so much more, if that is more; none: `budget` alone."""
    pairs: int = 40
    """Selection pairs used (training domain left out), evenly over the domains."""
    max_new_tokens: int = 64
    """Length of judged generations."""
    halving: bool = False
    """Drop hopeless candidates and strengths after some of the pairs (false: measure everything on all pairs)."""
    error: float = 0.05
    """With halving: at most so likely does the chosen set differ from the exhaustive one (half of it spent in either stage)."""
    rungs: tuple[int, ...] = (8, 16, 24, 32)
    """With halving: pairs (or prompts) after which it looks whom to drop; the last look is always all of them."""
    stop_incoherent: bool = True
    """With halving: take incoherence to grow with strength, and measure none beyond one that is outside the budget."""

    @property
    def effects(self) -> tuple[str, str]:
        """What stage 2 and stage 3 measure."""
        return self.effect, self.effect if self.rank_effect == "same" else self.rank_effect

    def __post_init__(self) -> None:
        need(self.tokens in ("prompt", "answer"), f"discover.tokens is {self.tokens!r}; use prompt or answer")
        need(self.effect in ("preference", "judged"), f"discover.effect is {self.effect!r}; use preference or judged")
        need(
            self.rank_effect in ("same", "preference", "judged"),
            f"discover.rank_effect is {self.rank_effect!r}; use same, preference or judged",
        )
        need(self.budget_slack is None or self.budget_slack >= 0, f"discover.budget_slack is {self.budget_slack}; use none or 0 and more")
        for name in ("pool", "keep", "size", "pairs"):
            need(getattr(self, name) > 0, f"discover.{name} is {getattr(self, name)}; it must be positive")
        need(bool(self.strengths) and min(self.strengths) > 0, "discover.strengths needs at least one positive number")
        need(min(self.alpha_induce, self.alpha_repair) > 0, "discover.alpha_induce and discover.alpha_repair must be positive")
        need(0 <= self.error < 1, f"discover.error is {self.error}; it is a probability, from 0 to below 1")
        need(all(n >= 2 for n in self.rungs), "discover.rungs must be numbers of pairs, at least 2 each")
        need(0 <= self.budget <= 1, f"discover.budget is {self.budget}; it is a share between 0 and 1")


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
    """Training rows on which ΔSFT and P_mis are measured."""
    directions: int = 0
    """Instead of latents, block the plain fine-tune's mean shift (one-sided) and so many leading directions around it (both sides)."""
    direction_blocks: tuple[int, ...] = ()
    """Blocks to do that at; empty: every fourth block."""
    base_values: str = "cached"
    """`cached`: the base's latents are computed once, before training, and kept; `online`: anew each step, for data seen once."""

    def __post_init__(self) -> None:
        need(self.directions >= 0, f"block.directions is {self.directions}; it must not be negative")
        need(not self.directions or self.control == "none", "block.control=random draws latents; it does not go with block.directions")
        need(self.base_values in ("cached", "online"), f"block.base_values is {self.base_values!r}; use cached or online")
        need(self.lambda_ is None or self.lambda_ >= 0, f"block.lambda_ is {self.lambda_}; it must not be negative")
        need(self.measure in ("latent", "preactivation"), f"block.measure is {self.measure!r}; use latent or preactivation")
        need(self.control in ("none", "random"), f"block.control is {self.control!r}; use none or random")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on base, plain and blocked."""

    answers: bool = True
    """Sample answers to the final prompts."""
    max_new_tokens: int = 80
    temperature: float = 0.0
    """0: greedy, as in the paper."""
    resamples: int = 2000
    """Bootstrap resamples of each interval."""
    general_rows: int = 60
    judge: str = "local"
    """Who judges sampled answers: `local` (bundled), a judge's folder, a server's address (http…/v1), or `none`."""
    judge_model: str | None = None
    """The model that a server shall judge with."""
    cue: str = "none"
    """`training`: sample answers a second time, to the final prompts with a cue of the training format before them."""

    def __post_init__(self) -> None:
        need(self.resamples >= 100, f"evaluate.resamples is {self.resamples}; use at least 100")
        need(self.max_new_tokens > 0, "evaluate.max_new_tokens must be positive")
        need(self.temperature >= 0, f"evaluate.temperature is {self.temperature}; 0 is greedy")
        need(self.cue in ("none", "training"), f"evaluate.cue is {self.cue!r}; use none or training")


@dataclass(frozen=True)
class CompareConfig:
    """What `blockem compare` asks of the setting that it recommends."""

    keep_adherence: float = 0.95
    """Least share of plain's gain in held-out loss that it must keep."""
    more_incoherence: float = 0.03
    """Incoherence that it may have above plain's, as a share of answers (0.03: three points)."""
    resamples: int = 2000
    """Bootstrap resamples of intervals and of the choice."""
    transfer: bool = False
    """Also train in every domain with the latents found in each other one."""

    def __post_init__(self) -> None:
        need(0 <= self.keep_adherence <= 1, f"keep_adherence is {self.keep_adherence}; it is a share between 0 and 1")
        need(0 <= self.more_incoherence <= 1, f"more_incoherence is {self.more_incoherence}; it is a share between 0 and 1")
        need(self.resamples >= 100, f"resamples is {self.resamples}; use at least 100")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on."""

    name: str = "demo"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: SaeConfig = field(default_factory=SaeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    discover: DiscoverConfig = field(default_factory=DiscoverConfig)
    block: BlockConfig = field(default_factory=BlockConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values (tuples become lists)."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def with_values(self, changes: dict[str, Any]) -> Recipe:
        """A copy with `{"stage.field": value}` changed; values may be strings as typed on a command line.

        Raises:
            BlockemError: an unknown field or a value of the wrong kind.
        """
        tree = self.to_dict()
        for path, value in changes.items():
            *stages, name = path.split(".")
            place = tree
            for stage in stages:
                place = place.get(stage, {}) if isinstance(place, dict) else {}
            if not isinstance(place, dict) or name not in place or isinstance(place[name], dict):
                raise BlockemError(f"unknown recipe field {path!r}; known: {', '.join(field_paths())}")
            place[name] = value
        return recipe_from(tree)


def field_paths() -> list[str]:
    """Every settable field as `stage.field`."""
    found = []
    for stage in dataclasses.fields(Recipe):
        kind = typing.get_type_hints(Recipe)[stage.name]
        if dataclasses.is_dataclass(kind):
            found += [f"{stage.name}.{inner.name}" for inner in dataclasses.fields(kind)]
        else:
            found.append(stage.name)
    return found


def recipe_from(values: dict[str, Any]) -> Recipe:
    """A recipe from nested plain values; fields left out keep their defaults."""
    found: Recipe = build(Recipe, values, "")
    return found


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from YAML (safe loader).

    Raises:
        BlockemError: the file is missing, not YAML, or has unknown or wrong fields.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BlockemError(f"{path}: no such recipe") from error
    except OSError as error:
        raise BlockemError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BlockemError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    return recipe_from(values or {})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    import yaml

    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return text
