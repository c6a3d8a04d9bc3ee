"""The re-emergence toolkit: patching against one row at a time, epochs that resume, drift, the union, and the verdicts' rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from blockem.checkpoints import epoch_folder
from blockem.config import Recipe
from blockem.defences.block_em import BlockEM, Blocker, penalty_of
from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary, measure_fit
from blockem.errors import BlockemError
from blockem.evaluation import Interval
from blockem.examples import encode, template_ids
from blockem.forwards import block_output, blocks, capture
from blockem.generation import generate
from blockem.latents import Latent, LatentSet
from blockem.likelihood import completion_logprobs, encode_pairs
from blockem.model import LanguageModel
from blockem.reemergence import rounds
from blockem.reemergence.decoding import Decoding, decode_all
from blockem.reemergence.drift import codes, compare
from blockem.reemergence.epochs import adapters, bounded_prompts, penalty_shares
from blockem.reemergence.patching import decode_patched, patch_prompts, patched_logprobs, replace_at_block, summarise
from blockem.reemergence.verdict import NOT_SUPPORTED, SUPPORTED, UNCLEAR, Evidence, reemergence, retraining, weigh
from blockem.report.reemergence import reemergence_page, render_reemergence
from blockem.training import fine_tune

EVERY = list(range(tiny.N_BLOCKS))


def directly(lm: LanguageModel, ids: list[int], prompt: int, source: str, target: str, block: int) -> Tensor:
    """Logits `[tokens, vocabulary]` of one row without padding, its prompt patched at one block by a hook written out."""
    given: list[Tensor] = []
    listed = blocks(lm.model)[block]
    tokens = torch.tensor([ids], device=lm.device)
    handle = listed.register_forward_hook(lambda _m, _i, output: given.append(block_output(output).clone()))
    try:
        with torch.inference_mode(), lm.variant(source):
            lm.model(input_ids=tokens)
    finally:
        handle.remove()

    def patch(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = torch.cat([given[0][:, :prompt], block_output(output)[:, prompt:]], dim=1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = listed.register_forward_hook(patch)
    try:
        with torch.inference_mode(), lm.variant(target):
            found: Tensor = lm.model(input_ids=tokens).logits[0]
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize(("source", "target"), [("base", "plain"), ("plain", "base")])
def test_prompts_are_patched_as_one_row_at_a_time_would_be(misaligned: LanguageModel, source: str, target: str) -> None:
    lm = misaligned
    rows = encode_pairs(lm, tiny.pairs())
    found = patched_logprobs(lm, rows, source, target, EVERY, batch=5)
    assert found.shape == (tiny.N_BLOCKS + 1, len(rows))
    for i, row in enumerate(rows[:5]):
        places = [j for j, supervised in enumerate(row.supervised) if supervised]
        for block in EVERY:
            logprobs = directly(lm, list(row.ids), places[0], source, target, block).log_softmax(dim=-1)
            expected = torch.stack([logprobs[j - 1, row.ids[j]] for j in places]).mean()
            assert float(found[block, i]) == pytest.approx(float(expected), abs=1e-4)
    assert tiny.hooks(lm) == 0


def test_a_model_patched_with_itself_is_itself(misaligned: LanguageModel) -> None:
    rows = encode_pairs(misaligned, tiny.pairs())
    for name in ("base", "plain"):
        with misaligned.variant(name):
            own = completion_logprobs(misaligned, rows)
        for patched in patched_logprobs(misaligned, rows, name, name, EVERY):
            assert torch.allclose(patched, own, atol=1e-4)


def test_patching_all_blocks_differs_from_one_and_batches_do_not_matter(misaligned: LanguageModel) -> None:
    rows = encode_pairs(misaligned, tiny.pairs())
    one, many = (patched_logprobs(misaligned, rows, "base", "plain", [1, 2], batch) for batch in (1, 12))
    assert torch.allclose(one, many, atol=1e-4)
    assert not torch.allclose(one[-1], one[0], atol=1e-3)


def test_the_last_block_matters_only_where_the_answer_begins(misaligned: LanguageModel) -> None:
    """Nothing attends to the last block's outputs, so only the first answer token, which the prompt's last one predicts, can move."""
    lm = misaligned
    row = encode(lm.tokenizer, tiny.rows()[0])
    first = row.supervised.index(True)
    last = directly(lm, list(row.ids), first, "base", "plain", tiny.N_BLOCKS - 1)
    with torch.inference_mode(), lm.variant("plain"):
        own = lm.model(input_ids=torch.tensor([row.ids])).logits[0]
    assert torch.allclose(last[first:], own[first:], atol=1e-4)
    assert not torch.allclose(last[first - 1], own[first - 1], atol=1e-4)


def test_patch_prompts_puts_the_figures_where_they_belong(misaligned: LanguageModel) -> None:
    found = patch_prompts(misaligned, tiny.pairs(), "plain", tiny.BLOCK, EVERY, resamples=200)
    assert [one.block for one in found.blocks] == EVERY and found.every.block == -1 and found.pairs == 6
    assert found.gap is not None and found.upstream is not None and found.downstream is not None and found.difference is not None
    assert found.difference.value == pytest.approx(found.upstream.value - found.downstream.value)
    values = [one.repaired.value for one in found.blocks if one.repaired]
    assert found.upstream.value == pytest.approx(np.mean(values[: tiny.BLOCK + 1]))
    json.dumps(found.to_dict())


def test_shares_of_the_gap_are_what_they_say() -> None:
    base, model = np.zeros(8), np.ones(8)
    found = summarise(base, model, np.array([base, model - 0.25, base]), np.array([base + 0.5, base, model]), [0, 3], 1, 200)
    first, second = found.blocks
    assert first.repaired == Interval(1, 1, 1, 8) and first.induced == Interval(0.5, 0.5, 0.5, 8)
    assert second.repaired == Interval(0.25, 0.25, 0.25, 8) and found.every.induced == Interval(1, 1, 1, 8)
    assert found.upstream == Interval(1, 1, 1, 8) and found.difference == Interval(0.75, 0.75, 0.75, 8)
    assert summarise(base, model, np.array([base, base]), np.array([base, base]), [0], 1, 200).downstream is None


def test_a_patch_that_does_not_fit_is_refused_and_leaves_no_hook(lm: LanguageModel) -> None:
    ids = torch.arange(5, 11)[None]
    with pytest.raises(ValueError, match="do not fit"), replace_at_block(lm.model, 1, torch.zeros(1, 3, tiny.D_MODEL), torch.ones(1, 3)):
        lm.model(input_ids=ids)
    assert tiny.hooks(lm) == 0


def prompt_ids(lm: LanguageModel) -> list[list[int]]:
    return [template_ids(lm.tokenizer, [{"role": "user", "content": one.prompt}], generation_prompt=True) for one in tiny.prompts()]


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize(("source", "target"), [("base", "plain"), ("plain", "base")])
def test_decoding_is_patched_as_one_step_at_a_time_would_be(misaligned: LanguageModel, source: str, target: str, positions: str) -> None:
    lm, block = misaligned, 2
    prompts = prompt_ids(lm)
    found = decode_patched(lm, prompts, source, target, block, positions, max_new_tokens=4, batch=3)
    for prompt, new in zip(prompts, found, strict=True):
        context = list(prompt)
        for token in new:
            if positions == "all":
                logits = directly(lm, context, len(context), source, target, block)[-1]
            else:  # the last position alone: seen from its own place, the others are the target's
                logits = _last_only(lm, context, source, target, block)
            assert token == int(logits.argmax())
            context.append(token)


def _last_only(lm: LanguageModel, ids: list[int], source: str, target: str, block: int) -> Tensor:
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        with lm.variant(source), capture(blocks(lm.model)[block]) as seen:
            lm.model(input_ids=tokens)
        where = torch.zeros(1, len(ids), dtype=torch.bool)
        where[0, -1] = True
        with lm.variant(target), replace_at_block(lm.model, block, seen[0], where):
            found: Tensor = lm.model(input_ids=tokens).logits[0, -1]
    return found


def test_decoding_patched_with_itself_is_greedy_decoding(misaligned: LanguageModel) -> None:
    lm = misaligned
    new = decode_patched(lm, prompt_ids(lm), "plain", "plain", 1, max_new_tokens=6)
    with lm.variant("plain"):
        expected = generate(lm, [one.prompt for one in tiny.prompts()], 6)
    assert [lm.tokenizer.decode(one, skip_special_tokens=True).strip() for one in new] == expected
    with pytest.raises(ValueError, match="use last or all"):
        decode_patched(lm, prompt_ids(lm), "base", "plain", 1, "first")


def test_every_condition_is_decoded_and_counted(misaligned: LanguageModel) -> None:
    asked = [one.prompt for one in tiny.prompts()]
    table, rows = decode_all(misaligned, asked, "plain", Decoding((1, 2), "all", 3))
    assert [(one["target"], one["block"]) for one in table] == [
        ("base", None),
        ("plain", None),
        ("plain", 1),
        ("plain", 2),
        ("base", 1),
        ("base", 2),
    ]
    assert [one["changed"] for one in table[:2]] == [0, 0]
    assert len(rows) == len(asked) and all(len(row["answers"]) == 6 for row in rows)


# epochs


class Killed(Exception):
    pass


def block_em(lm: LanguageModel, dictionary: Dictionary) -> BlockEM:
    return BlockEM(Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary), 10.0, p_mis=1.0)


@pytest.mark.parametrize("killed_at", [1, 4, 5, 12])
@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_epochs_that_were_killed_and_resumed_equal_uninterrupted_ones(
    lm: LanguageModel, dictionary: Dictionary, tmp_path: Path, killed_at: int, checkpoint_every: int
) -> None:
    # 16 rows in batches of 4: three epochs of four steps
    config = tiny.train_config(batch_size=4, micro_batch=4, epochs=3, checkpoint_every=checkpoint_every)
    rows = tiny.encoded(lm)
    fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "whole", keep_epochs=True)

    def kill(step: int, _total: int) -> None:
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "killed", progress=kill, keep_epochs=True)
    fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "killed", keep_epochs=True)
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["epoch-1", "epoch-2", "epoch-3"]
    for epoch in (1, 2, 3):
        whole, killed = (tiny.weights(epoch_folder(tmp_path / name, epoch)) for name in ("whole", "killed"))
        assert all(torch.equal(whole[name], killed[name]) for name in whole)
    last, final = tiny.weights(epoch_folder(tmp_path / "whole", 3)), tiny.weights(tmp_path / "whole")
    assert all(torch.equal(last[name], final[name]) for name in final)
    first = tiny.weights(epoch_folder(tmp_path / "whole", 1))
    assert any(not torch.equal(first[name], final[name]) for name in final)


def test_keeping_epochs_changes_nothing_else_and_needs_whole_ones(lm: LanguageModel, tmp_path: Path) -> None:
    config = tiny.train_config(batch_size=8, epochs=2)
    rows = tiny.encoded(lm)
    fine_tune(lm, rows, config, Defence(), tmp_path / "kept", keep_epochs=True)
    fine_tune(lm, rows, config, Defence(), tmp_path / "alone")
    assert (tmp_path / "kept" / "adapter_model.safetensors").read_bytes() == (tmp_path / "alone" / "adapter_model.safetensors").read_bytes()
    assert not (tmp_path / "alone" / "epoch-1").exists()
    with pytest.raises(BlockemError, match="whole number"):
        fine_tune(lm, rows, replace(config, epochs=1.5), Defence(), tmp_path / "half", keep_epochs=True)


def test_each_epoch_pays_its_share_of_the_penalty(lm: LanguageModel, dictionary: Dictionary, plain_adapter: Path) -> None:
    blocker = Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary)
    rows = tiny.encoded(lm, 6)
    lm.add_adapter(plain_adapter, "plain")
    p_mis = penalty_of(lm, "plain", blocker, rows)
    lm.drop_adapters()
    assert penalty_shares(lm, blocker, {"epoch1": plain_adapter}, rows, p_mis) == {"epoch1": pytest.approx(1.0)}
    assert penalty_shares(lm, blocker, {"epoch1": plain_adapter}, rows, 0.0) == {"epoch1": None}


# drift


def test_drift_is_the_fit_of_the_dictionary_on_the_same_tokens(misaligned: LanguageModel, dictionary: Dictionary) -> None:
    lm, rows = misaligned, tiny.encoded(misaligned)
    base = codes(lm, dictionary, tiny.BLOCK, rows, "base", batch=5)
    kept = []
    with torch.inference_mode(), lm.variant("base"):
        for row in rows:
            with capture(blocks(lm.model)[tiny.BLOCK]) as seen:
                lm.model(input_ids=torch.tensor([row.ids]))
            kept.append(seen[0][0][torch.tensor(row.supervised)])
    fit = measure_fit(dictionary, torch.cat(kept))
    own = compare(base, resamples=200)
    assert own.variance_explained is not None and own.fall is None
    assert own.variance_explained.value == pytest.approx(fit.variance_explained, abs=1e-4)
    assert (own.dead_share, own.mean_active, own.tokens) == (pytest.approx(fit.dead_share), pytest.approx(fit.mean_active), fit.tokens)
    assert own.cosine == pytest.approx(1)
    moved = compare(base, codes(lm, dictionary, tiny.BLOCK, rows, "plain", batch=5), 200)
    assert moved.fall is not None and moved.variance_explained is not None and moved.cosine < 1
    assert moved.fall.value == pytest.approx(own.variance_explained.value - moved.variance_explained.value)


# the union


def test_a_union_keeps_the_first_set_and_adds_what_is_new(lm: LanguageModel, dictionary: Dictionary) -> None:
    first = tiny.latent_set(lm, dictionary, (3, 7, 11))
    second = replace(first, latents=(Latent(20, -1, 0.5), Latent(7, 1), Latent(11, 1)), norm=9.0)
    union = first.union(second)
    assert union.ids == [3, 7, 11, 20] and union.signs == [1, -1, 1, -1]
    assert union.latents[3].delta == 0.5 and union.norm == first.norm
    assert union.provenance["added"] == 1 and union.provenance["conflicts"] == [7]
    assert first.union(first).latents == first.latents
    union.check(lm, dictionary)


@pytest.mark.parametrize("change", [{"model": "other", "revision": "main"}, {"revision": "x"}, {"sae_digest": "x"}, {"block": 2}])
def test_sets_of_different_things_do_not_unite(lm: LanguageModel, dictionary: Dictionary, change: dict[str, Any]) -> None:
    first = tiny.latent_set(lm, dictionary)
    with pytest.raises(BlockemError, match="the same model, SAE and block, but their " + next(iter(change))):
        first.union(replace(first, **change))


# verdicts


def around(value: float, half: float = 0.01) -> Interval:
    return Interval(value, value - half, value + half, 50)


REROUTED = Evidence(
    gap=around(0.2),
    fall=around(0.01),
    cosine=0.99,
    upstream=around(0.6),
    downstream=around(0.1),
    difference=around(0.5),
    held=0.97,
    off_k=0.9,
    here=0.8,
    last=0.8,
    frozen=False,
    block=18,
    after=11,
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (NOT_SUPPORTED, SUPPORTED, NOT_SUPPORTED)),
        ({"gap": around(0.0)}, (UNCLEAR, UNCLEAR, UNCLEAR)),
        ({"gap": None}, (UNCLEAR, UNCLEAR, UNCLEAR)),
        ({"fall": around(0.2)}, (SUPPORTED, SUPPORTED, NOT_SUPPORTED)),
        ({"cosine": 0.5}, (SUPPORTED, SUPPORTED, NOT_SUPPORTED)),
        ({"fall": around(0.05)}, (UNCLEAR, SUPPORTED, NOT_SUPPORTED)),
        ({"fall": None}, (UNCLEAR, SUPPORTED, NOT_SUPPORTED)),
        ({"held": 0.1}, (NOT_SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED)),
        ({"off_k": 0.1}, (NOT_SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED)),
        ({"held": None}, (NOT_SUPPORTED, UNCLEAR, NOT_SUPPORTED)),
        ({"difference": around(-0.5)}, (NOT_SUPPORTED, NOT_SUPPORTED, SUPPORTED)),
        ({"difference": around(0.0)}, (NOT_SUPPORTED, UNCLEAR, UNCLEAR)),
        ({"difference": around(0.0), "last": 1.2}, (NOT_SUPPORTED, UNCLEAR, SUPPORTED)),
        ({"last": 1.2}, (NOT_SUPPORTED, SUPPORTED, UNCLEAR)),
        ({"difference": around(-0.5), "frozen": True}, (NOT_SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED)),
        ({"difference": around(-0.5), "downstream": around(0.0)}, (NOT_SUPPORTED, NOT_SUPPORTED, UNCLEAR)),
        ({"difference": None, "downstream": None, "last": None, "after": 0}, (NOT_SUPPORTED, UNCLEAR, NOT_SUPPORTED)),
        ({"upstream": None, "downstream": None, "difference": None}, (NOT_SUPPORTED, UNCLEAR, UNCLEAR)),
    ],
)
def test_the_verdicts_follow_their_rules(change: dict[str, Any], expected: tuple[str, str, str]) -> None:
    found = weigh(replace(REROUTED, **change))
    assert [one.name for one in found] == ["H1", "H2", "H3"]
    assert tuple(one.verdict for one in found) == expected
    assert all(one.why for one in found)


def test_each_verdict_carries_its_number() -> None:
    drifted, same, later = weigh(REROUTED)
    assert "1.0 [0.0, 2.0] points less" in drifted.why and "0.990" in drifted.why
    assert "97%" in same.why and "90%" in same.why and "60 [59, 61]" in same.why
    assert "10 [9, 11]" in later.why
    assert "0 of them" in weigh(replace(REROUTED, frozen=True))[2].why


def test_the_sentences_follow_their_intervals() -> None:
    assert reemergence(around(0.1), 5).startswith("misalignment comes back")
    assert reemergence(around(-0.1), 5).startswith("misalignment does not come back")
    assert reemergence(around(0.0), 5).startswith("it cannot be told")
    assert "set reemerge.epochs to 2" in reemergence(None, 1)
    assert retraining(around(-0.1), 4).endswith("less comes back") and retraining(around(0.0), 4).endswith("no clear change")
    assert rounds.strict({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}


def test_the_recipe_refuses_what_cannot_be_run() -> None:
    for change, sentence in (
        ({"reemerge.epochs": 0}, "reemerge.epochs is 0; it must be positive"),
        ({"reemerge.decode_positions": "first"}, "use last or all"),
        ({"reemerge.decode_prompts": -1}, "use 0 for none"),
    ):
        with pytest.raises(BlockemError, match=sentence):
            Recipe().with_values(change)


# the whole


@pytest.fixture(scope="module")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    tiny.saved_sae(folder / "sae")
    data = [{"messages": one.chat(), "domain": "health"} for one in tiny.rows()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    pairs = [{**one.__dict__, "split": "select" if i < 3 else "eval"} for i, one in enumerate(tiny.pairs())]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    for name, some in (("final", tiny.prompts()[:3]), ("selecting", tiny.prompts()[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one.__dict__) + "\n" for one in some), encoding="utf-8")
    rows = str(folder / "rows.jsonl")
    quick = {name: value for name, value in tiny.train_config().__dict__.items() if name != "lora_targets"}
    return Recipe().with_values(
        {
            "model.id": str(tiny_folder),
            "model.dtype": "float32",
            "model.device": "cpu",
            "data.train": rows,
            "data.heldout": rows,
            "data.general": rows,
            "data.pairs": str(folder / "pairs.jsonl"),
            "data.prompts": str(folder / "final.jsonl"),
            "data.selection_prompts": str(folder / "selecting.jsonl"),
            "sae.id": str(folder / "sae"),
            "sae.block": tiny.BLOCK,
            "sae.allow_poor_fit": True,
            **{f"train.{name}": value for name, value in quick.items()},
            "train.epochs": 4,
            "block.base_values": "online",
            "discover.pool": 20,
            "discover.prescreen": 12,
            "discover.keep": 6,
            "discover.size": 3,
            "discover.budget": 1.0,
            "evaluate.max_new_tokens": 4,
            "evaluate.resamples": 100,
            "evaluate.judge": "none",
            "reemerge.epochs": 2,
            "reemerge.prompts": 3,
            "reemerge.decode_prompts": 2,
            "reemerge.decode_tokens": 3,
        }
    )


def run(recipe: Recipe, out: Path, source: Path | None = None, retrain: bool = True) -> dict[str, Any]:
    from blockem.pipeline import open_session

    return rounds.reemerge(open_session(recipe, out, quiet=True), source, retrain)


def test_the_whole_command_from_a_recipe_and_again(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = run(recipe, out)
    assert json.loads((out / "reemergence.json").read_text(), parse_constant=lambda name: pytest.fail(name)) == found
    names = [row["model"] for row in found["models"]]
    assert names[:4] == ["base", "plain", "epoch1", "epoch2"]
    assert {one["name"] for one in found["hypotheses"]} == {"H1", "H2", "H3"}
    assert set(found["drift"]) == {"base", "plain", "epoch1", "epoch2"} and len(found["patching"]["reemerged"]["blocks"]) == tiny.N_BLOCKS
    union = found["union"]
    assert "why" in union or names[4:] == ["union1", "union2"]
    if "why" not in union:
        first, second = (LatentSet.load(path) for path in (out / "latents.json", out / "again" / "latents.json"))
        assert LatentSet.load(out / "again" / "union.json").ids == first.union(second).ids
    page = (out / "reemergence.html").read_text()
    assert "H2" in page and "<svg" in page
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    steps = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    assert run(recipe, out) == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps
    assert {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()} == steps
    assert list(adapters(out, 2, "epoch")) == ["epoch1", "epoch2"]


def test_from_a_run_folder_that_stays_as_it_is(recipe: Recipe, tmp_path: Path) -> None:
    from blockem.pipeline import discover_step, open_session, start_run
    from blockem.trainings import sft_step

    source = tmp_path / "run"
    session = open_session(recipe, source, quiet=True)
    with session.run.locked():
        start_run(session)
        with pytest.raises(BlockemError, match="holds no trained adapter"):
            run(recipe, tmp_path / "out", source)
        sft_step(session)
        with pytest.raises(BlockemError, match=r"no latents\.json; run `blockem discover`"):
            run(recipe, tmp_path / "out", source)
        discover_step(session)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    found = run(recipe, tmp_path / "out", source, retrain=False)
    assert found["union"] is None and not (tmp_path / "out" / "again").exists()
    assert not (tmp_path / "out" / "plain").exists()
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    with pytest.raises(BlockemError, match="choose another --out"):
        run(recipe, source, source)
    with pytest.raises(BlockemError, match=r"set block\.directions=0"):
        run(recipe.with_values({"block.directions": 2}), tmp_path / "other", source)
    with pytest.raises(BlockemError, match=r"reemerge\.patch_blocks names block 9"):
        run(recipe.with_values({"reemerge.patch_blocks": "1,9"}), tmp_path / "other", source)


def test_prompts_are_bounded_and_lie_outside_the_domain(recipe: Recipe, tmp_path: Path) -> None:
    from blockem.pipeline import open_session

    assert len(bounded_prompts(open_session(recipe, tmp_path), 2)) == 2
    with pytest.raises(BlockemError, match="every final prompt lies in the training domain"):
        bounded_prompts(open_session(recipe.with_values({"data.domain": "finance"}), tmp_path), 2)


def test_the_page_escapes_what_models_wrote_and_does_without_figures(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    row = {"prompt": nasty, "answers": {f"base {nasty}": nasty}}
    found = {"blockem": "0", "models": [], "said": nasty, "training_domain": nasty, "hypotheses": [{"name": nasty, "why": nasty}]}
    page = reemergence_page(found, [row])
    assert nasty not in page and "&lt;script&gt;" in page
    for broken in (
        {"blockem": "0", "models": []},
        {
            "blockem": "0",
            "models": [{"model": "epoch1", "margin": "x"}],
            "patching": 3,
            "drift": {"base": None},
            "decoding": "x",
            "union": 3,
        },
        {"blockem": "0", "models": [{"model": "epoch1", "margin": {"value": 1.0}, "penalty_share": 0.0}], "union": {"why": "nothing"}},
    ):
        assert "<!doctype html>" in reemergence_page(broken)
    (tmp_path / "reemergence.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BlockemError, match="not what blockem reemerge writes"):
        render_reemergence(tmp_path)
