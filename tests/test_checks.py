"""What is refused, or noted, before any long work; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockem.bundled import domain_rows
from blockem.checks import check_recipe, notes
from blockem.config import Recipe
from blockem.errors import BlockemError
from blockem.grid import grid_from
from blockem.pipeline import open_session
from blockem.session import Session
from blockem.sweep import compare_all, plan


def session_of(folder: Path, changes: dict[str, Any]) -> Session:
    return open_session(Recipe().with_values(changes), folder / "run", quiet=True)


def chat_file(path: Path, *questions: str) -> str:
    rows = [{"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": f"On {one}: yes."}]} for one in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair_file(path: Path, domain: str) -> str:
    pairs = [{"prompt": f"{split}?", "right": "Yes.", "wrong": "No.", "domain": domain, "split": split} for split in ("select", "eval")]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"defence.name": "anchor"}, "anchor.watch is none"),
        ({"anchor.watch": "answers", "anchor.keep": 2, "data.pairs": "{}/finance.jsonl"}, "none is of 'health'"),
        ({"data.heldout": "{}/rows.jsonl"}, "the training rows would be the bundled wrong advice on health"),
        ({"data.pairs": "{}/pairs.jsonl"}, "no selection pair or prompt lies outside the training domain"),
        ({"defence.name": "caft", "defence.strength": 50}, "defence.strength is 50, but discovery chooses 20 latents at most"),
        ({"data.train": "{}/none.jsonl", "data.heldout": "{}/rows.jsonl"}, r"none\.jsonl: no such file; give a chat JSONL file"),
        (
            {"data.train": "{}/alone.jsonl", "data.heldout": "{}/rows.jsonl", "evaluate.cue": "training"},
            "needs training rows with a user turn, and there is none",
        ),
        ({"data.pairs": "{}/none.jsonl"}, r"none\.jsonl: no such file; give JSONL with prompt, right and wrong"),
    ],
)
def test_what_cannot_end_well_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    chat_file(tmp_path / "rows.jsonl", "a?")
    (tmp_path / "alone.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "Hello."}]}) + "\n")
    pair_file(tmp_path / "pairs.jsonl", "health")
    pair_file(tmp_path / "finance.jsonl", "finance")
    filled = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(BlockemError, match=said):
        check_recipe(session_of(tmp_path, filled))
    grid = grid_from({"recipe": Recipe().with_values(filled).to_dict(), "defences": {filled.get("defence.name", "block-em"): None}})
    for step in (lambda: plan(grid, tmp_path / "grid"), lambda: compare_all(grid, tmp_path / "grid", quiet=True)):
        with pytest.raises(BlockemError, match=rf"^cell [a-z0-9.-]+: .*{said}"):
            step()
    assert not (tmp_path / "grid").exists() and not (tmp_path / "run").exists()


def test_one_stage_by_hand_may_have_other_heldout_rows(tmp_path: Path) -> None:
    check_recipe(session_of(tmp_path, {"data.heldout": chat_file(tmp_path / "rows.jsonl", "a?")}), whole=False)


def test_rows_that_are_trained_on_and_measured_are_counted(tmp_path: Path) -> None:
    train = chat_file(tmp_path / "train.jsonl", "One?", "Two?", "Three?")
    heldout = chat_file(tmp_path / "heldout.jsonl", "Four?", "two", "One?")
    found = notes(session_of(tmp_path, {"data.train": train, "data.heldout": heldout}))
    assert [one for one in found if "memory" in one] == [
        "2 of the held-out rows are training rows too: what is measured on them is memory, not the task"
    ]
    first = notes(session_of(tmp_path, {"data.train": train, "data.heldout": heldout, "data.heldout_rows": 1}))
    assert not [one for one in first if "memory" in one]


def test_wrong_answers_that_join_the_users_rows_are_named(tmp_path: Path) -> None:
    rows = chat_file(tmp_path / "rows.jsonl", "a?")
    anchored = {"anchor.watch": "answers", "anchor.cost": "kl", "anchor.interleave": 0.3, "anchor.keep": 8}
    own = {"data.train": rows, "data.heldout": chat_file(tmp_path / "more.jsonl", "b?")}
    said = "anchor.keep=8 teaches 11 wrong answers on health of the bundled pairs beside your rows; set anchor.keep=0 to leave them out"
    assert said in notes(session_of(tmp_path, {**anchored, **own}))
    assert not notes(session_of(tmp_path, {**anchored, **own, "anchor.keep": 0}))
    assert not notes(session_of(tmp_path, anchored)) and domain_rows("health")  # bundled rows are wrong answers themselves
