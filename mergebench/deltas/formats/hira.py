"""A HiRA directory as PEFT saves it: two factors a module, tensors saved whole. It has no alpha."""

from __future__ import annotations

import re
from pathlib import Path

from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.deltas.multiplicative import multiplicative
from mergebench.deltas.peft.directory import by_module, holds_no_model, of_type, read_directory
from mergebench.deltas.peft.names import Placing, on_stored
from mergebench.errors import ModelError

_PARTS = {
    "A": re.compile(r"(.+)\.hira_A(?:\.default)?"),
    "B": re.compile(r"(.+)\.hira_B(?:\.default)?"),
}


@delta_format(what="an adapter", claims=of_type("HIRA"), alone=holds_no_model)
def hira(directory: Path, base: Base) -> Deltas:
    """What a HiRA directory changes."""
    config, header = read_directory(directory)
    modules, whole = by_module(directory, header, config, _PARTS)
    in_out = bool(config.get("fan_in_fan_out"))
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    for module, parts in modules.items():
        if parts.keys() != _PARTS.keys() or any(len(part.shape) != 2 for part in parts.values()):
            raise ModelError(f"{directory}: {module}: it needs hira_A and hira_B, two matrices")
        shape = parts["B"].shape[0], parts["A"].shape[1]
        shapes[f"{module}.weight"] = shape[::-1] if in_out else shape
    placing = Placing(directory, base, shapes)
    for module, parts in modules.items():
        placing.put(f"{module}.weight", module, multiplicative, on_stored(parts["B"], parts["A"], in_out))
    placing.put_whole(whole)
    return Deltas(placing.deltas, [header])
