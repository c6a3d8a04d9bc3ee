"""The blocked training of a run, from file to file: what it depends on, what follows the plain fine-tune, its ablations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_defend import recipe, session  # noqa: F401 - fixtures

from blockem import Blocker, bundled
from blockem.blocking import block_step
from blockem.defences.block_em import matched_lambda, penalty_of
from blockem.defences.defence import Defence
from blockem.defend import defend_step
from blockem.discovery.discover import write_candidates
from blockem.discovery.screen import Candidate
from blockem.errors import BlockemError
from blockem.examples import encode_all
from blockem.reemergence.monitor import Reading
from blockem.session import Session
from blockem.store import read_json, write_tensors
from blockem.training import fine_tune


def with_block(session: Session, **changes: Any) -> Session:  # noqa: F811
    """The session with other settings of blocking, sharing what is loaded."""
    other = replace(session, recipe=replace(session.recipe, block=replace(session.recipe.block, rule_rows=4, **changes)))
    other.__dict__.update({name: session.__dict__[name] for name in ("lm", "dictionary")})
    return other


def test_what_follows_the_plain_fine_tune_trains_again_for_another_one(session: Session, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "elsewhere" / "plain"
    fine_tune(session.lm, tiny.encoded(session.lm), tiny.train_config(epochs=3), Defence(), other)
    adapter = session.run / "blocked" / "adapter_model.safetensors"
    for changes, again in (({}, False), ({"ceiling": 0.5}, True), ({"monitor_every": 2}, True)):
        given = with_block(session, lambda_=5.0, **changes)
        first, stamp = block_step(given), adapter.stat().st_mtime_ns
        second = block_step(given, misaligned=other)
        assert (adapter.stat().st_mtime_ns != stamp, first["p_mis"] != second["p_mis"]) == (again, again)


def test_a_floor_reads_the_log_beside_the_plain_fine_tune(session: Session, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "elsewhere" / "plain"
    shutil.copytree(session.run / "plain", other)
    floor = with_block(session, floor=0.9)
    with pytest.raises(BlockemError, match=r"elsewhere.training-plain\.jsonl: no such file; block\.floor compares"):
        block_step(floor, misaligned=other)
    (session.run / "training-plain.jsonl").rename(other.parent / "training-plain.jsonl")
    assert block_step(floor, misaligned=other)["target"] == {"floor": 0.9}


def test_p_mis_grows_with_what_is_blocked(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(Reading, "rerouted", property(lambda _self: True))
    pairs = session.run / "selection.jsonl"
    pairs.write_text("".join(json.dumps(p.__dict__) + "\n" for p in tiny.pairs()))
    session.recipe = session.recipe.with_values({"data.pairs": str(pairs)})
    growing = with_block(session, ceiling=0.5, monitor_every=1, grow=2)
    found = block_step(growing)
    new = [one for row in found["grown"] for one in row["latents"]]
    assert new and found["n_latents"] == 4
    lm, rows = session.lm, sample_rows(session)
    lm.add_adapter(session.run / "plain", "plain")
    ids, signs = zip(*[(3, 1), (7, -1), (11, 1), (19, -1), *new], strict=True)
    whole = penalty_of(lm, "plain", Blocker(session.dictionary.rows(ids), signs, tiny.BLOCK), rows)
    lm.drop_adapters()
    assert found["p_mis_grown"] == pytest.approx(whole, rel=1e-3) and whole > found["p_mis"]


def sample_rows(session: Session) -> list[Any]:  # noqa: F811
    """The training rows on which the rule measures."""
    data = session.recipe.data
    examples = bundled.training_rows(data.domain, data.train, data.rows, session.recipe.seed)
    return list(encode_all(session.lm.tokenizer, examples, data.max_tokens)[0])[:4]


def test_random_latents_weigh_what_the_set_does(session: Session, tmp_path: Path) -> None:  # noqa: F811
    write_candidates(session.run / "latents.csv", [])
    write_tensors(session.run / "deltas.safetensors", {"frequency": torch.linspace(0.1, 0.9, tiny.N_LATENTS)})
    own = block_step(with_block(session, lambda_=0.02))
    kept = (session.run / "blocked-latents.json").read_bytes()
    drawn = with_block(session, lambda_=0.02, control="random")
    found = block_step(drawn)
    assert own["lambda"] == 0.02 and found["p_mis_matched"] == pytest.approx(own["p_mis"]) and found["p_mis"] != own["p_mis"]
    assert found["lambda"] * found["p_mis"] == pytest.approx(0.02 * own["p_mis"], rel=5e-3)  # λ has three digits
    assert (session.run / "blocked-latents.json").read_bytes() == kept and not (session.run / "-latents.json").exists()
    by_rule = block_step(with_block(session, control="random"))
    assert "p_mis_matched" not in by_rule and by_rule["rule"] == "r · ΔSFT / P_mis"
    (session.run / "plain" / "adapter_model.safetensors").unlink()
    assert block_step(drawn)["lambda"] == 0.02  # nothing to weigh with
    with pytest.raises(BlockemError, match="no λ makes them weigh"):
        matched_lambda(1.0, 0.5, 0.0)
    assert matched_lambda(0.0, 0.5, 0.0) == 0.0


def test_block_em_trains_under_its_ablations(session: Session) -> None:  # noqa: F811
    table = [Candidate(k, 1 if k % 2 else -1, (1 if k % 2 else -1) * k / 10, fate="candidate") for k in (1, 4, 9, 20)]
    found = {}
    for changes in ({}, {"select": "top-delta", "size": 2, "signs": "shuffled", "two_sided": True, "tokens": "all"}):
        write_candidates(session.run / "latents.csv", table)
        result = defend_step(with_block(session, **changes))
        found[len(changes)] = read_json(session.run / "blocked-latents.json")["latents"], result
        assert result["lambda"] > 0 and result["n_latents"] == len(found[len(changes)][0])
    assert [one["latent"] for one in found[0][0]] == [3, 7, 11, 19]
    assert [one["latent"] for one in found[5][0]] == [20, 9]
    log = [json.loads(line) for line in (session.run / "training-blocked.jsonl").read_text().splitlines()]
    # base values are computed in other batches than the training's: equal to the last digits, and on some processors to the bit
    assert log[0]["penalty"] < 1e-12 and log[-1]["penalty"] > 1e-9
