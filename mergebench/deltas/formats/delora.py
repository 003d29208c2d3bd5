"""DeLoRA as PEFT saves it: two factors, a strength and the norms of the base's columns."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.normalised import normalised
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "DELORA",
    A="delora_A",
    B="delora_B",
    strength="delora_lambda",
    norms="delora_w_norm",
    shape=lambda parts: (parts["B"].shape[0], parts["A"].shape[1]),
)
def delora(module: Module) -> Iterator[Change]:
    """The factors of a module, and what scales them."""
    factors = module.factors("B", "A")
    more = {"strength": module.part("strength", 1), "norms": module.part("norms", module.out_in[1])}
    yield Change(normalised, {**factors, **more})
