"""Decoding as one stream of rows: (prompt, edit, limit) rows fill a batch of slots, and a finished row makes room for the next.

Blocks up to the edited one are the same for all rows with the same prompt, whatever their edit: over the prompt they run once, and only
the blocks above run once a row. Without edits the whole prompt is shared.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blockem.forwards import blocks, capture, decoder, only_blocks, unwrapped
from blockem.head import next_logits
from blockem.model import LanguageModel
from blockem.packing import packed_weights
from blockem.slots import SlotCache, causal_mask, slot_attention, step_mask
from blockem.steering import add_at_block

CACHE_BYTES = 4 << 30
PROMPT_TOKENS = 4096
"""Prompts run in batches of at most so many tokens, padding included."""
WORTH_PACKING = 1024
"""Tokens to generate from which on laying the weights out anew pays."""
RUN = 128
"""Logits in one run of `largest`; vocabularies that it does not divide take the plain way."""


@dataclass(frozen=True)
class Row:
    """One answer to be generated.

    Attributes:
        ids: the prompt.
        limit: most new tokens.
        edit: `[d_model]`, added at the output of the stream's block at every position; None adds nothing.
    """

    ids: tuple[int, ...]
    limit: int
    edit: Tensor | None = None

    @property
    def span(self) -> int:
        return len(self.ids) + self.limit


@dataclass
class _Running:
    """A row in a slot: its place in the input, the tokens so far, and when sampling its own random numbers."""

    index: int
    row: Row
    tokens: list[int]
    draws: list[float]


@dataclass(frozen=True)
class _Prompt:
    """What all rows with one prompt share: keys and values `[blocks, groups, tokens, width]`, hidden states `[tokens, d_model]`."""

    keys: Tensor
    values: Tensor
    hidden: Tensor


class Slots:
    """The batch: a cache of slots, the edit of each, and the model run over prompts and over single steps; inside `slot_attention`."""

    def __init__(self, lm: LanguageModel, block: int, slots: int, capacity: int) -> None:
        self.lm, self.block = lm, block
        self.decoder = decoder(lm.model)
        self.dtype: torch.dtype = lm.model.get_input_embeddings().weight.dtype
        self.cache = SlotCache(lm.n_blocks, slots, capacity)
        self.edits = torch.zeros(slots, lm.d_model, dtype=self.dtype, device=lm.device)
        self.edited = False
        self.prompts: dict[tuple[int, ...], _Prompt] = {}

    def read(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Run the shared blocks over prompts not met yet."""
        for some in _pieces([ids for ids in dict.fromkeys(prompts) if ids not in self.prompts]):
            width = max(map(len, some))
            ids = torch.tensor([[*one, *one[:1] * (width - len(one))] for one in some], device=self.lm.device)
            watched = blocks(self.lm.model)[self.block]
            with only_blocks(self.lm.model, 0, self.block + 1), capture(watched) as seen:
                self._run(width, input_ids=ids)
            keys, values = self.cache.take_fresh()
            for j, one in enumerate(some):
                n = len(one)
                self.prompts[one] = _Prompt(keys[:, j, :, :n].clone(), values[:, j, :, :n].clone(), seen[0][j, :n].clone())

    def enter(self, rows: Sequence[Row], slots: Sequence[int]) -> Tensor:
        """Put rows into slots; returns the final hidden states at their prompts' ends, `[rows, d_model]`."""
        self.read([row.ids for row in rows])
        ends: list[Tensor] = []
        for some in _pieces([row.ids for row in rows]):
            chosen = range(sum(map(len, ends)), sum(map(len, ends)) + len(some))
            ends.append(self._enter([rows[i] for i in chosen], [slots[i] for i in chosen]))
        return torch.cat(ends)

    def _enter(self, rows: list[Row], slots: list[int]) -> Tensor:
        above = self.block + 1
        shared = [self.prompts[row.ids] for row in rows]
        for row, slot, prompt in zip(rows, slots, shared, strict=True):
            self.cache.place(slot, 0, prompt.keys, prompt.values)
            self.edits[slot] = 0 if row.edit is None else row.edit.to(self.edits)
            self.edited = self.edited or row.edit is not None
        last_only = above == self.lm.n_blocks
        width = 1 if last_only else max(len(row.ids) for row in rows)
        hidden = torch.zeros(len(rows), width, self.lm.d_model, dtype=self.dtype, device=self.lm.device)
        for j, prompt in enumerate(shared):
            own = prompt.hidden[-1:] if last_only else prompt.hidden
            hidden[j, : len(own)] = own + self.edits[slots[j]]
        with only_blocks(self.lm.model, above, self.lm.n_blocks):
            final = self._run(width, inputs_embeds=hidden)
        if last_only:
            return final[:, 0]
        keys, values = self.cache.take_fresh()
        for j, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            n = len(row.ids)
            self.cache.place(slot, above, keys[:, j, :, :n], values[:, j, :, :n])
        return final[torch.arange(len(rows)), [len(row.ids) - 1 for row in rows]]

    def _run(self, width: int, **given: Tensor) -> Tensor:
        """The blocks that `only_blocks` left, over prompts padded on the right to `width`."""
        device = self.lm.device
        final: Tensor = self.decoder(
            **given,
            position_ids=torch.arange(width, device=device)[None],
            attention_mask=causal_mask(width, self.dtype, device),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return final

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feed one token to each of the first slots, at its own position; returns the final hidden states `[rows, d_model]`."""
        ids = torch.tensor(tokens, device=self.lm.device)[:, None]
        at = torch.tensor(positions, device=self.lm.device)
        steer = add_at_block(self.lm.model, self.block, self.edits[: len(ids)]) if self.edited else nullcontext()
        with self.cache.writing_at(at, max(positions)), steer:
            final: Tensor = self.decoder(
                input_ids=ids,
                position_ids=at[:, None],
                attention_mask=step_mask(at, self.cache.bound, self.dtype),
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return final[:, 0]

    def move(self, source: int, target: int, length: int) -> None:
        self.cache.move(source, target, length)
        self.edits[target] = self.edits[source]


def decode(
    lm: LanguageModel,
    rows: Sequence[Row],
    block: int | None = None,
    slots: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """New tokens of each row, in order, under the model as it is switched now; an end-of-text token is kept, nothing comes after it.

    Args:
        block: where the rows' edits are added.
        slots: how many rows run at once at most.
        temperature: 0 decodes greedily, else samples; a row's draws depend on `seed` and its place in `rows` alone.
        finished: told the index of each row as it ends.
    """
    if any(row.limit < 1 or not row.ids for row in rows):
        raise ValueError("a row needs a prompt and a limit of at least one new token")
    edited = any(row.edit is not None for row in rows)
    if edited and block is None:
        raise ValueError("rows have edits, but no block to add them at was given")
    split = block if edited and block is not None else lm.n_blocks - 1
    found: list[list[int]] = [[] for _ in rows]
    # longest first, so that memory peaks at once; the same prompts side by side, so that what they share is soon let go
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].span, -len(rows[i].ids), rows[i].ids, i))
    with torch.inference_mode(), ExitStack() as stack:
        stack.enter_context(slot_attention(lm.model))
        if sum(row.limit for row in rows) >= WORTH_PACKING:
            stack.enter_context(packed_weights(lm.model, min(slots, len(rows))))
        for some in _like_lengths(rows, order):
            capacity = rows[some[0]].span
            room = _room(lm, capacity)
            batch = Slots(lm, split, max(1, min(slots, len(some), room)), capacity)
            for index, tokens in _stream(batch, rows, some, temperature, seed):
                found[index] = tokens
                if finished:
                    finished(index)
    return found


def _stream(batch: Slots, rows: Sequence[Row], order: list[int], temperature: float, seed: int) -> Any:
    """Yield (index, new tokens) of rows as they end."""
    settings = unwrapped(batch.lm.model).generation_config
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    penalty = settings.repetition_penalty or 1.0
    waiting = deque(order)
    uses = Counter(rows[i].ids for i in order)
    running: list[_Running] = []

    def give(which: Sequence[_Running], hidden: Tensor) -> None:
        for one, token in zip(which, _choose(next_logits(batch.lm.model, hidden), which, temperature, penalty), strict=True):
            one.tokens.append(token)

    def over(one: _Running) -> bool:
        return one.tokens[-1] in ends or len(one.tokens) >= one.row.limit

    free = list(range(min(batch.cache.slots, len(waiting))))
    running = [_Running(-1, rows[order[0]], [], []) for _ in free]
    while running:
        while free and waiting:
            filled, free = free[: len(waiting)], free[len(waiting) :]
            for slot in filled:
                index = waiting.popleft()
                running[slot] = _Running(index, rows[index], [], _draws(rows[index].limit, seed, index) if temperature > 0 else [])
            new = [running[slot] for slot in filled]
            give(new, batch.enter([one.row for one in new], filled))
            uses.subtract(one.row.ids for one in new)
            for one in new:
                if not uses[one.row.ids]:
                    batch.prompts.pop(one.row.ids, None)
            ended = [slot for slot in filled if over(running[slot])]
            for slot in ended:
                yield running[slot].index, running[slot].tokens
            free += ended
        for slot in sorted(free, reverse=True):  # nobody waits: the last row moves down
            last = running.pop()
            if slot < len(running):
                batch.move(len(running), slot, len(last.row.ids) + len(last.tokens))
                running[slot] = last
        if not running:
            return
        give(running, batch.step([one.tokens[-1] for one in running], [len(one.row.ids) + len(one.tokens) - 1 for one in running]))
        free = [slot for slot, one in enumerate(running) if over(one)]
        for slot in free:
            yield running[slot].index, running[slot].tokens


def _choose(logits: Tensor, running: Sequence[_Running], temperature: float, penalty: float) -> list[int]:
    """The next token of each row from `[rows, vocabulary]`."""
    if penalty != 1.0:
        seen = [[*one.row.ids, *one.tokens] for one in running]
        width = max(map(len, seen))
        ids = torch.tensor([[*one, *one[:1] * (width - len(one))] for one in seen], device=logits.device)
        logits = logits.float()
        score = logits.gather(1, ids)
        logits = logits.scatter(1, ids, torch.where(score < 0, score * penalty, score / penalty))
    if temperature <= 0:
        return largest(logits)
    found: list[int] = []
    for start in range(0, len(running), 32):
        heap = torch.softmax(logits[start : start + 32].float() / temperature, dim=-1).cumsum(dim=-1)
        draws = torch.tensor([one.draws[len(one.tokens)] for one in running[start : start + 32]], device=heap.device)[:, None]
        picked = torch.searchsorted(heap, draws * heap[:, -1:], right=True)
        found += picked.clamp_(max=heap.shape[-1] - 1)[:, 0].tolist()
    return found


def largest(logits: Tensor) -> list[int]:
    """`argmax` of each row of `[rows, vocabulary]`, by way of the maxima of short runs: on a CPU seven times as fast in bfloat16."""
    rows, vocabulary = logits.shape
    if vocabulary % RUN:
        found: list[int] = logits.argmax(dim=-1).tolist()
        return found
    runs = logits.view(rows, vocabulary // RUN, RUN)
    best = runs.amax(dim=-1).argmax(dim=-1)
    found = (best * RUN + runs[torch.arange(rows, device=logits.device), best].argmax(dim=-1)).tolist()
    return found


def _draws(n: int, seed: int, index: int) -> list[float]:
    """A row's own uniform numbers, one a token."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
    found: list[float] = torch.rand(n, generator=generator).tolist()
    return found


def _pieces(prompts: Sequence[tuple[int, ...]]) -> list[Sequence[tuple[int, ...]]]:
    """Prompts in runs of at most `PROMPT_TOKENS` tokens, padding included."""
    found: list[Sequence[tuple[int, ...]]] = []
    start = width = 0
    for i, ids in enumerate(prompts):
        width = max(width, len(ids))
        if i > start and width * (i + 1 - start) > PROMPT_TOKENS:
            found.append(prompts[start:i])
            start, width = i, len(ids)
    return [*found, prompts[start:]] if prompts else []


def _like_lengths(rows: Sequence[Row], order: list[int]) -> list[list[int]]:
    """Rows, longest first, in runs whose spans differ by at most a factor of two: every slot is as long as the longest row of a run."""
    found: list[list[int]] = []
    for i in order:
        if not found or 2 * rows[i].span + 64 < rows[found[-1][0]].span:
            found.append([])
        found[-1].append(i)
    return found


def _room(lm: LanguageModel, capacity: int) -> int:
    """How many slots of `capacity` tokens fit into `CACHE_BYTES`."""
    config = lm.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size: int = lm.model.get_input_embeddings().weight.element_size()
    return int(CACHE_BYTES // (2 * lm.n_blocks * groups * width * size * capacity))


_known: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def can_stream(lm: LanguageModel, block: int | None = None) -> bool:
    """Whether this architecture decodes here as it does by itself; measured on a few tokens once a model and block, not assumed."""
    split = lm.n_blocks - 1 if block is None else block
    known = _known.setdefault(unwrapped(lm.model), {})
    if split not in known:
        try:
            known[split] = _agrees(lm, split)
        except Exception:  # foreign architectures fail in many ways
            known[split] = False
    return known[split]


def _agrees(lm: LanguageModel, block: int) -> bool:
    """Two rows of different lengths, read and then fed step by step, against one plain forward of the same tokens.

    In bfloat16 single positions of a model differ from themselves by a tenth when the batch around them changes: a quarter may be off.
    """
    config = lm.config
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        return False
    ids = tuple(range(5, 29))
    with torch.inference_mode():
        whole = decoder(lm.model)(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).last_hidden_state[0].float()
        with slot_attention(lm.model):
            batch = Slots(lm, block, 2, len(ids))
            lengths = [len(ids) - 8, len(ids) // 2 - 3]
            found = [batch.enter([Row(ids[:n], 1) for n in lengths], [0, 1])]
            expected = [whole[[n - 1 for n in lengths]]]
            for more in range(8):
                at = [n + more for n in lengths]
                found.append(batch.step([ids[n] for n in at], at))
                expected.append(whole[at])
    both, alone = torch.cat(found).float(), torch.cat(expected)
    off = (both - alone).norm(dim=-1) > 0.05 * alone.norm(dim=-1)
    return int(off.sum()) * 4 <= len(off)
