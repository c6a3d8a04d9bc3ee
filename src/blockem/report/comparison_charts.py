"""Pictures of a comparison: settings in a plane with their Pareto front, rates over strengths, a transfer matrix, paired differences.

Each takes a figure of `comparison.json` (columns and rows) and draws what stands there, in the style of `charts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from blockem.report.charts import (
    WIDTH,
    Dot,
    Row,
    axis_below,
    dot_plot,
    fitted,
    frame,
    log_label,
    marker,
    nice_ticks,
    padded,
    scale,
    tick_label,
)
from blockem.report.words import Interval, full, number, points, share

NAMES = {
    "em": "Misaligned answers (EM)",
    "preference": "Preference for wrong answers",
    "kept": "In-domain adherence",
    "task": "Misaligned in the domain",
    "incoherent": "Incoherent answers",
    "refusal": "Refusals",
    "margin": "Margin",
    "cued_em": "Misaligned answers under a cue",
    "cued_incoherent": "Incoherent answers under a cue",
}
FARTHEST = 0.3  # how far an interval may stretch an axis beyond the values
Place = Callable[[float], float]


def records(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a figure by column."""
    return [dict(zip(figure["columns"], row, strict=True)) for row in figure["rows"]]


def found(row: Mapping[str, Any], name: str) -> Interval | None:
    """A measure of a row with its interval."""
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return None
    return Interval(value, -math.inf if low is None else low, math.inf if high is None else high)


def letters(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A letter and a style class for each defence, in their order."""
    ordered = [name for name in dict.fromkeys(names) if name not in ("base", "plain")]
    others = [name for name in ordered if name != "block-em"]
    return {
        name: (chr(65 + place % 26), "blocked" if name == "block-em" else f"other-{others.index(name) % 3}")
        for place, name in enumerate(ordered)
    }


def limits(values: Sequence[Interval], also: Sequence[float] = ()) -> tuple[float, float]:
    """An axis that holds the values, and their intervals as far as those do not dwarf them."""
    plain = [*(one.value for one in values), *also]
    low, high = min(plain) - FARTHEST, max(plain) + FARTHEST
    ends = [min(max(end, low), high) for one in values for end in (one.low, one.high)]
    return padded([*plain, *ends], 0.05)


def lettered(letter: str, tone: str, x: float, y: float, ring: bool) -> Markup:
    """The mark of a defence: its letter in a disc, ringed where it is on the front."""
    circle = Markup('<circle class="front" cx="{0:.1f}" cy="{1:.1f}" r="9.4"/>').format(x, y) if ring else Markup("")
    disc = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="6.6"/>').format(tone, x, y)
    text = Markup('<text class="letter" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(x, y + 3.2, letter)
    return circle + disc + text


def plane(figure: Mapping[str, Any]) -> Markup | None:
    """One measure against another: a curve a defence, its strengths as points, 95 % intervals both ways, the front dashed."""
    across, up = figure["across"], figure["up"]
    placed = [(row, x, y) for row in records(figure) if (x := found(row, across)) and (y := found(row, up))]
    if not placed:
        return None
    height, left, right, top = 300.0, 46.0, WIDTH - 10.0, 10.0
    bottom = height - 40
    x_low, x_high = limits([x for _, x, _ in placed])
    y_low, y_high = limits([y for _, _, y in placed])
    run, rise = scale(x_low, x_high, left, right), scale(y_low, y_high, bottom, top)
    parts = axes(x_low, x_high, y_low, y_high, run, rise, left, right, top, bottom, NAMES[across])
    best = sorted((x.value, y.value) for row, x, y in placed if row["on_front"])
    if len(best) > 1:
        path = "M" + "L".join(f"{run(x):.1f} {rise(y):.1f}" for x, y in best)
        parts.append(Markup('<path class="frontier" d="{}"><title>Pareto front</title></path>').format(path))
    marks = letters(row["defence"] for row, _, _ in placed)
    for name, (_, tone) in marks.items():
        strong = [(row["strength"], x, y) for row, x, y in placed if row["defence"] == name and isinstance(row["strength"], int | float)]
        curve = [(x.value, y.value) for _, x, y in sorted(strong, key=lambda one: one[0])]
        if len(curve) > 1:
            path = "M" + "L".join(f"{run(x):.1f} {rise(y):.1f}" for x, y in curve)
            parts.append(Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(tone, path, name))
    told = []
    for row, x, y in placed:
        tone = marks[row["defence"]][1] if row["defence"] in marks else row["defence"]
        parts.append(cross(x, y, run, rise, (x_low, x_high), (y_low, y_high), tone))
    for row, x, y in placed:
        words = f"{row['setting']}: {NAMES[up]} {full(y)}, {NAMES[across]} {full(x)}"
        told.append(words)
        at = run(x.value), rise(y.value)
        if row["defence"] in marks:
            mark = lettered(*marks[row["defence"]], *at, bool(row["on_front"]))
        else:
            mark = marker(row["defence"], *at)
            if row["on_front"]:
                mark = Markup('<circle class="front" cx="{:.1f}" cy="{:.1f}" r="9.4"/>').format(*at) + mark
        parts.append(Markup("<g><title>{}</title>{}</g>").format(words, mark))
    return frame(height, f"{NAMES[up]} against {NAMES[across]}: {'; '.join(told)}", parts)


def axes(
    x_low: float, x_high: float, y_low: float, y_high: float, run: Place, rise: Place, left: float, right: float, top: float, bottom: float,
    name: str,
) -> list[Markup]:  # fmt: skip
    """Grid lines and labels of two axes in per cent, with the lower one's name."""
    parts = [axis_below(nice_ticks(x_low, x_high, 4), run, top, bottom, share)]
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(left / 2 + right / 2, bottom + 34, name)
    )
    for tick in nice_ticks(y_low, y_high):
        line = Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
        parts.append(line.format(left, right, rise(tick), rise(tick)))
        text = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>')
        parts.append(text.format(left - 6, rise(tick) + 4, share(tick)))
    return parts


def cross(x: Interval, y: Interval, run: Place, rise: Place, x_span: tuple[float, float], y_span: tuple[float, float], tone: str) -> Markup:
    """Both intervals through a point, cut at the axes' ends."""
    path = ""
    if x.bounded:
        path += f"M{run(max(x.low, x_span[0])):.1f} {rise(y.value):.1f}H{run(min(x.high, x_span[1])):.1f}"
    if y.bounded:
        path += f"M{run(x.value):.1f} {rise(max(y.low, y_span[0])):.1f}V{rise(min(y.high, y_span[1])):.1f}"
    return Markup('<path class="whisker faint {}" d="{}"/>').format(tone, path) if path else Markup("")


def strengths(figure: Mapping[str, Any]) -> Markup | None:
    """Three rates over the strength, on a logarithmic axis with 0 at its left end."""
    rows = records(figure)
    tones = {figure["up"]: "plain", "incoherent": "base", "kept": "blocked"}
    drawn = {name: [(row["strength"], one) for row in rows if (one := found(row, name))] for name in tones}
    drawn = {name: values for name, values in drawn.items() if values}
    if not drawn:
        return None
    height, left, right, top = 252.0, 46.0, WIDTH - 14.0, 10.0
    bottom = height - 40
    values = [one for of_name in drawn.values() for _, one in of_name]
    y_low, y_high = limits(values, [0.0, 1.0])
    rise = scale(y_low, y_high, bottom, top)
    where = along(sorted({row["strength"] for row in rows}), left + 12, right - 6)
    parts = []
    for tick in nice_ticks(y_low, y_high):
        line = Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
        text = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>')
        parts += [line.format(left, right, rise(tick), rise(tick)), text.format(left - 6, rise(tick) + 4, share(tick))]
    for strength, x in where.items():
        label = "0" if strength == 0 else log_label(strength) if strength > 0 else tick_label([strength])(strength)
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(x, bottom + 15, label))
    middle = (left + right) / 2
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(middle, bottom + 34, figure["field"])
    )
    told = []
    for shift, (name, of_name) in enumerate(drawn.items()):
        tone = tones[name]
        spots = [(where[strength] + 3 * (shift - 1), one) for strength, one in of_name]
        path = "M" + "L".join(f"{x:.1f} {rise(one.value):.1f}" for x, one in spots)
        parts.append(Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(tone, path, NAMES[name]))
        for (x, one), (strength, _) in zip(spots, of_name, strict=True):
            words = f"{figure['field']} {strength:g}, {NAMES[name]}: {full(one)}"
            told.append(words)
            bar = Markup("")
            if one.bounded:
                ends = rise(max(one.low, y_low)), rise(min(one.high, y_high))
                bar = Markup('<path class="whisker {}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(tone, x, *ends)
            parts.append(Markup("<g><title>{}</title>{}{}</g>").format(words, bar, marker(tone, x, rise(one.value))))
    return frame(height, f"{figure['defence']} over {figure['field']}: {'; '.join(told)}", parts)


def along(values: Sequence[float], start: float, end: float) -> dict[float, float]:
    """Where strengths stand: by their logarithm, with 0 (and anything below) a step to the left of the smallest."""
    positive = [value for value in values if value > 0]
    logs = {value: math.log10(value) for value in positive}
    spread = max(logs.values(), default=0.0) - min(logs.values(), default=0.0)
    step = max(spread / 4, 0.5)
    rest = [value for value in values if value <= 0]
    first = min(logs.values(), default=0.0)
    logs |= {value: first - step * (len(rest) - place) for place, value in enumerate(rest)}
    if len(values) == 1:
        return {values[0]: (start + end) / 2}
    place = scale(min(logs.values()), max(logs.values()), start, end)
    return {value: place(logs[value]) for value in values}


def matrix(figure: Mapping[str, Any]) -> Markup | None:
    """EM of models trained in the columns' domain with the latents of the rows' one; change from plain and adherence below each."""
    rows, up = records(figure), figure["up"]
    sources = list(dict.fromkeys(str(row["latents_of"]) for row in rows))
    domains = list(dict.fromkeys(str(row["trained_on"]) for row in rows))
    if not any(row[up] is not None for row in rows):
        return None
    left, top, tall = 84.0, 40.0, 60.0
    wide = (WIDTH - left) / len(domains)
    parts = [Markup('<text class="tick" x="0" y="12">latents of ↓, trained on →</text>')]
    for place, name in enumerate(domains):
        text = Markup('<text x="{:.1f}" y="32" text-anchor="middle">{}</text>')
        parts.append(text.format(left + wide * (place + 0.5), fitted(name.replace("_", " "), wide - 4)))
    told = []
    for row in rows:
        x = left + wide * domains.index(str(row["trained_on"]))
        y = top + tall * sources.index(str(row["latents_of"]))
        value, change = row[up], row["change"]
        if value is None:
            nothing = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">–</text>')
            parts.append(nothing.format(x + wide / 2, y + tall / 2 + 4))
            continue
        depth = min(1.0, max(0.0, value)) * 0.55
        fill = Markup('<rect class="heat" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}"/>')
        text = Markup('<text class="value" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        below = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        moved = "" if change is None else points(change)
        kept = row.get("kept")
        parts += [fill.format(x + 1, y + 1, wide - 2, tall - 2, depth), text.format(x + wide / 2, y + 21, share(value))]
        under = [moved] * bool(moved) + ([] if kept is None else [f"{share(kept)} kept"])
        parts += [below.format(x + wide / 2, y + 36 + 15 * line, words) for line, words in enumerate(under)]
        told.append(f"latents of {row['latents_of']}, trained on {row['trained_on']}: {share(value)} ({moved or 'no'} points from plain)")
    for place, name in enumerate(sources):
        parts.append(
            Markup('<text x="0" y="{:.1f}">{}</text>').format(top + tall * (place + 0.5) + 4, fitted(name.replace("_", " "), left - 6))
        )
    return frame(top + tall * len(sources) + 4, f"{NAMES[up]}: {'; '.join(told)}", parts)


def ablations(figure: Mapping[str, Any], measure: str) -> Markup | None:
    """Each ablation minus the whole method in one measure, with 95 % intervals round a rule at 0."""
    rows = [row for row in records(figure) if row["measure"] == measure]
    dots = [(row["ablation"], Interval(100 * row["difference"], 100 * row["low"], 100 * row["high"], row["n"])) for row in rows]
    shown = [Row(name, [Dot(name, "blocked", one)]) for name, one in dots]
    label = f"{NAMES[measure]}, ablation minus {figure['whole']}, percentage points"
    return dot_plot(shown, label, lambda value: number(value, 1, plus=True), None, 0.0, least=10.0)
