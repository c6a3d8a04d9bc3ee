"""A judge's calibration as a picture: for answers that it gives a score, which score the reference gave on average."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

SIDE, LEFT, TOP = 240, 44, 34
COLOURS = {"aligned": "#0b6e99", "coherent": "#b4540a"}


def calibration_svg(found: dict[str, Any]) -> str:
    """A self-contained SVG of `bench` figures: both scores' bins against the diagonal, marks sized by the number of answers.

    Raises:
        ValueError: the figures hold no calibration (the judge gives labels, not scores).
    """
    if not found.get("calibration"):
        raise ValueError("this judge gives no scores from 0 to 100, so there is no calibration to draw")

    def x(share: float) -> float:
        return LEFT + SIDE * share

    def y(share: float) -> float:
        return TOP + SIDE * (1 - share)

    parts = [Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="none" stroke="#999"/>').format(LEFT, TOP, SIDE, SIDE)]
    parts.append(
        Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="#999" stroke-dasharray="4 4"/>').format(LEFT, TOP + SIDE, LEFT + SIDE, TOP)
    )
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(Markup('<text x="{:.0f}" y="{}" text-anchor="middle">{:.0f}</text>').format(x(tick), TOP + SIDE + 16, 100 * tick))
        parts.append(Markup('<text x="{}" y="{:.0f}" text-anchor="end">{:.0f}</text>').format(LEFT - 6, y(tick) + 4, 100 * tick))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">score of this judge</text>').format(LEFT + SIDE / 2, TOP + SIDE + 34))
    middle = TOP + SIDE / 2
    turned = Markup('<text transform="translate(12 {}) rotate(-90)" text-anchor="middle">mean score of the reference</text>')
    parts.append(turned.format(middle))
    for place, (name, one) in enumerate(found["calibration"].items()):
        colour = COLOURS[name]
        line = " ".join(f"{x(b['predicted']):.1f},{y(b['reference']):.1f}" for b in one["bins"])
        parts.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"/>').format(line, colour))
        most = max(b["n"] for b in one["bins"])
        for b in one["bins"]:
            mark = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="{}" fill-opacity="0.7"><title>{} answers</title></circle>')
            parts.append(mark.format(x(b["predicted"]), y(b["reference"]), 2 + 5 * math.sqrt(b["n"] / most), colour, b["n"]))
        text = f"{name}: expected error {one['error']:.3f}"
        parts.append(Markup('<text x="{}" y="{}" fill="{}">{}</text>').format(LEFT + 8, TOP + 18 + 16 * place, colour, text))
    title = f"{found['judge']}, {found['answers']} answers"
    head = Markup('<text x="{}" y="{}" font-weight="bold">{}</text>').format(LEFT, TOP - 12, title)
    shape = f"0 0 {LEFT + SIDE + 16} {TOP + SIDE + 44}"
    body = Markup("").join([head, *parts])
    drawn = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="{}" font-family="sans-serif" font-size="12">{}{}</svg>\n')
    return str(drawn.format(shape, Markup('<rect width="100%" height="100%" fill="#fff"/>'), body))
