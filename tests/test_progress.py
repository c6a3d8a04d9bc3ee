"""Progress on stderr."""

from __future__ import annotations

import pytest

from blockem.progress import Console, clock


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
