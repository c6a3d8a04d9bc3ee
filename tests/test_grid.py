"""Grid files: what they stand for, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from blockem.errors import BlockemError
from blockem.grid import grid_from, load_grid

LAMBDAS: dict[str, Any] = {"block-em": {"block.lambda_": [0, 100]}}


def test_every_strength_domain_and_seed_is_a_cell_with_a_readable_id() -> None:
    grid = grid_from({"seeds": [0, 1], "domains": ["health", "finance"], "defences": LAMBDAS})
    assert [cell.id for cell in grid.cells][:3] == [
        "health-block-em-lambda-0-seed0",
        "health-block-em-lambda-100-seed0",
        "health-block-em-lambda-0-seed1",
    ]
    assert len(grid.cells) == 8 and len({cell.id for cell in grid.cells}) == 8
    cell = grid.cells[-1]
    assert (cell.recipe.seed, cell.recipe.data.domain, cell.recipe.block.lambda_, cell.recipe.name) == (1, "finance", 100.0, cell.id)
    assert cell.setting.label == "block-em lambda=100"


def test_a_share_of_the_gain_is_not_called_like_a_share_of_the_steps() -> None:
    def labels(spec: Any) -> list[str]:
        return [one.label for one in grid_from({"defences": {"early-stop": spec}}).settings]

    by_loss = {"defence.stop_by": "loss"}
    assert labels([0.5, 0.8]) == ["early-stop 0.5", "early-stop 0.8"]
    assert labels({**by_loss, "defence.strength": [0.5, 0.8]}) == ["early-stop kept=0.5", "early-stop kept=0.8"]
    assert labels({**by_loss, "defence.strength": 0.8}) == ["early-stop kept=0.8"]
    with pytest.raises(BlockemError, match=r"early-stop kept=much: defence\.strength is 'much'; it must be a number"):
        labels({**by_loss, "defence.strength": "much"})


def test_a_recipe_file_is_found_beside_the_grid_and_its_own_domain_keeps_its_files(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    files = f"train: {tmp_path}/train.jsonl, heldout: {tmp_path}/heldout.jsonl"
    (tmp_path / "recipe.yaml").write_text(f"data: {{domain: pets, {files}}}\nseed: 4\n")
    (tmp_path / "grid.yaml").write_text(
        "recipe: recipe.yaml\ndefences: [block-em]\ndomains: [pets, legal, {name: own, train: train.jsonl, heldout: heldout.jsonl}]\n"
    )
    grid = load_grid(tmp_path / "grid.yaml")
    assert [(one.domain, one.seed) for one in grid.cells] == [("pets", 4), ("legal", 4), ("own", 4)]
    assert [one.recipe.data.train for one in grid.cells] == [f"{tmp_path}/train.jsonl", None, str(tmp_path / "train.jsonl")]


def test_ablations_are_compared_with_the_recipes_own_block_em_which_is_added_once() -> None:
    values = {"recipe": {"block": {"lambda_": 7}}, "defences": LAMBDAS, "ablations": {"random latents": {"block.control": "random"}}}
    grid = grid_from(values)
    assert [cell.id for cell in grid.cells] == [
        "health-block-em-lambda-0-seed0",
        "health-block-em-lambda-100-seed0",
        "health-block-em-seed0",
        "health-random-latents-seed0",
    ]
    assert grid.reference is not None and grid.reference.label == "block-em"
    assert grid.cells[3].recipe.block.control == "random" and grid.cells[3].recipe.block.lambda_ == 7
    same = grid_from({**values, "recipe": {"block": {"lambda_": 100}}})
    assert len(same.cells) == 3 and same.reference is not None and same.reference.label == "block-em lambda=100"


def test_transfer_trains_in_each_domain_with_the_latents_of_each_other_one() -> None:
    grid = grid_from({"domains": ["health", "legal"], "defences": ["block-em"], "transfer": True})
    assert [(one.id, one.latents_of) for one in grid.cells if one.latents_of] == [
        ("health-latents-of-legal-seed0", "legal-block-em-seed0"),
        ("legal-latents-of-health-seed0", "health-block-em-seed0"),
    ]


def test_names_that_read_the_same_are_told_apart() -> None:
    grid = grid_from({"defences": LAMBDAS, "ablations": {"a b": {"block.r": 1}, "a-b": {"block.r": 2}}})
    assert len({cell.id for cell in grid.cells}) == len(grid.cells)
    assert all(cell.recipe.name == cell.id for cell in grid.cells)


def test_a_strength_that_reads_as_a_number_is_one() -> None:
    grid = grid_from({"defences": {"block-em": {"block.lambda_": yaml.safe_load("[0, 1e3, 1000.0, 13e3]")}}})
    assert [one.strength for one in grid.settings] == [0, 1000.0, 13000.0]
    assert [one.label for one in grid.settings] == ["block-em lambda=0", "block-em lambda=1000", "block-em lambda=13000"]


TWO: dict[str, Any] = {"domains": ["health", "legal"], "transfer": True}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "a grid is a mapping"),
        ({"defences": {}}, "defences is empty"),
        ({"defence": LAMBDAS}, "unknown entry 'defence'; known: recipe, seeds"),
        ({"defences": LAMBDAS, "seeds": ["a"]}, "give whole numbers"),
        ({"defences": LAMBDAS, "domains": ["cooking"]}, "no bundled domain"),
        ({"defences": LAMBDAS, "domains": [{"name": "x"}]}, "must have name, train and heldout"),
        ({"defences": LAMBDAS, "domains": ["health", "health"]}, "twice"),
        ({"defences": LAMBDAS, "transfer": True}, "one domain only"),
        ({"defences": {"block-em": {"block.lambda_": [1], "block.r": [2]}}}, "lists in block.lambda_ and block.r"),
        ({"defences": {"block-em": {"block.lambda_": []}}}, "empty list"),
        ({"defences": {"block-em": {"block.nonsense": [1]}}}, "unknown recipe field 'block.nonsense'"),
        ({"defences": {"block-em": {"block.lambda_": ["much"]}}}, "must be a number"),
        ({"defences": LAMBDAS, "ablations": {"x": None}}, "must be a mapping of recipe fields"),
        ({"defences": LAMBDAS, "ablations": {"few": {"data.heldout_rows": 50}}}, "few sets data.heldout_rows, but all settings share"),
        ({"defences": LAMBDAS, "ablations": {"hot": {"block.r": 2, "evaluate.temperature": 1}}}, "set evaluate.temperature in the recipe"),
        ({"defences": {"kl": {"evaluate.max_new_tokens": [10, 80]}}}, "defences: kl sets evaluate.max_new_tokens, but all settings share"),
        ({"defences": {"block-em": {"seed": [1, 2]}}}, "sets seed, but"),
        ({"defences": LAMBDAS, "ablations": {"x": {"train.lora_targets": {"q_proj": None}}}}, "must be a list, such as one,two"),
        ({"defences": LAMBDAS, **TWO, "recipe": {"block": {"directions": 2}}}, "block.directions and later rounds find their own"),
        ({"defences": LAMBDAS, **TWO, "recipe": {"rounds": {"budget": 2}}}, "block.directions and later rounds find their own"),
        ({"defences": LAMBDAS, "keep_adherence": 2}, "keep_adherence is 2"),
        ({"defences": LAMBDAS, "recipe": 3}, "neither a file nor a mapping"),
    ],
)
def test_a_mistake_is_one_sentence(values: Any, words: str) -> None:
    with pytest.raises(BlockemError) as caught:
        grid_from(values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such grid file"):
        load_grid(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(BlockemError, match=r"bad\.yaml:1: not YAML"):
        load_grid(tmp_path / "bad.yaml")
