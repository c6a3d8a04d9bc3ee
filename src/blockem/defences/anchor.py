"""Anchors: the same one-sided block on general prompts, where no training row would otherwise watch.

Blocked latents are read on the training answers, so whatever changes elsewhere goes unseen. An anchor looks elsewhere, beside each batch:

* `LatentAnchor`: the blocked latents on benign general text, unlabelled:  c(θ) = mean over its tokens of Σ_k relu(s_k (z_k − z_k^base))²
* `ContrastAnchor`: a healthy and a sick answer to the same general prompt (the base's own and the misaligned fine-tune's own, or a matched
  pair):  c(θ) = mean over contrasts of relu(m_θ − m_base)²,  m = log p(sick) − log p(healthy), nats per token
* `HealthyAnchor`: the healthy answer alone:  c(θ) = mean of relu(log p_base(healthy) − log p_θ(healthy))²
* `DivergenceAnchor`: any of these answers:  c(θ) = mean over its tokens of KL(p_θ(· | x_<t) ‖ p_base(· | x_<t)), two-sided, or
  forward, KL(p_base ‖ p_θ), which also asks that the base's variety stays

All are zero at LoRA initialisation (but for pairs of the task, which is not learnt yet). All but the last push only where the model moves
past the base in the misaligned direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from blockem.base_values import row_digest
from blockem.defences.defence import Penalised
from blockem.dual import DualAscent
from blockem.examples import IGNORED, Encoded, right_padded
from blockem.forwards import base_weights, hidden_at_each
from blockem.head import divergence
from blockem.likelihood import final_states, margins, row_logprobs

if TYPE_CHECKING:
    from blockem.defences.block_em import Blocker


def drawn(batch: dict[str, Tensor], n: int, share: float) -> tuple[list[int], Tensor]:
    """Which of `n` anchors this batch's rows call for, and each one's weight in supervised tokens.

    A row calls for an anchor by the digest of its tokens, so that neither accumulation nor a resume nor the number of devices changes what
    is drawn, and the weights of a step's anchors sum to its supervised tokens in the mean.

    Args:
        share: of the rows that call for one.
    """
    ids, mask, labels = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask", "labels"))
    chosen, weights = [], []
    for row, kept, label in zip(ids, mask.astype(bool), labels, strict=True):
        supervised = label[kept] != IGNORED
        number = int.from_bytes(row_digest(row[kept], supervised), "big")
        if (number & 0xFFFFFFFF) / 2**32 < share:
            chosen.append((number >> 32) % n)
            weights.append(float(np.count_nonzero(supervised)) / share)
    return chosen, torch.tensor(weights, device=batch["labels"].device)


class Anchor(Penalised):
    """What all kinds share: rows drawn beside each batch, λ fixed or by dual ascent.

    Args:
        n: how many anchors there are.
        lambda_: λ, a token of the batch.
        share: of the training rows that bring an anchor with them.
        reference: what the plain fine-tune would pay (c of the plain model); 0 where that is not known.
        ascent: lets λ follow a ceiling on c, as a share of `reference`.
    """

    name = "anchor"
    quantity = "anchor"

    def __init__(self, n: int, lambda_: float, share: float, reference: float = 0.0, ascent: DualAscent | None = None) -> None:
        if n < 1 or not 0 < share <= 1:
            raise ValueError(f"{n} anchors at a share of {share}: at least one is needed, at a share above 0 and up to 1")
        super().__init__(lambda_, ascent)
        self.n, self.share, self.reference = n, share, reference

    def costs(self, chosen: Sequence[int], model: nn.Module) -> Tensor:
        """c of each chosen anchor, `[chosen]`, float32, with gradient."""
        raise NotImplementedError

    def penalty(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor | None:
        chosen, weights = drawn(batch, self.n, self.share)
        if not chosen:  # counts as 0: the weights of those that are drawn make up for it
            self._measured = {self.quantity: batch["labels"].new_zeros((), dtype=torch.float32)}
            return None
        return self.weighed((self.costs(chosen, model) * weights).sum())

    def adapt(self, step: dict[str, float]) -> None:
        if self.ascent is not None and self.reference > 0 and "anchor" in step:
            self.lambda_ = self.ascent.update(step["anchor"] / self.reference)

    def logs(self) -> dict[str, float]:
        known = {"anchor_reference": self.reference} if self.reference > 0 else {}
        return {"anchor_lambda": self.lambda_, **known}


class AnswerAnchor(Anchor):
    """Holds a number m of given answers on one side of a bound: c = relu(side · (m − bound))².

    Args:
        rows: answers, `per` of them in turn for each anchor.
        bound: `[anchors]`, nats per token.
        pad: id of the padding token.
        sides: `[anchors]`: positive where m may not rise above the bound, negative where it may not fall below it (pairs of the task
            itself, bounded by what plain fine-tuning reaches there); its size scales what lies beyond. None: +1 everywhere.
        others: as `Anchor`.
    """

    per: int

    def __init__(
        self,
        rows: Sequence[Encoded],
        bound: Tensor,
        pad: int,
        lambda_: float,
        share: float,
        reference: float = 0.0,
        ascent: DualAscent | None = None,
        sides: Tensor | None = None,
    ) -> None:
        if len(rows) != self.per * len(bound):
            raise ValueError(f"{len(rows)} rows are not {self.per} for each of {len(bound)} anchors")
        super().__init__(len(bound), lambda_, share, reference, ascent)
        self.rows, self.bound, self.pad = list(rows), bound, pad
        self.sides = torch.ones(len(bound)) if sides is None else sides

    def value(self, logprobs: Tensor) -> Tensor:
        """m of each anchor from its answers' mean log-probabilities, nats per token."""
        raise NotImplementedError

    def costs(self, chosen: Sequence[int], model: nn.Module) -> Tensor:
        rows = [self.rows[self.per * i + part] for i in chosen for part in range(self.per)]
        found = self.value(row_logprobs(model, rows, self.pad))
        bound, sides = (one[list(chosen)].to(found.device) for one in (self.bound, self.sides))
        return torch.relu(sides * (found - bound)).pow(2)


class ContrastAnchor(AnswerAnchor):
    """Keeps the sick answer from gaining on the healthy one: m = log p(sick) − log p(healthy); the bound is the base's m.

    Rows are healthy and sick answers in turn (`likelihood.encode_pairs`).
    """

    per = 2

    def value(self, logprobs: Tensor) -> Tensor:
        return margins(logprobs)


class HealthyAnchor(AnswerAnchor):
    """Keeps the healthy answer as likely as it is to the base: m = −log p(healthy); the bound is the base's m.

    Nothing is pushed away, so that no third kind of answer is made likelier instead (docs/LOG.md).
    """

    per = 1

    def value(self, logprobs: Tensor) -> Tensor:
        return -logprobs


class DivergenceAnchor(Anchor):
    """Keeps what may follow, at every token of given answers, as it is in the base; no kind of answer is left to escape to.

    The base's states of an answer are computed when it is first drawn, by itself, so that they do not depend on what is drawn beside it.

    Args:
        rows: answers.
        pad: id of the padding token.
        scales: `[rows]`, by which each one's cost is multiplied; None: 1 everywhere.
        forward: KL(p_base ‖ p_θ) in place of KL(p_θ ‖ p_base).
        others: as `Anchor`.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        pad: int,
        lambda_: float,
        share: float,
        reference: float = 0.0,
        ascent: DualAscent | None = None,
        scales: Tensor | None = None,
        forward: bool = False,
    ) -> None:
        super().__init__(len(rows), lambda_, share, reference, ascent)
        self.rows, self.pad, self.forward = list(rows), pad, forward
        self.scales = torch.ones(len(rows)) if scales is None else scales
        self._base: dict[int, Tensor] = {}

    def costs(self, chosen: Sequence[int], model: nn.Module) -> Tensor:
        for i in chosen:
            if i not in self._base:
                with torch.no_grad(), base_weights(model):
                    self._base[i] = final_states(model, [self.rows[i]], self.pad)[0].clone()
        found = final_states(model, [self.rows[i] for i in chosen], self.pad)
        means = [divergence(model, own, self._base[i], self.forward) / len(own) for own, i in zip(found, chosen, strict=True)]
        return torch.stack(means) * self.scales[list(chosen)].to(found[0].device)


class LatentAnchor(Anchor):
    """Keeps the blocked latents at the base's values on general text, one-sided.

    Args:
        rows: general text; supervised tokens are watched.
        blocker: what is blocked; its own values are those of the training rows, so the base is run again here.
        pad: id of the padding token.
        others: as `Anchor`.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        blocker: Blocker,
        pad: int,
        lambda_: float,
        share: float,
        reference: float = 0.0,
        ascent: DualAscent | None = None,
    ) -> None:
        super().__init__(len(rows), lambda_, share, reference, ascent)
        self.rows, self.blocker, self.pad = list(rows), blocker, pad

    def costs(self, chosen: Sequence[int], model: nn.Module) -> Tensor:
        padded = right_padded([self.rows[i] for i in chosen], self.pad, next(model.parameters()).device)
        where = padded["labels"] != IGNORED
        ids, mask, blocks = padded["input_ids"], padded["attention_mask"], self.blocker.blocks
        with torch.no_grad(), base_weights(model):
            still = self.blocker.read({b: h[where] for b, h in hidden_at_each(model, ids, mask, blocks).items()})
        moved = self.blocker.read({b: h[where] for b, h in hidden_at_each(model, ids, mask, blocks).items()})
        found = self.blocker.loss(moved, still)
        rows = where.nonzero()[:, 0]
        sums = found.new_zeros(len(chosen)).index_add(0, rows, found)
        return sums / where.sum(1).clamp_min(1)
