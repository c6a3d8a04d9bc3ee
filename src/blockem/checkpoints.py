"""A Trainer whose checkpoints are safetensors and JSON: nothing is pickled, nothing pickled is read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from blockem.defence_names import epoch_name
from blockem.model import quiet_transformers
from blockem.progress import Progress


class SafeTrainer(Trainer):
    """transformers' Trainer for a PEFT model; a subclass may keep plain values of its own in the checkpoints."""

    def __init__(self, *args: Any, progress: Progress | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Report(progress))

    def own_state(self) -> dict[str, Any]:
        """JSON-able values that a checkpoint keeps."""
        return {}

    def set_own_state(self, state: dict[str, Any]) -> None:
        """Take back what `own_state` gave."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        save_adapter(self.accelerator.unwrap_model(self.model), Path(str(folder)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        from safetensors.torch import save_file

        assert self.optimizer is not None and self.lr_scheduler is not None
        tensors, record = optimizer_state(self.optimizer, self.lr_scheduler)
        save_file(tensors, Path(output_dir) / "optimizer.safetensors")
        (Path(output_dir) / "optimizer.json").write_text(json.dumps({**record, "own": self.own_state()}), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        from safetensors.torch import load_file

        if checkpoint is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        record = json.loads((Path(checkpoint) / "optimizer.json").read_text(encoding="utf-8"))
        set_optimizer_state(self.optimizer, self.lr_scheduler, load_file(Path(checkpoint) / "optimizer.safetensors"), record)
        self.set_own_state(record["own"])

    def _save_rng_state(self, output_dir: str) -> None:
        from safetensors.torch import save_file

        name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
        save_file({"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(keys))}, Path(output_dir) / "rng.safetensors")
        version, values, gauss = random.getstate()
        record = {"numpy": [str(name), *[float(x) for x in rest]], "python": [version, list(values), gauss]}
        (Path(output_dir) / "rng.json").write_text(json.dumps(record), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        from safetensors.torch import load_file

        if checkpoint is None:
            return
        tensors = load_file(Path(checkpoint) / "rng.safetensors")
        record = json.loads((Path(checkpoint) / "rng.json").read_text(encoding="utf-8"))
        torch.set_rng_state(tensors["torch"])
        name, position, has_gauss, cached = record["numpy"]
        np.random.set_state((name, tensors["numpy"].numpy(), int(position), int(has_gauss), cached))
        version, values, gauss = record["python"]
        random.setstate((version, tuple(values), gauss))


def optimizer_state(optimizer: Any, scheduler: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an optimizer and its schedule go on from: tensors by name, and the rest, JSON-able."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    schedule = {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    groups = [{k: v for k, v in group.items() if _is_plain(v)} for group in state["param_groups"]]
    return tensors, {"groups": groups, "scalars": scalars, "schedule": schedule}


def set_optimizer_state(optimizer: Any, scheduler: Any, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Take back what `optimizer_state` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *record["scalars"].items()]:
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})
    scheduler.load_state_dict(record["schedule"])


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return not isinstance(value, list) or all(item is not None for item in value)


class _Report(TrainerCallback):
    """Forwards steps to our progress line."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.progress(state.global_step, state.max_steps)


class KeepEpochs(TrainerCallback):
    """Saves the adapter as `folder/epoch-1`, `folder/epoch-2`, … where whole epochs end.

    At the epoch's last step rather than at its end: a checkpoint of that step is written later, so that a run which goes on from there
    lacks no epoch.

    Args:
        finish: done to each folder before it counts (a defence's projection).
    """

    def __init__(self, folder: Path, finish: Callable[[Path], None]) -> None:
        self.folder, self.finish = folder, finish

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        steps = state.max_steps // round(args.num_train_epochs)
        if state.global_step % steps or not state.is_world_process_zero:
            return
        target = epoch_folder(self.folder, state.global_step // steps)
        scratch = target.with_name(f".{target.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        save_adapter(model, scratch)
        self.finish(scratch)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)


def epoch_folder(adapter: Path, epoch: int) -> Path:
    """Where the adapter stands as it was after so many epochs, counted from 1."""
    return adapter / epoch_name(epoch)


def save_adapter(model: Any, folder: Path) -> None:
    """A PEFT folder (safetensors) that plain `PeftModel.from_pretrained` loads."""
    with quiet_transformers():
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole (its trainer_state.json is written last)."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            found.append(path)
        except (OSError, json.JSONDecodeError):
            continue
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)
