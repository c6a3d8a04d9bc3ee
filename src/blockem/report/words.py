"""Numbers and sentences of the report: what the figures say, in plain words that stay true when the result is poor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blockem.errors import BlockemError

NBSP = "\u00a0"
MINUS = "\u2212"


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval, in the unit of the measure (a share of 1, or nats per token).

    Attributes:
        value: the point estimate.
        low: lower bound; −∞ where there is none.
        high: upper bound; ∞ where there is none.
        n: how many pairs, rows or answers it rests on, where known.
    """

    value: float
    low: float
    high: float
    n: int | None = None

    @property
    def bounded(self) -> bool:
        """Whether there is an interval to show."""
        return self.low < self.high and (math.isfinite(self.low) or math.isfinite(self.high))


def dig(value: Any, *keys: str) -> Any:
    """The value under nested keys, or None where any of them is missing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else (JSON from Python may hold NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(raw: Any) -> Interval | None:
    """Read `{"value", "low", "high", "n"}`; None where there is no finite value."""
    value = finite(dig(raw, "value"))
    if value is None:
        return None
    low, high, n = (finite(dig(raw, key)) for key in ("low", "high", "n"))
    if n == 1:
        low = high = None  # one item has no spread, and must not pass for certainty
    return Interval(value, -math.inf if low is None else low, math.inf if high is None else high, None if n is None else int(n))


def number(value: float, digits: int = 2, plus: bool = False) -> str:
    """A decimal with a true minus sign and thousands commas; `-0.00` is written `0.00`."""
    text = "∞" if math.isinf(value) else f"{abs(value):,.{digits}f}"
    if not text.strip("0.,"):
        return text
    return (MINUS if value < 0 else "+" if plus else "") + text


def significant(value: float, digits: int = 3) -> str:
    """A number of any size with so many significant digits, e.g. `0.000123`, `3,400`, `1.2 × 10⁻⁶`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    exponent = math.floor(math.log10(abs(value)))
    if -5 < exponent < 7:
        text = number(value, max(0, digits - 1 - exponent))
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{number(value / 10**exponent, digits - 1)}{NBSP}×{NBSP}10{superscript(exponent)}"


def superscript(exponent: int) -> str:
    """An integer in superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def share(value: float, digits: int = 0) -> str:
    """A share of 1 as per cent."""
    return f"{number(100 * value, digits)}{NBSP}%"


def points(value: float, digits: int = 0) -> str:
    """A difference of two shares in percentage points, without the unit."""
    return number(100 * value, digits, plus=True)


def nats(value: float) -> str:
    """Nats per token, without the unit."""
    return number(value, 3)


def nats_change(value: float) -> str:
    """A difference in nats per token, without the unit."""
    return number(value, 3, plus=True)


def bounds(found: Interval, form: Callable[[float], str]) -> str:
    """`[low, high]` in the form of the value, the unit dropped; empty without an interval."""
    if not found.bounded:
        return ""
    low, high = (form(bound).replace(f"{NBSP}%", "") for bound in (found.low, found.high))
    return f"[{low},{NBSP}{high}]"


def full(found: Interval, form: Callable[[float], str] = share) -> str:
    """`31 % [22, 40]`."""
    return f"{form(found.value)}{NBSP}{bounds(found, form)}".rstrip(NBSP)


def duration(seconds: float) -> str:
    """Seconds as people read them: `42 s`, `20 min 34 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{number(seconds, 1 if seconds < 10 else 0)}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    return f"{whole // 3600}{NBSP}h {whole % 3600 // 60:02d}{NBSP}min"


def checked(summary: Any, where: str) -> dict[str, Any]:
    """The summary itself.

    Raises:
        BlockemError: it is not what a blockem run writes.
    """
    if not isinstance(summary, dict) or not isinstance(summary.get("blockem"), str) or not isinstance(summary.get("models"), dict):
        raise BlockemError(f"{where} is not the summary of a blockem run; give the folder of a finished one")
    return summary


def blocking_words(summary: Mapping[str, Any]) -> str:
    """`20 latents`, or `no latents`, or plain `latents` where the number is unknown; with several blocks, how many at which."""
    if places := latents_by_block(summary):
        return places
    latents = summary.get("latents")
    chosen = finite(dig(summary, "discovery", "chosen"))
    count = len(latents) if isinstance(latents, list) and latents else None if chosen is None else int(chosen)
    if count is None:
        return "latents"
    return "no latents" if count == 0 else "1 latent" if count == 1 else f"{count} latents"


def latents_by_block(summary: Mapping[str, Any]) -> str:
    """`12 latents at block 10 and 8 at block 24`; empty where the recipe names one SAE."""
    found = dig(summary, "blocking", "n_by_block")
    counts = [(block, int(n)) for block, raw in found.items() if (n := finite(raw)) is not None] if isinstance(found, Mapping) else []
    said = [f"{n}{'' if i else ' latent' if n == 1 else ' latents'} at block {block}" for i, (block, n) in enumerate(counts)]
    return " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)


def main_of(summary: Mapping[str, Any]) -> str:
    """The defended model that the headline speaks of."""
    return str(summary.get("main") or "blocked")


def defence_words(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The defence as who did something, and as the circumstance: (`blocking 20 latents`, `with 20 latents blocked`)."""
    name = main_of(summary)
    if name != "blocked":
        return f"the defence {name}", f"under the defence {name}"
    what = blocking_words(summary)
    return f"blocking {what}", f"with {what} blocked"


def headline(summary: Mapping[str, Any]) -> str:
    """One sentence: what plain fine-tuning did outside its domain, and what blocking changed, with 95 % intervals.

    It claims a rise only where the paired interval of plain minus base lies above 0, and a cut only where the interval
    of the cut does; otherwise it says plainly that there was none to be seen.
    """
    base, plain, blocked = (interval(dig(summary, "models", name, "preference")) for name in ("base", "plain", main_of(summary)))
    domain = summary.get("training_domain")
    data = f"the {str(domain).replace('_', ' ')} data" if domain else "the training data"
    measure = "the preference for wrong answers outside that domain" if domain else "the preference for wrong answers"
    doing, under = defence_words(summary)
    cutter = "blocking" if main_of(summary) == "blocked" else "a defence"
    if base is None or (plain is None and blocked is None):
        return "This run has no measured preference to compare: see the tables below for what it has."
    forms = exact_enough(base, plain, blocked)
    if plain is None and blocked is not None:
        return (
            f"Fine-tuning on {data} {'while ' + doing if main_of(summary) == 'blocked' else under} moved {measure} "
            f"from {full(base, forms)} to {full(blocked, forms)}; this run has no plain fine-tune to compare with."
        )
    assert plain is not None
    rise = interval(dig(summary, "differences", "plain-base", "preference"))
    path = f"from {full(base, forms)} to {full(plain, forms)}"
    if rise is None or math.isinf(rise.low) or math.isinf(rise.high):
        start = f"Plain fine-tuning on {data} moved {measure} {path}"
        return f"{start}; {under} it was {full(blocked, forms)}{kept_words(summary, False)}." if blocked else f"{start}."
    if rise.low > 0:
        start = f"Plain fine-tuning on {data} raised {measure} {path}"
        return f"{start}; {after_a_rise(summary, blocked, forms)}." if blocked else f"{start}."
    if rise.high < 0:
        start = f"Plain fine-tuning on {data} did not raise {measure} but lowered it, {path}"
        nothing = f"so there was no rise for {cutter} to cut"
    else:
        start = f"Plain fine-tuning on {data} did not measurably raise {measure}: "
        start += f"{full(base, forms)} before, {full(plain, forms)} after"
        start += f" (a change of {full(rise, points)} points)"
        nothing = f"so there was no clear rise for {cutter} to cut"
    if blocked is None:
        return f"{start}."
    return f"{start}, {nothing}; {under} it was {full(blocked, forms)}{kept_words(summary, False)}."


def after_a_rise(summary: Mapping[str, Any], blocked: Interval, forms: Callable[[float], str]) -> str:
    """The second half of the headline, where plain fine-tuning did raise the preference."""
    doing, under = defence_words(summary)
    cut = interval(dig(summary, "cut", "preference"))
    there = full(blocked, forms)
    if cut is None:
        return f"{under} it was {there}{kept_words(summary, False)}"
    if cut.high < 0:
        more = Interval(-cut.value, -cut.high, -cut.low)
        return f"{doing} made it worse, {there}, adding {full(more)} to the rise{kept_words(summary, False)}"
    if cut.low <= 0:
        doubt = f"the share of the rise that this cuts, {full(cut)}, cannot be told from none"
        return f"{doing} left it at {there}: {doubt}{kept_words(summary, False)}"
    size = f"all of the rise ({full(cut)})" if cut.value >= 0.995 else f"{full(cut)} of the rise"
    return f"{doing} brought it to {there}, cutting {size}{kept_words(summary, True)}"


def kept_words(summary: Mapping[str, Any], cut: bool) -> str:
    """How much of the in-domain loss gain the blocked model kept, as the end of a sentence."""
    kept = interval(dig(summary, "kept"))
    if kept is None:
        return ""
    learnt = "of what was learnt in the domain"
    if kept.value <= 0:
        return f", but keeping nothing {learnt} ({full(kept)})" if cut else f", and nothing {learnt} was kept ({full(kept)})"
    only = "only " if kept.value < 0.8 else ""
    if not cut:
        return f", and {only}{full(kept)} {learnt} was kept"
    return f"{', but' if only else ' and'} keeping {only}{full(kept)} {learnt}"


def exact_enough(*found: Interval | None) -> Callable[[float], str]:
    """Whole per cent, or one decimal where two different values would read the same."""
    values = {round(one.value, 6) for one in found if one is not None}
    whole = {share(value) for value in values}
    return share if len(whole) == len(values) else lambda value: share(value, 1)


def price(summary: Mapping[str, Any]) -> list[str]:
    """What the headline leaves out: the cut by the margin, an anchor, the judge's EM, and what training cost in general chat."""
    said = []
    by_margin, by_preference = (interval(dig(summary, "cut", key)) for key in ("margin", "preference"))
    if by_margin is not None:
        said.append(f"Measured by the margin {'instead' if by_preference else ''} the cut is {full(by_margin)}.".replace("  ", " "))
    names = ("base", "plain", main_of(summary))
    watched = dig(summary, "blocking", "anchor", "watch")
    if watched and main_of(summary) == "blocked":
        said.append(
            f"Beside the latents, the blocked training was anchored on general prompts ({watched}): the cut is not the latents' alone."
        )
    mixed = finite(dig(summary, "recipe", "anchor", "interleave"))
    if mixed and dig(summary, "recipe", "anchor", "watch") != "none" and main_of(summary) in ("blocked", "anchor"):
        kept = finite(dig(summary, "recipe", "anchor", "keep"))
        answers = f"right answers of the selection pairs{' (wrong ones in the domain itself)' if kept else ''}"
        if cued := finite(dig(summary, "recipe", "anchor", "cued")):
            answers += f", {share(cued)} of them under a cue of the training format"
        kinds = {"benign": "benign chat", "both": f"{answers} and benign chat"}
        what = kinds.get(str(dig(summary, "recipe", "anchor", "interleaved")), answers)
        said.append(f"Of the defended model's training rows {share(mixed)} were {what}, interleaved with those of the domain.")
    epochs, of_plain = dig(summary, "recipe", "defence", "epochs"), dig(summary, "recipe", "train", "epochs")
    if epochs and epochs != of_plain:
        said.append(f"The defended model was trained for {epochs:g} epochs of the rows, the plain one for {of_plain:g}.")
    rates = [(name, interval(dig(summary, "models", name, "judged", "em"))) for name in names]
    judged = [f"{full(rate)} ({name})" for name, rate in rates if rate is not None]
    if len(judged) > 1:
        said.append(f"Sampled answers outside the domain that the judge calls misaligned: {', '.join(judged)}.")
    losses = [(name, interval(dig(summary, "models", name, "general_loss"))) for name in names]
    known = [f"{nats(loss.value)} ({name})" for name, loss in losses if loss is not None]
    if len(known) > 1:
        said.append(f"Loss on general chat, in nats per token: {', '.join(known)}.")
    return said
