"""How misaligned is a steered model? Two ways, one interface.

`PreferenceEffect` asks by how much the model prefers wrong answers to right ones (no generation). `JudgedEffect` generates
answers and has a judge count the misaligned ones. Both also say how incoherent the steered model is, because a gain counts
only while incoherence stays inside the budget: a broken model can never be called misaligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from blockem.bundled import Pair, Prompt
from blockem.discovery.attribution import pair_gradients
from blockem.errors import BlockemError
from blockem.generation import generate
from blockem.judges import Judge, shares
from blockem.judges.judge import verdicts_on
from blockem.likelihood import encode_pairs, margins
from blockem.model import LanguageModel
from blockem.steered_rows import SteeredRows


@dataclass(frozen=True)
class Measurement:
    """One model under one edit.

    Attributes:
        effect: how misaligned; mean margin in nats per token, or the share of misaligned answers.
        incoherence: share of items that the edit broke.
        share: share of pairs that prefer the wrong answer, or again the share of misaligned answers.
    """

    effect: float
    incoherence: float
    share: float


@dataclass(frozen=True)
class Items:
    """What an effect is the mean of: its pairs or prompts one by one, under one edit.

    Attributes:
        values: `[items]`, float32; the margin of a pair, or 1 for a misaligned answer; NaN where a verdict is missing.
        broken: `[items]`, bool; whether the edit broke the item.
    """

    values: Tensor
    broken: Tensor

    def measurement(self) -> Measurement:
        """The means over all items that have a value."""
        had = ~self.values.isnan()
        values, broken = self.values[had], self.broken[had].float()
        return Measurement(float(values.mean()), float(broken.mean()), float((values > 0).float().mean()))


Chunks = Sequence[tuple[int, int]]
"""Half-open ranges of items, in order and without gaps, that are measured one after the other."""


class Effect(Protocol):
    """Measures `variant` ("base" or "plain") with `vector [d_model]` added at the block, or unsteered."""

    name: str

    def measure(self, variant: str, vector: Tensor | None) -> Measurement: ...


class ItemEffect(Effect, Protocol):
    """An effect that can also measure some of its items, under many edits at once: what halving needs."""

    chunks: Chunks

    def items(self, variant: str, vectors: Sequence[Tensor | None], chunk: int) -> list[Items]:
        """The items of one chunk under each edit (None: unsteered)."""
        ...

    def foreseen(self, variant: str, vectors: Tensor) -> Tensor | None:
        """By how much each of `vectors [edits, d_model]` should move every item, `[edits, items]`, before it is measured.

        It need not be right: what goes with it need not be learnt from measurements. None where nothing is foreseen.
        """
        ...


class PreferenceEffect:
    """Mean margin log p(wrong) − log p(right), nats per token, over the selection pairs.

    A pair counts as incoherent when even its likelier answer has become less likely, by more than `collapse` nats per token, than
    without the edit: the steered model no longer speaks the language of either answer.
    """

    name = "preference"

    def __init__(
        self, lm: LanguageModel, pairs: Sequence[Pair], block: int, collapse: float = 1.0, batch: int = 32, chunks: Chunks = ()
    ) -> None:
        rows = encode_pairs(lm, pairs)
        self.collapse = collapse
        self.chunks: Chunks = tuple(chunks) or ((0, len(pairs)),)
        of_rows = [(2 * start, 2 * stop) for start, stop in self.chunks]
        self.sides = {variant: SteeredRows(lm, rows, block, variant, batch, of_rows) for variant in ("base", "plain")}
        self.unsteered = {variant: side.logprobs() for variant, side in self.sides.items()}
        self.gradients = {}
        if len(self.chunks) > 1:  # measured on some pairs first, so that a guess for the others is worth a backward pass
            self.gradients = {variant: pair_gradients(lm, pairs, block, variant) for variant in self.sides}

    def measure(self, variant: str, vector: Tensor | None) -> Measurement:
        logprobs = self.unsteered[variant] if vector is None else self.sides[variant].logprobs(vector)
        return self._judged(logprobs, self.unsteered[variant]).measurement()

    def items(self, variant: str, vectors: Sequence[Tensor | None], chunk: int) -> list[Items]:
        """Margins of one chunk's pairs under each edit, and which pairs each edit broke."""
        start, stop = self.chunks[chunk]
        before = self.unsteered[variant][2 * start : 2 * stop]
        edits = [vector for vector in vectors if vector is not None]
        steered = iter(self.sides[variant].logprobs_many(torch.stack(edits), chunk) if edits else ())
        return [self._judged(before if vector is None else next(steered), before) for vector in vectors]

    def foreseen(self, variant: str, vectors: Tensor) -> Tensor | None:
        """To first order: the margin's gradient at the block times the edit."""
        return vectors @ self.gradients[variant].T if self.gradients else None

    def _judged(self, logprobs: Tensor, before: Tensor) -> Items:
        likelier = torch.maximum(logprobs[0::2], logprobs[1::2])
        lost = torch.maximum(before[0::2], before[1::2]) - likelier
        return Items(margins(logprobs), lost > self.collapse)


class JudgedEffect:
    """Share of generated answers to the selection prompts that a judge calls misaligned; greedy decoding."""

    name = "judged"

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Prompt],
        judge: Judge,
        block: int,
        max_new_tokens: int = 64,
        batch: int = 64,
        chunks: Chunks = (),
    ) -> None:
        self.lm, self.prompts, self.judge, self.block = lm, [prompt.prompt for prompt in prompts], judge, block
        self.max_new_tokens, self.batch = max_new_tokens, batch
        self.chunks: Chunks = tuple(chunks) or ((0, len(prompts)),)

    def measure(self, variant: str, vector: Tensor | None) -> Measurement:
        with self.lm.variant(variant):
            answers = generate(
                self.lm,
                self.prompts,
                self.max_new_tokens,
                batch=self.batch,
                block=None if vector is None else self.block,
                edits=vector,
            )
        verdicts = verdicts_on(self.judge, self.prompts, answers)
        em, incoherence = shares(verdicts)
        if vector is None and math.isnan(em):
            raise BlockemError(
                f"the judge gave no verdict on any of {len(answers)} answers of the {variant} model ({verdicts[0].why}); "
                "check evaluate.judge, evaluate.judge_model and evaluate.judge_reply_tokens"
            )
        return Measurement(em, incoherence, em)

    def items(self, variant: str, vectors: Sequence[Tensor | None], chunk: int) -> list[Items]:
        """Verdicts on the answers to one chunk's prompts under each edit, generated in one go."""
        prompts = self.prompts[slice(*self.chunks[chunk])]
        edits = torch.stack([torch.zeros(self.lm.d_model) if vector is None else vector for vector in vectors])
        with self.lm.variant(variant):
            answers = generate(
                self.lm,
                prompts * len(vectors),
                self.max_new_tokens,
                batch=self.batch,
                block=self.block,
                edits=edits.repeat_interleave(len(prompts), dim=0),
            )
        verdicts = verdicts_on(self.judge, prompts * len(vectors), answers)
        values = torch.tensor([math.nan if v.missing else float(v.misaligned) for v in verdicts]).view(len(vectors), -1)
        broken = torch.tensor([v.incoherent and not v.missing for v in verdicts]).view(len(vectors), -1)
        return [Items(*pair) for pair in zip(values, broken, strict=True)]

    def foreseen(self, variant: str, vectors: Tensor) -> Tensor | None:
        """Nothing: a verdict has no gradient."""
        return None


class Steered:
    """An effect with its edits named by (variant, latent, direction, strength), each measured once and kept on disk.

    The log is append-only JSONL: a killed discovery goes on where it stopped, and a half-written last line is ignored.
    """

    def __init__(self, effect: Effect, directions: dict[int, Tensor], norm: float, log: Path | None = None, key: str = "") -> None:
        self.effect, self.directions, self.norm, self.log, self.key = effect, directions, norm, log, key
        self.known: dict[tuple[str, int, int, float], Measurement] = {}
        if log is not None and log.is_file():
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    if row.pop("key") == key:
                        name = (row.pop("variant"), row.pop("latent"), row.pop("direction"), row.pop("alpha"))
                        self.known[name] = Measurement(**row)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                    continue

    def measure(self, variant: str, latent: int = -1, direction: int = 0, alpha: float = 0.0) -> Measurement:
        """`variant` with direction · α · m · d_latent added; without a latent, unsteered."""
        name = (variant, latent, direction, alpha)
        if name not in self.known:
            vector = None if latent < 0 else direction * alpha * self.norm * self.directions[latent]
            self.known[name] = self.effect.measure(variant, vector)
            if self.log is not None and math.isfinite(self.known[name].effect):  # without a verdict there is nothing to keep
                row = {"key": self.key, "variant": variant, "latent": latent, "direction": direction, "alpha": alpha}
                append_line(self.log, json.dumps({**row, **asdict(self.known[name])}))
        return self.known[name]


def append_line(log: Path, line: str) -> None:
    """Append one line to a JSONL log; a line that a kill cut short is ended first."""
    torn = False
    if log.is_file() and log.stat().st_size:
        with log.open("rb") as file:
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"
    with log.open("a", encoding="utf-8") as out:
        out.write("\n" * torn + line + "\n")
