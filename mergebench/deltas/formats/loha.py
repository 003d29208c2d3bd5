"""LoHa as PEFT saves it: four factors a module, of a convolution perhaps with two Tucker cores."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mergebench.checkpoint.kind import Part
from mergebench.deltas.hadamard import hadamard
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "LOHA",
    w1_a="hada_w1_a",
    w1_b="hada_w1_b",
    w2_a="hada_w2_a",
    w2_b="hada_w2_b",
    t1="hada_t1",
    t2="hada_t2",
)
def loha(module: Module) -> Iterator[Change]:
    """The factors of a module; with Tucker cores the first of each pair is stored [r, out]."""
    alpha = module.setting("alpha", "alpha_pattern")
    parts: dict[str, Part | None] = {}
    for number in "12":
        right = module.part(f"w{number}_b", None, None)
        rank = right.shape[0]
        tucker = f"t{number}" in module.parts
        left = module.part(f"w{number}_a", *((rank, None) if tucker else (None, rank)))
        parts |= {f"b{number}": Part(left, transposed=tucker), f"a{number}": Part(right)}
        if tucker:
            core = module.part(f"t{number}", rank, rank, None, None)
            parts[f"t{number}"] = Part(core._replace(shape=(rank, rank, math.prod(core.shape[2:]))))
    if not isinstance(alpha, int | float) or not rank:
        raise module.error(f"no scale: alpha {alpha!r}, rank {rank}")
    yield Change(hadamard, parts, {"scale": alpha / rank}, shape=module.as_matrix)
