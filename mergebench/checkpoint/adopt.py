"""Read a model under the base's tensor names and layout (experts fused or apart)."""

from __future__ import annotations

from dataclasses import replace

from mergebench.checkpoint.align import is_derived
from mergebench.checkpoint.experts import fuse_deltas, read_experts
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import describe, match
from mergebench.errors import ModelError


def adopt(base: Model, model: Model) -> Model:
    """`model` with its tensors under the base's names where a known rule applies, and remarks on the changes."""
    if model.tensors.keys() <= base.tensors.keys():
        return model
    try:
        tensors, remark = read_experts(base, model)
    except ModelError:  # reported later if it matters: the experts may be excluded
        tensors, remark = model.tensors, None
    remarks = [remark] if remark else []
    found = match({name: info.shape for name, info in tensors.items() if not is_derived(info)}, base.tensors)
    if found:
        number = f"{len(found)} tensor{'s' * (len(found) > 1)}"
        remarks.append(f"{number} read under other names ({describe(found)})")
    if not remarks:
        return model
    deltas = fuse_deltas(model.deltas, tensors) if model.deltas else {}
    named = {found.get(name, name): info for name, info in tensors.items()}
    return replace(
        model,
        tensors={name: info if info.name == name else info._replace(name=name) for name, info in named.items()},
        deltas={found.get(name, name): several for name, several in deltas.items()},
        remarks=(*model.remarks, *remarks),
    )
