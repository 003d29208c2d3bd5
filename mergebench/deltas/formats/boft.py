"""BOFT as PEFT saves it: blocks by factors of the butterfly, and a factor for each output."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.butterfly import butterfly
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("BOFT", R="boft_R", s="boft_s")
def boft(module: Module) -> Iterator[Change]:
    """The rotations of a module's inputs, and the factors of its outputs."""
    if module.in_out:
        raise module.error("fan_in_fan_out: PEFT has no BOFT of such layers")
    blocks, factors = module.part("R", None, None, None, None), module.part("s", None, None)
    if factors.shape[0] == 1 != module.out_in[0]:  # of a convolution, [1, out]
        factors = factors._replace(shape=factors.shape[::-1])
    yield Change(butterfly, {"blocks": blocks, "factors": factors}, shape=module.out_in)
