"""The part of the report on how the models came about: the run, training curves, the blocking strength, the latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from blockem.report.charts import Series, line_chart
from blockem.report.results import Figure
from blockem.report.words import MINUS, NBSP, dig, duration, finite, latents_by_block, number, points, share, significant

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Context:
    """A place where a latent is active: the text before, the token, the text after."""

    before: str
    token: str
    after: str
    activation: str


@dataclass(frozen=True)
class Latent:
    """A chosen latent as its card shows it."""

    latent: str
    raised: bool
    facts: Facts
    promotes: list[str]
    suppresses: list[str]
    contexts: list[Context]


def rows_of(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; empty for anything else."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def written(value: Any) -> str:
    """A value of the summary as text: numbers short, whole numbers whole, other things as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    known = finite(value)
    return str(value) if known is None else significant(known)


def filled(pairs: Iterable[tuple[str, Any]]) -> Facts:
    """The pairs that have a value."""
    return [(name, text) for name, value in pairs if value is not None and (text := written(value).strip())]


def find(tree: Any, key: str) -> Any:
    """The first value under a key anywhere in nested dicts, the upper levels first."""
    if not isinstance(tree, Mapping):
        return None
    if tree.get(key) is not None:
        return tree[key]
    return next((found for branch in tree.values() if (found := find(branch, key)) is not None), None)


def count_of_rows(part: Any) -> str | None:
    """`1,580 of 1,600 rows, 74,210 tokens trained on`, with what was left out."""
    rows, kept = finite(dig(part, "rows")), finite(dig(part, "kept"))
    if kept is None and rows is None:
        return None
    shown = kept if kept is not None else rows
    text = f"{number(shown or 0, 0)} rows" if rows in (None, shown) else f"{number(shown or 0, 0)} of {number(rows or 0, 0)} rows"
    tokens = finite(dig(part, "supervised_tokens"))
    if tokens is not None:
        text += f", {number(tokens, 0)} tokens with loss"
    odd = [f"{number(n, 0)} {name}" for name in ("duplicates", "truncated") if (n := finite(dig(part, name)))]
    dropped = dig(part, "dropped")
    if isinstance(dropped, list) and dropped:
        odd.append(f"{len(dropped)} dropped")
    return text + (f" ({', '.join(odd)})" if odd else "")


def run_facts(summary: Mapping[str, Any]) -> tuple[Facts, Facts]:
    """What was run, in brief; and the rest of the environment and the seconds of each step."""
    environment, sae, seconds = (summary.get(key) or {} for key in ("environment", "sae", "seconds"))
    block = dig(sae, "block")
    explained, dead, active = (finite(dig(sae, key)) for key in ("variance_explained", "dead_share", "mean_active"))
    fit = [
        f"{share(explained)} of variance explained" if explained is not None else "",
        f"{share(dead, 1)} dead" if dead is not None else "",
        f"{significant(active)} latents active a token" if active is not None else "",
    ]
    known = [(str(name), value) for name, raw in seconds.items() if (value := finite(raw)) is not None]
    brief = filled(
        [
            ("Model", dig(environment, "model")),
            ("Revision", dig(environment, "revision") or dig(summary.get("recipe"), "model", "revision")),
            ("Training domain", summary.get("training_domain")),
            ("Training rows", count_of_rows(dig(summary, "data", "train"))),
            ("Held-out rows", count_of_rows(dig(summary, "data", "heldout"))),
            ("SAE", dig(sae, "id")),
            ("SAE fit", "; ".join(part for part in fit if part)),
            *((f"Defence {name}", used_words(facts)) for name, facts in (summary.get("defences_used") or {}).items()),
            ("Block", None if block is None else f"{written(block)} (from 0; its output)"),
            ("Seed", find(summary.get("recipe"), "seed")),
            ("Device", ", ".join(str(v) for key in ("device", "dtype") if (v := dig(environment, key)) is not None)),
            ("Time", duration(sum(value for _, value in known)) if known else None),
        ]
    )
    shown = {"blockem", "model", "revision", "device", "dtype"}
    rest = [("blockem", summary["blockem"]), *((str(key), value) for key, value in environment.items() if key not in shown)]
    rest += [
        ("SAE digest", dig(sae, "digest")),
        ("SAE measured on", f"{written(t)} tokens" if (t := dig(sae, "tokens")) is not None else None),
    ]
    return brief, filled([*rest, *((f"{name}, time", duration(value)) for name, value in known)])


def used_words(facts: Any) -> str | None:
    """`strength 0.1, projected 3, of 21`: what a defence was run with; None where it says nothing of it."""
    if not isinstance(facts, Mapping):
        return None
    named = [(str(name).replace("_", " "), value) for name, value in facts.items() if name != "defence" and value is not None]
    return ", ".join(f"{name} {written(value)}" for name, value in named) or "on"


def curve(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """(step, value) of the first of the keys that a row has."""
    points = []
    for row in rows:
        step = finite(row.get("step"))
        value = next((found for key in keys if (found := finite(row.get(key))) is not None), None)
        if step is not None and value is not None:
            points.append((step, value))
    return points


def training_figures(summary: Mapping[str, Any], tone: Mapping[str, str]) -> list[Figure]:
    """SFT loss of every trained model, then for those with a penalty its share of P_mis and both gradient norms."""
    runs = {str(name): rows_of(rows) for name, rows in (summary.get("training") or {}).items()}
    ordered = [name for name in tone if runs.get(name)] + [name for name in runs if name not in tone and runs[name]]
    style = {name: tone.get(name, "other-0") for name in ordered}
    losses = [Series(name, style[name], curve(runs[name], "sft_loss", "loss")) for name in ordered]
    shares = [Series(name, style[name], curve(runs[name], "penalty_share")) for name in ordered]
    figures = [
        drawn("SFT loss", "Nats per token, each optimiser step.", losses),
        drawn("Penalty", "As a share of what the plain model would pay; logarithmic.", shares, log=True),
    ]
    anchors = [Series(name, style[name], curve(runs[name], "anchor_share", "anchor")) for name in ordered]
    figures.append(drawn("Anchor", "On general prompts; 1 is what the plain model would pay; logarithmic.", anchors, log=True))
    lambdas = [Series(name, style[name], curve(runs[name], "lambda")) for name in ordered]
    moving = [one for one in lambdas if len({value for _, value in one.points}) > 1]
    figures.append(drawn("λ", "As it followed what was asked for; logarithmic.", moving, log=True))
    going = [Series(name, style[name], curve(runs[name], "monitor_survives")) for name in ordered]
    figures.append(drawn("Plain fine-tuning's shift that survives", "At the SAE's block, seen by the monitor.", going))
    for name in ordered:
        norms = [
            Series("SFT loss", "other-1" if style[name] == "other-0" else "other-0", curve(runs[name], "grad_norm_sft")),
            Series("penalty", style[name], curve(runs[name], "grad_norm_penalty")),
        ]
        if norms[1].points:
            figures.append(drawn(f"Gradient norms, {name}", "Of the SFT loss and of λ × penalty; logarithmic.", norms, log=True))
    return [figure for figure in figures if figure.chart is not None]


def drawn(title: str, caption: str, series: list[Series], log: bool = False, unit: str = "step") -> Figure:
    """A line chart with its legend and any note on what was left out."""
    series = [one for one in series if one.points]
    chart, note = line_chart(series, title, log, unit)
    return Figure(
        title, f"{caption} {note[:1].upper()}{note[1:]}{'.' if note else ''}".strip(), chart, [(one.name, one.tone) for one in series]
    )


def blocking_facts(summary: Mapping[str, Any]) -> tuple[Markup, Facts]:
    """A sentence on λ and how it was set, and the numbers behind it."""
    raw = summary.get("blocking") or {}
    lambda_, r, delta, p_mis = (finite(dig(raw, key)) for key in ("lambda", "r", "delta_sft", "p_mis"))
    if lambda_ is None:
        return Markup(""), []
    said = Markup("λ = {}").format(significant(lambda_, 4))
    if r is not None and delta is not None and p_mis is not None:
        said += Markup(" = <i>r</i> · Δ<sub>SFT</sub> ÷ P<sub>mis</sub> = {} · {} ÷ {}, where Δ<sub>SFT</sub> is the loss").format(
            significant(r, 4), significant(delta, 4), significant(p_mis, 4)
        )
        said += Markup(" that plain fine-tuning gained and P<sub>mis</sub> the penalty that the plain model would pay.")
    elif p_mis is not None:
        said += Markup("; P<sub>mis</sub>, the penalty that the plain model would pay, is {}.").format(significant(p_mis))
    else:
        said += "."
    frozen = dig(raw, "freeze_downstream")
    by_rule = r is not None and delta is not None
    target = dig(raw, "target")
    follows = [f"a {kind} of {share(value)}" for kind in ("ceiling", "floor") if (value := finite(dig(target, kind))) is not None]
    on, texts = dig(raw, "anchor", "watch"), finite(dig(raw, "anchor", "n"))
    grown = sum(len(rows_of_pairs) for row in rows_of(dig(raw, "grown")) if isinstance(rows_of_pairs := row.get("latents"), list))
    facts = [
        ("Blocked together", latents_by_block(summary) or None),
        ("Rule for λ", None if by_rule else dig(raw, "rule")),
        ("λ then follows", follows[0] if follows else None),
        ("Blocks after the blocked one", None if frozen is None else "frozen" if frozen else "trained too"),
        ("Anchored on", f"{on}, {texts:.0f} of them" if on and texts is not None else None),
        ("Latents added in training", number(grown, 0) if grown else None),
    ]
    return said, filled(facts)


def funnel(summary: Mapping[str, Any]) -> tuple[Facts, str, Facts]:
    """Steps from all latents to the chosen ones, what effect they were chosen by, and the fates of the rest."""
    discovery = summary.get("discovery") or {}
    wanted = [
        ("in the SAE", "n_latents"),
        ("candidates", "candidates"),
        ("screened", "screened"),
        ("passed", "passed"),
        ("swept", "swept"),
        ("chosen", "chosen"),
    ]
    steps = [(label, number(count, 0)) for label, key in wanted if (count := finite(dig(discovery, key))) is not None]
    effect = dig(discovery, "effect")
    known = {
        "preference": "the margin on pairs kept for the purpose, in nats per token and without sampling",
        "judged": "the share of sampled answers that the judge calls misaligned",
    }
    fates = [
        (str(name).replace("_", " "), number(count, 0)) for name, raw in (dig(discovery, "fates") or {}).items() if (count := finite(raw))
    ]
    return steps, known.get(str(effect), str(effect)) if effect else "", fates


def words(tokens: Any) -> list[str]:
    """Tokens without the blanks round them, each once; blank ones made visible."""
    given = [str(token) for token in tokens if token is not None] if isinstance(tokens, list) else []
    return list(dict.fromkeys(visible(token).strip() for token in given))


def context(place: Mapping[str, Any]) -> Context:
    """A context as the page shows it: blanks round the token stand outside its mark."""
    before, token, after = (str(place.get(key) or "") for key in ("before", "token", "after"))
    if token.strip(" "):
        before += token[: len(token) - len(token.lstrip(" "))]
        after = token[len(token.rstrip(" ")) :] + after
        token = token.strip(" ")
    active = finite(place.get("activation"))
    return Context(*shortened(before, visible(token), after), "" if active is None else significant(active, 2))


def visible(token: str) -> str:
    """A token with its line breaks and tabs shown; blank ones as ␣."""
    shown = token.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
    return shown if shown.strip() else "␣" * max(1, len(shown))


def shortened(before: str, token: str, after: str) -> tuple[str, str, str]:
    """The three texts with at most 200 characters before the token and 100 after it."""
    return (("…" + before[-200:] if len(before) > 200 else before), token, (after[:100] + "…" if len(after) > 100 else after))


def latents(summary: Mapping[str, Any]) -> list[Latent]:
    """The chosen latents in the order of the summary (best first)."""
    cards = []
    judged = dig(summary, "discovery", "effect") == "judged"
    for row in rows_of(summary.get("latents")):
        raised = (finite(row.get("sign")) or 0) >= 0
        gains = [
            (name, finite(row.get(key)), finite(row.get(f"{key}_alpha"))) for name, key in (("Induce", "induce"), ("Repair", "repair"))
        ]
        facts = filled([("Δ", None if (d := finite(row.get("delta"))) is None else f"{'+' if d > 0 else ''}{significant(d)}")])
        for name, gain, alpha in gains:
            if gain is not None:
                size = f"{points(gain)}{NBSP}points" if judged else number(gain, 3, plus=True)
                at = f"{NBSP}at{NBSP}α{NBSP}={NBSP}{significant(alpha)}" if alpha is not None else ""
                facts.append((name, f"{size}{at}"))
        facts += filled([("Score", None if (score := finite(row.get("score"))) is None else points(score) if judged else number(score, 3))])
        contexts = []
        for place in rows_of(row.get("contexts")):
            contexts.append(context(place))
        tokens = [words(row.get(key)) for key in ("promotes", "suppresses")]
        cards.append(Latent("?" if row.get("latent") is None else str(row["latent"]), raised, facts, tokens[0], tokens[1], contexts))
    return cards


def sign_words(raised: bool) -> str:
    """How the sign of a latent is written."""
    return "+ raised by fine-tuning" if raised else f"{MINUS} lowered by fine-tuning"
