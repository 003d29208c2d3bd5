"""TinyLoRA as PEFT saves it: fixed factors and projections a module, and trained vectors that modules may share.

No name in the file says which vector is a module's: that follows from the module's place in the model. The projections
tell the place, because they are drawn from the seed plus its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mergebench.checkpoint.files import Files, whole
from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.peft.names import on_stored
from mergebench.deltas.projected_core import projected_core

CLOSE = 0.01  # relative: beside a bfloat16 base the projections were rounded to it


@peft_type(
    "TINYLORA",
    v=r"tinylora_v(?:\.default)?\.(\d+)",
    A="tinylora_A",
    B="tinylora_B",
    P="tinylora_P",
    shared=("v",),
    shape=lambda parts: (parts["B"].shape[0], parts["A"].shape[1]),
)
def tinylora(module: Module) -> Iterator[Change]:
    """The factors of a module around its core."""
    if "P" not in module.parts:
        raise module.error("no P is saved: the projections depend on the order of the model's modules")
    b = module.part("B", None, None)
    a = module.part("A", b.shape[1], None)
    in_out = module.in_out and module.weight.shape == (a.shape[1], b.shape[0])  # an embedding is never [in, out]
    projections = module.part("P", None, b.shape[1], b.shape[1])
    vector = module.part(f"v.{_group(module)}", projections.shape[0])
    parts = {**on_stored(b, a, in_out), "projections": projections, "vector": vector}
    yield Change(projected_core, parts, {"columns": in_out})


@lru_cache(1024)
def _drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.normal(0.0, shape[-1] ** -0.5, shape, generator=random)


def _group(module: Module) -> int:
    """The number of the module's vector."""
    vectors = {part for part in module.parts if part.startswith("v.")}
    if vectors == {"v.0"}:
        return 0
    tying, count = module.config.get("weight_tying", 0.0), len(module.all)
    if not isinstance(tying, int | float) or not 0 <= tying <= 1:
        raise module.error(f"weight_tying is {tying!r}")
    groups = max(1, round(count * (1.0 - float(tying))))  # of neighbours
    return min(_place(module) // max(1, count // groups), groups - 1)


def _place(module: Module) -> int:
    """The number of the module in the model, from its projections."""
    with Files() as files:
        stored = whole(files, module.parts["P"]).float()
    seed = module.config.get("projection_seed")
    if isinstance(seed, int):
        drawn = (_drawn(seed + place, stored.shape) for place in range(len(module.all)))
        places = [at for at, one in enumerate(drawn) if torch.allclose(one, stored, rtol=CLOSE, atol=1e-5)]
        if len(places) == 1:
            return places[0]
    raise module.error(f"P is not drawn from projection_seed {seed}: which vector is the module's cannot be told")
