"""Many recipes, one after the other or elsewhere: what a comparison's cells share, which are finished, and how one is run.

DIR/cells/<id>/   an ordinary run folder for each cell
DIR/shared/       steps that cells have in common, by content
DIR/steps/        one record for each finished cell
DIR/comparison.json, comparison.html, figures/
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem.config_values import keyed
from blockem.defence_names import BLOCK_EM
from blockem.errors import BlockemError
from blockem.evaluation import ANSWERS, TASK_ANSWERS
from blockem.executor import Executor, OneByOne, Outcome, attempt
from blockem.grid import Cell, Grid
from blockem.progress import Console
from blockem.sharing import SharingFolder, take
from blockem.store import RunFolder, content_key, file_key, write_json, write_text

if TYPE_CHECKING:
    from blockem.config import Recipe
    from blockem.judges import Judge
    from blockem.session import Session

UNTRAINED = ("plain", "steering")  # defences that train nothing beyond the plain fine-tune
CELL_OUTPUTS = ("summary.json", "report.html", "evaluation.json", ANSWERS, TASK_ANSWERS)
"""Of every cell; the record of each model's evaluation is one of its outputs too (`_outputs`)."""


@dataclass(frozen=True)
class Job:
    """A cell as an executor carries it; plain data, so that it may be sent elsewhere."""

    cell: Cell
    out: Path
    place: int
    total: int
    quiet: bool = False
    mixed: bool = False

    @property
    def id(self) -> str:
        return self.cell.id


@dataclass
class Loaded:
    """What one process has loaded for its cells so far."""

    parts: dict[str, Any] = field(default_factory=dict)
    judges: dict[str, Judge | None] = field(default_factory=dict)


def plain_group(recipe: Recipe) -> str:
    """Cells with the same value share the plain fine-tune, and the measurements of base and plain."""
    data = {name: value for name, value in asdict(recipe.data).items() if name in ("domain", "train", "rows", "max_tokens")}
    return content_key(asdict(recipe.model), data, asdict(recipe.train), recipe.seed)


def waves(grid: Grid) -> list[list[Cell]]:
    """Cells in an order in which shared work is done soon: one of each group, then the rest, then those that need another's latents.

    The cells of one wave do not need each other; what they share, the first that comes to it does (`SharingFolder`). The first of a group
    is one of block-em where there is any, since it also discovers.
    """
    own = [cell for cell in grid.cells if cell.setting.kind == "defence" and cell.setting.name == BLOCK_EM]
    first: dict[str, Cell] = {}
    for cell in [*own, *(one for one in grid.cells if one.setting.kind != "transfer")]:
        first.setdefault(plain_group(cell.recipe), cell)
    leaders = [cell for cell in grid.cells if first.get(plain_group(cell.recipe)) is cell]
    others = [cell for cell in grid.cells if cell not in leaders and cell.latents_of is None]
    return [wave for wave in ([*leaders, *others], [cell for cell in grid.cells if cell.latents_of is not None]) if wave]


def plan(grid: Grid, out: Path) -> dict[str, Any]:
    """What `compare` would do: the cells in their order, what each shares, which are finished, and how many trainings are left.

    Raises:
        BlockemError: a cell cannot be run (`check_cells`).
    """
    check_cells(grid, out)
    first: dict[str, str] = {}
    cells, trainings = [], 0
    for cell in (one for wave in waves(grid) for one in wave):
        group = plain_group(cell.recipe)
        finished = (out / "steps" / f"cell-{cell.id}.json").is_file() and _finished(cell, out)
        trains = cell.setting.kind != "defence" or cell.setting.name not in UNTRAINED
        own = 0 if finished else int(trains) + int(group not in first)
        trainings += own
        cells.append(
            {
                "id": cell.id,
                "setting": cell.setting.label,
                "domain": cell.domain,
                "seed": cell.seed,
                "shares_plain_with": first.get(group),
                "latents_of": cell.latents_of,
                "trainings": own,
                "finished": finished,
            }
        )
        first.setdefault(group, cell.id)
    return {"cells": cells, "trainings": trainings, "plain_trainings": len(first)}


def check_cells(grid: Grid, out: Path) -> None:
    """Check every cell's recipe and its files before any is run.

    Raises:
        BlockemError: the first cell that cannot be run, and why.
    """
    from blockem.checks import check_recipe
    from blockem.pipeline import open_session

    for cell in grid.cells:
        try:
            check_recipe(open_session(cell.recipe, out / "cells" / cell.id, quiet=True))
        except BlockemError as error:
            raise BlockemError(f"cell {cell.id}: {error}") from error


def cell_key(session: Session, cell: Cell, out: Path) -> str:
    """What a finished cell depended on."""
    from importlib.metadata import version

    data = session.recipe.data
    files = [file_key(Path(path)) for path in (data.heldout, data.prompts, data.selection_prompts, data.pairs, data.general) if path]
    latents = out / "cells" / (cell.latents_of or "") / "latents.json"
    source = file_key(latents) if cell.latents_of and latents.is_file() else cell.latents_of
    recipe, more = keyed(session.recipe), _named_files(session)
    parts = [recipe, session.model_key, session.sae_key, session.data_key, files, source, *([more] if more else [])]
    return content_key("cell", version("blockem"), *parts)


def _named_files(session: Session) -> dict[str, Any]:
    """The content of what a recipe names beside its data and its first SAE; empty where it names none, so that such cells keep their key.

    What is not there counts as nothing: whether it is missed is for the run to say.
    """
    recipe = session.recipe
    found: dict[str, Any] = {}
    for name in ("benign", "trait_prompts"):
        path = getattr(recipe.defence, name)
        if path and Path(path).is_file():
            found[name] = file_key(Path(path))
    if recipe.defence.unaligned:
        from blockem.model import fingerprint

        found["unaligned"] = fingerprint(Path(recipe.defence.unaligned))
    if recipe.sae.more:
        found["more"] = [replace(session, recipe=replace(recipe, sae=sae)).sae_key for sae in recipe.sae.each[1:]]
    judge = Path(recipe.evaluate.judge)
    if recipe.evaluate.judge not in ("local", "none") and (judge / "judge.json").is_file():
        from blockem.judges.local import verdicts_key

        found["judge"] = verdicts_key(judge)
    return found


def _finished(cell: Cell, out: Path) -> bool:
    from blockem.pipeline import open_session

    folder = out / "cells" / cell.id
    try:
        key = cell_key(open_session(cell.recipe, folder, quiet=True), cell, out)
    except (BlockemError, OSError):
        return False
    return _is_finished(cell, out, key)


def _is_finished(cell: Cell, out: Path, key: str) -> bool:
    try:
        outputs = _outputs(cell, out)
    except BlockemError:  # without a summary nobody can say what there should be
        return False
    return RunFolder(out).finished(f"cell-{cell.id}", key, outputs) is not None


def _outputs(cell: Cell, out: Path) -> list[str]:
    """What a comparison reads of a cell that was run.

    Raises:
        BlockemError: the cell has no summary, or a broken one.
    """
    from blockem.cells import read_summary

    evaluated = [f"steps/evaluate-{name}.json" for name in read_summary(out / "cells" / cell.id)["models"]]
    return [f"cells/{cell.id}/{name}" for name in (*CELL_OUTPUTS, *evaluated)]


def run_grid(grid: Grid, out: Path, quiet: bool = False, executor: Executor | None = None, judge: Judge | None = None) -> dict[str, str]:
    """Run every cell that is not finished; returns why cells failed, by id.

    Args:
        executor: who runs the cells of a wave; by default this process, one by one.
        judge: judges in every cell, instead of what the recipes say.
    """
    remove_scratch(out)
    console = Console(quiet)
    executor = executor or OneByOne()
    order = waves(grid)
    total = sum(map(len, order))
    failed: dict[str, str] = {}
    work = partial(run_cell, loaded=Loaded(), judge=judge)
    began = 0
    for wave in order:
        jobs = [Job(cell, out, began + i + 1, total, quiet, executor.mixed) for i, cell in enumerate(wave) if cell.latents_of not in failed]
        for cell in wave:
            if cell.latents_of in failed:  # latents that it left may be an earlier recipe's
                why = f"cell {cell.latents_of} failed, so its latents cannot be tried elsewhere; its own error comes first"
                _note(Outcome(cell.id, why), out, console, failed)
        began += len(wave)
        for outcome in executor.run(work, jobs):
            _note(outcome, out, console, failed)
    return failed


def _note(outcome: Outcome, out: Path, console: Console, failed: dict[str, str]) -> None:
    log = out / "cells" / outcome.job / "error.txt"
    if outcome.error is None:
        log.unlink(missing_ok=True)
        return
    failed[outcome.job] = outcome.error
    console.say(f"{outcome.job}: failed: {outcome.error}")
    if outcome.details:
        write_text(log, outcome.details)
        console.say(f"  {log} has the traceback")


def remove_scratch(out: Path) -> None:
    """What a killed comparison left half copied or held."""
    for folder in (out / "shared", *(out / "cells").glob("*")):
        for one in (*folder.glob(".making-*"), *folder.glob(".taking-*")):
            shutil.rmtree(one, ignore_errors=True)
    for lock in (out / "shared").glob(".*.lock"):
        lock.unlink(missing_ok=True)


def run_cell(job: Job, loaded: Loaded, judge: Judge | None = None) -> Outcome:
    """One cell from its recipe to its report, in its own run folder; a finished one is left as it is."""
    found = attempt(job.id, lambda: _run(job, loaded, judge))
    if found.error is not None:
        loaded.parts.clear()  # whatever went wrong may have left its marks on the model
    return found


def _run(job: Job, loaded: Loaded, judge: Judge | None) -> None:
    from blockem.pipeline import run_all

    cell, out = job.cell, job.out
    session = _open(job, loaded, judge)
    session.console.say(f"cell {job.place} of {job.total}: {cell.id}")
    key = cell_key(session, cell, out)
    if _is_finished(cell, out, key):
        session.console.say("  already finished")
        return
    try:
        if cell.latents_of is None:
            run_all(session)
        else:
            _run_transfer(session, out / "cells" / cell.latents_of, cell.latents_of)
    finally:
        for name in ("lm", "dictionary"):
            if name in session.__dict__:
                loaded.parts[_part_key(session, name)] = session.__dict__[name]
    record = {"step": f"cell-{cell.id}", "key": key, "outputs": _outputs(cell, out), "result": {}}
    write_json(out / "steps" / f"cell-{cell.id}.json", record)


def _open(job: Job, loaded: Loaded, judge: Judge | None) -> Session:
    """The cell's session, with a shared judge and what is loaded already."""
    from blockem.session import Session

    recipe, shared = job.cell.recipe, job.out / "shared"
    wanted = recipe.evaluate
    if judge is None and (wanted.answers or "judged" in recipe.discover.effects):
        from blockem.judges.choose import judge_of

        name = content_key(wanted.judge, wanted.judge_model, wanted.judge_reply_tokens)
        if name not in loaded.judges:
            shared.mkdir(parents=True, exist_ok=True)
            loaded.judges[name] = judge_of(wanted, shared / "verdicts.sqlite")
        judge = loaded.judges[name]
    console = Console(job.quiet, job.id if job.mixed else "")
    session = Session(recipe, SharingFolder(job.out / "cells" / job.id, shared, console.say), console, judge)
    for name in ("lm", "dictionary"):
        if (found := loaded.parts.get(_part_key(session, name))) is not None:
            session.__dict__[name] = found
    return session


def _part_key(session: Session, name: str) -> str:
    model = session.recipe.model
    parts = [session.model_key, model.dtype, model.device, *([asdict(session.recipe.sae)] if name == "dictionary" else ())]
    return f"{name}-{content_key(*parts)}"


def _run_transfer(session: Session, source: Path, name: str) -> None:
    """A run with the latents of another cell in the place of discovery."""
    from blockem.pipeline import run_all
    from blockem.session import timed

    files = ["latents.json", "latents.csv", "cards.json", "deltas.safetensors"]
    missing = [one for one in files if not (source / one).is_file()]
    if missing:
        raise BlockemError(f"cell {name} has no {missing[0]}, so its latents cannot be tried elsewhere; remove its folder and run again")

    def adopt(session: Session) -> None:
        def work() -> dict[str, Any]:
            take(source, session.run.path, files)
            return {"from": name}

        timed(session, "transfer", content_key("transfer", *(file_key(source / one) for one in files)), files, work)

    run_all(session, adopt)


def compare_all(
    grid: Grid, out: Path, quiet: bool = False, executor: Executor | None = None, judge: Judge | None = None
) -> tuple[dict[str, Any], Path]:
    """Run a grid into `out` and compare its cells; returns what `comparison.json` holds and the path of the page.

    A cell whose files cannot be read counts as failed, and is measured again when the grid is run again.

    Raises:
        BlockemError: a cell cannot be run, another comparison is at work in `out`, or no cell could be finished (with the first cell's
            reason).
    """
    from blockem.cells import read_cells
    from blockem.comparison import compare
    from blockem.report.comparison import write

    check_cells(grid, out)
    with RunFolder(out).locked():
        failed = run_grid(grid, out, quiet, executor, judge)
        cells, unreadable = read_cells(grid, out, failed)
        for cell in grid.cells:
            if cell.id in unreadable:
                Console(quiet).say(f"{cell.id}: failed: {unreadable[cell.id]}")
                forget(cell, out)
        failed |= unreadable
        if not cells:
            first = next(iter(failed))
            raise BlockemError(f"all {len(failed)} cells failed, the first ({first}) with: {failed[first]}")
        comparison = compare(grid, cells, failed)
        page = write(comparison, out)
    return comparison, page


def forget(cell: Cell, out: Path) -> None:
    """Let a cell whose files cannot be read be measured again: its trainings stay, and so do the measures that can be read."""
    from blockem.cells import check_evaluation

    folder, shared = out / "cells" / cell.id, out / "shared"
    for path in (out / "steps" / f"cell-{cell.id}.json", folder / "steps" / "evaluate.json"):
        path.unlink(missing_ok=True)
    for record in (*folder.glob("steps/evaluate-*.json"), *shared.glob("evaluate-*/steps/evaluate-*.json")):
        try:
            check_evaluation(record, cell.recipe.data.pairs)
        except BlockemError:
            record.unlink()
