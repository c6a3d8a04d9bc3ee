"""SafeLoRA: after training, move updates that leave the alignment direction back onto it (Hsu et al. 2024).

For each linear map with V = W_aligned − W_unaligned and a LoRA update ΔW = s B A, let C = V Vᵀ / ‖V‖_F. Where
cos(ΔW, C ΔW) lies below a threshold, ΔW becomes C ΔW; elsewhere it stays.

Nothing of size out × out is ever held: C is only applied to B, and the cosine is taken over products of size r × r.

**What V is.** The published V needs the base model from before its alignment (`model_alignment`). Where there is none, the plain
fine-tune stands in for the unaligned model, V = −ΔW_plain (`plain_alignment`). That is a much weaker thing, and is to be read as a
control: C does not know the sign of V, so it keeps what lies in the columns that plain fine-tuning itself used, strongest first, and
drops the rest. An update like the plain one has a cosine near 1 and is kept whole at the usual thresholds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blockem.defences.defence import Defence
from blockem.errors import BlockemError
from blockem.forwards import block_list, blocks, unwrapped
from blockem.model import LanguageModel
from blockem.store import write_json, write_tensors

PREFIX = "base_model.model."
Alignment = Callable[[str, Tensor], Tensor]
"""C·B `[out, r]` from the name of a linear map and its B `[out, r]`, float32."""


def read_lora(adapter: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """A `[r, in]` and B `[out, r]`, float32, of each adapted map by name, and the scale s of the folder's config."""
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    found = {}
    for key, a in stored.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            found[stem.removeprefix(PREFIX)] = (a.float(), stored[f"{stem}.lora_B.weight"].float())
    return found, config["lora_alpha"] / config["r"]


def plain_alignment(adapter: Path) -> Alignment:
    """C of V = −s B_p A_p, the plain fine-tune's update taken back: s² B_p (A_p A_pᵀ)(B_pᵀ B) / ‖V‖_F.

    A map that plain fine-tuning did not change has no direction: there B stays as it is.
    """
    updates, scale = read_lora(adapter)

    def apply(name: str, b: Tensor) -> Tensor:
        if name not in updates:
            return b
        a_p, b_p = updates[name]
        gram = a_p @ a_p.T
        length = scale * float(((b_p.T @ b_p) * gram).sum().clamp_min(0).sqrt())
        return scale**2 * (b_p @ (gram @ (b_p.T @ b))) / length if length > 0 else b

    return apply


def model_alignment(lm: LanguageModel, folder: Path) -> Alignment:
    """C of V = W − W_unaligned, the base model's weights less those of `folder`, read one map at a time: V (Vᵀ B) / ‖V‖_F.

    Raises:
        BlockemError: the folder holds no safetensors, or lacks a linear map of the model's blocks, or has it in another shape.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:  # type: ignore[no-untyped-call]
                for key in file.keys():  # noqa: SIM118
                    files[key], shapes[key] = path, list(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise BlockemError(f"{path} cannot be read as safetensors ({error}); give the unaligned model's folder") from error
    if not files:
        raise BlockemError(f"defence.unaligned is {folder}, which holds no safetensors; give the folder of the model before its alignment")
    for name, weight in _linear_weights(lm).items():
        if shapes.get(f"{name}.weight") != list(weight.shape):
            was = shapes.get(f"{name}.weight")
            raise BlockemError(
                f"defence.unaligned: {folder} has {name}.weight {'not at all' if was is None else f'as {was}'}, but {lm.id} has it as "
                f"{list(weight.shape)}; give the same model from before its alignment"
            )

    def apply(name: str, b: Tensor) -> Tensor:
        with safe_open(str(files[f"{name}.weight"]), "pt") as file:  # type: ignore[no-untyped-call]
            unaligned = file.get_tensor(f"{name}.weight").float()
        v = _linear_weights(lm)[name].detach().float().cpu() - unaligned
        moved: Tensor = v @ (v.T @ b) / v.norm().clamp_min(1e-12)
        return moved

    return apply


def _linear_weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The weights of the linear maps in the blocks by name, also under adapters."""
    inner = unwrapped(lm.model)
    owner, listed = block_list(lm.model)
    prefix = next(name for name, module in inner.named_modules() if module is owner)
    found = {}
    for number, block in enumerate(blocks(lm.model)):
        for name, module in block.named_modules():
            part: Any = getattr(module, "base_layer", module)
            if isinstance(part, nn.Linear) and "lora_" not in name and not name.endswith("base_layer"):
                found[".".join(filter(None, [prefix, listed, str(number), name]))] = part.weight
    return found


def similarity(a: Tensor, b: Tensor, projected: Tensor) -> float:
    """cos(BA, PA) by r × r products alone: A `[r, in]`, B and P `[out, r]`; 1 for an update of zero."""
    gram = a @ a.T
    inner = float(((b.T @ projected) * gram).sum())
    lengths = [float(((one.T @ one) * gram).sum().clamp_min(0).sqrt()) for one in (b, projected)]
    return inner / max(lengths[0] * lengths[1], 1e-30) if lengths[0] > 0 else 1.0


class SafeLoRA(Defence):
    """SafeLoRA as a defence: plain training, then the projection; `safelora.json` in the adapter's folder says what was projected.

    Args:
        alignment: C·B by name (`model_alignment` or `plain_alignment`).
        threshold: the cosine below which an update is projected.
    """

    name = "safelora"

    def __init__(self, alignment: Alignment, threshold: float) -> None:
        self.alignment, self.threshold = alignment, threshold

    def project(self, adapter: Path) -> None:
        from safetensors.torch import load_file

        updates, _ = read_lora(adapter)
        path = adapter / "adapter_model.safetensors"
        stored = load_file(path)
        cosines = {}
        for name, (a, b) in updates.items():
            moved = self.alignment(name, b)
            cosines[name] = similarity(a, b, moved)
            if cosines[name] < self.threshold:
                key = f"{PREFIX}{name}.lora_B.weight"
                stored[key] = moved.to(stored[key].dtype)
        write_tensors(path, stored, {"format": "pt"})
        projected = sum(one < self.threshold for one in cosines.values())
        write_json(adapter / "safelora.json", {"threshold": self.threshold, "projected": projected, "cosines": cosines})
