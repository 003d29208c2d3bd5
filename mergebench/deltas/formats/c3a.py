"""C3A as PEFT saves it: the kernels of a module's blocks, [out / b, in / b, b]."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.circulant import circulant
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("C3A", kernel="c3a_kernel")
def c3a(module: Module) -> Iterator[Change]:
    """The kernels of a module; PEFT puts C3A only on weights stored [out, in]."""
    yield Change(circulant, {"kernel": module.part("kernel", None, None, None)})
