"""A classifier's head in an adapter whose base is a model without it, such as the language model it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergebench.checkpoint.format import Base, Deltas
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.layouts import build, in_memory
from mergebench.deltas.peft.names import WITH_HEAD
from mergebench.errors import ModelError

_TASKS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


class Head(NamedTuple):
    """What a head makes of its base: tensors that come and go, changes to config.json."""

    added: dict[str, TensorInfo]
    removed: frozenset[str]
    config: dict[str, Any]


def new_head(directory: Path, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any], base: Base) -> Head:
    """The head of these tensors, by their names in its class; `ModelError` if they and the base are no such model."""
    if not tensors:
        return Head({}, frozenset(), {})
    brings = f"{directory}: it brings a part '{min(tensors)}', which the base does not have"
    kind = _class_of(settings, base)
    if kind is None:
        raise ModelError(brings, WITH_HEAD)
    tensors = {name: info._replace(name=name) for name, info in tensors.items()}
    all_of = {**base.tensors, **tensors}
    for labels in sorted({info.shape[0] for info in tensors.values() if info.shape}):
        names = {str(number): f"LABEL_{number}" for number in range(labels)}
        config = {"architectures": [kind], "id2label": names, "label2id": {name: int(n) for n, name in names.items()}}
        model = build({**base.config, **config})
        if model is None:
            continue
        layout = in_memory(all_of, {**base.config, **config})
        loaded = {box.source for laid in layout.values() for box in laid.boxes}
        if not tensors.keys() <= loaded or any(
            model.get_parameter(n).shape != laid.shape for n, laid in layout.items()
        ):
            continue
        lost = [name for name, _ in model.named_parameters() if name not in layout]
        if lost:
            raise ModelError(f"{brings}, and neither has the {kind}'s '{min(lost)}'", WITH_HEAD)
        buffers = {name for name, _ in model.named_buffers()}
        heads = {name for name, info in base.tensors.items() if name not in loaded and info.is_float}
        return Head(dict(tensors), frozenset(heads - buffers), config)
    raise ModelError(brings, WITH_HEAD)


def with_head(deltas: Deltas, head: Head) -> Deltas:
    """The deltas of an adapter that also has a new head."""
    if not head.added:
        return deltas
    kept = {name: delta for name, delta in deltas.deltas.items() if name not in head.removed}
    added = {name: info for name, info in deltas.added.items() if name not in head.removed}
    config = {**deltas.config, **head.config}
    return deltas._replace(deltas=kept, added={**added, **head.added}, removed=head.removed, config=config)


def _class_of(settings: Mapping[str, Any], base: Base) -> str | None:
    """The class that the adapter was trained on, if it or its task is named."""
    from transformers.models.auto import modeling_auto

    named = settings.get("auto_mapping")
    if isinstance(named, dict) and isinstance(named.get("base_model_class"), str):
        return str(named["base_model_class"])
    table = _TASKS.get(str(settings.get("task_type")))
    kinds = getattr(modeling_auto, table) if table else {}
    found = kinds.get(base.config.get("model_type"))
    return found if isinstance(found, str) else None
