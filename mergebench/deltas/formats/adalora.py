"""AdaLoRA as PEFT saves it: W' = W + s B diag(E) A, with s = alpha / (r + 1e-5) of the initial rank r.

The saved factors are already cut to the rank that each module was left with, which may be zero.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.checkpoint.kind import Part
from mergebench.deltas.low_rank import low_rank
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "ADALORA",
    A="lora_A",
    B="lora_B",
    E="lora_E",
    shape=lambda parts: (parts["B"].shape[0], parts["A"].shape[1]),
)
def adalora(module: Module) -> Iterator[Change]:
    """The factors of a module, unless none are left."""
    initial, alpha = module.config.get("init_r"), module.config.get("lora_alpha")
    if not isinstance(initial, int) or not isinstance(alpha, int | float) or initial < 1:
        raise module.error("init_r and lora_alpha must be numbers")
    factors, values = module.factors("B", "A"), module.part("E", None, 1)
    if module.part("B").shape[1] != values.shape[0]:
        raise module.error(f"{values.shape[0]} values E for factors of rank {module.part('B').shape[1]}")
    if values.shape[0]:
        scale = (alpha if alpha > 0 else initial) / (initial + 1e-5)
        yield Change(low_rank, {**factors, "e": Part(values)}, {"scale": scale}, shape=module.as_matrix)
