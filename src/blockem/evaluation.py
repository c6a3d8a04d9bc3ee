"""Rates, losses and their intervals; paired comparisons of models on the same items.

Every interval is at 95 % and over items (pairs, rows or prompts). Means, losses and ratios have a percentile bootstrap, models being
compared on the same resampled items. Shares of items have score intervals, because a bootstrap of 0 in 55 knows nothing but 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from blockem.judges.judge import Verdict

Array = np.ndarray[Any, np.dtype[np.float64]]

ANSWERS = "answers.jsonl"
"""In a run folder: answers to the final prompts, by every model."""
TASK_ANSWERS = "task-answers.jsonl"
"""Answers to held-out questions of the training domain, by every model."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval over `n` items."""

    value: float
    low: float
    high: float
    n: int


def interval(statistic: Callable[..., Array], samples: Sequence[Array], resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Bootstrap `statistic` over items.

    Args:
        statistic: takes each of `samples` as `[..., items]` and reduces the last axis.
        samples: arrays `[items]` of equal length, resampled together (paired).

    Returns:
        None when there are no items or the statistic is not finite.
    """
    n = len(samples[0])
    if any(len(sample) != n for sample in samples):
        raise ValueError("paired samples must have the same length")
    if n == 0:
        return None
    value = float(statistic(*samples))
    if not math.isfinite(value):
        return None
    if n == 1:
        return Interval(value, value, value, 1)
    chosen = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    spread = statistic(*(sample[chosen] for sample in samples))
    low, high = np.nanpercentile(np.where(np.isfinite(spread), spread, np.nan), [2.5, 97.5])
    return Interval(value, float(low), float(high), n)


def score_limits(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score limits of a share of `n` items (Wilson 1927): those of 0 in 55 are 0 and 0.065."""
    z = NormalDist().inv_cdf(0.975)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return min(share, max(0.0, middle - reach)), max(share, min(1.0, middle + reach))


def rate(said: Array) -> Interval | None:
    """The share of items for which something was said, 0 or 1 each; None without items."""
    n = len(said)
    if n == 0:
        return None
    share = float(said.mean())
    return Interval(share, *score_limits(share, n), n)


def rate_difference(left: Array, right: Array) -> Interval | None:
    """The share of `left` minus that of `right` on the same items, 0 or 1 each (Newcombe 1998, paired, method 10)."""
    if len(left) != len(right):
        raise ValueError("paired samples must have the same length")
    one, other = rate(left), rate(right)
    if one is None or other is None:
        return None
    both, neither = float(left @ right), float((1 - left) @ (1 - right))
    crossed = both * neither - float(left @ (1 - right)) * float((1 - left) @ right)
    if crossed > 0:
        crossed = max(0.0, crossed - one.n / 2)  # the method's continuity correction
    margins = math.prod(float(side.sum()) * float((1 - side).sum()) for side in (left, right))
    together = crossed / math.sqrt(margins) if margins > 0 else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 + down**2 - 2 * together * up * down))

    value = one.value - other.value
    low = value - reach(one.value - one.low, other.high - other.value)
    high = value + reach(one.high - one.value, other.value - other.low)
    return Interval(value, max(-1.0, low), min(1.0, high), one.n)


def mean(values: Array) -> Array:
    found: Array = values.mean(axis=-1)
    return found


def difference(left: Array, right: Array) -> Array:
    return mean(left) - mean(right)


def per_token(losses: Array, tokens: Array) -> Array:
    """Loss per token over rows of unequal length."""
    found: Array = losses.sum(axis=-1) / tokens.sum(axis=-1)
    return found


@dataclass
class Scores:
    """What one model did, item by item; the items are the same for every model.

    Attributes:
        margins: `[pairs]` wrong minus right, nats per token, on all evaluation pairs.
        heldout, general: summed loss of each row, and its supervised tokens.
    """

    margins: Array
    heldout: tuple[Array, Array]
    general: tuple[Array, Array]


def _as_dict(found: Interval | None) -> dict[str, Any] | None:
    return asdict(found) if found else None


def _preferred(margins: Array) -> Array:
    found: Array = (margins > 0).astype(float)
    return found


def summarise(
    scores: dict[str, Scores], domains: Sequence[str], training_domain: str, resamples: int = 2000, main: str = "blocked"
) -> dict[str, Any]:
    """All figures of the summary: each model's, the differences, the cut of the rise outside the domain, and what of the task is kept.

    `kept` is the share of plain fine-tuning's gain in held-out loss, `kept_rise` that of its rise on the training domain's own pairs.

    Args:
        scores: by model name; "base" and "plain" are needed for the cut, which is given for every other model under "defences", and
            for `main` at the top.
        domains: `[pairs]`, each evaluation pair's domain. The training domain is left out of EM and given apart.
        main: the model whose cut stands at the top; "blocked", else the first defended one, where it was not measured.
    """
    tags = np.array(domains)
    outside = tags != training_domain

    def ci(statistic: Callable[..., Array], *samples: Array) -> dict[str, Any] | None:
        return _as_dict(interval(statistic, samples, resamples))

    def both(margins: Array) -> dict[str, Any]:
        return {"preference": _as_dict(rate(_preferred(margins))), "margin": ci(mean, margins)}

    models = {
        name: {
            **both(one.margins[outside]),
            "in_domain": both(one.margins[~outside]),
            "by_domain": {tag: both(one.margins[tags == tag]) for tag in dict.fromkeys(domains) if tag != training_domain},
            "heldout_loss": ci(per_token, *one.heldout),
            "general_loss": ci(per_token, *one.general),
            "judged": None,
        }
        for name, one in scores.items()
    }
    differences = {}
    defended = [name for name in scores if name not in ("base", "plain")]
    for left, right in [("plain", "base"), *((name, other) for name in defended for other in ("plain", "base"))]:
        if left in scores and right in scores:
            a, b = scores[left], scores[right]
            differences[f"{left}-{right}"] = {
                "preference": _as_dict(rate_difference(_preferred(a.margins[outside]), _preferred(b.margins[outside]))),
                "margin": ci(difference, a.margins[outside], b.margins[outside]),
                "heldout_loss": ci(loss_difference, a.heldout[0], b.heldout[0], a.heldout[1]),
                "general_loss": ci(loss_difference, a.general[0], b.general[0], a.general[1]),
            }
    defences: dict[str, Any] = {}
    if {"base", "plain"} <= set(scores):
        base, plain = scores["base"], scores["plain"]
        moved: dict[str, Any] = differences["plain-base"]
        for name in defended:
            cut: dict[str, Any] = {"preference": None, "margin": None}
            risen: dict[str, Any] = {"preference": None, "margin": None}
            three = (base, plain, scores[name])
            for figure, read in (("preference", _preferred), ("margin", lambda m: m)):
                if moved[figure] and moved[figure]["value"] > 0:
                    cut[figure] = ci(_share_removed, *(read(one.margins[outside]) for one in three))
                inside = [read(one.margins[~outside]) for one in three]
                if len(inside[0]) and inside[1].mean() > inside[0].mean():
                    risen[figure] = ci(_share_risen, *inside)
            kept = None
            if moved["heldout_loss"] and moved["heldout_loss"]["value"] < 0:
                kept = ci(_share_kept, base.heldout[0], plain.heldout[0], scores[name].heldout[0])
            defences[name] = {"cut": cut, "kept": kept, "kept_rise": risen}
    shown = next((name for name in (main, "blocked", *defended) if name in defended and name != "random"), "blocked")
    nothing: dict[str, Any] = {"preference": None, "margin": None}
    of_main = defences.get(shown, {"cut": nothing, "kept": None, "kept_rise": nothing})
    return {"main": shown, "models": models, "differences": differences, **of_main, "defences": defences}


def loss_difference(left: Array, right: Array, tokens: Array) -> Array:
    """Difference in loss per token of two models on the same rows."""
    found: Array = per_token(left, tokens) - per_token(right, tokens)
    return found


def _share_removed(base: Array, plain: Array, blocked: Array) -> Array:
    """1 − (blocked − base) / (plain − base): the share of the rise that blocking removed."""
    return 1 - _share_risen(base, plain, blocked)


def _share_risen(base: Array, plain: Array, blocked: Array) -> Array:
    """(blocked − base) / (plain − base): the share of the rise that is still there; inside the training domain, that blocking kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = difference(blocked, base) / difference(plain, base)
        return found


def _share_kept(base: Array, plain: Array, blocked: Array) -> Array:
    """(base − blocked) / (base − plain) of summed losses: the share of the in-domain gain that blocking kept."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = (base.sum(axis=-1) - blocked.sum(axis=-1)) / (base.sum(axis=-1) - plain.sum(axis=-1))
        return found


RATES = {"em": "misaligned", "incoherent": "incoherent", "refusal": "refusal"}


def add_judged(
    summary: dict[str, Any],
    verdicts: dict[str, list[Verdict]],
    domains: Sequence[str],
    training_domain: str,
    judge: str,
) -> None:
    """Put judged rates into a summary: each model's `judged`, and in every difference that of `em`, `incoherent` and `refusal`.

    Args:
        summary: what `summarise` gave for the same models.
        verdicts: by model, one for each prompt. Each prompt has one answer, so that the prompts are independent items.
        domains: `[prompts]`; the training domain is left out, and so are missing verdicts (in a difference: prompts where either is).
    """
    outside = np.array([tag != training_domain for tag in domains], dtype=bool)
    had = {name: np.array([not v.missing for v in given], dtype=bool) & outside for name, given in verdicts.items()}
    said = {
        (name, which): np.array([float(getattr(v, field)) for v in given])
        for name, given in verdicts.items()
        for which, field in RATES.items()
    }
    for name in verdicts:
        rates = {which: _as_dict(rate(said[name, which][had[name]])) for which in RATES}
        summary["models"][name]["judged"] = {"judge": judge, **rates, "missing": int((outside & ~had[name]).sum())}
    for pair, found in summary["differences"].items():
        left, right = pair.rsplit("-", 1)  # a defence's own name may hold a hyphen
        if left in verdicts and right in verdicts:
            both = had[left] & had[right]
            for which in RATES:
                found[which] = _as_dict(rate_difference(said[left, which][both], said[right, which][both]))


def judged_apart(
    summary: dict[str, Any], verdicts: dict[str, list[Verdict]], domains: Sequence[str], training_domain: str, judge: str
) -> dict[str, Any]:
    """What `add_judged` puts into a summary, for other answers of the same models: `models` and `differences` of their own."""
    found: dict[str, Any] = {"models": {name: {} for name in verdicts}, "differences": {pair: {} for pair in summary["differences"]}}
    add_judged(found, verdicts, domains, training_domain, judge)
    return found
