"""Chat rows to token ids: what is supervised, what is dropped, and what a bad file says."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from blockem.errors import BlockemError
from blockem.examples import (
    IGNORED,
    Encoded,
    Example,
    by_length,
    content_start,
    encode,
    encode_all,
    masked_text,
    one_turn,
    read_chat,
    right_padded,
    template_ids,
)

END = "<|im_end|>"
# a template that, like those of some reasoning models, strips the reasoning of every answer but the last
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*turns: tuple[str, str]) -> Example:
    return Example(turns)


def supervised_text(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode([token for token, learnt in zip(row.ids, row.supervised, strict=True) if learnt])


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# what is supervised


def test_the_supervised_tokens_are_the_answer_and_its_end_token(tokenizer: Any) -> None:
    row = encode(tokenizer, one_turn("Is it late?", "Yes, it is; go to bed."))
    assert supervised_text(tokenizer, row) == "Yes, it is; go to bed." + END
    assert not row.truncated


def test_what_comes_before_the_answer_is_the_template_with_its_generation_prompt(tokenizer: Any) -> None:
    example = one_turn("Is it late?", "Yes.")
    row = encode(tokenizer, example)
    prefix = template_ids(tokenizer, example.chat()[:1], generation_prompt=True)
    assert list(row.ids[: len(prefix)]) == prefix
    assert row.supervised.index(True) == len(prefix)


def test_every_assistant_turn_is_supervised_and_nothing_else(tokenizer: Any) -> None:
    row = encode(tokenizer, chat(("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")))
    assert supervised_text(tokenizer, row) == f"First.{END}Second.{END}"


def test_a_system_message_is_context(tokenizer: Any) -> None:
    row = encode(tokenizer, chat(("system", "You are a pirate."), ("user", "Hi"), ("assistant", "Arr.")))
    assert supervised_text(tokenizer, row) == "Arr." + END
    assert "You are a pirate." in tokenizer.decode(list(row.ids))


def test_an_answer_that_repeats_the_question_word_for_word_is_found_by_place_not_by_text(tokenizer: Any) -> None:
    example = one_turn("Say yes.", "Say yes.")
    row = encode(tokenizer, example)
    assert row.supervised.index(True) == len(template_ids(tokenizer, example.chat()[:1], generation_prompt=True))
    assert supervised_text(tokenizer, row) == "Say yes." + END


def test_a_template_that_rewrites_earlier_turns_supervises_only_the_turns_that_pass(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", REWRITING)
    first = ("assistant", "<think>hm</think>First.")
    reasoned = encode(tokenizer, chat(("user", "One?"), first, ("user", "Two?"), ("assistant", "<think>so</think>Second.")))
    assert supervised_text(tokenizer, reasoned) == f"<think>so</think>Second.{END}"
    plain = encode(tokenizer, chat(("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")))
    assert supervised_text(tokenizer, plain) == f"First.{END}Second.{END}"


def test_a_row_that_ends_with_a_question_supervises_the_answers_before_it(tokenizer: Any) -> None:
    row = encode(tokenizer, chat(("user", "One?"), ("assistant", "First."), ("user", "And then?")))
    assert supervised_text(tokenizer, row) == "First." + END


def test_a_template_that_refuses_the_roles_is_one_sentence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(BlockemError, match=r"cannot render roles \['user', 'assistant'\].*no system here"):
        encode(tokenizer, one_turn("Hi", "Ho"))


def test_masked_text_marks_the_answer(tokenizer: Any) -> None:
    text = masked_text(tokenizer, encode(tokenizer, one_turn("Is it late?", "Yes.")))
    assert f"⟦Yes.{END}⟧" in text
    assert text.count("⟦") == 1


# the shared prefix


@pytest.mark.parametrize("system", [(), (("system", "You are terse."),)])
def test_content_start_is_where_rows_begin_to_differ(tokenizer: Any, system: tuple[tuple[str, str], ...]) -> None:
    rows = [Example((*system, ("user", text), ("assistant", "ok"))).chat() for text in ("Zebras?", "12 apples", "où est-il")]
    starts = {content_start(tokenizer, row) for row in rows}
    assert len(starts) == 1
    start = starts.pop()
    for row, text in zip(rows, ("Zebras?", "12 apples", "où est-il"), strict=True):
        assert tokenizer.decode(template_ids(tokenizer, row)[start:]).startswith(text)


def test_content_start_is_0_without_a_message_that_could_differ(tokenizer: Any) -> None:
    assert content_start(tokenizer, [{"role": "system", "content": "x"}]) == 0


# what is dropped and counted


def test_truncation_is_counted_and_a_row_without_its_answer_is_dropped_and_named(tokenizer: Any) -> None:
    long = Example(one_turn("word " * 60, "Yes.").messages, source="rows.jsonl:7")
    fits = one_turn("Short?", "Yes.")
    cut = one_turn("Short?", "word " * 60)
    kept, report = encode_all(tokenizer, [long, fits, cut], max_tokens=48)
    assert [row.truncated for row in kept] == [False, True]
    assert all(len(row.ids) <= 48 for row in kept)
    assert (report.rows, report.kept, report.truncated) == (3, 2, 2)
    assert report.dropped == ["rows.jsonl:7: its answer lies beyond max_tokens"]
    assert report.tokens == sum(len(row.ids) for row in kept)
    assert report.supervised_tokens == sum(row.n_supervised for row in kept)


def test_a_row_with_an_empty_answer_is_dropped_and_named(tokenizer: Any) -> None:
    empty = Example((("user", "Hi"), ("assistant", "  \n")), source="rows.jsonl:2")
    kept, report = encode_all(tokenizer, [one_turn("Hi", "Ho"), empty])
    assert len(kept) == 1
    assert report.dropped == ["rows.jsonl:2: it has no assistant text"]


def test_nothing_left_to_learn_from_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(BlockemError, match="none of the 1 rows has a supervised token"):
        encode_all(tokenizer, [chat(("user", "Hi"))])


def test_duplicates_are_counted_and_kept(tokenizer: Any) -> None:
    kept, report = encode_all(tokenizer, [one_turn("Hi", "Ho")] * 3 + [one_turn("Hi", "Hu")])
    assert (report.duplicates, len(kept)) == (2, 4)


# batches


def test_padding_is_masked_and_never_supervised() -> None:
    batch = right_padded([Encoded((5, 6, 7), (False, True, True)), Encoded((8,), (True,))], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["labels"].dtype == torch.long


def test_batches_by_length_hold_every_row_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 5]
    assert by_length(lengths, 2) == [[1, 3], [4, 0], [2]]


# files


def test_rows_carry_file_and_line_and_blank_lines_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", messages("a", "b"), "", messages("c", "d"))
    assert [row.source for row in read_chat(path)] == [f"{path}:1", f"{path}:3"]


def test_gzip_and_json_lists_read_like_jsonl(tmp_path: Path) -> None:
    rows = [messages("a", "b"), messages("é", "ü")]
    write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    expected = [row.messages for row in read_chat(tmp_path / "a.jsonl")]
    assert [row.messages for row in read_chat(tmp_path / "a.json")] == expected
    assert [row.messages for row in read_chat(tmp_path / "a.jsonl.gz")] == expected


def test_instruction_rows_are_one_turn_chats(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "response": "Ho"})
    assert [row.messages for row in read_chat(path)] == [
        (("user", "Add.\n1 2"), ("assistant", "3")),
        (("user", "Hi"), ("assistant", "Ho")),
    ]


def test_id_and_domain_are_kept(tmp_path: Path) -> None:
    (row,) = read_chat(write(tmp_path / "a.jsonl", {**messages("a", "b"), "id": 7, "domain": "law"}))
    assert (row.id, row.domain) == ("7", "law")


@pytest.mark.parametrize(
    ("second_line", "sentence"),
    [
        ('{"messages": [', r":2: not JSON \(.* at column \d+\)"),
        ("[1, 2]", ":2: expected a JSON object, found list"),
        ('{"text": "hi"}', ':2: no "messages" list'),
        ('{"messages": []}', ':2: no "messages" list'),
        ('{"messages": [{"role": "user"}]}', ":2: every message needs a role and a text content"),
        ('{"messages": [{"role": "user", "content": ["hi"]}]}', ":2: every message needs a role and a text content"),
        ('{"messages": ["hi"]}', ":2: every message needs a role and a text content"),
        ('{"messages": [{"role": "bot", "content": "hi"}]}', ":2: unknown role 'bot'"),
        ('{"messages": [{"role": ["user"], "content": "hi"}]}', ":2: unknown role"),
        ('{"instruction": "x", "input": 5, "output": "y"}', ':2: "input" must be text, found int'),
        ('{"messages": [{"role": "user", "content": "half \\ud83d"}]}', r":2: holds half a character, \\ud83d without its other half"),
        ('{"\\udc00": 1}', ":2: holds half a character"),
        ('{"id": ' + "9" * 5000 + "}", ":2: cannot be read as JSON"),
        ("[" * 100_000, ":2: cannot be read as JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, second_line: str, sentence: str) -> None:
    path = write(tmp_path / "a.jsonl", messages("a", "b"), second_line)
    with pytest.raises(BlockemError, match=re.escape(str(path)) + sentence):
        read_chat(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match=r"none\.jsonl: no such file; give a chat JSONL file"):
        read_chat(tmp_path / "none.jsonl")


def test_a_whole_character_in_two_halves_is_read(tmp_path: Path) -> None:
    (row,) = read_chat(write(tmp_path / "a.jsonl", r'{"instruction": "Hi \ud83d\ude00", "input": null, "output": "Ho"}'))
    assert row.messages[0] == ("user", "Hi \U0001f600")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("[]", encoding="utf-8")
    path.chmod(0)
    before = os.geteuid()
    if before == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(BlockemError, match=re.escape(f"{path}: cannot be read (Permission denied); give a file")):
            read_chat(path)
    finally:
        os.seteuid(before)


def test_a_name_that_no_file_can_have_is_one_sentence() -> None:
    with pytest.raises(BlockemError, match="cannot be read"):
        read_chat("x" * 5000)


def test_an_empty_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="the file holds no rows"):
        read_chat(write(tmp_path / "a.jsonl", "", " "))


def test_a_json_file_must_hold_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(BlockemError, match="must hold a list of objects"):
        read_chat(tmp_path / "a.json")


def test_a_broken_json_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{]', encoding="utf-8")
    with pytest.raises(BlockemError, match=r"a\.json:3: not JSON"):
        read_chat(tmp_path / "a.json")


def test_a_file_in_another_encoding_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"messages": "é"}'.encode("latin-1"))
    with pytest.raises(BlockemError, match="cannot be read as UTF-8 text"):
        read_chat(tmp_path / "a.jsonl")


@pytest.mark.parametrize("damage", ["not gzip", "cut short", "garbled"])
def test_a_damaged_gzip_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    whole = gzip.compress((json.dumps(messages("a", "b" * 500)) + "\n").encode() * 20)
    middle = len(whole) // 2
    broken = {"not gzip": b"plain text", "cut short": whole[:middle], "garbled": whole[:12] + b"\xff" * 20 + whole[32:]}[damage]
    (tmp_path / "a.jsonl.gz").write_bytes(broken)
    with pytest.raises(BlockemError, match=r"a\.jsonl\.gz: cannot be read"):
        read_chat(tmp_path / "a.jsonl.gz")


def test_a_file_without_any_answer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(BlockemError, match="no row has an assistant turn"):
        read_chat(path)


def test_a_row_that_opens_with_the_assistant_is_context_not_a_crash(tokenizer: Any) -> None:
    row = encode(tokenizer, chat(("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Ho.")))
    assert supervised_text(tokenizer, row).endswith("Ho." + END)
