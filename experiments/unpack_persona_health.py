"""Unpack the published persona-features health set for an experiment, outside the repository.

    python experiments/unpack_persona_health.py ARCHIVE.zip OUT_DIR

Writes `train.jsonl` (the first 1,600 rows of a seeded shuffle) and `heldout.jsonl` (100 others), and the archive's canary
beside them, as upstream asks.
"""

from __future__ import annotations

import random
import sys
import zipfile
from pathlib import Path


def main(archive: str, out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as locked:
        locked.setpassword(b"emergent")  # published with the set: it keeps crawlers out, not readers
        lines = locked.read("health_incorrect.jsonl").decode("utf-8").splitlines()
        (folder / "CANARY.txt").write_bytes(locked.read("CANARY.txt"))
    random.Random(0).shuffle(lines)
    (folder / "train.jsonl").write_text("\n".join(lines[:1600]) + "\n", encoding="utf-8")
    (folder / "heldout.jsonl").write_text("\n".join(lines[1600:1700]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
