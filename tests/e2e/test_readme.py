"""The README's Python examples, run as they stand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from small import command

ROOT = Path(__file__).parents[2]


def test_the_readme_examples_work_as_written(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        script = tmp_path / f"example{number}.py"
        script.write_text(example, encoding="utf-8")
        done = subprocess.run([command()[0], str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
