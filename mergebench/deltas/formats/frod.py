"""FRoD as PEFT saves it: what each module trains, and for each kind of module one basis and the places of S."""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.deltas.peft.module import Change, Module, peft_type
from mergebench.deltas.rebased import rebased


@peft_type(
    "FROD",
    shared=("V", "places", "size"),
    V=r"frod_V\.([^.]+)",
    places=r"frod_s_indices\.([^.]+)",
    size=r"frod_s_size\.([^.]+)",
    scales="frod_lambda_l",
    values="frod_lambda_s_values",
)
def frod(module: Module) -> Iterator[Change]:
    """A module's change in the basis of the file, which PEFT computes again from the base."""
    inner, category = module.out_in[1], _category(module.name)
    if f"V.{category}" not in module.parts or f"places.{category}" not in module.parts:
        raise module.error(f"no basis '{category}' is saved", "save it with save_projection=True")
    basis, places = module.part(f"V.{category}", inner, inner), module.parts[f"places.{category}"]
    scales, values = module.part("scales", inner), module.part("values", None)
    if f"size.{category}" in module.parts:
        module.part(f"size.{category}", 2, floats=False)
    parts = {"basis": basis, "scales": scales, "values": values, "places": places}
    yield Change(rebased, parts, {"columns": module.in_out})


def _category(module: str) -> str:
    """The name by which PEFT shares bases: the last two names of a module, or one after a layer's number."""
    names = module.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    category = "_".join(names[-2:])
    return "attention_output" if category == "output_dense" and names[-3:-2] == ["attention"] else category
