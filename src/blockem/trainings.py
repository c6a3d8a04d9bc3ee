"""One training of a run, from file to file, and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from blockem import bundled
from blockem.defence_names import epoch_name
from blockem.session import Session, taken_file, task_key, timed
from blockem.several_blocks import block_folder
from blockem.store import claim_scratch, content_key, scratch_of, write_jsonl

if TYPE_CHECKING:
    from blockem.config_training import TrainConfig
    from blockem.examples import Example

Make = Callable[[Session, Sequence[Any]], tuple[Any, dict[str, Any]]]


def sft_step(session: Session) -> dict[str, Any]:
    """Plain fine-tuning: the misaligned model."""
    return train_step(session, "plain", content_key("plain"), _plain_defence)


def _plain_defence(session: Session, rows: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    from blockem.defences.defence import Defence

    return Defence(), {}


def train_step(
    session: Session,
    name: str,
    extra_key: str,
    make: Make,
    train: TrainConfig | None = None,
    rewrite: Callable[[list[Example]], list[Example]] | None = None,
    keep_epochs: bool = False,
) -> dict[str, Any]:
    """One training, from the recipe's rows to the adapter in the folder `name` and its log; done once for all that it depends on.

    Args:
        extra_key: what it depends on besides model, data, training settings and seed.
        make: the defence and the facts of its step record, from the encoded rows.
        train: training settings, where they are not the recipe's own.
        rewrite: a defence's first slot, where it fills it.
        keep_epochs: keep the adapter of each epoch in `name/epoch-1`, …
    """
    recipe = session.recipe
    recipe.data.check_training_rows()
    train = train or recipe.train
    if recipe.defence.epochs is not None and name != "plain":
        train = replace(train, epochs=recipe.defence.epochs)
    key = content_key(name, session.model_key, session.data_key, asdict(train), recipe.seed, extra_key)

    def work() -> dict[str, Any]:
        from blockem.examples import encode_all
        from blockem.training import fine_tune

        examples = bundled.training_rows(recipe.data.domain, recipe.data.train, recipe.data.rows, recipe.seed)
        if rewrite is not None:
            examples = rewrite(examples)
        rows, report = encode_all(session.lm.tokenizer, examples, recipe.data.max_tokens)
        if report.dropped:
            session.console.say(f"  {len(report.dropped)} rows have nothing to learn from and were dropped, first: {report.dropped[0]}")
        claim_scratch(scratch_of(session.run / name), key)
        defence, facts = make(session, rows)
        session.console.start(f"{name}: steps")
        log = fine_tune(session.lm, rows, train, defence, session.run / name, recipe.seed, session.console.bar, keep_epochs)
        write_jsonl(session.run / f"training-{name}.jsonl", log)
        return {"data": asdict(report), "task": task_key(session), **facts}

    kept = [f"{name}/{epoch_name(epoch)}/adapter_model.safetensors" for epoch in range(1, int(train.epochs) + 1)] if keep_epochs else []
    made = [f"{name}/adapter_model.safetensors", f"training-{name}.jsonl", *kept]
    sets = [str((block_folder(session, sae) / taken_file(name)).relative_to(session.run.path)) for sae in recipe.sae.each]
    return timed(session, name, key, made, work, sealed=[*made, *sets])
