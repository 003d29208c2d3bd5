"""LoKr as PEFT saves it: the two matrices of a Kronecker product, each whole or as factors, or with a Tucker core."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.kind import Part
from mergebench.deltas.kronecker import kronecker
from mergebench.deltas.peft.module import Change, Module, peft_type

PARTS = {"c": "w1", "c_b": "w1_a", "c_a": "w1_b", "d": "w2", "d_b": "w2_a", "d_a": "w2_b", "t": "t2"}


@peft_type(
    "LOKR",
    w1="lokr_w1",
    w1_a="lokr_w1_a",
    w1_b="lokr_w1_b",
    w2="lokr_w2",
    w2_a="lokr_w2_a",
    w2_b="lokr_w2_b",
    t2="lokr_t2",
)
def lokr(module: Module) -> Iterator[Change]:
    """The matrices of a module: the kernel of a convolution is among the columns of the second."""
    alpha, rank = module.setting("alpha", "alpha_pattern"), _rank(module)
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise module.error(f"no scale: alpha {alpha!r}, rank {rank!r}")
    if "w2" in module.parts and len(module.part("w2").shape) == 3:
        # PEFT trains it with the dimensions of the two paired from the last one on, the kernel's with inputs
        raise module.error("w2 of a convolution in one dimension is whole: its product is not a Kronecker product")
    parts: dict[str, Part | None] = {}
    for name, stored in PARTS.items():
        if stored in module.parts:
            # with a core the first factor is stored [r, rows]
            parts[name] = Part(_matrix(module.part(stored), name), name == "d_b" and "t2" in module.parts)
    yield Change(kronecker, parts, {"scale": alpha / rank}, shape=module.as_matrix)


def _rank(module: Module) -> Any:
    """The rank, which the factors tell if there are any: saving sorts the patterns, so theirs may mean another."""
    factor = next((module.parts[name] for name in ("w1_b", "w2_b") if name in module.parts), None)
    return factor.shape[0] if factor is not None and factor.shape else module.setting("r", "rank_pattern")


def _matrix(info: TensorInfo, name: str) -> TensorInfo:
    """A tensor without the dimensions of the kernel."""
    kept = 2 if name == "t" else 1
    return info._replace(shape=(*info.shape[:kept], math.prod(info.shape[kept:])))
