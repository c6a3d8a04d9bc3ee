"""From a comparison's numbers to `comparison.json`, `comparison.html` and `figures/`: pages and pictures that need no network."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from blockem.comparison import is_plain
from blockem.defence_names import DEFENCES
from blockem.report import comparison_charts as charts
from blockem.report.charts import marker
from blockem.report.comparison_words import ablation_words, comparisons_words, recommendation_words, sentence, spread_words
from blockem.report.page import HERE, environment
from blockem.report.results import Table, cell, percent, point_change
from blockem.report.words import finite, interval, nats, nats_change, number
from blockem.store import write_json, write_text

TITLES = {
    "em-adherence": "Misaligned answers against what was learnt",
    "preference-adherence": "Preference for wrong answers against what was learnt",
    "em-task": "Misaligned answers outside the training domain against those in it",
    "em-incoherence": "Misaligned answers against incoherent ones",
    "preference-incoherence": "Preference for wrong answers against incoherent answers",
    "cued-em-adherence": "Under a cue of the training format: misaligned answers against what was learnt",
    "cued-em-incoherence": "Under a cue of the training format: misaligned answers against incoherent ones",
    "ablations": "Ablations",
    "transfer": "Latents from other domains",
}
FORMS = {"margin": (nats, nats_change)}


@dataclass(frozen=True)
class Picture:
    """A chart with its heading, the sentence below it and the marks to explain."""

    id: str
    title: str
    chart: Markup | None
    words: str
    letters: list[tuple[str, str, str]]
    tones: list[tuple[str, str]]


def write(comparison: dict[str, Any], out: Path) -> Path:
    """Add the sentences, and write everything atomically.

    What an earlier comparison drew and this one does not is removed; files of other names in `figures/` stay.

    Returns:
        The path of the page.
    """
    for figure in comparison["figures"]:
        figure["sentence"] = sentence(figure)
    comparison["sentences"] = {
        "recommendation": recommendation_words(comparison),
        "comparisons": comparisons_words(comparison),
        "intervals": spread_words(comparison),
    }
    drawn = [picture for figure in comparison["figures"] for picture in pictures(figure)]
    files = {f"{figure['id']}.csv": csv_text(figure) for figure in comparison["figures"]}
    files |= {f"{one.id}.svg": standalone(one) for one in drawn if one.chart is not None}
    for name, text in files.items():
        write_text(out / "figures" / name, text)
    for name in ours() - set(files):
        (out / "figures" / name).unlink(missing_ok=True)
    write_json(out / "comparison.json", comparison)
    write_text(out / "comparison.html", page(comparison, drawn))
    return out / "comparison.html"


def ours() -> set[str]:
    """The names of all files that a comparison could write to `figures/`."""
    ids = (*TITLES, *(f"ablations-{measure}" for measure in charts.NAMES), *(f"strength-{defence}" for defence in DEFENCES))
    return {f"{one}.{kind}" for one in ids for kind in ("csv", "svg")}


def pictures(figure: Mapping[str, Any]) -> list[Picture]:
    """The charts of a figure: one, or for ablations one a measure."""
    kind, name = figure["kind"], figure["id"]
    title = TITLES.get(name) or f"{figure['defence']} over {figure['field']}"
    words = figure.get("sentence", "")
    if kind == "ablations":
        measures = list(dict.fromkeys(row["measure"] for row in charts.records(figure)))
        return [
            Picture(f"{name}-{one}", f"{title}: {charts.NAMES[one]}", charts.ablations(figure, one), ablation_words(figure, one), [], [])
            for one in measures
        ]
    if kind == "strength":
        tones = [(charts.NAMES[measure], tone) for measure, tone in ((figure["up"], "plain"), ("incoherent", "base"), ("kept", "blocked"))]
        return [Picture(name, title, charts.strengths(figure), words, [], tones)]
    if kind == "transfer":
        return [Picture(name, title, charts.matrix(figure), words, [], [])]
    marks = charts.letters(row["defence"] for row in charts.records(figure))
    letters = [(letter, tone, of) for of, (letter, tone) in marks.items()]
    return [Picture(name, title, charts.plane(figure), words, letters, [("base", "base"), ("plain", "plain")])]


def csv_text(figure: Mapping[str, Any]) -> str:
    """A figure's rows as CSV, numbers written as in the JSON and nothing where there is none.

    Text that a spreadsheet would take for a formula is given an apostrophe.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(figure["columns"])
    for row in figure["rows"]:
        writer.writerow([plain_cell(value) for value in row])
    return text.getvalue()


def plain_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
    return repr(value)


def standalone(picture: Picture) -> str:
    """A picture as a file of its own: its title, the chart in the page's light colours, and what its marks mean."""
    head, body = str(picture.chart).removesuffix("</svg>").split(">", 1)
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', head)
    assert found is not None
    width, height = int(found[1]), int(found[2])
    lines = textwrap.wrap(picture.title, 48)
    top = 18 * len(lines) + 10
    parts = [Markup('<text x="8" y="{}">{}</text>').format(18 * (i + 1), line) for i, line in enumerate(lines)]
    parts.append(Markup('<g transform="translate(0 {})">{}</g>').format(top, Markup(body)))
    marks = [(partial(charts.lettered, letter, tone, ring=False), of) for letter, tone, of in picture.letters]
    marks += [(partial(marker, tone), name) for name, tone in picture.tones]
    wide = max((len(name) for _, name in marks), default=0)
    columns = max(1, int((width - 8) // (6.5 * wide + 26)))
    rows = math.ceil(len(marks) / columns)
    for place, (mark, name) in enumerate(marks):  # read downwards
        x = 16 + (place // rows) * (width - 8) / columns
        y = top + height + 12 + (place % rows) * 18
        parts += [mark(x=x, y=y), Markup('<text class="tick" x="{:.1f}" y="{:.1f}">{}</text>').format(x + 11, y + 4, name)]
    whole = top + height + 18 * rows + 12
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(found[0], f'viewBox="0 0 {width} {whole}"')
    paper = f'<rect width="{width}" height="{whole}" fill="#ffffff"/>'
    return f"{head}><style><![CDATA[{flat_style()}]]></style>{paper}{Markup('').join(parts)}</svg>\n"


@cache
def flat_style() -> str:
    """The rules for charts without CSS variables, which drawing programs do not know."""
    text = style_sheet()
    palette = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text[: text.index("@media")])) | {"sans": "sans-serif"}
    tones = re.findall(r"\.([\w-]+) \{ --tone: var", text)
    rules = []
    for rule in re.findall(r"^(?:\.chart|\.dot|\.line|\.whisker)[^{}]*\{[^{}]*\}", text, re.MULTILINE):
        selectors, body = rule.split("{", 1)
        if "var(--tone)" not in body:
            rules.append(rule)
            continue
        for tone in tones:
            toned = ", ".join(f"{one.strip()}.{tone}" for one in selectors.split(","))
            rules.append(f"{toned} {{{body.replace('var(--tone)', palette[tone])}")
    return re.sub(r"var\(--([\w-]+)\)", lambda found: palette.get(found[1], "#000000"), "\n".join(rules))


def style_sheet() -> str:
    """The report's rules, and those that only a comparison needs."""
    return "".join((HERE / name).read_text(encoding="utf-8") for name in ("style.css", "comparison.css"))


def page(comparison: Mapping[str, Any], drawn: list[Picture]) -> str:
    """The whole page as HTML text."""
    kinds = {figure["id"]: figure["kind"] for figure in comparison["figures"]}
    planes = [one for one in drawn if kinds.get(one.id) == "plane"]
    return (
        environment()
        .get_template("comparison.html.j2")
        .render(
            style=Markup(style_sheet()),
            version=str(comparison["blockem"]),
            comparison=comparison,
            domains=", ".join(comparison["domains"]),
            planes=[one for one in planes if not one.id.startswith("cued")],
            cued=[one for one in planes if one.id.startswith("cued")],
            strengths=[one for one in drawn if one.id.startswith("strength-")],
            ablated=[one for one in drawn if one.id.startswith("ablations")],
            transfer=[one for one in drawn if one.id == "transfer"],
            tables=[one for one in (settings_table(comparison), changes_table(comparison), ablation_table(comparison)) if one.rows],
            failed=comparison["failed"],
            tasked=any(found.get("task") for found in comparison["references"].values()),
            sentences=comparison["sentences"],
            share_of=choice_rows(comparison),
        )
    )


def settings_table(comparison: Mapping[str, Any]) -> Table:
    """Every setting with every measure that there is."""
    rows = [(name, "", found) for name, found in comparison["references"].items()]
    rows += [(one["label"], kind_words(one), one["measures"]) for one in comparison["settings"] if not is_plain(one)]
    return measures_table("All settings, with 95\u00a0% intervals", rows, 0)


def changes_table(comparison: Mapping[str, Any]) -> Table:
    """Paired differences of every setting to plain."""
    rows = [(one["label"], kind_words(one), one["changes"]) for one in comparison["settings"] if not is_plain(one)]
    return measures_table("Difference to plain on the same prompts and pairs, in points (margin: nats per token)", rows, 1)


def kind_words(setting: Mapping[str, Any]) -> str:
    """What is unusual about a setting."""
    words = ["ablation"] * (setting["kind"] == "ablation")
    return ", ".join(words + [f"{setting['cells']} cells only"] * (not setting["complete"]))


def measures_table(caption: str, rows: list[tuple[str, str, Mapping[str, Any]]], change: int) -> Table:
    names = [name for name in charts.NAMES if any(interval(found.get(name)) for _, _, found in rows)]
    cells = [
        (label, unit, [cell(interval(found.get(name)), FORMS.get(name, (percent, point_change))[change]) for name in names])
        for label, unit, found in rows
    ]
    return Table(caption, [(charts.NAMES[name], None) for name in names], cells if names else [])


def ablation_table(comparison: Mapping[str, Any]) -> Table:
    """Paired differences of each ablation to the whole method."""
    figure = next((one for one in comparison["figures"] if one["kind"] == "ablations"), None)
    if figure is None:
        return Table("", [], [])
    rows = charts.records(figure)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_name.setdefault(row["ablation"], {})[row["measure"]] = {
            "value": row["difference"],
            "low": row["low"],
            "high": row["high"],
            "n": row["n"],
        }
    cells = [(name, "", [cell(interval(found.get(one)), point_change) for one in measures]) for name, found in by_name.items()]
    return Table(f"Ablations minus {figure['whole']}, same prompts, in points", [(charts.NAMES[one], None) for one in measures], cells)


def choice_rows(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How often each setting was chosen over the resamples, the most frequent first."""
    shares = comparison["recommendation"]["shares"]
    ordered = sorted(shares.items(), key=lambda one: (-(finite(one[1]) or 0.0), one[0]))
    return [(label, f"{number(100 * share, 1)}\u00a0%") for label, share in ordered if share > 0]
