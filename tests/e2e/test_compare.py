"""A comparison on the real embedded model: killed and gone on with, and two strengths that share one plain fine-tune."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small import blockem, command, write_recipe

GRID = """\
recipe: small.yaml
defences:
  block-em: {block.lambda_: [0, 10000]}
resamples: 200
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    recipe = write_recipe(folder)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("evaluate: {", "evaluate: {cue: training, "), encoding="utf-8")
    path = folder / "grid.yaml"
    path.write_text(GRID, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(grid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was killed in its first blocked training, and then went on."""
    out = tmp_path_factory.mktemp("compare") / "whole"
    with subprocess.Popen(
        command("compare", grid, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 900
        while not list(out.glob("cells/*/blocked.making/checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (out / "comparison.json").exists()
    done = blockem("compare", grid, "--out", out, "--json", timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "plain: already done, reused" in done.stderr and "discover: already done, reused" in done.stderr
    assert "cell 2 of 2" in done.stderr
    assert json.loads(done.stdout) == json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    return out


def test_a_dry_run_counts_trainings_and_writes_nothing(grid: Path, tmp_path: Path) -> None:
    done = blockem("compare", grid, "--out", tmp_path / "none", "--dry-run")
    assert done.returncode == 0 and "2 runs, 3 trainings, 1 plain" in done.stdout, done.stderr
    assert not (tmp_path / "none").exists()


def test_both_cells_are_ordinary_runs_that_share_the_plain_fine_tune(finished: Path) -> None:
    cells = sorted((finished / "cells").iterdir())
    assert [one.name for one in cells] == ["health-block-em-lambda-0-seed0", "health-block-em-lambda-10000-seed0"]
    for one in cells:
        assert all((one / name).stat().st_size > 0 for name in ("recipe.yaml", "summary.json", "report.html", "latents.json"))
    plain, discovered = ({(one / name).read_bytes() for one in cells} for name in ("steps/plain.json", "latents.json"))
    assert len(plain) == 1 and len(discovered) == 1
    assert len({(one / "plain/adapter_model.safetensors").stat().st_ino for one in cells}) == 1


def test_a_run_of_a_cells_recipe_in_its_folder_redoes_nothing(finished: Path) -> None:
    cell = finished / "cells/health-block-em-lambda-0-seed0"
    again = blockem("run", cell / "recipe.yaml", "--out", cell)
    assert again.returncode == 0 and "reused" in again.stderr and "started" not in again.stderr, again.stderr


def test_figures_answers_under_a_cue_and_the_page_are_there(finished: Path) -> None:
    comparison = json.loads((finished / "comparison.json").read_text(encoding="utf-8"))
    assert all(one["measures"]["cued_em"] is not None for one in comparison["settings"])
    for figure in comparison["figures"]:
        with (finished / "figures" / f"{figure['id']}.csv").open(encoding="utf-8") as file:
            assert len(list(csv.reader(file))) == 1 + len(figure["rows"])
        assert figure["sentence"]
    rows = (finished / "cells/health-block-em-lambda-0-seed0/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(row)["cued"]["verdicts"]["plain"] for row in rows)
    assert "Recommendation" in (finished / "comparison.html").read_text(encoding="utf-8")


def test_a_cell_that_fails_gives_one_sentence_and_exit_code_1(grid: Path, finished: Path) -> None:
    path = grid.with_name("failing.yaml")
    path.write_text(GRID + "ablations: {too deep: {sae.block: 99}}\n", encoding="utf-8")
    done = blockem("compare", path, "--out", finished, timeout=1800)
    assert done.returncode == 1 and "failed: health-too-deep-seed0:" in done.stdout and "Traceback" not in done.stderr, done.stderr
