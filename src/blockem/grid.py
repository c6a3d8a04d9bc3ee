"""The grid of a comparison: a few lines of YAML, and the cells that they stand for. Nothing heavy is loaded to read one."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockem.config import CompareConfig, Recipe, load_recipe, recipe_from
from blockem.config_values import build, read_yaml
from blockem.defence_names import BLOCK_EM
from blockem.errors import BlockemError
from blockem.store import content_key

STRENGTH = "defence.strength"
BY_LOSS = ("defence.stop_by", "loss")
PLACES = ("recipe", "seeds", "domains", "defences", "ablations")


@dataclass(frozen=True)
class Setting:
    """One thing that is compared: a defence at one strength, an ablation, or latents from another domain.

    Attributes:
        kind: `defence`, `ablation` or `transfer`.
        name: the defence's or the ablation's name, or the domain that the latents come from.
        field: the field whose values are the strengths, "" where there is one setting only.
        strength: this setting's value of it.
        changes: recipe fields set for it.
    """

    kind: str
    name: str
    field: str = ""
    strength: Any = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """How pages and messages call it."""
        if self.kind == "transfer":
            return f"latents of {self.name}"
        if BY_LOSS in self.changes and (share := dict(self.changes).get(STRENGTH)) is not None:
            return f"{self.name} kept={share}"  # its strength is a share of the gain, not of the steps
        if self.strength is None:
            return self.name
        what = "" if self.field == STRENGTH else f"{self.field.split('.')[-1].rstrip('_')}="
        value = f"{self.strength:g}" if isinstance(self.strength, float) else str(self.strength)
        return f"{self.name} {what}{value}"


@dataclass(frozen=True)
class Cell:
    """One run: a setting in a domain with a seed. `latents_of` names the cell whose latents are blocked, for a transfer."""

    id: str
    setting: Setting
    domain: str
    seed: int
    recipe: Recipe
    latents_of: str | None = None


@dataclass(frozen=True)
class Grid:
    """A grid file, read.

    Attributes:
        reference: the setting that ablations and transfers are compared with, block-em as the recipe has it; None where nothing is.
    """

    settings: tuple[Setting, ...]
    domains: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    config: CompareConfig
    reference: Setting | None


def load_grid(path: str | Path) -> Grid:
    """Read a grid (safe loader).

    Raises:
        BlockemError: the file is missing, not YAML, or a sentence that says which entry is wrong and what it may be.
    """
    path = Path(path)
    values = read_yaml(path, "grid file")
    try:
        return grid_from(values, path.parent)
    except BlockemError as error:
        raise BlockemError(f"{path}: {error}") from error


def grid_from(values: Any, folder: Path = Path()) -> Grid:
    """A grid from plain values; files that it names are looked for beside it first (`folder`)."""
    if not isinstance(values, dict):
        raise BlockemError("a grid is a mapping with recipe, seeds, domains and defences")
    options = {field.name for field in dataclasses.fields(CompareConfig)}
    unknown = sorted(str(name) for name in values if name not in PLACES and name not in options)
    if unknown:
        raise BlockemError(f"unknown entry {unknown[0]!r}; known: {', '.join([*PLACES, *sorted(options)])}")
    config: CompareConfig = build(CompareConfig, {name: value for name, value in values.items() if name in options}, "")
    given = values.get("recipe")
    if not (given is None or isinstance(given, (str, dict))):
        raise BlockemError("recipe is neither a file nor a mapping of recipe fields")
    recipe = load_recipe(beside(given, folder)) if isinstance(given, str) else recipe_from(given or {})
    seeds = _seeds(values.get("seeds"), recipe)
    recipes = _domains(values.get("domains"), recipe, folder)
    settings = [one for name, spec in _mapping(values, "defences").items() for one in _defence(str(name), spec)]
    if not settings:
        raise BlockemError("defences is empty; name at least one, for example defences: {block-em: {block.lambda_: [0, 100, 1000]}}")
    ablations = [_ablation(str(name), spec) for name, spec in _mapping(values, "ablations").items()]
    if config.transfer and len(recipes) < 2:
        raise BlockemError("transfer is true, but there is one domain only; name at least two under domains")
    if config.transfer and recipe.sae.more:
        raise BlockemError("transfer carries the latents of one block; set transfer: false, or leave sae.more out of the recipe")
    if config.transfer and (recipe.block.directions or recipe.rounds.budget > 1):
        raise BlockemError(
            "transfer blocks what another domain's discovery found, and block.directions and later rounds find their own; "
            "set transfer: false, or leave them out of the recipe"
        )
    reference = None
    if ablations or config.transfer:
        whole = Setting("defence", BLOCK_EM, changes=_named(BLOCK_EM))
        same = [one for one in settings if _changed(recipe, one) == _changed(recipe, whole)]
        reference = same[0] if same else whole
        settings += [] if same else [whole]
    settings += ablations
    settings = list({content_key(one.kind, one.name, one.field, one.strength, one.changes): one for one in settings}.values())
    cells = [_cell(one, domain, seed, of_domain) for domain, of_domain in recipes.items() for seed in seeds for one in settings]
    if config.transfer and reference is not None:
        cells += _transfers(reference, recipes, seeds)
        settings += [Setting("transfer", domain, changes=reference.changes) for domain in recipes]
    cells = _told_apart(cells)
    sources = {(one.domain, one.seed): one.id for one in cells if one.setting == reference}
    cells = [replace(one, latents_of=sources[one.setting.name, one.seed]) if one.setting.kind == "transfer" else one for one in cells]
    return Grid(tuple(settings), tuple(recipes), seeds, tuple(cells), config, reference)


def beside(path: str, folder: Path) -> str:
    """A file beside the grid, if there is one of that name, else the path as given."""
    return str(folder / path) if (folder / path).exists() else path


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return dict.fromkeys(found)
    if not isinstance(found, dict):
        raise BlockemError(f"{name} must be a mapping of names to fields")
    return found


def _seeds(given: Any, recipe: Recipe) -> tuple[int, ...]:
    seeds = [recipe.seed] if given is None else given if isinstance(given, list) else [given]
    if not seeds or not all(isinstance(one, int) and not isinstance(one, bool) for one in seeds):
        raise BlockemError(f"seeds is {given!r}; give whole numbers, for example [0, 1]")
    return tuple(dict.fromkeys(seeds))


def _domains(given: Any, recipe: Recipe, folder: Path) -> dict[str, Recipe]:
    """The recipe of each domain."""
    from blockem.bundled import DOMAINS

    entries = [recipe.data.domain] if given is None else given if isinstance(given, list) else [given]
    found: dict[str, Recipe] = {}
    changes: dict[str, Any]
    for entry in entries:
        if isinstance(entry, dict):
            if set(entry) != {"name", "train", "heldout"} or not all(isinstance(one, str) and one for one in entry.values()):
                raise BlockemError(f"domains: {entry!r} must have name, train and heldout, each a text")
            files = {name: beside(entry[name], folder) for name in ("train", "heldout")}
            for path in files.values():
                if not Path(path).is_file():
                    raise BlockemError(f"domains: {path}: no such file")
            name, changes = entry["name"], {**files}
        elif entry == recipe.data.domain:
            name, changes = str(entry), {}
        elif entry in DOMAINS:
            name, changes = str(entry), {"train": None, "heldout": None}
        else:
            raise BlockemError(f"domains: {entry!r} is no bundled domain ({', '.join(DOMAINS)}); give {{name, train, heldout}} for yours")
        if name in found:
            raise BlockemError(f"domains: {name!r} stands there twice")
        found[name] = replace(recipe, data=replace(recipe.data, domain=name, **changes))
    if not found:
        raise BlockemError("domains is empty; name at least one")
    return found


def _named(defence: str) -> tuple[tuple[str, Any], ...]:
    """The field that chooses a defence."""
    return (("defence.name", defence),)


def _defence(name: str, spec: Any) -> list[Setting]:
    """The settings of one defence: each value of the one field that has a list of them."""
    fields = spec if isinstance(spec, dict) else {} if spec is None else {STRENGTH: spec}
    lists = [str(path) for path, value in fields.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise BlockemError(f"defences: {name} has lists in {' and '.join(lists)}; one field may have a list of strengths")
    if any(not fields[path] for path in lists):
        raise BlockemError(f"defences: {name} has an empty list of strengths in {lists[0]}")
    _check_same_items(f"defences: {name}", fields)
    fixed = [(str(path), _frozen(value)) for path, value in fields.items() if path not in lists]
    if not lists:
        if len(fixed) == 1:
            fixed = [(path, _number(value)) for path, value in fixed]
        only = fixed[0] if len(fixed) == 1 and isinstance(fixed[0][1], (int, float)) and not isinstance(fixed[0][1], bool) else ("", None)
        return [Setting("defence", name, only[0], only[1], (*_named(name), *fixed))]
    field = lists[0]
    values = list(dict.fromkeys(_number(_frozen(value)) for value in fields[field]))
    return [Setting("defence", name, field, value, (*_named(name), *fixed, (field, value))) for value in values]


def _check_same_items(what: str, fields: Iterable[Any]) -> None:
    """Refuse fields that would measure a setting on other items, or train it on other rows, than those it is compared with."""
    for path in map(str, fields):
        if path.split(".")[0] in ("data", "evaluate", "seed", "name"):
            raise BlockemError(f"{what} sets {path}, but all settings share data, seeds and measures; set {path} in the recipe or the grid")


def _number(value: Any) -> Any:
    """`1e3` is text to YAML; a strength is a number where it reads as one."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that settings can be keys."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _ablation(name: str, spec: Any) -> Setting:
    if not isinstance(spec, dict) or not spec:
        raise BlockemError(f"ablations: {name} must be a mapping of recipe fields, for example {{block.control: random}}")
    _check_same_items(f"ablations: {name}", spec)
    return Setting("ablation", name, changes=(*_named(BLOCK_EM), *((str(path), _frozen(value)) for path, value in spec.items())))


def _changed(recipe: Recipe, setting: Setting) -> Recipe:
    try:
        return recipe.with_values(dict(setting.changes))
    except BlockemError as error:
        raise BlockemError(f"{setting.label}: {error}") from error


def _cell(setting: Setting, domain: str, seed: int, recipe: Recipe) -> Cell:
    identity = readable(domain, setting.label, f"seed{seed}")
    return Cell(identity, setting, domain, seed, replace(_changed(recipe, setting), name=identity, seed=seed))


def _transfers(reference: Setting, recipes: dict[str, Recipe], seeds: Sequence[int]) -> list[Cell]:
    """Training in each domain with the latents that the reference found in each other one."""
    return [
        _cell(Setting("transfer", source, changes=reference.changes), domain, seed, of_domain)
        for domain, of_domain in recipes.items()
        for seed in seeds
        for source in recipes
        if source != domain
    ]


def readable(*parts: str) -> str:
    """A folder's name from words: letters, digits, dots, and hyphens for anything else."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") or content_key(part)[:6] for part in parts)


def _told_apart(cells: list[Cell]) -> list[Cell]:
    """Cells with an id each: where two labels read the same, a short hash of what each is follows."""
    twice = {one.id for one in cells if sum(other.id == one.id for other in cells) > 1}
    found = []
    for one in cells:
        if one.id in twice:
            setting = one.setting
            what = (one.domain, setting.kind, setting.name, setting.field, setting.strength, setting.changes)
            identity = f"{one.id}-{content_key(*what)[:6]}"
            one = replace(one, id=identity, recipe=replace(one.recipe, name=identity))
        found.append(one)
    return found
