"""Sparse autoencoders: loading through SAELens, encoder rows of chosen latents, decoder directions, and how well one fits.

SAELens takes seconds to import, so it is imported inside the functions that need it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockem.errors import BlockemError
from blockem.examples import Example, by_length, content_only, content_start, padded_ids, template_ids
from blockem.forwards import hidden_at_each
from blockem.model import LanguageModel

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parent / "assets" / "sae" / "smollm2-135m-instruct-block18"


@dataclass
class Dictionary:
    """An SAE read at the output of one block.

    Attributes:
        sae: the SAELens module, frozen, float32.
        id: how it was asked for (`bundled`, a folder, or `release:sae_id`).
        digest: hash of its weights; a LatentSet remembers it.
        block: the block it was trained on, where its config says so.
    """

    sae: Any
    id: str
    digest: str
    block: int | None

    @property
    def d_in(self) -> int:
        return int(self.sae.cfg.d_in)

    @property
    def n_latents(self) -> int:
        return int(self.sae.cfg.d_sae)

    def directions(self, latents: Sequence[int] | Tensor) -> Tensor:
        """Decoder directions d_k scaled to unit length, `[latents, d_model]`, float32."""
        rows: Tensor = self.sae.W_dec.detach()[torch.as_tensor(latents, dtype=torch.long)].float()
        unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return unit

    def encode(self, hidden: Tensor) -> Tensor:
        """Dense activations z of every latent, `[..., n_latents]`, float32 (see `EncoderRows`)."""
        return self.rows(range(self.n_latents)).encode(hidden)

    def rows(self, latents: Sequence[int]) -> EncoderRows:
        """The encoder restricted to `latents`: everything that training-time blocking needs of the SAE."""
        return EncoderRows.of(self.sae, latents)

    def reconstruct(self, hidden: Tensor) -> Tensor:
        """The SAE's own sparse reconstruction of `[tokens, d_model]`, float32."""
        with torch.inference_mode():
            found: Tensor = self.sae.decode(self.sae.encode(hidden.float()))
            return found.float()


@dataclass
class EncoderRows:
    """z_k = act(weight_k · h + bias_k) for chosen latents, in float32.

    The activation is ReLU, also for Top-K and BatchTopK SAEs, whose sparse code is not used (BLOCK-EM's own code does the
    same); JumpReLU keeps its threshold. A pre-encoder bias and a decoder-norm scale are folded into weight and bias.

    Attributes:
        weight: `[latents, d_model]`.  bias: `[latents]`.  threshold: `[latents]` or None.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor | None = None

    @classmethod
    def of(cls, sae: Any, latents: Sequence[int]) -> EncoderRows:
        cfg = sae.cfg
        if cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise BlockemError(
                f"this SAE normalises its input by {cfg.normalize_activations!r}, which blocking does not support; "
                "use one with normalize_activations none"
            )
        if getattr(sae, "b_enc", None) is None:
            raise BlockemError(f"SAEs of architecture {cfg.architecture()!r} have no plain encoder; use standard, top-k or JumpReLU")
        index = torch.as_tensor(list(latents), dtype=torch.long)
        weight = sae.W_enc.detach().float()[:, index].T.contiguous()
        bias = sae.b_enc.detach().float()[index].clone()
        if cfg.apply_b_dec_to_input:
            bias = bias - weight @ sae.b_dec.detach().float()
        if getattr(cfg, "rescale_acts_by_decoder_norm", False):
            norm = sae.W_dec.detach().float()[index].norm(dim=-1)
            weight, bias = weight * norm[:, None], bias * norm
        threshold = getattr(sae, "threshold", None)
        return cls(weight, bias, threshold.detach().float()[index].clone() if threshold is not None else None)

    def to(self, device: torch.device) -> EncoderRows:
        threshold = self.threshold.to(device) if self.threshold is not None else None
        return EncoderRows(self.weight.to(device), self.bias.to(device), threshold)

    def pre(self, hidden: Tensor) -> Tensor:
        """Pre-activations `[..., latents]` of `hidden [..., d_model]`, float32."""
        return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)

    def encode(self, hidden: Tensor) -> Tensor:
        """Activations z `[..., latents]` of `hidden [..., d_model]`, float32."""
        pre = self.pre(hidden)
        if self.threshold is None:
            return torch.relu(pre)
        return torch.where(pre > self.threshold, torch.relu(pre), torch.zeros_like(pre))


def load_dictionary(name: str = BUNDLED, device: str | torch.device = "cpu") -> Dictionary:
    """Load an SAE.

    Args:
        name: `bundled` (for the embedded model), a folder in SAELens format (`cfg.json`, `sae_weights.safetensors`), or
            `release:sae_id` of the SAELens registry.
        device: where its weights go.

    Raises:
        BlockemError: there is no such SAE, or it cannot be read.
    """
    folder = BUNDLED_FOLDER if name == BUNDLED else Path(name)
    is_folder = folder.is_dir()
    if is_folder and not (folder / "cfg.json").is_file():
        raise BlockemError(f"{folder} is no SAE in SAELens format: cfg.json is missing")
    if is_folder and not (folder / "sae_weights.safetensors").is_file():
        raise BlockemError(f"{folder} is no SAE in SAELens format: sae_weights.safetensors is missing")
    if not is_folder and ":" not in name:
        raise BlockemError(f"no SAE {name!r}: give `bundled`, a folder with cfg.json, or `release:sae_id` of the SAELens registry")
    from sae_lens import SAE

    try:
        if is_folder:
            sae = SAE.load_from_disk(folder, device=str(device), dtype="float32")
        else:
            release, _, sae_id = name.partition(":")
            _refuse_pickle(release, sae_id)
            sae = SAE.from_pretrained(release, sae_id, device=str(device), dtype="float32")
    except BlockemError:
        raise
    except Exception as error:  # the registry raises many kinds: unknown names, no network, bad files
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BlockemError(f"cannot load SAE {name!r}: {reason}") from error
    sae.eval().requires_grad_(False)
    digest = _digest(sae)
    return Dictionary(sae, name, digest, _block_of(sae))


PICKLED = ("connor_rob_hook_z", "deepseek_r1", "dictionary_learning_1", "goodfire", "qwen_scope")
"""SAELens' readers that call torch.load, some of them on files that a release does not name."""


def _refuse_pickle(release: str, sae_id: str) -> None:
    """Some releases are PyTorch pickles; those are converted once by whoever trusts them, and read as safetensors from then on."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory().get(release)
    path = str(entry.saes_map.get(sae_id, "")) if entry is not None else ""
    if path.endswith((".pt", ".pth", ".bin", ".pkl")) or (entry is not None and entry.conversion_func in PICKLED):
        convert = f"from sae_lens import SAE; SAE.from_pretrained('{release}', '{sae_id}').save_model('my_sae')"
        raise BlockemError(
            f"SAE {release}:{sae_id} is published as a pickle ({path}), which blockem does not read; convert it once where you trust it, "
            f'`python -c "{convert}"`, and give --sae my_sae'
        )


def _digest(sae: Any) -> str:
    digest = hashlib.sha256()
    for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
        if getattr(sae, key, None) is not None:
            digest.update(getattr(sae, key).detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _block_of(sae: Any) -> int | None:
    """The block index in SAELens' hook name: `blocks.18.hook_resid_post` and `model.layers.18` are both block 18."""
    hook = str(getattr(sae.cfg.metadata, "hook_name", None) or "")
    numbers = [int(part) for part in hook.split(".") if part.isdigit()]
    if not numbers:
        return None
    return numbers[0] - 1 if hook.endswith("hook_resid_pre") else numbers[0]


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits a model at a block.

    Attributes:
        variance_explained: 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over tokens of the conversation itself.
        dead_share: share of latents that the sparse code never used on those tokens.
        mean_active: mean number of latents in the sparse code of a token (L0).
        tokens: how many tokens were measured.
    """

    variance_explained: float
    dead_share: float
    mean_active: float
    tokens: int


def activations(
    lm: LanguageModel,
    examples: Sequence[Example],
    block: int,
    max_tokens: int = 256,
    limit: int | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Residual-stream activations `[tokens, d_model]` at the output of `block`, in the model's dtype, on the CPU.

    The leading tokens that every row shares (system message, user header, and with them the attention sink of enormous norm) are left
    out: they are constant, and would make any dictionary look better than it is.
    """
    return activations_at(lm, examples, [block], max_tokens, limit, batch_tokens, progress)[block]


def activations_at(
    lm: LanguageModel,
    examples: Sequence[Example],
    wanted: Sequence[int],
    max_tokens: int = 256,
    limit: int | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """The same at several blocks, `[tokens, d_model]` each, from one pass; all of them are in memory at once."""
    for block in wanted:
        lm.check_block(block)
    rows: list[list[int]] = []
    starts: list[int] = []
    for example in examples:
        messages = example.chat()
        ids = template_ids(lm.tokenizer, messages)[:max_tokens]
        start = content_start(lm.tokenizer, messages)
        if len(ids) > start:
            rows.append(ids)
            starts.append(start)
    kept: dict[int, list[Tensor]] = {block: [] for block in wanted}
    total = done = 0
    width = max((len(row) for row in rows), default=1)
    batches = by_length([len(row) for row in rows], max(1, batch_tokens // width))
    generator = torch.Generator().manual_seed(0)
    for place in torch.randperm(len(batches), generator=generator).tolist():
        chosen = batches[place]
        padded, mask = padded_ids([rows[i] for i in chosen], lm.tokenizer.pad_token_id, lm.device)
        with torch.inference_mode():
            hidden = hidden_at_each(lm.model, padded, mask, wanted)
        content = content_only(mask, [starts[i] for i in chosen])
        for block, output in hidden.items():
            kept[block].append(output[content].cpu())
        total += int(content.sum())
        done += len(chosen)
        if progress:
            progress(done, len(rows))
        if limit is not None and total >= limit:
            break
    if not total:
        raise BlockemError("the chat data holds no token to read activations from")
    return {block: torch.cat(pieces)[:limit] for block, pieces in kept.items()}


def measure_fit(dictionary: Dictionary, acts: Tensor) -> Fit:
    """Variance explained and dead latents of `dictionary` on `acts [tokens, d_model]`."""
    mean = acts.float().mean(dim=0)
    residual = total = active = 0.0
    fired = torch.zeros(dictionary.n_latents, dtype=torch.bool)
    with torch.inference_mode():
        for chunk in acts.split(4096):
            x = chunk.float()
            code = dictionary.sae.encode(x)
            residual += float((x - dictionary.sae.decode(code)).pow(2).sum())
            total += float((x - mean).pow(2).sum())
            active += float((code != 0).sum())
            fired |= (code != 0).any(dim=0)
    return Fit(1 - residual / max(total, 1e-12), float((~fired).float().mean()), active / len(acts), len(acts))


def check_fit(
    dictionary: Dictionary, lm: LanguageModel, block: int, examples: Sequence[Example], minimum: float, allow: bool, limit: int = 20000
) -> Fit:
    """Measure the fit on the user's own model and refuse an SAE that does not belong to it.

    Raises:
        BlockemError: wrong width, a limit below two tokens, or variance explained below `minimum` and not `allow`.
    """
    check_width(dictionary, lm)
    if limit < 2:
        raise BlockemError(f"{limit} tokens have no variance that an SAE could explain; measure on at least 2")
    fit = measure_fit(dictionary, activations(lm, examples, block, limit=limit))
    if not fit.variance_explained >= minimum and not allow:
        raise BlockemError(
            f"SAE {dictionary.id!r} explains {fit.variance_explained:.2f} of the variance of {lm.id} at block {block}, less than "
            f"{minimum:.2f}: it was made for another model or block; set sae.block, or --allow-poor-sae to go on all the same"
        )
    return fit


def check_width(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raise unless the SAE reads vectors as wide as the model's residual stream."""
    if dictionary.d_in != lm.d_model:
        raise BlockemError(
            f"SAE {dictionary.id!r} reads {dictionary.d_in} values but the residual stream of {lm.id} has {lm.d_model}; "
            "choose an SAE that was trained on this model"
        )


def read_card(folder: Path) -> dict[str, Any]:
    """The facts beside an SAE that `blockem sae train` wrote (`card.json`); empty where there are none."""
    path = folder / "card.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
