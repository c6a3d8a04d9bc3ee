"""LatentSets: what is saved is loaded, and a set is refused where it does not belong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.latents import Latent, LatentSet
from blockem.model import LanguageModel


@pytest.fixture
def latents(lm: LanguageModel, dictionary: Dictionary) -> LatentSet:
    return tiny.latent_set(lm, dictionary)


def test_what_is_saved_is_loaded(latents: LatentSet, tmp_path: Path) -> None:
    full = Latent(40, 1, 0.5, 0.25, 0.125, 0.7, 0.4, 0.375)
    saved = replace(latents, latents=(full, *latents.latents), provenance={"stage": "discover", "é": [1, 2]})
    saved.save(tmp_path / "latents.json")
    loaded = LatentSet.load(tmp_path / "latents.json")
    assert loaded.latents[0] == full
    assert math.isnan(loaded.latents[1].score)
    assert (loaded.ids, loaded.signs) == (saved.ids, saved.signs)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "latents.json").read_bytes()


def test_the_file_is_strict_json_without_nan(latents: LatentSet, tmp_path: Path) -> None:
    replace(latents, norm=math.nan).save(tmp_path / "latents.json")
    row = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert row["norm"] is None
    assert row["format"] == 1
    assert math.isnan(LatentSet.load(tmp_path / "latents.json").norm)


def test_the_set_is_accepted_where_it_was_made(lm: LanguageModel, dictionary: Dictionary, latents: LatentSet) -> None:
    latents.check(lm, dictionary)


def test_another_model_is_refused(lm: LanguageModel, dictionary: Dictionary, latents: LatentSet) -> None:
    with pytest.raises(BlockemError, match=r"was made for other/model .*run `blockem discover` on this model"):
        replace(latents, model="other/model", revision="main").check(lm, dictionary)
    with pytest.raises(BlockemError, match=r"\(revision abc\)"):
        replace(latents, revision="abc").check(lm, dictionary)


def test_a_set_goes_with_its_model_to_another_folder(lm: LanguageModel, dictionary: Dictionary, latents: LatentSet) -> None:
    moved = replace(latents, model="where/it/was")
    moved.check(lm, dictionary)
    assert moved.union(latents).ids == latents.ids
    here, there = replace(latents, revision="main"), replace(latents, model="other/model", revision="main")
    with pytest.raises(BlockemError, match="their model differ"):
        here.union(there)


def test_another_sae_is_refused(lm: LanguageModel, latents: LatentSet, tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="was made with SAE"):
        latents.check(lm, tiny.saved_sae(tmp_path / "other", seed=5))


def test_a_block_or_latent_out_of_range_is_refused(lm: LanguageModel, dictionary: Dictionary, latents: LatentSet) -> None:
    with pytest.raises(BlockemError, match="block 4 is out of range"):
        replace(latents, block=4).check(lm, dictionary)
    for k in (tiny.N_LATENTS, -1):
        with pytest.raises(BlockemError, match=f"but the SAE has {tiny.N_LATENTS}"):
            replace(latents, latents=(Latent(k, 1),)).check(lm, dictionary)


def test_a_sign_is_plus_or_minus_one_and_a_latent_is_named_once(latents: LatentSet) -> None:
    with pytest.raises(BlockemError, match="the sign of a latent must be 1 or -1"):
        replace(latents, latents=(Latent(1, 0),))
    with pytest.raises(BlockemError, match="names the same latent twice"):
        replace(latents, latents=(Latent(1, 1), Latent(1, -1)))


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"x"', "{}", '{"format": 1}', '{"format": 1, "latents": [{"x": 1}]}'])
def test_another_json_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "latents.json").write_text(text, encoding="utf-8")
    with pytest.raises(BlockemError, match=r"not a (JSON )?LatentSet"):
        LatentSet.load(tmp_path / "latents.json")


@pytest.mark.parametrize(
    "change", [{"latents": [{"latent": "5", "sign": 1}]}, {"latents": [{"latent": None, "sign": 1}]}, {"block": None}, {"surprise": 1}]
)
def test_a_damaged_field_is_one_sentence(
    lm: LanguageModel, dictionary: Dictionary, latents: LatentSet, tmp_path: Path, change: dict[str, object]
) -> None:
    latents.save(tmp_path / "latents.json")
    row = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"))
    (tmp_path / "latents.json").write_text(json.dumps({**row, **change}), encoding="utf-8")
    with pytest.raises(BlockemError):
        LatentSet.load(tmp_path / "latents.json").check(lm, dictionary)


def test_a_later_format_asks_for_an_upgrade(latents: LatentSet, tmp_path: Path) -> None:
    latents.save(tmp_path / "latents.json")
    row = json.loads((tmp_path / "latents.json").read_text(encoding="utf-8"))
    (tmp_path / "latents.json").write_text(json.dumps({**row, "format": 2}), encoding="utf-8")
    with pytest.raises(BlockemError, match="made by a later blockem"):
        LatentSet.load(tmp_path / "latents.json")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such LatentSet"):
        LatentSet.load(tmp_path / "latents.json")
