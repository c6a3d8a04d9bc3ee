"""One recipe on one run folder: what is loaded for it, the keys of what it depends on, and steps that are done once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.config import Recipe
from blockem.defence_names import BLOCK_EM, DEFENCES, MOST_ROUNDS, folder_of, round_name
from blockem.errors import BlockemError
from blockem.progress import Console
from blockem.store import RunFolder, content_key, file_key, read_json

if TYPE_CHECKING:
    from blockem.dictionary import Dictionary
    from blockem.examples import Encoded
    from blockem.judges import Judge
    from blockem.model import LanguageModel

LATER_ROUNDS = tuple(round_name(number) for number in range(2, MOST_ROUNDS + 1))
VARIANTS = ("base", "plain", "blocked", *LATER_ROUNDS, "random", *(name for name in DEFENCES if name not in ("plain", BLOCK_EM)))
"""Every model that a run folder may hold, in the order of reports; all but the base have a folder of that name."""
ROUNDS = "rounds.json"
"""What the rounds of blocking did, and which model is the last."""
STEERING = "steering/vector.safetensors"
"""What test-time steering adds at inference; its adapter is the plain one."""


@dataclass
class Session:
    """One recipe, one run folder, and what is loaded for them (on first use, once)."""

    recipe: Recipe
    run: RunFolder
    console: Console
    judge: Judge | None = None

    @cached_property
    def lm(self) -> LanguageModel:
        from blockem.model import load_model

        self.console.start("model")
        config = self.recipe.model
        return load_model(config.id, config.revision, config.dtype, config.device)

    @cached_property
    def dictionary(self) -> Dictionary:
        from blockem.dictionary import check_width, load_dictionary

        self.lm.check_block(self.recipe.sae.block)
        found = load_dictionary(self.recipe.sae.id)
        check_width(found, self.lm)
        if found.block is not None and found.block != self.recipe.sae.block and not self.recipe.sae.allow_poor_fit:
            raise BlockemError(
                f"SAE {found.id!r} was trained on block {found.block}, but sae.block is {self.recipe.sae.block}; "
                f"set sae.block={found.block}, or --allow-poor-sae to go on all the same"
            )
        return found

    @cached_property
    def model_key(self) -> str:
        """What the model's numbers depend on; found without loading it."""
        from blockem.model import identify, pick_device, pick_dtype

        config = self.recipe.model
        device = pick_device(config.device)
        return content_key(config.id, identify(config.id, config.revision), str(pick_dtype(config.dtype, device)), device.type)

    @cached_property
    def sae_key(self) -> str:
        """What the dictionary's latents depend on: its weights, and the settings (k, for one) that say how they are read."""
        from blockem.dictionary import BUNDLED, BUNDLED_FOLDER

        folder = BUNDLED_FOLDER if self.recipe.sae.id == BUNDLED else Path(self.recipe.sae.id)
        files = [folder / name for name in ("sae_weights.safetensors", "cfg.json")]
        return content_key(self.recipe.sae.id, [file_key(one) if one.is_file() else "" for one in files], self.recipe.sae.block)

    @cached_property
    def data_key(self) -> str:
        """What the encoded training rows depend on."""
        data = self.recipe.data
        source = file_key(existing(data.train)) if data.train else bundled_key(f"domains/{data.domain}.jsonl")
        return content_key(source, data.domain, data.rows, data.max_tokens, self.recipe.seed)

    @cached_property
    def chosen_judge(self) -> Judge | None:
        """The judge that was given, else the recipe's; None where nothing is sampled or nobody judges."""
        from blockem.judges.choose import judge_of

        wanted = self.recipe.evaluate
        needed = wanted.answers or "judged" in self.recipe.discover.effects
        if self.judge is not None or not needed:
            return self.judge
        return judge_of(wanted, self.run / "verdicts.sqlite", self.console.bar)

    @property
    def judge_key(self) -> str:
        """What verdicts depend on; empty where nobody judges."""
        from blockem.judges.judge import judge_key

        return judge_key(self.chosen_judge)

    @property
    def main(self) -> str:
        """The model that the recipe's defence makes; of several rounds, the last."""
        name = self.recipe.defence.name
        return last_blocked(self.recipe, self.run.path) if name == BLOCK_EM else folder_of(name)

    def trained(self) -> dict[str, Path]:
        """The models that were trained in this run, by name, with their adapters; those of another recipe are left out."""
        left = self.leftovers()
        return {name: path for name, path in trained_in(self.run.path).items() if name not in left}

    def leftovers(self) -> list[str]:
        """Models in the run folder that another recipe made: on other rows, with other settings, or in more rounds than are wanted now."""
        try:
            current = task_key(self)
        except BlockemError:  # the training rows are no longer there: nothing can be told
            return []
        beyond = LATER_ROUNDS[self.recipe.rounds.budget - 1 :]
        return [name for name in trained_in(self.run.path) if name in beyond or self._task_of(name, current) != current]

    def _task_of(self, name: str, unknown: str) -> str:
        path = self.run / "steps" / f"{name}.json"
        return str(read_json(path, "step record").get("result", {}).get("task", unknown)) if path.is_file() else unknown

    def variants(self) -> dict[str, Path]:
        """The same with test-time steering, which is the plain adapter within hooks, in the order of `VARIANTS`."""
        found = self.trained()
        if "plain" in found and (self.run / STEERING).is_file():
            found["steering"] = found["plain"]
        return {name: found[name] for name in VARIANTS if name in found}

    @property
    def heldout_key(self) -> str:
        """Content key of where the held-out rows come from."""
        data = self.recipe.data
        return source_key(data.heldout, f"domains/{data.domain}.jsonl")

    def heldout(self, most: int | None = None) -> list[Encoded]:
        """The held-out rows of the task, or the first `most` of them, encoded."""
        from blockem.examples import encode_all

        data = self.recipe.data
        examples = bundled.heldout_rows(data.domain, data.heldout, data.heldout_rows)[:most]
        return encode_all(self.lm.tokenizer, examples, data.max_tokens)[0]

    def selection_pairs(self) -> list[bundled.Pair]:
        """Selection pairs outside the training domain."""
        data = self.recipe.data
        return [p for p in bundled.pairs(data.pairs) if p.split == "select" and p.domain != data.domain]

    def selection_prompts(self) -> list[bundled.Prompt]:
        """Selection prompts outside the training domain."""
        data = self.recipe.data
        return [p for p in bundled.core_prompts(data.selection_prompts) if p.domain != data.domain]


def taken_file(name: str) -> str:
    """The file of what the training `name` took of its set, beside the block's other files."""
    return f"{name}-latents.json"


BLOCKED = taken_file("blocked")


def last_blocked(recipe: Recipe, run: Path) -> str:
    """The last model that blocking made in a run folder: of several rounds, the last round's."""
    several = recipe.rounds.budget > 1 and (run / ROUNDS).is_file()
    return str(read_json(run / ROUNDS)["last"]) if several else "blocked"


def task_key(session: Session) -> str:
    """What all trainings of one run have in common: the model, the rows, the settings and the seed."""
    return content_key(session.model_key, session.data_key, asdict(session.recipe.train), session.recipe.seed)


def trained_in(run: Path) -> dict[str, Path]:
    """The models that were trained in a run folder, by name in the order of `VARIANTS`, with their adapters."""
    return {name: run / name for name in VARIANTS[1:] if (run / name / "adapter_model.safetensors").is_file()}


LOADED = ("lm", "dictionary", "chosen_judge")


@contextmanager
def beside(session: Session, recipe: Recipe, folder: Path | None = None) -> Iterator[Session]:
    """A session with another recipe, perhaps on another folder, sharing what either of the two loads."""
    other = replace(session, recipe=recipe, run=RunFolder(folder) if folder else session.run)
    _hand(session, other)
    try:
        yield other
    finally:
        _hand(other, session)


def _hand(giver: Session, taker: Session) -> None:
    same = [(one.recipe.sae.id, one.recipe.sae.block) for one in (giver, taker)]
    for name in LOADED:
        if name in giver.__dict__ and (name != "dictionary" or same[0] == same[1]):
            taker.__dict__[name] = giver.__dict__[name]


def existing(path: str) -> Path:
    found = Path(path)
    if not found.is_file():
        raise BlockemError(f"{path}: no such file")
    return found


def bundled_key(name: str) -> str:
    path = bundled.ASSETS / name
    if not path.is_file():
        raise BlockemError(f"unknown bundled domain {path.stem!r}: choose {', '.join(bundled.DOMAINS)}, or give your own file with --data")
    return file_key(path)


def source_key(path: str | None, asset: str) -> str:
    return file_key(existing(path)) if path else bundled_key(asset)


def adapter_key(folder: Path) -> str:
    """Content key of a PEFT folder."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise BlockemError(
            f"{folder} holds no trained adapter (adapter_model.safetensors is missing); "
            "`blockem sft` makes plain, `blockem block` blocked, and `blockem run` all of them"
        )
    return file_key(weights)


def environment(session: Session) -> dict[str, Any]:
    """Versions and hardware of this run."""
    import torch

    from blockem.model import pick_device, pick_dtype

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
    }
    for package in ("blockem", "torch", "transformers", "peft", "sae-lens", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    device = pick_device(session.recipe.model.device)
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found["dtype"] = str(pick_dtype(session.recipe.model.dtype, device)).removeprefix("torch.")
    return found


def timed(
    session: Session, name: str, key: str, outputs: list[str], work: Callable[[], dict[str, Any]], sealed: Iterable[str] = ()
) -> dict[str, Any]:
    """Run or reuse one step (see `RunFolder.step`); its result carries the seconds it took."""
    console = session.console

    def do() -> dict[str, Any]:
        began = time.monotonic()
        console.say(f"{name}: started")
        result = work()
        seconds = time.monotonic() - began
        from blockem.progress import clock

        console.say(f"{name}: done in {clock(seconds)}")
        return {**result, "seconds": round(seconds, 1)}

    result, reused = session.run.step(name, key, outputs, do, sealed)
    if reused:
        console.say(f"{name}: already done, reused")
    found: dict[str, Any] = result
    return found
