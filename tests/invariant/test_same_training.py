"""Training facts that must hold: the penalty starts at 0, accumulation changes nothing, and a resumed run is the same run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from blockem.checkpoints import last_checkpoint
from blockem.defences.block_em import BlockEM, Blocker
from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary
from blockem.examples import IGNORED, right_padded
from blockem.forwards import unwrapped
from blockem.model import LanguageModel
from blockem.training import add_lora, fine_tune

PICKLES = {".pt", ".bin", ".pth", ".pkl", ".pickle", ".ckpt"}


class Killed(Exception):
    """What a killed run raises here."""


def block_em(lm: LanguageModel, dictionary: Dictionary, lambda_: float = 200.0) -> BlockEM:
    return BlockEM(Blocker.from_latents(tiny.latent_set(lm, dictionary), dictionary), lambda_)


@pytest.mark.parametrize("measure", ["latent", "preactivation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalty_and_its_gradient_are_exactly_0_at_lora_initialisation(
    lm: LanguageModel, dictionary: Dictionary, measure: str, dtype: torch.dtype
) -> None:
    other = LanguageModel(copy.deepcopy(lm.model).to(dtype), lm.tokenizer, lm.id, lm.revision)
    model = add_lora(other, tiny.train_config(), range(tiny.N_BLOCKS), seed=0)
    batch = right_padded(tiny.encoded(lm), lm.tokenizer.pad_token_id)
    with Blocker(dictionary.rows(range(tiny.N_LATENTS)), [1, -1] * (tiny.N_LATENTS // 2), tiny.BLOCK, measure).attached(model) as blocker:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        penalty = blocker.penalty(batch)
        penalty.backward()
    assert penalty.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_batch_times_accumulation_is_all_that_counts(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    found, logs = {}, {}
    for micro in (8, 4, 2):  # rows of unequal length, so that a mean of micro-batch means would differ
        config = tiny.train_config(batch_size=8, micro_batch=micro, epochs=2)
        logs[micro] = fine_tune(lm, tiny.encoded(lm), config, block_em(lm, dictionary), tmp_path / str(micro))
        found[micro] = tiny.weights(tmp_path / str(micro))
    for micro in (4, 2):
        for name, tensor in found[8].items():
            assert torch.allclose(found[micro][name], tensor, atol=1e-5), name
        for here, there in zip(logs[8], logs[micro], strict=True):
            assert here["sft_loss"] == pytest.approx(there["sft_loss"], rel=1e-4)
            assert here["penalty"] == pytest.approx(there["penalty"], rel=1e-3, abs=1e-7)
    assert logs[8][-1]["penalty"] > 0


def test_the_sft_loss_is_the_cross_entropy_of_the_supervised_tokens(lm: LanguageModel, tmp_path: Path) -> None:
    rows = tiny.encoded(lm)
    batch = right_padded(rows, lm.tokenizer.pad_token_id)
    with torch.inference_mode():
        logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
    for micro in (16, 4):
        log = fine_tune(lm, rows, tiny.train_config(batch_size=16, micro_batch=micro), Defence(), tmp_path / str(micro))
        assert log[0]["sft_loss"] == pytest.approx(float(expected), rel=1e-5)
        assert log[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_one_step_is_the_step_that_plain_pytorch_takes(lm: LanguageModel, tmp_path: Path) -> None:
    rows = tiny.encoded(lm)
    config = tiny.train_config(batch_size=16, micro_batch=4, schedule="constant", max_grad_norm=1e9)
    fine_tune(lm, rows, config, Defence(), tmp_path / "plain")
    model = add_lora(lm, config, range(tiny.N_BLOCKS), seed=0)
    batch = right_padded(rows, lm.tokenizer.pad_token_id)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, weight_decay=0.0)
    model(**batch).loss.backward()
    optimiser.step()
    expected = {name.replace(".default", ""): p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    lm.model = unwrapped(model.unload()).requires_grad_(False)
    found = tiny.weights(tmp_path / "plain")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("killed_at", [1, 3, 6])
def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one(
    lm: LanguageModel, dictionary: Dictionary, tmp_path: Path, killed_at: int
) -> None:
    # 16 rows in batches of 4: two epochs of four steps; a checkpoint after every second step
    config = tiny.train_config(batch_size=4, micro_batch=2, epochs=2, checkpoint_every=2, log_every=3, probe_every=2, warmup=0.25)
    rows = tiny.encoded(lm)
    whole = fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "whole", seed=5)

    def kill(step: int, _total: int) -> None:
        if step == killed_at:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "killed", seed=5, progress=kill)
    assert not (tmp_path / "killed").exists()
    assert tiny.hooks(lm) == 0
    scratch = tmp_path / "killed.making"
    checkpoint = last_checkpoint(scratch)
    assert (checkpoint.name if checkpoint else None) == {1: None, 3: "checkpoint-2", 6: "checkpoint-4"}[killed_at]
    files = [path for path in scratch.rglob("*") if path.is_file()]
    assert not {path.suffix for path in files} & PICKLES

    torch.rand(7)  # whatever happened in between
    steps: list[int] = []
    resumed = fine_tune(lm, rows, config, block_em(lm, dictionary), tmp_path / "killed", 5, lambda step, _: steps.append(step))
    assert steps == list(range(1 + (killed_at - 1) // 2 * 2, 9))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["killed", "whole"]
    assert resumed == whole


@pytest.mark.parametrize("checkpoint_every", [2, 100])
def test_a_run_that_is_killed_after_its_last_step_ends_the_same(lm: LanguageModel, tmp_path: Path, checkpoint_every: int) -> None:
    class KilledOnce(Defence):
        def __init__(self) -> None:
            self.left = 1

        def project(self, adapter: Path) -> None:
            self.left -= 1
            if self.left == 0:
                raise Killed

    config = tiny.train_config(batch_size=4, micro_batch=4, checkpoint_every=checkpoint_every)
    rows, defence = tiny.encoded(lm), KilledOnce()
    whole = fine_tune(lm, rows, config, Defence(), tmp_path / "whole")
    with pytest.raises(Killed):
        fine_tune(lm, rows, config, defence, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    assert fine_tune(lm, rows, config, defence, tmp_path / "killed") == whole
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_half_written_checkpoint_is_passed_over(lm: LanguageModel, tmp_path: Path) -> None:
    config = tiny.train_config(batch_size=4, micro_batch=4, checkpoint_every=1)
    rows = tiny.encoded(lm)
    fine_tune(lm, rows, config, Defence(), tmp_path / "whole")

    def kill(step: int, _total: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(lm, rows, config, Defence(), tmp_path / "killed", progress=kill)
    half = tmp_path / "killed.making" / "checkpoint-3"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    fine_tune(lm, rows, config, Defence(), tmp_path / "killed")
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_file_that_training_writes_is_a_pickle(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path) -> None:
    seen: set[str] = set()

    def look(_step: int, _total: int) -> None:
        seen.update(path.name for path in tmp_path.rglob("*") if path.is_file())

    config = tiny.train_config(batch_size=4, epochs=1, micro_batch=4, checkpoint_every=1)
    fine_tune(lm, tiny.encoded(lm), config, block_em(lm, dictionary), tmp_path / "blocked", progress=look)
    look(0, 0)
    assert {"optimizer.safetensors", "rng.safetensors", "trainer_state.json", "adapter_model.safetensors"} <= seen
    assert not {Path(name).suffix for name in seen} & PICKLES, seen


def test_the_base_model_is_left_as_it_was_also_after_an_exception(lm: LanguageModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}

    def kill(_step: int, _total: int) -> None:
        raise Killed

    for progress in (None, kill):
        try:
            fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(), Defence(), tmp_path / "plain", progress=progress)
        except Killed:
            assert progress is kill
        assert set(lm.model.state_dict()) == set(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
        assert not lm.model.training


def test_a_saved_adapter_loads_with_plain_peft(lm: LanguageModel, plain_adapter: Path, tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), plain_adapter).eval()
    ids = torch.arange(5, 25)[None]
    lm.add_adapter(plain_adapter, "plain")
    with torch.inference_mode(), lm.variant("plain"):
        assert torch.equal(plain(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    with torch.inference_mode(), lm.variant("base"):
        assert not torch.allclose(plain(input_ids=ids).logits, lm.model(input_ids=ids).logits)
