"""One small real run, done once, that the end-to-end tests look at, copy and go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small import blockem, write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = blockem("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "summary.json").read_text())
    return out


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was before its blocked training."""
    out = tmp_path / "begun"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "blocked")
    for name in ("steps/blocked.json", "blocked-latents.json", "summary.json", "report.html"):
        (out / name).unlink()
    return out
