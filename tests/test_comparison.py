"""The numbers and pages of a comparison, from made-up runs."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cells import FakeRuns, read

from blockem import pipeline
from blockem.cells import _answers, variant_of
from blockem.errors import BlockemError
from blockem.evaluation import interval, mean
from blockem.grid import grid_from
from blockem.report.comparison import csv_text, ours, pictures, plain_cell, write
from blockem.report.comparison_charts import records
from blockem.report.comparison_words import ablation_words, plane_words, recommendation_words, transfer_words
from blockem.resampling import Draws, Ratio, choose, front, summary
from blockem.store import write_jsonl
from blockem.sweep import compare_all

VALUES: dict[str, Any] = {
    "recipe": {"block": {"lambda_": 100}, "evaluate": {"judge": "none"}},
    "seeds": [0, 1],
    "domains": ["health", "legal"],
    "defences": {"block-em": {"block.lambda_": [0, 100, 10000]}},
    "ablations": {'random <img src=x onerror="alert(1)">': {"block.control": "random"}},
    "resamples": 300,
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    fake = FakeRuns()
    fake.cued = True
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_all", fake)
        comparison, _ = compare_all(grid_from(VALUES), out, quiet=True)
    return comparison, out


def ratio(values: list[float], counted: list[float] | None = None) -> Ratio:
    weights = np.array(counted or [1.0] * len(values))
    return Ratio("items", np.array(values) * weights, weights)


def test_a_ratio_of_sums_is_the_evaluations_own_mean_and_nearly_its_interval() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0] * 12)
    ours = summary(Draws(4000).of(ratio(values.tolist())), len(values))
    theirs = interval(mean, [values], 4000)
    assert ours is not None and theirs is not None
    assert ours["value"] == pytest.approx(theirs.value)
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_paired_differences_use_only_what_both_have_and_the_same_prompts() -> None:
    left, right = ratio([1, 1, 0, 1], [1, 1, 1, 0]), ratio([0, 1, 0, 0], [1, 1, 0, 1])
    assert left.minus(right).n == 2
    draws = Draws(500)
    assert draws.of(left.minus(right))[0] == 0.5
    same = ratio([1, 0, 1, 0, 1, 0])
    assert np.nanmax(np.abs(draws.of(same.minus(same)))) == 0  # paired: no spread where nothing differs
    with pytest.raises(ValueError, match="same items"):
        left.minus(Ratio("others", left.a, left.b))


def test_shares_of_different_wholes_are_subtracted_as_shares() -> None:
    one, other = Ratio("rows", np.array([0.9] * 8), np.array([1.0] * 8)), Ratio("rows", np.array([1.8] * 8), np.array([2.0] * 8))
    assert Draws(300).difference(one, other) == pytest.approx(0.0)  # both keep 90 % of what their own plain fine-tune gained
    same = Ratio("rows", np.array([0.5] * 8), np.array([1.0] * 8))
    assert Draws(300).difference(one, same) == pytest.approx(Draws(300).of(one.minus(same)))


def test_seeds_widen_an_interval_where_they_disagree() -> None:
    low, high, of = ratio([0.0] * 40), ratio([1.0] * 40), Draws(2000).of
    found = summary(Draws(2000).over({("d", 0): of(low), ("d", 1): of(high)}, (0, 1)), 40)
    assert found == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 40}
    alone = summary(Draws(2000).over({("d", 0): of(low)}, (0,)), 40)
    assert alone == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 40}


def test_a_share_of_few_prompts_is_never_as_sure_as_nothing_seen_makes_it_look() -> None:
    never = summary(Draws(500).over({("d", 0): Draws(500).of(ratio([0.0] * 55))}, (0,)), 55, share=True)
    assert never is not None
    assert (never["low"], never["high"]) == pytest.approx((0, 0.0653), abs=1e-4)
    seeds = {("d", seed): Draws(2000).of(ratio([float(seed)] * 40)) for seed in (0, 1)}
    torn = summary(Draws(2000).over(seeds, (0, 1)), 40, share=True)
    assert torn == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 40}  # seeds that disagree still widen it


def test_a_domain_outside_the_other_counts_evenly() -> None:
    draws = Draws(100)
    found = draws.over({("a", 0): draws.of(ratio([1.0] * 10)), ("b", 0): draws.of(ratio([0.0] * 90))}, (0,))
    assert found[0] == 0.5


def test_the_front_holds_what_nothing_dominates() -> None:
    worse = np.array([[0.5, -1.0], [0.1, -0.9], [0.2, -0.8], [0.1, -0.9], [np.nan, -2.0]])
    assert front(worse).tolist() == [True, True, False, True, False]  # equal points share the front
    assert front(np.stack([worse, worse[::-1]], axis=2))[:, 0].tolist() == [True, True, False, True, False]


def test_the_choice_is_the_least_em_that_keeps_enough_and_its_share() -> None:
    em = np.array([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
    kept = np.array([[1.0] * 4, [0.97, 0.97, 0.9, 0.97], [0.5] * 4])
    more = np.array([[0.0] * 4, [0.01, 0.01, 0.01, 0.2], [0.0] * 4])
    found = choose(em, kept, more, 0.95, 0.03)
    assert found.chosen == 1 and found.shares.tolist() == pytest.approx([2 / 3, 1 / 3, 0]) and found.none == 0
    assert found.qualified == (True, True, False)
    assert choose(em, kept, None, 0.4, 0.03).chosen == 2
    nothing = choose(em, np.full_like(em, np.nan), None, 0.95, 0.03)
    assert nothing.chosen is None and nothing.none == 1


def test_settings_carry_every_measure_and_the_difference_to_plain(compared: tuple[dict[str, Any], Path]) -> None:
    comparison, _ = compared
    labels = [one["label"] for one in comparison["settings"]]
    assert labels[:3] == ["block-em lambda=0", "block-em lambda=100", "block-em lambda=10000"] and len(labels) == 4
    ems = [one["measures"]["em"]["value"] for one in comparison["settings"]]
    assert ems[0] > ems[1] > ems[2]
    strong = comparison["settings"][2]
    assert strong["changes"]["em"]["high"] < 0 and strong["complete"] and strong["cells"] == 4
    assert comparison["settings"][0]["measures"]["kept"]["value"] == pytest.approx(1.0)
    assert comparison["references"]["plain"]["kept"]["value"] == pytest.approx(1.0)
    assert comparison["references"]["base"]["kept"]["value"] == pytest.approx(0.0)
    assert strong["measures"]["cued_em"]["value"] == 1.0


def test_the_domains_own_questions_are_a_measure_beside_the_loss(compared: tuple[dict[str, Any], Path]) -> None:
    comparison, out = compared
    assert [comparison["references"][name]["task"]["value"] for name in ("base", "plain")] == [0.0, 1.0]
    assert comparison["references"]["plain"]["task"]["n"] == 19  # one verdict is missing
    strong = next(one for one in comparison["settings"] if one["label"] == "block-em lambda=10000")
    assert strong["measures"]["task"]["value"] == 0.0 and strong["changes"]["task"]["high"] < 0
    rows = records(next(one for one in comparison["figures"] if one["id"] == "em-task"))
    assert {row["setting"]: row["on_front"] for row in rows}["block-em lambda=100"]  # as much of the task as plain, and less EM
    assert "Misaligned in the domain is the share" in (out / "comparison.html").read_text(encoding="utf-8")


def test_the_lowest_under_a_plane_is_one_of_the_front() -> None:
    columns = ["setting", "defence", "strength", "incoherent", "incoherent_low", "incoherent_high", "em", "em_low", "em_high", "on_front"]
    points = {"base": (0.1, 0.0, False), "plain": (0.2, 0.6, True), "anchor": (0.4, 0.0, False), "ldifs": (0.16, 0.0, True)}
    rows = [[name, name, None, x, x, x, y, y, y, on] for name, (x, y, on) in points.items()]
    figure = {"kind": "plane", "up": "em", "across": "incoherent", "columns": columns, "rows": rows}
    assert "The lowest is ldifs: " in plane_words(figure) and "against plain's" in plane_words(figure)
    assert "plain was not measured here" in plane_words({**figure, "rows": [row for row in rows if row[0] != "plain"]})
    alone = [row for row in rows if row[0] in ("base", "plain")]
    assert "No setting lies below plain" in plane_words({**figure, "rows": alone})


def test_what_is_not_finished_is_said_or_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRuns()
    monkeypatch.setattr(pipeline, "run_all", fake)
    grid = grid_from({**VALUES, "defences": {"plain": None, "block-em": {"block.lambda_": [0, 100, 10000]}}})
    broken = [cell.id for cell in grid.cells if cell.setting.strength == 10000][1:]
    broken += [cell.id for cell in grid.cells if cell.setting.kind == "ablation"][:1]
    fake.broken = {one: BlockemError("no") for one in broken}
    comparison, _ = compare_all(grid, tmp_path, quiet=True)
    figures = {one["id"]: one for one in comparison["figures"]}
    assert [row["strength"] for row in records(figures["strength-block-em"])] == [0.0, 100.0]
    rows = records(figures["ablations"])
    assert {row["cells"] for row in rows} == {3} and figures["ablations"]["cells"] == 4
    assert all(row["difference"] == pytest.approx(row["value"] - row["whole"]) for row in rows if row["measure"] == "preference")
    assert "Not all cells are finished for random" in ablation_words(figures["ablations"])
    changes = sum(value is not None for one in comparison["settings"] if one["name"] != "plain" for value in one["changes"].values())
    assert comparison["comparisons"] == changes + len(rows)  # plain minus plain is no comparison


def test_a_cell_is_about_its_control_where_it_has_one() -> None:
    models: dict[str, Any] = {"base": {}, "plain": {}, "blocked": {}, "random": {}}
    assert variant_of({"models": models, "main": "blocked"}) == "blocked"
    assert variant_of({"models": models, "main": "blocked"}, "random") == "random"
    assert variant_of({"models": {"base": {}, "plain": {}}}, "random") == "plain"


def test_a_transfer_is_told_against_plain_and_against_the_domains_own_latents() -> None:
    columns = ["latents_of", "trained_on", "em", "change", "change_high", "from_own", "from_own_low", "from_own_high"]
    rows = [
        ["a", "a", 0.2, -0.3, -0.1, None, None, None],
        ["b", "a", 0.4, -0.1, 0.02, 0.2, 0.05, 0.3],
        ["a", "b", 0.1, -0.2, -0.1, 0.0, -0.1, 0.1],
    ]
    words = transfer_words({"columns": columns, "rows": rows})
    assert words.startswith("Of 2 trainings with latents of another domain, 1 lie below plain with their whole interval: a in b.")
    assert words.endswith("these differ: b in a (+20.0 points).")
    assert transfer_words({"columns": columns, "rows": [rows[0], rows[2]]}).endswith("none can be told apart.")


def test_where_plain_alone_keeps_the_rule_no_defence_is_said_to_fit(compared: tuple[dict[str, Any], Path]) -> None:
    found = {**compared[0]["recommendation"], "setting": "plain", "qualified": ["plain"]}
    assert recommendation_words({"recommendation": found, "seeds": [0, 1]})[0].startswith("None of these defences fits")
    several = {**found, "qualified": ["plain", "kl"]}
    assert recommendation_words({"recommendation": several, "seeds": [0, 1]})[0].startswith("Use no defence")


def test_the_recommendation_keeps_the_task_and_says_how_sure_it_is(compared: tuple[dict[str, Any], Path]) -> None:
    found = compared[0]["recommendation"]
    assert found["setting"] == "block-em lambda=100" and found["measure"] == "em"  # 10,000 cuts more but keeps too little
    assert found["candidates"] == 4 and 0.9 < found["share"] <= 1 and sum(found["shares"].values()) == pytest.approx(1 - found["none"])
    words = " ".join(compared[0]["sentences"]["recommendation"])
    assert "of the 4 settings compared" in words and "bootstrap resamples" in words and "made on these data" in words
    cued = " ".join(recommendation_words({**compared[0], "cue": "training"}))
    assert "cue of the training format were not asked" in words and "were not asked" not in cued
    assert "one seed" not in words and "There is one seed" in " ".join(recommendation_words({"recommendation": found, "seeds": [3]}))


def test_random_latents_are_compared_with_the_whole_on_the_same_prompts(compared: tuple[dict[str, Any], Path]) -> None:
    figure = next(one for one in compared[0]["figures"] if one["id"] == "ablations")
    row = dict(zip(figure["columns"], figure["rows"][0], strict=True))
    assert row["measure"] == "em" and row["low"] > 0 and row["difference"] == pytest.approx(row["value"] - row["whole"])
    assert "higher for random <img" in figure["sentence"]
    words = {one.id: one.words for one in pictures(figure)}
    ticks = re.findall(r'class="tick"[^>]*>([^<]+)<', str(pictures(figure)[0].chart))
    assert max(abs(float(tick.replace("−", "-"))) for tick in ticks) >= 5  # percentage points, as the values beside them
    assert set(words) >= {"ablations-em", "ablations-incoherent", "ablations-kept", "ablations-preference"}
    assert (
        words["ablations-em"] == figure["sentence"]
        and ", in in-domain adherence: " in words["ablations-kept"]
        and len(set(words.values())) == len(words)
    )


def test_csv_json_and_page_hold_the_same_numbers(compared: tuple[dict[str, Any], Path]) -> None:
    comparison, out = compared
    assert read(out / "comparison.json") == comparison
    assert {one["id"] for one in comparison["figures"]} >= {"em-adherence", "em-incoherence", "cued-em-adherence", "strength-block-em"}
    for figure in comparison["figures"]:
        with (out / "figures" / f"{figure['id']}.csv").open(encoding="utf-8") as file:
            rows = list(csv.reader(file))
        assert rows[0] == figure["columns"]
        assert rows[1:] == [[plain_cell(value) for value in row] for row in figure["rows"]]
        numbers = [(a, b) for row, line in zip(figure["rows"], rows[1:], strict=True) for a, b in zip(row, line, strict=True)]
        assert all(float(b) == a for a, b in numbers if isinstance(a, float))
    assert (out / "figures/em-adherence.svg").read_text().startswith('<svg xmlns="http://www.w3.org/2000/svg"')


def test_pictures_are_well_formed_xml(compared: tuple[dict[str, Any], Path]) -> None:
    from xml.etree import ElementTree

    pictures = list((compared[1] / "figures").glob("*.svg"))
    assert len(pictures) >= 7
    for one in pictures:
        text = one.read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert "var(" not in text and ".dot.blocked { fill: #1d5c9e;" in text
    plane = (compared[1] / "figures/em-adherence.svg").read_text(encoding="utf-8")
    assert "Misaligned answers against what was learnt" in plane and ">block-em</text>" in plane and ">plain</text>" in plane


def test_the_page_escapes_names_and_loads_nothing(compared: tuple[dict[str, Any], Path]) -> None:
    text = (compared[1] / "comparison.html").read_text(encoding="utf-8")
    assert "<img" not in text and "<script" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "random &lt;img" in text
    assert "There is one seed" not in text and "2 seeds say little" in text
    assert "not corrected for their number" in text


def test_a_formula_in_a_name_is_no_formula_in_the_csv() -> None:
    assert csv_text({"columns": ["a", "b"], "rows": [["=1+1", -0.5], [None, "x"]]}) == "a,b\n'=1+1,-0.5\n,x\n"


def test_answers_may_hold_every_line_separator(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "answers": {"base": "c\u2029d\u0085e\x0cf"}}, {"prompt": "g"}]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    assert _answers(tmp_path / "answers.jsonl", 2) == rows
    with pytest.raises(BlockemError, match=r"answers\.jsonl: holds answers to 2 prompts, not to 3"):
        _answers(tmp_path / "answers.jsonl", 3)


def test_only_what_a_comparison_draws_is_removed_from_its_figures(compared: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    drawn = ["strength-kl.csv", "transfer.svg", "ablations-em.svg"]
    own = ["notes.txt", "figure-for-the-paper.svg", "folder"]
    (tmp_path / "figures/folder").mkdir(parents=True)
    for name in [*drawn, *own[:2]]:
        (tmp_path / "figures" / name).write_text("x")
    write({**compared[0], "figures": [one for one in compared[0]["figures"] if one["id"] == "strength-block-em"]}, tmp_path)
    assert sorted(one.name for one in (tmp_path / "figures").iterdir()) == sorted([*own, "strength-block-em.csv", "strength-block-em.svg"])
    assert {one.name for one in (compared[1] / "figures").iterdir()} <= ours()  # every name that is given is known


def test_without_a_judge_the_preference_decides_and_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeRuns()
    fake.judged = False
    monkeypatch.setattr(pipeline, "run_all", fake)
    grid = grid_from({**VALUES, "seeds": [0], "domains": ["health"], "ablations": {}})
    comparison, page = compare_all(replace(grid), tmp_path, quiet=True)
    assert comparison["recommendation"]["measure"] == "preference" and comparison["judge"] == "none"
    assert "No answers were judged" in page.read_text(encoding="utf-8")
    assert [one["id"] for one in comparison["figures"]] == ["preference-adherence", "strength-block-em"]
