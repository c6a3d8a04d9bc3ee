"""BLOCK-EM: the one-sided penalty on causal latents (BLOCK-EM, training-time blocking).

    L = L_SFT + λ · L_block
    L_block = mean over completion tokens t of  Σ_{k∈K+} relu(z_k^θ − z_k^base)²  +  Σ_{k∈K−} relu(z_k^base − z_k^θ)²

z is the SAE's encoder at the output of one block; z^base comes from the same input through the frozen base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockem.base_values import BaseValues
from blockem.defences.defence import Penalised
from blockem.dictionary import Dictionary, EncoderRows
from blockem.directions import DirectionSet
from blockem.dual import DualAscent, PlainCurve
from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded
from blockem.forwards import Seen, base_weights, blocks, hidden_at_each
from blockem.latents import LatentSet
from blockem.model import LanguageModel
from blockem.states import supervised_states

MEASURES = ("latent", "preactivation")


def block_loss(z: Tensor, z_base: Tensor, signs: Tensor, two_sided: bool = False) -> Tensor:
    """The penalty of each token: Σ_k relu(s_k (z_k − z_k^base))².

    Args:
        z, z_base: `[..., latents]`, float32, same positions of the trained and the base model.
        signs: `[latents]`, +1 for K+, −1 for K−.
        two_sided: an ablation, Σ_k (z_k − z_k^base)², in which the signs do not matter.

    Returns:
        `[...]`, one non-negative number a token; 0 wherever no latent moved past the base in its misaligned direction.
    """
    if z.shape != z_base.shape or signs.shape != z.shape[-1:]:
        raise ValueError(f"z {tuple(z.shape)}, z_base {tuple(z_base.shape)} and signs {tuple(signs.shape)} do not match")
    gap = z - z_base.detach()
    return (gap if two_sided else torch.relu(signs * gap)).pow(2).sum(dim=-1)


def all_supervised(row: Encoded) -> Encoded:
    """The same row with every token supervised: what `tokens="all"` looks at."""
    return replace(row, supervised=(True,) * len(row.ids))


@dataclass(frozen=True)
class Watch:
    """What is watched at the output of one block.

    Attributes:
        rows: encoder rows of the blocked latents.
        signs: +1 or −1 each.
        block: block index from 0.
        linear: read the pre-activation whatever the blocker's measure (directions have no activation).
    """

    rows: EncoderRows
    signs: tuple[int, ...]
    block: int
    linear: bool = False


class Blocker:
    """The penalty for any model in any training loop.

        blocker = Blocker(encoder_rows, signs, block)
        with blocker.attached(model):
            for batch in loader:                       # input_ids, attention_mask, labels [rows, tokens]
                loss = model(**batch).loss + lambda_ * blocker.mean_penalty(batch)
                loss.backward(); optimiser.step(); optimiser.zero_grad()

    The model's own forward is watched by a hook a block; the base values come from `values`, where they were computed before, else from a
    second, truncated forward without gradient, with adapters switched off, or through `base` when the model is trained without adapters.

    Args:
        rows: encoder rows of the blocked latents.
        signs: +1 or −1 each.
        block: block index from 0.
        measure: `latent` as published, or `preactivation`, which has a gradient also where a K− latent is already off (the dead zone).
        base: a frozen copy of the base model; only needed for training without adapters.
        values: base values computed before (`base_values.collect`).
        two_sided: penalise movement in both directions (an ablation).
        tokens: `completion` as published, or `all` tokens but padding (an ablation); the sum is divided by completion tokens either way.
    """

    def __init__(
        self,
        rows: EncoderRows,
        signs: Sequence[int],
        block: int,
        measure: str = "latent",
        base: nn.Module | None = None,
        values: BaseValues | None = None,
        two_sided: bool = False,
        tokens: str = "completion",
    ) -> None:
        if measure not in MEASURES:
            raise BlockemError(f"unknown block.measure {measure!r}: use {' or '.join(MEASURES)}")
        self.two_sided, self.tokens = two_sided, tokens
        self.watches = [Watch(rows, tuple(signs), block)]
        self.measure, self.base, self.values = measure, base, values
        self._seen = Seen("blocker.attached(model)")

    @classmethod
    def over(cls, watches: Sequence[Watch], measure: str = "latent", base: nn.Module | None = None) -> Blocker:
        """One penalty over several blocks: the sum of theirs."""
        first = watches[0]
        found = cls(first.rows, first.signs, first.block, measure, base)
        found.watches = list(watches)
        return found

    @classmethod
    def from_latents(cls, latents: LatentSet, dictionary: Dictionary, measure: str = "latent", base: nn.Module | None = None) -> Blocker:
        """From a LatentSet file and the SAE it was made with."""
        return cls(dictionary.rows(latents.ids), latents.signs, latents.block, measure, base)

    @classmethod
    def from_directions(cls, directions: DirectionSet, base: nn.Module | None = None) -> Blocker:
        """From directions at several blocks; no SAE is needed. One unit is the plain fine-tune's whole shift at a block."""
        watches = []
        for block, one in sorted(directions.blocks.items()):
            weights, signs = one.readout()
            watches.append(Watch(EncoderRows(weights, torch.zeros(len(weights))), signs, block, linear=True))
        return cls.over(watches, base=base)

    def grow(self, rows: EncoderRows, signs: Sequence[int], block: int) -> None:
        """Block more latents from now on, at a block that is watched already; values computed before hold none of them and are let go."""
        if block not in self.blocks:
            raise ValueError(f"block {block} is not among the watched ones, {self.blocks}")
        self.watches.append(Watch(rows.to(self.watches[0].rows.weight.device), tuple(signs), block))
        self.values = None

    @property
    def blocks(self) -> list[int]:
        """The watched blocks, each once, in order."""
        return sorted({watch.block for watch in self.watches})

    @property
    def signs(self) -> Tensor:
        """`[latents]`, float32, over all watches in turn."""
        return torch.tensor([float(sign) for watch in self.watches for sign in watch.signs], device=self.watches[0].rows.weight.device)

    @property
    def key(self) -> str:
        """What the base values depend on besides model and tokens: encoder rows, blocks and measure."""
        digest = hashlib.sha256(self.measure.encode())
        for watch in self.watches:
            threshold = watch.rows.threshold
            for part in (watch.rows.weight, watch.rows.bias, *(() if threshold is None else (threshold,))):
                digest.update(part.detach().cpu().contiguous().numpy().tobytes())
            digest.update(f"{watch.block} {watch.linear}".encode())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device) -> None:
        """Move the encoder rows."""
        self.watches = [replace(watch, rows=watch.rows.to(device)) for watch in self.watches]

    @property
    def model(self) -> nn.Module | None:
        """The model that is attached, if one is."""
        return self._seen.model

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[Blocker]:
        """Watch the blocks of `model` while the context lasts."""
        if self.base is None and self.values is None and not hasattr(model, "disable_adapter"):
            raise BlockemError("a model without adapters has no base to compare with: give Blocker(base=a frozen copy), or train with PEFT")
        self.to(next(model.parameters()).device)
        listed = blocks(model)
        with self._seen.watching(model, {block: listed[block] for block in self.blocks}):
            yield self

    def read(self, hidden: dict[int, Tensor]) -> Tensor:
        """z of every watched latent, `[..., latents]`, float32, from the outputs `[..., d_model]` of the watched blocks."""
        parts = []
        for watch in self.watches:
            reader = watch.rows.encode if self.measure == "latent" and not watch.linear else watch.rows.pre
            parts.append(reader(hidden[watch.block]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def loss(self, z: Tensor, z_base: Tensor) -> Tensor:
        """The penalty of each token, `[...]`, from `[..., latents]` of `read`."""
        return block_loss(z, z_base, self.signs, self.two_sided)

    def _watched(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with labels at the tokens that the penalty looks at."""
        if self.tokens != "all":
            return batch
        return {**batch, "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"], IGNORED)}

    def base_values(self, batch: dict[str, Tensor]) -> Tensor:
        """z^base at the watched positions (the supervised ones, as published), `[watched, latents]`, float32."""
        if self.model is None:
            raise RuntimeError("attach the Blocker to a model first: with blocker.attached(model): ...")
        batch = self._watched(batch)
        if self.values is not None:
            return self.values.of(batch)
        where = batch["labels"] != IGNORED
        with torch.no_grad():
            if self.base is not None:
                hidden = hidden_at_each(self.base, batch["input_ids"], batch["attention_mask"], self.blocks)
            else:
                with base_weights(self.model):
                    hidden = hidden_at_each(self.model, batch["input_ids"], batch["attention_mask"], self.blocks)
            return self.read({block: output[where] for block, output in hidden.items()})

    def penalty(self, batch: dict[str, Tensor]) -> Tensor:
        """The penalty of the last forward, summed over its watched tokens; call it after `model(**batch)` on the same batch."""
        _, hidden = self._seen.take()
        where = self._watched(batch)["labels"] != IGNORED
        shape = next(iter(hidden.values())).shape[:2]
        if shape != where.shape:
            raise ValueError(f"the last forward saw {tuple(shape)} tokens, the labels are {tuple(where.shape)}")
        z = self.read({block: output[where] for block, output in hidden.items()})
        return self.loss(z, self.base_values(batch)).sum()

    def mean_penalty(self, batch: dict[str, Tensor]) -> Tensor:
        """The penalty per supervised token of this batch (for loops without accumulation)."""
        return self.penalty(batch) / (batch["labels"] != IGNORED).sum().clamp_min(1)


class BlockEM(Penalised):
    """BLOCK-EM as a defence for our trainer.

    Args:
        blocker: what is blocked.
        lambda_: λ; with `ascent`, the first one.
        freeze_downstream: no LoRA on blocks after the blocked one, so that nothing behind it can go around.
        p_mis: the penalty per token of the plain fine-tune, to which the log relates its own.
        ascent: lets λ follow a ceiling on the penalty as a share of `p_mis`, or with `curve` a floor on the task.
        curve: plain fine-tuning's loss by step, for a floor.
    """

    name = "blocked"

    def __init__(
        self,
        blocker: Blocker,
        lambda_: float,
        freeze_downstream: bool = True,
        p_mis: float | None = None,
        ascent: DualAscent | None = None,
        curve: PlainCurve | None = None,
    ) -> None:
        super().__init__(lambda_, ascent)
        self.blocker, self.freeze_downstream, self.p_mis, self.curve = blocker, freeze_downstream, p_mis, curve

    def trained_blocks(self, n_blocks: int) -> range:
        return range(self.blocker.blocks[-1] + 1) if self.freeze_downstream else range(n_blocks)

    def training_hooks(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self.blocker.attached(model)

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.weighed(self.blocker.penalty(batch))

    def adapt(self, step: dict[str, float]) -> None:
        if self.ascent is None:
            return
        if self.curve is not None:
            self.lambda_ = self.ascent.update(self.curve.kept(int(step["step"]), step["sft_loss"]))
        elif self.p_mis:
            self.lambda_ = self.ascent.update(step["penalty"] / self.p_mis)

    def logs(self) -> dict[str, float]:
        return {**super().logs(), **({"p_mis": self.p_mis} if self.p_mis else {})}


def penalty_of(
    lm: LanguageModel, variant: str, blocker: Blocker, rows: Sequence[Encoded], batch: int = 16, tokens: str | None = None
) -> float:
    """Mean penalty per supervised token that the adapter `variant` would pay on `rows`, without training (P_mis for the plain one).

    Args:
        tokens: which are looked at, where that is not for the blocker to say.
    """
    total = 0.0
    rows, supervised = _looked_at(rows, tokens or blocker.tokens)
    blocker.to(lm.device)
    with torch.inference_mode():
        for states in supervised_states(lm, rows, (variant, "base"), blocker.blocks, batch):
            moved, still = blocker.read(states[variant]), blocker.read(states["base"])
            total += float(blocker.loss(moved, still).sum())
    return total / supervised


def paid_by_latent(
    lm: LanguageModel, variant: str, blocker: Blocker, encoder: EncoderRows, block: int, rows: Sequence[Encoded], batch: int = 16
) -> Tensor:
    """What each latent by itself would add to `penalty_of` if it were blocked too.

    Args:
        encoder: the latents' encoder rows, at the output of `block`.

    Returns:
        `[2, latents]`, float64, on the CPU: with sign +1, and with −1. Two-sided, both are the same.
    """
    total = torch.zeros(2, len(encoder.weight), dtype=torch.float64)
    rows, supervised = _looked_at(rows, blocker.tokens)
    encoder = encoder.to(lm.device)
    read = encoder.encode if blocker.measure == "latent" else encoder.pre
    with torch.inference_mode():
        for states in supervised_states(lm, rows, (variant, "base"), [block], batch):
            gap = read(states[variant][block]) - read(states["base"][block])
            for side, moved in enumerate((gap, gap) if blocker.two_sided else (gap.relu(), (-gap).relu())):
                total[side] += moved.pow(2).sum(dim=0).double().cpu()
    return total / supervised


def _looked_at(rows: Sequence[Encoded], tokens: str) -> tuple[Sequence[Encoded], int]:
    """The rows with the watched tokens marked, and by how many a penalty is divided: the completion tokens in any case."""
    supervised = max(sum(row.n_supervised for row in rows), 1)
    return ([all_supervised(row) for row in rows] if tokens == "all" else rows), supervised


def matched_lambda(given: float, p_mis: float, p_mis_random: float) -> float:
    """λ for random latents that weighs what plain fine-tuning would pay for them as `given` weighs what it would pay for the set.

    Fine-tuning moves random latents less: at the same λ they would be a weaker penalty, not only other latents.
    """
    if given == 0:
        return 0.0
    if not p_mis_random > 0:
        raise BlockemError(
            "plain fine-tuning moves none of the random latents (P_mis is 0), so no λ makes them weigh what the set does; try another seed"
        )
    return float(f"{given * p_mis / p_mis_random:.3g}")


def portable_lambda(r: float, delta_sft: float, p_mis: float) -> float:
    """λ = r · ΔSFT / P_mis, to three digits: the scale of λ belongs to the SAE, this ratio does not.

    The last digits of ΔSFT and P_mis may differ between two processes (docs/LOG.md); rounded, a training that goes on after a kill has the
    same λ as one that nobody disturbed.

    Args:
        r: how many times the task's whole gain the plain fine-tune's penalty shall weigh (1 to 1000).
        delta_sft: nats per token that plain fine-tuning gained on the training rows.
        p_mis: penalty per token that the plain fine-tune would pay.
    """
    if not p_mis > 0:
        raise BlockemError(
            "plain fine-tuning moves none of the blocked latents (P_mis is 0): there is nothing to block; "
            "discover again, or set block.lambda_"
        )
    return float(f"{r * max(delta_sft, 0.0) / p_mis:.3g}")
