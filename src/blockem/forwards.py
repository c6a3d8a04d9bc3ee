"""Forwards of a transformer that run only the blocks they need.

A block is named by its index from 0 and always means its *output*: the residual stream after `layers[block]`
(BLOCK-EM's "layer 20" of Llama-3.1-8B is block 19).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blockem.errors import BlockemError

if TYPE_CHECKING:
    from blockem.model import LanguageModel


def base_weights(model: nn.Module) -> Any:
    """A context in which every adapter is off; does nothing for a model that has none."""
    wrapper: Any = model
    return wrapper.disable_adapter() if hasattr(wrapper, "disable_adapter") else nullcontext()


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper (its layers still carry the adapters)."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model that may be in training is looked at without dropout; it is left as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks, in order.

    Raises:
        BlockemError: the architecture has no list of `num_hidden_layers` blocks.
    """
    owner, name = block_list(model)
    found: nn.ModuleList = getattr(owner, name)
    return found


def block_list(model: nn.Module) -> tuple[nn.Module, str]:
    inner = unwrapped(model)
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    for owner in inner.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return owner, name
    raise BlockemError(f"cannot find the {config.num_hidden_layers} blocks of a {type(inner).__name__}")


def decoder(model: nn.Module) -> Any:
    """The stack without its output head: embeddings, blocks, final norm."""
    inner = unwrapped(model)
    found = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return found if found is not None else getattr(inner, inner.base_model_prefix)


def block_output(output: Any) -> Tensor:
    """A block's hidden states `[rows, tokens, d_model]`, whether the block returns them alone or in a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def only_blocks(model: nn.Module, start: int, stop: int) -> Iterator[None]:
    """Inside the context the model consists of blocks `start` to `stop - 1` alone. Not for concurrent use."""
    owner, name = block_list(model)
    full: nn.ModuleList = getattr(owner, name)
    config: Any = getattr(owner, "config", None)
    kinds = getattr(config, "layer_types", None)  # which blocks attend through a window: looked up by place in the list
    setattr(owner, name, nn.ModuleList(list(full)[start:stop]))
    if kinds is not None:
        config.layer_types = kinds[start:stop]
    try:
        yield
    finally:
        setattr(owner, name, full)
        if kinds is not None:
            config.layer_types = kinds


def keep_blocks(model: nn.Module, n: int) -> None:
    """Cut the model down to its first `n` blocks for good."""
    owner, name = block_list(model)
    config = unwrapped(model).config
    setattr(owner, name, nn.ModuleList(list(getattr(owner, name))[:n]))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n]
    config.num_hidden_layers = n


@contextmanager
def capture(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of a block, one tensor `[rows, tokens, d_model]` a call, by a forward hook."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(block_output(output)))
    try:
        yield seen
    finally:
        handle.remove()


@dataclass
class Seen:
    """What watched modules put out in the latest forward *with gradient*, for a penalty that is computed after it.

    Attributes:
        how: what to call to watch, for the message to who did not.
        model: the watched model while one is watched.
    """

    how: str
    model: nn.Module | None = None
    _outputs: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        """Watch modules of `model`, by keys of the caller's, while the context lasts."""

        def watcher(key: int) -> Callable[[nn.Module, Any, Any], None]:
            def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if torch.is_grad_enabled():
                    self._outputs[key] = output if isinstance(output, Tensor) else output[0]

            return watch

        handles = [module.register_forward_hook(watcher(key)) for key, module in modules.items()]
        self.model = model
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.model, self._outputs = None, {}

    def take(self) -> tuple[nn.Module, dict[int, Tensor]]:
        """The watched model and its modules' outputs `[rows, tokens, d_model]` by key, once for each forward.

        Raises:
            RuntimeError: there was no forward since.
        """
        if self.model is None or not self._outputs:
            raise RuntimeError(f"no forward was watched: call model(**batch) with gradients inside {self.how} first")
        found, self._outputs = self._outputs, {}
        return self.model, found


def hidden_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, block: int, positions: Tensor | None = None) -> Tensor:
    """The output of `block`, `[rows, tokens, d_model]`, running no block after it and no output head."""
    return hidden_at_each(model, input_ids, attention_mask, [block], positions)[block]


def hidden_at_each(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Sequence[int], positions: Tensor | None = None
) -> dict[int, Tensor]:
    """The outputs of several blocks, `[rows, tokens, d_model]` each, in one forward that stops after the highest of them.

    Args:
        positions: `[rows, tokens]`; None: in order.
    """
    listed = blocks(model)
    with ExitStack() as stack:
        seen = {block: stack.enter_context(capture(listed[block])) for block in sorted(set(wanted))}
        stack.enter_context(only_blocks(model, 0, max(wanted) + 1))
        decoder(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **placed(positions))
    return {block: outputs[0] for block, outputs in seen.items()}


def placed(positions: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a forward whose tokens stand at `positions [rows, tokens]`; None: in order."""
    return {} if positions is None else {"position_ids": positions}


def from_hidden(model: nn.Module, hidden: Tensor, attention_mask: Tensor, block: int, positions: Tensor | None = None) -> Tensor:
    """The final normed hidden states, computed from the output of `block` by the blocks after it alone.

    Exact for architectures that feed `inputs_embeds` straight to their blocks (`supports_from_hidden` tells).
    """
    total = len(blocks(model))
    with only_blocks(model, block + 1, total):
        output = decoder(model)(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False, **placed(positions))
    found: Tensor = output.last_hidden_state
    return found


def supports_from_hidden(lm: LanguageModel, block: int) -> bool:
    """Whether `from_hidden` gives this architecture's own result; measured on a few tokens, not assumed."""
    ids = torch.arange(5, 21, device=lm.device)[None]
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        whole = decoder(lm.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        parts = from_hidden(lm.model, hidden_at(lm.model, ids, mask, block), mask, block).float()
    return bool((whole - parts).norm() <= 0.01 * whole.norm())
