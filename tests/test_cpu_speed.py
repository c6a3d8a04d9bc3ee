"""Which number format a CPU is fastest in: by its flags where they settle it, else measured once and kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockem import cpu_speed


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor with AVX512-BF16 and without matrix tiles."""
    cpu_speed.fast_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(("gain", "fast"), [(2.0, True), (1.4, True), (0.6, False)])
def test_what_was_measured_decides_and_is_kept(flags: pytest.MonkeyPatch, tmp_path: Path, gain: float, fast: bool) -> None:
    flags.setattr(cpu_speed, "gain_of_bfloat16", lambda: gain)
    assert cpu_speed.fast_bfloat16(tmp_path) is fast
    cpu_speed.fast_bfloat16.cache_clear()
    flags.setattr(cpu_speed, "gain_of_bfloat16", lambda: pytest.fail("measured twice"))
    assert cpu_speed.fast_bfloat16(tmp_path) is fast
    (kept,) = tmp_path.glob("bfloat16-*.json")
    assert json.loads(kept.read_text())["gain"] == gain


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"gain": null}'])
def test_a_damaged_answer_is_measured_again(flags: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    flags.setattr(cpu_speed, "gain_of_bfloat16", lambda: 2.0)
    cpu_speed.fast_bfloat16(tmp_path)
    (kept,) = tmp_path.glob("bfloat16-*.json")
    kept.write_text(damage)
    cpu_speed.fast_bfloat16.cache_clear()
    assert cpu_speed.fast_bfloat16(tmp_path) is True
    assert json.loads(kept.read_text())["gain"] == 2.0


def test_a_folder_that_cannot_be_written_only_costs_the_measurement(flags: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags.setattr(cpu_speed, "gain_of_bfloat16", lambda: 0.5)
    (tmp_path / "file").write_text("")
    assert cpu_speed.fast_bfloat16(tmp_path / "file") is False


def test_flags_settle_it_without_a_measurement(flags: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags.setattr(cpu_speed, "gain_of_bfloat16", lambda: pytest.fail("measured"))
    flags.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert cpu_speed.fast_bfloat16(tmp_path) is False
    cpu_speed.fast_bfloat16.cache_clear()
    flags.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_speed.fast_bfloat16(tmp_path) is True


def test_the_measurement_itself_is_a_positive_ratio() -> None:
    assert 0.01 < cpu_speed.gain_of_bfloat16() < 100
