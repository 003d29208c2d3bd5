"""DEFT as PEFT saves it: directions of the outputs, and what is put in; without that it is PaRa."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.replaced_subspace import replaced_subspace


@peft_type("DEFT", P="deft_P", R="deft_R")
def deft(module: Module) -> Iterator[Change]:
    """The subspace of a module."""
    config, directions = module.config, module.part("P", None, None)
    method, alpha, rank = config.get("decomposition_method", "relu"), config.get("alpha"), directions.shape[1]
    if method not in ("qr", "relu"):
        raise module.error(f"decomposition_method: {method!r} is none of qr and relu")
    if config.get("para") and "R" in module.parts:
        raise module.error("para, but deft_R is there")
    content = None if config.get("para") else module.part("R", rank, None)
    settings = {"scale": alpha / rank if alpha else 1.0, "relu": method == "relu", "columns": module.in_out}
    yield Change(replaced_subspace, {"directions": directions, "content": content}, settings)
