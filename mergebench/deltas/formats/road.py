"""RoAd as PEFT saves it: angles and scales of pairs of outputs, which turn a layer's bias too."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.paired import paired
from mergebench.deltas.peft.module import Change, Module, peft_type


@peft_type("ROAD", theta="road_theta", alpha="road_alpha")
def road(module: Module) -> Iterator[Change]:
    """The rotations of a module's outputs: of the weight's rows, and of the bias."""
    group, variant = module.config.get("group_size", 64), str(module.config.get("variant", "road_1"))
    out, inner = module.out_in
    if variant not in ("road_1", "road_2", "road_4"):
        raise module.error(f"variant: {variant} is none of road_1, road_2 and road_4")
    if not isinstance(group, int) or group < 2 or out % group:
        raise module.error(f"group_size: {group!r} does not divide {out} outputs")
    parts = {"theta": module.part("theta", None), "alpha": module.part("alpha", None)}
    settings = {"group": group, "variant": int(variant[-1])}
    yield Change(paired, parts, settings, shape=(out // group, group * inner))
    if module.bias is not None:
        yield Change(paired, parts, settings, tensor="bias", shape=(out // group, group))
