"""The order of the steps, each from file to file: what runs, what is reused.

    recipe → data → SAE fit → plain SFT → discover → block → evaluate → report

Each step has a key over everything it depends on. A step whose record holds the same key is not done again, so the same
command goes on where it stopped, and a changed recipe redoes just what it touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.blocking_rounds import rounds_step
from blockem.checks import check_blocks, check_recipe, needs_latents, notes
from blockem.config import Recipe, dump_recipe
from blockem.config_values import keyed
from blockem.defence_names import BLOCK_EM
from blockem.defend import defend_step, inference_hooks
from blockem.errors import BlockemError
from blockem.evaluation import ANSWERS, TASK_ANSWERS
from blockem.progress import Console
from blockem.session import STEERING, Session, adapter_key, source_key, taken_file, timed
from blockem.several_blocks import DISCOVERED, at_block, at_each, block_folder, discover_each
from blockem.sharing import MEASURED
from blockem.store import RunFolder, content_key, file_key, read_json, write_json, write_jsonl, write_tensors, write_text
from blockem.summary import write_summary
from blockem.trainings import sft_step

if TYPE_CHECKING:
    from blockem.config import SaeConfig
    from blockem.examples import Message
    from blockem.judges import Judge


def sae_step(session: Session) -> dict[str, Any]:
    """Check that the SAE fits the user's own model."""
    sae = session.recipe.sae
    key = content_key("sae", session.model_key, session.sae_key, sae.min_variance_explained, sae.allow_poor_fit)

    def work() -> dict[str, Any]:
        from blockem.dictionary import check_fit

        texts = bundled.general_chat("train") + bundled.general_chat("heldout")
        fit = check_fit(session.dictionary, session.lm, sae.block, texts, sae.min_variance_explained, sae.allow_poor_fit)
        return {"id": session.dictionary.id, "digest": session.dictionary.digest, "block": sae.block, **asdict(fit)}

    return timed(session, "sae", key, [], work)


def sae_all(session: Session) -> dict[str, Any]:
    """The same for every SAE of the recipe; returns what it found of `sae.id`."""
    found: dict[str, Any] = at_each(session, sae_step)[0]
    return found


def discover_key(session: Session, adapter: Path) -> str:
    """What stages 1 to 3 against a misaligned adapter depend on."""
    recipe, data = session.recipe, session.recipe.data
    return content_key(
        "discover",
        session.model_key,
        session.sae_key,
        adapter_key(adapter),
        keyed(recipe.discover),
        data.domain,
        source_key(data.pairs, "pairs.jsonl"),
        source_key(data.selection_prompts, "core_prompts.jsonl"),
        session.judge_key if "judged" in recipe.discover.effects else "",
    )


def discover_all(session: Session, misaligned: Path | None = None) -> dict[str, Any]:
    """Stages 1 to 3 at every block of the recipe: `discover_step`, and with `sae.more` what it found by block."""
    if not session.recipe.sae.more:
        return discover_step(session, misaligned)
    adapter = misaligned or session.run / "plain"
    return discover_each(session, partial(discover_key, adapter=adapter), partial(discover_step, misaligned=adapter))


def discover_step(session: Session, misaligned: Path | None = None) -> dict[str, Any]:
    """Stages 1 to 3 on the base and the misaligned adapter (default: the run's own `plain`)."""
    recipe = session.recipe
    adapter = misaligned or session.run / "plain"
    key = discover_key(session, adapter)

    def work() -> dict[str, Any]:
        from blockem.discovery.cards import promoted_tokens, top_contexts
        from blockem.discovery.discover import discover, write_candidates
        from blockem.examples import one_turn

        lm = session.lm
        lm.drop_adapters()
        lm.add_adapter(adapter, "plain")
        general = bundled.general_chat("train")
        pairs = session.selection_pairs()
        found = discover(
            lm,
            session.dictionary,
            recipe.sae.block,
            recipe.discover,
            pairs,
            session.selection_prompts(),
            general,
            session.chosen_judge if "judged" in recipe.discover.effects else None,
            session.run / MEASURED,
            key,
            session.console.stage,
        )
        write_candidates(session.run / "latents.csv", found.candidates)
        write_tensors(session.run / "deltas.safetensors", {"delta": found.delta, "frequency": found.frequency})
        texts = general + [one_turn(p.prompt, p.wrong if i % 2 else p.right, p.domain) for i, p in enumerate(pairs)]
        ids = found.latents.ids
        tokens = promoted_tokens(lm, session.dictionary, ids)
        contexts = top_contexts(lm, session.dictionary, ids, recipe.sae.block, texts)
        cards = [
            {"latent": k, "promotes": up, "suppresses": down, "contexts": seen}
            for k, (up, down), seen in zip(ids, tokens, contexts, strict=True)
        ]
        write_json(session.run / "cards.json", cards)
        found.latents.save(session.run / "latents.json")
        lm.drop_adapters()
        return {"counts": found.counts}

    return timed(session, "discover", key, list(DISCOVERED), work)


def evaluate_step(session: Session, adapters: dict[str, Path] | None = None) -> dict[str, Any]:
    """Measure every variant on the same items: margins, held-out loss, general loss, answers, and a judge's verdicts if one is given."""
    recipe = session.recipe
    if adapters is None:
        adapters = session.variants()
        if left := session.leftovers():
            session.console.say(f"  left out, since another recipe made them: {', '.join(left)}")
    names = ["base", *adapters]
    adapter_keys = {name: adapter_key(folder) for name, folder in adapters.items()}  # one that is missing is said before any is measured
    data = recipe.data
    shared = content_key(  # who judges is not in it: another judge judges the same answers
        session.model_key,
        {name: value for name, value in asdict(recipe.evaluate).items() if not name.startswith("judge")},
        data.domain,
        data.max_tokens,
        data.heldout_rows,
        source_key(data.pairs, "pairs.jsonl"),
        source_key(data.prompts, "final_prompts.jsonl"),
        session.heldout_key,
        source_key(data.general, "general_chat.jsonl"),
        recipe.seed,
        source_key(data.train, f"domains/{data.domain}.jsonl") if recipe.evaluate.cue != "none" else "",
    )
    results = {}
    for name in names:
        hooks = [file_key(session.run / STEERING)] if name == "steering" else []
        key = content_key("evaluate", shared, name, adapter_keys.get(name, ""), *hooks)
        work = partial(_evaluate_one, session, name, adapters.get(name))
        results[name] = timed(session, f"evaluate-{name}", key, [], work)
    judged_by = session.judge_key if recipe.evaluate.answers else ""
    key = content_key("evaluation", shared, judged_by, [results[name] for name in names], session.main)
    outputs = ["evaluation.json", ANSWERS, TASK_ANSWERS]
    return timed(session, "evaluate", key, outputs, lambda: _summarise(session, names, results))


def _evaluate_one(session: Session, name: str, adapter: Path | None) -> dict[str, Any]:
    from blockem.examples import encode_all
    from blockem.generation import generate
    from blockem.likelihood import completion_logprobs, completion_losses, encode_pairs, margins

    recipe, lm = session.recipe, session.lm
    lm.drop_adapters()
    if adapter is not None:
        lm.add_adapter(adapter, name)
    pairs = bundled.evaluation_pairs(recipe.data.pairs)
    general = bundled.general_rows(recipe.data.general)
    found: dict[str, Any] = {}
    with lm.variant(name), inference_hooks(session, name)(lm.model):
        session.console.start(f"{name}: likelihoods")
        found["margins"] = margins(completion_logprobs(lm, encode_pairs(lm, pairs, recipe.data.max_tokens))).tolist()
        _check_finite(name, found["margins"])
        session.console.bar(1, 3)
        chat, _ = encode_all(lm.tokenizer, general[: recipe.evaluate.general_rows], recipe.data.max_tokens)
        for place, (label, rows) in enumerate((("heldout", session.heldout()), ("general", chat))):
            losses, tokens = completion_losses(lm, rows)
            found[label] = [losses.tolist(), tokens.tolist()]
            _check_finite(name, found[label][0])
            session.console.bar(2 + place, 3)
        length, temperature = recipe.evaluate.max_new_tokens, recipe.evaluate.temperature
        for key, label, asked in _asked(recipe):
            session.console.start(f"{name}: {label}")
            found[key] = generate(lm, asked, length, temperature, recipe.seed, progress=session.console.bar)
    lm.drop_adapters()
    return found


def _asked(recipe: Recipe) -> Iterator[tuple[str, str, Sequence[str | list[Message]]]]:
    """What every model is asked, where answers are wanted at all: a name for its answers, what to call them, and the questions."""
    from blockem.adherence import task_questions
    from blockem.cues import cued_prompts

    if not recipe.evaluate.answers:
        return
    prompts = [p.prompt for p in bundled.final_prompts(recipe.data.prompts)]
    yield "answers", "answers", prompts
    if recipe.evaluate.cue != "none":
        yield "cued_answers", "answers to cued prompts", cued_prompts(recipe, prompts)
    if asked := task_questions(recipe):
        yield "task_answers", "answers in the domain", asked


def _check_finite(name: str, values: Sequence[float]) -> None:
    """A model that says nothing but NaN prefers no wrong answer either: it must not pass for a cured one."""
    if not all(map(math.isfinite, values)):
        raise BlockemError(f"the model {name} gives log-probabilities that are no numbers: its training diverged; lower train.lr or λ")


def _summarise(session: Session, names: list[str], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    from blockem.adherence import add_adherence, task_questions
    from blockem.evaluation import Scores, add_judged, summarise
    from blockem.judges.judge import verdicts_on

    recipe = session.recipe
    pairs = bundled.evaluation_pairs(recipe.data.pairs)

    def arrays(given: list[list[float]]) -> Any:
        return tuple(np.array(one) for one in given)

    scores = {
        name: Scores(np.array(results[name]["margins"]), arrays(results[name]["heldout"]), arrays(results[name]["general"]))
        for name in names
    }
    summary = summarise(scores, [p.domain for p in pairs], recipe.data.domain, recipe.evaluate.resamples, session.main)
    rows = []
    if recipe.evaluate.answers:
        prompts = bundled.final_prompts(recipe.data.prompts)
        for i, p in enumerate(prompts):
            rows.append({"id": p.id, "prompt": p.prompt, "domain": p.domain, "answers": {n: results[n]["answers"][i] for n in names}})
        judge = session.chosen_judge
        if judge is not None:
            session.console.start("judge: answers")
            asked = [p.prompt for p in prompts]
            verdicts = {n: verdicts_on(judge, asked, results[n]["answers"]) for n in names}
            for i, row in enumerate(rows):
                row["verdicts"] = {n: asdict(verdicts[n][i]) for n in names}
            add_judged(summary, verdicts, [p.domain for p in prompts], recipe.data.domain, judge.name)
            summary["judge"] = {"name": judge.name, "measured": getattr(judge, "measured", {})}
        if recipe.evaluate.cue != "none":
            from blockem.cues import add_cued

            session.console.start("judge: answers to cued prompts")
            add_cued(recipe, summary, rows, {n: results[n]["cued_answers"] for n in names}, judge)
    task: list[dict[str, Any]] = []
    if recipe.evaluate.answers and (chats := task_questions(recipe)):
        session.console.start("judge: answers in the domain")
        task = add_adherence(summary, chats, {n: results[n]["task_answers"] for n in names}, session.chosen_judge)
    write_jsonl(session.run / ANSWERS, rows)
    write_jsonl(session.run / TASK_ANSWERS, task)
    write_json(session.run / "evaluation.json", summary)
    return {"models": names}


def audit_step(session: Session) -> dict[str, Any]:
    """Where the blocked models' shift went, on the held-out answers; writes `audit.json`."""
    recipe, run = session.recipe, session.run
    adapters = session.trained()
    if "plain" not in adapters:
        raise BlockemError(f"{run.path} holds no plain fine-tune to audit against; run `blockem sft` first")
    data = recipe.data
    blocked = {name: path for name in adapters if (path := run / taken_file(name)).is_file()}
    parts: list[Any] = [
        {name: adapter_key(path) for name, path in adapters.items()},
        {name: file_key(path) for name, path in blocked.items()},
    ]
    further: dict[SaeConfig, dict[str, Path]] = {}
    for sae in recipe.sae.each[1:]:
        kept = {name: path for name in adapters if (path := block_folder(session, sae) / taken_file(name)).is_file()}
        further |= {sae: kept} if kept else {}
    parts += [[sae.id, sae.block, {name: file_key(path) for name, path in kept.items()}] for sae, kept in further.items()]
    key = content_key(
        "audit", session.model_key, session.sae_key, session.heldout_key, data.heldout_rows, data.max_tokens, data.domain, parts
    )

    def work() -> dict[str, Any]:
        from blockem.latents import LatentSet
        from blockem.reemergence.audit import audit

        lm = session.lm
        lm.drop_adapters()
        for name, path in adapters.items():
            lm.add_adapter(path, name)
        rows = session.heldout()
        sets = {name: LatentSet.load(path) for name, path in blocked.items()}
        dictionary = session.dictionary if sets else None
        session.console.start("audit: held-out answers")
        block = min(recipe.sae.block, lm.n_blocks - 1)  # without an SAE nobody may have set it
        found = audit(lm, rows, list(adapters), block, dictionary, sets, progress=session.console.bar).to_dict()
        for sae, kept in further.items():
            sets = {name: LatentSet.load(path) for name, path in kept.items()}
            with at_block(session, sae) as here:
                session.console.start(f"audit: held-out answers at block {sae.block}")
                one = audit(lm, rows, list(sets), sae.block, here.dictionary, sets, progress=session.console.bar).to_dict()
            found.setdefault("further", []).append({name: one[name] for name in ("block", "rerouting", "verdicts")})
        lm.drop_adapters()
        write_json(run / "audit.json", found)
        said = {name: [found["verdicts"][name], *_said_further(found, name)] for name in found["verdicts"]}
        return {"verdicts": {name: "; ".join(words) for name, words in said.items()}}

    return timed(session, "audit", key, ["audit.json"], work)


def _said_further(found: dict[str, Any], name: str) -> list[str]:
    return [f"at block {one['block']}, {one['verdicts'][name]}" for one in found.get("further", []) if name in one["verdicts"]]


def report_step(session: Session) -> Path:
    """Write `summary.json` and `report.html`."""
    from blockem.report import render

    write_summary(session)
    return render(session.run.path)


def run_all(session: Session, discover: Callable[[Session], Any] = discover_all) -> dict[str, Any]:
    """Every step, in order; returns the summary. A defence other than block-em skips what it does not need.

    Args:
        discover: what stands in the place of stages 1 to 3, for a defence that needs latents.
    """
    name = session.recipe.defence.name
    latents = needs_latents(session.recipe)
    with session.run.locked():
        start_run(session)
        if latents:
            sae_all(session)
        elif not (session.run / "plain").is_dir():
            check_blocks(session)
        sft_step(session)
        if latents:
            discover(session)
        if name == BLOCK_EM and session.recipe.rounds.budget > 1:
            rounds_step(session, discover_step)
        elif name != "plain":
            defend_step(session)
        evaluate_step(session)
        if name == BLOCK_EM:
            audit_step(session)
        report_step(session)
    found: dict[str, Any] = read_json(session.run / "summary.json")
    return found


def start_run(session: Session, keep_recipe: bool = False) -> None:
    """Check the recipe's files before any long work, and write down what is run.

    With `keep_recipe` a recipe that the folder already has stays: a stage run by hand with other settings does not redefine the run.
    """
    check_recipe(session, whole=not keep_recipe)
    _ = session.chosen_judge
    for note in notes(session):
        session.console.say(f"note: {note}")
    if not (keep_recipe and (session.run / "recipe.yaml").is_file()):
        write_text(session.run / "recipe.yaml", dump_recipe(session.recipe))


def open_session(recipe: Recipe, out: str | Path, quiet: bool = False, judge: Judge | None = None) -> Session:
    """A session on a run folder. Use the steps inside `with session.run.locked():`, or call `run_all`."""
    return Session(recipe, RunFolder(Path(out)), Console(quiet), judge)


def with_control(session: Session, control: str) -> Session:
    """The same session with another `block.control`, sharing what is loaded."""
    other = replace(session, recipe=replace(session.recipe, block=replace(session.recipe.block, control=control)))
    for name in ("lm", "dictionary"):
        if name in session.__dict__:
            other.__dict__[name] = session.__dict__[name]
    return other
