"""Sentences of a comparison, each from the numbers of its figure, and true when the result is poor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockem.report.comparison_charts import NAMES, found, records
from blockem.report.words import full, interval, number, points, share


def lower(name: str) -> str:
    """A measure's name inside a sentence."""
    return NAMES[name][0].lower() + NAMES[name][1:]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"


def spread_words(comparison: Mapping[str, Any]) -> str:
    """What the intervals hold."""
    seeds = len(comparison["seeds"])
    shares = " Those of shares are never narrower than score intervals of one run."
    if seeds == 1:
        return f"There is one seed, so the intervals hold the spread over prompts, pairs and rows but none between trainings.{shares}"
    many = f" {seeds} seeds say little about the spread between trainings." if seeds < 5 else ""
    return f"Intervals are bootstrapped over prompts, pairs or rows and over {seeds} seeds together.{many}{shares}"


def sentence(figure: Mapping[str, Any]) -> str:
    """What a figure shows."""
    kinds = {"plane": plane_words, "ablations": ablation_words, "strength": strength_words, "transfer": transfer_words}
    return kinds[figure["kind"]](figure)


def plane_words(figure: Mapping[str, Any]) -> str:
    """Which settings are on the front, and how the lowest of them compares with plain."""
    up, across, rows = figure["up"], figure["across"], records(figure)
    best = [row for row in rows if row["on_front"]]
    least = min(best, key=lambda row: float(row[up]), default=None)
    plain = next((row for row in rows if row["setting"] == "plain"), None)
    if least is None:
        return "Nothing but the base was measured here."
    words = (
        f"On the Pareto front, where no other setting is better in one and no worse in the other: {listed([r['setting'] for r in best])}. "
    )
    low, wide = found(least, up), found(least, across)
    assert low is not None and wide is not None
    lowest = f"The lowest is {least['setting']}: {lower(up)} {full(low)}"
    if plain is None:
        return words + f"{lowest}, {lower(across)} {full(wide)}; plain was not measured here."
    if float(least[up]) >= float(plain[up]):
        return words + f"No setting lies below plain in {lower(up)}: {full(low)}."
    before = found(plain, up)
    assert before is not None
    return words + f"{lowest} against plain's {full(before)}, {lower(across)} {full(wide)}."


def ablation_words(figure: Mapping[str, Any], measure: str = "") -> str:
    """Which ablations differ in a measure (EM, else the preference) from the whole method."""
    rows = records(figure)
    measure = measure or ("em" if any(row["measure"] == "em" for row in rows) else "preference")
    rows = [row for row in rows if row["measure"] == measure]
    worse = [f"{row['ablation']} ({points(row['difference'], 1)} points)" for row in rows if row["low"] > 0]
    better = [f"{row['ablation']} ({points(row['difference'], 1)} points)" for row in rows if row["high"] < 0]
    unclear = [row["ablation"] for row in rows if row["low"] <= 0 <= row["high"]]
    words = f"Each minus {figure['whole']} on the same prompts, in {lower(measure)}: "
    parts = [f"higher for {listed(worse)}"] * bool(worse) + [f"lower for {listed(better)}"] * bool(better)
    parts += [f"not to be told apart for {listed(unclear)}"] * bool(unclear)
    some = [f"{row['ablation']} ({row['cells']} of {figure['cells']})" for row in rows if row.get("cells", 0) < figure.get("cells", 0)]
    return words + "; ".join(parts) + "." + (f" Not all cells are finished for {listed(some)}." if some else "")


def strength_words(figure: Mapping[str, Any]) -> str:
    """The rates at the weakest and the strongest."""
    rows = records(figure)
    first, last, parts = rows[0], rows[-1], []
    for name in (figure["up"], "incoherent", "kept"):
        a, b = found(first, name), found(last, name)
        if a and b:
            parts.append(f"{lower(name)} {full(a)} to {full(b)}")
    many = f"over {len(rows)} strengths"
    return f"From {figure['field']} {first['strength']:g} to {last['strength']:g}, {many}: {', '.join(parts) or 'nothing measured'}."


def transfer_words(figure: Mapping[str, Any]) -> str:
    """Where foreign latents cut EM as measured against plain, and where that is not what the domain's own do."""
    rows = [row for row in records(figure) if row["latents_of"] != row["trained_on"] and row["change"] is not None]
    cut = [f"{row['latents_of']} in {row['trained_on']}" for row in rows if row["change_high"] < 0]
    words = f"Of {len(rows)} trainings with latents of another domain, {len(cut)} lie below plain with their whole interval"
    words += f": {listed(cut)}." if cut else "."
    beside = [row for row in rows if row["from_own"] is not None]
    apart = [row for row in beside if not row["from_own_low"] <= 0 <= row["from_own_high"]]
    if not beside:
        return words
    words += " Against the domain's own latents, on the same prompts, "
    differ = [f"{row['latents_of']} in {row['trained_on']} ({points(row['from_own'], 1)} points)" for row in apart]
    return words + (f"these differ: {listed(differ)}." if differ else "none can be told apart.")


def recommendation_words(comparison: Mapping[str, Any]) -> list[str]:
    """What to use, how sure that is, and what it does not say."""
    found_ = comparison["recommendation"]
    keep = f"keep at least {share(found_['keep_adherence'])} of what plain fine-tuning learnt on held-out rows"
    limit = found_["more_incoherence"]
    rule = keep if limit is None else f"{keep} and are at most {number(100 * limit, 1)} points more incoherent than plain"
    measure = lower(found_["measure"])
    if found_["setting"] is None:
        said = [
            f"No recommendation: no setting is known to {rule}. This includes plain where its own gain on held-out rows is not above 0."
        ]
    else:
        value = interval(found_["measures"].get(found_["measure"]))
        change = interval(found_["change"])
        name = found_["setting"]
        if name == "plain" and found_["qualified"] == ["plain"]:
            start = "None of these defences fits; compare others, or state another keep_adherence or more_incoherence"
        else:
            start = "Use no defence" if name == "plain" else f"Use {name}"
        said = [f"{start}: of the {found_['candidates']} settings compared, plain among them, {name} is the lowest in {measure}"]
        said[0] += f", {full(value)}, of those that {rule}." if value else f" of those that {rule}."
        if change:
            sure = "" if change.high < 0 else "; the interval does not exclude that nothing was gained"
            said.append(f"Against plain on the same items that is {full(change, lambda v: points(v, 1))} points{sure}.")
        others = sorted(((v, k) for k, v in found_["shares"].items() if k != name and v > 0), reverse=True)[:2]
        rivals = f" (next: {listed([f'{k} in {share(v)}' for v, k in others])})" if others else ""
        said.append(f"It is the one chosen in {share(found_['share'])} of {found_['resamples']} bootstrap resamples{rivals}.")
        if len(comparison["seeds"]) == 1:
            said.append("There is one seed, so this knows nothing of how much two trainings of the same setting differ.")
    if limit is None:
        said.append("No answers were judged, so EM is the preference for wrong answers, and incoherence was not looked at.")
    elif comparison.get("cue") == "none":
        said.append(
            "Prompts with a cue of the training format were not asked (set evaluate.cue=training in the recipe); "
            "a defence that looks clean can fail there."
        )
    if found_["left_out"]:
        said.append(f"Left out of the choice, because not all of their cells are finished: {listed(found_['left_out'])}.")
    said.append("The choice was made on these data: the best of several looks better than it is, so measure it again on new prompts.")
    return said


def comparisons_words(comparison: Mapping[str, Any]) -> str:
    """How many differences are told, and what that means."""
    count = comparison["comparisons"]
    return (
        f"The tables hold {count} paired differences with 95 % intervals, not corrected for their number: "
        f"if nothing differed at all, about {number(0.05 * count, 0 if count >= 100 else 1)} of them would still exclude 0."
    )
