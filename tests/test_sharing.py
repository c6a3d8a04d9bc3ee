"""Steps done once and adopted by content."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from blockem.errors import BlockemError
from blockem.sharing import SharingFolder, take
from blockem.store import claim_scratch, scratch_of

OUTPUTS = ["plain/adapter_model.safetensors", "training-plain.jsonl"]


def work_of(folder: SharingFolder, key: str, calls: list[str]) -> dict[str, Any]:
    calls.append(key)
    (folder / "plain").mkdir(parents=True, exist_ok=True)
    (folder / "plain/adapter_model.safetensors").write_text(key)
    (folder / "plain/adapter_config.json").write_text("{}")
    (folder / "training-plain.jsonl").write_text("row")
    return {"seconds": 3}


def train(folder: SharingFolder, key: str, calls: list[str]) -> tuple[Any, bool]:
    return folder.step("plain", key, OUTPUTS, lambda: work_of(folder, key, calls))


def test_a_step_with_the_same_key_is_adopted_with_all_its_files(tmp_path: Path) -> None:
    calls: list[str] = []
    one, two = (SharingFolder(tmp_path / name, tmp_path / "shared") for name in ("one", "two"))
    assert train(one, "k", calls) == ({"seconds": 3}, False)
    assert train(two, "k", calls) == ({"seconds": 3}, True)
    assert calls == ["k"]
    assert (two / "plain/adapter_config.json").read_text() == "{}"
    assert json.loads((two / "steps/plain.json").read_text()) == json.loads((one / "steps/plain.json").read_text())
    assert os.path.samefile(one / "plain/adapter_model.safetensors", two / "plain/adapter_model.safetensors")
    assert not os.path.samefile(one / "training-plain.jsonl", two / "training-plain.jsonl")
    assert not [p for p in tmp_path.rglob(".*")]


def test_another_key_is_other_work_and_replaces_what_was_adopted(tmp_path: Path) -> None:
    calls: list[str] = []
    one, two = (SharingFolder(tmp_path / name, tmp_path / "shared") for name in ("one", "two"))
    train(one, "k", calls)
    train(two, "k", calls)
    (two / "plain").rename(two / "old")  # a training renames its folder into place; it writes into none
    train(two, "other", calls)
    assert calls == ["k", "other"]
    assert (one / "plain/adapter_model.safetensors").read_text() == "k"
    train(two, "k", calls)
    assert calls == ["k", "other"] and (two / "plain/adapter_model.safetensors").read_text() == "k"


def test_a_run_killed_before_sharing_shares_when_it_goes_on_and_a_broken_entry_is_not_taken(tmp_path: Path) -> None:
    calls: list[str] = []
    one, two = (SharingFolder(tmp_path / name, tmp_path / "shared") for name in ("one", "two"))
    train(one, "k", calls)
    (tmp_path / "shared/plain-k/plain/adapter_model.safetensors").unlink()
    train(one, "k", calls)
    train(two, "k", calls)
    assert calls == ["k"]


def test_a_step_that_another_process_leaves_at_the_same_time_is_taken_as_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "shared/plain-k"

    def racing(source: Path, target: Path, parts: Any) -> None:
        take(source, target, parts)
        if target.name.startswith(".making-"):
            shutil.copytree(target, place)
            (place / "first").touch()

    monkeypatch.setattr("blockem.sharing.take", racing)
    calls: list[str] = []
    assert train(SharingFolder(tmp_path / "one", tmp_path / "shared"), "k", calls) == ({"seconds": 3}, False)
    assert (place / "first").is_file() and [one.name for one in (tmp_path / "shared").iterdir()] == ["plain-k"]
    assert train(SharingFolder(tmp_path / "two", tmp_path / "shared"), "k", calls) == ({"seconds": 3}, True) and calls == ["k"]


def test_a_step_that_another_run_is_at_is_waited_for_and_taken(tmp_path: Path) -> None:
    asked, said = threading.Event(), list[str]()

    def say(text: str) -> None:
        said.append(text)
        asked.set()

    one = SharingFolder(tmp_path / "one", tmp_path / "shared")
    two = SharingFolder(tmp_path / "two", tmp_path / "shared", say)
    calls: list[str] = []
    found: list[tuple[Any, bool]] = []
    second = threading.Thread(target=lambda: found.append(train(two, "k", calls)))

    def work() -> dict[str, Any]:
        second.start()
        assert asked.wait(30)
        return work_of(one, "k", calls)

    assert one.step("plain", "k", OUTPUTS, work) == ({"seconds": 3}, False)
    second.join(30)
    assert found == [({"seconds": 3}, True)] and calls == ["k"] and said == ["plain: another run is at it; waiting"]
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["plain-k"]


def test_a_run_whose_forerunner_fails_does_the_step_itself(tmp_path: Path) -> None:
    asked = threading.Event()
    one = SharingFolder(tmp_path / "one", tmp_path / "shared")
    two = SharingFolder(tmp_path / "two", tmp_path / "shared", lambda _: asked.set())
    calls: list[str] = []
    second = threading.Thread(target=lambda: train(two, "k", calls))

    def work() -> None:
        second.start()
        assert asked.wait(30)
        raise BlockemError("diverged")

    with pytest.raises(BlockemError, match="diverged"):
        one.step("plain", "k", OUTPUTS, work)
    second.join(30)
    assert calls == ["k"] and [path.name for path in (tmp_path / "shared").iterdir()] == ["plain-k"]


def test_what_a_killed_sibling_had_begun_is_gone_on_with(tmp_path: Path) -> None:
    one, two, three = (SharingFolder(tmp_path / "cells" / name, tmp_path / "shared") for name in ("one", "two", "three"))
    claim_scratch(scratch_of(one / "plain"), "k")
    (one / "plain.making/checkpoint").write_text("step 50")
    claim_scratch(scratch_of(two / "plain"), "another key")
    (one / "measurements.jsonl").write_text("{}")
    seen = []
    for name in ("plain", "discover"):
        three.step(name, "k", [], lambda: seen.append(sorted(str(path.relative_to(three.path)) for path in three.path.rglob("*"))))
    assert seen[0] == ["plain.making", "plain.making/checkpoint", "plain.making/key"] and "measurements.jsonl" in seen[1]
    assert not (one / "plain.making").exists() and (two / "plain.making").exists()


def test_other_steps_stay_with_their_run(tmp_path: Path) -> None:
    folder = SharingFolder(tmp_path / "one", tmp_path / "shared")
    folder.step("evaluate", "k", [], lambda: {})
    assert not (tmp_path / "shared").exists()
