"""One frozen dataclass a stage, the recipe that holds them, YAML in and out.

Every default stands here and in `config_training.py`, and nowhere else.
Values are checked at construction; a mistake is one sentence that names the field.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockem.config_training import AnchorConfig, BlockConfig, DefenceConfig, RoundsConfig, TrainConfig
from blockem.config_values import MOST_SEED, build, later, nearest, need, need_finite, plain, read_yaml
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

    def __post_init__(self) -> None:
        dtypes = ("auto", "bfloat16", "float16", "float32")
        need(self.dtype in dtypes, f"model.dtype is {self.dtype!r}; use one of {', '.join(dtypes)}")


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

    def check_training_rows(self) -> None:
        """Refuse to train on bundled rows where the held-out ones are the user's own: --data was forgotten."""
        need(
            bool(self.train) or not self.heldout,
            f"data.heldout is {self.heldout}, but the training rows would be the bundled wrong advice on {self.domain}; "
            "give your own with --data, or leave --heldout out",
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
    more: tuple[str, ...] = later(())
    """Further dictionaries at other blocks, each as ID@BLOCK: `run`, `discover` and `block` take them all together."""

    def __post_init__(self) -> None:
        need(self.block >= 0, f"sae.block is {self.block}; blocks are counted from 0")
        taken = [self.block]
        for one in self.more:
            name, _, block = one.rpartition("@")
            need(bool(name) and block.isdecimal(), f"sae.more names {one!r}; write each as FOLDER_OR_ID@BLOCK, such as saes/block-24@24")
            need(int(block) not in taken, f"sae.more names block {int(block)}, which has an SAE already; give each block one")
            taken.append(int(block))
        need(
            not self.min_variance_explained > 1,
            f"sae.min_variance_explained is {self.min_variance_explained}; it is a share, and no SAE explains more than 1",
        )
        need_finite(self, "sae")

    @property
    def each(self) -> tuple[SaeConfig, ...]:
        """One configuration for each block: that of `id` first, then those of `more`."""
        named = [one.rpartition("@") for one in self.more]
        further = [dataclasses.replace(self, id=name, block=int(block), more=()) for name, _, block in named]
        return dataclasses.replace(self, more=()), *further


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
    group: int = later(0)
    """Where fewer than `keep` pass alone, test those that failed in groups of so many (0: never; with halving on all pairs)."""
    rule: str = later("best")
    """Of the strengths inside the budget stage 3 takes on each side the `best` (published) or the `strongest` (its code's other rule)."""

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
        for name in ("pool", "keep", "size", "pairs", "max_new_tokens"):
            need(getattr(self, name) > 0, f"discover.{name} is {getattr(self, name)}; it must be positive")
        need(self.prescreen >= 0, f"discover.prescreen is {self.prescreen}; use 0 for all")
        need(bool(self.strengths) and min(self.strengths) > 0, "discover.strengths needs at least one positive number")
        need(min(self.alpha_induce, self.alpha_repair) > 0, "discover.alpha_induce and discover.alpha_repair must be positive")
        need(0 <= self.error < 1, f"discover.error is {self.error}; it is a probability, from 0 to below 1")
        need(all(n >= 2 for n in self.rungs), "discover.rungs must be numbers of pairs, at least 2 each")
        need(0 <= self.budget <= 1, f"discover.budget is {self.budget}; it is a share between 0 and 1")
        need(self.rule in ("best", "strongest"), f"discover.rule is {self.rule!r}; use best or strongest")
        need(
            self.rule == "best" or not self.halving,
            "discover.halving drops what cannot be among the best, which discover.rule=strongest does not ask; set one of them back",
        )
        need(self.group == 0 or self.group >= 2, f"discover.group is {self.group}; use 0 for none, or at least 2 latents a group")
        need(
            self.group <= min(self.keep, self.size),
            f"discover.group is {self.group}; a group goes on whole, so use at most discover.keep and discover.size",
        )
        need_finite(self, "discover")


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
    task_answers: int = 20
    """Held-out questions of the training domain that are answered and judged apart (0: none): does the model still do its task?"""
    general_rows: int = 60
    judge: str = "local"
    """Who judges sampled answers: `local` (bundled), a judge's folder, a server's address (http…/v1), or `none`."""
    judge_model: str | None = None
    """The model that a server shall judge with."""
    judge_reply_tokens: int = 16
    """Longest reply of that model; one that thinks before it answers needs a few thousand."""
    cue: str = "none"
    """`training`: sample answers a second time, to the final prompts with a cue of the training format before them."""

    def __post_init__(self) -> None:
        need(self.resamples >= 100, f"evaluate.resamples is {self.resamples}; use at least 100")
        need(self.max_new_tokens > 0, "evaluate.max_new_tokens must be positive")
        need(self.temperature >= 0, f"evaluate.temperature is {self.temperature}; 0 is greedy")
        need(self.judge_reply_tokens > 0, f"evaluate.judge_reply_tokens is {self.judge_reply_tokens}; it must be positive")
        need(self.task_answers >= 0, f"evaluate.task_answers is {self.task_answers}; use 0 for none")
        need(self.general_rows > 0, f"evaluate.general_rows is {self.general_rows}; it must be positive")
        from blockem.judges.address import SERVER, Address, judge_named

        object.__setattr__(self, "judge", judge_named(self.judge, "evaluate.judge"))
        if self.judge.startswith(SERVER):
            need(
                not Address(self.judge, "OPENAI_API_KEY").has_credentials,
                "evaluate.judge holds a user name or a password, and a run folder keeps its recipe: "
                "leave them out of the address and put the key into OPENAI_API_KEY",
            )
        need(self.cue in ("none", "training"), f"evaluate.cue is {self.cue!r}; use none or training")
        need_finite(self, "evaluate")


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
        need_finite(self, "")


@dataclass(frozen=True)
class ReemergeConfig:
    """Training the blocked model on until misalignment comes back, and asking where it came back (`blockem reemerge`)."""

    epochs: int = 5
    """Epochs of the blocked training, with one schedule over all of them; the last one's model is the re-emerged one."""
    prompts: int = 20
    """Final prompts outside the training domain that each epoch's model answers."""
    patch_pairs: int = 60
    """Evaluation pairs outside the training domain whose margin is measured under each patch."""
    patch_blocks: tuple[int, ...] = ()
    """Blocks to patch at; empty: every block."""
    decode_prompts: int = 12
    """Final prompts answered while one block is patched at each decoding step (0: none)."""
    decode_tokens: int = 32
    """New tokens of those answers."""
    decode_blocks: tuple[int, ...] = ()
    """Blocks to patch at while decoding; empty: half way to the SAE's block, that block, and half way from it to the last."""
    decode_positions: str = "last"
    """Which positions a decoding step patches: the `last` one, or `all` so far."""

    def __post_init__(self) -> None:
        for name in ("epochs", "prompts", "patch_pairs", "decode_tokens"):
            need(getattr(self, name) > 0, f"reemerge.{name} is {getattr(self, name)}; it must be positive")
        need(self.decode_prompts >= 0, f"reemerge.decode_prompts is {self.decode_prompts}; use 0 for none")
        need(self.decode_positions in ("last", "all"), f"reemerge.decode_positions is {self.decode_positions!r}; use last or all")


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
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    defence: DefenceConfig = field(default_factory=DefenceConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reemerge: ReemergeConfig = field(default_factory=ReemergeConfig)

    def __post_init__(self) -> None:
        need(0 <= self.seed <= MOST_SEED, f"seed is {self.seed}; use a whole number from 0 to {MOST_SEED}")
        need(
            not (self.block.floor and self.anchor.watch != "none" and self.anchor.interleave),
            "block.floor compares each step's loss with plain fine-tuning's on the same rows; anchor.interleave adds others",
        )
        need(
            self.rounds.budget == 1 or (self.block.control == "none" and not self.block.directions),
            "rounds discover what the next training blocks, which block.control=random and block.directions do not; set rounds.budget=1",
        )
        need(
            not (self.block.grow and self.anchor.watch == "latents" and self.anchor.ceiling),
            "anchor.ceiling is measured against the latents that are blocked at first, and block.grow adds others; leave one of them out",
        )
        if self.sae.more:
            need(self.rounds.budget == 1, "rounds block more latents at one block; set rounds.budget=1, or leave sae.more out")
            need(not self.block.grow, "block.grow adds latents at one block; set block.grow=0, or leave sae.more out")
            need(not self.block.directions, "block.directions blocks without any SAE; set block.directions=0, or leave sae.more out")

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
                raise BlockemError(f"unknown recipe field {path!r}{self._known(tree, place, path)}")
            place[name] = value
        return recipe_from(tree)

    def _known(self, tree: dict[str, Any], place: Any, path: str) -> str:
        """What may have been meant by an unknown path, and the fields where it stands."""
        if isinstance(place, dict) and place and place is not tree:
            return f"{nearest(path.split('.')[-1], place)}; known there: {', '.join(place)}"
        return f"{nearest(path, [*tree, *field_paths()])}; known: {', '.join(tree)}"


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
    values = read_yaml(Path(path), "recipe") or {}
    try:
        return recipe_from(values)
    except BlockemError as error:
        raise BlockemError(f"{path}: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out."""
    import yaml

    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return text
