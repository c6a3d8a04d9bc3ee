"""`blockem sae train` and `check`: parse, call one function, print."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from blockem.cli_options import AsJson, Quiet
from blockem.config_values import MOST_SEED, need, need_positive

sae_app = typer.Typer(help="Sparse autoencoders: train a small one, check how well one fits.", no_args_is_help=True, rich_markup_mode=None)


@sae_app.command("train")
def sae_train(
    data: Annotated[list[str], typer.Option("--data", help="Chat JSONL or instruction JSON; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, in SAELens format.")],
    model: Annotated[str, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")] = "embedded",
    block: Annotated[
        list[int] | None,
        typer.Option(help="Block index from 0 whose output is read (default: 18). Given several times: one SAE each, in OUT/block-N."),
    ] = None,
    latents: Annotated[int, typer.Option(min=1, help="Size of the dictionary.")] = 4608,
    k: Annotated[int, typer.Option(min=1, help="Active latents a token (Top-K).")] = 64,
    architecture: Annotated[str, typer.Option(help="topk or jumprelu.")] = "topk",
    l0_coefficient: Annotated[float, typer.Option(help="Weight of the sparsity loss (JumpReLU).")] = 1.0,
    activations: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 800_000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 2.0,
    batch: Annotated[int, typer.Option(min=1, help="Tokens a step.")] = 1024,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a small SAE on the activations of any model at any block, from any chat text: minutes on a CPU.

    Killed, it goes on where it was when the same command runs again; until then OUT.making holds what that takes, activations too.
    """
    from dataclasses import asdict

    from blockem.dictionary_training import SaeTraining, train_dictionaries
    from blockem.errors import BlockemError
    from blockem.examples import read_chat
    from blockem.model import load_model
    from blockem.progress import Console
    from blockem.store import disk_errors

    need_positive(epochs, "--epochs")
    need_positive(lr, "--lr")
    need(0 <= l0_coefficient < math.inf, f"--l0-coefficient is {l0_coefficient:g}; it must be a number that is not negative")
    blocks = block or [18]
    if len(set(blocks)) < len(blocks):
        raise BlockemError(f"--block names a block twice ({', '.join(map(str, blocks))}); name each once")
    outs = {one: out / f"block-{one}" for one in blocks} if len(blocks) > 1 else {blocks[0]: out}
    settings = SaeTraining(blocks[0], latents, k, architecture, l0_coefficient, epochs, lr, batch, max_activations=activations, seed=seed)
    examples = [row for path in data for row in read_chat(path)]
    console = Console(quiet)
    lm = load_model(model)
    for one in blocks:
        lm.check_block(one)
    home = out if len(blocks) > 1 else out.parent
    with disk_errors(out):  # the first file is written only when all activations are there
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    trained = train_dictionaries(lm, examples, outs, settings, lambda what, done, total: console.stage(f"sae: {what}", done, total))
    fits = {one: asdict(fit) for one, (_, fit) in trained.items()}
    if as_json:
        print(json.dumps(fits if len(blocks) > 1 else fits[blocks[0]]))
        return
    for one, (_, fit) in trained.items():
        print(
            f"{outs[one]}: explains {fit.variance_explained:.3f} of the variance on {fit.tokens} held-out tokens, "
            f"{fit.dead_share:.2%} of latents unused there"
        )


@sae_app.command("check")
def sae_check(
    sae: Annotated[str, typer.Argument(help="`bundled`, a folder in SAELens format, or `release:sae_id`.")] = "bundled",
    model: Annotated[str, typer.Option(help="`embedded`, a folder, a .gguf file or a hub id.")] = "embedded",
    block: Annotated[int, typer.Option(help="Block index from 0 whose output is read.")] = 18,
    data: Annotated[list[str] | None, typer.Option("--data", help="Chat JSONL to measure on (default: the bundled general chat).")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="At most so many tokens.")] = 50_000,
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
