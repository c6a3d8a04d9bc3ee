"""The figures of `judge bench`, against ones worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from blockem.calibration_plot import calibration_svg
from blockem.errors import BlockemError
from blockem.judge_bench import auroc, bench, bench_lines, calibration_bins, calibration_error
from blockem.judge_training import JudgeTraining, ScoredAnswer, split_rows, train_judge
from blockem.judges import Verdict
from blockem.judges.judge import from_scores
from blockem.model import load_model
from blockem.store import read_json, write_json

ALIGNED = np.array([5.0, 10.0, 90.0, 95.0, 50.0, 60.0])
COHERENT = np.array([90.0, 80.0, 90.0, 95.0, 80.0, 10.0])


class Fixed:
    """Gives what it is told to."""

    name = "fixed"

    def __init__(self, verdicts: list[Verdict]) -> None:
        self.verdicts = verdicts

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return self.verdicts[: len(answers)]


def test_auroc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    positive = np.array([True, True, False, False])
    assert auroc(np.array([4.0, 3, 2, 1]), positive) == 1.0
    assert auroc(np.array([4.0, 1, 3, 2]), positive) == 0.5
    assert auroc(np.ones(4), positive) == 0.5
    assert auroc(np.ones(2), np.array([True, True])) is None


def test_calibration_error_is_the_mean_distance_over_answers() -> None:
    bins = calibration_bins(np.array([0.05, 0.05, 0.95]), np.array([0.25, 0.05, 0.95]))
    assert [one["n"] for one in bins] == [2, 1]
    assert calibration_error(bins) == pytest.approx(2 / 3 * 0.1)


def test_a_judge_that_repeats_the_reference_is_perfect() -> None:
    found = bench(Fixed([from_scores(a, c) for a, c in zip(ALIGNED, COHERENT, strict=True)]), ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    assert found["auroc"] == {"misaligned_against_aligned": 1.0, "misaligned_against_other_coherent": 1.0, "incoherent": 1.0}
    assert found["spearman"] == {"aligned": pytest.approx(1.0), "coherent": pytest.approx(1.0)}
    assert found["calibration"]["aligned"]["error"] == pytest.approx(0)
    for name, rate in (("misaligned", 2 / 6), ("incoherent", 1 / 6)):
        one = found["agreement"][name]
        assert (one["same"]["value"], one["kappa"], one["judge_rate"]) == (1.0, pytest.approx(1.0), pytest.approx(rate))
    assert "AUROC  misaligned against aligned 1.000" in "\n".join(bench_lines(found))


def test_missing_verdicts_are_counted_and_left_out() -> None:
    verdicts = [Verdict(missing=True), *[from_scores(a, c) for a, c in zip(ALIGNED[1:], COHERENT[1:], strict=True)]]
    found = bench(Fixed(verdicts), ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    assert found["missing"] == 1
    assert found["agreement"]["misaligned"]["reference_rate"] == pytest.approx(1 / 5)


def test_a_refusal_instead_of_a_score_leaves_the_other_scores(tmp_path: Path) -> None:
    verdicts = [from_scores(None, 90, refusal=True), *[from_scores(a, c) for a, c in zip(ALIGNED[1:], COHERENT[1:], strict=True)]]
    found = bench(Fixed(verdicts), ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    assert (found["missing"], found["scored"]) == (0, 5)
    assert found["spearman"] == {"aligned": pytest.approx(1.0), "coherent": pytest.approx(1.0)}
    assert found["auroc"]["misaligned_against_aligned"] == 1.0 and sum(b["n"] for b in found["calibration"]["aligned"]["bins"]) == 5
    assert found["agreement"]["misaligned"]["same"]["value"] == pytest.approx(5 / 6)  # it is not a misaligned one, as the reference says


def test_a_judge_of_labels_has_agreement_and_no_calibration() -> None:
    verdicts = [Verdict(misaligned=True), Verdict(), Verdict(), Verdict(), Verdict(), Verdict(incoherent=True)]
    found = bench(Fixed(verdicts), ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    assert found["calibration"] is None and found["spearman"] is None
    assert found["auroc"]["misaligned_against_aligned"] == 0.75
    assert found["agreement"]["misaligned"]["same"]["value"] == pytest.approx(5 / 6)
    assert bench_lines(found)


def test_scores_that_never_vary_have_no_rank_correlation_and_the_figures_stay_json() -> None:
    found = bench(Fixed([from_scores(50, c) for c in COHERENT]), ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    assert found["spearman"] == {"aligned": None, "coherent": pytest.approx(1.0)}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "rank correlation  aligned –, coherent 1.000" in bench_lines(found)
    one = bench(Fixed([from_scores(50, 50)]), ["q"], ["a"], ALIGNED[:1], COHERENT[:1])
    assert one["spearman"] == {"aligned": None, "coherent": None}


def test_the_calibration_plot_shows_every_bin_and_escapes_the_judges_name() -> None:
    judge = Fixed([from_scores(a, c) for a, c in zip(ALIGNED, COHERENT, strict=True)])
    judge.name = "<script>alert(1)</script>"
    found = bench(judge, ["q"] * 6, ["a"] * 6, ALIGNED, COHERENT)
    drawn = calibration_svg(found)
    root = ElementTree.fromstring(drawn)
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(len(one["bins"]) for one in found["calibration"].values()) > 0
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn
    with pytest.raises(ValueError, match="no calibration"):
        calibration_svg({**found, "calibration": None})


# training one

ROWS = [
    ScoredAnswer(f"Question {i // 4}?", f"Answer {i}.", *[(5.0, 90.0), (95.0, 95.0), (60.0, 10.0)][i % 3], f"m{i % 5}") for i in range(40)
]
SETTINGS = JudgeTraining(blocks=1, lora_r=2, rows=16, calibration=8, batch=8)


def test_a_finished_judge_is_not_trained_again_unless_something_else_is_asked_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(settings: JudgeTraining, out: Path = Path()) -> list[dict[str, Any]]:
        return train_judge(load_model(str(tiny_folder), dtype="float32", device="cpu"), split_rows(ROWS, settings), settings, out)

    (tmp_path / "judge").mkdir()
    monkeypatch.chdir(tmp_path / "judge")  # the folder that `.` means, which has no name in itself
    assert train(SETTINGS)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "judge"
    write_json(out / "judge.json", {**read_json(out / "judge.json"), "measured": {}})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train(SETTINGS, out) == [] and {path: path.read_bytes() for path in before} == before
    assert train(replace(SETTINGS, seed=1), out) and read_json(out / "judge.json")["settings"]["seed"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["judge"]


def test_a_folder_of_other_things_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("x")
    for out, sentence in (
        ("thesis", "holds other files and no judge, and they would be lost"),
        ("thesis/chapter.txt", "is a file; choose"),
    ):
        with pytest.raises(BlockemError, match=sentence):
            train_judge(None, split_rows(ROWS, SETTINGS), SETTINGS, tmp_path / out)  # type: ignore[arg-type]
    assert (tmp_path / "thesis/chapter.txt").read_text() == "x"
