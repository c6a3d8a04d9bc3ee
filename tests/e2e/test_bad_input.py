"""Bad input: one sentence that says what, where and what to do, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small import blockem, command, write_recipe

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'


def refused(*words: object, says: str, code: int = 2) -> None:
    done = blockem(*words)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    spoken = [line for line in done.stderr.splitlines() if line.startswith("blockem:")]
    assert len(spoken) == 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD * 4, encoding="utf-8")
    return path


def test_missing_file(tmp_path: Path) -> None:
    refused("sft", "--data", "nowhere.jsonl", "--heldout", "nowhere.jsonl", "--out", tmp_path / "run", says="nowhere.jsonl: no such file")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "{not json\n", "data.jsonl:2: not JSON"),
        ("", "holds no rows"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "no row has an assistant turn"),
        ('{"text": "Hi"}\n', 'data.jsonl:1: no "messages" list'),
        ('{"messages": [{"role": "robot", "content": "Hi"}]}\n', "unknown role 'robot'"),
    ],
)
def test_bad_data(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    refused("sft", "--data", path, "--heldout", path, "--out", out, says=says)
    assert not list(out.glob("*.yaml")) and not list(out.glob("plain*"))


def test_own_data_needs_own_heldout_rows(data: Path, tmp_path: Path) -> None:
    refused("sft", "--data", data, "--out", tmp_path / "run", says="--heldout")


def test_unknown_model(tmp_path: Path) -> None:
    refused("sft", "--model", "no-such-model", "--out", tmp_path / "run", says="unknown model 'no-such-model'")


def test_model_hub_out_of_reach(tmp_path: Path) -> None:
    refused("sft", "--model", "nobody/no-such-model", "--out", tmp_path / "run", says="nobody/no-such-model")


def test_block_out_of_range(tmp_path: Path) -> None:
    refused("demo", "--set", "sae.block=99", "--out", tmp_path / "run", says="block 99 is out of range")


def test_unknown_recipe_field(tmp_path: Path) -> None:
    refused("demo", "--set", "train.learning=1", "--out", tmp_path / "run", says="unknown recipe field 'train.learning'")


def test_wrong_recipe_value(tmp_path: Path) -> None:
    refused("demo", "--set", "train.lr=fast", "--out", tmp_path / "run", says="train.lr is 'fast'; it must be a number")


def test_no_recipe(tmp_path: Path) -> None:
    refused("run", tmp_path / "none.yaml", says="no such recipe")


def test_no_adapter_yet(tmp_path: Path) -> None:
    refused("discover", "--out", tmp_path / "run", says="holds no trained adapter")


def test_report_of_no_run(tmp_path: Path) -> None:
    refused("report", tmp_path, says="is no run folder")


def test_sae_of_the_wrong_width(tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    StandardSAE(StandardSAEConfig(d_in=32, d_sae=64)).save_model(tmp_path / "sae")
    refused("sae", "check", tmp_path / "sae", says="reads 32 values but the residual stream of embedded has 576")


def test_sae_of_another_block_does_not_fit() -> None:
    refused("sae", "check", "bundled", "--block", 29, "--tokens", 2000, says="at block 29")


def test_no_such_sae() -> None:
    refused("sae", "check", "nothing-here", says="no SAE 'nothing-here'")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model": "other/model", "revision": "main"}, "was made for other/model"), ({"sae_digest": "0" * 16}, "was made with SAE")],
)
def test_latent_set_of_another_model_or_sae(tmp_path: Path, data: Path, change: dict[str, str], says: str) -> None:
    from blockem.dictionary import load_dictionary
    from blockem.model import identify

    row = {
        "format": 1,
        "model": "embedded",
        "revision": identify("embedded"),
        "sae": "bundled",
        "sae_digest": load_dictionary().digest,
        "block": 18,
        "latents": [{"latent": 1, "sign": 1}],
        **change,
    }
    path = tmp_path / "latents.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    refused("block", "--data", data, "--heldout", data, "--latents", path, "--lambda", 1, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run" / "blocked").exists()


def test_latents_file_that_is_none(tmp_path: Path, data: Path) -> None:
    refused("block", "--data", data, "--heldout", data, "--latents", data, "--lambda", 1, "--out", tmp_path / "run", says="not a")


def test_a_run_folder_in_use_is_left_alone(tmp_path: Path, data: Path) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused("sft", "--data", data, "--heldout", data, "--out", out, says="in use by another blockem run")


def test_ctrl_c_ends_with_130_and_the_run_goes_on_later(tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path)
    with subprocess.Popen(
        command("sft", recipe, "--out", out),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job is started with it ignored
    ) as process:
        while not any((out / "plain.making").glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=120) == 130
    assert "interrupted" in said and "Traceback" not in said
    assert not (out / "plain").exists()
    again = blockem("sft", recipe, "--out", out)
    assert again.returncode == 0 and (out / "plain" / "adapter_model.safetensors").is_file()


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("a small file system needs the right to mount one; the same path is tested by injection in test_store.py")
    try:
        recipe = write_recipe(tmp_path)
        (disk / "filler").write_bytes(b"x" * 40_000)
        done = blockem("sft", recipe, "--rows", 16, "--out", disk / "run")
        assert done.returncode == 2, done.stderr
        assert "disk is full" in done.stderr and "Traceback" not in done.stderr
        assert not (disk / "run" / "plain").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_help_teaches_and_imports_nothing_heavy() -> None:
    done = blockem("--help")
    for name in ("demo", "run", "sft", "discover", "block", "evaluate", "report", "sae", "data", "chat", "doctor"):
        assert name in done.stdout
    imported = subprocess.run([command()[0], "-X", "importtime", "-c", "import blockem.cli"], capture_output=True, text=True, check=True)
    assert "torch" not in imported.stderr and "transformers" not in imported.stderr


def test_doctor_and_data_check_print_json() -> None:
    found = json.loads(blockem("doctor", "--json").stdout)
    assert found["missing"] == [] and found["packages"]["torch"]
    counted = json.loads(blockem("data", "check", "--domain", "auto", "--json").stdout)
    assert counted["rows"] == counted["kept"] >= 1000 and counted["duplicates"] == 0
    assert "⟦" in blockem("data", "check", "--domain", "auto").stdout
