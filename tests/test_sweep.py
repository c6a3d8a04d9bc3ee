"""Running a grid: what is shared, what is redone, what a failure stops. The runs are made up; the folders and steps are real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_cells import FakeRuns, failing, read

from blockem import pipeline
from blockem.errors import BlockemError
from blockem.grid import grid_from
from blockem.sweep import compare_all, plan, run_grid

VALUES: dict[str, Any] = {
    "recipe": {"block": {"lambda_": 100}, "evaluate": {"judge": "none"}},
    "seeds": [0, 1],
    "defences": {"block-em": {"block.lambda_": [0, 100, 10000]}},
    "ablations": {"random latents": {"block.control": "random"}},
    "resamples": 200,
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(pipeline, "run_all", fake)
    return fake


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_plain_is_trained_once_for_each_seed_and_adopted_by_the_other_cells(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(VALUES)
    assert run_grid(grid, tmp_path, quiet=True) == {}
    plain = [one for one in runs.trained if one.endswith(" plain")]
    assert len(plain) == 2 and len(runs.trained) == 2 + 8
    for cell in grid.cells:
        folder = tmp_path / "cells" / cell.id
        assert (folder / "plain/adapter_model.safetensors").is_file() and (folder / "summary.json").is_file()
    assert plan(grid, tmp_path)["trainings"] == 0


def test_the_plan_counts_the_trainings_that_are_done_later(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(VALUES)
    planned = plan(grid, tmp_path)
    assert not tmp_path.joinpath("steps").exists()
    run_grid(grid, tmp_path, quiet=True)
    assert planned["trainings"] == len(runs.trained) == 10
    assert [one["id"] for one in planned["cells"]] == runs.cells
    assert [one["shares_plain_with"] is None for one in planned["cells"]].count(True) == planned["plain_trainings"] == 2


def test_finished_cells_are_not_run_again_and_the_files_stay(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(VALUES)
    compare_all(grid, tmp_path, quiet=True)
    before, calls = files(tmp_path), len(runs.cells)
    compare_all(grid, tmp_path, quiet=True)
    assert len(runs.cells) == calls and files(tmp_path) == before


def test_a_killed_comparison_goes_on_and_ends_with_the_same_files(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(VALUES)
    compare_all(grid, tmp_path / "whole", quiet=True)
    runs.cells.clear()
    runs.broken = {grid.cells[2].id: KeyboardInterrupt}
    with pytest.raises(KeyboardInterrupt):
        compare_all(grid, tmp_path / "killed", quiet=True)
    assert not (tmp_path / "killed/comparison.json").exists()
    (tmp_path / "killed/shared/.making-x").mkdir()
    runs.broken = {}
    compare_all(grid, tmp_path / "killed", quiet=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(runs.cells) == len(grid.cells) + 1


def test_one_failed_cell_stops_no_other_and_is_tried_again(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(VALUES)
    broken = grid.cells[0].id
    runs.broken = {broken: failing("the SAE does not fit"), grid.cells[1].id: RuntimeError("odd\nlines")}
    comparison, _ = compare_all(grid, tmp_path, quiet=True)
    assert {one["cell"]: one["reason"] for one in comparison["failed"]} == {
        broken: "the SAE does not fit",
        grid.cells[1].id: "RuntimeError: odd",
    }
    assert "Traceback" in (tmp_path / "cells" / grid.cells[1].id / "error.txt").read_text()
    assert comparison["recommendation"]["left_out"] == ["block-em lambda=0", "block-em lambda=100"]
    assert "the SAE does not fit" in (tmp_path / "comparison.html").read_text()
    runs.broken = {}
    again, _ = compare_all(grid, tmp_path, quiet=True)
    assert again["failed"] == [] and read(tmp_path / "comparison.json") == again
    assert not (tmp_path / "cells" / grid.cells[1].id / "error.txt").exists()


def test_when_all_fail_the_first_reason_is_the_error(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from({**VALUES, "seeds": [0], "ablations": {}})
    runs.broken = {cell.id: failing("no such file") for cell in grid.cells}
    with pytest.raises(BlockemError, match=r"all 3 cells failed, the first .* with: no such file"):
        compare_all(grid, tmp_path, quiet=True)


def test_a_changed_setting_is_run_again_and_the_rest_is_not(runs: FakeRuns, tmp_path: Path) -> None:
    run_grid(grid_from(VALUES), tmp_path, quiet=True)
    runs.cells.clear()
    run_grid(grid_from({**VALUES, "ablations": {"random latents": {"block.control": "random", "block.r": 3}}}), tmp_path, quiet=True)
    assert runs.cells == ["health-random-latents-seed0", "health-random-latents-seed1"]


def test_a_transfer_whose_source_failed_says_so(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from({**VALUES, "seeds": [0], "domains": ["health", "legal"], "ablations": {}, "transfer": True})
    runs.broken = {f"{domain}-block-em-lambda-100-seed0": failing("no") for domain in ("health", "legal")}
    failed = run_grid(grid, tmp_path, quiet=True)
    assert failed["health-latents-of-legal-seed0"].startswith("cell legal-block-em-lambda-100-seed0 has no latents.json")
