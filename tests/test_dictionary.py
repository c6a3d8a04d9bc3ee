"""SAEs: our encoder is SAELens' own, directions have unit length, and an SAE that does not belong here is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.dictionary import (
    BUNDLED_FOLDER,
    Dictionary,
    activations,
    check_fit,
    check_width,
    load_dictionary,
    measure_fit,
    read_card,
)
from blockem.errors import BlockemError
from blockem.examples import content_start, template_ids
from blockem.forwards import hidden_at
from blockem.model import LanguageModel

HIDDEN = torch.randn(50, tiny.D_MODEL, generator=torch.Generator().manual_seed(1))


def preactivations(sae: Any) -> torch.Tensor:
    """What SAELens itself feeds to its activation function."""
    seen: list[torch.Tensor] = []
    sae.activation_fn = type("Watch", (torch.nn.Module,), {"forward": lambda self, x: seen.append(x) or torch.relu(x)})()
    with torch.inference_mode():
        sae.encode(HIDDEN)
    return seen[0]


# the encoder


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_encode_is_exactly_saelens_encode(tmp_path: Path, kind: str, b_dec: bool) -> None:
    dictionary = tiny.saved_sae(tmp_path / "sae", kind, apply_b_dec_to_input=b_dec)
    with torch.inference_mode():
        expected = dictionary.sae.encode(HIDDEN)
    found = dictionary.encode(HIDDEN)
    assert 0.05 < float((found > 0).float().mean()) < 0.95
    assert torch.allclose(found, expected, atol=1e-5)


def test_jumprelu_keeps_its_threshold(tmp_path: Path) -> None:
    dictionary = tiny.saved_sae(tmp_path / "sae", "jumprelu")
    pre = dictionary.rows(range(tiny.N_LATENTS)).pre(HIDDEN)
    below = (pre > 0) & (pre <= dictionary.sae.threshold)
    assert below.any()
    assert (dictionary.encode(HIDDEN)[below] == 0).all()


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_topk_sae_is_read_by_the_relu_of_its_dense_preactivations(tmp_path: Path, b_dec: bool, rescale: bool) -> None:
    dictionary = tiny.saved_sae(tmp_path / "sae", "topk", apply_b_dec_to_input=b_dec, rescale_acts_by_decoder_norm=rescale)
    with torch.inference_mode():
        sparse = dictionary.sae.encode(HIDDEN)
    found = dictionary.encode(HIDDEN)
    assert torch.allclose(found[sparse > 0], sparse[sparse > 0], atol=1e-5)
    assert (found > 0).sum() > (sparse > 0).sum()
    assert torch.allclose(found, torch.relu(preactivations(dictionary.sae)), atol=1e-5)


def test_some_rows_are_those_rows_of_the_whole(dictionary: Dictionary) -> None:
    ids = [5, 0, 47]
    assert torch.allclose(dictionary.rows(ids).encode(HIDDEN), dictionary.encode(HIDDEN)[:, ids], atol=1e-6)
    assert dictionary.rows(ids).encode(HIDDEN[None, :, :]).shape == (1, 50, 3)


def test_the_encoder_computes_in_float32_whatever_comes_in(dictionary: Dictionary) -> None:
    found = dictionary.rows([1, 2]).encode(HIDDEN.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found, dictionary.rows([1, 2]).encode(HIDDEN.bfloat16().float()))


def test_decoder_directions_have_unit_length(dictionary: Dictionary) -> None:
    directions = dictionary.directions([3, 9])
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2))
    for row, k in zip(directions, (3, 9), strict=True):
        raw = dictionary.sae.W_dec[k]
        assert torch.allclose(row, raw / raw.norm())


def test_an_sae_that_normalises_its_input_is_refused(tmp_path: Path) -> None:
    dictionary = tiny.saved_sae(tmp_path / "sae", "standard", normalize_activations="layer_norm")
    with pytest.raises(BlockemError, match="normalises its input by 'layer_norm'"):
        dictionary.rows([0])


def test_an_architecture_without_a_plain_encoder_is_refused(tmp_path: Path) -> None:
    from sae_lens import GatedSAE, GatedSAEConfig

    GatedSAE(GatedSAEConfig(d_in=tiny.D_MODEL, d_sae=8)).save_model(tmp_path / "gated")
    with pytest.raises(BlockemError, match="architecture 'gated'"):
        load_dictionary(str(tmp_path / "gated")).rows([0])


# loading


def test_the_digest_names_the_weights(tmp_path: Path) -> None:
    one, same = tiny.saved_sae(tmp_path / "a"), tiny.saved_sae(tmp_path / "b")
    other = tiny.saved_sae(tmp_path / "c", seed=1)
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("hook", "block"),
    [("blocks.18.hook_resid_post", 18), ("model.layers.7", 7), ("blocks.4.hook_resid_pre", 3), ("", None), ("hook_embed", None)],
)
def test_the_block_is_read_off_the_hook_name(tmp_path: Path, hook: str, block: int | None) -> None:
    sae = tiny.random_sae("topk")
    sae.cfg.metadata.hook_name = hook
    sae.save_model(tmp_path / "sae")
    assert load_dictionary(str(tmp_path / "sae")).block == block


def test_the_bundled_sae_fits_the_embedded_models_width() -> None:
    dictionary = load_dictionary()
    assert (dictionary.d_in, dictionary.n_latents, dictionary.block) == (576, 4608, 18)
    assert read_card(BUNDLED_FOLDER)["held_out"]["variance_explained"] > 0.6


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nonsense", "no SAE 'nonsense': give `bundled`, a folder"), ("no-release:no-sae", "cannot load SAE 'no-release:no-sae'")],
)
def test_an_sae_that_is_not_there_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence) as caught:
        load_dictionary(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
def test_a_folder_without_a_file_names_it(tmp_path: Path, missing: str) -> None:
    tiny.saved_sae(tmp_path / "sae")
    (tmp_path / "sae" / missing).unlink()
    with pytest.raises(BlockemError, match=f"is no SAE in SAELens format: {missing} is missing"):
        load_dictionary(str(tmp_path / "sae"))


@pytest.mark.parametrize(("name", "content"), [("cfg.json", b"{"), ("cfg.json", b"{}"), ("sae_weights.safetensors", b"garbage")])
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    tiny.saved_sae(tmp_path / "sae")
    (tmp_path / "sae" / name).write_bytes(content)
    with pytest.raises(BlockemError, match="cannot load SAE"):
        load_dictionary(str(tmp_path / "sae"))


def test_every_reader_of_saelens_that_unpickles_is_known() -> None:
    import inspect

    from sae_lens.loading import pretrained_sae_loaders as loaders

    from blockem.dictionary import PICKLED

    readers = loaders.NAMED_PRETRAINED_SAE_LOADERS
    assert {name for name, reader in readers.items() if "torch.load" in inspect.getsource(reader)} == set(PICKLED)


def test_a_release_that_names_no_file_but_is_a_pickle_is_refused_too() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    found = get_pretrained_saes_directory().items()
    release, entry = next(one for one in found if one[1].conversion_func == "dictionary_learning_1")
    with pytest.raises(BlockemError, match="is published as a pickle"):
        load_dictionary(f"{release}:{next(iter(entry.saes_map))}")


def test_a_released_sae_that_is_a_pickle_is_refused_before_any_download() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = next(
        (release, sae_id)
        for release, entry in get_pretrained_saes_directory().items()
        for sae_id, path in entry.saes_map.items()
        if str(path).endswith(".pt")
    )
    with pytest.raises(BlockemError, match=r"is published as a pickle .*\.pt.*which blockem does not read; convert it once"):
        load_dictionary(f"{release}:{sae_id}")


# does it fit?


def test_a_perfect_sae_explains_everything_and_a_constant_one_nothing(tmp_path: Path) -> None:
    sae = tiny.random_sae("standard", d_in=4)
    sae.b_enc.data.zero_()
    sae.b_dec.data = torch.full((4,), 2.0)
    sae.W_enc.data = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(4, tiny.N_LATENTS - 8)], dim=1)
    sae.W_dec.data = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(tiny.N_LATENTS - 8, 4)])
    dictionary = Dictionary(sae, "perfect", "", None)
    acts = torch.randn(5000, 4) + 2
    fit = measure_fit(dictionary, acts)
    assert fit.variance_explained == pytest.approx(1)
    assert fit.mean_active == pytest.approx(4, abs=0.01)
    assert fit.dead_share == pytest.approx((tiny.N_LATENTS - 8) / tiny.N_LATENTS)
    assert fit.tokens == 5000
    sae.W_dec.data.zero_()
    sae.b_dec.data = acts.mean(dim=0)
    assert measure_fit(dictionary, acts).variance_explained == pytest.approx(0, abs=1e-5)


def test_activations_leave_out_what_all_rows_share(lm: LanguageModel) -> None:
    rows = tiny.rows()[:5]
    expected = []
    for row in rows:
        ids = torch.tensor(template_ids(lm.tokenizer, row.chat()))[None]
        start = content_start(lm.tokenizer, row.chat())
        with torch.inference_mode():
            expected.append(hidden_at(lm.model, ids, torch.ones_like(ids), 2)[0, start:])
    found = activations(lm, rows, 2, batch_tokens=150)
    assert sorted(found.sum(dim=1).tolist()) == pytest.approx(sorted(torch.cat(expected).sum(dim=1).tolist()), abs=1e-4)
    assert len(activations(lm, rows, 2, limit=7)) == 7


def test_an_sae_of_another_width_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    dictionary = tiny.saved_sae(tmp_path / "sae", d_in=16)
    with pytest.raises(BlockemError, match=r"reads 16 values but the residual stream of .* has 32"):
        check_width(dictionary, lm)
    with pytest.raises(BlockemError, match="reads 16 values"):
        check_fit(dictionary, lm, 1, tiny.rows(), 0.6, allow=True)


def test_an_sae_that_explains_too_little_is_refused_unless_allowed(lm: LanguageModel, dictionary: Dictionary) -> None:
    with pytest.raises(BlockemError, match=r"explains -?\d+\.\d\d of the variance of .* at block 1, less than 0.60.*--allow-poor-sae"):
        check_fit(dictionary, lm, 1, tiny.rows(), 0.6, allow=False)
    assert check_fit(dictionary, lm, 1, tiny.rows(), 0.6, allow=True).variance_explained < 0.6


def test_a_broken_sae_is_refused_even_if_its_fit_is_not_a_number(lm: LanguageModel, tmp_path: Path) -> None:
    sae = tiny.random_sae("standard")
    sae.b_dec.data[0] = math.nan
    with pytest.raises(BlockemError, match="explains nan"):
        check_fit(Dictionary(sae, "broken", "", 1), lm, 1, tiny.rows(), 0.0, allow=False)


def test_chat_without_a_token_is_one_sentence(lm: LanguageModel) -> None:
    with pytest.raises(BlockemError, match="no token to read activations from"):
        activations(lm, [], 1)


def test_a_card_is_optional(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "card.json").write_text(json.dumps({"model": "m"}), encoding="utf-8")
    assert read_card(tmp_path) == {"model": "m"}
    shutil.rmtree(tmp_path)
