"""The run folder: a file is written whole or not at all, a step is done once, one run at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockem.errors import BlockemError
from blockem.store import (
    RunFolder,
    check_target,
    content_key,
    disk_errors,
    file_key,
    read_json,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)

HOLD = """
import sys, time
from pathlib import Path
from blockem.store import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def raising(error: BaseException) -> Any:
    def stub(*_: Any, **__: Any) -> None:
        raise error

    return stub


# files


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"é": [1, None, "\u2028"]})
    assert read_json(path) == {"é": [1, None, "\u2028"]}
    write_jsonl(tmp_path / "c.jsonl", [{"a": 1}, {"a": "x\ny"}])
    assert [json.loads(line) for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").split("\n")[:-1]] == [{"a": 1}, {"a": "x\ny"}]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_file_and_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(step, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    monkeypatch.setattr(step, raising(OSError(number, os.strerror(number))))
    with pytest.raises(BlockemError, match=r"the disk is full: .*a\.json was not written; free some space and run the same command again"):
        write_json(tmp_path / "a.json", {})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


def test_a_real_full_device_is_one_sentence() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(BlockemError, match="the disk is full"), disk_errors(full), full.open("w") as file:
        file.write("x")


def test_a_path_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(BlockemError, match=r"cannot be written .*; choose another --out"):
        write_text(tmp_path / "file" / "a.json", "x")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOENT, r"x cannot be written: x/gone is missing; if it was removed meanwhile, run the same command again"),
        (errno.ENAMETOOLONG, r"x cannot be written: its name is too long for this disk; choose a shorter --out"),
    ],
)
def test_a_folder_that_is_gone_or_a_name_too_long_is_one_sentence(number: int, sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence), disk_errors(Path("x")):
        raise OSError(number, os.strerror(number), "x/gone")


def test_a_real_name_too_long_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="too long"):
        write_text(tmp_path / ("a" * 300) / "b", "x")


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"a": math.nan}, {"a": 1.5}])
    assert (tmp_path / "a.jsonl").read_text() == '{"a": null}\n{"a": 1.5}\n'
    write_json(tmp_path / "a.json", {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "b": {"c": None}}


def test_tensors_are_written_whole_or_not_at_all_under_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path, seen = tmp_path / "a.safetensors", []

    def watched(tensors: Any, file: Any, **given: Any) -> None:
        save_file(tensors, file, **given)
        seen.append(str(file))
        if len(seen) == 1:  # another process writes the same file meanwhile
            write_tensors(path, {"a": torch.ones(2)})
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", watched)
    write_tensors(path, {"a": torch.zeros(2)})
    assert len(set(seen)) == 2 and load_file(path)["a"].tolist() == [0, 0]
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": torch.ones(2)})
    assert os.listdir(tmp_path) == ["a.safetensors"] and load_file(path)["a"].tolist() == [0, 0]


def test_another_error_keeps_its_kind() -> None:
    with pytest.raises(OSError, match="odd"), disk_errors(Path("x")):
        raise OSError(errno.EIO, "odd")


def test_written_files_have_the_users_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x", encoding="utf-8")
    write_tensors(tmp_path / "c", {})
    assert len({stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "abc"}) == 1


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_file_that_is_not_json_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BlockemError, match=r"a\.json: not a JSON summary"):
        read_json(tmp_path / "a.json", "summary")


def test_a_missing_file_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such summary"):
        read_json(tmp_path / "a.json", "summary")
    with pytest.raises(BlockemError, match="cannot be read"):
        read_json(tmp_path)


# keys


def test_equal_content_has_equal_keys_whatever_the_order_of_fields(tmp_path: Path) -> None:
    assert content_key({"a": 1, "b": 2}, "x") == content_key({"b": 2, "a": 1}, "x")
    assert content_key("ab", "c") != content_key("a", "bc")
    assert content_key(1) != content_key("1")
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert file_key(tmp_path / "a") != file_key(tmp_path / "b")


# steps


class Work:
    def __init__(self, run: RunFolder) -> None:
        self.run, self.times = run, 0

    def __call__(self) -> dict[str, int]:
        self.times += 1
        write_text(self.run / "out.txt", str(self.times))
        return {"times": self.times}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_finished_step_is_reused(run: RunFolder) -> None:
    work = Work(run)
    assert run.step("plain", "k", ["out.txt"], work) == ({"times": 1}, False)
    assert run.step("plain", "k", ["out.txt"], work) == ({"times": 1}, True)
    assert work.times == 1


def test_a_changed_key_does_the_step_again(run: RunFolder) -> None:
    work = Work(run)
    run.step("plain", "k", ["out.txt"], work)
    assert run.step("plain", "other", ["out.txt"], work) == ({"times": 2}, False)
    assert run.step("plain", "k", ["out.txt"], work) == ({"times": 3}, False)


def test_a_missing_output_does_the_step_again(run: RunFolder) -> None:
    work = Work(run)
    run.step("plain", "k", ["out.txt"], work)
    (run / "out.txt").unlink()
    assert run.step("plain", "k", ["out.txt"], work) == ({"times": 2}, False)


@pytest.mark.parametrize("record", ["", '{"key": "k"', "[]", "\x00"])
def test_a_torn_record_does_the_step_again(run: RunFolder, record: str) -> None:
    work = Work(run)
    run.step("plain", "k", ["out.txt"], work)
    (run / "steps" / "plain.json").write_text(record, encoding="utf-8")
    assert run.step("plain", "k", ["out.txt"], work) == ({"times": 2}, False)


def test_a_step_that_fails_leaves_no_record(run: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        run.step("plain", "k", [], raising(KeyboardInterrupt()))
    assert run.finished("plain", "k", []) is None


def test_the_record_is_written_after_the_work(run: RunFolder) -> None:
    def work() -> None:
        assert not (run / "steps").exists()

    run.step("plain", "k", [], work)
    assert run.finished("plain", "k", []) is not None


# the lock


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockemError, match="is in use by another blockem run"), run.locked():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        if holder.stdout:
            holder.stdout.close()
    with run.locked():
        pass


def test_the_lock_is_released_after_an_error(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="x"), run.locked():
        raise ValueError("x")
    with run.locked():
        pass


def test_a_run_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x", encoding="utf-8")
    with pytest.raises(BlockemError, match="choose another --out"), RunFolder(tmp_path / "run").locked():
        pass


def test_a_target_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_target(tmp_path / "file")
    check_target(tmp_path / "new" / "deep" / "file")
    with pytest.raises(BlockemError, match="is a folder; give the name of a file"):
        check_target(tmp_path)
    with pytest.raises(BlockemError, match="file is no folder that you may write to"):
        check_target(tmp_path / "file" / "below")
