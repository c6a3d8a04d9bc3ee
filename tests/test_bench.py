"""The benchmark's table: ratios round by round, marks that are reached or not, and what was not measured says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from measuring import Measure, in_turn, line, missing, ratio


def test_a_ratio_is_taken_round_by_round() -> None:
    one = ratio("a", "b", [2.0, 30.0, 4.0, 6.0, 8.0], [1.0, 10.0, 1.0, 3.0, 4.0], 2.1)
    assert one.value == 2.0 and one.low is not None and one.high is not None and one.low <= 2.0 <= one.high
    assert one.reached is True and "reached" in line(one)
    assert ratio("a", "b", [3.0, 3.0], [1.0, 1.0], 4.0, at_most=False).reached is False


def test_what_was_not_measured_says_why() -> None:
    one = missing("a", "b", 1.0, True, "no such library")
    assert one.reached is None and line(one).endswith("not measured: no such library |")
    assert Measure("seconds", "–", 3.0).reached is None


def test_pieces_of_work_have_their_turns_after_a_round_that_is_not_counted() -> None:
    order: list[str] = []
    taken = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == list("ababab") and [len(taken[name]) for name in "ab"] == [2, 2]


def test_the_command_runs_one_group_and_refuses_an_unknown_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockem", "bench", "--only", "help", "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["name"].startswith("blockem --help") and row["value"] > 0
    unknown = subprocess.run([sys.executable, "-m", "blockem", "bench", "--only", "nonsense"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "nonsense" in unknown.stderr


def test_without_the_checkout_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from blockem import cli
    from blockem.errors import BlockemError

    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "blockem" / "cli.py"))
    with pytest.raises(BlockemError, match="source checkout"):
        cli.bench()


def test_the_cost_model_counts_a_tiny_model_as_by_hand() -> None:
    import cost

    a = cost.Architecture("tiny", 2, 4, 8, 2, 1, 2, 10)
    assert a.linear == 4 * 2 * (4 + 2) + 3 * 4 * 8 == 144
    assert a.block(5) == 2 * 144 + 4 * 5 * 4 and a.head == 80
    w = cost.Work(tokens=5, supervised=3)
    assert cost.base_pass(a, w, 0) == 5 * a.block(5)
    assert cost.screening(a, w, 0, True) < cost.screening(a, w, 0, False)
    real = {one.name: one.weights for one in cost.MODELS}
    assert real["SmolLM2-135M"] == pytest.approx(134.5e6, rel=0.01)
    assert real["Llama-3.1-8B"] == pytest.approx(7.5e9, rel=0.01)  # without the input embedding
    assert all(1 <= float(row["cached_over_plain"]) < 1.01 < float(row["online_over_plain"]) < 1.4 for row in cost.table())
