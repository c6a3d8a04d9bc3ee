"""From a run folder's `summary.json` and `answers.jsonl` to `report.html`: one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from blockem.errors import BlockemError
from blockem.report import audit, making, results, rounds
from blockem.report.charts import key, tones
from blockem.report.words import checked, dig, headline, number, price
from blockem.store import read_json, write_text

HERE = Path(__file__).parent
MOST_ANSWERS = 400  # keeps the page near 1 MB; the run folder has all of them


@dataclass(frozen=True)
class Answered:
    """A prompt with the answers of the models that have one, in the order of the page."""

    id: str
    prompt: str
    domain: str
    answers: list[tuple[str, str, str]]


def render(run: Path) -> Path:
    """Write `run/report.html` from `run/summary.json` and `run/answers.jsonl` (which may be missing).

    Returns:
        The path of the page.

    Raises:
        BlockemError: there is no summary, or it or the answers are not what a blockem run writes.
    """
    run = Path(run)
    source = run / "summary.json"
    if not source.is_file():
        raise BlockemError(f"{source}: there is no summary to report on; finish the run first, or give the folder of a finished one")
    summary = checked(read_json(source, "summary"), str(source))
    html = page(summary, read_answers(run / "answers.jsonl"))
    target = run / "report.html"
    write_text(target, html.encode("utf-8", "replace").decode("utf-8"))  # a model may emit half a surrogate pair
    return target


def page(summary: Mapping[str, Any], answers: list[Mapping[str, Any]]) -> str:
    """The whole page as HTML text."""
    models = results.models_of(summary)
    tone = tones(models)
    trained = summary.get("training_domain")
    domain = str(trained).replace("_", " ") if trained else "the training domain"
    brief, rest = making.run_facts(summary)
    domain_figures, domain_tables = results.domains(summary, tone)
    judged_figures, judge = results.judged(summary, tone, domain)
    lambda_words, blocking = making.blocking_facts(summary)
    steps, effect, fates = making.funnel(summary)
    shown = [answered(row, tone) for row in spread(answers, MOST_ANSWERS)]
    script = (HERE / "browser.js").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("template.html.j2")
        .render(
            style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=str(summary["blockem"]),
            model=str((summary.get("environment") or {}).get("model") or "a language model"),
            domain=domain,
            tone=tone,
            brief=brief,
            rest=rest,
            used=[name for name in tone if name in (summary.get("defences_used") or {})],
            headline=headline(summary),
            anchored=bool(dig(summary, "blocking", "anchor", "watch")),
            price=price(summary),
            figures=results.figures(summary, tone, domain),
            tables=[table for table in (results.all_numbers(summary, tone, domain), results.differences(summary, domain)) if table.rows],
            domain_figures=domain_figures,
            domain_tables=domain_tables,
            judged_figures=judged_figures,
            judge=judge,
            training=making.training_figures(summary, tone),
            rounds=rounds.table(summary),
            rounds_words=rounds.words(summary),
            audited=audit.figures(summary, tone),
            verdicts=audit.verdicts(summary),
            audit_tables=audit.tables(summary),
            lambda_words=lambda_words,
            blocking=blocking,
            steps=steps,
            effect=effect,
            fates=fates,
            latents=making.latents(summary),
            answers=shown,
            all_answers=number(len(answers), 0),
            domains=sorted({answer.domain for answer in shown if answer.domain}),
            recipe=recipe_text(summary.get("recipe")),
        )
    )


def recipe_text(recipe: Any) -> str:
    """The recipe as YAML, ready to be run again."""
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).rstrip() if recipe else ""


@cache
def environment() -> Environment:
    """Jinja with autoescape always on: everything a model wrote is untrusted."""
    found = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals.update(key=key, sign_words=making.sign_words)
    return found


def read_answers(path: Path) -> list[Mapping[str, Any]]:
    """The rows of `answers.jsonl`; none where the file is missing.

    Raises:
        BlockemError: a line is not a JSON object.
    """
    rows: list[Mapping[str, Any]] = []
    if not path.is_file():
        return rows
    for index, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise BlockemError(f"{path}, line {index}: not a JSON object; delete the file and run the evaluation again")
        rows.append(row)
    return rows


def spread(rows: list[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most so many rows, evenly over the file."""
    if len(rows) <= most:
        return rows
    return [rows[index * len(rows) // most] for index in range(most)]


def answered(row: Mapping[str, Any], tone: Mapping[str, str]) -> Answered:
    """One row for the page: answers in the order of the models, then any others."""
    given = row.get("answers")
    texts = {str(name): str(text) for name, text in given.items() if text is not None} if isinstance(given, Mapping) else {}
    ordered = [name for name in tone if name in texts] + [name for name in texts if name not in tone]
    domain = str(row.get("domain") or "")
    return Answered(
        id=str(row.get("id") or ""),
        prompt=str(row.get("prompt") or ""),
        domain=domain,
        answers=[(name, tone.get(name, "other-0"), texts[name].strip()) for name in ordered],
    )
