"""IA3 as PEFT saves it: a vector a module, of its outputs [out, 1], or of a feed-forward module its inputs [1, in]."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.checkpoint.kind import Part
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.scaled import scaled


@peft_type("IA3", l="ia3_l")
def ia3(module: Module) -> Iterator[Change]:
    """Rows or columns scaled, and with the rows the bias."""
    vector = module.part("l")
    out, inner = module.out_in
    if vector.shape not in ((out, 1), (1, inner)):
        raise module.error(f"a vector {list(vector.shape)}, the base's weight is {[out, inner]}")
    outputs = vector.shape == (out, 1)
    flat = {"factors": Part(vector._replace(shape=(vector.numel,)))}
    yield Change(scaled, flat, {"columns": outputs == module.in_out})
    if outputs and module.bias is not None:
        yield Change(scaled, flat, {"columns": True}, tensor="bias")
