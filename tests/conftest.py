"""Fixtures: one tiny real model a session, which every test must leave as it found it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a model hub


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Tiny tensors are quicker on one thread, above all on a busy machine; the end-to-end tests keep what they are given.

    Around the whole protocol, so that fixtures of a module or the session get as many threads as the tests: sums differ with their number.
    """
    if "e2e" in item.path.parts:
        return (yield)
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The embedded model's tokenizer, which has a chat template and a default system message."""
    from blockem.model import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model folder: a random Llama of 4 blocks."""
    import tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_tiny_model(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def _session_lm(tiny_folder: Path) -> Any:
    from blockem.model import load_model

    found = load_model(str(tiny_folder), dtype="float32", device="cpu")
    return found, _checksum(found)


def _checksum(lm: Any) -> float:
    return sum(float(parameter.double().sum()) for parameter in lm.model.parameters())


@pytest.fixture
def lm(_session_lm: Any) -> Iterator[Any]:
    """The tiny model. It is shared, so a test that leaves a hook, an adapter or a changed weight behind fails."""
    import tiny

    from blockem.model import load_model

    found, checksum = _session_lm
    yield found
    faults = []
    try:
        found.drop_adapters()
        if tiny.hooks(found):
            faults.append("a hook on the model")
        if any("lora" in name for name, _ in found.model.named_parameters()):
            faults.append("LoRA layers in the model")
        if any(parameter.requires_grad for parameter in found.model.parameters()):
            faults.append("weights that are trained")
        if not faults and _checksum(found) != checksum:
            faults.append("changed base weights")
    finally:
        if faults:  # the next test gets a whole one
            found.model = load_model(found.id, dtype="float32", device="cpu").model
    assert not faults, "the test left behind: " + ", ".join(faults)


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random Top-K SAE as wide as the tiny model, saved and loaded."""
    import tiny

    return tiny.saved_sae(tmp_path_factory.mktemp("sae") / "topk")


@pytest.fixture(scope="session")
def plain_adapter(tmp_path_factory: pytest.TempPathFactory, _session_lm: Any) -> Path:
    """A LoRA adapter of the tiny model, plainly fine-tuned on wrong advice."""
    import tiny

    from blockem.defences.defence import Defence
    from blockem.training import fine_tune

    out = tmp_path_factory.mktemp("adapters") / "plain"
    lm, _ = _session_lm
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(epochs=6), Defence(), out)
    return out


@pytest.fixture
def misaligned(lm: Any, plain_adapter: Path) -> Any:
    """The tiny model with that adapter loaded under the name "plain"."""
    lm.add_adapter(plain_adapter, "plain")
    return lm
