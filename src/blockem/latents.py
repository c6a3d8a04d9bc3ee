"""The LatentSet: what discovery makes and defences use, so that neither needs to know the other."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blockem.dictionary import Dictionary
from blockem.errors import BlockemError
from blockem.model import LanguageModel
from blockem.store import read_json, write_json

FORMAT = 1
CONTENT = re.compile(r"^(?:[0-9a-f]{16}|[0-9a-f]{40})$")
"""A revision that only equal files can share: a folder's fingerprint, or a hub's commit."""


@dataclass(frozen=True)
class Latent:
    """One causal latent. `sign` is +1 when misalignment raises it (K+) and −1 when it lowers it (K−).

    Of a latent that was found in a group (`discover.group`), gains and strengths are those of the group's one edit.

    Attributes:
        delta: Δ_k, mean activation in the misaligned model minus in the base.
        induce: gain in misalignment when the base is steered by +α s d.
        repair: fall in misalignment when the misaligned model is steered by −α s d.
        induce_alpha, repair_alpha: the strengths α at which these were measured.
        score: what it was ranked by.
    """

    latent: int
    sign: int
    delta: float = 0.0
    induce: float = math.nan
    repair: float = math.nan
    induce_alpha: float = math.nan
    repair_alpha: float = math.nan
    score: float = math.nan


@dataclass(frozen=True)
class LatentSet:
    """Signed latents of one SAE at one block of one model.

    Attributes:
        model, revision: the base model it was made for.
        sae, sae_digest: the SAE it was made for.
        block: block index from 0.
        latents: in order of rank.
        norm: m, the median residual norm that strengths are multiples of.
        provenance: how it was made.
    """

    model: str
    revision: str
    sae: str
    sae_digest: str
    block: int
    latents: tuple[Latent, ...]
    norm: float = math.nan
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = [latent.latent for latent in self.latents]
        if len(set(ids)) != len(ids):
            raise BlockemError("a LatentSet names the same latent twice")
        if any(latent.sign not in (1, -1) for latent in self.latents):
            raise BlockemError("the sign of a latent must be 1 or -1")

    @property
    def ids(self) -> list[int]:
        return [latent.latent for latent in self.latents]

    @property
    def signs(self) -> list[int]:
        return [latent.sign for latent in self.latents]

    def save(self, path: str | Path) -> None:
        """Write the set as JSON, atomically; NaN becomes null."""
        row = {"format": FORMAT, **asdict(self)}
        row["latents"] = [_finite(asdict(latent)) for latent in self.latents]
        write_json(Path(path), _finite(row))

    @classmethod
    def load(cls, path: str | Path) -> LatentSet:
        """Read a LatentSet.

        Raises:
            BlockemError: the file is missing, no LatentSet, or of a later format.
        """
        row = read_json(Path(path), "LatentSet")
        try:
            if row.pop("format") > FORMAT:
                raise BlockemError(f"{path}: made by a later blockem; upgrade to read it")
            given: list[dict[str, Any]] = row.pop("latents")
            latents = tuple(_latent(one) for one in given)
            row["norm"] = math.nan if row.get("norm") is None else row["norm"]
            if not all(isinstance(number, int) for number in [row["block"], *(one.latent for one in latents)]):
                raise TypeError("block and latents must be whole numbers")
            return cls(latents=latents, **row)
        except (KeyError, TypeError, AttributeError) as error:
            raise BlockemError(f"{path}: not a LatentSet ({error})") from error

    def union(self, other: LatentSet) -> LatentSet:
        """Both sets by latent id: this one's latents in their order, then those that only `other` has.

        A latent in both keeps this set's figures and this set's sign, also where the two signs conflict: the first set was found on a
        model that nothing held back, so its sign says where fine-tuning itself pulls, while a later one may show a latent that was
        pushed past the base. Such latents are listed in the provenance (`conflicts`).

        Raises:
            BlockemError: the sets are of different models, SAEs or blocks.
        """
        for what in ("sae_digest", "block") if self._is_for(other.model, other.revision) else ("model", "revision"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise BlockemError(
                    f"two LatentSets unite only for the same model, SAE and block, but their {what} differ: {mine}, {theirs}"
                )
        known = dict(zip(self.ids, self.signs, strict=True))
        added = tuple(one for one in other.latents if one.latent not in known)
        conflicts = [one.latent for one in other.latents if known.get(one.latent, one.sign) != one.sign]
        provenance = {"stage": "union", "added": len(added), "conflicts": conflicts, "sets": [self.provenance, other.provenance]}
        return replace(self, latents=self.latents + added, provenance=provenance)

    def _is_for(self, model: str, revision: str) -> bool:
        """Whether that is the model it was made for: equal content, wherever it lies, or else the same name and revision."""
        return revision == self.revision and (model == self.model or bool(CONTENT.match(revision)))

    def check(self, lm: LanguageModel, dictionary: Dictionary) -> None:
        """Refuse a model or SAE that the set was not made for.

        Raises:
            BlockemError: with what differs.
        """
        if not self._is_for(lm.id, lm.revision):
            raise BlockemError(
                f"this LatentSet was made for {self.model} (revision {self.revision}), not for {lm.id} ({lm.revision}); "
                "run `blockem discover` on this model"
            )
        if self.sae_digest != dictionary.digest:
            raise BlockemError(
                f"this LatentSet was made with SAE {self.sae!r} ({self.sae_digest}), not with {dictionary.id!r} ({dictionary.digest})"
            )
        lm.check_block(self.block)
        if self.latents and not 0 <= min(self.ids) <= max(self.ids) < dictionary.n_latents:
            raise BlockemError(f"this LatentSet names latent {max(self.ids)}, but the SAE has {dictionary.n_latents}")


def _latent(row: dict[str, Any]) -> Latent:
    values: dict[str, Any] = {k: math.nan if v is None else v for k, v in row.items()}
    return Latent(**values)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
