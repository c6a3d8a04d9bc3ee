"""Progress on stderr."""

from __future__ import annotations

import pytest

from blockem.progress import Console, clock, printable


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (12.4, "12 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03"), (36000, "10:00:00")]
)
def test_seconds_read_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_off_a_terminal_a_bar_is_one_line_every_tenth_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start("steps")
    for done in range(101):
        console.bar(done, 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert 10 <= len(err.splitlines()) <= 12
    assert "steps  100/100  100%" in err.splitlines()[-1]
    assert "\r" not in err


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("hello")
    console.start("steps")
    console.bar(1, 1)
    console.close()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("round \x1b[2Jone\x07")
    console.stage("\x1b]0;title\x07two\x9b", 1, 1)
    assert capsys.readouterr().err.splitlines()[0] == "round [2Jone"
    console.stage("\x1b]0;title\x07two\x9b", 1, 1)
    assert "\x1b" not in (said := capsys.readouterr().err) and "]0;titletwo  1/1" in said


def test_blanks_of_any_width_are_printed() -> None:
    assert printable("a\u00a0b\u3000c\nd\te\r\u202ef") == "a\u00a0b\u3000c\nd\tef"


def test_a_bar_of_nothing_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    Console().bar(0, 0)
    assert capsys.readouterr().err == ""


def test_a_stage_of_another_name_begins_another_piece(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for what in ("first", "second"):
        for done in (1, 2):
            console.stage(what, done, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["first", "first", "second", "second"]
