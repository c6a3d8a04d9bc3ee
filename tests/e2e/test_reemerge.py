"""`blockem reemerge` on the real embedded model: two epochs of a few steps, from a run folder, and again."""

from __future__ import annotations

import json
from pathlib import Path

from small import blockem

SMALL = (
    "--set",
    "reemerge.epochs=2",
    "--set",
    "reemerge.prompts=2",
    "--set",
    "reemerge.patch_pairs=6",
    "--set",
    "reemerge.patch_blocks=6,18,24",
    "--set",
    "reemerge.decode_prompts=2",
    "--set",
    "reemerge.decode_tokens=4",
    "--set",
    "reemerge.decode_blocks=18",
)


def test_a_run_is_taken_further_and_the_same_command_redoes_nothing(begun: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    done = blockem("reemerge", begun, "--out", out, *SMALL, "--json", timeout=1500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((out / "reemergence.json").read_text())
    assert [one["name"] for one in found["hypotheses"]] == ["H1", "H2", "H3"]
    assert [row["model"] for row in found["models"]][:4] == ["base", "plain", "epoch1", "epoch2"]
    assert found["drift"]["base"]["variance_explained"]["value"] > 0.8
    assert [one["block"] for one in found["patching"]["reemerged"]["blocks"]] == [6, 18, 24]
    for name in ("blocked/epoch-1", "blocked/epoch-2"):
        assert (out / name / "adapter_model.safetensors").stat().st_size > 0
    assert "<svg" in (out / "reemergence.html").read_text()
    assert not [p.name for p in out.rglob("*") if ".making" in p.name or p.suffix in (".pt", ".bin", ".pth")]
    again = blockem("reemerge", begun, "--out", out, *SMALL, timeout=600)
    assert again.returncode == 0, again.stderr
    for step in ("blocked", "patching-reemerged", "decoding", "drift", "evaluate"):
        assert f"{step}: already done, reused" in again.stderr
    assert "H1" in again.stdout and "Page: " in again.stdout


def test_bad_input_is_one_sentence(finished: Path, tmp_path: Path) -> None:
    for words, sentence in (
        ((tmp_path, "--out", tmp_path / "x"), "is no run folder"),
        ((finished, "--out", finished), "choose another --out"),
        ((finished, "--out", tmp_path / "x", "--set", "reemerge.epochs"), "write it as stage.field=value"),
        ((tmp_path / "none.yaml", "--out", tmp_path / "x"), "no such recipe"),
    ):
        done = blockem("reemerge", *words)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
