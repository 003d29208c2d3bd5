"""Uni-LoRA as PEFT saves it: one vector, and where each module's factors are in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoint.kind import Part
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.peft.names import on_stored
from mergebench.deltas.shared_vector import shared_vector
from mergebench.errors import ModelError


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    if not config.get("save_indices"):
        text = "save_indices is false: the indices depend on the order of the model's modules"
        raise ModelError(f"{directory}: {text}", "set save_indices in its config, load it with PEFT and save it again")


@peft_type(
    "UNILORA",
    vector="unilora_theta_d",
    index_a="unilora_indices_A",
    index_b="unilora_indices_B",
    scale_a="unilora_scales_A",
    scale_b="unilora_scales_B",
    shared=("vector",),
    check=_check,
    shape=lambda parts: (parts["index_b"].shape[0], parts["index_a"].shape[1]),
)
def unilora(module: Module) -> Iterator[Change]:
    """The places and scales of a module's factors."""
    parts: dict[str, Part | None] = {"vector": Part(module.part("vector", None))}
    for sort in ("index", "scale"):
        floats = sort == "scale"
        b = module.part(f"{sort}_b", None, None, floats=floats)
        a = module.part(f"{sort}_a", b.shape[1], None, floats=floats)
        parts |= {f"{sort}_{factor}": part for factor, part in on_stored(b, a, module.in_out).items()}
    yield Change(shared_vector, parts)
