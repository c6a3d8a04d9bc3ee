"""The command: what it prints, and its exit codes. The runs are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_cells import FakeRuns, failing, read
from typer.testing import CliRunner

from blockem import pipeline
from blockem.cli import app

GRID = "recipe: {evaluate: {judge: none}}\ndefences: {block-em: {block.lambda_: [0, 100]}}\nresamples: 100\n"


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(pipeline, "run_all", fake)
    return fake


def test_a_dry_run_lists_cells_sharing_and_trainings_and_runs_nothing(grid: Path, runs: FakeRuns, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(grid), "--out", str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0 and runs.cells == [] and not (tmp_path / "out").exists()
    assert "1  health-block-em-lambda-0-seed0: 2 trainings\n" in done.output
    assert "2  health-block-em-lambda-100-seed0: 1 training; plain and its measures from health-block-em-lambda-0-seed0" in done.output
    assert "2 runs, 3 trainings, 1 plain" in done.output


def test_json_is_what_the_file_holds(grid: Path, runs: FakeRuns, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(grid), "--out", str(tmp_path / "out"), "--json", "--quiet"])
    assert done.exit_code == 0 and json.loads(done.stdout) == read(tmp_path / "out/comparison.json")


def test_a_failed_cell_is_exit_code_1_and_one_sentence(grid: Path, runs: FakeRuns, tmp_path: Path) -> None:
    runs.broken = {"health-block-em-lambda-0-seed0": failing("the SAE does not fit")}
    done = CliRunner().invoke(app, ["compare", str(grid), "--out", str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 1
    assert "failed: health-block-em-lambda-0-seed0: the SAE does not fit" in done.output and "Recommendation" not in done.output
