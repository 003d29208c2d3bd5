"""GraLoRA as PEFT saves it: the factors of all blocks in two tensors, perhaps those of a LoRA beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mergebench.deltas.blocks import blocks
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "GRALORA",
    A="gralora_A",
    B="gralora_B",
    general_A="gralora_A_general",
    general_B="gralora_B_general",
    shape=lambda parts: (math.prod(parts["B"].shape[::2]), math.prod(parts["A"].shape[:2])),
)
def gralora(module: Module) -> Iterator[Change]:
    """The blocks of a module; the rank that divides alpha is that of both forms together."""
    left = module.part("B", None, None, None)
    parts = {"b": left, "a": module.part("A", left.shape[0], None, left.shape[1])}
    rank, alpha = left.shape[1], module.config.get("alpha")
    if "general_A" in module.parts or "general_B" in module.parts:
        parts["general_b"] = module.part("general_B", None, None)
        parts["general_a"] = module.part("general_A", parts["general_b"].shape[1], None)
        rank += parts["general_a"].shape[0]
    if not isinstance(alpha, int | float) or not rank:
        raise module.error(f"no scale: alpha {alpha!r}, rank {rank}")
    yield Change(blocks, parts, {"scale": alpha / rank, "columns": module.in_out})
