"""Open the model that a reference names: a checkpoint, with the delta after each `+` on top."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergebench.checkpoint.content import identity
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.header import Header, read_header
from mergebench.checkpoint.model import Model, holds_factors, module_at, open_checkpoint
from mergebench.checkpoint.naming import find_weights
from mergebench.checkpoint.reference import locate
from mergebench.deltas.peft.directory import OTHER_MODEL, holds_no_model, is_adapter, read_directory
from mergebench.deltas.peft.foreign import refuse_foreign, refuse_foreign_file
from mergebench.deltas.peft.refused import why_refused
from mergebench.errors import ModelError

log = logging.getLogger(__name__)


def open_model(
    reference: str, *, folders: Sequence[Path] = (), task_vector: bool = False, to_run: bool = False
) -> Model:
    """Open the model a reference names, `BASE[+DELTA ...]`: reads headers only and checks them all.

    folders: where relative paths are looked up after the working directory. task_vector: its tensors are differences.
    to_run: it is for a `Network`, so that modules may be named after a plus too: no weights hold what they do.
    Raises `ModelError` if it is missing or no checkpoint, or if a delta does not fit; `RunError` if a file is damaged.
    """
    place = locate(reference, folders)
    log.debug("opening %s", reference)
    try:
        model = replace(open_checkpoint(reference, place.checkpoint), reference=reference)
    except ModelError:
        _refuse_delta(reference, place.checkpoint)
        raise
    if holds_factors(model.headers):
        what = f"model '{reference}': its linear layers are compressed to factors"
        back = f"mergebench compress expand {place.checkpoint} --out DIR"
        raise ModelError(what, f"name its base, BASE+{place.checkpoint}, or multiply them back: {back}")
    if not _is_plain(model, place.checkpoint):
        _refuse_delta(reference, place.checkpoint)
    refuse_foreign(f"model '{reference}'", model.tensors, place.checkpoint)
    for added in place.adapters:
        header = module_at(added) if to_run else None
        model = put_on(model, added) if header is None else _with_module(model, added, header)
    if task_vector and not model.adapters:
        model = replace(model, is_task_vector=True)
    return model


def _with_module(model: Model, place: Path, header: Header) -> Model:
    made_on, remarks = header.metadata.get("base"), model.remarks
    if made_on is not None and made_on != (this := identity(model)):
        remarks += (f"{place} was made on another model: its base is {made_on}, this is {this}",)
    headers, modules = [*model.headers, header], (*model.modules, header.file)
    return replace(model, headers=headers, modules=modules, adapters=(*model.adapters, place), remarks=remarks)


def put_on(model: Model, place: Path) -> Model:
    """The model with the deltas at a path added on top."""
    from mergebench.deltas import formats  # this import loads torch

    known = formats.format_of(place)
    if known is None:
        raise no_format(place)
    try:
        read = known.read(place, Base(model.reference, model.tensors, model.config, model.deltas.keys()))
    except ModelError as error:
        from mergebench.deltas.peft.other_layout import read_in_another_layout  # this import loads torch

        other = read_in_another_layout(known, place, model) if error.hint == OTHER_MODEL else None
        if other is None:
            raise
        read = other
    deltas = dict(model.deltas)
    for name in read.added:  # an alias has the deltas of its tensor
        of = next((one for one, info in model.tensors.items() if info._replace(name=name) == read.added[name]), None)
        deltas |= {name: deltas[of]} if of in deltas else {}
    for several in (read.first, read.deltas):
        for name, delta in several.items():
            deltas[name] = (*deltas.get(name, ()), delta)
    remarks = model.remarks
    if read.made_on is not None and not model.deltas and read.made_on != (this := identity(model)):
        remarks += (f"{place} was made on another model: its base is {read.made_on}, this is {this}",)
    headers, adapters = [*model.headers, *read.headers], (*model.adapters, place)
    changed = replace(model, headers=headers, deltas=deltas, adapters=adapters, remarks=remarks)
    if read.added or read.config:
        config = {**(model.config_changes or {}), **read.config}
        tensors = {name: info for name, info in model.tensors.items() if name not in read.removed} | dict(read.added)
        deltas = {name: several for name, several in deltas.items() if name in tensors}
        changed = replace(changed, tensors=tensors, deltas=deltas, config_changes=config)
    if is_adapter(place):
        _check_tied(changed, place)
    return changed


def _is_plain(model: Model, place: Path) -> bool:
    """Whether this is a model without asking the formats, which need torch."""
    named = not place.is_dir() or find_weights(place) is not None
    silent = all(header.metadata.keys() <= {"format"} for header in model.headers)
    return named and silent and any(info.is_float for info in model.tensors.values())


def _refuse_delta(reference: str, place: Path) -> None:
    """Refuse a delta in the place of a model."""
    from mergebench.deltas import formats

    if module_at(place) is not None:
        beside = f"model '{reference}': it is a module that runs beside a model, not a model"
        raise ModelError(beside, f"name its base, where a model is run: BASE+{reference}")
    known = formats.format_of(place)
    what = known.what if known is not None and known.alone(place) else None
    if known is None and is_adapter(place) and holds_no_model(place):
        what = "an adapter"
    if what is not None:
        raise ModelError(f"model '{reference}': it is {what}, not a model", f"name its base: BASE+{reference}")


def no_format(place: Path) -> ModelError:
    """The error for a path after a `+` that no format accepts."""
    from mergebench.deltas import formats

    if module_at(place) is not None:
        what = f"{place}: it is a module that runs beside the model, which no weights can hold"
        return ModelError(what, f"name it where a model is run: mergebench eval SUITE BASE+{place}")
    if is_adapter(place):
        config, _ = read_directory(place)
        kind = config.get("peft_type")
        why = why_refused(kind) or f"adapter type {kind!r} is not supported, only {formats.peft_types()}"
        return ModelError(f"{place}: {why}")
    if place.is_dir():
        read_directory(place)  # raises that it is no adapter
    if place.suffix == ".safetensors":
        read_header(place)  # raises what is wrong with the file
        refuse_foreign_file(place)
        return ModelError(f"{place}: not a patch", "a patch is what `mergebench edit` writes beside the model")
    return ModelError(f"{place}: an adapter is a directory, a patch a .safetensors file")


def _check_tied(model: Model, place: Path) -> None:
    """Refuse to change half of a tied pair: the files do not say how PEFT treats the other half."""
    from mergebench.checkpoint.values import split

    for name, deltas in model.deltas.items():
        if split(model.tensors[name], deltas)[0].file != model.tensors[name].file and is_tied(model, name):
            raise ModelError(
                f"{place}: '{name}' is saved whole, the base ties input and output embeddings",
                "fold it with PEFT's merge_and_unload() and name the model that gives",
            )


def is_tied(model: Model, name: str) -> bool:
    """Whether a tensor is one of a pair, embeddings of input and output; so too where nothing says that it is not."""
    from mergebench.checkpoint.architecture import Facts

    pair = len(model.tensors[name].shape) == 2 and _TIED.search(name) and model.config.get("tie_word_embeddings", True)
    return bool(pair) and not Facts(model.config, model.tensors).apart(name)


_TIED = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|shared|word_embeddings|lm_head|embed_out|decoder)\.weight$")
