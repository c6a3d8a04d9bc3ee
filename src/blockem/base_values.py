"""Base latents once: z^base of every supervised token of a training set, computed in one truncated pass and kept on disk.

z^base depends on data, base model, encoder rows and measure only, not on λ, epoch, seed or the order of rows. A row is known by the
digest of its tokens and of what is supervised, so that values can be taken out for any batch in any order, and never for another row.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blockem.errors import BlockemError
from blockem.examples import IGNORED, Encoded
from blockem.fused import cpu_attention
from blockem.model import LanguageModel
from blockem.progress import Progress
from blockem.states import supervised_states
from blockem.store import content_key, write_tensors

SHARD = 256  # rows a file: what a killed pass can lose


def row_digest(ids: np.ndarray[tuple[int], np.dtype[np.int64]], supervised: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> bytes:
    """16 bytes that name a row: its token ids without padding, and which of them are supervised."""
    return hashlib.blake2b(ids.astype(np.int64).tobytes() + supervised.astype(np.bool_).tobytes(), digest_size=16).digest()


def digest_of(row: Encoded) -> bytes:
    """The same of an encoded row."""
    return row_digest(np.array(row.ids, np.int64), np.array(row.supervised, np.bool_))


@dataclass
class BaseValues:
    """z^base by row.

    Attributes:
        rows: `[supervised tokens of the row, latents]`, float32, by digest.
        seconds: how long the pass took; 0 where everything was read from disk.
    """

    rows: dict[bytes, Tensor]
    seconds: float = 0.0

    def of(self, batch: dict[str, Tensor]) -> Tensor:
        """z^base at the supervised positions of a padded batch, `[supervised, latents]`, float32, row by row.

        Raises:
            BlockemError: the batch holds a row that the values were not computed for.
        """
        ids, mask, labels = (batch[name].cpu().numpy() for name in ("input_ids", "attention_mask", "labels"))
        found = []
        for row, kept, label in zip(ids, mask.astype(bool), labels, strict=True):
            values = self.rows.get(row_digest(row[kept], label[kept] != IGNORED))
            if values is None:
                raise BlockemError(
                    "the base values were computed for other training rows than these; compute them again, or set block.base_values=online"
                )
            found.append(values)
        return torch.cat(found).to(batch["labels"].device)


def values_key(lm: LanguageModel, reader_key: str, rows: Sequence[Encoded]) -> str:
    """Names base values: model and revision, dtype, device, encoder rows and measure, and the set of rows."""
    weight = next(lm.model.parameters())
    digests = sorted({digest_of(row).hex() for row in rows})
    return content_key("base values", lm.id, lm.revision, str(weight.dtype), weight.device.type, reader_key, digests)


def collect(
    lm: LanguageModel,
    read: Callable[[dict[int, Tensor]], Tensor],
    blocks: Sequence[int],
    reader_key: str,
    rows: Sequence[Encoded],
    folder: Path | None = None,
    batch: int = 32,
    progress: Progress | None = None,
) -> BaseValues:
    """Base values of `rows`, from `folder` where they are kept there, else computed and kept.

    Every file is written whole, so a killed pass goes on with the first missing one.

    Args:
        read: latents `[tokens, latents]` from the outputs `[tokens, d_model]` of `blocks` (`Blocker.read`).
        reader_key: names what `read` reads (`Blocker.key`).
        folder: where to keep them, by content key; None keeps nothing.
        batch: rows a forward.
    """
    began = time.monotonic()
    unique = {digest_of(row): row for row in rows}
    order = sorted(unique.items(), key=lambda one: (-len(one[1].ids), one[0]))  # whatever order the rows came in
    place = None if folder is None else folder / values_key(lm, reader_key, rows)
    found: dict[bytes, Tensor] = {}
    computed = False
    for number, start in enumerate(range(0, len(order), SHARD)):
        shard = order[start : start + SHARD]
        path = None if place is None else place / f"{number:05}.safetensors"
        values = None if path is None else _read(path, shard)
        if values is None:
            computed = True
            values = _compute(lm, read, blocks, shard, batch, start, len(order), progress)
            if path is not None:
                _write(path, shard, values)
        found |= dict(zip([digest for digest, _ in shard], values, strict=True))
    return BaseValues(found, time.monotonic() - began if computed else 0.0)


def _compute(
    lm: LanguageModel,
    read: Callable[[dict[int, Tensor]], Tensor],
    blocks: Sequence[int],
    shard: Sequence[tuple[bytes, Encoded]],
    batch: int,
    done: int,
    total: int,
    progress: Progress | None,
) -> list[Tensor]:
    rows = [row for _, row in shard]  # longest first already, so that they come back in order
    told = None if progress is None else lambda so_far, _: progress(done + so_far, total)
    with torch.inference_mode(), cpu_attention(lm.model):
        z = torch.cat([read(states["base"]).float().cpu() for states in supervised_states(lm, rows, ("base",), blocks, batch, told)])
    return [piece.clone() for piece in z.split([row.n_supervised for row in rows])]


def _write(path: Path, shard: Sequence[tuple[bytes, Encoded]], values: Sequence[Tensor]) -> None:
    names = torch.from_numpy(np.frombuffer(b"".join(digest for digest, _ in shard), dtype=np.uint8).copy()).view(len(shard), -1)
    lengths = torch.tensor([len(value) for value in values])
    write_tensors(path, {"values": torch.cat(list(values)), "rows": names, "lengths": lengths})


def _read(path: Path, shard: Sequence[tuple[bytes, Encoded]]) -> list[Tensor] | None:
    """The values of a shard if the file is whole and of exactly these rows, else None."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        stored = load_file(path)
        names, lengths, values = stored["rows"].numpy().tobytes(), stored["lengths"].tolist(), stored["values"]
    except (SafetensorError, KeyError, OSError):
        return None
    if names != b"".join(digest for digest, _ in shard) or lengths != [row.n_supervised for _, row in shard] or len(values) != sum(lengths):
        return None
    return [piece.clone() for piece in values.split(lengths)]
