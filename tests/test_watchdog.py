"""The monitor's numbers by hand, its warning, and latents that are added while a training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem.config import Recipe
from blockem.defences.block_em import BlockEM, Blocker
from blockem.defences.defence import Defence
from blockem.defences.together import Together
from blockem.defences.watchdog import Watchdog
from blockem.dictionary import Dictionary
from blockem.discovery.attribution import margin_gradient
from blockem.errors import BlockemError
from blockem.model import LanguageModel
from blockem.reemergence.audit import audit
from blockem.reemergence.monitor import Monitor, Reading
from blockem.training import fine_tune

LATENTS = [(3, 1), (7, -1), (11, 1), (19, -1)]


@pytest.fixture
def plain(lm: LanguageModel, tmp_path: Path) -> Path:
    fine_tune(lm, tiny.encoded(lm), tiny.train_config(epochs=3), Defence(), tmp_path / "plain")
    return tmp_path / "plain"


def monitor_of(lm: LanguageModel, dictionary: Dictionary, plain: Path) -> Monitor:
    lm.add_adapter(plain, "plain")
    gradient = margin_gradient(lm, tiny.pairs(), tiny.BLOCK, "plain")
    found = Monitor(lm, tiny.encoded(lm, 5), tiny.BLOCK, dictionary, gradient)
    lm.drop_adapters()
    return found


def watched(lm: LanguageModel, dictionary: Dictionary, monitor: Monitor, **options: Any) -> tuple[Together, Watchdog]:
    blocker = Blocker(dictionary.rows([k for k, _ in LATENTS]), [s for _, s in LATENTS], tiny.BLOCK)
    dog = Watchdog(blocker, monitor, dictionary, LATENTS, **options)
    return Together([BlockEM(blocker, 10.0), dog]), dog


def test_it_reads_what_the_audit_reads(lm: LanguageModel, dictionary: Dictionary, plain: Path) -> None:
    monitor = monitor_of(lm, dictionary, plain)
    lm.add_adapter(plain, "plain")
    with lm.variant("plain"):
        itself = monitor.read(lm.model, *zip(*LATENTS, strict=True))
    with lm.variant("base"):
        base = monitor.read(lm.model, *zip(*LATENTS, strict=True))
    latents = tiny.latent_set(lm, dictionary)
    found = audit(lm, tiny.encoded(lm, 5), ["plain"], tiny.BLOCK, dictionary, {"plain": latents})
    lm.drop_adapters()
    assert (itself.survives, itself.off_k, itself.blocked) == pytest.approx((1.0, 1.0, 0.0), abs=1e-5)
    assert (base.survives, base.off_k) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert itself.off_k == pytest.approx(found.rerouting["plain"].off_k, abs=1e-5)


def test_rerouting_is_a_blocked_set_and_a_surviving_shift() -> None:
    deltas = torch.zeros(3)
    assert Reading(0.9, 2.0, 0.8, deltas).rerouted
    assert not Reading(0.9, 2.0, 0.3, deltas).rerouted and not Reading(0.1, 1.0, 0.8, deltas).rerouted
    said = Reading(0.9, 2.0, 0.8, deltas).sentence(40)
    assert "step 40" in said and "90%" in said and "80%" in said and "200%" in said


def test_what_it_would_add_raises_the_margin_and_is_not_blocked_already(lm: LanguageModel, dictionary: Dictionary, plain: Path) -> None:
    monitor = monitor_of(lm, dictionary, plain)
    lm.add_adapter(plain, "plain")
    with lm.variant("plain"):
        reading = monitor.read(lm.model, *zip(*LATENTS, strict=True))
    lm.drop_adapters()
    known = [k for k, _ in LATENTS]
    new = monitor.toward(reading, known, 5)
    assert 1 <= len(new) <= 5 and not {k for k, _ in new} & set(known)
    assert monitor.gradient is not None
    gains = [float(reading.deltas[k] * (dictionary.directions([k])[0].double() @ monitor.gradient.double())) for k, _ in new]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert all(sign * float(reading.deltas[k]) > 0 for k, sign in new)


def test_looking_changes_nothing_in_the_training(lm: LanguageModel, dictionary: Dictionary, plain: Path, tmp_path: Path) -> None:
    monitor, rows, config = monitor_of(lm, dictionary, plain), tiny.encoded(lm), tiny.train_config(epochs=2)
    both, _ = watched(lm, dictionary, monitor, every=1)
    log = fine_tune(lm, rows, config, both, tmp_path / "watched")
    fine_tune(lm, rows, config, both.parts_of[0], tmp_path / "alone")
    for name, tensor in tiny.weights(tmp_path / "watched").items():
        torch.testing.assert_close(tensor, tiny.weights(tmp_path / "alone")[name], rtol=0, atol=0)
    assert all("monitor_survives" in row and "penalty" in row for row in log)


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "rerouted", property(lambda _self: True))


def test_it_warns_once_and_grows_the_blocked_set(
    lm: LanguageModel, dictionary: Dictionary, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    said: list[str] = []
    added: list[tuple[int, list[tuple[int, int]]]] = []
    both, dog = watched(
        lm, dictionary, monitor_of(lm, dictionary, plain), every=2, grow=3, warn=said.append, added=lambda *one: added.append(one)
    )
    log = fine_tune(lm, tiny.encoded(lm), tiny.train_config(epochs=2), both, tmp_path / "grown")
    assert len(said) == 1 and [step for step, _ in added] == [2, 4]
    assert len(dog.latents) == len(set(dog.latents)) == 4 + sum(len(new) for _, new in added) == len(dog.blocker.signs)
    assert log[-1]["blocked_latents"] == len(dog.latents) > 4


class Killed(BaseException):
    """Stops a training where a kill would."""


def test_a_killed_growing_run_ends_like_one_that_was_not(
    lm: LanguageModel, dictionary: Dictionary, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    monitor, rows, config = monitor_of(lm, dictionary, plain), tiny.encoded(lm), tiny.train_config(epochs=3, checkpoint_every=1)
    both, whole = watched(lm, dictionary, monitor, every=2, grow=2)
    fine_tune(lm, rows, config, both, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise Killed

    both, _ = watched(lm, dictionary, monitor, every=2, grow=2)
    with pytest.raises(Killed):
        fine_tune(lm, rows, config, both, tmp_path / "killed", progress=stop)
    added: list[int] = []
    both, dog = watched(lm, dictionary, monitor, every=2, grow=2, added=lambda step, _new: added.append(step))
    fine_tune(lm, rows, config, both, tmp_path / "killed")
    assert dog.latents == whole.latents and added == [step for step, _ in whole.grown]
    for name, tensor in tiny.weights(tmp_path / "killed").items():
        torch.testing.assert_close(tensor, tiny.weights(tmp_path / "whole")[name], rtol=1e-5, atol=1e-6)


def test_a_block_that_is_not_watched_cannot_grow(dictionary: Dictionary) -> None:
    blocker = Blocker(dictionary.rows([3]), [1], tiny.BLOCK)
    with pytest.raises(ValueError, match="not among the watched"):
        blocker.grow(dictionary.rows([4]), [1], tiny.BLOCK + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block.grow": 4}, "set block.monitor_every too"),
        ({"block.monitor_every": -1}, "use 0 for never"),
        ({"block.monitor_every": 5, "block.directions": 2}, "does not go with"),
        ({"rounds.budget": 2, "block.control": "random"}, "set rounds.budget=1"),
        ({"rounds.budget": 2, "block.directions": 2}, "set rounds.budget=1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BlockemError, match=said):
        Recipe().with_values(changes)
