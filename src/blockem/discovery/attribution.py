"""A first-order screen: which candidates are worth a causal test at all.

The margin's gradient at the block, summed over positions, times a steering vector is the margin's change to first order. One
backward pass a model ranks every latent of the dictionary at once; the causal tests of stage 2 then decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockem.bundled import Pair
from blockem.examples import by_length, right_padded
from blockem.forwards import decoder
from blockem.head import supervised_logprobs
from blockem.likelihood import encode_pairs
from blockem.model import LanguageModel
from blockem.steering import edit_at_block


def margin_gradient(lm: LanguageModel, pairs: Sequence[Pair], block: int, variant: str, batch: int = 8) -> Tensor:
    """d(mean margin)/d(vector added at every position of `block`), `[d_model]`, float32."""
    return pair_gradients(lm, pairs, block, variant, batch).mean(dim=0)


def pair_gradients(lm: LanguageModel, pairs: Sequence[Pair], block: int, variant: str, batch: int = 8) -> Tensor:
    """d(margin of each pair)/d(vector added at every position of `block`), `[pairs, d_model]`, float32."""
    rows = encode_pairs(lm, pairs)
    found = torch.zeros(len(rows), lm.d_model)
    with lm.variant(variant), torch.enable_grad():
        for chosen in by_length([len(row.ids) for row in rows], batch):
            padded = right_padded([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
            probe = torch.zeros(len(chosen), 1, lm.d_model, device=lm.device, requires_grad=True)

            def moved(hidden: Tensor, probe: Tensor = probe) -> Tensor:
                return hidden + probe.to(hidden.dtype)

            with edit_at_block(lm.model, block, moved):
                final = decoder(lm.model)(
                    input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False
                ).last_hidden_state
            picked, places = supervised_logprobs(lm.model, final, padded["labels"])
            weight = torch.tensor([1 / rows[i].n_supervised for i in chosen], device=lm.device)
            (gradient,) = torch.autograd.grad((picked * weight[places]).sum(), probe)
            found[chosen] = gradient[:, 0].float().cpu()
    return found[1::2] - found[0::2]


def attributions(directions: Tensor, signs: Tensor, base_gradient: Tensor, plain_gradient: Tensor) -> Tensor:
    """First-order induce plus repair per unit of added norm, `[latents]`: s · d · (∇_base + ∇_mis)."""
    return signs * (directions @ (base_gradient + plain_gradient))
