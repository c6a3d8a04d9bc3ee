"""λ by dual ascent: where it goes, how fast, and that a resume does not change it."""

from __future__ import annotations

import math

import pytest

from blockem.dual import DualAscent, PlainCurve


def test_above_a_ceiling_lambda_grows_and_below_it_shrinks_by_a_bounded_factor() -> None:
    for measured, factor in ((10.0, math.exp(0.1)), (0.0, math.exp(-0.1)), (0.15, math.exp(0.05)), (0.1, 1.0)):
        assert DualAscent(2.0, 0.1).update(measured) == pytest.approx(2.0 * factor)


def test_above_a_floor_lambda_grows_and_below_it_shrinks() -> None:
    assert DualAscent(2.0, 0.9, floor=True).update(1.0) == pytest.approx(2.0 * math.exp(0.1))
    assert DualAscent(2.0, 0.9, floor=True).update(0.85) == pytest.approx(2.0 * math.exp(-0.05))


def test_it_finds_the_lambda_at_which_the_constraint_just_holds() -> None:
    """A penalty that answers to λ as 1 / λ: the ceiling 0.02 is met at λ = 50, from far below and far above."""
    for start in (0.1, 1e4):
        ascent = DualAscent(start, 0.02)
        for _ in range(400):
            ascent.update(1 / ascent.value)
        assert ascent.value == pytest.approx(50, rel=0.05)


def test_what_is_no_number_changes_nothing() -> None:
    ascent = DualAscent(3.0, 0.1)
    assert ascent.update(math.nan) == 3.0 and ascent.mean is None


def test_a_resumed_one_goes_on_as_if_nothing_had_happened() -> None:
    seen = [0.3, 0.01, 0.2, 0.5, 0.0, 0.1]
    whole = DualAscent(2.0, 0.1)
    for value in seen:
        whole.update(value)
    first = DualAscent(2.0, 0.1)
    for value in seen[:3]:
        first.update(value)
    second = DualAscent(2.0, 0.1)
    second.set_state(first.state())
    for value in seen[3:]:
        second.update(value)
    assert second == whole


@pytest.mark.parametrize("wrong", [{"value": 0.0}, {"target": 0.0}, {"rate": 0.0}, {"floor": True, "target": 1.0}])
def test_settings_that_cannot_be_met_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        DualAscent(**{"value": 1.0, "target": 0.1, **wrong})  # type: ignore[arg-type]


def test_the_share_kept_is_of_plain_fine_tunings_gain_at_the_same_step() -> None:
    curve = PlainCurve(3.0, [{"step": 10, "sft_loss": 2.0}, {"step": 5, "sft_loss": 2.98}, {"step": 15, "sft_loss": 1.0}])
    assert math.isnan(curve.kept(3, 2.9))  # plain has gained next to nothing yet
    assert curve.kept(6, 2.1) == pytest.approx(0.9)
    assert curve.kept(10, 2.0) == pytest.approx(1.0)
    assert curve.kept(99, 2.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="empty"):
        PlainCurve(3.0, [])
