"""The device that models run on, and the versions of the libraries that run them."""

from __future__ import annotations

import platform
from typing import Any

import torch

import mergebench
from mergebench.errors import RunError


def device_of(name: str) -> torch.device:
    """auto (CUDA if available), cpu or cuda; `RunError` if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise RunError("no CUDA device was found", "choose --device cpu")
    return torch.device(name)


def versions() -> dict[str, Any]:
    """Library versions that a model's outputs depend on, beside its files and the device."""
    import transformers

    return {
        "mergebench": mergebench.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
