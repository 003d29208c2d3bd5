"""GLoRA as PEFT saves it: five paths a module, A and B on the weight, C, D and E on the bias.

A path that is off is stored as a constant, `zeros`, which is not read.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergebench.checkpoint.header import TensorInfo
from mergebench.deltas.affine import affine
from mergebench.deltas.affine_bias import affine_bias
from mergebench.deltas.peft.module import Change, Module, peft_type

FOLD = "fold what stands before it into a model first"
_PARTS = r"(?:\.default)?\.(Xd|Xu|X|zeros)"


@peft_type(
    "GLORA",
    A=f"glora_A{_PARTS}",
    B=f"glora_B{_PARTS}",
    C=f"glora_C{_PARTS}",
    D=f"glora_D{_PARTS}",
    E=f"glora_E{_PARTS}",
)
def glora(module: Module) -> Iterator[Change]:
    """The paths of a module."""
    (times, times_in), (plus, plus_in) = _path(module, "A"), _path(module, "B")
    if times is not None or plus is not None:
        yield Change(affine, {"times": times, "times_in": times_in, "plus": plus, "plus_in": plus_in})
    (mixed, mixed_in), (times, _), (plus, _) = (_path(module, path) for path in "CDE")
    if mixed is None and times is None and plus is None:
        return
    if module.bias is None:
        raise module.error("it changes a bias, the base has none")
    if mixed is not None and module.changed:
        raise module.error("its bias depends on the weight, which another delta changes before", FOLD)
    weight = None if mixed is None else module.weight
    parts = {"times": times, "plus": plus, "weight": weight, "mixed": mixed, "mixed_in": mixed_in}
    yield Change(affine_bias, parts, tensor="bias")


def _path(module: Module, path: str) -> tuple[TensorInfo | None, TensorInfo | None]:
    """The one or two tensors of a path; none if it is off."""
    kept = {name[2:] for name in module.parts if name.startswith(f"{path}.")}
    if kept == {"zeros"}:
        return None, None
    if kept == {"X"}:
        return module.part(f"{path}.X"), None
    if kept != {"Xd", "Xu"}:
        raise module.error(f"glora_{path} is {', '.join(sorted(kept)) or 'missing'}")
    return module.part(f"{path}.Xd", None, None), module.part(f"{path}.Xu", None, None)
