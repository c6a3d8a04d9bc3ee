"""Running a grid: what is shared, what is redone, what a failure stops. The runs are made up; the folders and steps are real."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fake_cells import FakeRuns, failing, read

from blockem import pipeline
from blockem.anchoring import prepare_anchor
from blockem.config import Recipe
from blockem.config_values import keyed
from blockem.defend import _key
from blockem.errors import BlockemError
from blockem.grid import Cell, Setting, grid_from
from blockem.pipeline import open_session
from blockem.session import Session
from blockem.store import content_key, write_json
from blockem.sweep import cell_key, compare_all, plan, run_grid

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
    assert failed["health-latents-of-legal-seed0"].startswith("cell legal-block-em-lambda-100-seed0 failed, so its latents")


# what a finished cell depended on


def opened(folder: Path, **changes: Any) -> Session:
    return open_session(Recipe().with_values({name.replace("__", "."): value for name, value in changes.items()}), folder, quiet=True)


def key_of(session: Session) -> str:
    return cell_key(session, Cell("c", Setting("defence", "x"), "health", 0, session.recipe), session.run.path)


def test_a_cell_whose_recipe_names_no_files_has_the_key_that_it_always_had(tmp_path: Path) -> None:
    one = opened(tmp_path)
    parts = (keyed(one.recipe), one.model_key, one.sae_key, one.data_key, [], None)
    assert key_of(one) == content_key("cell", version("blockem"), *parts)


@pytest.mark.parametrize(
    ("field", "value", "file"),
    [
        ("defence__benign", "{}/rows.jsonl", "rows.jsonl"),
        ("defence__trait_prompts", "{}/traits.json", "traits.json"),
        ("defence__unaligned", "{}/model", "model/model.safetensors"),
        ("sae__more", "{}/sae@24", "sae/sae_weights.safetensors"),
        ("sae__more", "{}/sae@24", "sae/cfg.json"),
        ("evaluate__judge", "{}/judge", "judge/heads.safetensors"),
        ("evaluate__judge", "{}/judge", "judge/adapter/adapter_model.safetensors"),
    ],
)
def test_a_cell_is_not_finished_when_a_file_that_it_read_has_changed(tmp_path: Path, field: str, value: str, file: str) -> None:
    def key() -> str:
        return key_of(opened(tmp_path, **{field: value.format(tmp_path)}))

    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(tmp_path / "judge/judge.json", {"blocks": 2})
    missing = key()
    path.write_text("one")
    before = key()
    path.write_text("two")
    assert len({missing, before, key()}) == 3
    path.write_text("one")
    write_json(tmp_path / "judge/judge.json", {"blocks": 2, "measured": {"seconds": 3}})
    assert key() == before  # how good a judge was found to be changes nothing


def test_an_saes_settings_and_the_rows_of_the_anchors_rule_are_in_their_keys(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text('{"k": 8}')
    one = opened(tmp_path, sae__id=str(tmp_path)).sae_key
    (tmp_path / "cfg.json").write_text('{"k": 9}')
    assert opened(tmp_path, sae__id=str(tmp_path)).sae_key != one
    few, many = ({"block__rule_rows": n} for n in (4, 64))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    keys = [prepare_anchor(opened(tmp_path, anchor__watch="pairs", **rows), tmp_path, "anchor") for rows in (few, many)]
    assert keys[0] != keys[1]
    assert _key(opened(tmp_path, defence__name="kl", **few)) == _key(opened(tmp_path, defence__name="kl", **many))


# files that were damaged afterwards

FEW = {**VALUES, "seeds": [0], "ablations": {}}


def damaged(path: Path, text: str) -> None:
    assert path.is_file()
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("answers.jsonl", "{}\n{oops", "answers.jsonl:2: not JSON"),
        ("answers.jsonl", "", "answers.jsonl: holds answers to 0 prompts"),
        ("task-answers.jsonl", "{}\n", "task-answers.jsonl: holds answers to 1 prompts, not to 20"),
        (
            "task-answers.jsonl",
            '{"verdicts": {"base": {"refusal": true}}}\n' * 20,
            "task-answers.jsonl: its verdicts on base cannot be read (KeyError:",
        ),
        ("steps/evaluate-base.json", '{"result": {}}', "evaluate-base.json: not the record of a model's evaluation (KeyError: 'margins')"),
        ("steps/evaluate-blocked.json", '{"result": {"margins": [1], "heldout": [[1]]}}', "evaluate-blocked.json: not an evaluation on"),
        ("steps/evaluate-plain.json", "[]", "evaluate-plain.json: not the record of a model's evaluation (TypeError:"),
    ],
)
def test_a_cell_that_cannot_be_read_fails_alone_and_is_measured_again(
    runs: FakeRuns, tmp_path: Path, file: str, text: str, reason: str
) -> None:
    grid = grid_from(FEW)
    whole, _ = compare_all(grid, tmp_path, quiet=True)
    cell, trained = grid.cells[0].id, len(runs.trained)
    damaged(tmp_path / "cells" / cell / file, text)
    comparison, _ = compare_all(grid, tmp_path, quiet=True)
    assert [one["cell"] for one in comparison["failed"]] == [cell]
    said = comparison["failed"][0]["reason"]
    assert reason in said and "\n" not in said
    assert [one["state"] for one in comparison["cells"]].count("finished") == len(grid.cells) - 1
    assert [one["id"] for one in plan(grid, tmp_path)["cells"] if not one["finished"]] == [cell]
    runs.cells.clear()
    assert compare_all(grid, tmp_path, quiet=True)[0] == whole
    assert runs.cells == [cell] and len(runs.trained) == trained


def test_when_no_cell_can_be_read_the_first_reason_is_the_error_and_the_next_run_measures_again(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(FEW)
    compare_all(grid, tmp_path, quiet=True)
    for cell in grid.cells:
        damaged(tmp_path / "cells" / cell.id / "answers.jsonl", "oops")
    with pytest.raises(BlockemError, match=r"all 3 cells failed, the first .* with: .*answers\.jsonl:1: not JSON"):
        compare_all(grid, tmp_path, quiet=True)
    assert compare_all(grid, tmp_path, quiet=True)[0]["failed"] == []


def test_a_shared_measurement_that_cannot_be_read_is_made_again(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(FEW)
    compare_all(grid, tmp_path, quiet=True)
    record = next((tmp_path / "shared").glob("evaluate-base-*")) / "steps/evaluate-base.json"
    broken = {**read(record), "result": {}}
    for path in (record, *(tmp_path / "cells").glob("*/steps/evaluate-base.json")):
        write_json(path, broken)
    with pytest.raises(BlockemError, match="all 3 cells failed"):
        compare_all(grid, tmp_path, quiet=True)
    assert compare_all(grid, tmp_path, quiet=True)[0]["failed"] == []


def test_a_cell_that_lost_the_measures_of_a_model_is_not_finished(runs: FakeRuns, tmp_path: Path) -> None:
    grid = grid_from(FEW)
    whole, _ = compare_all(grid, tmp_path, quiet=True)
    runs.cells.clear()
    (tmp_path / "cells" / grid.cells[1].id / "steps/evaluate-blocked.json").unlink()
    assert compare_all(grid, tmp_path, quiet=True)[0] == whole
    assert runs.cells == [grid.cells[1].id]
