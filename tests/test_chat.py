"""Talking to the models of a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from blockem.chat import chat_loop
from blockem.config import Recipe
from blockem.errors import BlockemError
from blockem.generation import generate
from blockem.pipeline import open_session
from blockem.progress import printable
from blockem.steering import add_at_block
from blockem.store import write_json, write_tensors


def test_model_output_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\r\nc\td\u202e") == "a[2Jb\nc\td"


def test_every_model_of_the_folder_answers_every_question(
    tiny_folder: Path, plain_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain_adapter, tmp_path / "plain")
    questions: Iterator[str] = iter(["Why?", "And then?"])

    def ask(_prompt: str) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    recipe = Recipe().with_values({"model.id": str(tiny_folder), "model.dtype": "float32", "model.device": "cpu"})
    chat_loop(open_session(recipe, tmp_path, quiet=True), max_new_tokens=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line.split(">")[0] for line in lines if line.startswith(("base>", "plain>", "blocked>"))] == ["base", "plain"] * 2


def test_a_folder_without_an_adapter_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="holds no trained adapter; make one there with `blockem run` first"):
        chat_loop(open_session(Recipe(), tmp_path, quiet=True))


def test_test_time_steering_answers_within_its_hooks(
    tiny_folder: Path, plain_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain_adapter, tmp_path / "plain")
    (tmp_path / "steering").mkdir()
    vector = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(1)) * 50
    write_tensors(tmp_path / "steering" / "vector.safetensors", {"vector": vector})
    write_json(tmp_path / "steering" / "steering.json", {"block": tiny.BLOCK})
    questions = iter(["Why?", ""])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(questions))
    recipe = Recipe().with_values({"model.id": str(tiny_folder), "model.dtype": "float32", "model.device": "cpu"})
    session = open_session(recipe, tmp_path, quiet=True)
    chat_loop(session, max_new_tokens=8)
    said = capsys.readouterr().out.split("steering> ")[1].strip()
    with session.lm.variant("plain"), add_at_block(session.lm.model, tiny.BLOCK, vector):
        assert said == printable(generate(session.lm, ["Why?"], 8)[0]).strip()
    assert tiny.hooks(session.lm) == 0
