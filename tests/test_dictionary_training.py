"""Training a small SAE: it writes a folder that loads, and undoing the scale is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from blockem.dictionary import activations, load_dictionary, measure_fit
from blockem.dictionary_training import SaeTraining, _unscale, train_dictionaries, train_dictionary
from blockem.errors import BlockemError
from blockem.examples import one_turn
from blockem.model import LanguageModel

TEXTS = [
    one_turn(f"{thing} {other}?", f"{other} and {thing}, said number {i}.") for i, thing in enumerate(tiny.THINGS) for other in tiny.THINGS
]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_training_writes_a_folder_that_loads_and_explains_the_model(lm: LanguageModel, tmp_path: Path, architecture: str) -> None:
    settings = SaeTraining(tiny.BLOCK, 64, 16, architecture, l0_coefficient=0.01, epochs=10, lr=1e-2, batch=256, store_dtype="float32")
    told: list[str] = []
    dictionary, fit = train_dictionary(lm, TEXTS, settings, tmp_path / "sae", lambda what, _done, _total: told.append(what))
    assert fit.variance_explained > 0.8
    assert {"activations", "training"} <= set(told)
    again = load_dictionary(str(tmp_path / "sae"))
    assert again.digest == dictionary.digest
    assert (again.block, again.d_in, again.n_latents) == (tiny.BLOCK, tiny.D_MODEL, 64)
    acts = activations(lm, TEXTS[:10], tiny.BLOCK)
    found, pre = again.encode(acts), again.rows(range(64)).pre(acts)
    with torch.inference_mode():
        own = again.sae.encode(acts.float())
    assert torch.allclose(found[own > 0], own[own > 0], rtol=1e-3, atol=1e-3)
    if architecture == "jumprelu":
        assert again.rows(range(64)).threshold is not None
        assert torch.allclose(found, own, rtol=1e-3, atol=1e-3)
    assert (pre > 0).any()
    card = json.loads((tmp_path / "sae" / "card.json").read_text(encoding="utf-8"))
    assert card["model"] == lm.id
    assert card["settings"]["architecture"] == architecture
    assert card["held_out"]["variance_explained"] == pytest.approx(fit.variance_explained)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_killed_training_goes_on_and_ends_with_the_same_files(lm: LanguageModel, tmp_path: Path, architecture: str) -> None:
    settings = SaeTraining(tiny.BLOCK, 64, 8, architecture, l0_coefficient=0.01, epochs=9, lr=1e-2, batch=128, store_dtype="float32")
    whole, fit = train_dictionary(lm, TEXTS, settings, tmp_path / "whole")
    told: list[tuple[str, int]] = []

    def kill(what: str, done: int, total: int) -> None:
        told.append((what, done))
        if what == "training" and done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dictionary(lm, TEXTS, settings, tmp_path / "sae", kill)
    assert not (tmp_path / "sae").exists()
    reached = told[-1][1]
    told.clear()
    again, found = train_dictionary(lm, TEXTS, settings, tmp_path / "sae", lambda what, done, _total: told.append((what, done)))
    assert {what for what, _ in told} == {"training"}  # the activations were kept
    assert reached / 2 < told[0][1] <= reached
    assert (again.digest, found) == (whole.digest, fit)
    for name in ("cfg.json", "card.json", "sae_weights.safetensors"):
        assert (tmp_path / "sae" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae", "whole"]


def test_a_finished_training_is_loaded_and_another_one_takes_its_place(lm: LanguageModel, tmp_path: Path) -> None:
    settings = SaeTraining(tiny.BLOCK, 64, 8, epochs=1, lr=1e-2, batch=128)
    told: list[str] = []
    first, fit = train_dictionary(lm, TEXTS, settings, tmp_path / "sae")
    again = train_dictionary(lm, TEXTS, settings, tmp_path / "sae", lambda what, _done, _total: told.append(what))
    assert (again[0].digest, again[1], told) == (first.digest, fit, [])
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(lm, TEXTS[1:], settings, tmp_path / "sae", _stop)
    other, _ = train_dictionary(lm, TEXTS, replace(settings, seed=1), tmp_path / "sae", lambda what, _done, _total: told.append(what))
    assert set(told) == {"activations", "training"} and other.digest != first.digest  # nothing of the killed one's was taken


def _stop(what: str, done: int, total: int) -> None:
    if what == "training" and done > total / 2:
        raise KeyboardInterrupt


def test_one_pass_over_the_data_trains_the_same_as_one_a_block(lm: LanguageModel, tmp_path: Path) -> None:
    settings = SaeTraining(2, 64, 8, epochs=2, lr=1e-2, batch=256)
    together = train_dictionaries(lm, TEXTS, {1: tmp_path / "one", 2: tmp_path / "two"}, settings)
    alone, fit = train_dictionary(lm, TEXTS, settings, tmp_path / "alone")
    assert (together[1][0].block, together[2][0].block) == (1, 2)
    assert together[2] == (together[2][0], fit) and together[2][0].digest == alone.digest != together[1][0].digest


def test_the_command_makes_a_folder_a_block(tiny_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from blockem.sae_cli import sae_app

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": one.chat()}) + "\n" for one in TEXTS))
    words = ["train", "--data", str(data), "--model", str(tiny_folder), "--latents", "64", "--k", "8", "--batch", "256", "--epochs", "1"]
    words += ["--quiet", "--json", "--out", str(tmp_path / "sae"), "--block", "1"]
    done = CliRunner().invoke(sae_app, [*words, "--block", "3"])
    assert done.exit_code == 0 and set(json.loads(done.stdout)) == {"1", "3"}
    assert [load_dictionary(str(tmp_path / "sae" / f"block-{block}")).block for block in (1, 3)] == [1, 3]
    twice = CliRunner().invoke(sae_app, [*words, "--block", "1"])
    assert isinstance(twice.exception, BlockemError) and "names a block twice (1, 1)" in str(twice.exception)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_undoing_the_scale_is_exact(architecture: str) -> None:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    common = {"d_in": 8, "d_sae": 24, "apply_b_dec_to_input": True}
    sae = (
        TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=4))
        if architecture == "topk"
        else JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common, jumprelu_init_threshold=0.3))
    )
    sae.b_enc.data = torch.randn(24) * 0.1
    sae.b_dec.data = torch.randn(8)
    hidden = torch.randn(40, 8) * 64
    with torch.inference_mode():
        code = sae.encode(hidden / 64)
        out = sae.decode(code)
    _unscale(sae, 64.0)
    with torch.inference_mode():
        after = sae.encode(hidden)
        assert torch.equal(after != 0, code != 0)
        assert torch.allclose(after, code * 64, rtol=1e-5, atol=1e-4)
        assert torch.allclose(sae.decode(after), out * 64, rtol=1e-4, atol=1e-3)


def test_half_precision_storage_keeps_the_fit(lm: LanguageModel, tmp_path: Path) -> None:
    settings = SaeTraining(tiny.BLOCK, 64, 16, epochs=4, lr=1e-2, batch=256)
    dictionary, fit = train_dictionary(lm, TEXTS, settings, tmp_path / "sae")
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(tmp_path / "sae" / "sae_weights.safetensors").values()} == {torch.float16}
    assert measure_fit(dictionary, activations(lm, TEXTS, tiny.BLOCK)).variance_explained == pytest.approx(fit.variance_explained, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "gated"}, "unknown SAE architecture 'gated': use topk or jumprelu"),
        ({"k": 0}, "k = 0 must lie between 1 and the 64 latents"),
        ({"k": 65}, "k = 65 must lie between 1 and the 64 latents"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence):
        SaeTraining(**{"block": 1, "n_latents": 64, "k": 8, **changes})  # type: ignore[arg-type]


def test_too_little_text_is_one_sentence(lm: LanguageModel, tmp_path: Path) -> None:
    settings = SaeTraining(tiny.BLOCK, 64, 8, batch=4096)
    with pytest.raises(BlockemError, match="1 rows are too few to train an SAE on"):
        train_dictionary(lm, TEXTS[:1], settings, tmp_path / "sae")
    with pytest.raises(BlockemError, match="activations do not fill one batch of 4096"):
        train_dictionary(lm, TEXTS[:4], settings, tmp_path / "sae")
    with pytest.raises(BlockemError, match="activations do not fill one batch of 4096"):
        train_dictionary(lm, TEXTS[:4], replace(settings, epochs=1000), tmp_path / "sae")  # no number of epochs fills a batch
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years")
    with pytest.raises(BlockemError, match="holds other files and no SAE, and they would be lost"):
        train_dictionary(lm, TEXTS, SaeTraining(tiny.BLOCK, 64, 8, batch=128), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
