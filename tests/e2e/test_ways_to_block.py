"""Other ways to block, on the run that the end-to-end tests share: directions, anchors, a monitor, a λ that follows, rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import blockem


def test_directions_are_blocked_without_any_sae(recipe: Path, begun: Path) -> None:
    done = blockem("block", recipe, "--out", begun, "--set", "block.directions=2", "--set", "block.direction_blocks=10,20", "--quiet")
    assert done.returncode == 0, done.stderr
    record = json.loads((begun / "steps" / "blocked.json").read_text())["result"]
    assert record["blocks"] == [10, 20] and record["n_latents"] == 2 * (1 + 2) and record["lambda"] > 0
    assert (begun / "directions.safetensors").is_file() and not (begun / "blocked-latents.json").exists()
    audited = blockem("audit", begun, "--quiet")
    assert audited.returncode == 0 and audited.stdout.startswith("blocked: "), audited.stderr


def test_anchors_a_monitor_a_following_lambda_and_two_rounds_in_one_run(recipe: Path, begun: Path) -> None:
    changes = {
        "data.rows": 16,
        "rounds.budget": 2,
        "rounds.target": 0,
        "anchor.watch": "answers",
        "anchor.cost": "healthy",
        "anchor.share": 1,
        "anchor.max_new_tokens": 4,
        "block.monitor_every": 1,
        "block.ceiling": 0.01,
        "discover.prescreen": 5,
        "discover.pairs": 6,
        "evaluate.answers": "false",
    }
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    done = blockem("run", recipe, "--out", begun, "--json", *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    names = [row["name"] for row in summary["rounds"]["rounds"]]
    assert names[0] == "blocked" and summary["rounds"]["last"] == names[-1] == summary["main"]
    for name in names:
        assert name in summary["models"] and (begun / name / "adapter_model.safetensors").is_file()
        rows = summary["training"][name]
        assert all({"anchor", "anchor_lambda", "penalty", "lambda", "monitor_survives"} <= row.keys() for row in rows)
        assert rows[0]["anchor"] == pytest.approx(0.0, abs=0.01)  # in bfloat16, in units of what plain would pay
        assert len({row["lambda"] for row in rows}) > 1  # it follows
    assert 'id="rounds"' in (begun / "report.html").read_text(encoding="utf-8")
    again = blockem("run", recipe, "--out", begun, *words)
    assert again.returncode == 0 and "started" not in again.stderr, again.stderr
