"""The factors of LoHa and LoKr, as LyCORIS names them and PEFT has it from there."""

from __future__ import annotations

import math

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.deltas.peft.module import Module

_KRONECKER = {"c": "w1", "c_b": "w1_a", "c_a": "w1_b", "d": "w2", "d_b": "w2_a", "d_a": "w2_b", "t": "t2"}


def hadamard_parts(module: Module) -> tuple[dict[str, Part | None], int]:
    """The parts of LoHa, and its rank; with Tucker cores the first of each pair of factors is stored [r, out]."""
    parts: dict[str, Part | None] = {}
    rank = 0
    for number in "12":
        right = module.part(f"w{number}_b", None, None)
        rank = right.shape[0]
        tucker = f"t{number}" in module.parts
        left = module.part(f"w{number}_a", *((rank, None) if tucker else (None, rank)))
        parts |= {f"b{number}": Part(left, transposed=tucker), f"a{number}": Part(right)}
        if tucker:
            core = module.part(f"t{number}", rank, rank, None, None)
            parts[f"t{number}"] = Part(core._replace(shape=(rank, rank, math.prod(core.shape[2:]))))
    return parts, rank


def kronecker_parts(module: Module) -> tuple[dict[str, Part | None], int | None]:
    """The parts of LoKr, and its rank, None where both matrices are whole; a kernel is among the columns of the
    second."""
    parts: dict[str, Part | None] = {}
    for name, stored in _KRONECKER.items():
        if stored in module.parts:
            # with a core the first factor is stored [r, rows]
            parts[name] = Part(_matrix(module.part(stored), name), name == "d_b" and "t2" in module.parts)
    factor = next((module.parts[name] for name in ("w1_b", "w2_b") if name in module.parts), None)
    return parts, factor.shape[0] if factor is not None and factor.shape else None


def _matrix(info: TensorInfo, name: str) -> TensorInfo:
    """A tensor without the dimensions of the kernel."""
    kept = 2 if name == "t" else 1
    return info._replace(shape=(*info.shape[:kept], math.prod(info.shape[kept:])))
