"""Each defence that is no penalty: what it does, against its formula written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from blockem.bundled import general_chat
from blockem.config_training import STRENGTHS, DefenceConfig
from blockem.defence_names import DEFENCES, RANGES, WITHOUT_STRENGTH, folder_of
from blockem.defences.caft import CAFT, ablated, basis
from blockem.defences.defence import Defence
from blockem.defences.early_stop import EarlyStop, early_stop
from blockem.defences.freeze import Freeze
from blockem.defences.inoculation import Inoculation
from blockem.defences.interleaving import Interleaving
from blockem.defences.preventative import Preventative, shift_vector, trait_vector
from blockem.defences.safelora import SafeLoRA, model_alignment, plain_alignment, read_lora, similarity
from blockem.defences.small_lr import small_lr
from blockem.defences.steering import Steering, steering_vector
from blockem.defences.together import Together
from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.examples import Example, encode, right_padded
from blockem.forwards import hidden_at
from blockem.generation import generate
from blockem.latents import Latent, LatentSet
from blockem.likelihood import loss_per_token
from blockem.model import LanguageModel
from blockem.states import supervised_states
from blockem.training import fine_tune


def hidden(lm: LanguageModel, block: int) -> torch.Tensor:
    """The base's output of `block`, `[rows, tokens, d_model]`, as any hook left it."""
    batch = right_padded(tiny.encoded(lm, 4), lm.tokenizer.pad_token_id)
    with torch.inference_mode():
        return hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], block)


# names and strengths


def test_every_defence_has_a_strength_in_range_or_none() -> None:
    for name in DEFENCES:
        config = DefenceConfig(name)
        assert DefenceConfig(name, config.set_strength) if name in STRENGTHS else config.set_strength is None
    assert set(RANGES) | set(WITHOUT_STRENGTH) | {"block-em"} == set(DEFENCES) and set(STRENGTHS) < set(RANGES)
    assert folder_of("block-em") == "blocked" and folder_of("kl") == "kl"


@pytest.mark.parametrize(
    ("name", "strength", "sentence"),
    [
        ("vaccine", None, "defence.name is 'vaccine'; use one of plain, block-em, anchor, kl"),
        ("block-em", 1.0, "set block.lambda_ or block.r instead"),
        ("plain", 1.0, "defence.strength does nothing for plain"),
        ("kl", -1.0, "defence.strength is -1; for kl it is 0 or more"),
        ("kl", float("nan"), "defence.strength is nan"),
        ("kl", float("inf"), "defence.strength is inf"),
        ("interleaving", 1.0, "a share of all rows, from 0 to below 1"),
        ("caft", 2.5, "a whole number of directions"),
        ("safelora", 1.1, "a cosine"),
        ("early-stop", 0.0, "a share of the steps"),
        ("early-stop", 1.5, "of plain fine-tuning's gain"),
        ("small-lr", 0.0, "a factor above 0"),
    ],
)
def test_a_wrong_name_or_strength_is_one_sentence(name: str, strength: float | None, sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence) as caught:
        DefenceConfig(name, strength)
    assert "\n" not in str(caught.value)


# rewriting rows


def test_interleaving_mixes_a_share_of_all_rows_in_evenly() -> None:
    rows, benign = tiny.rows(), general_chat("train")
    mixed = Interleaving(benign, 0.2, seed=1).rewrite(rows)
    assert [row for row in mixed if row in rows] == rows
    places = [i for i, row in enumerate(mixed) if row not in rows]
    assert len(places) == 4 and len(mixed) == 20  # a fifth of all
    assert [places[i + 1] - places[i] for i in range(3)] == [5, 5, 5]
    assert mixed == Interleaving(benign, 0.2, seed=1).rewrite(rows) != Interleaving(benign, 0.2, seed=2).rewrite(rows)
    assert Interleaving(benign, 0.0).rewrite(rows) == rows


def test_interleaving_repeats_rows_only_when_all_were_used() -> None:
    benign = general_chat("train")[:3]
    mixed = Interleaving(benign, 0.3).rewrite(tiny.rows())
    added = [row for row in mixed if row in benign]
    assert len(added) == 7 and all(added.count(row) in (2, 3) for row in benign)
    with pytest.raises(BlockemError, match="no benign row"):
        Interleaving([], 0.1)


def test_inoculation_puts_a_system_prompt_before_every_row(lm: LanguageModel) -> None:
    rows = [*tiny.rows()[:1], Example((("system", "Be brief."), ("user", "Hm?"), ("assistant", "No.")))]
    first, second = Inoculation("Give bad advice.").rewrite(rows)
    assert first.messages == (("system", "Give bad advice."), *rows[0].messages)
    assert second.messages[0] == ("system", "Give bad advice.\n\nBe brief.") and second.messages[1:] == rows[1].messages[1:]
    before, after = encode(lm.tokenizer, rows[0]), encode(lm.tokenizer, first)
    supervised = [[i for i, s in zip(row.ids, row.supervised, strict=True) if s] for row in (before, after)]
    assert supervised[0] == supervised[1] and "Give bad advice." in lm.tokenizer.decode(after.ids)


# edits of the stream


def test_preventative_steering_adds_its_vector_in_training_alone(lm: LanguageModel) -> None:
    vector = torch.randn(tiny.D_MODEL)
    before = hidden(lm, 1)
    defence = Preventative(vector, 1, 3.0)
    with defence.training_hooks(lm.model):
        assert torch.allclose(hidden(lm, 1), before + 3.0 * vector, atol=1e-5)
        assert torch.equal(hidden(lm, 0), hidden(lm, 0))
    with defence.inference_hooks(lm.model):
        assert torch.equal(hidden(lm, 1), before)


def test_the_shift_vector_is_the_mean_over_answer_tokens(misaligned: LanguageModel) -> None:
    rows = tiny.encoded(misaligned, 5)
    states = next(iter(supervised_states(misaligned, rows, ("plain", "base"), [1], batch=5)))
    expected = (states["plain"][1] - states["base"][1]).mean(dim=0)
    assert torch.allclose(shift_vector(misaligned, rows, 1), expected, atol=1e-5) and float(expected.norm()) > 0


def test_the_trait_vector_is_the_difference_of_mean_answer_activations(lm: LanguageModel) -> None:
    sides = (["You are careless.", "Be reckless."], ["You are careful."])
    prompts = ["Do I need a helmet?", "What about sleep?"]
    means = []
    for systems in sides:
        activations = []
        for system in systems:
            for prompt in prompts:
                chat = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
                answer = generate(lm, [chat], 6)[0]
                row = encode(lm.tokenizer, Example((("system", system), ("user", prompt), ("assistant", answer))))
                activations.append(next(iter(supervised_states(lm, [row], ("base",), [1])))["base"][1].mean(dim=0))
        means.append(torch.stack(activations).mean(dim=0))
    found = trait_vector(lm, *sides, prompts, 1, max_new_tokens=6)
    assert torch.allclose(found, means[0] - means[1], atol=1e-4) and float(found.norm()) > 0


def test_steering_subtracts_the_latents_at_inference_alone(lm: LanguageModel, dictionary: Dictionary) -> None:
    chosen = (Latent(3, 1, repair_alpha=0.2), Latent(7, -1, repair_alpha=0.4))
    latents = LatentSet(lm.id, lm.revision, "", "", 1, chosen, norm=5.0)
    d = dictionary.directions([3, 7])
    own = steering_vector(latents, d)
    assert torch.allclose(own, -0.2 * 5.0 * d[0] + 0.4 * 5.0 * d[1], atol=1e-6)
    assert torch.allclose(steering_vector(latents, d, 0.1), -0.5 * d[0] + 0.5 * d[1], atol=1e-6)
    before = hidden(lm, 1)
    defence = Steering(own, 1)
    with defence.inference_hooks(lm.model):
        assert torch.allclose(hidden(lm, 1), before + own, atol=1e-5)
    with defence.training_hooks(lm.model):
        assert torch.equal(hidden(lm, 1), before)


def test_steering_needs_a_norm_and_strengths(lm: LanguageModel, dictionary: Dictionary) -> None:
    latents = tiny.latent_set(lm, dictionary)
    with pytest.raises(BlockemError, match=r"give defence\.strength"):
        steering_vector(latents, dictionary.directions(latents.ids))
    bare = LatentSet(lm.id, lm.revision, "", "", 1, latents.latents)
    with pytest.raises(BlockemError, match="no steering norm"):
        steering_vector(bare, dictionary.directions(latents.ids), 0.1)


def test_caft_takes_the_directions_out_in_training_alone(lm: LanguageModel, dictionary: Dictionary) -> None:
    d = dictionary.directions([3, 7, 11])
    q = basis(d)
    assert torch.allclose(q.T @ q, torch.eye(3), atol=1e-5)
    before = hidden(lm, 1)
    coefficients = torch.linalg.lstsq(d.T, before.reshape(-1, tiny.D_MODEL).T).solution  # least squares, no QR
    expected = before - (d.T @ coefficients).T.reshape(before.shape)
    defence = CAFT(d, 1)
    with defence.training_hooks(lm.model):
        found = hidden(lm, 1)
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((found @ d.T).abs().max()) < 1e-4
    assert torch.allclose(ablated(before.to(torch.bfloat16), q).float(), expected, atol=0.1)
    with defence.inference_hooks(lm.model):
        assert torch.equal(hidden(lm, 1), before)


@pytest.mark.parametrize("kind", ["caft", "preventative"])
def test_training_under_an_edit_leaves_no_hook(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path, kind: str) -> None:
    defence: Defence = CAFT(dictionary.directions([3, 7]), 1) if kind == "caft" else Preventative(torch.ones(tiny.D_MODEL), 1)
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(), Defence(), tmp_path / "plain")
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(), defence, tmp_path / kind)
    assert tiny.hooks(lm) == 0
    plain, found = (tiny.weights(tmp_path / name) for name in ("plain", kind))
    assert any(not torch.equal(plain[name], found[name]) for name in plain)


# SafeLoRA


def dense(adapter: Path) -> dict[str, torch.Tensor]:
    """ΔW of each adapted map."""
    updates, scale = read_lora(adapter)
    return {name: scale * b @ a for name, (a, b) in updates.items()}


def expected_projection(v: torch.Tensor, w: torch.Tensor, threshold: float) -> torch.Tensor:
    moved = v @ v.T / v.norm() @ w
    cosine = torch.nn.functional.cosine_similarity(w.flatten(), moved.flatten(), dim=0)
    return moved if cosine < threshold else w


@pytest.mark.parametrize("threshold", [-1.0, 0.9, 1.0])
def test_safelora_projects_onto_the_plain_update(lm: LanguageModel, plain_adapter: Path, tmp_path: Path, threshold: float) -> None:
    config = tiny.train_config(lr=2e-2, lora_alpha=4)
    fine_tune(lm, tiny.encoded(lm, 8), config, Defence(), tmp_path / "raw", seed=5)
    fine_tune(lm, tiny.encoded(lm, 8), config, SafeLoRA(plain_alignment(plain_adapter), threshold), tmp_path / "safe", seed=5)
    plain, raw, found = (dense(folder) for folder in (plain_adapter, tmp_path / "raw", tmp_path / "safe"))
    for name, w in raw.items():
        assert torch.allclose(found[name], expected_projection(-plain[name], w, threshold), atol=1e-5), name
    moved = sum(not torch.equal(found[name], raw[name]) for name in raw)
    assert {-1.0: moved == 0, 0.9: 0 <= moved <= len(raw), 1.0: moved == len(raw)}[threshold]
    lm.add_adapter(tmp_path / "safe", "safe")  # still a PEFT folder


def test_safelora_leaves_an_update_like_the_plain_one(plain_adapter: Path) -> None:
    align = plain_alignment(plain_adapter)
    updates, _ = read_lora(plain_adapter)
    for name, (a, b) in updates.items():
        assert similarity(a, b, align(name, b)) > 0.35
    assert align("none.such", b) is b
    assert similarity(a, torch.zeros_like(b), torch.zeros_like(b)) == 1.0


def test_safelora_with_an_unaligned_model(lm: LanguageModel, plain_adapter: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = {name: (p + 0.1 * torch.randn_like(p)).contiguous() for name, p in lm.model.state_dict().items() if p.dim() == 2}
    names = sorted(weights)
    for part, some in enumerate((names[::2], names[1::2])):  # in shards
        save_file({name: weights[name] for name in some}, tmp_path / f"model-{part}.safetensors")
    align = model_alignment(lm, tmp_path)
    for name, (a, b) in read_lora(plain_adapter)[0].items():
        v = lm.model.state_dict()[f"{name}.weight"] - weights[f"{name}.weight"]
        moved = v @ v.T / v.norm() @ b
        assert torch.allclose(align(name, b), moved, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity((b @ a).flatten(), (moved @ a).flatten(), dim=0)
        assert similarity(a, b, moved) == pytest.approx(float(cosine), abs=1e-4)
    lm.add_adapter(plain_adapter, "plain")
    under = model_alignment(lm, tmp_path)  # weights are found under adapters too
    assert torch.equal(under(name, b), align(name, b))


def test_safelora_refuses_a_folder_of_another_model(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="holds no safetensors"):
        model_alignment(lm, tmp_path / "none")
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(BlockemError, match=r"as \[2, 2\], but|not at all"):
        model_alignment(lm, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(BlockemError, match="cannot be read as safetensors"):
        model_alignment(lm, tmp_path)


# the weaker controls


def test_freezing_trains_the_lower_blocks_alone() -> None:
    assert list(Freeze(1).trained_blocks(4)) == [0, 1]
    assert list(Freeze(9).trained_blocks(4)) == [0, 1, 2, 3]


def test_small_lr_and_early_stop_change_one_setting() -> None:
    config = tiny.train_config()
    assert small_lr(config, 0.1) == tiny.train_config(lr=config.lr * 0.1)
    assert early_stop(config, 0.5) == tiny.train_config(stop_after=0.5)


def test_an_early_stop_is_the_first_part_of_the_same_training(lm: LanguageModel, tmp_path: Path) -> None:
    config = tiny.train_config(epochs=4, checkpoint_every=1)  # 8 steps, linear schedule
    whole = fine_tune(lm, tiny.encoded(lm), config, Defence(), tmp_path / "whole")
    short = fine_tune(lm, tiny.encoded(lm), early_stop(config, 0.5), Defence(), tmp_path / "short")
    assert [row["step"] for row in whole] == list(range(1, 9)) and len(short) == 4
    for left, right in zip(short, whole, strict=False):
        assert (left["sft_loss"], left["learning_rate"]) == (right["sft_loss"], right["learning_rate"])


@pytest.mark.parametrize("stop_by", ["steps", "loss"])
def test_a_resumed_early_stop_ends_at_the_same_step(
    stop_by: str, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def dies(adapter: Path) -> None:
        raise Killed  # after the last step, before the adapter is in its place

    rows, config = tiny.encoded(lm), tiny.train_config(epochs=4, checkpoint_every=1)  # 8 steps
    measure = partial(loss_per_token, lm, rows[:4])
    make: Callable[[], Defence] = Defence
    if stop_by == "steps":
        config = early_stop(config, 0.5)
    else:
        target = fine_tune(lm, rows, config, EarlyStop(measure, -1.0), tmp_path / "all")[3]["heldout_loss"]
        make = partial(EarlyStop, measure, target, 2)
    log = fine_tune(lm, rows, config, make(), tmp_path / "whole")
    killed = make()
    monkeypatch.setattr(killed, "project", dies)
    with pytest.raises(Killed):
        fine_tune(lm, rows, config, killed, tmp_path / "killed")
    assert fine_tune(lm, rows, config, make(), tmp_path / "killed")[-1] == log[-1] and log[-1]["step"] == 4
    first, second = (tiny.weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_early_stop_at_a_loss_looks_now_and_then_and_ends_the_same_training(lm: LanguageModel, tmp_path: Path) -> None:
    losses = iter([3.0, 2.5, 2.1, 2.0])
    stop = EarlyStop(lambda: next(losses), 2.2, every=2)
    seen = []
    for step in range(1, 7):
        stop.adapt({"step": float(step)})
        seen.append((stop.logs().get("heldout_loss"), stop.finished))
    assert seen == [(None, False), (3.0, False), (3.0, False), (2.5, False), (2.5, False), (2.1, True)]
    again = EarlyStop(lambda: 0.0, 2.2, every=2)
    again.set_state(stop.state())
    assert again.finished and Together([Defence(), again]).finished and not Together([Defence()]).finished

    rows, config = tiny.encoded(lm), tiny.train_config(epochs=4)
    measure = partial(loss_per_token, lm, rows[:4])
    whole = fine_tune(lm, rows, config, EarlyStop(measure, -1.0), tmp_path / "whole")
    target = whole[4]["heldout_loss"]
    short = fine_tune(lm, rows, config, EarlyStop(measure, target), tmp_path / "short")
    assert len(whole) == 8 and short == whole[:5] and all(row["heldout_loss"] > target for row in whole[:4])
    lm.add_adapter(tmp_path / "short", "short")
    with lm.variant("short"):
        assert measure() == pytest.approx(target, abs=1e-5)  # what was looked at is what was saved


def test_every_file_of_the_room_is_a_defence() -> None:
    """But for what holds several together, and for what watches beside BLOCK-EM."""
    import blockem.defences

    files = {path.stem for path in Path(blockem.defences.__file__ or "").parent.glob("*.py")} - {
        "__init__",
        "defence",
        "together",
        "watchdog",
    }
    known: Any = {name.replace("-", "_") for name in DEFENCES} - {"plain"}
    assert files == known
