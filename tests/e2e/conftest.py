"""One small real run, done once by whichever test process needs it first, that the others copy, look at and go on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from small import blockem, write_recipe


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def recipe(common: Path) -> Path:
    path = common / "small" / "small.yaml"
    with FileLock(common / "small.lock"):
        return path if path.is_file() else write_recipe(path.parent)


@pytest.fixture(scope="session")
def finished(recipe: Path, common: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; a copy of this process's own."""
    whole = common / "whole"
    with FileLock(common / "whole.lock"):
        if not (common / "whole.done").is_file():
            done = blockem("run", recipe, "--out", whole, "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == json.loads((whole / "summary.json").read_text())
            (common / "whole.done").touch()
    out = tmp_path_factory.mktemp("runs") / "whole"
    shutil.copytree(whole, out)
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
