"""Commands: parse, call one function, print. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockem.errors import BlockemError
from blockem.judge_cli import judge_app

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
sae_app = typer.Typer(help="Sparse autoencoders: train a small one, check how well one fits.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Chat data: check it before you train on it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(sae_app, name="sae")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe in YAML; without one, the run folder's own or the defaults.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder. The same command again continues there and redoes nothing.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="STAGE.FIELD=VALUE", help="Change one recipe field; may be repeated.")]
Model = Annotated[str | None, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")]
Data = Annotated[str | None, typer.Option(help="Chat JSONL to train on, instead of the bundled domain.")]
Heldout = Annotated[str | None, typer.Option(help="Chat JSONL of held-out rows of the same task.")]
Prompts = Annotated[str | None, typer.Option(help="JSONL {prompt, domain}: final prompts that answers are sampled for.")]
SelectionPrompts = Annotated[str | None, typer.Option(help="JSONL {prompt, domain}: prompts of the model diff.")]
Pairs = Annotated[str | None, typer.Option(help="JSONL {prompt, right, wrong, domain, split}: matched pairs.")]
Domain = Annotated[str | None, typer.Option(help="Training domain (finance, health, education, legal, career, auto, or a name of yours).")]
Sae = Annotated[str | None, typer.Option(help="`bundled`, a folder in SAELens format, or `release:sae_id`.")]
Block = Annotated[int | None, typer.Option(help="Block index from 0 whose output is read and blocked.")]
Rows = Annotated[int | None, typer.Option(help="At most so many training rows.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything.")]
Poor = Annotated[bool, typer.Option("--allow-poor-sae", help="Go on even if the SAE does not fit the model.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


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
    for item in sets or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise BlockemError(f"--set {item}: write it as stage.field=value, for example --set train.lr=2e-4")
        changes[name.strip()] = value.strip()
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
    """The whole job on the embedded model and the bundled health domain: about a quarter of an hour on two CPU cores.

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
    """Every stage of a recipe: check the SAE, plain SFT, discover, block, evaluate, report."""
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
    """Find the latents that carry misalignment (stages 1 to 3); writes OUT/latents.json and OUT/latents.csv."""
    from blockem.pipeline import discover_step, sae_step
    from blockem.session import adapter_key

    def work(session: Session) -> Any:
        adapter_key(misaligned or session.run / "plain")  # before the minutes that follow
        sae_step(session)
        return discover_step(session, misaligned)

    _stage(recipe, out, dict(locals()), sets, work)


@app.command("block")
def block_command(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    latents: Annotated[Path | None, typer.Option(help="LatentSet (default: OUT/latents.json).")] = None,
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
    from blockem.trainings import block_step

    chosen = [*(sets or []), *([f"block.lambda_={lambda_}"] if lambda_ is not None else [])]
    _stage(recipe, out, dict(locals()), chosen, lambda session: block_step(session, latents, misaligned))


@app.command()
def evaluate(
    recipe: RecipeFile = None,
    out: Out = Path("runs/run"),
    plain: Annotated[Path | None, typer.Option(help="Adapter of the plain fine-tune (default: OUT/plain).")] = None,
    blocked: Annotated[Path | None, typer.Option(help="Adapter of the blocked fine-tune (default: OUT/blocked).")] = None,
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
    """Compare base, plain and blocked: preference, margin, losses and sampled answers; writes OUT/evaluation.json and OUT/answers.jsonl."""
    from blockem.pipeline import evaluate_step
    from blockem.store import read_json

    adapters = {name: path for name, path in (("plain", plain), ("blocked", blocked)) if path is not None} or None

    def work(session: Session) -> Any:
        evaluate_step(session, adapters)
        return read_json(session.run / "evaluation.json")

    _stage(recipe, out, dict(locals()), sets, work)


@app.command()
def audit(out: Annotated[Path, typer.Argument(help="Run folder.")], as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Where did the blocked fine-tune go instead? Shifts by block, latents outside the set, a verdict; writes OUT/audit.json."""
    from blockem.pipeline import audit_step, open_session
    from blockem.store import read_json

    if not (out / "recipe.yaml").is_file():
        raise BlockemError(f"{out} is no run folder: recipe.yaml is missing; run `blockem run` first")
    session = open_session(_recipe(None, out, {}, None), out, quiet)
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
    from blockem.pipeline import open_session, report_step
    from blockem.store import read_json

    if not (out / "recipe.yaml").is_file():
        raise BlockemError(f"{out} is no run folder: recipe.yaml is missing; run `blockem run` first")
    session = open_session(_recipe(None, out, {}, None), out, quiet)
    with session.run.locked():
        page = report_step(session)
    print(json.dumps(read_json(out / "summary.json"), ensure_ascii=False) if as_json else f"Report: {page}")


@sae_app.command("train")
def sae_train(
    data: Annotated[list[str], typer.Option("--data", help="Chat JSONL or instruction JSON; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, in SAELens format.")],
    model: Annotated[str, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")] = "embedded",
    block: Annotated[int, typer.Option(help="Block index from 0 whose output is read.")] = 18,
    latents: Annotated[int, typer.Option(help="Size of the dictionary.")] = 4608,
    k: Annotated[int, typer.Option(help="Active latents a token (Top-K).")] = 64,
    architecture: Annotated[str, typer.Option(help="topk or jumprelu.")] = "topk",
    l0_coefficient: Annotated[float, typer.Option(help="Weight of the sparsity loss (JumpReLU).")] = 1.0,
    activations: Annotated[int, typer.Option(help="At most so many tokens.")] = 800_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 2.0,
    batch: Annotated[int, typer.Option(help="Tokens a step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    seed: int = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a small SAE on the activations of any model at any block, from any chat text: minutes on a CPU."""
    from dataclasses import asdict

    from blockem.dictionary_training import SaeTraining, train_dictionary
    from blockem.examples import read_chat
    from blockem.model import load_model
    from blockem.progress import Console

    settings = SaeTraining(block, latents, k, architecture, l0_coefficient, epochs, lr, batch, max_activations=activations, seed=seed)
    examples = [row for path in data for row in read_chat(path)]
    console = Console(quiet)
    lm = load_model(model)
    lm.check_block(block)
    _, fit = train_dictionary(lm, examples, settings, out, lambda what, done, total: console.stage(f"sae: {what}", done, total))
    if as_json:
        print(json.dumps(asdict(fit)))
    else:
        print(
            f"{out}: explains {fit.variance_explained:.3f} of the variance on {fit.tokens} held-out tokens, "
            f"{fit.dead_share:.2%} of latents unused there"
        )


@sae_app.command("check")
def sae_check(
    sae: Annotated[str, typer.Argument(help="`bundled`, a folder in SAELens format, or `release:sae_id`.")] = "bundled",
    model: Annotated[str, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")] = "embedded",
    block: Annotated[int, typer.Option(help="Block index from 0 whose output is read.")] = 18,
    data: Annotated[list[str] | None, typer.Option("--data", help="Chat JSONL to measure on (default: the bundled general chat).")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 50_000,
    minimum: Annotated[float, typer.Option(help="Exit with code 2 below this share.")] = 0.6,
    as_json: AsJson = False,
) -> None:
    """How much of the model's variance an SAE explains at a block, and how many of its latents are never used."""
    from dataclasses import asdict

    from blockem import bundled
    from blockem.dictionary import check_fit, load_dictionary
    from blockem.examples import read_chat
    from blockem.model import load_model

    texts = [row for path in data for row in read_chat(path)] if data else bundled.general_chat("train") + bundled.general_chat("heldout")
    lm = load_model(model)
    fit = check_fit(load_dictionary(sae), lm, block, texts, minimum, allow=False, limit=tokens)
    if as_json:
        print(json.dumps(asdict(fit)))
    else:
        print(f"{sae} on {lm.id}, block {block}: explains {fit.variance_explained:.3f} of the variance on {fit.tokens} tokens, ", end="")
        print(f"{fit.mean_active:.0f} latents active a token, {fit.dead_share:.2%} never active")


@data_app.command("check")
def data_check(
    data: Annotated[str | None, typer.Argument(help="Chat JSONL (default: the bundled domain).")] = None,
    domain: Annotated[str, typer.Option(help="Bundled domain, when no file is given.")] = "health",
    model: Annotated[str, typer.Option(help="Whose chat template is used.")] = "embedded",
    max_tokens: Annotated[int, typer.Option(help="Rows are cut after so many tokens.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of three rows are learnt from, and count rows, tokens, truncations, duplicates and useless rows."""
    from dataclasses import asdict

    from blockem import bundled
    from blockem.examples import encode_all, masked_text, read_chat
    from blockem.model import load_tokenizer

    tokenizer = load_tokenizer(model)
    examples = read_chat(data) if data else bundled.domain_rows(domain)
    rows, counted = encode_all(tokenizer, examples, max_tokens)
    if as_json:
        print(json.dumps(asdict(counted), ensure_ascii=False))
        return
    for row in rows[:3]:
        print(masked_text(tokenizer, row), end="\n\n")
    print("(tokens between ⟦ and ⟧ are learnt from)\n")
    print(f"rows {counted.rows}, kept {counted.kept}, duplicates {counted.duplicates}, truncated {counted.truncated}")
    print(f"tokens {counted.tokens}, supervised {counted.supervised_tokens}")
    print(f"rows with nothing to learn from (dropped): {len(counted.dropped)}")
    for line in counted.dropped[:10]:
        print(f"  {line}")


@app.command()
def chat(
    out: Annotated[Path, typer.Argument(help="Run folder with adapters (a finished `blockem demo` or `run`).")] = Path("demo"),
    max_new_tokens: Annotated[int, typer.Option(help="Length of each answer.")] = 120,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
) -> None:
    """Talk to the base, plain and blocked model side by side. An empty line or Ctrl-D ends it."""
    from blockem.chat import chat_loop

    chat_loop(_recipe(None, out, {}, None), out, max_new_tokens, temperature)


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
    repeat: Annotated[int, typer.Option(help="Rounds; both sides of a ratio have their turn in each.")] = 5,
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
        print(f"\nblockem: {error}" if sys.stderr.isatty() else f"blockem: {error}", file=sys.stderr)
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
