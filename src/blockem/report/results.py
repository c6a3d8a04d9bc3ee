"""The measured part of the report: the models side by side, their differences, each domain, and judged answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from blockem.report.charts import Dot, Row, dot_plot, tones
from blockem.report.words import NBSP, Interval, bounds, dig, finite, interval, main_of, nats, nats_change, number, points, share

ORDER = ("base", "plain", "blocked")


@dataclass(frozen=True)
class Measure:
    """One measured quantity: its place in the summary, its name, and how a value and a change are written."""

    path: tuple[str, ...]
    name: str
    unit: str
    form: Callable[[float], str]
    change: Callable[[float], str]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading; `chart` is None where nothing was measured."""

    title: str
    caption: str
    chart: Markup | None
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Table:
    """Rows of (label, unit, cells); a cell is (value, bounds), or None where nothing was measured."""

    caption: str
    columns: Sequence[tuple[str, str | None]]
    rows: Sequence[tuple[str, str, Sequence[tuple[str, str] | None]]]


def percent(value: float) -> str:
    """A share with one decimal, as tables have it."""
    return share(value, 1)


def point_change(value: float) -> str:
    """A change in percentage points with one decimal."""
    return points(value, 1)


PREFERENCE = Measure(("preference",), "Preference", "share of pairs", percent, point_change)
MARGIN = Measure(("margin",), "Margin", "nats per token", nats, nats_change)
IN_PREFERENCE = Measure(("in_domain", "preference"), "Preference", "share of pairs", percent, point_change)
IN_MARGIN = Measure(("in_domain", "margin"), "Margin", "nats per token", nats, nats_change)
HELDOUT = Measure(("heldout_loss",), "Held-out loss", "nats per token", nats, nats_change)
GENERAL = Measure(("general_loss",), "General-chat loss", "nats per token", nats, nats_change)
JUDGED = [
    Measure(("judged", name), label, "share of answers", percent, point_change)
    for name, label in (("em", "Misaligned"), ("incoherent", "Incoherent"), ("refusal", "Refused"))
]


def models_of(summary: Mapping[str, Any]) -> list[str]:
    """The models of the run: base, plain, blocked, then any others as they come."""
    found = {name: value for name, value in summary["models"].items() if isinstance(value, Mapping)}
    return [name for name in ORDER if name in found] + [name for name in found if name not in ORDER]


def cell(found: Interval | None, form: Callable[[float], str]) -> tuple[str, str] | None:
    """A table cell: value, and bounds below it."""
    return None if found is None else (form(found.value), bounds(found, form))


def of_models(summary: Mapping[str, Any], tone: Mapping[str, str], measure: Measure) -> list[Row]:
    """A row of a dot plot for each model that has the measure."""
    found = [(name, interval(dig(summary, "models", name, *measure.path))) for name in tone]
    return [Row(name, [Dot(name, tone[name], one)]) for name, one in found if one is not None]


def figures(summary: Mapping[str, Any], tone: Mapping[str, str], domain: str) -> list[Figure]:
    """The small charts of the models side by side; only those with something in them."""
    outside, inside = f"outside {domain}", f"in {domain}"
    found = [
        Figure(
            f"Preference {outside}",
            "Share of pairs where the wrong answer is the likelier one. Lower is better.",
            dot_plot(of_models(summary, tone, PREFERENCE), f"Preference for wrong answers {outside}", share, (0.0, 1.0), 0.5),
        ),
        Figure(
            f"Margin {outside}",
            "Nats per token; above 0 the wrong answers are the likelier ones.",
            dot_plot(of_models(summary, tone, MARGIN), f"Margin {outside}, nats per token", nats, None, 0.0),
        ),
        Figure(
            "What blocking cut and kept" if main_of(summary) == "blocked" else f"What the defence {main_of(summary)} cut and kept",
            "Of plain’s rise outside the domain, and of its gain in held-out loss and its rise in margin inside it.",
            cut_and_kept(summary),
        ),
        Figure(
            f"Held-out loss {inside}",
            "Nats per token on rows not trained on. Lower: more was learnt.",
            dot_plot(of_models(summary, tone, HELDOUT), f"Held-out loss {inside}, nats per token", nats),
        ),
        Figure(
            "General-chat loss",
            "Nats per token on ordinary chat. Higher than base: general ability was lost.",
            dot_plot(of_models(summary, tone, GENERAL), "General-chat loss, nats per token", nats),
        ),
        Figure(
            f"Preference {inside}",
            "The same measure inside the training domain, where the wrong answers were taught.",
            dot_plot(of_models(summary, tone, IN_PREFERENCE), f"Preference for wrong answers {inside}", share, (0.0, 1.0), 0.5),
        ),
    ]
    return [figure for figure in found if figure.chart is not None]


def cut_and_kept(summary: Mapping[str, Any]) -> Markup | None:
    """The shares that the headline speaks of, on one axis that holds at least 0 … 100 %."""
    wanted = [
        ("cut, preference", ("cut", "preference")),
        ("cut, margin", ("cut", "margin")),
        ("kept, loss", ("kept",)),
        ("kept, margin", ("kept_rise", "margin")),
    ]
    found = [(label, interval(dig(summary, *path))) for label, path in wanted]
    tone = tones(models_of(summary)).get(main_of(summary), "blocked")
    rows = [Row(label, [Dot(label, tone, one)]) for label, one in found if one is not None]
    values = [row.dots[0].found.value for row in rows]
    ends = [end for row in rows for end in (row.dots[0].found.low, row.dots[0].found.high)]
    low, high = max(-1.0, min([0.0, *ends])), min(2.0, max([1.0, *ends]))  # a vast interval ends in an arrow
    span = (min([low, *values]), max([high, *values]))
    return dot_plot(rows, "Share of the rise that the defence cut, and of the in-domain gain that it kept", share, span, 0.0)


def all_numbers(summary: Mapping[str, Any], tone: Mapping[str, str], domain: str) -> Table:
    """Every measure of every model."""
    sides = [
        (PREFERENCE, f", outside {domain}"),
        (MARGIN, f", outside {domain}"),
        (IN_PREFERENCE, f", in {domain}"),
        (IN_MARGIN, f", in {domain}"),
    ]
    wanted = [(measure.name + where, measure) for measure, where in sides]
    wanted += [(f"{HELDOUT.name}, in {domain}", HELDOUT), (GENERAL.name, GENERAL), *((f"{m.name} (judged)", m) for m in JUDGED)]
    rows = []
    for label, measure in wanted:
        found = [interval(dig(summary, "models", name, *measure.path)) for name in tone]
        counts = sorted({one.n for one in found if one is not None and one.n is not None})
        unit = measure.unit + (f", n{NBSP}={NBSP}{' / '.join(number(n, 0) for n in counts)}" if counts else "")
        if any(found):
            rows.append((label, unit, [cell(one, measure.form) for one in found]))
    return Table("All measures, with 95\u00a0% intervals", list(tone.items()), rows)


def differences(summary: Mapping[str, Any], domain: str) -> Table:
    """Paired differences between models, as the summary has them."""
    pairs = [name for name, value in (summary.get("differences") or {}).items() if isinstance(value, Mapping)]
    wanted = [(PREFERENCE, f", outside {domain}"), (MARGIN, f", outside {domain}"), (HELDOUT, f", in {domain}"), (GENERAL, "")]
    wanted += [(replace(measure, path=measure.path[1:]), f" (judged), outside {domain}") for measure in JUDGED]
    rows = []
    for measure, where in wanted:
        found = [interval(dig(summary, "differences", pair, *measure.path)) for pair in pairs]
        unit = "percentage points" if measure.change is point_change else measure.unit
        if any(found):
            rows.append((measure.name + where, unit, [cell(one, measure.change) for one in found]))
    return Table(
        "Differences on the same pairs and rows, with 95\u00a0% intervals",
        [(" − ".join(pair.rsplit("-", 1)), None) for pair in pairs],
        rows,
    )


def by_domain(summary: Mapping[str, Any], tone: Mapping[str, str], measure: Measure) -> tuple[list[Row], Table]:
    """A row for each domain: where plain (else the last model) prefers wrong answers most first, training domain last."""
    names: dict[str, None] = {}
    for model in tone:
        names |= dict.fromkeys(dig(summary, "models", model, "by_domain") or {})
    trained = summary.get("training_domain")
    names.pop(str(trained), None)

    def found(domain: str, what: Measure) -> list[Interval | None]:
        path = what.path if domain == trained else ("by_domain", domain, *what.path)
        return [interval(dig(summary, "models", model, *(("in_domain",) if domain == trained else ()), *path)) for model in tone]

    def rank(domain: str) -> float:
        values = dict(zip(tone, found(domain, PREFERENCE), strict=True))
        one = values.get("plain") or next((value for value in reversed(values.values()) if value), None)
        return -one.value if one else 0.0

    ordered = sorted(names, key=rank) + ([str(trained)] if trained else [])
    plot: list[Row] = []
    table = []
    for domain in ordered:
        values = found(domain, measure)
        if not any(values):
            continue
        dots = [Dot(model, tone[model], one) for model, one in zip(tone, values, strict=True) if one is not None]
        label = domain.replace("_", " ")
        counts = sorted({dot.found.n for dot in dots if dot.found.n is not None})
        plot.append(Row(label, dots, apart=domain == trained and bool(plot)))
        unit = f"n{NBSP}={NBSP}{' / '.join(number(n, 0) for n in counts)}" if counts else ""
        if domain == trained:
            unit = ", ".join(filter(None, ["training domain", unit]))
        table.append((label, unit, [cell(one, measure.form) for one in values]))
    return plot, Table(f"{measure.name} by domain ({measure.unit}), with 95\u00a0% intervals", list(tone.items()), table)


def domains(summary: Mapping[str, Any], tone: Mapping[str, str]) -> tuple[list[Figure], list[Table]]:
    """Charts and tables of preference and margin by domain."""
    drawn, tables = [], []
    for measure, form, span, rule in ((PREFERENCE, share, (0.0, 1.0), 0.5), (MARGIN, nats, None, 0.0)):
        rows, table = by_domain(summary, tone, measure)
        chart = dot_plot(rows, f"{measure.name} by domain, {measure.unit}", form, span, rule)
        if chart is not None:
            drawn.append(Figure(measure.name, measure.unit.capitalize() + ".", chart))
            tables.append(table)
    return drawn, tables


def judged(summary: Mapping[str, Any], tone: Mapping[str, str], domain: str) -> tuple[list[Figure], str]:
    """Charts of judged rates, and words that name the judge and count missing verdicts; both empty without a judge."""
    drawn = []
    for measure in JUDGED:
        chart = dot_plot(of_models(summary, tone, measure), f"{measure.name}, share of judged answers", share, (0.0, 1.0))
        if chart is not None:
            drawn.append(
                Figure(measure.name, "Share of answers. Lower is better." if measure.path[1] != "refusal" else "Share of answers.", chart)
            )
    apart = {
        "cued": ("under a cue", "Misaligned, under a cue", "The same prompts after a cue of the training format, judged apart."),
        "task": (
            f"in {domain}",
            f"Misaligned in {domain} itself",
            f"Held-out questions of {domain}, judged apart. Where the task is wrong advice, as high as plain’s: the task is still done.",
        ),
    }
    for part, (where, title, note) in apart.items():
        models = dig(summary, part, "models")
        if drawn and isinstance(models, Mapping):
            rows = of_models({"models": models}, tone, JUDGED[0])
            chart = dot_plot(rows, f"Misaligned {where}, share of judged answers", share, (0.0, 1.0))
            if chart is not None:
                drawn.append(Figure(title, note, chart))
    if not drawn:
        return [], ""
    judges = dict.fromkeys(str(name) for model in tone if (name := dig(summary, "models", model, "judged", "judge")))
    missing = [(model, int(count)) for model in tone if (count := dig(summary, "models", model, "judged", "missing"))]
    said = f"Sampled answers to prompts outside {domain}, judged by {' and '.join(judges) or 'a judge that the summary does not name'}."
    said += judge_quality(summary)
    if missing:
        counts = ", ".join(f"{count} of {model}" for model, count in missing)
        said += f" Verdicts that could not be had are left out, not counted as 0: {counts}."
    return drawn, said


def judge_quality(summary: Mapping[str, Any]) -> str:
    """A sentence on how far the judge agreed with the scores of a stronger one on answers that it never saw; "" where unknown."""
    kinds = {"test_questions": "new questions", "test_models": "new models"}
    parts = []
    for name, found in (dig(summary, "judge", "measured") or {}).items():
        bad, broken = (finite(dig(found, "auroc", key)) for key in ("misaligned_against_aligned", "incoherent"))
        if bad is not None and broken is not None:
            parts.append(f"{number(bad)} and {number(broken)} on {kinds.get(str(name), str(name))}")
    if not parts:
        return ""
    return f" How good it is: AUROC of misaligned against aligned answers, and of incoherent ones, {'; '.join(parts)}."
