"""SHiRA as PEFT saves it: values [k] and their rows and columns, int32 [2, k]. PEFT's scale is 1 after loading."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.scattered import scattered


@peft_type("SHIRA", values="shira_weight", indices="shira_indices")
def shira(module: Module) -> Iterator[Change]:
    """The elements of a module that change."""
    indices = module.parts.get("indices")
    if module.in_out:
        raise module.error("fan_in_fan_out: PEFT puts SHiRA only on weights stored [out, in]")
    if indices is None:
        raise module.error("indices are missing")
    if indices.is_float:
        raise module.error(f"indices are {indices.dtype}, as PEFT saves them on Windows: save it on another system")
    yield Change(scattered, {"values": module.part("values", None), "indices": indices})
