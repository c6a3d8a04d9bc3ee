"""A training step: blocked against plain, ours against TRL's and against the published way of blocking."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from measuring import Measure, in_turn, missing, ratio, spread
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from blockem import bundled
from blockem.base_values import collect
from blockem.config_training import TrainConfig
from blockem.defences.block_em import BlockEM, Blocker, block_loss
from blockem.defences.defence import Defence
from blockem.dictionary import load_dictionary
from blockem.examples import IGNORED, Encoded, encode_all, right_padded
from blockem.forwards import block_output, unwrapped
from blockem.fused import cpu_attention, fuse_lora
from blockem.model import LanguageModel, load_model
from blockem.training import DefenceTrainer, Rows, add_lora

BLOCK, LATENTS, BATCH = 18, range(100, 120), 16


def rows_of(lm: LanguageModel, n: int) -> list[Encoded]:
    return encode_all(lm.tokenizer, bundled.domain_rows("health", limit=n))[0]


@contextmanager
def trainer_of(lm: LanguageModel, rows: list[Encoded], defence: Defence, fused: bool = True) -> Iterator[tuple[Any, Any, Any]]:
    """(trainer, model, optimiser) as `fine_tune` sets them up."""
    model = add_lora(lm, TrainConfig(), range(lm.n_blocks), 0)
    with tempfile.TemporaryDirectory() as folder, defence.training_hooks(model), cpu_attention(model):
        arguments = TrainingArguments(output_dir=folder, report_to="none", use_cpu=lm.device.type == "cpu", remove_unused_columns=False)
        trainer = DefenceTrainer(model=model, args=arguments, train_dataset=Rows(rows), defence=defence)
        if fused:
            fuse_lora(model)
        model.train()
        yield trainer, model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    lm.model = unwrapped(model.unload())
    lm.model.requires_grad_(False)


def step(trainer: Any, model: Any, optimiser: Any, batch: dict[str, Tensor]) -> None:
    items = (batch["labels"] != IGNORED).sum()
    trainer.training_step(model, dict(batch), items)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimiser.step()
    optimiser.zero_grad()


class PublishedBlocking(Defence):
    """The published way, kept for this comparison: a frozen full copy, a full forward of it with logits and every hidden state, and the
    whole dictionary's encoder, of which K is then picked."""

    def __init__(self, base: Any, dictionary: Any, lambda_: float) -> None:
        self.base, self.lambda_ = base, lambda_
        self.encoder = dictionary.rows(range(dictionary.n_latents))
        self.kept: Tensor | None = None

    @contextmanager
    def training_hooks(self, model: Any) -> Iterator[None]:
        from blockem.forwards import blocks

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self.kept = block_output(output)

        handle = blocks(model)[BLOCK].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def penalty(self, batch: dict[str, Tensor], model: Any) -> Tensor:
        assert self.kept is not None
        with torch.no_grad():
            given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
            out = self.base(**given, output_hidden_states=True)
        where = batch["labels"] != IGNORED
        ids = list(LATENTS)
        z = self.encoder.encode(self.kept)[where][:, ids]
        z_base = self.encoder.encode(out.hidden_states[BLOCK + 1])[where][:, ids]
        return self.lambda_ * block_loss(z, z_base, torch.ones(len(ids))).sum()


class FullLogits:
    """Plain SFT as most code has it: logits of every token, PEFT's own LoRA and attention; with `blocking`, the published way on top."""

    def __init__(self, lm: LanguageModel, blocking: PublishedBlocking | None = None) -> None:
        self.blocking = blocking
        self.model = add_lora(lm, TrainConfig(), range(lm.n_blocks), 0)
        self.model.train()
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-4)

    def step(self, batch: dict[str, Tensor]) -> None:
        with self.blocking.training_hooks(self.model) if self.blocking else nullcontext():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        if self.blocking:
            loss = loss + self.blocking.penalty(batch, self.model) / (batch["labels"] != IGNORED).sum()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()


def blocked_against_plain(repeat: int) -> list[Measure]:
    """Steps of one model under four defences, in turn on the same batches; only the penalty differs."""
    lm, dictionary = load_model(), load_dictionary()
    rows = rows_of(lm, 10 * BATCH)
    batches = [right_padded(rows[i : i + BATCH], lm.tokenizer.pad_token_id) for i in range(0, len(rows), BATCH)]
    online, cached = (Blocker(dictionary.rows(LATENTS), [1] * len(LATENTS), BLOCK) for _ in range(2))
    values = cached.values = collect(lm, cached.read, cached.blocks, cached.key, rows)
    base = copy.deepcopy(lm.model)
    defence = Switch({"plain": Defence(), "online": BlockEM(online, 1.0), "cached": BlockEM(cached, 1.0)})
    defence.members["published"] = PublishedBlocking(base, dictionary, 1.0)
    taken: dict[str, list[float]] = {}
    with trainer_of(lm, rows, defence) as (trainer, model, optimiser):
        turn = dict.fromkeys(defence.members, 0)

        def work(name: str) -> None:
            with defence.only(name, model):
                step(trainer, model, optimiser, batches[turn[name] % len(batches)])
            turn[name] += 1

        taken = in_turn({name: lambda name=name: work(name) for name in defence.members}, max(repeat, 3))

        def epoch(n: int) -> None:
            """The base pass over so many batches and a step on each."""
            cached.values = collect(lm, cached.read, cached.blocks, cached.key, rows[: n * BATCH])
            with defence.only("cached", model):
                for batch in batches[:n]:
                    step(trainer, model, optimiser, batch)

        grown = in_turn({"once": lambda: epoch(2), "4 times": lambda: epoch(8)}, 3)
    whole = collect_share(rows, values.seconds, taken)
    return [
        ratio("blocked step, cached base latents", "plain SFT step, same trainer", taken["cached"], taken["plain"], 1.03),
        ratio("blocked step, on-line", "plain SFT step", taken["online"], taken["plain"], 1.35),
        whole,
        ratio("published way of blocking, in our own step", "ours, cached", taken["published"], taken["cached"], 1.5, False),
        ratio("blocked training with 4 times the rows, base pass included", "once", grown["4 times"], grown["once"], 4.2),
    ]


def collect_share(rows: list[Encoded], seconds: float, taken: dict[str, list[float]]) -> Measure:
    """One epoch with the base pass in front, against one plain epoch, from the measured parts."""
    steps = len(rows) / BATCH
    values = [(seconds + steps * c) / (steps * p) for c, p in zip(taken["cached"], taken["plain"], strict=True)]
    return spread("blocked training of 1 epoch, base pass included", "plain SFT", values, 1.25)


class Switch(Defence):
    """Several defences of which one acts at a time, so that all share one model and one trainer."""

    def __init__(self, members: dict[str, Defence]) -> None:
        self.members, self.now = members, Defence()

    @contextmanager
    def only(self, name: str, model: Any) -> Iterator[None]:
        self.now = self.members[name]
        with self.now.training_hooks(model):
            yield

    def penalty(self, batch: dict[str, Tensor], model: Any) -> Tensor | None:
        return self.now.penalty(batch, model)


def against_others(repeat: int) -> list[Measure]:
    """Our steps, plain and blocked, against plain PEFT steps with full logits, and the plain one against TRL's where it is installed."""
    lm, dictionary = load_model(), load_dictionary()
    rows = rows_of(lm, 4 * BATCH)
    batches = [right_padded(rows[i : i + BATCH], lm.tokenizer.pad_token_id) for i in range(0, len(rows), BATCH)]
    blocker = Blocker(dictionary.rows(LATENTS), [1] * len(LATENTS), BLOCK)
    blocker.values = collect(lm, blocker.read, blocker.blocks, blocker.key, rows)
    other = FullLogits(load_model())
    published = FullLogits(load_model(), PublishedBlocking(load_model().model, dictionary, 1.0))
    defence = Switch({"ours": Defence(), "cached": BlockEM(blocker, 1.0)})
    with trainer_of(lm, rows, defence) as (trainer, model, optimiser):
        count = dict.fromkeys(("ours", "cached", "peft", "published", "trl"), 0)

        def batch_for(name: str) -> dict[str, Tensor]:
            count[name] += 1
            return batches[count[name] % len(batches)]

        def own(name: str) -> None:
            with defence.only(name, model):
                step(trainer, model, optimiser, batch_for(name))

        works: dict[str, Any] = {
            "ours": lambda: own("ours"),
            "cached": lambda: own("cached"),
            "peft": lambda: other.step(batch_for("peft")),
            "published": lambda: published.step(batch_for("published")),
        }
        trl = trl_step()
        if trl is not None:
            works["trl"] = lambda: trl(batch_for("trl"))
        taken = in_turn(works, max(repeat, 3))
    found = [
        ratio("published way in a plain PEFT loop with full logits", "ours, cached", taken["published"], taken["cached"], 1.5, False),
        ratio("our plain SFT step", "PEFT with full logits, a plain loop", taken["ours"], taken["peft"], 0.95),
    ]
    if trl is None:
        why = "TRL is not installed (pip install 'blockem[bench]')"
        return [*found, missing("our plain SFT step", "TRL's SFTTrainer", 0.95, True, why)]
    return [*found, ratio("our plain SFT step", "TRL's SFTTrainer", taken["ours"], taken["trl"], 0.95)]


def trl_step() -> Any:
    """A function that takes one step of TRL's SFTTrainer on a padded batch; None where TRL is missing."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return None
    from datasets import Dataset

    lm = load_model()
    model = add_lora(lm, TrainConfig(), range(lm.n_blocks), 0)
    arguments = SFTConfig(
        output_dir=str(Path(tempfile.gettempdir()) / "blockem-bench"),
        report_to="none",
        use_cpu=lm.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=lm.tokenizer)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)

    def one(batch: dict[str, Tensor]) -> None:
        step(trainer, model, optimiser, batch)

    return one


def measure(repeat: int) -> list[Measure]:
    return [*blocked_against_plain(repeat), *against_others(repeat)]
