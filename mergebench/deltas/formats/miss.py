"""MiSS as PEFT saves it: a matrix a module, repeated over its inputs; or of the form `bat`, a matrix for r outputs."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.blockwise import blockwise
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.repeated import repeated


@peft_type("MISS", block="miss_block")
def miss(module: Module) -> Iterator[Change]:
    """The matrices of a module; the form `mini` repeats them over the outputs too."""
    form, (out, inner) = module.config.get("init_weights"), module.out_in
    if form == "bat":
        yield Change(blockwise, {"blocks": module.part("block", None, None, None)})
    else:
        width = module.config.get("mini_r", 1) if form == "mini" else out
        yield Change(repeated, {"block": module.part("block", None, width)}, {"width": inner})
