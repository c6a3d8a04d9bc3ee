"""Stage 2: induce and repair (BLOCK-EM, stage 2).

g_induce(k) = effect(base, +α_A s_k d_k) − effect(base); g_repair(k) = effect(mis) − effect(mis, −α_B s_k d_k). A latent
passes when both gains are positive; S2 = g_induce + g_repair. A gain measured outside the incoherence budget does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from blockem.discovery.effects import Steered


@dataclass
class Candidate:
    """One latent on its way through the stages; `fate` says where it ended and why, `pairs` on how many pairs its figures stand.

    `induce_allowed` and `repair_allowed` are what stage 2's incoherence was held against.
    `group` is the number of the group that it was tested in (0: none); its stage 2 figures are its own all the same.
    `dropped` marks one that halving let go before stage 2 had seen all pairs, whatever became of it in a group.
    """

    latent: int
    sign: int
    delta: float
    frequency: float = math.nan
    attribution: float = math.nan
    induce: float = math.nan
    induce_incoherence: float = math.nan
    induce_allowed: float = math.nan
    repair: float = math.nan
    repair_incoherence: float = math.nan
    repair_allowed: float = math.nan
    screen_score: float = math.nan
    best_induce: float = math.nan
    best_induce_alpha: float = math.nan
    best_induce_incoherence: float = math.nan
    best_repair: float = math.nan
    best_repair_alpha: float = math.nan
    best_repair_incoherence: float = math.nan
    strongest_induce_alpha: float = math.nan
    strongest_repair_alpha: float = math.nan
    score: float = math.nan
    rank: int = 0
    pairs: int = 0
    group: int = 0
    dropped: bool = False
    fate: str = "candidate"


PASSED = "passed screening"
VARIANTS = {"induce": "base", "repair": "plain"}


def edit_of(side: str, candidate: Candidate, alpha: float) -> tuple[str, int, int, float]:
    """The edit of one test: `side` is "induce" (base, +s d) or "repair" (misaligned, −s d)."""
    return VARIANTS[side], candidate.latent, candidate.sign if side == "induce" else -candidate.sign, alpha


def gain(steered: Steered, side: str, candidate: Candidate, alpha: float) -> tuple[float, float]:
    """(gain, incoherence) of one test."""
    before = steered.measure(VARIANTS[side])
    after = steered.measure(*edit_of(side, candidate, alpha))
    change = after.effect - before.effect
    return (change if side == "induce" else -change), after.incoherence


ROUNDING = 1e-6  # 4 broken of 40 are inside a budget of 0.1, though not in float32


def budget_of(resting: float, budget: float, slack: float | None = 0.10) -> float:
    """The incoherence allowed: `budget`, or for a weak model its own `resting` incoherence + `slack` if that is more (None: never)."""
    return ROUNDING + (budget if slack is None else max(budget, resting + slack))


def budget_for(steered: Steered, variant: str, budget: float, slack: float | None = 0.10) -> float:
    """The incoherence allowed for `variant`, its own measured where that matters."""
    return budget_of(0.0 if slack is None else steered.measure(variant).incoherence, budget, slack)


def screen(
    steered: Steered,
    candidates: list[Candidate],
    keep: int,
    alpha_induce: float = 0.7,
    alpha_repair: float = 0.4,
    budget: float = 0.10,
    slack: float | None = 0.10,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Test every candidate both ways and return the `keep` best that pass, half from each sign where there are enough.

    Every candidate's fields and fate are filled in, also those that fail.
    """
    allowed = {side: budget_for(steered, variant, budget, slack) for side, variant in VARIANTS.items()}
    for number, one in enumerate(candidates):
        one.induce, one.induce_incoherence = gain(steered, "induce", one, alpha_induce)
        one.repair, one.repair_incoherence = gain(steered, "repair", one, alpha_repair)
        settle(one, allowed)
        if progress:
            progress(number + 1, len(candidates))
    return best(candidates, keep)


def settle(one: Candidate, allowed: dict[str, float]) -> None:
    """S2 and the fate of a candidate whose two gains and incoherences are filled in."""
    one.induce_allowed, one.repair_allowed = allowed["induce"], allowed["repair"]
    # a gain outside the budget counts as none; a harm counts whatever it cost
    induce = one.induce if one.induce_incoherence <= allowed["induce"] else min(one.induce, 0.0)
    repair = one.repair if one.repair_incoherence <= allowed["repair"] else min(one.repair, 0.0)
    one.screen_score = induce + repair
    if induce > 0 and repair > 0:
        one.fate = PASSED
    elif one.induce > 0 and one.repair > 0:
        one.fate = "screened out: incoherent"
    elif one.induce > 0 or one.repair > 0:
        one.fate = "screened out: only " + ("induces" if one.induce > 0 else "repairs")
    else:
        one.fate = "screened out: neither induces nor repairs"


def best(candidates: list[Candidate], keep: int) -> list[Candidate]:
    """The `keep` best of those that passed; the others that passed are told so."""
    passed = sorted((one for one in candidates if one.fate == PASSED), key=lambda one: -one.screen_score)
    kept = balanced(passed, keep)
    for one in passed:
        if one not in kept:
            one.fate = "screened out: weaker than those kept"
    return kept


def halves(ranked: list[Candidate], keep: int) -> list[Candidate]:
    """The best `keep` of a ranked list, half of each sign, the raised first; places that one sign cannot fill go to the other."""
    raised = [one for one in ranked if one.sign > 0]
    lowered = [one for one in ranked if one.sign < 0]
    n_raised = min(len(raised), max(keep - keep // 2, keep - len(lowered)))
    return raised[:n_raised] + lowered[: keep - n_raised]


def balanced(ranked: list[Candidate], keep: int) -> list[Candidate]:
    """The same, best first."""
    return sorted(halves(ranked, keep), key=lambda one: -one.screen_score)
