"""Refuse checkpoints with packed integer weights (GPTQ, AWQ, bitsandbytes, ...), recognised by names, types and config.

Packed weights do not merge: the codes mean nothing without scales and tables, and are rounded. FP8 and FP4 checkpoints
are read by `fp8.py` and `fp4.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mergebench.checkpoint.fp8 import SETTINGS
from mergebench.checkpoint.model import Model
from mergebench.errors import ModelError

_ENDS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ",
    ".SCB": "bitsandbytes", ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors", "_blocks": "MXFP4", ".blocks": "MXFP4", ".W_q": "HQQ", ".codes": "AQLM",
    ".weight._data": "quanto",
}  # fmt: skip
_ALL_ENDS = tuple(_ENDS)
_WEIGHTS = ("weight", ".gate_up_proj", ".down_proj")
_PACKED = ("U8", "I8", "I16", "I32")
_WAY_OUT = "merge the models it was made from, and quantize the result; or exclude its tensors"


def check_not_packed(model: Model, wanted: Callable[[str], bool]) -> None:
    """`ModelError` if tensors to be merged are packed."""
    settings = next((model.config[key] for key in SETTINGS if isinstance(model.config.get(key), dict)), None)
    for name, info in model.tensors.items():
        sign = name.endswith(_ALL_ENDS) and next(kind for end, kind in _ENDS.items() if name.endswith(end))
        if not sign or (sign != "bitsandbytes" and info.is_float):
            weight = info.dtype in _PACKED and len(info.shape) >= 2 and name.endswith(_WEIGHTS)
            if settings is None or not weight:
                continue
        if not wanted(name):
            continue
        kind = _method(settings) or sign
        raise ModelError(
            f"model '{model.reference}' is quantized{f' ({kind})' if kind else ''}: "
            f"packed integers such as {name} do not merge",
            _WAY_OUT,
        )


def _method(settings: dict[str, Any] | None) -> str | None:
    """The quantization method as the config names it."""
    found = None if settings is None else settings.get("quant_method") or settings.get("quant_algo")
    return found if isinstance(found, str) else None
