"""LoHa as PEFT saves it: four factors a module, of a convolution perhaps with two Tucker cores."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.hadamard import hadamard
from mergebench.deltas.peft.lycoris import hadamard_parts
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
    """The factors of a module, scaled by alpha / rank."""
    alpha = module.setting("alpha", "alpha_pattern")
    parts, rank = hadamard_parts(module)
    if not isinstance(alpha, int | float) or not rank:
        raise module.error(f"no scale: alpha {alpha!r}, rank {rank}")
    yield Change(hadamard, parts, {"scale": alpha / rank}, shape=module.as_matrix)
