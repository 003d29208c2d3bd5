"""The device that models run on, and the versions of the libraries that run them."""

from __future__ import annotations

import platform
from typing import Any

import torch

import mergebench
from mergebench.engine.machine import device_of

__all__ = ["device_of", "versions"]


def versions() -> dict[str, Any]:
    """Library versions that a model's outputs depend on, beside its files and the device."""
    import transformers

    return {
        "mergebench": mergebench.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
