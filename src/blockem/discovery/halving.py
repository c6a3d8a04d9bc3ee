"""Stages 2 and 3 with less work for the same answer: hopeless candidates and strengths are dropped after some of the pairs.

The pairs are dealt into rungs. After each, whoever cannot be among the best any more, by an upper confidence bound for what all pairs
would say, is dropped; the others go on to the next rung, and whoever is left has been measured on all pairs, like in the exhaustive
way. The bar to be beaten is never an estimate: the leaders of each rung are measured on all pairs at once, so that every bound is
compared with figures that are final, and can only be raised by those still to come.

What the error means. Let K be what the exhaustive way would keep. It is returned unless one of its members is dropped. A member
can be dropped only if one of its own upper bounds lies below its true value, at one of the looks (every rung but the last). So the
error is divided by members × bounds a member × looks, and not by the number of candidates: whoever is not in K may be dropped
for whatever reason. `error` is therefore an upper limit for the probability, over the order in which the pairs are dealt, that the
set differs from the exhaustive one. For verdicts (0 or 1) the bounds are exact as long as none goes missing; for margins they take the
mean of eight or more pairs to be nearly normal (bounds.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from blockem.discovery.bounds import Array, Likeness, is_binary, upper_differences, upper_gains, upper_mean
from blockem.discovery.ledger import Ledger, Name, Told, unsteered
from blockem.discovery.rank import best as best_ranked
from blockem.discovery.rank import settle as settle_ranked
from blockem.discovery.screen import PASSED, VARIANTS, Candidate, best, budget_of, edit_of, settle

SIGNS = {"induce": 1, "repair": -1}
Bar = Callable[[str, int, int], None]


def budgets(ledger: Ledger, budget: float, slack: float | None) -> dict[str, float]:
    """The incoherence allowed on each side; measures both unsteered models on all items."""
    ledger.ensure([unsteered(variant) for variant in VARIANTS.values()], len(ledger.ends))
    return {side: budget_of(ledger.items(unsteered(v)).measurement().incoherence, budget, slack) for side, v in VARIANTS.items()}


def gain_of(ledger: Ledger, side: str, one: Candidate, alpha: float) -> tuple[float, float]:
    """(gain, incoherence) on the items known so far; the unsteered model is taken on the same ones."""
    name = edit_of(side, one, alpha)
    after = ledger.items(name).measurement()
    before = ledger.items(unsteered(VARIANTS[side]), ledger.chunks_of(name)).measurement()
    return SIGNS[side] * (after.effect - before.effect), after.incoherence


def _told(bar: Bar | None, what: str) -> Told | None:
    return (lambda done, total: bar(what, done, total)) if bar else None


# -- stage 2 ------------------------------------------------------------------------------------------------------------------


class Screening:
    """Stage 2 under way: who is alive, with figures on the pairs known so far."""

    def __init__(self, ledger: Ledger, keep: int, alphas: dict[str, float], allowed: dict[str, float]) -> None:
        self.ledger, self.keep, self.alphas, self.allowed = ledger, keep, alphas, allowed

    def measure(self, some: Sequence[Candidate], upto: int, told: Told | None) -> None:
        """Both tests of each on the first `upto` chunks; figures and the fate that they would mean are filled in."""
        self.ledger.ensure([edit_of(side, one, alpha) for one in some for side, alpha in self.alphas.items()], upto, told)
        for one in some:
            one.induce, one.induce_incoherence = gain_of(self.ledger, "induce", one, self.alphas["induce"])
            one.repair, one.repair_incoherence = gain_of(self.ledger, "repair", one, self.alphas["repair"])
            one.pairs = self.ledger.ends[self.ledger.chunks_of(edit_of("induce", one, self.alphas["induce"])) - 1]
            settle(one, self.allowed)

    def whole(self, one: Candidate) -> bool:
        return one.pairs == self.ledger.total

    def passers(self, alive: Sequence[Candidate], sign: int, whole: bool) -> list[Candidate]:
        """Those of one sign that pass, for good (`whole`) or by the pairs so far, best first."""
        some = [one for one in alive if one.sign == sign and one.fate == PASSED and self.whole(one) == whole]
        return sorted(some, key=lambda one: -one.screen_score)

    def places(self, sign: int, others: int) -> int:
        """At most so many of a sign can be kept when `others` of the other sign are sure to pass (see `balanced`)."""
        return max(self.keep - self.keep // 2 if sign > 0 else self.keep // 2, self.keep - others)

    def complete_leaders(self, alive: Sequence[Candidate], told: Told | None) -> dict[int, float]:
        """Measure the leaders of each sign on all pairs. Returns each sign's bar: S2 that a candidate must reach to be kept."""
        while True:
            take = []
            for sign in (1, -1):
                final, hopeful = (self.passers(alive, sign, whole) for whole in (True, False))
                others = sum(len(self.passers(alive, -sign, whole)) for whole in (True, False))
                take += hopeful[: max(0, self.places(sign, others) - len(final))]
            if not take:
                break
            self.measure(take, len(self.ledger.ends), told)
        bars = {}
        for sign in (1, -1):
            final = self.passers(alive, sign, True)
            places = self.places(sign, len(self.passers(alive, -sign, True)))
            bars[sign] = math.inf if not places else final[places - 1].screen_score if len(final) >= places else -math.inf
        return bars

    def reasons(self, some: Sequence[Candidate], look: int, bars: dict[int, float], alpha: float) -> dict[int, str]:
        """Why each candidate that is dropped now is dropped, by latent; each bound may fail with probability `alpha`."""
        found: dict[int, str] = {}
        if not some:
            return found
        before = {side: self.ledger.values([unsteered(v)], len(self.ledger.ends))[0] for side, v in VARIANTS.items()}
        names = {side: [edit_of(side, one, self.alphas[side]) for one in some] for side in VARIANTS}
        after = {side: self.ledger.values(names[side], look + 1) for side in VARIANTS}
        guesses = {side: self.ledger.foreseen(names[side]) for side in VARIANTS}
        guess = {side: None if found is None else SIGNS[side] * found for side, found in guesses.items()}
        upper = {side: upper_gains(after[side], before[side], SIGNS[side], alpha, Likeness(foreseen=guess[side])) for side in VARIANTS}
        n = self.ledger.ends[look]
        if is_binary(after["induce"]):
            both = upper["induce"] + upper["repair"]
        else:
            gains = sum(SIGNS[side] * (after[side] - before[side][:n]) for side in VARIANTS)
            foreseen = None if guess["induce"] is None or guess["repair"] is None else guess["induce"] + guess["repair"]
            both = upper_mean(gains, self.ledger.total, alpha, Likeness(foreseen=foreseen))
        for i, one in enumerate(some):
            if any(self.ledger.surely_outside(names[side][i], self.allowed[side]) for side in VARIANTS):
                found[one.latent] = "incoherent"
            elif upper["induce"][i] < 0 and upper["repair"][i] < 0:
                found[one.latent] = "neither induces nor repairs"
            elif upper["induce"][i] < 0 or upper["repair"][i] < 0:
                found[one.latent] = "does not induce" if upper["induce"][i] < 0 else "does not repair"
            elif both[i] < bars[one.sign]:
                found[one.latent] = f"cannot be among the {self.keep} that go on"
        return found


def screen_halving(
    ledger: Ledger,
    candidates: list[Candidate],
    keep: int,
    alpha_induce: float = 0.7,
    alpha_repair: float = 0.4,
    budget: float = 0.10,
    slack: float | None = 0.10,
    error: float = 0.05,
    bar: Bar | None = None,
) -> list[Candidate]:
    """What `screen` returns, with probability 1 − `error` at least, measuring hopeless candidates on some of the pairs only.

    Three bounds a candidate and look: its induce gain and its repair gain must be able to be positive, and S2 to reach the bar of its
    sign. A candidate with more broken pairs already than the budget allows over all is dropped without error.
    """
    stage = Screening(ledger, keep, {"induce": alpha_induce, "repair": alpha_repair}, budgets(ledger, budget, slack))
    alive, last = list(candidates), len(ledger.ends) - 1
    alpha = error / (3 * keep * max(1, last))
    for look, n in enumerate(ledger.ends):
        told = _told(bar, f"stage 2: induce and repair, {n} of {ledger.total}")
        stage.measure(alive, look + 1, told)
        if look == last:
            break
        bars = stage.complete_leaders(alive, _told(bar, f"stage 2: leaders after {n}"))
        reasons = stage.reasons([one for one in alive if not stage.whole(one)], look, bars, alpha)
        for one in alive:
            if one.latent in reasons:
                one.dropped, one.fate = True, f"dropped after {n} pairs: {reasons[one.latent]}"
        alive = [one for one in alive if one.latent not in reasons]
    return best(candidates, keep)


# -- stage 3 ------------------------------------------------------------------------------------------------------------------


class Sweep:
    """Stage 3 under way: the strengths of each candidate and side that may still be its best."""

    def __init__(self, ledger: Ledger, candidates: Sequence[Candidate], strengths: Sequence[float], allowed: dict[str, float]) -> None:
        self.ledger, self.allowed = ledger, allowed
        self.open = {(one.latent, side): sorted(strengths) for one in candidates for side in VARIANTS}

    def whole(self, one: Candidate, side: str, alpha: float) -> bool:
        return self.ledger.whole(edit_of(side, one, alpha))

    def arms(self, one: Candidate, side: str) -> list[float]:
        return self.open[one.latent, side]

    def close_outside(self, one: Candidate, side: str, alpha: float, stop: bool) -> None:
        """Close a strength that is outside the budget whatever follows; with `stop`, the stronger ones too."""
        if self.ledger.surely_outside(edit_of(side, one, alpha), self.allowed[side]):
            self.open[one.latent, side] = [a for a in self.arms(one, side) if (a < alpha if stop else a != alpha)]

    def measure(self, some: Sequence[Candidate], upto: int, stop: bool, told: Told | None) -> None:
        """Every open strength of `some` on the first `upto` chunks, weak ones first, so that a broken one spares the stronger."""
        for alpha in sorted({a for one in some for side in VARIANTS for a in self.arms(one, side)}):
            wave = [(one, side) for one in some for side in VARIANTS if alpha in self.arms(one, side)]
            self.ledger.ensure([edit_of(side, one, alpha) for one, side in wave], upto, told)
            for one, side in wave:
                self.close_outside(one, side, alpha, stop)

    def leading(self, one: Candidate, side: str, whole: bool) -> tuple[float, float]:
        """(gain, α) of the best open strength, among those measured on all pairs (`whole`) or all; NaN where none is."""
        found = (-math.inf, math.nan)
        for alpha in self.arms(one, side):
            if not whole or self.whole(one, side, alpha):
                gain, _ = gain_of(self.ledger, side, one, alpha)
                if gain > found[0]:
                    found = (gain, alpha)
        return found if found[0] > -math.inf else (math.nan, math.nan)

    def complete_leaders(self, alive: Sequence[Candidate], size: int, stop: bool, told: Told | None) -> float:
        """Measure the leaders' best strengths on all pairs. Returns the bar: S3 that a candidate must reach to be chosen."""
        while True:
            sure, hopeful = [], []
            for one in alive:
                whole = [self.leading(one, side, True)[0] for side in VARIANTS]
                guess = [self.leading(one, side, False)[0] for side in VARIANTS]
                if all(gain > 0 for gain in whole):
                    sure.append(sum(whole))
                elif any(gain != gain for gain in whole) and all(gain > 0 for gain in guess):
                    hopeful.append((-sum(guess), one.latent, one))
            take = [one for *_, one in sorted(hopeful)[: max(0, size - len(sure))]]
            if not take:
                return sorted(sure, reverse=True)[size - 1] if len(sure) >= size else -math.inf
            tests = [(one, side, self.leading(one, side, False)[1]) for one in take for side in VARIANTS]
            self.ledger.ensure([edit_of(side, one, alpha) for one, side, alpha in tests], len(self.ledger.ends), told)
            for one, side, alpha in tests:
                self.close_outside(one, side, alpha, stop)

    def refer(self, alive: Sequence[Candidate], stop: bool, told: Told | None) -> None:
        """Where a side has several strengths left, measure the best so far on all pairs: the others are then compared with it."""
        sides = [(one, side) for one in alive for side in VARIANTS if len(self.arms(one, side)) > 2]
        tests = [(one, side, self.leading(one, side, False)[1]) for one, side in sides if math.isnan(self.leading(one, side, True)[0])]
        self.ledger.ensure([edit_of(side, one, alpha) for one, side, alpha in tests], len(self.ledger.ends), told)
        for one, side, alpha in tests:
            self.close_outside(one, side, alpha, stop)

    def prune(self, alive: Sequence[Candidate], side: str, look: int, alpha: float) -> dict[int, float]:
        """Close the strengths that cannot be the best of this side; returns the largest gain that each candidate may still reach."""
        ledger, sign, total = self.ledger, SIGNS[side], self.ledger.total
        final = {one.latent: self.leading(one, side, True) for one in alive}
        most = {latent: -math.inf if gain != gain else gain for latent, (gain, _) in final.items()}
        partial = [(one, a) for one in alive for a in self.arms(one, side) if not self.whole(one, side, a)]
        if not partial:
            return most

        def edits(some: Sequence[tuple[Candidate, float]]) -> list[Name]:
            return [edit_of(side, one, a) for one, a in some]

        def alike(some: Sequence[tuple[Candidate, float]], scale: Array) -> Likeness:
            # a latent's margins move in proportion to the strength, to first order, and so do their deviations
            foreseen = ledger.foreseen(edits(some))
            slope = None if foreseen is None else foreseen / np.array([a for _, a in some])[:, None]
            guess = None if slope is None else sign * scale[:, None] * slope
            return Likeness(np.abs(scale), len({one.latent for one, _ in some}), guess)

        before = ledger.values([unsteered(VARIANTS[side])], len(ledger.ends))[0]
        seen = ledger.values(edits(partial), look + 1)
        upper = upper_gains(seen, before, sign, alpha, alike(partial, np.array([a for _, a in partial])))
        # strengths of one latent move the same pairs: their difference, pair by pair, varies less than either
        paired = [(one, a) for one, a in partial if final[one.latent][0] == final[one.latent][0]]
        closed = set()
        if paired:
            against = ledger.values(edits([(one, final[one.latent][1]) for one, _ in paired]), look + 1)
            apart = np.array([a - final[one.latent][1] for one, a in paired])
            more = upper_differences(sign * ledger.values(edits(paired), look + 1), sign * against, total, alpha, alike(paired, apart))
            closed = {(one.latent, a) for (one, a), x in zip(paired, more, strict=True) if x < 0}
        for (one, a), x in zip(partial, upper, strict=True):
            if (one.latent, a) in closed:
                self.open[one.latent, side].remove(a)
            else:
                most[one.latent] = max(most[one.latent], x)
        return most


def rank_halving(
    ledger: Ledger,
    candidates: list[Candidate],
    size: int,
    strengths: Sequence[float],
    budget: float = 0.10,
    slack: float | None = 0.10,
    error: float = 0.05,
    stop_incoherent: bool = True,
    bar: Bar | None = None,
) -> list[Candidate]:
    """What `rank` returns, with probability 1 − `error` at least, measuring hopeless strengths and candidates on some of the pairs only.

    The bounds of a chosen candidate and look: for the best strength of either side, its gain, and its difference from any other strength.

    Args:
        stop_incoherent: take incoherence to grow with strength: once a strength is outside the budget for sure, no stronger one is
            measured. That is an assumption about the model, not covered by `error`.

    The strongest strength inside the budget is logged too, but only among those that were measured on all pairs.
    """
    sweep = Sweep(ledger, candidates, strengths, budgets(ledger, budget, slack))
    alive, last = list(candidates), len(ledger.ends) - 1
    alpha = error / (2 * size * max(1, last) * len(strengths))
    for look, n in enumerate(ledger.ends):
        sweep.measure(alive, look + 1, stop_incoherent, _told(bar, f"stage 3: strengths, {n} of {ledger.total}"))
        if look == last:
            break
        least = sweep.complete_leaders(alive, size, stop_incoherent, _told(bar, f"stage 3: leaders after {n}"))
        most = {side: sweep.prune(alive, side, look, alpha) for side in VARIANTS}
        for one in list(alive):
            induce, repair = (most[side][one.latent] for side in VARIANTS)
            reason = ""
            if not all(sweep.arms(one, side) for side in VARIANTS):
                reason = "no strength inside the incoherence budget"
            elif min(induce, repair) < 0:
                reason = "no gain on one side at any strength"
            elif induce + repair < least:
                reason = f"cannot reach the top {size}"
            if reason:
                _fill(sweep, one)
                one.score = one.best_induce + one.best_repair
                one.pairs = n
                one.fate = f"dropped in stage 3 after {n} pairs: {reason}"
                alive.remove(one)
        sweep.refer(alive, stop_incoherent, _told(bar, f"stage 3: best strengths after {n}"))
        for side in VARIANTS:
            sweep.prune(alive, side, look, alpha)
    for one in alive:
        _fill(sweep, one)
        one.pairs = ledger.total
        settle_ranked(one)
    return best_ranked(candidates, size)


def _fill(sweep: Sweep, one: Candidate) -> None:
    """The best strengths' figures as they are known."""
    ledger = sweep.ledger
    for side in VARIANTS:
        found, alpha = sweep.leading(one, side, False)
        strong = max((a for a in sweep.arms(one, side) if sweep.whole(one, side, a)), default=math.nan)
        incoherence = math.nan if alpha != alpha else gain_of(ledger, side, one, alpha)[1]
        if side == "induce":
            one.best_induce, one.best_induce_alpha, one.best_induce_incoherence, one.strongest_induce_alpha = (
                found,
                alpha,
                incoherence,
                strong,
            )
        else:
            one.best_repair, one.best_repair_alpha, one.best_repair_incoherence, one.strongest_repair_alpha = (
                found,
                alpha,
                incoherence,
                strong,
            )
