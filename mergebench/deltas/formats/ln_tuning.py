"""LN tuning (arXiv:2312.11420) as PEFT saves it: weight and bias of norms, and of any other module, as trained."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.dense import dense
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("LN_TUNING", bias=r"ln_tuning_layers(?:\.default)?\.bias", weight="ln_tuning_layers")
def ln_tuning(module: Module) -> Iterator[Change]:
    """Weight and bias of a norm, replaced."""
    yield Change(dense, {"values": module.part("weight", *module.weight.shape)}, {"replace": True})
    if "bias" in module.parts:
        if module.bias is None:
            raise module.error("it has a bias, and the base has none")
        yield Change(dense, {"values": module.part("bias", *module.bias.shape)}, {"replace": True}, tensor="bias")
    elif module.bias is not None:
        raise module.error("the bias is missing")
