"""Where published data for tests lies: beside the checkout, or where $BLOCKEM_SHARED_DATA says. Tests that need it skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("BLOCKEM_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")


def shared(name: str) -> Path:
    """The path of a shared file; skips the test where it is missing."""
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"published data is missing: {path} (set BLOCKEM_SHARED_DATA to its folder)")
    return path
