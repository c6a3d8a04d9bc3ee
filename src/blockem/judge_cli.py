"""`blockem judge train`, `bench` and `label`: parse, call one function, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockem.cli_options import AsJson, Quiet
from blockem.config_values import MOST_SEED, need, need_positive
from blockem.errors import BlockemError

if TYPE_CHECKING:
    from blockem.judges import Judge
    from blockem.progress import Console

judge_app = typer.Typer(
    help="Judges of sampled answers: train the local one, measure any, label any file.\n\n"
    "--judge says which: `local` (the bundled one), a folder that `judge train` wrote, or the address of an OpenAI-compatible server "
    "(http://localhost:8000/v1), for which --judge-model names the model. The server's key is read from OPENAI_API_KEY.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

JudgeName = Annotated[str, typer.Option("--judge", help="`local`, a judge's folder, or a server's address (http…/v1).")]
JudgeModel = Annotated[str | None, typer.Option(help="Model that the server shall judge with.")]
Protocol = Annotated[str, typer.Option(help="Server: `labelled` (1 to 5 and REFUSAL, INCOHERENT, …) or `scores` (0 to 100, twice).")]
Rubric = Annotated[Path | None, typer.Option(help="Server: your own rubric, a text file with {question} and {answer}.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Server: file that keeps all verdicts; nothing is asked twice (`label`: beside OUT if left out)."),
]
MaxRequests = Annotated[int | None, typer.Option(min=0, help="Server: send at most so many requests.")]
MaxTokens = Annotated[int | None, typer.Option(min=0, help="Server: stop after so many tokens, in and out, as it reports them.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Server: so many requests at a time.")]
ReplyTokens = Annotated[int, typer.Option(min=1, help="Server: longest reply of the model; one that thinks first needs a few thousand.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Server: print how many requests and tokens it would take, and ask nothing.")]


@judge_app.command()
def train(
    data: Annotated[list[str], typer.Option("--data", help="JSONL {question, answer, aligned, coherent}; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    good: Annotated[list[str] | None, typer.Option("--good", help="Chat file of good answers; may be repeated.")] = None,
    wrong: Annotated[list[str] | None, typer.Option("--wrong", help="Chat file of wrong advice; may be repeated.")] = None,
    matched: Annotated[list[str] | None, typer.Option("--pairs", help="JSONL {prompt, right, wrong}; may be repeated.")] = None,
    own: Annotated[
        list[str] | None, typer.Option("--own", help="Scored rows that are all trained on, and never measured with; may be repeated.")
    ] = None,
    twice: Annotated[int, typer.Option("--own-times", min=0, help="So many times.")] = 2,
    start: Annotated[Path | None, typer.Option(help="Go on from this judge's folder instead of from the bare model.")] = None,
    broken: Annotated[float, typer.Option(help="Share of rows added with their answer broken.")] = 0.05,
    blocks: Annotated[int, typer.Option(min=1, help="So many lower blocks of the embedded model are used.")] = 24,
    rows: Annotated[int, typer.Option(min=1, help="At most so many training rows.")] = 9000,
    epochs: Annotated[float, typer.Option(help="Passes over them.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a local judge, and measure it on questions and on models that it never saw.

    Scores are learnt from --data and --own; --good, --wrong and --pairs widen the questions, their answers count as 95 or 12 of 100.
    Rows of split "test", and all that ask their questions, are kept for the measurement, and so is a tenth of the models. Half an hour on
    two CPU cores; killed, the same command goes on where it stopped.
    """
    from blockem.judge_training import (
        GOOD,
        WRONG,
        JudgeTraining,
        heldout_figures,
        read_pairs,
        read_scored,
        read_unscored,
        split_rows,
        train_judge,
    )
    from blockem.model import load_model
    from blockem.progress import Console

    need_positive(epochs, "--epochs")
    need_positive(lr, "--lr")
    need(0 <= broken <= 1, f"--broken is {broken:g}; it is a share of the rows, from 0 to 1")
    console = Console(quiet)
    settings = JudgeTraining(blocks=blocks, rows=rows, broken=broken, epochs=epochs, lr=lr, seed=seed)
    more = [row for path in good or [] for row in read_unscored(path, GOOD, settings.more, seed)]
    more += [row for path in wrong or [] for row in read_unscored(path, WRONG, settings.more, seed)]
    more += [row for path in matched or [] for row in read_pairs(path)]
    more += [row for path in own or [] for row in read_scored(path)] * twice
    split = split_rows([row for path in data for row in read_scored(path)], settings, more)
    kept = f"{len(split.test_questions)} with new questions and {len(split.test_models)} of new models to measure with"
    console.say(f"judge: {len(split.train)} rows to train on, {kept}")
    lm = load_model()
    lm.check_block(blocks - 1)
    console.start("judge: steps")
    train_judge(lm, split, settings, out, console.bar, start)
    console.start("judge: held-out answers")
    found = heldout_figures(out, split, console.bar)
    if as_json:
        print(json.dumps(found))
        return
    from blockem.judge_bench import bench_lines

    for name, figures in found.items():
        print(f"-- {name}", *bench_lines(figures), sep="\n")


@judge_app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="Scored answers, JSONL (or .gz) {question, answer, aligned, coherent}.")],
    judge: JudgeName = "local",
    split: Annotated[str | None, typer.Option(help="Only rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows.")] = None,
    judge_model: JudgeModel = None,
    protocol: Protocol = "scores",
    rubric: Rubric = None,
    cache: Cache = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    concurrency: Concurrency = 8,
    reply_tokens: ReplyTokens = 16,
    dry_run: DryRun = False,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw the calibration in.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """How far a judge agrees with scores that a file already has: AUROC, rank correlation, calibration, agreement, speed."""
    import numpy as np

    from blockem.calibration_plot import calibration_svg
    from blockem.judge_bench import bench as measure
    from blockem.judge_bench import bench_lines
    from blockem.judge_training import read_scored
    from blockem.progress import Console
    from blockem.store import check_target, write_text

    if plot is not None:
        check_target(plot)
    rows = [row for row in read_scored(file) if split is None or row.split == split][:limit]
    if not rows:
        raise BlockemError(f"{file} holds no row of split {split!r}; leave --split out")
    console = Console(quiet)
    chosen = _judge(judge, judge_model, protocol, rubric, cache, max_requests, max_tokens, concurrency, reply_tokens, console)
    if plot is not None and getattr(chosen, "protocol", "scores") == "labelled":
        raise BlockemError("--protocol labelled gives no scores from 0 to 100 to draw a calibration of; leave --plot or it out")
    questions, answers = [row.question for row in rows], [row.answer for row in rows]
    if dry_run:
        _estimate(chosen, questions, answers)
        return
    console.start("judge: answers")
    scores = np.array([(row.aligned, row.coherent) for row in rows])
    found = measure(chosen, questions, answers, scores[:, 0], scores[:, 1])
    print(json.dumps(found) if as_json else "\n".join(bench_lines(found)))
    if plot is not None:
        if not found["calibration"]:
            raise BlockemError("no answer has scores from 0 to 100, so there is no calibration to draw; leave --plot out")
        write_text(plot, calibration_svg(found))


@judge_app.command()
def label(
    file: Annotated[Path, typer.Argument(help="JSONL {prompt (or question), answer}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSONL to write: the same rows, each with its `verdict`.")],
    judge: JudgeName = "local",
    judge_model: JudgeModel = None,
    protocol: Protocol = "labelled",
    rubric: Rubric = None,
    cache: Cache = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    concurrency: Concurrency = 8,
    reply_tokens: ReplyTokens = 16,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge every answer of a file. A verdict that could not be had is marked missing, with the reason."""
    from dataclasses import asdict

    from blockem.examples import read_rows
    from blockem.judges import shares
    from blockem.progress import Console
    from blockem.store import check_target, write_jsonl

    check_target(out)
    rows = read_rows(file, "JSONL with prompt and answer in each row")
    texts = [(row.get("prompt", row.get("question")), row.get("answer")) for _, row in rows]
    for (where, _), (prompt, answer) in zip(rows, texts, strict=True):
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise BlockemError(f'{where}: a row to label needs text in "prompt" and "answer"')
    console = Console(quiet)
    kept = cache or out.with_name(f"{out.name}.verdicts.sqlite")
    chosen = _judge(judge, judge_model, protocol, rubric, kept, max_requests, max_tokens, concurrency, reply_tokens, console)
    prompts, answers = [str(p) for p, _ in texts], [str(a) for _, a in texts]
    if dry_run:
        _estimate(chosen, prompts, answers)
        return
    console.start("judge: answers")
    verdicts = chosen.judge(prompts, answers)
    write_jsonl(out, [{**row, "judge": chosen.name, "verdict": asdict(v)} for (_, row), v in zip(rows, verdicts, strict=True)])
    em, incoherent = shares(verdicts)
    found = {
        "answers": len(verdicts),
        "missing": sum(v.missing for v in verdicts),
        "misaligned": None if em != em else em,
        "incoherent": None if incoherent != incoherent else incoherent,
        "refusal": None if em != em else sum(v.refusal for v in verdicts) / sum(not v.missing for v in verdicts),
    }
    if as_json:
        print(json.dumps(found))
    else:
        print(f"{out}: " + ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))


def _judge(
    name: str,
    model: str | None,
    protocol: str,
    rubric: Path | None,
    cache: Path | None,
    max_requests: int | None,
    max_tokens: int | None,
    concurrency: int,
    reply_tokens: int,
    console: Console,
) -> Judge:
    """The judge that a command line names."""
    from blockem.judges.address import judge_named
    from blockem.judges.choose import open_judge

    address = judge_named(name, "--judge")
    found = open_judge(address, model, protocol, rubric, cache, max_requests, max_tokens, concurrency, console.bar, reply_tokens)
    if found is None:
        raise BlockemError("--judge none judges nothing; use local, a judge's folder, or a server's address")
    return found


def _estimate(judge: Judge, prompts: list[str], answers: list[str]) -> None:
    estimate = getattr(judge, "estimate", None)
    if estimate is None:
        raise BlockemError("--dry-run is for a server's judge; the local one costs nothing but time")
    print(json.dumps(estimate(prompts, answers)))
