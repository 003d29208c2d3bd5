"""PVeRA as PEFT saves it: VeRA, with a mean and a variance for every rank. What is merged is the mean."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.formats.vera import shared
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "PVERA",
    A="pvera_A",
    B="pvera_B",
    outputs="pvera_lambda_b",
    ranks="pvera_lambda_d",
    shared=("A", "B"),
)
def pvera(module: Module) -> Iterator[Change]:
    """The vectors of a module on its share of the matrices."""
    yield shared(module, halves=2)
