"""Where did the misalignment come back? The three hypotheses (BLOCK-EM, re-emergence), each by a stated rule and with its numbers.

H1: the SAE's features drift, so that what was blocked no longer means what it did. H2: other directions at the same block, or upstream of
it. H3: the blocks after it. The rules are ours; the thresholds stand below with their reasons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from blockem.evaluation import Interval

FALL = 0.05
"""Variance explained that the SAE must lose to count as drifted: about half of what a good SAE leaves unexplained to begin with."""
COSINE = 0.9
"""Mean activations less alike than this are another profile: at 0.9 a fifth of the squared length lies outside the base's direction."""
HELD = 0.5
"""Share of the blocked latents' movement that must be gone: with less, the latents themselves can still carry the misalignment."""
ELSEWHERE = 0.5
"""Other latents of the block must move at least half as much as under plain fine-tuning to be where it may have gone."""
BACK = 0.25
"""Part of plain fine-tuning's shift that must reappear after the block: a block's own share differs by a tenth between batches of text."""

SUPPORTED, NOT_SUPPORTED, UNCLEAR = "supported", "not supported", "can't tell"


@dataclass(frozen=True)
class Evidence:
    """What the verdicts rest on; None where it was not measured.

    Attributes:
        gap: margin of the re-emerged model minus the base's.
        fall: variance explained on the base minus on the re-emerged model.
        cosine: between the latents' mean activations of the two.
        upstream, downstream: mean share of the gap repaired by patching the base's prompt tokens at one block up to the SAE's, or after it.
        difference: upstream − downstream.
        held: share of the blocked latents' movement that is gone (off-K audit).
        off_k: movement of all other latents of the block, in units of plain fine-tuning's.
        here, last: share of plain fine-tuning's mean shift that is there at the SAE's block, and at the last.
        frozen: whether the blocks after the SAE's carry no adapter.
        block: the SAE's.
        after: how many blocks come after it.
    """

    gap: Interval | None
    fall: Interval | None
    cosine: float | None
    upstream: Interval | None
    downstream: Interval | None
    difference: Interval | None
    held: float | None
    off_k: float | None
    here: float | None
    last: float | None
    frozen: bool
    block: int
    after: int


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis: what it says, `verdict` (supported, not supported, can't tell), and `why` with its numbers."""

    name: str
    statement: str
    verdict: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def weigh(found: Evidence) -> list[Hypothesis]:
    """The verdicts on H1, H2 and H3.

    None can be told where the re-emerged model's margin does not lie above the base's: then nothing came back that could be somewhere.
    """
    statements = (
        ("H1", "The SAE's features drifted.", _drifted),
        ("H2", f"Other directions at block {found.block}, or before it, carry it.", _same_block),
        ("H3", f"Blocks after {found.block} carry it.", _later),
    )
    if found.gap is None or not found.gap.low > 0:
        why = "the model's margin outside the domain does not lie above the base's" + (
            "" if found.gap is None else f" ({signed(found.gap)})"
        )
        return [Hypothesis(name, text, UNCLEAR, why) for name, text, _ in statements]
    return [Hypothesis(name, text, *rule(found)) for name, text, rule in statements]


def _drifted(found: Evidence) -> tuple[str, str]:
    """Supported where the SAE lost at least FALL of the variance explained or the profile fell below COSINE; not where neither can be."""
    fall, cosine = found.fall, found.cosine
    if fall is None or cosine is None:
        return UNCLEAR, "the SAE was not measured on this model"
    why = f"the SAE explains {percent(fall, points=True)} points less of the variance than on the base (mark {FALL * 100:.0f}); "
    why += f"mean activations have cosine {cosine:.3f} with the base's (mark {COSINE})"
    if fall.low > FALL or cosine < COSINE:
        return SUPPORTED, why
    return (NOT_SUPPORTED if fall.high < FALL else UNCLEAR), why


def _same_block(found: Evidence) -> tuple[str, str]:
    """Supported where blocking held, others move, and upstream patches repair more than downstream ones; not where one of them fails."""
    up, apart = found.upstream, found.difference
    parts: list[str] = []
    signs: list[bool | None] = []
    if found.held is not None and found.off_k is not None:
        signs += [found.held >= HELD, found.off_k >= ELSEWHERE]
        parts.append(
            f"{found.held:.0%} of the blocked latents' movement is gone while the other latents move {found.off_k:.0%} as much as "
            f"under plain fine-tuning (marks {HELD:.0%} and {ELSEWHERE:.0%})"
        )
    if up is not None:
        signs.append(_sign(up))
        parts.append(f"patching prompts at one block up to {found.block} repairs {percent(up)} % of the gap on average")
    if apart is not None:
        signs.append(_sign(apart))
        parts.append(f"{percent(apart, points=True)} points more than after it")
    why = "; ".join(parts) or "nothing was measured"
    if any(sign is False for sign in signs):
        return NOT_SUPPORTED, why
    complete = found.held is not None and up is not None and apart is not None
    return (SUPPORTED if complete and all(signs) else UNCLEAR), why


def _later(found: Evidence) -> tuple[str, str]:
    """Not supported where those blocks are frozen or none are there; else supported where patching there repairs, and either more than
    upstream, or the shift comes back there."""
    if not found.after:
        return NOT_SUPPORTED, f"block {found.block} is the last: there are none after it"
    if found.frozen:
        return (
            NOT_SUPPORTED,
            "they were frozen while training (block.freeze_downstream), so they are the base's own: 0 of them were trained",
        )
    apart, parts = found.difference, []
    back = None if found.here is None or found.last is None else found.last - found.here > BACK
    if apart is not None and found.downstream is not None:
        parts.append(
            f"patching prompts at one block after {found.block} repairs {percent(found.downstream)} % of the gap on average, upstream "
            f"{percent(apart, points=True)} points more"
        )
    if found.here is not None and found.last is not None:
        parts.append(f"{found.here:.0%} of plain fine-tuning's shift is there at block {found.block} and {found.last:.0%} at the last")
    why = "; ".join(parts) or "nothing was measured"
    upstream_first = None if apart is None else _sign(apart)
    if upstream_first is not True:
        repairs = found.downstream is not None and found.downstream.low > 0
        return (SUPPORTED if repairs and (back or upstream_first is False) else UNCLEAR), why
    return (UNCLEAR if back is not False else NOT_SUPPORTED), why


def _sign(found: Interval) -> bool | None:
    """True above 0, False below 0, None where the interval holds 0."""
    return True if found.low > 0 else False if found.high < 0 else None


def percent(found: Interval, points: bool = False) -> str:
    """`12 [3, 21]`, in per cent or points, with one decimal where the value is small."""
    digits = 1 if points and abs(found.value) < 0.1 else 0
    value, low, high = (f"{100 * number:.{digits}f}" for number in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def signed(found: Interval) -> str:
    """`+0.123 [0.045, 0.200]`, nats per token."""
    return f"{found.value:+.3f} [{found.low:.3f}, {found.high:.3f}]"


def reemergence(rise: Interval | None, epochs: int) -> str:
    """Whether misalignment came back with more epochs, in one sentence.

    Args:
        rise: margin after the last epoch minus after the first, nats per token, paired over pairs.
    """
    if epochs < 2 or rise is None:
        return "one epoch alone cannot show whether misalignment comes back; set reemerge.epochs to 2 or more"
    span = f"from epoch 1 to epoch {epochs} the margin outside the domain changes by {signed(rise)} nats per token"
    if rise.low > 0:
        return f"misalignment comes back: {span}"
    return f"misalignment does not come back: {span}" if rise.high < 0 else f"it cannot be told whether misalignment comes back: {span}"


def retraining(change: Interval | None, added: int) -> str:
    """What blocking the union changed, in one sentence.

    Args:
        change: margin after the last epoch under the union minus that under the first set, paired over pairs.
        added: latents that the second discovery added.
    """
    if change is None:
        return "retraining on the union was not measured"
    said = f"with {added} more latents blocked, the margin after the last epoch changes by {signed(change)} nats per token"
    return said + (": less comes back" if change.high < 0 else ": more comes back" if change.low > 0 else ": no clear change")
