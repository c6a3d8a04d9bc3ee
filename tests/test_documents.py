"""What the documents name is there: a picture or a grid that was never committed shows in a fresh clone only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/results/README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])(?:docs|experiments|recipes|benchmarks|src/blockem)/[\w./-]*\w", text)
    if document.parent.name == "results":
        named += [f"docs/results/{name}" for name in re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)]
    assert [name for name in dict.fromkeys(named) if not (ROOT / name).exists()] == []
