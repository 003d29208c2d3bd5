"""PEANuT as PEFT saves it: A and B of the outputs, and the hidden layers between them."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peanut import peanut as kind
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type(
    "PEANUT",
    A="peanut_A",
    B="peanut_B",
    encoders=r"peanut_encoders(?:\.default)?\.(\d+)",
    decoders=r"peanut_decoders(?:\.default)?\.(\d+)",
)
def peanut(module: Module) -> Iterator[Change]:
    """The network of a module."""
    config, depth = module.config, module.config.get("depth") or 0
    layers = {name: info for name, info in module.parts.items() if name not in ("A", "B")}
    if len(layers) != 2 * depth:
        raise module.error(f"depth: {depth}, but {len(layers)} hidden layers")
    parts = {"b": module.part("B", None, None), "a": module.part("A", None, None), **layers}
    scale = config.get("scaling")
    settings = {"scale": 1.0 if scale is None else float(scale), "activation": config.get("act_fn") or "relu"}
    yield Change(kind, parts, settings)
