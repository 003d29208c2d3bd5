"""Read a model under the base's tensor names and in its layout."""

from __future__ import annotations

from dataclasses import replace

from mergebench.checkpoint.align import is_derived
from mergebench.checkpoint.experts import fuse_deltas, read_experts
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.layouts import in_memory, read_as
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.moved import move
from mergebench.checkpoint.names import describe, is_vocabulary, match
from mergebench.errors import ModelError


def adopt(base: Model, model: Model) -> Model:
    """`model` with its tensors under the base's names where a known rule applies, and remarks on the changes."""
    if all(name in base.tensors and _alike(info, base.tensors[name]) for name, info in model.tensors.items()):
        return model
    found = _by_names(base, model)
    if _fits(base, found):
        return found
    return _by_transformers(base, model) or found


def _fits(base: Model, model: Model) -> bool:
    """Whether the model has the base's tensors and no others, in their shapes."""
    own, theirs = ({n: info for n, info in one.tensors.items() if not is_derived(info)} for one in (base, model))
    return own.keys() == theirs.keys() and all(_alike(info, theirs[name]) for name, info in own.items())


def _alike(info: TensorInfo, other: TensorInfo) -> bool:
    return info.shape == other.shape or is_vocabulary(info.name)


def _by_names(base: Model, model: Model) -> Model:
    """The model by rules that need no more than names and shapes."""
    try:
        tensors, remark = read_experts(base, model)
    except ModelError:  # reported later if it matters: the experts may be excluded
        tensors, remark = model.tensors, None
    remarks = [remark] if remark else []
    found = match({name: info.shape for name, info in tensors.items() if not is_derived(info)}, base.tensors)
    if found:
        remarks.append(f"{_count(len(found))} read under other names ({describe(found)})")
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


def _by_transformers(base: Model, model: Model) -> Model | None:
    """The model as transformers loads both; None if it does not know them, or no tensor changes."""
    from mergebench.checkpoint.assembled import assemble  # this import loads torch

    kind = (base.config.get("architectures") or [None])[0]
    config = model.config or base.config
    if not base.config or config.get("model_type") != base.config.get("model_type"):
        return None
    layout = in_memory(model.tensors, config, kind)
    wanted = in_memory(base.tensors, base.config, kind) if layout else {}
    found = read_as(wanted, layout, {name: info.shape for name, info in base.tensors.items()})
    changed = {
        laid.boxes[0].source: name
        for name, laid in found.items()
        if name not in model.tensors or laid.shape != model.tensors[name].shape
    }
    if not changed:
        return None
    used = {box.source for laid in layout.values() for box in laid.boxes}
    tensors = {name: assemble(name, laid, model.tensors) for name, laid in found.items()}
    tensors |= {name: info for name, info in model.tensors.items() if name not in used and name not in tensors}
    remark = f"{_count(len(changed))} read as transformers converts them ({describe(changed)})"
    deltas = {name: several for name, several in model.deltas.items() if name in tensors and name not in used}
    deltas |= move(model.deltas, found, model.tensors) if model.deltas else {}
    return replace(model, tensors=tensors, deltas=deltas, remarks=(*model.remarks, remark))


def _count(tensors: int) -> str:
    return f"{tensors} tensor{'s' * (tensors > 1)}"
