"""LoRA fine-tuning: a thin `transformers.Trainer` subclass that adds a defence's penalty to the SFT loss.

Loss and penalty are sums over supervised tokens divided by the supervised tokens of the *whole optimiser step*, so that neither
accumulation nor the number of devices changes what λ means. Checkpoints are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainingArguments

from blockem.checkpoints import KeepEpochs, SafeTrainer, last_checkpoint, save_adapter
from blockem.config_training import TrainConfig
from blockem.defences.defence import Defence
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded, right_padded
from blockem.forwards import block_list, blocks, unwrapped
from blockem.fused import cpu_attention, fuse_lora
from blockem.head import supervised_logprobs, watch_final
from blockem.model import LanguageModel, quiet_transformers
from blockem.progress import Progress
from blockem.store import scratch_of


class Rows(torch.utils.data.Dataset[Encoded]):
    """Encoded rows as a dataset."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class DefenceTrainer(SafeTrainer):
    """SFT loss + penalty. Everything else is the Trainer's own."""

    def __init__(self, *args: Any, defence: Defence, probe_every: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defence = defence
        self.probe_every = probe_every
        self.loss_is_scaled_for_ga = True  # divided by the whole step's tokens below
        self.model_accepts_loss_kwargs = True  # asks the Trainer to count those tokens
        self._sums: dict[str, float] = {}  # since the last log row
        self._step: dict[str, float] = {}  # since the last optimiser step
        self._counted_steps = 0
        self._probed = -1
        if defence.adapts:
            self.add_callback(_Adapt(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        items = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum()
        sft, outputs = self._sft_sum(model, inputs, labels)
        sft = sft / items
        penalty = self.defence.penalty(inputs, model)
        if penalty is not None:
            penalty = penalty / items
            self._probe(sft, penalty, model)
            self._add("weighted", penalty)
        self._add("sft_loss", sft)
        for name, value in self.defence.measured().items():
            self._add(name, value / items)
        loss = sft if penalty is None else sft + penalty
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; items were counted over all processes
        return (loss, outputs) if return_outputs else loss

    def _sft_sum(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Any]:
        """Cross-entropy summed over supervised tokens. The forward goes through the wrapper, so that DDP sees it."""
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # the head's weights may be sharded outside the forward
            outputs = model(**given)
            logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), outputs
        inner = self.accelerator.unwrap_model(model)
        with watch_final(inner) as seen:
            last = torch.tensor([labels.shape[1] - 1], device=labels.device)  # the integer 1 makes torch copy the whole head, row by row
            outputs = model(**given, logits_to_keep=last)
        logprobs, _ = supervised_logprobs(inner, seen[0], labels)
        return -logprobs.sum(), outputs

    def _add(self, name: str, value: Tensor) -> None:
        number = float(value.detach())
        for sums in (self._sums, self._step):
            sums[name] = sums.get(name, 0.0) + number

    def step_done(self) -> None:
        """Tell the defence what this optimiser step measured, over all processes; λ may follow it."""
        step = self._over_processes(self._step)
        self._step = {}
        self.defence.adapt({"step": float(self.state.global_step), **step})

    def _probe(self, sft: Tensor, penalty: Tensor, model: nn.Module) -> None:
        """Norms of both gradients by themselves, on the first micro-batch of every `probe_every`-th step (two more backward passes)."""
        step = self.state.global_step
        if not self.probe_every or step % self.probe_every or step == self._probed or not model.training:
            return
        self._probed = step
        weights = [p for p in model.parameters() if p.requires_grad]
        for name, part in (("grad_norm_sft", sft), ("grad_norm_penalty", penalty)):
            gradients = torch.autograd.grad(part, weights, retain_graph=True, allow_unused=True)
            self._sums[name] = math.sqrt(sum(float(g.float().pow(2).sum()) for g in gradients if g is not None))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            steps = max(1, self.state.global_step - self._counted_steps)
            self._counted_steps = self.state.global_step
            norms = {name: value for name, value in self._sums.items() if name.startswith("grad_norm")}
            logs.update({name: value / steps for name, value in self._over_processes(self._sums).items()}, **norms)
            weighted = logs.pop("weighted", None)
            logs["loss"] = logs["sft_loss"] + (weighted or 0.0)  # the Trainer's own forgets the steps before a resume
            numbers = self.defence.logs()
            logs.update(numbers)
            for name, whole in (("penalty", "p_mis"), ("anchor", "anchor_reference")):
                if name in logs and numbers.get(whole):
                    logs[f"{name}_share"] = logs[name] / numbers[whole]
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def own_state(self) -> dict[str, Any]:
        return {"sums": self._sums, "counted_steps": self._counted_steps, "defence": self.defence.state()}

    def set_own_state(self, state: dict[str, Any]) -> None:
        self._sums, self._counted_steps = state["sums"], state["counted_steps"]
        self.defence.set_state(state["defence"])

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """Each process holds its own share of the step's losses, divided by the tokens of all where the Trainer counts those."""
        names = sorted(name for name in sums if not name.startswith("grad_norm"))
        if self.accelerator.num_processes == 1:
            return {name: sums[name] for name in names}
        shares = torch.tensor([sums[name] for name in names], device=self.args.device)
        how = "sum" if self.args.average_tokens_across_devices else "mean"
        return dict(zip(names, self.accelerator.reduce(shares, reduction=how).tolist(), strict=True))


class _Adapt(TrainerCallback):
    """After each optimiser step, before a checkpoint is written."""

    def __init__(self, trainer: DefenceTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_done()
        if self.trainer.defence.finished:
            end_here(control)


def end_here(control: Any) -> None:
    """End the training after this step, with a row in the log; no checkpoint is left there, from which a resumed run would go too far."""
    control.should_training_stop, control.should_log, control.should_save = True, True, False


class _StopAt(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            end_here(control)


def add_lora(lm: LanguageModel, config: TrainConfig, trained: range, seed: int) -> Any:
    """Wrap the base model in fresh LoRA layers on every linear map of the `trained` blocks; B starts at 0, so nothing changes yet."""
    from peft import LoraConfig, get_peft_model

    linear = {name.split(".")[-1] for block in blocks(lm.model) for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    targets = sorted(linear) if not config.lora_targets else sorted(config.lora_targets)
    missing = set(targets) - linear
    if missing:
        raise BlockemError(
            f"train.lora_targets names {', '.join(sorted(missing))}, but the blocks of {lm.id} have {', '.join(sorted(linear))}"
        )
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=list(trained),
        layers_pattern=block_list(lm.model)[1],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm.model, settings)
    model.peft_config["default"].base_model_name_or_path = lm.id
    return model


def fine_tune(
    lm: LanguageModel,
    rows: Sequence[Encoded],
    config: TrainConfig,
    defence: Defence,
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    keep_epochs: bool = False,
) -> list[dict[str, Any]]:
    """Train a LoRA adapter on `rows` under `defence` and write it to `out`; the base model is left as it was.

    Checkpoints go to `out.making`; a killed run goes on from the last whole one and ends with the same adapter. Returns the training
    log: a row every `log_every` steps with step, loss, sft_loss, learning_rate, grad_norm and, where there is a penalty, penalty (per
    token), penalty_share (of P_mis) and both gradient norms. With `keep_epochs` the adapter as it was after each of a whole number of
    epochs stays in `out/epoch-1`, `out/epoch-2`, …
    """
    if keep_epochs and config.epochs != round(config.epochs):
        raise BlockemError(f"train.epochs is {config.epochs}; to keep the adapter of each epoch it must be a whole number")
    scratch = scratch_of(out)
    finished = scratch / "adapter"
    lm.drop_adapters()
    random.seed(seed)
    np.random.seed(seed)
    device = lm.device
    steps = config.steps(len(rows))
    try:
        arguments = TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=config.micro_batch,
            gradient_accumulation_steps=max(1, config.batch_size // config.micro_batch),
            num_train_epochs=config.epochs,
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=math.ceil(config.warmup * steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            logging_steps=min(config.log_every, steps),
            save_strategy="steps",
            save_steps=config.checkpoint_every,
            save_total_limit=1,
            report_to=config.report_to,
            seed=seed,
            data_seed=seed,
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            optim="adamw_torch",
        )
    except ValueError as error:
        raise BlockemError(f"the training settings do not work: {error}") from error
    model = add_lora(lm, config, defence.trained_blocks(lm.n_blocks), seed)
    pad = lm.tokenizer.pad_token_id
    try:
        with quiet_transformers(), defence.training_hooks(model), cpu_attention(model):
            try:
                trainer = DefenceTrainer(
                    model=model,
                    args=arguments,
                    train_dataset=Rows(rows),
                    data_collator=lambda batch: right_padded(batch, pad),
                    progress=progress,
                    defence=defence,
                    probe_every=config.probe_every,
                )
            except (ImportError, RuntimeError, ValueError) as error:  # an unknown reporter, or one that is not installed
                said = f"the training settings do not work (train.report_to is {config.report_to}): {error}"
                raise BlockemError(" ".join(said.split())) from error
            if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # those may shard a layer's weights apart from its forward
                fuse_lora(model)
            if config.stop_after < 1:
                trainer.add_callback(_StopAt(max(1, round(config.stop_after * steps))))
            if keep_epochs:
                trainer.add_callback(KeepEpochs(finished, defence.project))
            checkpoint = last_checkpoint(scratch)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        model.eval()
        if trainer.is_world_process_zero():  # of several processes the first alone writes
            save_adapter(model, finished)
            defence.project(finished)
            shutil.rmtree(out, ignore_errors=True)
            finished.rename(out)
            shutil.rmtree(scratch, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    finally:
        lm.model = unwrapped(model.unload())
        lm.model.eval()
    return [row for row in trainer.state.log_history if "loss" in row]
