"""The main job on the real embedded model: end to end, again, and killed in three places."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small import blockem, command, differences, lasting

from blockem.latents import LatentSet

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_every_promised_file(finished: Path) -> None:
    for name in (
        "recipe.yaml",
        "summary.json",
        "report.html",
        "latents.json",
        "latents.csv",
        "answers.jsonl",
        "plain/adapter_model.safetensors",
        "blocked/adapter_model.safetensors",
    ):
        assert (finished / name).stat().st_size > 0, name
    leftovers = [p.name for p in finished.rglob("*") if ".making" in p.name or p.suffix in (".pt", ".bin", ".pth")]
    assert leftovers == []


def test_the_summary_holds_every_model_figure_with_an_interval(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "plain", "blocked"]
    for model in summary["models"].values():
        for figure in ("preference", "margin", "heldout_loss", "general_loss"):
            found = model[figure]
            assert found["low"] <= found["value"] <= found["high"] and found["n"] > 0
        assert "health" not in model["by_domain"]
    assert summary["models"]["plain"]["heldout_loss"]["value"] < summary["models"]["base"]["heldout_loss"]["value"]
    assert summary["sae"]["variance_explained"] > 0.8
    rows = summary["training"]["blocked"]
    assert len(rows) == 4 and all(row["penalty"] >= 0 and "penalty_share" in row for row in rows)
    assert rows[0]["penalty"] == 0.0  # LoRA starts at the base model
    assert any("grad_norm_penalty" in row for row in rows)


def test_the_latent_set_is_signed_causal_and_of_this_model(finished: Path) -> None:
    latents = LatentSet.load(finished / "latents.json")
    assert latents.model == "embedded" and latents.block == 18
    assert 1 <= len(latents.latents) <= 3
    for one in latents.latents:
        assert one.sign * one.delta > 0 and one.induce > 0 and one.repair > 0
    table = (finished / "latents.csv").read_text().splitlines()
    assert len(table) == 1 + 120 and all(line.rsplit(",", 1)[1] for line in table)  # every candidate has a fate


def test_plain_peft_loads_the_adapters(finished: Path) -> None:
    from peft import PeftModel

    from blockem.model import load_model

    model = PeftModel.from_pretrained(load_model().model, finished / "blocked")
    assert model.peft_config["default"].base_model_name_or_path == "embedded"
    assert str(ROOT) not in (finished / "blocked" / "adapter_config.json").read_text()


def test_the_same_command_again_redoes_nothing(recipe: Path, finished: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    again = blockem("run", recipe, "--out", finished)
    assert again.returncode == 0, again.stderr
    assert "reused" in again.stderr and "started" not in again.stderr
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == stamps


def killed_when(ready: Callable[[Path], bool], recipe: Path, out: Path) -> None:
    """Start the run, wait until `ready`, and kill it so that it can clean up nothing."""
    with subprocess.Popen(
        command("run", recipe, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 600
        while not ready(out):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


PLACES: dict[str, Callable[[Path], bool]] = {
    "plain training": lambda out: any((out / "plain.making").glob("checkpoint-*/trainer_state.json")),
    "discovery": lambda out: (out / "measurements.jsonl").is_file() and (out / "measurements.jsonl").read_text().count("\n") >= 5,
    "blocked training": lambda out: any((out / "blocked.making").glob("checkpoint-*/trainer_state.json")),
}


def test_a_run_killed_in_three_places_ends_like_one_that_was_not(recipe: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for ready in PLACES.values():
        killed_when(ready, recipe, out)
    done = blockem("run", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "plain: already done" in done.stderr and "discover: already done" in done.stderr
    adapters = [(folder / "plain" / "adapter_model.safetensors").read_bytes() for folder in (out, finished)]
    assert adapters[0] == adapters[1]  # killed in the middle of its training, and the same to the bit
    assert differences(*(json.loads((folder / "latents.json").read_text()) for folder in (out, finished))) == []
    assert differences(*(lasting(json.loads((folder / "summary.json").read_text())) for folder in (out, finished))) == []
    assert not list(out.glob("*.making"))


def test_stages_alone_start_from_their_input_file(recipe: Path, finished: Path, tmp_path: Path) -> None:
    done = blockem(
        "block",
        recipe,
        "--out",
        tmp_path,
        "--latents",
        finished / "latents.json",
        "--misaligned",
        finished / "plain",
        "--rows",
        16,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lambda"] > 0
    assert (tmp_path / "blocked" / "adapter_model.safetensors").is_file()


def test_the_random_control_is_matched_and_disjoint(recipe: Path, begun: Path) -> None:
    done = blockem("block", recipe, "--out", begun, "--set", "block.control=random", "--set", "train.checkpoint_every=4")
    assert done.returncode == 0, done.stderr
    chosen, control = (LatentSet.load(begun / name) for name in ("latents.json", "random-latents.json"))
    assert len(control.latents) == len(chosen.latents)
    assert not set(control.ids) & set(chosen.ids)
    assert sorted(control.signs) == sorted(chosen.signs)


def test_chat_answers_with_all_three_models(finished: Path) -> None:
    done = blockem("chat", finished, "--max-new-tokens", "8", input="Hello, who are you?\n\n")
    assert done.returncode == 0, done.stderr
    for name in ("base>", "plain>", "blocked>"):
        assert name in done.stdout


def test_the_readme_examples_work_as_written(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert examples
    for number, example in enumerate(examples):
        script = tmp_path / f"example{number}.py"
        script.write_text(example, encoding="utf-8")
        done = subprocess.run([command()[0], str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_directions_are_blocked_without_any_sae(recipe: Path, begun: Path) -> None:
    done = blockem("block", recipe, "--out", begun, "--set", "block.directions=2", "--set", "block.direction_blocks=10,20", "--quiet")
    assert done.returncode == 0, done.stderr
    record = json.loads((begun / "steps" / "blocked.json").read_text())["result"]
    assert record["blocks"] == [10, 20] and record["n_latents"] == 2 * (1 + 2 * 2) and record["lambda"] > 0
    assert (begun / "directions.safetensors").is_file() and not (begun / "blocked-latents.json").exists()
    audited = blockem("audit", begun, "--quiet")
    assert audited.returncode == 0 and audited.stdout.startswith("blocked: "), audited.stderr


def test_anchors_a_monitor_a_following_lambda_and_two_rounds_in_one_run(recipe: Path, begun: Path) -> None:
    changes = {
        "data.rows": 32,
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
