"""Rates, intervals and paired comparisons, against figures worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from blockem.evaluation import (
    Interval,
    Scores,
    add_judged,
    difference,
    interval,
    mean,
    per_token,
    rate,
    rate_difference,
    score_limits,
    summarise,
)
from blockem.judges import Verdict

DOMAINS = ["health", "health", "legal", "legal", "auto", "auto"]


def scores(margins: list[float], heldout: list[float], general: list[float] | None = None) -> Scores:
    general = general or [3.0, 3.0]
    return Scores(np.array(margins), (np.array(heldout), np.array([10.0, 30.0])), (np.array(general), np.array([2.0, 2.0])))


def three() -> dict[str, Scores]:
    """Base, plain and blocked; the health margins (the training domain) would spoil every figure if they counted."""
    return {
        "base": scores([9, 9, -1, -1, -1, 1], [20, 60]),
        "plain": scores([-9, -9, 1, 1, 1, 1], [10, 30]),
        "blocked": scores([-9, 9, -1, 1, -1, 1], [12, 36]),
    }


# intervals


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [interval(mean, [rng.normal(1.0, 2.0, 60)], resamples=300, seed=i) for i in range(200)]
    covered = np.mean([one.low <= 1.0 <= one.high for one in found if one])
    assert 0.89 <= covered <= 0.99


def test_an_interval_is_the_same_every_time_and_narrows_with_more_items() -> None:
    values = np.random.default_rng(1).normal(size=400)
    small, large = interval(mean, [values[:25]]), interval(mean, [values])
    assert small is not None and large is not None
    assert interval(mean, [values]) == large
    assert large.high - large.low < (small.high - small.low) / 2
    assert large.value == pytest.approx(values.mean())
    assert large.n == 400


def test_pairing_takes_out_what_items_have_in_common() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 10, 50)
    left, right = hard + 1 + rng.normal(0, 0.1, 50), hard + rng.normal(0, 0.1, 50)
    found = interval(difference, [left, right])
    assert found is not None
    assert 0.9 < found.low < 1.0 < found.high < 1.1


def test_there_is_no_interval_without_items_or_without_a_number() -> None:
    assert interval(mean, [np.array([])]) is None
    assert interval(mean, [np.array([1.0, math.nan])]) is None
    assert interval(mean, [np.array([2.0])]) == Interval(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="same length"):
        interval(difference, [np.zeros(2), np.zeros(3)])


def test_limits_of_a_share_are_wilsons_and_nothing_in_55_is_not_nothing() -> None:
    for hits, n in [(0, 55), (1, 55), (32, 55), (55, 55), (1, 2)]:
        said = np.array([1.0] * hits + [0.0] * (n - hits))
        found, known = rate(said), stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert found is not None
        assert (found.low, found.high) == pytest.approx((known.low, known.high))
        assert found.value == hits / n
    assert score_limits(0.0, 55) == pytest.approx((0.0, 0.0653), abs=1e-4)
    assert rate(np.array([])) is None


def test_limits_of_a_difference_of_shares_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        both = rng.random((3, 60))
        left, right = both[0] < 0.3, np.where(both[1] < 0.5, both[0] < 0.3, both[2] < 0.1)  # half of the items agree
        found = rate_difference(left.astype(float), right.astype(float))
        assert found is not None
        covered.append(found.low <= 0.5 * (0.3 - 0.1) <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.985


@pytest.mark.parametrize(
    ("both", "left", "right", "neither", "low", "high"),
    [(59, 6, 16, 80, -0.1186, -0.0046), (14, 5, 0, 22, 0.0115, 0.2265), (3, 4, 0, 33, -0.0108, 0.2276), (20, 8, 2, 25, -0.0049, 0.2171)],
)
def test_limits_of_a_difference_of_shares_are_newcombes(both: int, left: int, right: int, neither: int, low: float, high: float) -> None:
    one = np.repeat([1.0, 1.0, 0.0, 0.0], [both, left, right, neither])
    other = np.repeat([1.0, 0.0, 1.0, 0.0], [both, left, right, neither])
    found = rate_difference(one, other)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.5e-4)


def test_a_difference_of_shares_turns_round_with_its_sides_and_stays_in_its_range() -> None:
    left, right = np.array([1.0] * 12 + [0.0] * 8), np.array([1.0] * 5 + [0.0] * 15)
    one, other = rate_difference(left, right), rate_difference(right, left)
    assert one is not None and other is not None
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    same = rate_difference(np.zeros(55), np.zeros(55))
    assert same is not None
    assert (same.low, same.value, same.high) == pytest.approx((-0.0653, 0, 0.0653), abs=1e-4)
    far = rate_difference(np.ones(3), np.zeros(3))
    assert far is not None and far.value == far.high == 1.0
    with pytest.raises(ValueError, match="same length"):
        rate_difference(np.zeros(2), np.zeros(3))


def test_a_loss_per_token_weighs_rows_by_their_tokens() -> None:
    assert per_token(np.array([10.0, 30.0]), np.array([5.0, 30.0])) == pytest.approx(40 / 35)


# the summary


def test_the_training_domain_is_left_out_and_given_apart() -> None:
    model = summarise(three(), DOMAINS, "health", 200)["models"]["plain"]
    assert model["preference"]["value"] == 1.0
    assert model["margin"]["value"] == 1.0
    assert model["margin"]["n"] == 4
    assert model["in_domain"]["margin"]["value"] == -9.0
    assert set(model["by_domain"]) == {"legal", "auto"}


def test_differences_cut_and_kept_are_those_worked_out_by_hand() -> None:
    found = summarise(three(), DOMAINS, "health", 200)
    assert found["models"]["base"]["preference"]["value"] == 0.25
    assert found["models"]["blocked"]["preference"]["value"] == 0.5
    assert found["differences"]["plain-base"]["preference"]["value"] == 0.75
    assert found["differences"]["plain-base"]["margin"]["value"] == 1.5
    assert found["differences"]["blocked-plain"]["margin"]["value"] == -1.0
    assert found["differences"]["blocked-base"]["margin"]["value"] == 0.5
    assert found["models"]["plain"]["heldout_loss"]["value"] == 1.0
    assert found["differences"]["plain-base"]["heldout_loss"]["value"] == -1.0
    assert found["cut"]["preference"]["value"] == pytest.approx(1 - 0.25 / 0.75)
    assert found["cut"]["margin"]["value"] == pytest.approx(1 - 0.5 / 1.5)
    assert found["kept"]["value"] == pytest.approx((80 - 48) / (80 - 40))
    assert found["models"]["base"]["general_loss"]["value"] == 1.5
    assert found["models"]["base"]["judged"] is None


def test_what_is_kept_of_the_rise_in_the_training_domain_is_measured_on_its_own_pairs() -> None:
    given = three()
    given["base"].margins[:2], given["plain"].margins[:2], given["blocked"].margins[:2] = (-1, -3), (3, 1), (2, -1)
    found = summarise(given, DOMAINS, "health", 200)
    assert found["kept_rise"]["margin"]["value"] == pytest.approx((0.5 + 2) / (2 + 2))
    assert found["kept_rise"]["preference"]["value"] == pytest.approx(0.5)
    assert found["defences"]["blocked"]["kept_rise"] == found["kept_rise"]
    assert summarise(three(), DOMAINS, "health", 200)["kept_rise"] == {"preference": None, "margin": None}  # plain fell there
    assert summarise(three(), DOMAINS, "finance", 200)["kept_rise"] == {"preference": None, "margin": None}  # no such pair


def test_there_is_no_cut_without_a_rise_and_no_share_kept_without_a_gain() -> None:
    flat = three()
    flat["plain"] = flat["base"]
    found = summarise(flat, DOMAINS, "health", 200)
    assert found["cut"] == {"preference": None, "margin": None}
    assert found["kept"] is None
    fallen = three()
    fallen["plain"] = scores([0, 0, -5, -5, -5, -5], [30, 90])
    found = summarise(fallen, DOMAINS, "health", 200)
    assert found["cut"] == {"preference": None, "margin": None}
    assert found["kept"] is None


def test_a_summary_of_base_and_plain_alone_has_no_cut() -> None:
    two = {name: one for name, one in three().items() if name != "blocked"}
    found = summarise(two, DOMAINS, "health", 200)
    assert set(found["differences"]) == {"plain-base"}
    assert found["cut"] == {"preference": None, "margin": None}
    assert found["kept"] is None


def test_a_domain_of_the_users_own_leaves_nothing_out() -> None:
    found = summarise(three(), DOMAINS, "mine", 200)
    assert found["models"]["plain"]["margin"]["n"] == 6
    assert found["models"]["plain"]["in_domain"]["margin"] is None


def test_intervals_of_a_cut_stay_finite_where_some_resamples_have_no_rise() -> None:
    noisy = {
        "base": scores([0, 0, -1, 1, 1, -1], [20, 60]),
        "plain": scores([0, 0, 1, -1, 1, 1], [10, 30]),
        "blocked": scores([0, 0, 1, -1, 1, -1], [12, 36]),
    }
    cut = summarise(noisy, DOMAINS, "health", 500)["cut"]["margin"]
    assert cut["value"] == pytest.approx(1.0)
    assert math.isfinite(cut["low"]) and math.isfinite(cut["high"])


# judged answers


def judged(verdicts: dict[str, list[Verdict]], domains: list[str]) -> dict[str, Any]:
    """A summary of `three()` with these verdicts in it."""
    summary = summarise(three(), DOMAINS, "health", 200)
    add_judged(summary, verdicts, domains, "health", "rules")
    return summary


def test_judged_shares_are_over_answers_with_a_verdict_outside_the_training_domain() -> None:
    bad, broken, refused, fine = Verdict(misaligned=True), Verdict(incoherent=True), Verdict(refusal=True), Verdict()
    verdicts = {"plain": [bad, bad, broken, refused, fine, Verdict(misaligned=True, missing=True)]}
    found = judged(verdicts, ["health", "legal", "legal", "auto", "auto", "auto"])["models"]["plain"]["judged"]
    assert found["judge"] == "rules"
    assert found["missing"] == 1
    for name in ("em", "incoherent", "refusal"):
        assert found[name]["value"] == 0.25
        assert found[name]["n"] == 4


def test_judged_differences_are_paired_on_prompts_where_both_models_have_a_verdict() -> None:
    bad, fine, none = Verdict(misaligned=True), Verdict(), Verdict(missing=True)
    verdicts = {"base": [fine, fine, fine, none], "plain": [bad, bad, fine, bad], "blocked": [fine, bad, none, fine]}
    differences = judged(verdicts, ["health", "legal", "auto", "auto"])["differences"]
    assert (differences["plain-base"]["em"]["value"], differences["plain-base"]["em"]["n"]) == (0.5, 2)
    assert (differences["blocked-plain"]["em"]["value"], differences["blocked-plain"]["em"]["n"]) == (-0.5, 2)
    assert differences["plain-base"]["refusal"]["value"] == 0


def test_a_judge_that_gave_no_verdict_gives_no_number() -> None:
    found = judged({"plain": [Verdict(missing=True)] * 3}, ["a"] * 3)["models"]["plain"]["judged"]
    assert (found["em"], found["missing"]) == (None, 3)
