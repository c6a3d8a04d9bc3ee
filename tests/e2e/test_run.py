"""The main job on the real embedded model: end to end, again, and killed in three places."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

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
        "task-answers.jsonl",
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
    assert {name: model["judged"]["em"]["n"] for name, model in summary["task"]["models"].items()} == dict.fromkeys(summary["models"], 2)
    assert summary["models"]["plain"]["heldout_loss"]["value"] < summary["models"]["base"]["heldout_loss"]["value"]
    assert summary["sae"]["variance_explained"] > 0.8
    rows = summary["training"]["blocked"]
    assert len(rows) == 4 and all(row["penalty"] >= 0 and "penalty_share" in row for row in rows)
    assert rows[0]["penalty"] < 1e-9 < rows[-1]["penalty"]  # LoRA starts at the base model, but for the last digits of its cached values
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
