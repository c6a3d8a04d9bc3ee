"""Training under a defence by name, from recipe to report, on the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from blockem import bundled
from blockem.config import Recipe
from blockem.defences.defence import Defence
from blockem.defend import check_files, defend_step, inference_hooks
from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.examples import encode_all
from blockem.model import LanguageModel
from blockem.pipeline import evaluate_step, open_session, report_step, run_all
from blockem.session import VARIANTS, Session
from blockem.store import read_json
from blockem.summary import write_summary
from blockem.training import fine_tune
from blockem.trainings import sft_step

TRAINED = ("kl", "ldifs", "interleaving", "inoculation", "preventative", "caft", "safelora", "early-stop", "small-lr", "freeze")


@pytest.fixture
def recipe(tmp_path: Path, lm: LanguageModel, dictionary: Dictionary) -> Recipe:
    pairs, prompts, asked = (tmp_path / f"{name}.jsonl" for name in ("pairs", "prompts", "asked"))
    pairs.write_text("".join(json.dumps({**p.__dict__, "split": "eval"}) + "\n" for p in tiny.pairs()))
    prompts.write_text("".join(json.dumps(p.__dict__) + "\n" for p in tiny.prompts()[:2]))
    asked.write_text("".join(json.dumps(p.__dict__) + "\n" for p in tiny.prompts()[2:4]))
    quick = {f"train.{name}": value for name, value in vars(tiny.train_config(epochs=2)).items()}
    return Recipe().with_values(
        {
            **quick,
            "model.id": lm.id,
            "model.dtype": "float32",
            "model.device": "cpu",
            "sae.id": dictionary.id,
            "sae.block": tiny.BLOCK,
            "sae.allow_poor_fit": True,
            "data.rows": 16,
            "data.heldout_rows": 4,
            "data.pairs": str(pairs),
            "data.prompts": str(prompts),
            "data.selection_prompts": str(asked),
            "discover.max_new_tokens": 4,
            "evaluate.max_new_tokens": 4,
            "evaluate.general_rows": 3,
            "evaluate.resamples": 100,
            "evaluate.judge": "none",
        }
    )


@pytest.fixture
def session(recipe: Recipe, tmp_path: Path, lm: LanguageModel, dictionary: Dictionary) -> Session:
    """A run folder with a plain fine-tune and a LatentSet."""
    found = open_session(recipe, tmp_path / "run", quiet=True)
    found.__dict__.update(lm=lm, dictionary=dictionary)
    sft_step(found)
    latents = tiny.latent_set(lm, dictionary)
    replace(latents, latents=tuple(replace(one, repair_alpha=0.3) for one in latents.latents), norm=2.0).save(found.run / "latents.json")
    return found


def under(session: Session, name: str, strength: float | None = None, **changes: Any) -> Session:
    """The session with another defence, sharing what is loaded."""
    defence = replace(session.recipe.defence, name=name, strength=strength, **changes)
    other = replace(session, recipe=replace(session.recipe, defence=defence))
    other.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
    return other


@pytest.mark.parametrize("name", TRAINED)
def test_a_defence_trains_once_into_its_folder(session: Session, name: str) -> None:
    result = defend_step(under(session, name))
    assert result["defence"] == name
    adapter, log = session.run / name / "adapter_model.safetensors", session.run / f"training-{name}.jsonl"
    assert adapter.is_file() and log.is_file() and (session.run / "steps" / f"{name}.json").is_file()
    stamp = adapter.stat().st_mtime_ns
    assert defend_step(under(session, name)) == result and adapter.stat().st_mtime_ns == stamp
    plain, own = (load_file(session.run / one / "adapter_model.safetensors") for one in ("plain", name))
    same = set(plain) == set(own) and all(torch.equal(plain[key], own[key]) for key in plain)
    assert same == (name == "safelora")  # whose direction is the plain fine-tune's own: nothing lies below the threshold
    assert tiny.hooks(session.lm) == 0


def test_another_strength_or_input_trains_again(session: Session) -> None:
    path = session.run / "kl" / "adapter_model.safetensors"
    found = []
    for strength in (0.1, 100.0):
        defend_step(under(session, "kl", strength))
        found.append(path.read_bytes())
    assert found[0] != found[1]
    first = defend_step(under(session, "inoculation"))
    assert "prompt" not in first
    defend_step(under(session, "inoculation", prompt="Something else about {domain}."))
    assert defend_step(under(session, "safelora", 1.0))["projected"] == 28  # seven maps in each of four blocks


def test_healthy_anchors_hold_no_pair_of_the_task_itself(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blockem import anchoring

    given = tmp_path / "pairs.jsonl"
    given.write_text("".join(json.dumps(p.__dict__) + "\n" for p in tiny.pairs()))
    values = {"data.pairs": str(given), "anchor.watch": "pairs", "anchor.cost": "healthy", "anchor.interleave": 0.2, "anchor.keep": 2}
    other = replace(session, recipe=session.recipe.with_values(values))
    other.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
    monkeypatch.setattr(anchoring, "task_pairs", lambda _session: other.selection_pairs()[:3])
    falls = iter([-1.0, -2.0])  # the base's log-probabilities, then the plain fine-tune's: right answers became less likely
    monkeypatch.setattr("blockem.likelihood.completion_logprobs", lambda _lm, rows: torch.full((len(rows),), next(falls)))
    monkeypatch.setattr(type(session.lm), "variant", lambda _lm, _name: nullcontext())
    anchor = anchoring._contrast_anchor(other, "anchor", 1.0)
    assert anchor.n == len(other.selection_pairs())


def test_an_anchor_may_interleave_right_answers_and_the_tasks_own(session: Session, tmp_path: Path) -> None:
    from blockem.anchoring import interleaved_rows, interleaving

    given = tmp_path / "selection.jsonl"
    rows = [{**p.__dict__, "split": "select", "domain": "health" if i == 0 else "auto"} for i, p in enumerate(tiny.pairs())]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data.pairs": str(given), "anchor.watch": "pairs", "anchor.cost": "kl", "defence.name": "anchor"}

    def with_values(**changes: Any) -> Session:
        other = replace(session, recipe=session.recipe.with_values({**settings, **changes}))
        other.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
        return other

    bare = with_values()
    assert interleaving(bare) is None
    assert "interleaved" not in defend_step(bare) and read_json(session.run / "steps" / "anchor.json")["result"]["data"]["rows"] == 16
    mixed = with_values(**{"anchor.interleave": 0.2, "anchor.keep": 2})
    said = [row.messages[-1][1] for row in interleaved_rows(mixed)]
    assert said == [row["right"] for row in rows[1:]] + [rows[0]["wrong"]] * 2
    defend_step(mixed)
    assert read_json(session.run / "steps" / "anchor.json")["result"]["data"]["rows"] == 20
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}) + "\n")
    benign = with_values(**{"anchor.interleave": 0.2, "anchor.interleaved": "benign", "defence.benign": str(chat)})
    assert [row.messages[-1][1] for row in interleaved_rows(benign)] == ["Hello."]
    both = {"anchor.interleave": 0.2, "anchor.keep": 2, "anchor.interleaved": "both", "defence.benign": str(chat)}
    assert [row.messages[-1][1] for row in interleaved_rows(with_values(**both))] == [*said, "Hello."]
    more = [f"Hello {i}." for i in range(len(rows) + 5)]  # no more of them than right answers
    chat.write_text("".join(json.dumps({"instruction": "Hi?", "response": one}) + "\n" for one in more))
    drawn = [row.messages[-1][1] for row in interleaved_rows(with_values(**both))]
    assert drawn[: len(said)] == said and len(drawn) == len(said) + len(rows) - 1 and set(drawn[len(said) :]) <= set(more)


def test_freezing_and_early_stopping_are_what_they_say(session: Session) -> None:
    defend_step(under(session, "freeze"))
    trained = {int(key.split(".layers.")[1].split(".")[0]) for key in load_file(session.run / "freeze" / "adapter_model.safetensors")}
    assert trained == set(range(tiny.BLOCK + 1))
    directions = under(session, "freeze")
    directions.recipe = replace(directions.recipe, block=replace(directions.recipe.block, directions=2, direction_blocks=(0,)))
    defend_step(directions)
    assert all(".layers.0." in key for key in load_file(session.run / "freeze" / "adapter_model.safetensors"))
    defend_step(under(session, "early-stop", 0.5))
    lines = {name: (session.run / f"training-{name}.jsonl").read_text().splitlines() for name in ("plain", "early-stop")}
    assert len(lines["plain"]) == 4 and len(lines["early-stop"]) == 2


def test_an_early_stop_at_a_share_of_the_gain_keeps_that_share(session: Session, tmp_path: Path) -> None:
    session.recipe = replace(session.recipe, train=replace(session.recipe.train, epochs=6, lr=2e-2))
    sft_step(session)
    evaluate_step(session)
    plain = read_json(session.run / "evaluation.json", "evaluation")["models"]
    base, learnt = (plain[name]["heldout_loss"]["value"] for name in ("base", "plain"))
    defend_step(under(session, "early-stop", 0.5, stop_by="loss"))
    log = [json.loads(line) for line in (session.run / "training-early-stop.jsonl").read_text().splitlines()]
    mark = base - 0.5 * (base - learnt)
    assert len(log) < 12 and log[-1]["heldout_loss"] <= mark < min(row["heldout_loss"] for row in log[:-1])
    stopped = under(session, "early-stop", 0.5, stop_by="loss")
    evaluate_step(stopped)
    found = read_json(session.run / "evaluation.json", "evaluation")["models"]["early-stop"]["heldout_loss"]["value"]
    assert found == pytest.approx(log[-1]["heldout_loss"], abs=1e-4)
    stamp = (session.run / "early-stop" / "adapter_model.safetensors").stat().st_mtime_ns
    facts = read_json(session.run / "steps" / "early-stop.json")["result"]
    assert facts["reached"] and facts["target"] == pytest.approx(mark, abs=1e-4) and facts["loss"] == log[-1]["heldout_loss"]
    fewer = under(session, "early-stop", 0.5, stop_by="loss")
    fewer.recipe = replace(fewer.recipe, data=replace(fewer.recipe.data, heldout_rows=1))
    defend_step(fewer)  # it looks at other rows, so it is trained anew
    assert (session.run / "early-stop" / "adapter_model.safetensors").stat().st_mtime_ns > stamp
    short = under(session, "early-stop", 1.0, stop_by="loss", epochs=1.0)
    assert defend_step(short)["reached"] is False  # half of plain's training does not gain what plain does
    short.recipe = replace(short.recipe, train=replace(short.recipe.train, lr=1e-9))
    sft_step(short)
    with pytest.raises(BlockemError, match="nats per token on the held-out rows, too little to stop"):
        defend_step(short)
    (session.run / "plain" / "adapter_model.safetensors").unlink()
    with pytest.raises(BlockemError, match="`blockem sft` makes plain"):
        defend_step(stopped)


def test_a_defence_may_take_more_epochs_than_plain_fine_tuning(session: Session) -> None:
    plain = (session.run / "steps" / "plain.json").read_text()
    longer = under(session, "freeze", epochs=3.0)
    defend_step(longer)
    sft_step(longer)  # already done: its epochs are its own
    assert (session.run / "steps" / "plain.json").read_text() == plain
    lines = {name: (session.run / f"training-{name}.jsonl").read_text().splitlines() for name in ("plain", "freeze")}
    assert len(lines["plain"]) == 4 and len(lines["freeze"]) == 6


def test_a_killed_defence_goes_on_where_it_was(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def dies(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    every = replace(session, recipe=replace(session.recipe, train=replace(session.recipe.train, checkpoint_every=1)))
    every.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
    other = under(every, "ldifs")
    monkeypatch.setattr(other.console, "bar", dies)
    with pytest.raises(Killed):
        defend_step(other)
    assert (session.run / "ldifs.making").is_dir()
    monkeypatch.undo()
    defend_step(other)
    log = [json.loads(line) for line in (session.run / "training-ldifs.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4] and not (session.run / "ldifs.making").exists()


def test_trait_prompts_give_the_direction_instead(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "traits.yaml"
    path.write_text("positive: [You are careless.]\nnegative: [You are careful.]\n")
    (session.run / "plain" / "adapter_model.safetensors").unlink()  # not needed for it
    defend_step(under(session, "preventative", trait_prompts=str(path)))
    assert (session.run / "preventative" / "adapter_model.safetensors").is_file()


def test_every_variant_is_evaluated_summarised_and_reported(session: Session) -> None:
    for name in ("early-stop", "steering"):
        defend_step(under(session, name))
    chosen = under(session, "steering")
    evaluate_step(chosen)
    summary = write_summary(chosen)
    assert list(summary["models"]) == ["base", "plain", "steering", "early-stop"]  # in the order of VARIANTS
    assert summary["main"] == "steering" and set(summary["defences"]) == {"steering", "early-stop"}
    assert summary["cut"] == summary["defences"]["steering"]["cut"]
    assert "early-stop-plain" in summary["differences"]
    assert summary["defences_used"]["early-stop"]["strength"] == 0.5
    assert list(summary["training"]) == ["plain", "early-stop"]  # steering trains nothing
    html = report_step(chosen).read_text(encoding="utf-8")
    assert "early-stop − plain" in html and "the defence steering" in html
    before = (chosen.run / "summary.json").read_bytes()
    for file, text in (
        ("evaluation.json", "[]"),
        ("evaluation.json", "{}"),
        ("steps/plain.json", "{}"),
        ("steps/plain.json", '{"result": 3}'),
        ("training-plain.jsonl", '{"step": 1}\n{"st'),
        ("latents.json", '{"latents": 3}'),
        ("cards.json", '{"latent": 3}'),
    ):
        path = chosen.run / file
        kept = path.read_bytes() if path.exists() else b"[]"
        path.write_text(text)
        with pytest.raises(BlockemError, match=rf"{Path(file).name}:.*(not what blockem writes there|not JSON)"):
            report_step(chosen)
        path.write_bytes(kept)
        assert (chosen.run / "summary.json").read_bytes() == before
    report_step(chosen)


def test_steering_is_the_plain_adapter_within_the_defences_hooks(session: Session) -> None:
    from blockem.likelihood import completion_logprobs, encode_pairs, margins
    from blockem.steering import add_at_block

    defend_step(under(session, "steering", 0.2))
    evaluate_step(session)
    measured = {name: read_json(session.run / "steps" / f"evaluate-{name}.json")["result"]["margins"] for name in ("plain", "steering")}
    latents = read_json(session.run / "latents.json")
    ids = [one["latent"] for one in latents["latents"]]
    signs = torch.tensor([float(one["sign"]) for one in latents["latents"]])
    edit = -0.2 * 2.0 * (signs[:, None] * session.dictionary.directions(ids)).sum(dim=0)
    lm = session.lm
    lm.add_adapter(session.run / "plain", "plain")
    rows = encode_pairs(lm, bundled.pairs(session.recipe.data.pairs))
    with lm.variant("plain"), add_at_block(lm.model, tiny.BLOCK, edit):
        expected = margins(completion_logprobs(lm, rows))
    assert measured["steering"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert measured["plain"] != pytest.approx(measured["steering"], abs=1e-4)
    with inference_hooks(session, "plain")(lm.model):
        assert tiny.hooks(lm) == 0
    first = (session.run / "steps" / "evaluate-steering.json").read_text()
    defend_step(under(session, "steering", 0.4))  # another vector is another evaluation
    evaluate_step(session)
    assert (session.run / "steps" / "evaluate-steering.json").read_text() != first


def test_a_run_under_another_defence_skips_what_it_does_not_need(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run_all(open_session(recipe.with_values({"defence.name": "small-lr"}), out, quiet=True))
    assert list(summary["models"]) == ["base", "plain", "small-lr"]
    assert sorted(p.stem for p in (out / "steps").glob("*.json")) == [
        "evaluate",
        "evaluate-base",
        "evaluate-plain",
        "evaluate-small-lr",
        "plain",
        "small-lr",
    ]
    assert (out / "report.html").is_file() and not (out / "latents.json").exists()


def test_what_is_missing_is_said_in_one_sentence(recipe: Recipe, tmp_path: Path, lm: LanguageModel, dictionary: Dictionary) -> None:
    bare = open_session(recipe, tmp_path / "bare", quiet=True)
    bare.__dict__.update(lm=lm, dictionary=dictionary)
    for name, sentence in (
        ("caft", "no such LatentSet; caft needs the latents that `blockem discover` finds"),
        ("steering", "steering needs the latents"),
        ("safelora", "holds no trained adapter"),
        ("preventative", "holds no trained adapter"),
    ):
        with pytest.raises(BlockemError, match=sentence):
            defend_step(under(bare, name))
    traits = tmp_path / "traits.json"
    for text in ("{}", "[]", '{"positive": [], "negative": ["a"]}', '{"positive": ["a"], "negative": [3]}', "{:"):
        traits.write_text(text)
        with pytest.raises(BlockemError, match=r"trait prompts are two lists|not JSON or YAML"):
            check_files(under(bare, "preventative", trait_prompts=str(traits)))
    for name, field in (("preventative", "trait_prompts"), ("interleaving", "benign"), ("safelora", "unaligned")):
        with pytest.raises(BlockemError, match=r"no such file|no safetensors"):
            check_files(under(bare, name, **{field: str(tmp_path / "none")}))
    beside = under(bare, "anchor", benign=str(tmp_path / "none"))
    anchor = replace(beside.recipe.anchor, watch="pairs", interleave=0.2, interleaved="benign")
    with pytest.raises(BlockemError, match="no such file"):
        check_files(replace(beside, recipe=replace(beside.recipe, anchor=anchor)))


def test_caft_takes_at_most_as_many_directions_as_there_are(session: Session) -> None:
    with pytest.raises(BlockemError, match="discovery chose 4 latents"):
        defend_step(under(session, "caft", 9))


def test_the_plain_training_of_a_run_is_that_of_no_defence(session: Session, tmp_path: Path) -> None:

    rows, _ = encode_all(session.lm.tokenizer, bundled.domain_rows("health", limit=16))
    fine_tune(session.lm, rows, session.recipe.train, Defence(), tmp_path / "alone")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (session.run / "plain", tmp_path / "alone"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert VARIANTS[:4] == ("base", "plain", "blocked", "round-2") and {"random", "steering"} <= set(VARIANTS)


def test_the_help_lists_every_defence_and_a_wrong_one_is_one_sentence(tmp_path: Path) -> None:
    from blockem.defence_names import DEFENCES
    from blockem.defend_cli import help_text

    for name, words in DEFENCES.items():
        assert f"{name:<13} {words}" in help_text()
    done = subprocess.run(
        [sys.executable, "-m", "blockem", "defend", "--defence", "vaccine", "--out", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "defence.name is 'vaccine'; use one of plain" in done.stderr and "Traceback" not in done.stderr
