"""Charts as inline SVG: dots with intervals, and lines over training steps.

Every chart is 340 units wide, so that its type stays readable when it fills a phone. Colours come from the page's style
sheet by class; each model also has its own marker and line pattern, so that nothing rests on colour alone. Text is escaped
by `Markup`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from blockem.report.words import Interval, full, number, significant, superscript

WIDTH = 340
CHARACTER = 6.1  # mean advance of the chart's 12-unit type; only used to leave room for labels
MOST_POINTS = 300
Form = Callable[[float], str]


@dataclass(frozen=True)
class Dot:
    """One model's value in a row.  `tone` is the style class of the model (`base`, `plain`, `blocked`, `other-0` …)."""

    name: str
    tone: str
    found: Interval


@dataclass(frozen=True)
class Row:
    """A labelled line of a dot plot; with one dot its value is written at the right."""

    label: str
    dots: Sequence[Dot]
    apart: bool = False


@dataclass(frozen=True)
class Series:
    """A line: `points` are (step, value), values in the unit of the chart."""

    name: str
    tone: str
    points: Sequence[tuple[float, float]]


def tones(models: Sequence[str]) -> dict[str, str]:
    """A style class for each model: its own for base, plain and blocked, a cycle of three for any others."""
    others = [name for name in models if name not in ("base", "plain", "blocked")]
    return {name: name if name not in others else f"other-{others.index(name) % 3}" for name in models}


def marker(tone: str, x: float, y: float) -> Markup:
    """The mark of a model: circle, square, diamond, or a triangle for any other, centred at (x, y)."""
    if tone == "base":
        return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4.6"/>').format(tone, x, y)
    if tone == "plain":
        return Markup('<rect class="dot {}" x="{:.1f}" y="{:.1f}" width="8.4" height="8.4"/>').format(tone, x - 4.2, y - 4.2)
    shape = [(0, -6), (6, 0), (0, 6), (-6, 0)] if tone == "blocked" else [(0, -5.5), (5.5, 4.5), (-5.5, 4.5)]
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shape)
    return Markup('<polygon class="dot {}" points="{}"/>').format(tone, corners)


def key(tone: str, line: bool = False) -> Markup:
    """A small sample of a model's mark (or line) for a legend."""
    if line:
        inner = Markup('<line class="line {}" x1="0" y1="7" x2="26" y2="7"/>').format(tone)
        return Markup('<svg class="key" viewBox="0 0 26 14" width="26" height="14" aria-hidden="true">{}</svg>').format(inner)
    return Markup('<svg class="key" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{}</svg>').format(marker(tone, 7, 7))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low … high inside its ends, at most `most` of them where possible."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside low … high, thinned to six; 1, 2, 5 steps where there are fewer than two powers."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = list(range(first, last + 1))
    if len(powers) >= 2:
        return [10.0**power for power in powers[:: math.ceil(len(powers) / 6)]]
    start = math.floor(math.log10(low))
    fine = [factor * 10.0**power for power in range(start, last + 2) for factor in (1, 2, 5)]
    return [tick for tick in fine if low <= tick <= high] or [low]


def log_label(value: float) -> str:
    """`100`, `0.5`, `0.02`, then powers such as `10⁻⁴`."""
    exponent = round(math.log10(value))
    if -3 <= math.log10(value) + 1e-9 < 4:
        return f"{value:,.6g}"
    factor = value / 10.0**exponent
    return f"10{superscript(exponent)}" if abs(factor - 1) < 1e-6 else f"{factor:.2g}·10{superscript(exponent)}"


def tick_label(ticks: Sequence[float]) -> Form:
    """Decimals as many as the ticks need, with a true minus sign."""
    step = min((b - a for a, b in pairwise(ticks)), default=1.0)
    needed = [digits for digits in range(6) if all(abs(round(tick, digits) - tick) < step * 1e-3 for tick in ticks)]
    return lambda value: number(value, needed[0] if needed else 6)


def padded(values: Sequence[float], least: float) -> tuple[float, float]:
    """A range round the values, at least `least` wide."""
    low, high = min(values), max(values)
    room = max((least - (high - low)) / 2, 0.06 * (high - low))
    return low - room, high + room


def fitted(label: str, room: float) -> str:
    """The label cut with an ellipsis to the room there is."""
    longest = max(3, int(room / CHARACTER))
    return label if len(label) <= longest else label[: longest - 1] + "…"


def frame(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """The SVG element, with its description for screen readers."""
    body = Markup("").join(parts)
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, label, body)


def dot_plot(
    rows: Sequence[Row], label: str, form: Form, span: tuple[float, float] | None = None, rule: float | None = None, least: float = 0.1
) -> Markup | None:
    """Values with 95 % intervals, one row below the other; None where there is nothing to draw.

    Args:
        rows: what to draw; values in the unit that `form` writes.
        label: what the chart shows, for those who do not see it; the values are added.
        form: writes a value.
        span: ends of the axis; from the data by default.
        rule: where to draw a reference line.
        least: least width of an axis taken from the data.
    """
    rows = [row for row in rows if row.dots]
    if not rows:
        return None
    single = all(len(row.dots) == 1 for row in rows)
    left = min(112.0, 12 + CHARACTER * max(len(row.label) for row in rows))
    right = WIDTH - (12 + 6.6 * max(len(form(dot.found.value)) for row in rows for dot in row.dots) if single else 12)
    ends = [end for row in rows for dot in row.dots for end in (dot.found.low, dot.found.high, dot.found.value) if math.isfinite(end)]
    low, high = span or padded([*ends, *([rule] if rule is not None else [])], least)
    place = scale(low, high, left + 7, right - 7)
    heights = [26.0 if len(row.dots) == 1 else 10 + 11.0 * len(row.dots) for row in rows]
    top = 6.0
    bottom = top + sum(heights) + 12.0 * sum(row.apart for row in rows)
    ticks = nice_ticks(low, high, 4)
    parts = [axis_below(ticks, place, top, bottom, form if span else tick_label(ticks))]
    if rule is not None and low <= rule <= high:
        parts.append(Markup('<line class="rule" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(place(rule), top, bottom))
    y, told = top, []
    for row, height in zip(rows, heights, strict=True):
        if row.apart:
            y += 12
            parts.append(Markup('<line class="grid" x1="0" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(WIDTH, y - 6, y - 6))
        middle = y + height / 2
        parts.append(Markup('<text x="0" y="{:.1f}">{}</text>').format(middle + 4, fitted(row.label, left - 4)))
        for index, dot in enumerate(row.dots):
            at = middle + 11.0 * (index - (len(row.dots) - 1) / 2)
            parts.append(whisker(dot, place, at, low, high, f"{row.label}, {dot.name}" if dot.name != row.label else dot.name, form))
            told.append(" ".join([row.label, *([] if single else [dot.name]), full(dot.found, form)]))
        if single:
            value = form(row.dots[0].found.value)
            parts.append(Markup('<text class="value" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(WIDTH, middle + 4, value))
        y += height
    return frame(bottom + 24, f"{label}: {'; '.join(told)}", parts)


def whisker(dot: Dot, place: Callable[[float], float], y: float, low: float, high: float, name: str, form: Form) -> Markup:
    """An interval and its mark, with the numbers as a tooltip; an end beyond the axis is an arrow."""
    left, right = place(max(dot.found.low, low)), place(min(dot.found.high, high))
    tip = f"{name}: {full(dot.found, form)}"
    caps = [(left, 4 if dot.found.low < low else 0), (right, -4 if dot.found.high > high else 0)]
    path = f"M{left:.1f} {y:.1f}H{right:.1f}"
    path += "".join(f"M{x + back:.1f} {y - 3:.1f}L{x:.1f} {y:.1f}L{x + back:.1f} {y + 3:.1f}" for x, back in caps)
    bar = Markup('<path class="whisker {}" d="{}"/>').format(dot.tone, path) if dot.found.bounded else Markup("")
    mark = marker(dot.tone, place(min(max(dot.found.value, low), high)), y)
    return Markup("<g><title>{}</title>{}{}</g>").format(tip, bar, mark)


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map of low … high to start … end."""
    return lambda value: start + (value - low) / ((high - low) or 1.0) * (end - start)


def axis_below(ticks: Sequence[float], place: Callable[[float], float], top: float, bottom: float, form: Form) -> Markup:
    """Grid lines with their labels below."""
    line = Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>')
    text = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
    return Markup("").join(line.format(place(t), top, bottom) + text.format(place(t), bottom + 15, form(t)) for t in ticks)


def thinned(points: Sequence[tuple[float, float]], log: bool) -> tuple[list[tuple[float, float]], int]:
    """At most 300 points, each the mean (geometric on a log axis) of a block of steps; and the block's size."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    if size == 1:
        return list(points), 1
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    mean = (lambda v: math.exp(sum(map(math.log, v)) / len(v))) if log else (lambda v: sum(v) / len(v))
    return [(sum(x for x, _ in block) / len(block), mean([y for _, y in block])) for block in blocks], size


def line_chart(series: Sequence[Series], label: str, log: bool = False, unit: str = "step") -> tuple[Markup | None, str]:
    """Lines over training steps, and a note on what could not be drawn as it is.

    Args:
        series: the lines; x is the optimiser step.
        label: what the chart shows, for those who do not see it; first and last values are added.
        log: a logarithmic axis, from which values of 0 and below are left out.
        unit: what x counts.
    """
    notes, drawn = [], []
    for one in series:
        points = [(x, y) for x, y in one.points if not log or y > 0]
        if len(points) < len(one.points):
            lost = len(one.points) - len(points)
            notes.append(f"{lost} {unit}{'s' if lost > 1 else ''} of {one.name} at exactly 0 left out")
        points, size = thinned(points, log)
        if size > 1:
            notes.append(f"each point of {one.name} is the mean of {size} {unit}s")
        if points:
            drawn.append(Series(one.name, one.tone, points))
    note = "; ".join(notes)
    if not drawn:
        return None, note
    height, top, right = 222.0, 8.0, WIDTH - 8.0
    bottom = height - 36
    xs, ys = ([point[axis] for one in drawn for point in one.points] for axis in (0, 1))
    if log:
        low, high = min(ys) / 1.25, max(ys) * 1.25
        ticks = log_ticks(low, high)
        form: Form = log_label
        across = scale(math.log(low), math.log(high), bottom, top)
        rise: Callable[[float], float] = lambda value: across(math.log(value))  # noqa: E731
    else:
        low, high = padded(ys, 1e-6 + 0.02 * abs(max(ys)))
        ticks = nice_ticks(low, high)
        form = tick_label(ticks)
        rise = scale(low, high, bottom, top)
    left = 10 + CHARACTER * max(len(form(tick)) for tick in ticks)
    run = scale(min(xs), max(xs), left, right)
    parts = [axis_below(nice_ticks(min(xs), max(xs), 4), run, top, bottom, lambda value: number(value, 0))]
    parts.append(
        Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format((left + right) / 2, height - 5, unit)
    )
    for tick in ticks:
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, right, rise(tick), rise(tick)))
        at = rise(tick) + 4
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(left - 6, at, form(tick)))
    told = []
    for one in drawn:
        told.append(f"{one.name} from {significant(one.points[0][1])} to {significant(one.points[-1][1])}")
        if len(one.points) == 1:
            parts.append(marker(one.tone, run(one.points[0][0]), rise(one.points[0][1])))
            continue
        path = "M" + "L".join(f"{run(x):.1f} {rise(y):.1f}" for x, y in one.points)
        parts.append(Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(one.tone, path, one.name))
    return frame(height, f"{label}: {'; '.join(told)}", parts), note
