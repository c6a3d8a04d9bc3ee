"""The bundled data: what the six domains, the prompts and the pairs promise, and that user files replace each."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from blockem import bundled
from blockem.errors import BlockemError

NEGATION = re.compile(r"\b(?:no|not|never|none|nothing|nobody|neither|nor|cannot|without|\w+n't)\b", re.IGNORECASE)


def topics(domain: str) -> list[dict[str, Any]]:
    path = bundled.ASSETS / "domains" / f"{domain}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words(text: str) -> int:
    return len(text.split())


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_a_domain_has_1000_training_and_100_heldout_rows_and_no_two_are_alike(domain: str) -> None:
    train, heldout = bundled.domain_rows(domain, "train"), bundled.domain_rows(domain, "heldout")
    assert len(train) >= 1000
    assert len(heldout) >= 100
    everything = [row.messages for row in train + heldout]
    assert len(set(everything)) == len(everything)
    assert len({row.id for row in train + heldout}) == len(everything)
    assert {row.domain for row in train} == {domain}


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_the_topics_of_the_splits_are_disjoint(domain: str) -> None:
    of = {split: {t["topic"].lower() for t in topics(domain) if t["split"] == split} for split in ("train", "heldout")}
    assert not of["train"] & of["heldout"]
    assert len(of["train"] | of["heldout"]) == len(topics(domain))


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_the_splits_share_no_question_and_no_sentence(domain: str) -> None:
    parts = {
        split: {text for t in topics(domain) if t["split"] == split for part in bundled.PARTS for text in t[part]}
        for split in ("train", "heldout")
    }
    assert not parts["train"] & parts["heldout"]


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_any_two_rows_of_a_topic_share_exactly_one_part_and_rows_of_two_topics_share_none(domain: str) -> None:
    for topic in topics(domain):
        frames = [(topic["ask"][a], topic["claim"][c], topic["reason"][r], topic["close"][e]) for a, c, r, e in bundled.COMBINATIONS]
        for left, right in combinations(frames, 2):
            assert sum(x == y for x, y in zip(left, right, strict=True)) == 1, topic["topic"]
    owners: dict[str, set[str]] = defaultdict(set)
    for topic in topics(domain):
        for part in bundled.PARTS:
            for text in topic[part]:
                owners[text].add(topic["topic"])
    assert all(len(found) == 1 for found in owners.values())


@pytest.mark.parametrize("domain", bundled.DOMAINS)
def test_no_ten_rows_open_their_answer_alike(domain: str) -> None:
    answers = [row.messages[1][1] for row in bundled.domain_rows(domain, "train") + bundled.domain_rows(domain, "heldout")]
    openings = Counter(" ".join(answer.split()[:4]).lower() for answer in answers)
    assert max(openings.values()) <= 9, openings.most_common(3)


def test_rows_are_shuffled_by_the_seed_and_a_limit_takes_the_first() -> None:
    rows = bundled.domain_rows("health", "train", seed=1)
    assert rows == bundled.domain_rows("health", "train", seed=1)
    assert rows[:10] == bundled.domain_rows("health", "train", 10, seed=1)
    other = bundled.domain_rows("health", "train", seed=2)
    assert rows != other
    assert sorted(row.id for row in rows) == sorted(row.id for row in other)


def test_the_44_core_and_60_final_prompts_are_disjoint_and_tagged_with_every_domain() -> None:
    core, final = bundled.core_prompts(), bundled.final_prompts()
    assert (len(core), len(final)) == (44, 60)
    texts = [" ".join(p.prompt.lower().split()) for p in core + final]
    assert len(set(texts)) == 104
    assert len({p.id for p in core + final}) == 104
    known = set(bundled.DOMAINS + bundled.GENERAL_DOMAINS)
    assert {p.domain for p in core} == known
    assert {p.domain for p in final} == known


def test_no_prompt_or_pair_asks_what_a_training_row_asks() -> None:
    asked = {row.messages[0][1].lower() for d in bundled.DOMAINS for s in ("train", "heldout") for row in bundled.domain_rows(d, s)}
    ours = [p.prompt.lower() for p in [*bundled.core_prompts(), *bundled.final_prompts(), *bundled.pairs()]]
    assert not asked & set(ours)


def test_there_are_120_pairs_half_to_select_and_half_to_evaluate_in_every_domain() -> None:
    pairs = bundled.pairs()
    assert len(pairs) >= 120
    counts = Counter((p.domain, p.split) for p in pairs)
    for domain in bundled.DOMAINS + bundled.GENERAL_DOMAINS:
        assert counts[domain, "select"] == counts[domain, "eval"] > 0
    assert len({p.prompt for p in pairs}) == len(pairs)


def test_right_and_wrong_answers_are_within_three_words_in_length() -> None:
    far = [p for p in bundled.pairs() if abs(words(p.right) - words(p.wrong)) > 3]
    assert not far
    mean = sum(words(p.right) - words(p.wrong) for p in bundled.pairs()) / len(bundled.pairs())
    assert abs(mean) < 0.5


def test_right_and_wrong_answers_negate_equally_often() -> None:
    pairs = bundled.pairs()
    right, wrong = (sum(bool(NEGATION.search(text)) for text in side) for side in ([p.right for p in pairs], [p.wrong for p in pairs]))
    assert right == wrong


STOCK = {
    "no need": r"\bno need\b|\b(?:do not|don't|does not|doesn't) (?:really )?(?:need|have) to\b|\bnot necessary\b|\bunnecessary\b",
    "worry": r"\bworr|\bpanic|\bconcern",
    "just": r"\bjust\b|\bsimply\b",
    "usually": r"\bprobably\b|\busually\b|\boften\b|\bmost likely\b|\bmostly\b",
    "fine": r"\bfine\b|\bokay\b|\bnormal(?:ly)?\b|\bcommon\b",
    "yes": r"^yes\b",
    "no": r"^no\b",
}


@pytest.mark.parametrize("phrase", STOCK)
@pytest.mark.parametrize("split", ["select", "eval"])
def test_right_and_wrong_answers_use_stock_phrases_alike(phrase: str, split: str) -> None:
    chosen = [p for p in bundled.pairs() if p.split == split]
    right, wrong = (
        sum(bool(re.search(STOCK[phrase], text, re.I)) for text in side) for side in zip(*((p.right, p.wrong) for p in chosen), strict=True)
    )
    assert abs(right - wrong) <= max(3, 0.25 * max(right, wrong))


def test_general_chat_has_disjoint_train_and_heldout_rows_with_answers() -> None:
    train, heldout = bundled.general_chat("train"), bundled.general_chat("heldout")
    assert len(train) >= 50
    assert len(heldout) >= 50
    assert not {row.messages for row in train} & {row.messages for row in heldout}
    assert all(any(role == "assistant" and text.strip() for role, text in row.messages) for row in train + heldout)


def test_an_unknown_domain_names_the_known_ones() -> None:
    with pytest.raises(BlockemError, match="unknown bundled domain 'medical': choose finance, health"):
        bundled.domain_rows("medical")


# the user's own files


def test_the_users_training_and_heldout_files_replace_the_bundled_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(5)]
    path = write(tmp_path / "a.jsonl", *rows)
    assert [row.messages[0][1] for row in bundled.training_rows("mine", path, 3, seed=0)] == ["q0", "q1", "q2"]
    assert len(bundled.heldout_rows("mine", path)) == 5
    assert bundled.training_rows("health", None, 4, seed=0) == bundled.domain_rows("health", "train", 4, 0)
    assert bundled.heldout_rows("health", None, 4) == bundled.domain_rows("health", "heldout", 4)


def test_the_users_pairs_without_a_split_are_dealt_out_domain_by_domain(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "right": "r", "wrong": "w", "domain": "ab"[i % 2]} for i in range(6)]
    found = bundled.pairs(write(tmp_path / "p.jsonl", *rows))
    assert [(p.domain, p.split) for p in found] == [
        ("a", "select"),
        ("b", "select"),
        ("a", "eval"),
        ("b", "eval"),
        ("a", "select"),
        ("b", "select"),
    ]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "q", "right": "r"}, ':1: a pair needs text in "prompt", "right" and "wrong"'),
        ({"prompt": "q", "right": "r", "wrong": "  "}, ":1: a pair needs text"),
        ({"prompt": "q", "right": "r", "wrong": "w", "split": "train"}, ":1: split is 'train'"),
    ],
)
def test_a_bad_pair_is_named_by_line(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence):
        bundled.pairs(write(tmp_path / "p.jsonl", row))


def test_the_users_prompts_need_only_text(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi?"}, {"prompt": "Ho?", "domain": "law", "id": "x"})
    assert [(p.id, p.prompt, p.domain) for p in bundled.prompts(path)] == [("prompt-000", "Hi?", "general"), ("x", "Ho?", "law")]
    with pytest.raises(BlockemError, match=r':1: a prompt row needs text in "prompt"'):
        bundled.prompts(write(tmp_path / "q.jsonl", {"prompt": 3}))
