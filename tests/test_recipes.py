"""The recipes that come with the project: each can be read as it stands, and the published one says what the paper says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blockem.config import load_recipe
from blockem.grid import load_grid

ROOT = Path(__file__).parents[1]
GRIDS = [path for path in (ROOT / "experiments").glob("*.yaml") if "recipe:" in path.read_text(encoding="utf-8")]
RECIPES = [path for folder in ("recipes", "experiments") for path in (ROOT / folder).glob("*.yaml") if path not in GRIDS]


@pytest.mark.parametrize("path", sorted(RECIPES), ids=lambda path: path.stem)
def test_a_recipe_can_be_read(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("path", sorted(GRIDS), ids=lambda path: path.stem)
def test_a_grid_can_be_read(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path.parent, tmp_path / "experiments")
    (tmp_path / "experiments/persona").mkdir()  # published rows, which are not in the repository
    for name in ("train", "heldout"):
        (tmp_path / f"experiments/persona/{name}.jsonl").write_text("{}\n", encoding="utf-8")
    assert load_grid(tmp_path / "experiments" / path.name).cells


def test_the_published_recipe_is_the_papers() -> None:
    recipe = load_recipe(ROOT / "recipes" / "llama-3.1-8b-goodfire.yaml")
    train, discover, block = recipe.train, recipe.discover, recipe.block
    assert (recipe.sae.block, train.lora_r, train.lr, train.batch_size, train.epochs, recipe.data.rows) == (19, 16, 7.5e-5, 64, 1.0, 5900)
    assert (discover.effects, discover.tokens, discover.pool, discover.keep, discover.size) == (("judged", "judged"), "prompt", 250, 80, 20)
    assert (discover.alpha_induce, discover.alpha_repair, discover.budget, discover.budget_slack) == (0.7, 0.4, 0.1, None)
    assert discover.strengths == pytest.approx([0.05 * i for i in range(1, 16)])
    assert (block.lambda_, block.measure, block.tokens, block.freeze_downstream) == (13000, "latent", "completion", True)
