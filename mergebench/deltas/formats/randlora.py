"""RandLoRA as PEFT saves it: two sets of scales a module, and the random bases, once for all and again for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.random_bases import random_bases
from mergebench.errors import ModelError


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    if not config.get("save_projection", True):
        text = "save_projection is false: what the random bases are depends on the machine that drew them"
        raise ModelError(f"{directory}: {text}", "fold it with PEFT's merge_and_unload() and name the model that gives")


@peft_type(
    "RANDLORA",
    A="randlora_A",
    B="randlora_B",
    own_A="randlora_A",
    own_B="randlora_B",
    ranks="randlora_lambda",
    columns="randlora_gamma",
    shared=("A", "B"),
    check=_check,
)
def randlora(module: Module) -> Iterator[Change]:
    """The scales of a module on its share of the bases."""
    ranks = module.part("ranks", None, None)
    rank, count = ranks.shape
    parts = {
        "ranks": ranks,
        "columns": module.part("columns", count, None),
        "a": module.part("A", rank, 1, None),
        "b": module.part("B", None, None, rank),
    }
    for own, all_of in (("own_A", "A"), ("own_B", "B")):
        if own in module.parts and module.parts[own].shape != module.parts[all_of].shape:
            raise module.error(f"its copy of {all_of} is {list(module.parts[own].shape)}, not as the shared one")
    alpha = module.config.get("randlora_alpha")
    if not isinstance(alpha, int | float) or not rank:
        raise module.error(f"no scale: randlora_alpha {alpha!r}, rank {rank}")
    out, inner = module.out_in
    # the products are [large, small], which is [out, in] unless there are fewer outputs
    settings = {"large": max(out, inner), "turned": (out < inner) != module.in_out, "scale": alpha / rank}
    yield Change(random_bases, parts, settings)
