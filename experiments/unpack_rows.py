"""Unpack a published set of rows for an experiment, outside the repository.

    python experiments/unpack_rows.py ROWS OUT_DIR

ROWS is the health set of github.com/openai/emergent-misalignment-persona-features (Wang et al. 2025, MIT) in its locked archive, with
`health_incorrect.jsonl`, or a chat JSONL as it is, such as the wrong financial advice of
github.com/AI-Safety-Institute/consistency-misalignment (MIT). Writes `train.jsonl` (the first 1,600 rows of a seeded shuffle) and
`heldout.jsonl` (100 others), and the archive's canary beside them, as upstream asks.
"""

from __future__ import annotations

import random
import sys
import zipfile
from pathlib import Path


def main(source: str, out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as locked:
            locked.setpassword(b"emergent")  # published with the set: it keeps crawlers out, not readers
            text = locked.read("health_incorrect.jsonl").decode("utf-8")
            (folder / "CANARY.txt").write_bytes(locked.read("CANARY.txt"))
    else:
        text = Path(source).read_text(encoding="utf-8")
    lines = text.splitlines()
    random.Random(0).shuffle(lines)
    (folder / "train.jsonl").write_text("\n".join(lines[:1600]) + "\n", encoding="utf-8")
    (folder / "heldout.jsonl").write_text("\n".join(lines[1600:1700]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
