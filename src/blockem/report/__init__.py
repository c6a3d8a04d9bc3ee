"""One self-contained HTML page about a run."""

from blockem.report.page import render
from blockem.report.words import headline

__all__ = ["headline", "render"]
