"""The output head at supervised positions: it is log_softmax, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from blockem.examples import right_padded
from blockem.head import CHUNK, supervised_logprobs, token_logprobs, watch_final
from blockem.model import LanguageModel


def reference(lm: LanguageModel, hidden: torch.Tensor, targets: torch.Tensor, cap: float | None = None) -> torch.Tensor:
    logits = hidden @ lm.model.get_output_embeddings().weight.T
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("n", [1, 7, CHUNK + 3])
def test_token_logprobs_is_log_softmax_in_value_and_gradient(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, n: int, cap: float | None
) -> None:
    if cap:  # as in Gemma 2
        monkeypatch.setattr(lm.model.config, "final_logit_softcapping", cap, raising=False)
    torch.manual_seed(n)
    targets = torch.randint(0, 49000, (n,))
    weight = torch.randn(n)
    values, gradients = [], []
    for function in (token_logprobs, lambda m, h, t: reference(lm, h, t, cap)):
        hidden = torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(n)).requires_grad_()
        found = function(lm.model, hidden, targets)
        (found * weight).sum().backward()
        values.append(found.detach())
        gradients.append(hidden.grad)
    assert torch.allclose(values[0], values[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_no_token_is_no_error(lm: LanguageModel) -> None:
    hidden = torch.zeros(0, tiny.D_MODEL, requires_grad=True)
    found = token_logprobs(lm.model, hidden, torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,)


def test_supervised_logprobs_are_those_of_the_models_own_logits(lm: LanguageModel) -> None:
    batch = right_padded(tiny.encoded(lm, 5), lm.tokenizer.pad_token_id)
    labels: Any = batch["labels"]
    with torch.inference_mode(), watch_final(lm.model) as seen:
        logits = lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked, rows = supervised_logprobs(lm.model, seen[0], labels)
    where = labels[:, 1:] != -100
    full = log_softmax(logits[:, :-1].float(), dim=-1)[where]
    expected = full.gather(1, labels[:, 1:][where][:, None])[:, 0]
    assert torch.allclose(picked, expected, atol=1e-5)
    assert rows.tolist() == where.nonzero()[:, 0].tolist()
    assert torch.bincount(rows).tolist() == where.sum(dim=1).tolist()
