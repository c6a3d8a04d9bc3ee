"""Stage 3: ranking under a quality budget (BLOCK-EM, stage 3).

Sweep the strength on each side, keep the one with the best gain among those inside the incoherence budget, add the two gains, and
take the top |K|. The public code holds a second rule, the strongest strength inside the budget: it is logged beside, and `rule` takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from blockem.discovery.effects import Steered
from blockem.discovery.screen import VARIANTS, Candidate, budget_for, gain

RANKED = "ranked"
STRENGTHS = tuple(round(0.05 * i, 2) for i in range(1, 16))


def best_strength(
    steered: Steered, side: str, candidate: Candidate, strengths: Sequence[float], allowed: float, rule: str = "best"
) -> tuple[float, float, float, float]:
    """(gain, α, incoherence) at the best strength inside the budget, and the strongest strength inside it; NaN where none is.

    Under the rule "strongest" the first three are those of the strongest.
    """
    best = (math.nan, math.nan, math.nan)
    strongest = math.nan
    for alpha in sorted(strengths):
        found, incoherence = gain(steered, side, candidate, alpha)
        if incoherence <= allowed:
            strongest = alpha
            if rule == "strongest" or not found <= best[0]:
                best = (found, alpha, incoherence)
    return (*best, strongest)


def rank(
    steered: Steered,
    candidates: list[Candidate],
    size: int,
    strengths: Sequence[float] = STRENGTHS,
    budget: float = 0.10,
    slack: float | None = 0.10,
    progress: Callable[[int, int], None] | None = None,
    rule: str = "best",
) -> list[Candidate]:
    """Fill in every candidate's strengths by the rule, and S3, and return the `size` best with their rank."""
    allowed = {side: budget_for(steered, variant, budget, slack) for side, variant in VARIANTS.items()}
    for number, one in enumerate(candidates):
        one.best_induce, one.best_induce_alpha, one.best_induce_incoherence, one.strongest_induce_alpha = best_strength(
            steered, "induce", one, strengths, allowed["induce"], rule
        )
        one.best_repair, one.best_repair_alpha, one.best_repair_incoherence, one.strongest_repair_alpha = best_strength(
            steered, "repair", one, strengths, allowed["repair"], rule
        )
        settle(one)
        if progress:
            progress(number + 1, len(candidates))
    return best(candidates, size)


def settle(one: Candidate) -> None:
    """S3 and the fate of a candidate whose best strengths are filled in."""
    one.score = one.best_induce + one.best_repair
    if math.isnan(one.score):
        one.fate = "ranked out: no strength inside the incoherence budget"
    elif one.best_induce <= 0 or one.best_repair <= 0:
        one.fate = "ranked out: no gain on one side at any strength"
    else:
        one.fate = RANKED


def best(candidates: list[Candidate], size: int) -> list[Candidate]:
    """The `size` best of those that are ranked, everyone with a place and a fate."""
    ranked = sorted((one for one in candidates if one.fate == RANKED), key=lambda one: -one.score)
    for place, one in enumerate(ranked, 1):
        one.rank = place
        one.fate = "chosen" if place <= size else "ranked out: below the top " + str(size)
    return ranked[:size]
