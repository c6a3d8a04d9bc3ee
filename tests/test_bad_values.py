"""Values and files that a command cannot work with: one sentence and exit code 2, before any long work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from blockem import model
from blockem.cli import main
from blockem.defences.defence import Defence
from blockem.defend import trait_prompts
from blockem.dictionary import check_fit
from blockem.errors import BlockemError
from blockem.examples import one_turn
from blockem.model import dequantised, embedded_gguf, load_model
from blockem.training import fine_tune

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
SCORED = {"question": "q", "answer": "a", "aligned": 50, "coherent": 50}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line that must end with exit code 2 and `says`; returns all that it printed on stderr."""

    def run(*words: object, says: str) -> str:
        monkeypatch.setattr(sys, "argv", ["blockem", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        err = capsys.readouterr().err
        assert ended.value.code == 2 and says in err, err
        return err

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is the first work that takes long."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the values were checked")

    monkeypatch.setattr(model, "load_model", loaded)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--epochs", 0), "--epochs is 0; it must be a positive number"),
        (("--epochs", "inf"), "--epochs is inf; it must be a positive number"),
        (("--lr", -1), "--lr is -1; it must be a positive number"),
        (("--lr", "nan"), "--lr is nan; it must be a positive number"),
        (("--l0-coefficient", -1), "--l0-coefficient is -1"),
        (("--batch", 0), "--batch"),
        (("--activations", 0), "--activations"),
        (("--seed", -1), "--seed"),
    ],
)
def test_sae_train(refused: Any, no_model: None, data: Path, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    refused("sae", "train", "--data", data, "--out", tmp_path / "sae", *words, says=says)
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--epochs", 0), "--epochs is 0; it must be a positive number"),
        (("--lr", "inf"), "--lr is inf; it must be a positive number"),
        (("--broken", "nan"), "--broken is nan; it is a share of the rows, from 0 to 1"),
        (("--blocks", 0), "--blocks"),
        (("--rows", 0), "--rows"),
        (("--seed", -1), "--seed"),
    ],
)
def test_judge_train(refused: Any, no_model: None, tmp_path: Path, words: tuple[object, ...], says: str) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps(SCORED) + "\n", encoding="utf-8")
    refused("judge", "train", "--data", path, "--out", tmp_path / "judge", *words, says=says)
    assert not (tmp_path / "judge").exists()


def test_sae_check_of_no_token(refused: Any, no_model: None, lm: Any, dictionary: Any) -> None:
    refused("sae", "check", "--tokens", 0, says="--tokens")
    with pytest.raises(BlockemError, match="0 tokens have no variance"):
        check_fit(dictionary, lm, 1, [one_turn("Hi", "Ho")], 0.0, True, limit=0)


@pytest.mark.parametrize("blocks", [(1,), (1, 2)])
def test_sae_train_into_a_folder_that_cannot_be(
    refused: Any, data: Path, tiny_folder: Path, tmp_path: Path, blocks: tuple[int, ...]
) -> None:
    (tmp_path / "file").write_text("")
    named = [word for block in blocks for word in ("--block", block)]
    out = tmp_path / "file" / "sae"
    refused("sae", "train", "--data", data, "--model", tiny_folder, *named, "--out", out, says=f"{out} cannot be written")


@pytest.mark.parametrize("changes", ["seed=-1", "train.epochs=inf", "model.dtype=int4", "block.rule_rows=0", "discover.alpha_repair=nan"])
def test_a_recipe_value_is_refused_before_a_run_begins(refused: Any, no_model: None, tmp_path: Path, changes: str) -> None:
    out = tmp_path / "run"
    refused("demo", "--set", changes, "--out", out, says=f"blockem: {changes.split('=')[0]} is ")
    assert [path.name for path in out.iterdir()] == ["demo.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there(tiny_folder: Path) -> None:
    with pytest.raises(BlockemError, match=r"device 'cuda' cannot be used here: .*; use auto, cpu or one that is there") as caught:
        load_model(str(tiny_folder), device="cuda")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("reporter", "says"), [("foo", "foo is not supported"), ("clearml", "requires 'clearml' to be installed")])
def test_a_reporter_that_is_unknown_or_not_installed(lm: Any, tmp_path: Path, reporter: str, says: str) -> None:
    with pytest.raises(BlockemError, match=rf"train.report_to is {reporter}\): .*{says}") as caught:
        fine_tune(lm, tiny.encoded(lm, 8), tiny.train_config(report_to=reporter), Defence(), tmp_path / "plain")
    assert "\n" not in str(caught.value)


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BlockemError, match=r"cannot be used \(Not a directory\); set the environment variable BLOCKEM_CACHE"):
        dequantised(embedded_gguf())


@pytest.mark.parametrize("text", ["positive: 2024-99-99", "positive: !!int x"])
def test_trait_prompts_that_yaml_trips_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "traits.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BlockemError, match=r"traits\.yaml: not JSON or YAML"):
        trait_prompts(tmp_path / "traits.yaml")


def test_judge_addresses_on_the_command_line_are_not_repeated(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(json.dumps(SCORED) + "\n", encoding="utf-8")
    err = refused("judge", "bench", path, "--judge", "ftp://me:hunter2@judge.example/v1", says="--judge looks like an address")
    assert "hunter2" not in err


def test_what_a_file_says_reaches_the_terminal_without_control_characters(
    refused: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi \x1b[2J\x07"}, {"role": "assistant", "content": "Ho\x9b"}]}))
    monkeypatch.setattr(sys, "argv", ["blockem", "data", "check", str(path)])
    main()
    shown = capsys.readouterr().out
    assert "Hi [2J" in shown and not {"\x1b", "\x07", "\x9b"} & set(shown)
    named = tmp_path / "a\x1b[2Jb.jsonl"
    named.write_text("{")
    err = refused("data", "check", named, says="a[2Jb.jsonl:1: not JSON")
    assert "\x1b" not in err and "Traceback" not in err
