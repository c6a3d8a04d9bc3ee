"""Rubrics: the text that a judge model is given, and how a question and an answer are put into it.

The bundled rubrics are in our own words. The rubric comes first and the material last, so that a server's prefix cache serves all
answers with one computation of the rubric. Questions and answers are untrusted: they are put in by one pass over the template that never
looks at what it has put in, between marks that the material cannot know.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from blockem.errors import BlockemError
from blockem.store import content_key

RUBRICS = Path(__file__).parent.parent / "assets" / "rubrics"
BUNDLED = ("labelled", "scores")
SCORES = ("aligned", "coherent")
_PLACEHOLDER = re.compile(r"\{(question|answer|mark)\}")
_HEADING = re.compile(r"^===\s*(\w+)\s*===[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """One question to the judge model: `ask` is "label", "aligned" or "coherent"."""

    ask: str
    template: str

    @property
    def key(self) -> str:
        """A short hash: verdicts under another wording are other verdicts."""
        return content_key(self.ask, self.template)

    def render(self, question: str, answer: str) -> str:
        """The user message for one answer; braces, placeholders and markup in the material stay as they are."""
        mark = hashlib.sha256(f"{question}\0{answer}".encode("utf-8", "replace")).hexdigest()[:10]
        values = {"question": question, "answer": answer, "mark": mark}
        text = _PLACEHOLDER.sub(lambda found: values[found[1]], self.template)
        return text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent


@dataclass(frozen=True)
class Rubric:
    """One or two parts. The labelled protocol asks once for a label; the scores protocol asks twice, for one number each."""

    name: str
    parts: tuple[Part, ...]

    @property
    def protocol(self) -> str:
        return "labelled" if len(self.parts) == 1 else "scores"

    @property
    def hash(self) -> str:
        return content_key([part.key for part in self.parts])


def load_rubric(name_or_path: str | Path) -> Rubric:
    """A bundled rubric ("labelled", "scores"), or a published one from a text file.

    A file for the labelled protocol is one text with the placeholders {question} and {answer} that asks for one of the labels. A file
    for the scores protocol holds two such texts under the lines `=== aligned ===` and `=== coherent ===`.

    Raises:
        BlockemError: no such file, not UTF-8, or a placeholder or heading is missing.
    """
    bundled = str(name_or_path) in BUNDLED
    path = RUBRICS / f"{name_or_path}.md" if bundled else Path(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BlockemError(
            f"{path}: no such rubric; give {' or '.join(BUNDLED)}, or a text file with {{question}} and {{answer}}"
        ) from None
    except UnicodeDecodeError as error:
        raise BlockemError(f"{path}: the rubric is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise BlockemError(f"{path}: the rubric cannot be read ({error.strerror})") from error
    parts = _parts(path, text)
    for part in parts:
        lacking = [name for name in ("{question}", "{answer}") if name not in part.template]
        if lacking:
            where = "" if part.ask == "label" else f" under === {part.ask} ==="
            raise BlockemError(f"{path}: the rubric has no {' and no '.join(lacking)}{where}; put it where the text is to be filled in")
    return Rubric(path.stem, parts)


def _parts(path: Path, text: str) -> tuple[Part, ...]:
    pieces = _HEADING.split(text)
    if len(pieces) == 1:
        return (Part("label", text.strip()),)
    found = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    if pieces[0].strip() or set(found) != set(SCORES) or len(pieces) != 5:
        raise BlockemError(f"{path}: a rubric with headings needs two, === aligned === and === coherent ===, and nothing before the first")
    return tuple(Part(name, found[name].strip()) for name in SCORES)
