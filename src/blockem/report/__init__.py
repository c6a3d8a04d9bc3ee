"""One self-contained HTML page about a run."""

from blockem.report.page import render

__all__ = ["render"]
