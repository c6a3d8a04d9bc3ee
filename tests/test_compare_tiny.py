"""A whole comparison on the tiny model: real trainings, discovery and evaluation, with cues and latents of another domain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny

from blockem import bundled
from blockem.executor import SideBySide
from blockem.grid import grid_from
from blockem.judges.judge import Verdict
from blockem.report.comparison_charts import records
from blockem.sweep import compare_all


class Even:
    """Finds every second answer misaligned."""

    name = "even"

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(misaligned=place % 2 == 0, incoherent=place % 5 == 0) for place in range(len(answers))]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    tiny.saved_sae(folder / "sae")
    chosen = [p for split in ("select", "eval") for p in [p for p in bundled.pairs() if p.split == split][::8]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p.__dict__) + "\n" for p in chosen), encoding="utf-8")
    for name, rows in (("prompts", bundled.final_prompts()[::10]), ("core", bundled.core_prompts()[::8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p.__dict__) + "\n" for p in rows), encoding="utf-8")
    data = {"rows": 32, "heldout_rows": 6, "pairs": f"{folder}/pairs.jsonl", "prompts": f"{folder}/prompts.jsonl"}
    recipe = {
        "model": {"id": str(tiny_folder), "dtype": "float32", "device": "cpu"},
        "data": {**data, "selection_prompts": f"{folder}/core.jsonl"},
        "sae": {"id": f"{folder}/sae", "block": tiny.BLOCK, "allow_poor_fit": True},
        "train": {"lora_r": 4, "lora_alpha": 8, "lr": 5e-3, "batch_size": 8, "micro_batch": 8, "log_every": 1, "probe_every": 0},
        "discover": {"pool": 10, "prescreen": 0, "keep": 6, "size": 4, "pairs": 6, "strengths": [0.25], "budget": 1.0},
        "block": {"lambda_": 1.0},
        "evaluate": {"max_new_tokens": 4, "general_rows": 3, "resamples": 100, "cue": "training"},
    }
    return {
        "recipe": recipe,
        "domains": ["health", "finance"],
        "defences": {"block-em": {"block.lambda_": [0, 1.0]}},
        "ablations": {"random latents": {"block.control": "random"}, "too deep": {"sae.block": 50}},
        "transfer": True,
        "resamples": 100,
    }


def test_a_whole_comparison_shares_transfers_and_reports(values: dict[str, Any], tmp_path: Path) -> None:
    grid = grid_from(values)
    comparison, page = compare_all(grid, tmp_path, quiet=True, judge=Even())
    assert {one["cell"] for one in comparison["failed"]} == {"health-too-deep-seed0", "finance-too-deep-seed0"}
    assert all("\n" not in one["reason"] and "Error" not in one["reason"] for one in comparison["failed"]), comparison["failed"]
    good = [tmp_path / "cells" / cell.id for cell in grid.cells if "too-deep" not in cell.id]
    assert len(good) == 8
    for domain in ("health", "finance"):
        cells = [one for one in good if one.name.startswith(domain)]
        assert len({(one / "plain/adapter_model.safetensors").stat().st_ino for one in cells}) == 1
        assert len({(one / "steps/evaluate-plain.json").read_bytes() for one in cells}) == 1
    moved, source = tmp_path / "cells/health-latents-of-finance-seed0", tmp_path / "cells/finance-block-em-lambda-1-seed0"
    ids = [[one["latent"] for one in json.loads((f / "latents.json").read_text())["latents"]] for f in (moved, source)]
    assert ids[0] == ids[1]
    assert [one["variant"] for one in comparison["cells"] if one["setting"] == "random latents"] == ["random", "random"]
    figures = {one["id"]: one for one in comparison["figures"]}
    assert set(figures) >= {"em-adherence", "em-incoherence", "cued-em-adherence", "ablations", "strength-block-em", "transfer"}
    matrix = records(figures["transfer"])
    assert len(matrix) == 4 and all(row["em"] is not None and row["kept"] is not None for row in matrix)
    assert [row["from_own"] is None for row in matrix] == [row["latents_of"] == row["trained_on"] for row in matrix]
    by_place = {(row["latents_of"], row["trained_on"]): row for row in matrix}
    foreign, own = by_place["health", "finance"], by_place["finance", "finance"]
    assert foreign["from_own"] == pytest.approx(foreign["em"] - own["em"])
    assert figures["em-adherence"]["rows"][0][0] == "base" and comparison["settings"][0]["measures"]["cued_em"] is not None
    assert comparison["settings"][0]["measures"]["task"]["n"] == 6  # different questions among the held-out rows
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    compare_all(grid, tmp_path, quiet=True, judge=Even())
    changed = [str(path) for path, old in before.items() if path.read_bytes() != old]
    assert [path for path in changed if "too-deep" not in path] == []
    assert page.is_file()


def test_side_by_side_ends_with_the_figures_of_one_by_one(values: dict[str, Any], tmp_path: Path) -> None:
    few = {"recipe": values["recipe"], "defences": {"plain": None, "block-em": None, "kl": [0.1]}, "resamples": 100}
    grid = grid_from(few)
    alone, _ = compare_all(grid, tmp_path / "alone", quiet=True, judge=Even())
    together, _ = compare_all(grid, tmp_path / "together", quiet=True, judge=Even(), executor=SideBySide(2))
    assert alone["failed"] == together["failed"] == []
    for one, other in zip(alone["settings"], together["settings"], strict=True):
        for name, found in one["measures"].items():
            assert found is None or other["measures"][name]["value"] == pytest.approx(found["value"], abs=1e-5), (one["label"], name)
    cells = [tmp_path / "together/cells" / cell.id for cell in grid.cells]
    assert len({(one / "plain/adapter_model.safetensors").stat().st_ino for one in cells}) == 1
    for step in ("plain", "evaluate-base", "evaluate-plain"):  # seconds and all: done once
        assert len({(one / "steps" / f"{step}.json").read_text() for one in cells}) == 1


def test_blocking_elsewhere_is_an_ablation(values: dict[str, Any], tmp_path: Path) -> None:
    tiny.saved_sae(tmp_path / "later", seed=1)
    last = tiny.N_BLOCKS - 1
    ablations = {
        "a later block": {"sae.id": f"{tmp_path}/later", "sae.block": last - 1},
        "the last block": {"block.directions": 4, "block.direction_blocks": [last]},
    }
    quick = {**values["recipe"], "evaluate": {**values["recipe"]["evaluate"], "cue": "none", "answers": False}}
    grid = grid_from({"recipe": quick, "defences": {"block-em": None}, "ablations": ablations, "resamples": 100})
    comparison, _ = compare_all(grid, tmp_path / "out", quiet=True)
    assert not comparison["failed"] and {one["label"] for one in comparison["settings"]} >= set(ablations)
    blocks = {
        cell.setting.label: json.loads((tmp_path / "out/cells" / cell.id / "summary.json").read_text())["blocking"] for cell in grid.cells
    }
    assert [blocks[name]["blocks"] for name in ("block-em", *ablations)] == [[tiny.BLOCK], [last - 1], [last]]
    cells = [tmp_path / "out/cells" / cell.id / "plain/adapter_model.safetensors" for cell in grid.cells]
    assert len({path.stat().st_ino for path in cells}) == 1
