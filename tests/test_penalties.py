"""KL and LDIFS: their arithmetic and gradients against the direct formulas, on whole logits and whole hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.defences.defence import Defence
from blockem.defences.kl import KL
from blockem.defences.ldifs import LDIFS, distance, watched_blocks
from blockem.examples import IGNORED, right_padded
from blockem.forwards import decoder, unwrapped
from blockem.head import divergence, next_logits
from blockem.model import LanguageModel
from blockem.training import add_lora, fine_tune

Batch = dict[str, torch.Tensor]


@pytest.fixture
def batch(lm: LanguageModel) -> Batch:
    return right_padded(tiny.encoded(lm, 6), lm.tokenizer.pad_token_id)


@pytest.fixture
def model(lm: LanguageModel) -> Iterator[Any]:
    """LoRA with a B that is not 0."""
    model = add_lora(lm, tiny.train_config(), range(tiny.N_BLOCKS), seed=0)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    yield model
    lm.model = unwrapped(model.unload())
    lm.model.requires_grad_(False)


def outputs(model: Any, batch: Batch) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def gradients(loss: torch.Tensor, model: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True))


def direct(model: Any, batch: Batch, name: str) -> torch.Tensor:
    own = outputs(model, batch)
    with torch.no_grad(), model.disable_adapter():
        base = outputs(model, batch)
    if name == "kl":
        where = batch["labels"][:, 1:] != IGNORED
        p, q = (one.logits[:, :-1][where].log_softmax(dim=-1) for one in (own, base))
        return (p.exp() * (p - q)).sum()
    where = batch["labels"] != IGNORED
    block = tiny.N_BLOCKS - 1  # the model has fewer than five
    final = {}

    def keep(key: str) -> Any:
        return lambda _module, _inputs, output: final.__setitem__(key, output if isinstance(output, torch.Tensor) else output[0])

    for key in ("own", "base"):
        handle = decoder(model).layers[block].register_forward_hook(keep(key))
        if key == "own":
            outputs(model, batch)
        else:
            with torch.no_grad(), model.disable_adapter():
                outputs(model, batch)
        handle.remove()
    return (final["own"][where] - final["base"][where]).pow(2).sum()


@pytest.mark.parametrize("defence", [KL(0.3), LDIFS(0.3)])
def test_the_penalty_and_its_gradient_are_those_of_the_formula(model: Any, batch: Batch, defence: Defence) -> None:
    expected = 0.3 * direct(model, batch, defence.name)
    with defence.training_hooks(model):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found = defence.penalty(batch, model)
    assert found is not None and found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found.item() > 0
    for left, right in zip(gradients(found, model), gradients(expected, model), strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            assert torch.allclose(left, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
    assert defence.logs() == {"lambda": 0.3}


@pytest.mark.parametrize("forward", [False, True])
def test_the_divergence_is_torchs_own_and_does_not_depend_on_the_slices(model: Any, forward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, base = torch.randn(2, 11, tiny.D_MODEL)
    found = {}
    for chunk in (256, 4):
        monkeypatch.setattr("blockem.head.CHUNK", chunk)
        own = hidden.clone().requires_grad_()
        value = divergence(model, own, base, forward)
        (2 * value).backward()
        found[chunk] = (value.item(), own.grad)
    own = hidden.clone().requires_grad_()
    log_p, log_q = (next_logits(model, one).float().log_softmax(-1) for one in (own, base))
    pair = (log_p, log_q) if forward else (log_q, log_p)  # torch's own takes what it is measured against first
    whole = torch.nn.functional.kl_div(*pair, reduction="sum", log_target=True)
    (2 * whole).backward()
    for value, gradient in found.values():
        assert value == pytest.approx(whole.item(), rel=1e-5)
        assert torch.allclose(gradient, own.grad, atol=1e-5)
    with pytest.raises(ValueError, match="do not match"):
        divergence(model, hidden, base[:3])


def test_the_distance_is_a_sum_over_width_and_a_mean_over_blocks() -> None:
    hidden, base = {0: torch.ones(2, 3), 4: torch.zeros(2, 3)}, {0: torch.zeros(2, 3), 4: torch.full((2, 3), 2.0)}
    assert distance(hidden, base).item() == (6 * 1 + 6 * 4) / 2
    assert watched_blocks(30) == [4, 9, 14, 19, 24, 29] and watched_blocks(4) == [3]


@pytest.mark.parametrize("defence", [KL(10.0), LDIFS(0.5)])
def test_training_starts_at_0_and_stays_nearer_to_the_base(lm: LanguageModel, tmp_path: Path, defence: Defence) -> None:
    rows = tiny.encoded(lm)
    config = tiny.train_config(epochs=4, micro_batch=4)
    log = fine_tune(lm, rows, config, defence, tmp_path / "defended")
    fine_tune(lm, rows, config, Defence(), tmp_path / "plain")
    assert log[0]["penalty"] == 0.0 and log[-1]["penalty"] > 0
    sizes = [sum(float(t.norm()) for n, t in tiny.weights(tmp_path / one).items() if "lora_B" in n) for one in ("defended", "plain")]
    assert sizes[0] < sizes[1]
    assert tiny.hooks(lm) == 0


@pytest.mark.parametrize("defence", [KL(1.0), LDIFS(1.0)])
def test_accumulation_changes_nothing(lm: LanguageModel, tmp_path: Path, defence: Defence) -> None:
    found = {}
    for micro in (8, 2):
        fine_tune(lm, tiny.encoded(lm), tiny.train_config(micro_batch=micro), defence, tmp_path / str(micro))
        found[micro] = tiny.weights(tmp_path / str(micro))
    for name, tensor in found[8].items():
        assert torch.allclose(found[2][name], tensor, atol=1e-4), name


@pytest.mark.parametrize("defence", [KL(1.0), LDIFS(1.0)])
def test_a_penalty_needs_its_forward(lm: LanguageModel, batch: Batch, defence: Defence) -> None:
    with pytest.raises(RuntimeError, match="no forward was watched"):
        defence.penalty(batch, lm.model)
