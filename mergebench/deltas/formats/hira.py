"""HiRA as PEFT saves it: W' = W + W * (B A), two factors a module. It has no alpha."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.multiplicative import multiplicative
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("HIRA", A="hira_A", B="hira_B", shape=lambda parts: (parts["B"].shape[0], parts["A"].shape[-1]))
def hira(module: Module) -> Iterator[Change]:
    """The factors of a module."""
    yield Change(multiplicative, module.factors("B", "A"))
