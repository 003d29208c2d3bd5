"""BEFT (arXiv:2509.15974) as PEFT saves it: what is added to a module's bias, [1, out]."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.checkpoint.kind import Part
from mergebench.deltas.dense import dense
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("BEFT", added="beft_bias")
def beft(module: Module) -> Iterator[Change]:
    """The difference of a bias."""
    if module.bias is None:
        raise module.error("it changes the bias, and the base has none")
    added = module.part("added", 1, *module.bias.shape)
    yield Change(dense, {"values": Part(added._replace(shape=module.bias.shape))}, tensor="bias")
