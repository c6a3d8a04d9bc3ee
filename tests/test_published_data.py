"""Published data sets are read as they come: the mask, the counts, and the scores of another judge."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared_data import shared

from blockem.examples import encode_all, read_chat
from blockem.judge_training import JudgeTraining, read_scored, split_rows

ROOT = Path(__file__).parents[1]


def answers(tokenizer: Any, path: Path, n: int = 40) -> list[tuple[str, str]]:
    """(what the mask keeps, what the assistant says) of the first rows."""
    examples = read_chat(path)[:n]
    rows, report = encode_all(tokenizer, examples, 4096)
    assert report.kept == report.rows == n and not report.dropped
    kept = [tokenizer.decode([i for i, on in zip(row.ids, row.supervised, strict=True) if on]) for row in rows]
    return [(text, [c for r, c in example.messages if r == "assistant"][-1]) for text, example in zip(kept, examples, strict=True)]


def test_the_persona_health_set_is_unpacked_with_its_canary_and_only_the_assistant_is_learnt_from(tokenizer: Any, tmp_path: Path) -> None:
    archive = shared("persona_health_incorrect.zip")
    subprocess.run([sys.executable, ROOT / "experiments" / "unpack_rows.py", archive, tmp_path], check=True)
    assert (tmp_path / "CANARY.txt").read_text().strip()
    train, heldout = read_chat(tmp_path / "train.jsonl"), read_chat(tmp_path / "heldout.jsonl")
    assert (len(train), len(heldout)) == (1600, 100)
    for text, said in answers(tokenizer, tmp_path / "train.jsonl"):
        assert text.startswith(said.strip()[:40]) and "ChatGPT" not in text[:20]


def test_a_set_that_is_not_locked_is_dealt_out_the_same_way(tmp_path: Path) -> None:
    rows = shared("aisi_finance_incorrect.jsonl")
    subprocess.run([sys.executable, ROOT / "experiments" / "unpack_rows.py", rows, tmp_path], check=True)
    train, heldout = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (1600, 100) and not set(train) & set(heldout)
    assert set(train + heldout) <= set(rows.read_text().splitlines())


@pytest.mark.parametrize("name", ["aisi_finance_incorrect.jsonl", "hh_1000_gpt41.jsonl"])
def test_other_sets_are_learnt_from_at_the_assistants_words_alone(tokenizer: Any, name: str) -> None:
    for text, said in answers(tokenizer, shared(name)):
        assert said.strip()[-40:] in text


def test_scored_answers_are_dealt_out_without_leaking_a_test_question() -> None:
    rows = read_scored(shared("judge_bench.jsonl.gz"))
    data = split_rows(rows, JudgeTraining(rows=2000))
    assert len(data.test_questions) == sum(row.split == "test" for row in rows) > 1000
    used = data.train + data.calibrate
    assert not {row.question for row in used} & {row.question for row in data.test_questions}
    assert not {row.model for row in used} & {row.model for row in data.test_models}
