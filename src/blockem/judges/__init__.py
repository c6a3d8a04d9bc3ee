"""Judges: from (prompt, answer) to a verdict."""

from blockem.judges.judge import Judge, Verdict, shares

__all__ = ["Judge", "Verdict", "shares"]
