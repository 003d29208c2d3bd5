"""LiST's adapters (arXiv:2110.06274), linear bottlenecks behind linear layers, as its authors' code saves them.

    MODULE.adaptation_layer.adapter_proj_1.weight    A1 [a, out]
    MODULE.adaptation_layer.adapter_proj_2.weight    A2 [out, a]

h + A2 A1 h of h = W x + b, the output of MODULE.dense, is the layer with W + A2 A1 W and b + A2 A1 b. Other tensors of
the checkpoint, such as its trained head, take the place of the base's.
"""

from __future__ import annotations

import re
from pathlib import Path

from mergebench.checkpoint.format import Base, Deltas, delta_format
from mergebench.checkpoint.header import Header, TensorInfo, read_header
from mergebench.checkpoint.kind import Part
from mergebench.checkpoint.model import open_directory
from mergebench.checkpoint.naming import find_weights
from mergebench.deltas.peanut import peanut
from mergebench.deltas.peft.names import Placing
from mergebench.errors import MergebenchError, ModelError

_FACTOR = re.compile(r"(.+)\.adaptation_layer\.adapter_proj_([12])\.weight")


def _headers(place: Path) -> list[Header]:
    if place.is_dir():
        return open_directory(str(place), place) if find_weights(place) else []
    return [read_header(place)] if place.suffix == ".safetensors" and place.is_file() else []


def _claims(place: Path) -> bool:
    """Whether a checkpoint has such adapters."""
    try:
        return any(_FACTOR.fullmatch(info.name) for header in _headers(place) for info in header.tensors)
    except MergebenchError:
        return False


@delta_format(what="LiST's adapters", claims=_claims)
def list_(place: Path, base: Base) -> Deltas:
    """What the adapters change; `ModelError` where they are for another base, or do not stand behind their layer."""
    headers = _headers(place)
    factors: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for info in (info for header in headers for info in header.tensors):
        found = _FACTOR.fullmatch(info.name)
        if found is not None:
            factors.setdefault(found[1], {})[found[2]] = info
        elif info.is_float:  # integers are buffers, such as the numbers of positions
            whole[info.name] = info
    weights = {f"{module}.dense.weight": module for module in factors}
    shapes = {**dict.fromkeys(weights), **{name: info.shape for name, info in whole.items()}}
    placing, below = Placing(place, base, shapes), Placing(place, base, shapes)
    below.put_whole(whole)
    for weight, module in weights.items():
        if factors[module].keys() != {"1", "2"}:
            raise ModelError(f"{place}: {module}: an adapter has two projections, this one has one")
        down, up = factors[module]["1"], factors[module]["2"]
        if down.shape != up.shape[::-1]:
            what = f"projections {list(down.shape)} and {list(up.shape)} are not behind the layer but beside it"
            raise ModelError(f"{place}: {module}: {what}", "that is a LoRA of scale 1: save it as PEFT does")
        parts: dict[str, Part | None] = {"b": Part(up), "a": Part(down)}
        placing.put(weight, module, peanut, parts, activation="linear")
        bias = placing.known(weight.removesuffix("weight") + "bias")
        if bias is not None:
            placing.put_on(bias, module, peanut, parts, activation="linear", columns=True)
    return Deltas(placing.deltas, headers, first=below.deltas)
