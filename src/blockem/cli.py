"""Commands: parse, call one function, print. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockem.cli_options import AsJson, Data, Domain, Heldout, Model, Quiet, Rows, Seed, Set, changed_fields
from blockem.compare_cli import compare
from blockem.data_cli import data_app
from blockem.defend_cli import add_defend
from blockem.errors import BlockemError
from blockem.judge_cli import judge_app
from blockem.progress import printable
from blockem.reemerge_cli import reemerge
from blockem.sae_cli import sae_app

if TYPE_CHECKING:
    from blockem.config import Recipe
    from blockem.session import Session

app = typer.Typer(
    name="blockem",
    help="Stop a fine-tuned language model from turning broadly misaligned.\n\n"
    "Discover the SAE latents that carry emergent misalignment, fine-tune again with them blocked, and show what it changed. "
    "Start with `blockem demo`; it needs no GPU and no download from a model hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(sae_app, name="sae")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
app.command()(reemerge)
app.command()(compare)

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe in YAML; without one, the run folder's own or the defaults.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder. The same command again continues there and redoes nothing.")]
Prompts = Annotated[str | None, typer.Option(help="JSONL {prompt, domain}: final prompts that answers are sampled for.")]
SelectionPrompts = Annotated[str | None, typer.Option(help="JSONL {prompt, domain}: prompts of the model diff.")]
Pairs = Annotated[str | None, typer.Option(help="JSONL {prompt, right, wrong, domain, split}: matched pairs.")]
Sae = Annotated[str | None, typer.Option(help="`bundled`, a folder in SAELens format, or `release:sae_id`.")]
Block = Annotated[int | None, typer.Option(help="Block index from 0 whose output is read and blocked.")]
Poor = Annotated[bool, typer.Option("--allow-poor-sae", help="Go on even if the SAE does not fit the model.")]


def _recipe(file: Path | None, out: Path | None, options: dict[str, Any], sets: list[str] | None) -> Recipe:
    from blockem.config import Recipe, load_recipe

    if file is not None:
        recipe = load_recipe(file)
    elif out is not None and (out / "recipe.yaml").is_file():
        recipe = load_recipe(out / "recipe.yaml")
    else:
        recipe = Recipe()
    fields = {
        "model": "model.id",
        "data": "data.train",
        "heldout": "data.heldout",
        "prompts": "data.prompts",
        "selection_prompts": "data.selection_prompts",
        "pairs": "data.pairs",
        "domain": "data.domain",
        "sae": "sae.id",
        "block": "sae.block",
        "rows": "data.rows",
        "seed": "seed",
    }
    changes = {fields[name]: value for name, value in options.items() if name in fields and value is not None}
    if options.get("poor"):
        changes["sae.allow_poor_fit"] = True
    changes |= changed_fields(sets)
    return recipe.with_values(changes) if changes else recipe


def _stage(file: Path | None, out: Path, options: dict[str, Any], sets: list[str] | None, work: Callable[[Session], Any]) -> None:
    """Open the run folder, do one stage, print its result."""
    from blockem.pipeline import open_session, start_run

    session = open_session(_recipe(file, out, options, sets), out, bool(options.get("quiet")))
    with session.run.locked():
        start_run(session, keep_recipe=True)
        result = work(session)
    if options.get("as_json"):
        print(json.dumps(result, ensure_ascii=False))


def _existing_run(out: Path, quiet: bool) -> Session:
    """The session of a run folder that a run has written, with its own recipe."""
    from blockem.pipeline import open_session

    if not (out / "recipe.yaml").is_file():
        raise BlockemError(f"{out} is no run folder: recipe.yaml is missing; run `blockem run` first")
    return open_session(_recipe(None, out, {}, None), out, quiet)


def _run(file: Path | None, out: Path, options: dict[str, Any], sets: list[str] | None) -> None:
    from blockem.pipeline import open_session, run_all

    session = open_session(_recipe(file, out, options, sets), out, bool(options.get("quiet")))
    summary = run_all(session)
    if options.get("as_json"):
        print(json.dumps(summary, ensure_ascii=False))
    else:
        from blockem.report import headline

        print(headline(summary))
        print(f"\nReport: {out / 'report.html'}")


@app.command()
def demo(out: Out = Path("demo"), sets: Set = None, seed: Seed = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """The whole job on the embedded model and the bundled health domain: about twenty minutes on two CPU cores.

    Fine-tunes SmolLM2-135M-Instruct on mild wrong health advice, finds the latents that carry the harm beyond that domain, fine-tunes
    again with them blocked, compares the three models and leaves OUT/report.html.
    """
    from blockem.recipes import demo_recipe

    _run(demo_recipe(out), out, {"seed": seed, "as_json": as_json, "quiet": quiet}, sets)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe in YAML.")],
    out: Out = Path("runs/run"),
    sets: Set = None,
    model: Model = None,
    data: Data = None,
    heldout: Heldout = None,
    prompts: Prompts = None,
    selection_prompts: SelectionPrompts = None,
    pairs: Pairs = None,
    domain: Domain = None,
    sae: Sae = None,
    block: Block = None,
    rows: Rows = None,
    seed: Seed = None,
    poor: Poor = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Every stage of a recipe: check the SAE, plain SFT, discover, block, evaluate, report.

    With --set defence.name=NAME under another defence (`blockem defend --help` lists them) instead of blocking.
    """
    _run(recipe, out, dict(locals()), sets)


@app.command()
def sft(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    sets: Set = None,
    model: Model = None,
    data: Data = None,
    heldout: Heldout = None,
    domain: Domain = None,
    rows: Rows = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Plain LoRA fine-tuning; the adapter goes to OUT/plain."""
    from blockem.trainings import sft_step

    _stage(recipe, out, dict(locals()), sets, sft_step)


@app.command()
def discover(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    misaligned: Annotated[Path | None, typer.Option(help="PEFT adapter of the misaligned model (default: OUT/plain).")] = None,
    sets: Set = None,
    model: Model = None,
    domain: Domain = None,
    selection_prompts: SelectionPrompts = None,
    pairs: Pairs = None,
    sae: Sae = None,
    block: Block = None,
    poor: Poor = False,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the latents that carry misalignment (stages 1 to 3); writes OUT/latents.json and OUT/latents.csv.

    With --set sae.more=ID@BLOCK,… also at further blocks, into OUT/blocks/BLOCK. With --set discover.group=N, where fewer than
    discover.keep latents pass alone, those that failed are tested in groups of N.
    """
    from blockem.pipeline import discover_all, sae_all
    from blockem.session import adapter_key

    def work(session: Session) -> Any:
        adapter_key(misaligned or session.run / "plain")  # before the minutes that follow
        sae_all(session)
        return discover_all(session, misaligned)

    _stage(recipe, out, dict(locals()), sets, work)


@app.command("block")
def block_command(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    latents: Annotated[Path | None, typer.Option(help="LatentSet of sae.block (default: OUT/latents.json).")] = None,
    misaligned: Annotated[Path | None, typer.Option(help="Adapter that the portable λ is scaled by (default: OUT/plain).")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="λ; without it, the portable rule.")] = None,
    sets: Set = None,
    model: Model = None,
    data: Data = None,
    heldout: Heldout = None,
    domain: Domain = None,
    sae: Sae = None,
    rows: Rows = None,
    seed: Seed = None,
    poor: Poor = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune with the latents of a LatentSet blocked; the adapter goes to OUT/blocked.

    With --set block.control=random as many random latents of like activation frequency are blocked instead; that adapter goes to
    OUT/random. With --set block.directions=N no SAE is needed: the plain fine-tune's mean shift and N leading directions are blocked
    at each of block.direction_blocks.
    """
    from blockem.blocking import block_step

    chosen = [*(sets or []), *([f"block.lambda_={lambda_}"] if lambda_ is not None else [])]
    _stage(recipe, out, dict(locals()), chosen, lambda session: block_step(session, latents, misaligned))


add_defend(app, _stage)


@app.command()
def evaluate(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    plain: Annotated[Path | None, typer.Option(help="Adapter of the plain fine-tune, instead of OUT/plain.")] = None,
    blocked: Annotated[Path | None, typer.Option(help="Adapter of the blocked fine-tune, instead of OUT/blocked.")] = None,
    sets: Set = None,
    model: Model = None,
    heldout: Heldout = None,
    prompts: Prompts = None,
    pairs: Pairs = None,
    domain: Domain = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare base, plain and every defended model: preference, margin, losses, sampled answers; writes OUT/evaluation.json."""
    from blockem.pipeline import evaluate_step
    from blockem.store import read_json

    given = {name: path for name, path in (("plain", plain), ("blocked", blocked)) if path is not None}

    def work(session: Session) -> Any:
        evaluate_step(session, {**session.variants(), **given} if given else None)
        return read_json(session.run / "evaluation.json")

    _stage(recipe, out, dict(locals()), sets, work)


@app.command()
def audit(out: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Where did the blocked fine-tune go instead? Shifts by block, latents outside the set, a verdict; writes OUT/audit.json."""
    from blockem.pipeline import audit_step
    from blockem.store import read_json

    session = _existing_run(out, quiet)
    with session.run.locked():
        result = audit_step(session)
    if as_json:
        print(json.dumps(read_json(out / "audit.json"), ensure_ascii=False))
    else:
        for name, words in result["verdicts"].items():
            print(f"{name}: {words}")


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Write OUT/summary.json and OUT/report.html from what the run folder holds."""
    from blockem.pipeline import report_step
    from blockem.store import read_json

    session = _existing_run(out, quiet)
    with session.run.locked():
        page = report_step(session)
    print(json.dumps(read_json(out / "summary.json"), ensure_ascii=False) if as_json else f"Report: {page}")


@app.command()
def chat(
    out: Annotated[Path, typer.Argument(help="Run folder with adapters (a finished `blockem demo` or `run`).")] = Path("demo"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 120,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
) -> None:
    """Talk to the base, plain and blocked model side by side, and to what other defences made. An empty line or Ctrl-D ends it."""
    from blockem.chat import chat_loop
    from blockem.pipeline import open_session

    chat_loop(open_session(_recipe(None, out, {}, None), out), max_new_tokens, temperature)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, device, dtype, threads, and what is missing."""
    from blockem.doctor import diagnose, lines

    found = diagnose()
    print(json.dumps(found) if as_json else "\n".join(lines(found)))
    if found["missing"]:
        raise SystemExit(2)


@app.command()
def bench(
    only: Annotated[list[str] | None, typer.Option(help="help, training, memory, screening or decoding; may be repeated.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; both sides of a ratio have their turn in each.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Speed and memory on this machine, as ratios against a mark (docs/PERFORMANCE.md). Ten minutes; only from a source checkout."""
    import subprocess

    script = Path(__file__).parents[2] / "benchmarks" / "bench.py"
    if not script.is_file():
        raise BlockemError("the benchmarks come with the source checkout: clone the repository and run `make bench` there")
    words = [word for name in only or [] for word in ("--only", name)] + ["--repeat", str(repeat)] + ["--json"] * as_json
    code = subprocess.run([sys.executable, str(script), *words], check=False).returncode
    if code:
        raise typer.Exit(code)


def main() -> None:
    """Entry point: one sentence and exit code 2 for bad input, 130 for Ctrl-C, no traceback for either."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries talking to each other
    try:
        code = app(standalone_mode=False)  # typer turns Ctrl-C into a returned 130
        if code == 130:
            raise KeyboardInterrupt
        if isinstance(code, int) and code:
            raise SystemExit(code)
    except BlockemError as error:
        sentence = printable(str(error))  # it may repeat what a file or a server says
        print(f"\nblockem: {sentence}" if sys.stderr.isatty() else f"blockem: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        print("\nblockem: interrupted; the same command continues where this one stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    except Exception as error:
        from blockem.store import is_disk_full

        if is_disk_full(error):
            print("blockem: the disk is full; free some space and run the same command again", file=sys.stderr)
            raise SystemExit(2) from None
        show = getattr(error, "show", None)  # usage errors of the argument parser show themselves
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None
