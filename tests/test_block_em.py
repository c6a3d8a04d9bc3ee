"""The penalty: its formula by hand, where it has a gradient, and the Blocker in a plain PyTorch loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem import Blocker, block_loss
from blockem.defences.block_em import BlockEM, penalty_of, portable_lambda
from blockem.defences.defence import Defence
from blockem.dictionary import Dictionary, EncoderRows
from blockem.errors import BlockemError
from blockem.examples import IGNORED, right_padded
from blockem.forwards import hidden_at, unwrapped
from blockem.model import LanguageModel
from blockem.training import add_lora, fine_tune

SIGNS = (1, -1, 1, -1)
IDS = (3, 7, 11, 19)


def batch_of(lm: LanguageModel, n: int = 8) -> dict[str, torch.Tensor]:
    return right_padded(tiny.encoded(lm, n), lm.tokenizer.pad_token_id)


def lora_model(lm: LanguageModel, random_b: bool = False, trained: range = range(tiny.N_BLOCKS)) -> Any:
    model = add_lora(lm, tiny.train_config(), trained, seed=0)
    if random_b:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
    return model


def released(lm: LanguageModel, model: Any) -> None:
    lm.model = unwrapped(model.unload())
    lm.model.requires_grad_(False)


def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.fixture
def blocker(dictionary: Dictionary) -> Blocker:
    return Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK)


# the formula


def test_the_penalty_is_the_published_formula() -> None:
    z = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 4.0]])
    base = torch.tensor([[0.5, 3.0, 1.0], [5.0, 0.5, 1.0]])
    signs = torch.tensor([1.0, -1.0, -1.0])
    # token 0: relu(1 - .5)^2 + relu(3 - 2)^2 + relu(1 - 0)^2; token 1: relu(3 - 5)^2 + 0 + relu(1 - 4)^2
    assert block_loss(z, base, signs).tolist() == [0.25 + 1.0 + 1.0, 0.0]


def test_the_penalty_is_one_sided() -> None:
    base = torch.ones(1, 2)
    signs = torch.tensor([1.0, -1.0])
    assert block_loss(torch.tensor([[0.0, 2.0]]), base, signs).item() == 0.0
    assert block_loss(torch.tensor([[2.0, 0.0]]), base, signs).item() == 2.0


def test_the_base_side_has_no_gradient() -> None:
    z, base = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    block_loss(z, base, torch.ones(3)).sum().backward()
    assert base.grad is None
    assert torch.equal(z.grad, torch.full((2, 3), 2.0))


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        block_loss(torch.zeros(2, 3), torch.zeros(2, 2), torch.ones(3))
    with pytest.raises(ValueError, match="do not match"):
        block_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))


def test_a_lowered_latent_that_is_already_off_has_a_penalty_but_no_gradient() -> None:
    rows = EncoderRows(torch.tensor([[1.0, 0.0]]), torch.zeros(1))
    base = torch.tensor([[2.0, 0.0]])
    signs = torch.tensor([-1.0])
    off = torch.tensor([[-0.5, 0.0]], requires_grad=True)
    loss = block_loss(rows.encode(off), rows.encode(base), signs).sum()
    (gradient,) = torch.autograd.grad(loss, off)
    assert loss.item() == 4.0
    assert torch.equal(gradient, torch.zeros(1, 2))
    # the pre-activation variant pulls it back
    loss = block_loss(rows.pre(off), rows.pre(base), signs).sum()
    (gradient,) = torch.autograd.grad(loss, off)
    assert loss.item() == 6.25
    assert gradient.tolist() == [[-5.0, 0.0]]


def test_the_measure_chooses_between_the_two(lm: LanguageModel, dictionary: Dictionary) -> None:
    model = lora_model(lm, random_b=True)
    batch = batch_of(lm)
    found = {}
    for measure in ("latent", "preactivation"):
        with Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK, measure).attached(model) as blocker:
            forward(model, batch)
            found[measure] = blocker.penalty(batch).item()
    assert 0 < found["latent"] < found["preactivation"]
    with pytest.raises(BlockemError, match=r"unknown block\.measure 'z': use latent or preactivation"):
        Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK, "z")
    released(lm, model)


# on a model


def test_the_penalty_is_that_of_the_formula_on_the_models_own_hidden_states(
    lm: LanguageModel, dictionary: Dictionary, blocker: Blocker
) -> None:
    batch = batch_of(lm)
    where = batch["labels"] != IGNORED
    with torch.no_grad():
        base = dictionary.encode(hidden_at(lm.model, batch["input_ids"], batch["attention_mask"], tiny.BLOCK)[where])[:, list(IDS)]
    model = lora_model(lm, random_b=True)
    with blocker.attached(model):
        forward(model, batch)
        found = blocker.penalty(batch)
        with torch.no_grad():
            moved = dictionary.encode(hidden_at(model, batch["input_ids"], batch["attention_mask"], tiny.BLOCK)[where])[:, list(IDS)]
            assert torch.allclose(blocker.base_values(batch), base, atol=1e-5)
        expected = sum(
            float((moved[:, i] - base[:, i]).clamp_min(0).pow(2).sum() if s > 0 else (base[:, i] - moved[:, i]).clamp_min(0).pow(2).sum())
            for i, s in enumerate(SIGNS)
        )
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert found.dtype == torch.float32
        forward(model, batch)
        assert blocker.mean_penalty(batch).item() == pytest.approx(expected / int(where.sum()), rel=1e-4)
    released(lm, model)


def test_only_supervised_tokens_count(lm: LanguageModel, blocker: Blocker) -> None:
    model = lora_model(lm, random_b=True)
    batch = batch_of(lm)
    none = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    with blocker.attached(model):
        forward(model, none)
        assert blocker.penalty(none).item() == 0.0
        forward(model, none)
        assert blocker.mean_penalty(none).item() == 0.0
    released(lm, model)


def test_blocks_after_the_blocked_one_get_no_gradient(lm: LanguageModel, blocker: Blocker) -> None:
    model = lora_model(lm, random_b=True)
    batch = batch_of(lm)
    with blocker.attached(model):
        forward(model, batch)
        blocker.penalty(batch).backward()
    norms = dict.fromkeys(range(tiny.N_BLOCKS), 0.0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = int(name.split(".layers.")[1].split(".")[0])
            norms[block] += 0.0 if parameter.grad is None else float(parameter.grad.norm())
    assert norms[0] > 0 and norms[tiny.BLOCK] > 0
    assert all(norms[block] == 0.0 for block in range(tiny.BLOCK + 1, tiny.N_BLOCKS))
    released(lm, model)


def test_base_values_do_not_depend_on_the_adapter(lm: LanguageModel, blocker: Blocker) -> None:
    batch = batch_of(lm)
    model = lora_model(lm)
    with blocker.attached(model):
        before = blocker.base_values(batch)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.5
        assert torch.equal(blocker.base_values(batch), before)
    released(lm, model)


def test_an_evaluation_without_gradient_in_between_is_not_taken_for_the_forward(lm: LanguageModel, blocker: Blocker) -> None:
    model = lora_model(lm, random_b=True)
    batch, other = batch_of(lm), batch_of(lm, 3)
    with blocker.attached(model):
        forward(model, batch)
        with torch.no_grad():
            forward(model, other)
        assert blocker.penalty(batch).item() > 0
    released(lm, model)


# used wrongly


def test_an_unattached_blocker_says_how_to_attach_it(lm: LanguageModel, blocker: Blocker) -> None:
    batch = batch_of(lm, 2)
    with pytest.raises(RuntimeError, match="attach the Blocker"):
        blocker.base_values(batch)
    with pytest.raises(RuntimeError, match="no forward was watched"):
        blocker.penalty(batch)


def test_a_penalty_is_of_one_forward_and_its_own_batch(lm: LanguageModel, blocker: Blocker) -> None:
    model = lora_model(lm)
    batch, other = batch_of(lm, 4), batch_of(lm, 3)
    with blocker.attached(model):
        forward(model, batch)
        blocker.penalty(batch)
        with pytest.raises(RuntimeError, match="no forward was watched"):
            blocker.penalty(batch)
        forward(model, batch)
        with pytest.raises(ValueError, match="the last forward saw"):
            blocker.penalty(other)
    with pytest.raises(RuntimeError, match="no forward was watched"):
        blocker.penalty(batch)
    released(lm, model)


def test_a_model_without_adapters_needs_a_frozen_base(lm: LanguageModel, blocker: Blocker) -> None:
    with pytest.raises(BlockemError, match=r"give Blocker\(base=a frozen copy\), or train with PEFT"), blocker.attached(lm.model):
        pass


# in a plain PyTorch loop


def train(model: Any, parameters: list[Any], batch: dict[str, torch.Tensor], blocker: Blocker, lambda_: float) -> tuple[float, float]:
    """Loss and penalty per token after a few steps."""
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    with blocker.attached(model):
        for _ in range(12):
            loss = model(**batch).loss
            penalty = blocker.mean_penalty(batch)
            (loss + lambda_ * penalty).backward()
            optimiser.step()
            optimiser.zero_grad()
    return loss.item(), penalty.item()


def test_a_plain_loop_with_lora_learns_under_a_lower_penalty(lm: LanguageModel, dictionary: Dictionary) -> None:
    batch = batch_of(lm)
    found = {}
    for lambda_ in (0.0, 1000.0):
        model = lora_model(lm)
        start = model(**batch).loss.item()
        blocker = Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK)
        found[lambda_] = train(model, [p for p in model.parameters() if p.requires_grad], batch, blocker, lambda_)
        released(lm, model)
    assert found[1000.0][1] < 0.2 * found[0.0][1]
    assert found[0.0][0] < start
    assert found[1000.0][0] < start


def test_a_plain_loop_without_adapters_compares_with_a_frozen_copy(lm: LanguageModel, dictionary: Dictionary) -> None:
    batch = batch_of(lm)
    found = {}
    for lambda_ in (0.0, 1000.0):
        model = copy.deepcopy(lm.model).requires_grad_(True)
        blocker = Blocker(dictionary.rows(IDS), SIGNS, tiny.BLOCK, base=lm.model)
        with blocker.attached(model):
            forward(model, batch)
            assert blocker.mean_penalty(batch).item() == 0.0
        found[lambda_] = train(model, list(model.parameters()), batch, blocker, lambda_)
        assert not tiny.hooks(LanguageModel(model, lm.tokenizer, "", ""))
    assert found[1000.0][1] < 0.2 * found[0.0][1]


# λ


def test_the_portable_rule_is_r_times_the_gain_over_the_penalty() -> None:
    assert portable_lambda(100, 0.5, 0.25) == 200
    assert portable_lambda(100, 1.00000001, 3.0) == 33.3  # last digits, which may differ between processes, do not reach it
    assert portable_lambda(100, -0.5, 0.25) == 0
    with pytest.raises(BlockemError, match="moves none of the blocked latents"):
        portable_lambda(100, 0.5, 0.0)
    with pytest.raises(BlockemError, match="moves none"):
        portable_lambda(100, 0.5, float("nan"))


@pytest.mark.parametrize("measure", ["latent", "preactivation"])
def test_penalty_of_an_adapter_is_what_the_trainer_counts(lm: LanguageModel, dictionary: Dictionary, tmp_path: Path, measure: str) -> None:
    rows = tiny.encoded(lm)
    config = tiny.train_config(batch_size=16, micro_batch=4, schedule="constant")
    latents = tiny.latent_set(lm, dictionary, IDS)
    logs = {}
    for epochs in (1, 2):  # one step an epoch: the second run's second step starts where the first run ended
        blocker = Blocker.from_latents(latents, dictionary, measure)
        defence = BlockEM(blocker, 5.0, p_mis=0.5)
        logs[epochs] = fine_tune(lm, rows, tiny.train_config(**{**vars(config), "epochs": epochs}), defence, tmp_path / str(epochs))
    lm.add_adapter(tmp_path / "1", "plain")
    found = penalty_of(lm, "plain", Blocker.from_latents(latents, dictionary, measure), rows, batch=3)
    assert found > 0
    assert logs[1][0]["penalty"] == 0.0
    assert logs[2][1]["penalty"] == pytest.approx(found, rel=1e-4)
    assert logs[2][1]["penalty_share"] == pytest.approx(found / 0.5, rel=1e-4)
    assert logs[2][1]["loss"] == pytest.approx(logs[2][1]["sft_loss"] + 5.0 * found, rel=1e-3)
    assert penalty_of(lm, "base", Blocker.from_latents(latents, dictionary, measure), rows) == 0.0


# the slots


def test_a_defence_that_fills_no_slot_does_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    none = Defence()
    rows = tiny.rows()
    assert none.rewrite(rows) is rows
    assert list(none.trained_blocks(4)) == [0, 1, 2, 3]
    assert none.penalty({}, lm.model) is None
    assert none.logs() == {}
    none.project(tmp_path)
    with none.training_hooks(lm.model), none.inference_hooks(lm.model):
        assert tiny.hooks(lm) == 0


def test_block_em_freezes_what_lies_behind_unless_told_otherwise(blocker: Blocker) -> None:
    assert list(BlockEM(blocker, 1.0).trained_blocks(4)) == [0, 1]
    assert list(BlockEM(blocker, 1.0, freeze_downstream=False).trained_blocks(4)) == [0, 1, 2, 3]
