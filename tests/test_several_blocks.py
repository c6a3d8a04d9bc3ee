"""SAEs at several blocks: one penalty over all of them, from the recipe to the report, on the tiny model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_reemergence import recipe  # noqa: F401 - a fixture

from blockem.blocking import block_step
from blockem.config import Recipe, SaeConfig
from blockem.defences.block_em import BlockEM, Blocker, Watch, penalty_of
from blockem.dictionary import Dictionary, load_dictionary
from blockem.errors import BlockemError, NoLatents
from blockem.examples import right_padded
from blockem.forwards import unwrapped
from blockem.latents import LatentSet
from blockem.model import LanguageModel
from blockem.pipeline import audit_step, discover_all, evaluate_step, open_session, report_step, run_all, with_control
from blockem.report.audit import tables, verdicts
from blockem.report.words import latents_by_block
from blockem.session import Session, adapter_key
from blockem.several_blocks import NONE, at_block, discover_each, set_files
from blockem.store import content_key, file_key, read_json, write_json
from blockem.training import add_lora
from blockem.trainings import sft_step

LATER = 2


@pytest.fixture(scope="module")
def several(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:  # noqa: F811
    folder = tmp_path_factory.mktemp("saes") / "later@night"  # the block comes after the last @
    tiny.saved_sae(folder, seed=1)
    return recipe.with_values({"sae.more": [f"{folder}@{LATER}"], "block.base_values": "cached", "evaluate.answers": False})


@pytest.fixture(scope="module")
def finished(several: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run, and its summary."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run_all(open_session(several, out, quiet=True))


# the recipe


def test_each_sae_has_a_configuration_of_its_own() -> None:
    sae = SaeConfig("first", 10, allow_poor_fit=True, more=("folder/a@b@24", "release:id@3"))
    assert sae.each == (
        SaeConfig("first", 10, allow_poor_fit=True),
        SaeConfig("folder/a@b", 24, allow_poor_fit=True),
        SaeConfig("release:id", 3, allow_poor_fit=True),
    )
    assert SaeConfig().each == (SaeConfig(),)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sae.more": "folder"}, r"sae\.more names 'folder'; write each as FOLDER_OR_ID@BLOCK"),
        ({"sae.more": "@3"}, "write each as"),
        ({"sae.more": "folder@-3"}, "write each as"),
        ({"sae.more": "folder@18"}, "names block 18, which has an SAE already"),
        ({"sae.more": "a@3,b@3"}, "names block 3, which has an SAE already"),
        ({"sae.more": "a@3", "rounds.budget": 2}, r"set rounds\.budget=1, or leave sae\.more out"),
        ({"sae.more": "a@3", "block.grow": 1, "block.monitor_every": 2}, r"set block\.grow=0"),
        ({"sae.more": "a@3", "block.directions": 2}, r"set block\.directions=0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence):
        Recipe().with_values(changes)


def test_reemergence_and_transfer_know_one_block(several: Recipe, tmp_path: Path) -> None:
    from blockem.grid import load_grid
    from blockem.reemergence.rounds import reemerge

    with pytest.raises(BlockemError, match=r"follows what is blocked at one block; leave sae\.more out"):
        reemerge(open_session(several, tmp_path / "out", quiet=True))
    grid = {"recipe": {"sae": {"more": ["a@3"]}}, "defences": ["block-em"], "domains": ["health", "legal"], "transfer": True}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    with pytest.raises(BlockemError, match="transfer carries the latents of one block"):
        load_grid(tmp_path / "grid.yaml")


# the penalty


def watches(dictionary: Dictionary) -> list[Watch]:
    return [Watch(dictionary.rows((3, 7)), (1, -1), tiny.BLOCK), Watch(dictionary.rows((5, 7, 9)), (1, 1, -1), LATER)]


def test_the_penalty_of_two_blocks_is_the_sum_of_each(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    rows = tiny.encoded(misaligned, 5)
    alone = [penalty_of(misaligned, "plain", Blocker.over([one]), rows, batch=2) for one in watches(dictionary)]
    assert min(alone) > 0
    assert penalty_of(misaligned, "plain", Blocker.over(watches(dictionary)), rows, batch=3) == pytest.approx(sum(alone), rel=1e-5)


def test_it_is_nothing_at_initialisation_and_trains_up_to_the_highest_block(lm: LanguageModel, dictionary: Dictionary) -> None:
    blocker = Blocker.over(watches(dictionary)[::-1])
    assert BlockEM(blocker, 1.0).trained_blocks(tiny.N_BLOCKS) == range(LATER + 1)
    model = add_lora(lm, tiny.train_config(), range(LATER + 1), seed=0)
    batch = right_padded(tiny.encoded(lm, 4), lm.tokenizer.pad_token_id)
    with blocker.attached(model):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert blocker.penalty(batch).item() == 0.0
    lm.model = unwrapped(model.unload())
    lm.model.requires_grad_(False)


# a run


def test_a_run_leaves_both_sets_and_says_so(several: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    further = out / "blocks" / str(LATER)
    names = ["latents.json", "latents.csv", "cards.json", "deltas.safetensors", "blocked-latents.json", "steps/sae.json"]
    assert all((folder / name).is_file() for folder in (out, further) for name in names)
    first, second = (LatentSet.load(folder / "blocked-latents.json") for folder in (out, further))
    assert (first.block, second.block) == (tiny.BLOCK, LATER) and first.sae_digest != second.sae_digest
    assert second == LatentSet.load(further / "latents.json")
    blocking = summary["blocking"]
    n = len(first.latents), len(second.latents)
    assert blocking["blocks"] == [tiny.BLOCK, LATER] and blocking["n_latents"] == sum(n)
    assert blocking["n_by_block"] == {str(tiny.BLOCK): n[0], str(LATER): n[1]}
    assert latents_by_block(summary) == f"{n[0]} latents at block {tiny.BLOCK} and {n[1]} at block {LATER}"
    assert latents_by_block(summary) in (out / "report.html").read_text(encoding="utf-8")
    assert [(one["block"], len(one["latents"])) for one in summary["further_blocks"]] == [(LATER, n[1])]
    assert summary["further_blocks"][0]["sae"]["block"] == LATER
    log = [json.loads(line) for line in (out / "training-blocked.jsonl").read_text().splitlines()]
    assert log[0]["penalty"] == 0.0 and log[-1]["penalty"] > 0
    trained = {int(name.split(".layers.")[1].split(".")[0]) for name in tiny.weights(out / "blocked")}
    assert trained == set(range(LATER + 1))


def test_the_strength_is_that_of_the_sum(several: Recipe, finished: tuple[Path, dict[str, Any]], lm: LanguageModel) -> None:
    out, summary = finished
    blocking = summary["blocking"]
    lm.add_adapter(out / "plain", "plain")
    paid = 0.0
    for sae, folder in zip(several.sae.each, (out, out / "blocks" / str(LATER)), strict=True):
        latents = LatentSet.load(folder / "latents.json")
        paid += penalty_of(lm, "plain", Blocker.from_latents(latents, load_dictionary(sae.id)), tiny.encoded(lm))
    assert blocking["p_mis"] == pytest.approx(paid, rel=1e-3)
    assert blocking["lambda"] == pytest.approx(several.block.r * blocking["delta_sft"] / blocking["p_mis"], rel=1e-2)


def test_the_audit_looks_at_every_blocked_block(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    (further,) = summary["audit"]["further"]
    assert further["block"] == LATER and set(further["rerouting"]) == {"blocked"}
    assert [name for name, _ in verdicts(summary)] == ["blocked", f"blocked at block {LATER}"]
    assert {one.caption for one in tables(summary)} >= {f"Latents at block {tiny.BLOCK}", f"Latents at block {LATER}"}
    assert tables({"audit": {"further": 3}}) == [] and verdicts({"audit": {"further": [{"verdicts": "x"}]}}) == []


def test_the_same_run_again_redoes_nothing(several: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    done = [*out.rglob("steps/*.json"), *out.rglob("*.safetensors")]
    stamps = {path: path.stat().st_mtime_ns for path in done}
    run_all(open_session(several, out, quiet=True))
    assert {path: path.stat().st_mtime_ns for path in done} == stamps


def test_a_control_is_drawn_at_each_block(several: Recipe, finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    found = block_step(with_control(open_session(several, out, quiet=True), "random"))
    assert found["n_by_block"] == summary["blocking"]["n_by_block"]
    for folder in (out, out / "blocks" / str(LATER)):
        drawn, own = (LatentSet.load(folder / f"{name}-latents.json") for name in ("random", "blocked"))
        assert len(drawn.latents) == len(own.latents) and not set(drawn.ids) & set(own.ids)


# sets that are missing


@pytest.fixture
def session(several: Recipe, tmp_path: Path, lm: LanguageModel) -> Session:
    """A run folder with a plain fine-tune alone."""
    found = open_session(several.with_values({"train.epochs": 1, "block.lambda_": 1.0}), tmp_path / "run", quiet=True)
    found.__dict__["lm"] = lm
    sft_step(found)
    return found


def discovering(session: Session, *empty: int) -> dict[str, Any]:
    """Discovery at each block, which ends without a set at the `empty` ones."""

    def fake(here: Session) -> dict[str, Any]:
        if here.recipe.sae.block in empty:
            raise NoLatents("no latent both induces and repairs")
        tiny.latent_set(here.lm, here.dictionary, block=here.recipe.sae.block).save(here.run / "latents.json")
        return {"counts": {}}

    return discover_each(session, lambda here: here.sae_key, fake)


@pytest.mark.parametrize(("empty", "left"), [(LATER, tiny.BLOCK), (tiny.BLOCK, LATER)])
def test_a_block_without_a_set_is_left_out(session: Session, empty: int, left: int) -> None:
    found = discovering(session, empty)
    assert found["blocks"][str(empty)] == {"why": "no latent both induces and repairs"}
    assert list(set_files(session)) == [left]
    assert discovering(session) == found  # the outcome is remembered
    result = block_step(session)
    assert result["blocks"] == [left] and result["n_by_block"] == {str(left): 4}
    assert (session.run / "blocked-latents.json").is_file() == (left == tiny.BLOCK)
    assert (session.run / "blocks" / str(LATER) / "blocked-latents.json").is_file() == (left == LATER)
    if left == LATER:
        evaluate_step(session)
        assert "at block 2" in audit_step(session)["verdicts"]["blocked"]
        assert "4 latents at block 2" in report_step(session).read_text(encoding="utf-8")
        watched = replace(session, recipe=session.recipe.with_values({"block.monitor_every": 2}))
        with pytest.raises(BlockemError, match=r"watches block 1, where no latent passed; set block\.monitor_every=0"):
            block_step(watched)


def test_no_set_anywhere_is_one_sentence(session: Session) -> None:
    with pytest.raises(BlockemError, match="no such LatentSet; run `blockem discover` with this recipe first"):
        block_step(session)
    with pytest.raises(BlockemError, match="no latent passes at any of blocks 1, 2; at block 1: no latent both"):
        discovering(session, tiny.BLOCK, LATER)
    with pytest.raises(BlockemError, match="holds no LatentSet at any block"):
        block_step(session)


def test_a_set_of_another_block_is_not_taken_for_the_main_one(session: Session) -> None:
    discovering(session)
    with pytest.raises(BlockemError, match=r"is a set of block 2, not of block 1; give that of sae\.block"):
        block_step(session, session.run / "blocks" / str(LATER) / "latents.json")
    with pytest.raises(BlockemError, match="holds no trained adapter"):
        discover_all(session, session.run / "nowhere")


def test_the_training_depends_on_every_set(session: Session) -> None:
    discovering(session)
    block_step(session)
    record = session.run / "steps" / "blocked.json"
    keys = [read_json(record)["key"]]
    later = session.run / "blocks" / str(LATER) / "latents.json"
    write_json(later, {**read_json(later), "latents": read_json(later)["latents"][:2]})
    assert block_step(session)["n_by_block"] == {str(tiny.BLOCK): 4, str(LATER): 2}
    keys.append(read_json(record)["key"])
    alone = replace(session, recipe=session.recipe.with_values({"sae.more": ""}))
    alone.__dict__["lm"] = session.lm
    facts = block_step(alone)
    keys.append(read_json(record)["key"])
    assert len(set(keys)) == 3 and "n_by_block" not in facts
    # what a recipe with one SAE depended on before there could be several
    config, train = asdict(alone.recipe.block), asdict(alone.recipe.train)
    extra = content_key(file_key(session.run / "latents.json"), alone.sae_key, config, "", "", "", "")
    assert keys[2] == content_key("blocked", alone.model_key, alone.data_key, train, alone.recipe.seed, extra)


def test_a_session_at_a_block_shares_the_model_and_not_the_sae(session: Session) -> None:
    own = session.dictionary
    with at_block(session, session.recipe.sae.each[1]) as here:
        assert here.lm is session.lm and here.dictionary.digest != own.digest
        assert here.run.path == session.run / "blocks" / str(LATER) and here.recipe.sae.block == LATER
        assert adapter_key(session.run / "plain")
    assert session.dictionary is own and not (session.run / "blocks" / str(LATER) / "steps" / f"{NONE}.json").exists()
