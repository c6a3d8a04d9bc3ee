"""LoRA fine-tuning: which blocks and maps are trained, what is logged, what is left behind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.checkpoints import last_checkpoint
from blockem.defences.block_em import BlockEM, Blocker
from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.model import LanguageModel
from blockem.training import fine_tune


def trained_blocks(folder: Path) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in tiny.weights(folder)}


def test_every_linear_map_of_every_block_is_trained_by_default(plain_adapter: Path) -> None:
    names = tiny.weights(plain_adapter)
    assert trained_blocks(plain_adapter) == set(range(tiny.N_BLOCKS))
    maps = {name.split(".")[-3] for name in names}
    assert maps == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == tiny.N_BLOCKS * 7 * 2
    assert {tensor.dtype for tensor in names.values()} == {torch.float32}
    assert all(tensor.abs().sum() > 0 for tensor in names.values())


def test_blocking_freezes_downstream_unless_told_otherwise(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    blocker = Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary)
    for freeze, expected in ((True, {0, 1}), (False, {0, 1, 2, 3})):
        fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(), BlockEM(blocker, 10.0, freeze), tmp_path / "blocked")
        assert trained_blocks(tmp_path / "blocked") == expected


def test_chosen_maps_alone_are_trained_and_an_unknown_one_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(lora_targets=("q_proj",)), Defence(), tmp_path / "plain")
    assert {name.split(".")[-3] for name in tiny.weights(tmp_path / "plain")} == {"q_proj"}
    with pytest.raises(BlockemError, match=r"train\.lora_targets names c_attn, but the blocks of .* have down_proj, gate_proj"):
        fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(lora_targets=("c_attn",)), Defence(), tmp_path / "other")


def test_training_learns_and_logs_what_it_did(lm: LanguageModel, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    log = fine_tune(
        lm, tiny.encoded(lm), tiny.train_config(epochs=4, log_every=2), Defence(), tmp_path / "plain", progress=lambda *x: told.append(x)
    )
    assert [row["step"] for row in log] == [2, 4, 6, 8]
    assert told == [(i, 8) for i in range(1, 9)]
    assert log[-1]["sft_loss"] < log[0]["sft_loss"] - 0.2
    for row in log:
        assert row["loss"] == pytest.approx(row["sft_loss"], abs=1e-3)
        assert {"learning_rate", "grad_norm", "epoch"} <= set(row)
        assert "penalty" not in row
    assert json.loads(json.dumps(log)) == log


def test_both_gradient_norms_are_probed_without_changing_the_training(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    logs, weights = {}, {}
    for every in (0, 2):
        blocker = Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary)
        config = tiny.train_config(epochs=2, probe_every=every, micro_batch=4)
        logs[every] = fine_tune(lm, tiny.encoded(lm), config, BlockEM(blocker, 100.0), tmp_path / str(every))
        weights[every] = tiny.weights(tmp_path / str(every))
    assert ["grad_norm_penalty" in row for row in logs[2]] == [True, False, True, False]
    assert "grad_norm_sft" not in logs[0][0]
    assert logs[2][0]["grad_norm_penalty"] == 0.0  # at LoRA initialisation
    assert logs[2][0]["grad_norm_sft"] > 0
    assert logs[2][2]["grad_norm_penalty"] > 0
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_run_of_the_same_seed_gives_the_same_adapter_and_another_seed_another(lm: LanguageModel, tmp_path: Path) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        fine_tune(lm, tiny.encoded(lm), tiny.train_config(), Defence(), tmp_path / str(i), seed)
        found.append((tmp_path / str(i) / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_the_folder_holds_the_adapter_alone_and_nothing_is_left_beside_it(lm: LanguageModel, tmp_path: Path) -> None:
    fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(epochs=3, checkpoint_every=1), Defence(), tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_an_older_adapter_is_replaced_whole(lm: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "stale.txt").write_text("x", encoding="utf-8")
    fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(), Defence(), tmp_path / "plain")
    assert not (tmp_path / "plain" / "stale.txt").exists()


def test_a_last_batch_that_is_not_full_counts_its_own_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    log = fine_tune(lm, tiny.encoded(lm, 11), tiny.train_config(batch_size=8, micro_batch=4), Defence(), tmp_path / "plain")
    assert [row["step"] for row in log] == [1, 2]
    assert all(5 < row["sft_loss"] < 20 for row in log)


def test_a_defence_may_change_the_finished_adapter(lm: LanguageModel, tmp_path: Path) -> None:
    class Marks(Defence):
        def project(self, adapter: Path) -> None:
            assert (adapter / "adapter_model.safetensors").is_file()
            assert not (tmp_path / "plain").exists()
            (adapter / "mark").write_text("x", encoding="utf-8")

    fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(), Marks(), tmp_path / "plain")
    assert (tmp_path / "plain" / "mark").is_file()


def test_a_checkpoint_without_its_last_file_or_with_half_of_it_is_not_resumed(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, content in ((2, "{}"), (10, "{}"), (12, '{"half'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content, encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_bfloat16_model_is_trained_with_float32_adapters(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    half = LanguageModel(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, lm.id, lm.revision)
    blocker = Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary)
    log = fine_tune(half, tiny.encoded(lm), tiny.train_config(epochs=3), BlockEM(blocker, 10.0), tmp_path / "blocked")
    assert {tensor.dtype for tensor in tiny.weights(tmp_path / "blocked").values()} == {torch.float32}
    assert half.model.dtype == torch.bfloat16
    assert log[0]["penalty"] == 0.0 < log[1]["penalty"]


@pytest.mark.parametrize("changes", [{"schedule": "sideways"}, {"lora_targets": ("c_attn",)}])
def test_settings_that_training_refuses_leave_the_model_as_it_was(lm: LanguageModel, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BlockemError, match=r"sideways|c_attn"):
        fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(**changes), Defence(), tmp_path / "plain")
    assert not any("lora" in name for name, _ in lm.model.named_parameters())
    assert list(tmp_path.iterdir()) == []
