"""The layouts of a model's files: as published, and as transformers holds the model in memory.

transformers renames, splits, stacks and transposes the tensors of many architectures when it loads them, and some files
(of FSDP, of trainers, of `save_original_format=False`) have those of memory. Its own code says how each element of one
lies in the other: here it loads tensors that hold no data (`traced.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from mergebench.checkpoint.boxes import Box, Laid, through

Layout = dict[str, Laid]  # tensors by name, as boxes of stored ones by name


class Shaped(Protocol):
    """A tensor, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports; problems are raised as errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # nothing below critical
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def build(config: Mapping[str, Any], kind: str | None = None) -> Any:
    """A class of transformers built without data; None if it is missing or rejects the config.

    kind: its name; by default what the config says, else the class without a head.
    """
    import torch
    import transformers

    name = kind or str((config.get("architectures") or [""])[0])
    try:
        with quiet(), torch.inference_mode(False), torch.device("meta"):
            if name:
                made = getattr(transformers, name)
                return made(made.config_class.from_dict(_read(config)))
            found = transformers.AutoConfig.for_model(**_read(config))
            return transformers.AutoModel.from_config(found, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception:
        return None


def _read(value: Any) -> Any:
    """A part of config.json as transformers reads it: `{"__float__": "Infinity"}` is a number."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _read(v) for k, v in value.items()}
    return [_read(one) for one in value] if isinstance(value, list) else value


def in_memory(tensors: Mapping[str, Shaped], config: Mapping[str, Any], kind: str | None = None) -> Layout:
    """The tensors of memory that transformers makes of stored ones; {} if it does not know the model."""
    return _loaded(tensors, config, kind)[0]


def as_published(tensors: Mapping[str, Shaped], config: Mapping[str, Any], kind: str | None = None) -> Layout:
    """The tensors that transformers saves by default, made of stored ones in any layout."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from mergebench.checkpoint.traced import Traced

    layout, model = _loaded(tensors, config, kind)
    if not layout:
        return {}
    del model._weight_conversions  # those of this load alone: all are wanted
    try:
        with quiet(), torch.inference_mode(False):
            saved = revert_weight_conversion(model, {name: Traced(laid) for name, laid in layout.items()})
    except Exception:
        return {}
    return {name: tensor.laid for name, tensor in saved.items()}


def _loaded(tensors: Mapping[str, Shaped], config: Mapping[str, Any], kind: str | None) -> tuple[Layout, Any]:
    model = build(config, kind)
    if model is None:
        return {}, None
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    from mergebench.checkpoint.traced import Traced, traced

    try:
        with quiet(), torch.inference_mode(False):
            stored = {name: traced(name, info.shape) for name, info in tensors.items()}
            how = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model))  # type: ignore[arg-type]
            convert_and_load_state_dict_in_model(model, stored, how)
            values = model.state_dict()
    except Exception:  # a rule of transformers that its own code cannot apply: other rules may
        return {}, None
    return {name: value.laid for name, value in values.items() if isinstance(value, Traced)}, model


def read_as(wanted: Layout, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """A model's tensors as those of another: `wanted` and `layout` make the same tensors of the one's and the other's.

    shapes: of the tensors of `wanted`. Only tensors that are complete are found.
    """
    boxes: dict[str, list[Box]] = {}
    found: Layout = {}
    for name, theirs in wanted.items():
        ours = layout.get(name)
        if ours is None:
            continue
        other = _all_of(theirs, shapes)
        if other is not None:  # nothing but the name and shape changes: an embedding may have other rows
            found[other] = ours.reshaped(shapes[other]) if ours.shape == theirs.shape else ours
        elif ours.shape == theirs.shape:
            for source, box in through(ours, theirs):
                boxes.setdefault(source, []).append(box)
    made = {name: Laid(tuple(shapes[name]), tuple(several)) for name, several in boxes.items()}
    return found | {name: laid for name, laid in made.items() if laid.is_complete}


def renamed(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The layout's names of stored tensors that have only another name there, or the same."""
    names = {_all_of(laid, shapes): name for name, laid in layout.items()}
    return {stored: name for stored, name in names.items() if stored is not None}


def inverse(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The stored tensors as boxes of the layout's, by name."""
    boxes: dict[str, list[Box]] = {}
    for name, laid in layout.items():
        for box in laid.boxes:
            boxes.setdefault(box.source, []).append(Box(box.counts, box.start, box.strides, name, box.at, box.steps))
    return {name: Laid(tuple(shapes[name]), tuple(several)) for name, several in boxes.items()}


def _all_of(laid: Laid, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor whose elements these are, all of them in order."""
    if len(laid.boxes) != 1:
        return None
    box: Box = laid.boxes[0].with_fewest_axes()
    return box.source if box.is_run and box.numel == math.prod(shapes[box.source]) else None
