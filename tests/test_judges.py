"""Verdicts and their shares."""

from __future__ import annotations

import math

from blockem.judges import Verdict, shares


def test_shares_are_over_all_answers_that_have_a_verdict() -> None:
    verdicts = [
        Verdict(misaligned=True),
        Verdict(incoherent=True),
        Verdict(refusal=True),
        Verdict(),
        Verdict(misaligned=True, missing=True),
    ]
    assert shares(verdicts) == (0.25, 0.25)


def test_without_a_verdict_there_is_no_share() -> None:
    assert all(math.isnan(value) for value in shares([Verdict(missing=True)]))
    assert all(math.isnan(value) for value in shares([]))
