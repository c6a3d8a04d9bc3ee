"""What is installed here, what the hardware is, and what is missing."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from blockem.errors import BlockemError

PACKAGES = (
    *("blockem", "torch", "transformers", "accelerate", "peft", "sae-lens", "gguf", "safetensors"),
    *("numpy", "scipy", "openai", "jinja2", "pyyaml", "typer"),
)


def diagnose() -> dict[str, Any]:
    """Versions, device, dtype, threads; `missing` lists what to install, as commands."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(terse=True), "packages": {}, "missing": []}
    for package in PACKAGES:
        try:
            found["packages"][package] = version(package)
        except PackageNotFoundError:
            found["packages"][package] = None
            found["missing"].append(f"pip install {package}")
    if sys.version_info < (3, 11):  # noqa: UP036 - a run from a source tree does not pass pip's check
        found["missing"].append("Python 3.11 or later")
    try:
        import torch

        from blockem.model import cache_dir, cpu_has_fast_bf16, embedded_gguf, pick_device, pick_dtype

        device = pick_device()
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        found["dtype"] = str(pick_dtype("auto", device)).removeprefix("torch.")
        found["threads"] = torch.get_num_threads()
        found["fast_bfloat16_on_cpu"] = cpu_has_fast_bf16()
        found["cache"] = str(cache_dir())
        try:
            found["embedded_model"] = embedded_gguf().name
        except BlockemError as error:
            found["embedded_model"] = None
            found["missing"].append(str(error).partition("`")[2].rstrip("`"))
    except ImportError as error:
        found["missing"].append(f"pip install {error.name}")
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The diagnosis for people."""
    rows = [f"python {found['python']} on {found['platform']}"]
    rows += [f"{name} {number or 'NOT INSTALLED'}" for name, number in found["packages"].items()]
    rows += [
        f"{name.replace('_', ' ')}: {found[name]}" for name in ("device", "dtype", "threads", "cache", "embedded_model") if name in found
    ]
    rows.append("missing: " + "; ".join(found["missing"]) if found["missing"] else "nothing is missing")
    return rows
