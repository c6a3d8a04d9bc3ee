"""Recipes: defaults stand in one place, YAML goes round, and a mistake is one sentence that names the field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from blockem import config, config_training
from blockem.config import Recipe, dump_recipe, field_paths, load_recipe, recipe_from
from blockem.config_training import TrainConfig
from blockem.errors import BlockemError
from blockem.recipes import DEMO, demo_recipe


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_the_defaults_go_through_yaml_and_back(tmp_path: Path) -> None:
    recipe = Recipe()
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_changed_values_go_through_yaml_and_back(tmp_path: Path) -> None:
    recipe = Recipe().with_values(
        {"name": "naïve", "data.rows": 7, "block.lambda_": 1e-9, "discover.strengths": [0.1, 0.25], "train.lora_targets": ["q_proj"]}
    )
    assert load(tmp_path, dump_recipe(recipe)) == recipe


def test_an_empty_recipe_and_an_empty_stage_keep_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Recipe()
    assert load(tmp_path, "train:\nseed: 3\n") == dataclasses.replace(Recipe(), seed=3)


def test_a_recipe_is_frozen_and_with_values_copies() -> None:
    recipe = Recipe()
    changed = recipe.with_values({"train.lr": 1e-5})
    assert changed.train.lr == 1e-5
    assert recipe == Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "typed", "value"),
    [
        ("seed", "3", 3),
        ("seed", "1e2", 100),
        ("train.lr", "2e-4", 2e-4),
        ("train.lr", "1", 1.0),
        ("sae.allow_poor_fit", "yes", True),
        ("sae.allow_poor_fit", "False", False),
        ("data.rows", "none", None),
        ("data.rows", "12", 12),
        ("block.lambda_", "null", None),
        ("block.lambda_", "13e3", 13000.0),
        ("discover.strengths", "0.2,0.4", (0.2, 0.4)),
        ("train.lora_targets", "", ()),
        ("train.lora_targets", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("model.id", "123", "123"),
    ],
)
def test_values_may_be_as_typed_on_a_command_line(path: str, typed: str, value: Any) -> None:
    recipe: Any = Recipe().with_values({path: typed})
    for part in path.split("."):
        recipe = getattr(recipe, part)
    assert recipe == value
    assert type(recipe) is type(value)


@pytest.mark.parametrize("path", ["train.learning_rate", "train", "trian.lr", "train.lr.x", "lr", ""])
def test_an_unknown_field_lists_the_known_ones(path: str) -> None:
    with pytest.raises(BlockemError, match=r"unknown recipe field .*known( there: lora_r, |: name, seed, model, )"):
        Recipe().with_values({path: 1})


@pytest.mark.parametrize(
    ("path", "guess"),
    [("block.lambda", "lambda_"), ("train.lrr", "lr"), ("trian.lr", "train.lr"), ("seeds", "seed"), ("train.learning_rate", "")],
)
def test_a_near_miss_is_guessed(path: str, guess: str) -> None:
    with pytest.raises(BlockemError) as raised:
        Recipe().with_values({path: 1})
    assert (f"(did you mean {guess}?)" in str(raised.value)) == bool(guess)
    assert len(str(raised.value)) < 700


def test_a_recipe_file_is_named_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    for text, said in (
        ("train: {lr: fast}", r"r\.yaml: train\.lr is 'fast'; it must be a number"),
        ("name: x\ntrain: [1", r"r\.yaml:2: not YAML"),
        ("blok: {}", r"r\.yaml: recipe: unknown field 'blok' \(did you mean block\?\)"),
        ("sae: {more: 24}", r"r\.yaml: sae\.more is 24; it must be a list, such as one,two"),
    ):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(BlockemError, match=said):
            load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train:\n  learning_rate: 1", "recipe: unknown field 'train.learning_rate'; known here: lora_r"),
        ("trian: 3", "recipe: unknown field 'trian' .did you mean train..; known here: name, seed, model"),
        ("7: 3", "recipe: unknown field '7'"),
        ("train: 3", "recipe: train must be a mapping of fields"),
        ("- 1", "recipe: the file must be a mapping of fields"),
        ("seed: x", "seed is 'x'; it must be a whole number"),
        ("seed: 1.5", "seed is 1.5; it must be a whole number"),
        ("seed: true", "seed is True; it must be a whole number"),
        ("seed: .nan", "seed is nan; it must be a whole number"),
        ("seed: .inf", "seed is inf; it must be a whole number"),
        ("train:\n  lr: fast", "train.lr is 'fast'; it must be a number"),
        ("train:\n  lr: true", "train.lr is True; it must be a number"),
        ("sae:\n  allow_poor_fit: 2", "sae.allow_poor_fit is 2; it must be true or false"),
        ("model:\n  id: [a]", r"model.id is \['a'\]; it must be text"),
        ("discover:\n  strengths: 3", "discover.strengths is 3; it must be a list, such as 0.2,0.4"),
        ("discover:\n  strengths: [x]", "discover.strengths is 'x'; it must be a number"),
        ("a: [", "not YAML"),
        ("name: 2024-99-99", "not YAML .month must be in 1..12."),
        ("name: !!int x", "not YAML"),
        ("name: !!timestamp x", "not YAML"),
        ("name: " + "[" * 1000, "not YAML"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_that_names_the_field(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.rows": 0}, "data.rows is 0; it must be positive"),
        ({"data.max_tokens": 8}, "data.max_tokens is 8; it must be at least 16"),
        ({"data.train": "mine.jsonl"}, "data.heldout must be too"),
        ({"sae.block": -1}, "sae.block is -1; blocks are counted from 0"),
        ({"train.lr": 0}, "train.lr and train.epochs must be positive"),
        ({"train.lr": "nan"}, "train.lr and train.epochs must be positive"),
        ({"train.batch_size": 10, "train.micro_batch": 4}, r"train.batch_size \(10\) must be a multiple of train.micro_batch \(4\)"),
        ({"train.lora_r": 0}, "train.lora_r is 0; it must be positive"),
        ({"discover.tokens": "all"}, "discover.tokens is 'all'; use prompt or answer"),
        ({"discover.effect": "vibes"}, "discover.effect is 'vibes'"),
        ({"discover.strengths": ""}, "discover.strengths needs at least one positive number"),
        ({"discover.budget": 10}, "discover.budget is 10.0; it is a share between 0 and 1"),
        ({"block.lambda_": -1}, "block.lambda_ is -1.0; it must not be negative"),
        ({"block.lambda_": "nan"}, "block.lambda_ is nan"),
        ({"block.measure": "z"}, "block.measure is 'z'; use latent or preactivation"),
        ({"block.control": "shuffled"}, "block.control is 'shuffled'"),
        ({"block.floor": 0.9, "anchor.watch": "answers", "anchor.interleave": 0.3}, "block.floor compares each step's loss"),
        ({"evaluate.resamples": 10}, "evaluate.resamples is 10; use at least 100"),
        ({"evaluate.judge": "https://me:hunter2@judge.example/v1"}, "evaluate.judge holds a user name or a password"),
        ({"seed": -1}, "seed is -1; use a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296; use a whole number from 0"),
        ({"model.dtype": "int4"}, "model.dtype is 'int4'; use one of auto, bfloat16"),
        ({"sae.min_variance_explained": 60}, "sae.min_variance_explained is 60.0; it is a share"),
        ({"train.weight_decay": -1}, "train.weight_decay is -1.0; it must not be negative"),
        ({"train.max_grad_norm": -1}, "train.max_grad_norm is -1.0; it must not be negative"),
        ({"train.schedule": "warmup_stable_decay"}, "train.schedule is 'warmup_stable_decay'; use one of linear, cosine"),
        ({"discover.prescreen": -3}, "discover.prescreen is -3; use 0 for all"),
        ({"discover.rule": "weakest"}, "discover.rule is 'weakest'; use best or strongest"),
        ({"discover.rule": "strongest", "discover.halving": True}, "which discover.rule=strongest does not ask"),
        ({"defence.stop_by": "time"}, "defence.stop_by is 'time'; use steps or loss"),
        ({"discover.max_new_tokens": 0}, "discover.max_new_tokens is 0; it must be positive"),
        ({"block.r": -5}, "block.r is -5.0; it must be positive"),
        ({"block.rule_rows": 0}, "block.rule_rows is 0; it must be positive"),
        ({"evaluate.judge_reply_tokens": 0}, "evaluate.judge_reply_tokens is 0; it must be positive"),
        ({"evaluate.task_answers": -1}, "evaluate.task_answers is -1; use 0 for none"),
        ({"evaluate.general_rows": 0}, "evaluate.general_rows is 0; it must be positive"),
    ],
)
def test_a_value_out_of_range_is_refused_at_construction(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BlockemError, match=sentence):
        Recipe().with_values(changes)


def test_no_number_of_a_recipe_may_be_infinite_or_none(tmp_path: Path) -> None:
    """Each float of every stage, also in a list; the sentence names the field."""
    stages = {name: kind for name, kind in typing.get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
    floats = [
        f"{stage}.{name}" for stage, kind in stages.items() for name, hint in typing.get_type_hints(kind).items() if "float" in str(hint)
    ]
    assert {"train.epochs", "block.lambda_", "discover.alpha_repair", "discover.strengths", "defence.epochs"} <= set(floats)
    for path in floats:
        for value in ("nan", "inf"):
            changes = {path: value, "defence.name": "kl"} if path == "defence.strength" else {path: value}
            with pytest.raises(BlockemError, match=re.escape(path)):
                Recipe().with_values(changes)
    with pytest.raises(BlockemError, match="more_incoherence is nan"):
        config.CompareConfig(more_incoherence=math.nan)


@pytest.mark.parametrize("schedule", config_training.SCHEDULES)
def test_the_trainer_knows_each_schedule_that_a_recipe_may_name(schedule: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=Recipe().with_values({"train.schedule": schedule}).train.lr)
    assert get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=4).get_last_lr()


@pytest.mark.parametrize(
    "judge",
    [
        "HTTP://me:hunter2@judge.example/v1",
        " https://me:hunter2@judge.example/v1",
        "hTTps://hunter2@judge.example/v1\n",
        "//me:hunter2@judge.example/v1",
        "http:/me:hunter2@judge.example/v1",
        "me:hunter2@judge.example",
        "ht\ntp://me:hunter2@judge.example/v1",
        "ftp://hunter2/v1",
        "https://judge.example/v1?key=hunter2",
    ],
)
def test_a_judge_that_may_hold_a_password_is_refused_and_not_repeated(tmp_path: Path, judge: str) -> None:
    with pytest.raises(BlockemError, match=r"evaluate\.judge|base URL") as caught:
        Recipe().with_values({"evaluate.judge": judge})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(BlockemError) as caught:
        load(tmp_path, dump_recipe(Recipe()).replace("judge: local", f"judge: {json.dumps(judge)}"))
    assert "hunter2" not in str(caught.value)


def test_a_judges_address_is_kept_in_one_spelling() -> None:
    assert Recipe().with_values({"evaluate.judge": " HTTPS://judge.example/V1 "}).evaluate.judge == "https://judge.example/V1"
    assert [Recipe().with_values({"evaluate.judge": name}).evaluate.judge for name in ("local", "none", "my/judge")] == [
        "local",
        "none",
        "my/judge",
    ]


def test_a_missing_recipe_and_a_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(BlockemError, match="cannot be read"):
        load_recipe(tmp_path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    with pytest.raises(BlockemError, match="not YAML"):
        load(tmp_path, "name: !!python/object/apply:os.getcwd []")


def test_every_field_can_be_set_by_its_path() -> None:
    paths = field_paths()
    assert {"name", "seed", "model.id", "train.lr", "block.lambda_", "evaluate.temperature"} <= set(paths)
    tree = Recipe().to_dict()
    for path in paths:
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        Recipe().with_values({path: value})


def test_every_default_stands_in_the_dataclasses_and_is_what_they_say() -> None:
    assert recipe_from({}) == Recipe()
    assert TrainConfig() == Recipe().train
    for kind in typing.get_type_hints(Recipe).values():
        if dataclasses.is_dataclass(kind):
            assert all(
                f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING for f in dataclasses.fields(kind)
            )


def test_every_stage_and_every_string_field_is_documented() -> None:
    trees = [ast.parse(inspect.getsource(module)) for module in (config, config_training)]
    stages = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    assert all(ast.get_docstring(stage) for stage in stages)
    for stage in (one for one in stages if one.name != "Recipe"):
        body = stage.body
        for place, node in enumerate(body):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("str") and node.target.id != "schedule":  # type: ignore[union-attr]
                after = body[place + 1] if place + 1 < len(body) else None
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), f"{stage.name}.{ast.unparse(node.target)}"


def test_the_demo_recipe_is_written_once_and_then_belongs_to_the_user(tmp_path: Path) -> None:
    path = demo_recipe(tmp_path)
    assert path.read_text(encoding="utf-8") == DEMO
    assert load_recipe(path).name == "demo"
    path.write_text("seed: 5\n", encoding="utf-8")
    assert load_recipe(demo_recipe(tmp_path)).seed == 5


def test_every_field_name_is_the_same_word_in_yaml() -> None:
    """YAML reads some words, such as on, as something else than text."""
    import yaml

    for path in field_paths():
        for name in path.split("."):
            assert yaml.safe_load(f"{name}: 1") == {name: 1}, path


def test_the_demos_recipe_is_one(tmp_path: Path) -> None:
    recipe = load_recipe(demo_recipe(tmp_path))
    assert recipe.data.rows == 600 and recipe.anchor.watch == "answers"


def test_fields_that_came_later_do_not_change_keys_at_their_default() -> None:
    from blockem.config_values import keyed

    whole = Recipe().to_dict()
    later = {"sae": ["more"], "discover": ["group", "rule"], "defence": ["stop_by"], "anchor": ["interleave", "interleaved", "cued"]}
    for section, name in ((section, name) for section, names in later.items() for name in names):
        del whole[section][name]
    assert keyed(Recipe()) == whole
    changed = Recipe().with_values({"sae.more": "x@3", "anchor.interleave": 0.2})
    assert keyed(changed)["sae"]["more"] == ["x@3"] and keyed(changed)["anchor"]["interleave"] == 0.2
