"""HRA as PEFT saves it: the normals of planes, at which the inputs of a linear layer or convolution are reflected."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.reflected import reflected


@peft_type("HRA", u="hra_u")
def hra(module: Module) -> Iterator[Change]:
    """The planes of a module."""
    settings = {"orthogonal": bool(module.config.get("apply_GS"))}
    yield Change(reflected, {"normals": module.part("u", None, None)}, settings, shape=module.out_in)
