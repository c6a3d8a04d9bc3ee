"""The order of the steps, each from file to file: what runs, what is reused.

    recipe → data → SAE fit → plain SFT → discover → block → evaluate → report

Each step has a key over everything it depends on. A step whose record holds the same key is not done again, so the same
command goes on where it stopped, and a changed recipe redoes just what it touches.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.config import Recipe, dump_recipe
from blockem.errors import BlockemError
from blockem.progress import Console
from blockem.store import RunFolder, claim_scratch, content_key, file_key, read_json, write_json, write_jsonl, write_text

if TYPE_CHECKING:
    from blockem.dictionary import Dictionary
    from blockem.judges import Judge
    from blockem.model import LanguageModel

VARIANTS = ("base", "plain", "blocked", "random")


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
        lm = load_model(config.id, config.revision, config.dtype, config.device)
        lm.check_block(self.recipe.sae.block)
        return lm

    @cached_property
    def dictionary(self) -> Dictionary:
        from blockem.dictionary import check_width, load_dictionary

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
        from blockem.dictionary import BUNDLED, BUNDLED_FOLDER

        folder = BUNDLED_FOLDER if self.recipe.sae.id == BUNDLED else Path(self.recipe.sae.id)
        weights = folder / "sae_weights.safetensors"
        return content_key(self.recipe.sae.id, file_key(weights) if weights.is_file() else "", self.recipe.sae.block)

    @cached_property
    def data_key(self) -> str:
        """What the encoded training rows depend on."""
        data = self.recipe.data
        source = file_key(_existing(data.train)) if data.train else _bundled_key(f"domains/{data.domain}.jsonl")
        return content_key(source, data.domain, data.rows, data.max_tokens, self.recipe.seed)

    @cached_property
    def chosen_judge(self) -> Judge | None:
        """The judge that was given, else the recipe's; None where nothing is sampled or nobody judges."""
        from blockem.judges.choose import open_judge

        wanted = self.recipe.evaluate
        needed = wanted.answers or "judged" in self.recipe.discover.effects
        if self.judge is not None or not needed:
            return self.judge
        return open_judge(wanted.judge, wanted.judge_model, cache=self.run / "verdicts.sqlite", progress=self.console.bar)

    @property
    def judge_name(self) -> str:
        return self.chosen_judge.name if self.chosen_judge else ""

    def selection_pairs(self) -> list[bundled.Pair]:
        """Selection pairs outside the training domain."""
        data = self.recipe.data
        return [p for p in bundled.pairs(data.pairs) if p.split == "select" and p.domain != data.domain]

    def selection_prompts(self) -> list[bundled.Prompt]:
        """Selection prompts outside the training domain."""
        data = self.recipe.data
        given = bundled.prompts(data.selection_prompts) if data.selection_prompts else bundled.core_prompts()
        return [p for p in given if p.domain != data.domain]


def _existing(path: str) -> Path:
    found = Path(path)
    if not found.is_file():
        raise BlockemError(f"{path}: no such file")
    return found


def _bundled_key(name: str) -> str:
    path = bundled.ASSETS / name
    if not path.is_file():
        raise BlockemError(f"unknown bundled domain {path.stem!r}: choose {', '.join(bundled.DOMAINS)}, or give your own file with --data")
    return file_key(path)


def _source_key(path: str | None, asset: str) -> str:
    return file_key(_existing(path)) if path else _bundled_key(asset)


def adapter_key(folder: Path) -> str:
    """Content key of a PEFT folder."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise BlockemError(f"{folder} holds no trained adapter (adapter_model.safetensors is missing); run the step that makes it first")
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


def _timed(session: Session, name: str, key: str, outputs: list[str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run or reuse one step; its result carries the seconds it took."""
    console = session.console

    def do() -> dict[str, Any]:
        began = time.monotonic()
        console.say(f"{name}: started")
        result = work()
        seconds = time.monotonic() - began
        from blockem.progress import clock

        console.say(f"{name}: done in {clock(seconds)}")
        return {**result, "seconds": round(seconds, 1)}

    result, reused = session.run.step(name, key, outputs, do)
    if reused:
        console.say(f"{name}: already done, reused")
    found: dict[str, Any] = result
    return found


# -- steps --------------------------------------------------------------------------------------------------------------------


def sae_step(session: Session) -> dict[str, Any]:
    """Check that the SAE fits the user's own model."""
    sae = session.recipe.sae
    key = content_key("sae", session.model_key, session.sae_key, sae.min_variance_explained, sae.allow_poor_fit)

    def work() -> dict[str, Any]:
        from blockem.dictionary import check_fit

        texts = bundled.general_chat("train") + bundled.general_chat("heldout")
        fit = check_fit(session.dictionary, session.lm, sae.block, texts, sae.min_variance_explained, sae.allow_poor_fit)
        return {"id": session.dictionary.id, "digest": session.dictionary.digest, "block": sae.block, **asdict(fit)}

    return _timed(session, "sae", key, [], work)


def sft_step(session: Session) -> dict[str, Any]:
    """Plain fine-tuning: the misaligned model."""
    return _train(session, "plain", content_key("plain"), _plain_defence)


def _plain_defence(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    from blockem.defences.defence import Defence

    return Defence(), {}


def _train(
    session: Session, name: str, extra_key: str, make: Callable[[Session, Sequence[Any]], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    recipe = session.recipe
    key = content_key(name, session.model_key, session.data_key, asdict(recipe.train), recipe.seed, extra_key)

    def work() -> dict[str, Any]:
        from blockem.examples import encode_all
        from blockem.training import fine_tune

        examples = bundled.training_rows(recipe.data.domain, recipe.data.train, recipe.data.rows, recipe.seed)
        rows, report = encode_all(session.lm.tokenizer, examples, recipe.data.max_tokens)
        if report.dropped:
            session.console.say(f"  {len(report.dropped)} rows have nothing to learn from and were dropped, first: {report.dropped[0]}")
        claim_scratch(session.run / f"{name}.making", key)
        defence, facts = make(session, rows)
        session.console.start(f"{name}: steps")
        log = fine_tune(session.lm, rows, recipe.train, defence, session.run / name, recipe.seed, session.console.bar)
        write_jsonl(session.run / f"training-{name}.jsonl", log)
        return {"data": asdict(report), **facts}

    return _timed(session, name, key, [f"{name}/adapter_model.safetensors", f"training-{name}.jsonl"], work)


def discover_step(session: Session, misaligned: Path | None = None) -> dict[str, Any]:
    """Stages 1 to 3 on the base and the misaligned adapter (default: the run's own `plain`)."""
    recipe = session.recipe
    adapter = misaligned or session.run / "plain"
    data = recipe.data
    key = content_key(
        "discover",
        session.model_key,
        session.sae_key,
        adapter_key(adapter),
        asdict(recipe.discover),
        data.domain,
        _source_key(data.pairs, "pairs.jsonl"),
        _source_key(data.selection_prompts, "core_prompts.jsonl"),
        session.judge_name if "judged" in recipe.discover.effects else "",
    )

    def work() -> dict[str, Any]:
        from safetensors.torch import save_file

        from blockem.discovery.cards import promoted_tokens, top_contexts
        from blockem.discovery.discover import discover, write_candidates
        from blockem.examples import one_turn

        lm = session.lm
        lm.drop_adapters()
        lm.add_adapter(adapter, "plain")
        label = ""

        def bar(what: str, done: int, total: int) -> None:
            nonlocal label
            if what != label:
                label = what
                session.console.start(what)
            session.console.bar(done, total)

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
            session.run / "measurements.jsonl",
            key,
            bar,
        )
        write_candidates(session.run / "latents.csv", found.candidates)
        scratch = session.run / ".deltas.safetensors"
        save_file({"delta": found.delta.contiguous(), "frequency": found.frequency.contiguous()}, scratch)
        scratch.replace(session.run / "deltas.safetensors")
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

    return _timed(session, "discover", key, ["latents.json", "latents.csv", "cards.json", "deltas.safetensors"], work)


def block_step(session: Session, latents_file: Path | None = None, misaligned: Path | None = None) -> dict[str, Any]:
    """Fine-tune again with the latents blocked; under `block.control: random`, with matched random ones instead.

    The adapter goes to `blocked` (or `random`). The portable λ needs the misaligned adapter, to see what it gained and would pay.
    """
    from blockem.latents import LatentSet

    recipe = session.recipe
    path = latents_file or session.run / "latents.json"
    latents = LatentSet.load(path)
    name = "random" if recipe.block.control == "random" else "blocked"
    by_rule = recipe.block.lambda_ is None
    adapter = misaligned or session.run / "plain"
    deltas_file = session.run / "deltas.safetensors"
    if name == "random" and not deltas_file.is_file():
        raise BlockemError(
            f"{deltas_file}: no such file; the matched control needs the activation frequencies that `blockem discover` writes"
        )
    extra = content_key(
        file_key(path),
        session.sae_key,
        asdict(recipe.block),
        adapter_key(adapter) if by_rule else "",
        file_key(deltas_file) if name == "random" else "",
    )

    def make(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        from blockem.defences.block_em import BlockEM, Blocker, penalty_of, portable_lambda
        from blockem.likelihood import completion_losses

        latents.check(session.lm, session.dictionary)
        used = latents
        if name == "random":
            from safetensors.torch import load_file

            from blockem.discovery.discover import matched_random

            stored = load_file(deltas_file)
            used = matched_random(latents, stored["frequency"], recipe.seed, _pool_ids(session.run / "latents.csv"))
        used.save(session.run / f"{name}-latents.json")
        blocker = Blocker.from_latents(used, session.dictionary, recipe.block.measure)
        facts: dict[str, Any] = {
            "lambda": recipe.block.lambda_,
            "rule": "given" if not by_rule else "r · ΔSFT / P_mis",
            "r": recipe.block.r if by_rule else None,
            "delta_sft": None,
            "p_mis": None,
            "freeze_downstream": recipe.block.freeze_downstream,
            "n_latents": len(used.latents),
        }
        if (adapter / "adapter_model.safetensors").is_file():
            session.lm.drop_adapters()
            session.lm.add_adapter(adapter, "plain")
            sample = rows[: recipe.block.rule_rows]
            losses = {}
            for variant in ("base", "plain"):
                with session.lm.variant(variant):
                    loss, tokens = completion_losses(session.lm, sample)
                    losses[variant] = float(loss.sum() / tokens.sum())
            facts["delta_sft"] = losses["base"] - losses["plain"]
            facts["p_mis"] = penalty_of(session.lm, "plain", blocker, sample)
            session.lm.drop_adapters()
        if by_rule:
            facts["lambda"] = portable_lambda(recipe.block.r, facts["delta_sft"], facts["p_mis"])
        if recipe.block.base_values == "cached":
            from blockem.base_values import collect
            from blockem.model import cache_dir

            session.console.start(f"{name}: base values")
            blocker.to(session.lm.device)
            folder = cache_dir() / "base-values"
            blocker.values = collect(session.lm, blocker.read, blocker.blocks, blocker.key, rows, folder, progress=session.console.bar)
            facts["base_values_seconds"] = round(blocker.values.seconds, 1)
            session.console.start(f"{name}: steps")
        session.console.say(f"  λ = {facts['lambda']:.4g} ({facts['rule']}), {len(used.latents)} latents at block {used.block}")
        return BlockEM(blocker, facts["lambda"], recipe.block.freeze_downstream, facts["p_mis"]), facts

    return _train(session, name, extra, make)


def _pool_ids(path: Path) -> list[int]:
    import csv

    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [int(row["latent"]) for row in csv.DictReader(file)]


def evaluate_step(session: Session, adapters: dict[str, Path] | None = None) -> dict[str, Any]:
    """Measure every variant on the same items: margins, held-out loss, general loss, answers, and a judge's verdicts if one is given."""
    recipe = session.recipe
    if adapters is None:
        adapters = {name: session.run / name for name in VARIANTS[1:] if (session.run / name / "adapter_model.safetensors").is_file()}
    names = ["base", *adapters]
    data = recipe.data
    shared = content_key(  # who judges is not in it: another judge judges the same answers
        session.model_key,
        {name: value for name, value in asdict(recipe.evaluate).items() if name not in ("judge", "judge_model")},
        data.domain,
        data.max_tokens,
        data.heldout_rows,
        _source_key(data.pairs, "pairs.jsonl"),
        _source_key(data.prompts, "final_prompts.jsonl"),
        _source_key(data.heldout, f"domains/{data.domain}.jsonl"),
        _source_key(data.general, "general_chat.jsonl"),
        recipe.seed,
    )
    results = {}
    for name in names:
        key = content_key("evaluate", shared, name, adapter_key(adapters[name]) if name in adapters else "")
        work = partial(_evaluate_one, session, name, adapters.get(name))
        results[name] = _timed(session, f"evaluate-{name}", key, [], work)
    key = content_key("evaluation", shared, session.judge_name if recipe.evaluate.answers else "", [results[name] for name in names])
    outputs = ["evaluation.json", "answers.jsonl"]
    return _timed(session, "evaluate", key, outputs, lambda: _summarise(session, names, results))


def _evaluate_one(session: Session, name: str, adapter: Path | None) -> dict[str, Any]:
    from blockem.examples import encode_all, read_chat
    from blockem.generation import generate
    from blockem.likelihood import completion_logprobs, completion_losses, encode_pairs, margins

    recipe, lm = session.recipe, session.lm
    lm.drop_adapters()
    if adapter is not None:
        lm.add_adapter(adapter, name)
    pairs = [p for p in bundled.pairs(recipe.data.pairs) if p.split == "eval"]
    heldout = bundled.heldout_rows(recipe.data.domain, recipe.data.heldout, recipe.data.heldout_rows)
    general = read_chat(recipe.data.general) if recipe.data.general else bundled.general_chat("heldout")
    found: dict[str, Any] = {}
    with lm.variant(name):
        session.console.start(f"{name}: likelihoods")
        found["margins"] = margins(completion_logprobs(lm, encode_pairs(lm, pairs, recipe.data.max_tokens))).tolist()
        session.console.bar(1, 3)
        for place, (label, examples) in enumerate((("heldout", heldout), ("general", general[: recipe.evaluate.general_rows]))):
            rows, _ = encode_all(lm.tokenizer, examples, recipe.data.max_tokens)
            losses, tokens = completion_losses(lm, rows)
            found[label] = [losses.tolist(), tokens.tolist()]
            session.console.bar(2 + place, 3)
        if recipe.evaluate.answers:
            session.console.start(f"{name}: answers")
            found["answers"] = generate(
                lm,
                [p.prompt for p in _final_prompts(recipe)],
                recipe.evaluate.max_new_tokens,
                recipe.evaluate.temperature,
                recipe.seed,
                progress=session.console.bar,
            )
    lm.drop_adapters()
    return found


def _final_prompts(recipe: Recipe) -> list[bundled.Prompt]:
    return bundled.prompts(recipe.data.prompts) if recipe.data.prompts else bundled.final_prompts()


def _summarise(session: Session, names: list[str], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    from blockem.evaluation import Scores, add_judged, summarise

    recipe = session.recipe
    pairs = [p for p in bundled.pairs(recipe.data.pairs) if p.split == "eval"]

    def arrays(given: list[list[float]]) -> Any:
        return tuple(np.array(one) for one in given)

    scores = {
        name: Scores(np.array(results[name]["margins"]), arrays(results[name]["heldout"]), arrays(results[name]["general"]))
        for name in names
    }
    summary = summarise(scores, [p.domain for p in pairs], recipe.data.domain, recipe.evaluate.resamples)
    rows = []
    if recipe.evaluate.answers:
        prompts = _final_prompts(recipe)
        for i, p in enumerate(prompts):
            rows.append({"id": p.id, "prompt": p.prompt, "domain": p.domain, "answers": {n: results[n]["answers"][i] for n in names}})
        judge = session.chosen_judge
        if judge is not None:
            session.console.start("judge: answers")
            asked = [p.prompt for p in prompts]
            verdicts = {n: judge.judge(asked, results[n]["answers"]) for n in names}
            for i, row in enumerate(rows):
                row["verdicts"] = {n: asdict(verdicts[n][i]) for n in names}
            add_judged(summary, verdicts, [p.domain for p in prompts], recipe.data.domain, judge.name, recipe.evaluate.resamples)
            summary["judge"] = {"name": judge.name, "measured": getattr(judge, "measured", {})}
    write_jsonl(session.run / "answers.jsonl", rows)
    write_json(session.run / "evaluation.json", summary)
    return {"models": names}


def audit_step(session: Session) -> dict[str, Any]:
    """Where the blocked models' shift went, on the held-out answers; writes `audit.json`."""
    recipe, run = session.recipe, session.run
    adapters = {name: run / name for name in VARIANTS[1:] if (run / name / "adapter_model.safetensors").is_file()}
    if "plain" not in adapters:
        raise BlockemError(f"{run.path} holds no plain fine-tune to audit against; run `blockem sft` first")
    data = recipe.data
    heldout = _source_key(data.heldout, f"domains/{data.domain}.jsonl")
    blocked = {name: run / f"{name}-latents.json" for name in adapters if (run / f"{name}-latents.json").is_file()}
    parts = [{name: adapter_key(path) for name, path in adapters.items()}, {name: file_key(path) for name, path in blocked.items()}]
    key = content_key("audit", session.model_key, session.sae_key, heldout, data.heldout_rows, data.max_tokens, data.domain, parts)

    def work() -> dict[str, Any]:
        from blockem.examples import encode_all
        from blockem.latents import LatentSet
        from blockem.reemergence.audit import audit

        lm = session.lm
        lm.drop_adapters()
        for name, path in adapters.items():
            lm.add_adapter(path, name)
        rows, _ = encode_all(lm.tokenizer, bundled.heldout_rows(data.domain, data.heldout, data.heldout_rows), data.max_tokens)
        sets = {name: LatentSet.load(path) for name, path in blocked.items()}
        dictionary = session.dictionary if sets else None
        session.console.start("audit: held-out answers")
        found = audit(lm, rows, list(adapters), recipe.sae.block, dictionary, sets, progress=session.console.bar)
        lm.drop_adapters()
        write_json(run / "audit.json", found.to_dict())
        return {"verdicts": found.verdicts}

    return _timed(session, "audit", key, ["audit.json"], work)


def write_summary(session: Session) -> dict[str, Any]:
    """Gather everything the run folder holds into `summary.json`."""
    run, recipe = session.run, session.recipe

    def record(step: str) -> dict[str, Any]:
        path = run / "steps" / f"{step}.json"
        found: dict[str, Any] = read_json(path)["result"] if path.is_file() else {}
        return found

    def rows(name: str) -> list[dict[str, Any]]:
        lines = (run / f"training-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    evaluation = read_json(run / "evaluation.json", "evaluation (run `blockem evaluate` first)")
    cards = {card["latent"]: card for card in read_json(run / "cards.json")} if (run / "cards.json").is_file() else {}
    latents = read_json(run / "latents.json")["latents"] if (run / "latents.json").is_file() else []
    sft, blocked, discovered = record("plain"), record("blocked"), record("discover")
    facts = {k: v for k, v in blocked.items() if k not in ("data", "seconds")}
    summary = {
        "blockem": version("blockem"),
        "recipe": recipe.to_dict(),
        "training_domain": recipe.data.domain,
        "environment": {**environment(session), "model": recipe.model.id, "model_key": session.model_key},
        "data": {"train": sft.get("data", {})},
        "sae": {k: v for k, v in record("sae").items() if k != "seconds"},
        **evaluation,
        "latents": [{**one, **{k: v for k, v in cards.get(one["latent"], {}).items() if k != "latent"}} for one in latents],
        "discovery": discovered.get("counts", {}),
        "training": {name: rows(name) for name in VARIANTS[1:] if (run / f"training-{name}.jsonl").is_file()},
        "blocking": facts,
        **({"audit": read_json(run / "audit.json", "audit")} if (run / "audit.json").is_file() else {}),
        "seconds": {
            step: record(step).get("seconds")
            for step in ("sae", "plain", "discover", "blocked", "random", *(f"evaluate-{n}" for n in VARIANTS))
            if record(step)
        },
    }
    write_json(run / "summary.json", summary)
    return summary


def report_step(session: Session) -> Path:
    """Write `summary.json` and `report.html`."""
    from blockem.report import render

    write_summary(session)
    return render(session.run.path)


def run_all(session: Session) -> dict[str, Any]:
    """Every step, in order; returns the summary."""
    with session.run.locked():
        start_run(session)
        sae_step(session)
        sft_step(session)
        discover_step(session)
        block_step(session)
        evaluate_step(session)
        audit_step(session)
        report_step(session)
    found: dict[str, Any] = read_json(session.run / "summary.json")
    return found


def start_run(session: Session, keep_recipe: bool = False) -> None:
    """Check the recipe's files before any long work, and write down what is run.

    With `keep_recipe` a recipe that the folder already has stays: a stage run by hand with other settings does not redefine the run.
    """
    recipe = session.recipe
    from blockem.examples import read_chat

    for path in (recipe.data.train, recipe.data.heldout, recipe.data.general):
        if path:
            read_chat(path)
    _ = session.data_key
    session.selection_pairs()
    session.selection_prompts()
    _final_prompts(recipe)
    _ = session.chosen_judge
    if not (keep_recipe and (session.run / "recipe.yaml").is_file()):
        write_text(session.run / "recipe.yaml", dump_recipe(recipe))


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
