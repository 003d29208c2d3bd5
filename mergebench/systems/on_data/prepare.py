"""`data:` of a recipe's models: before the merge, the models run over the texts, and their statistics are written.

They lie beside the result, in OUT.statistics, and are used again by a merge of the same models on the same texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mergebench import __version__
from mergebench.checkpoint.content import identity, sha256_of
from mergebench.checkpoint.measured import FILE, names_of, read_measured, read_measured_of
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.target import STAGES, check_target, stays
from mergebench.engine.job import Merge
from mergebench.engine.plan import Plan
from mergebench.engine.provenance import places
from mergebench.errors import MergebenchError, RecipeError
from mergebench.networks.device import versions
from mergebench.networks.loadable import ticking
from mergebench.parameters import Parameter, param, parameters_of
from mergebench.recipe import Recipe
from mergebench.recipe.declared import Reader
from mergebench.recipe.open import folders
from mergebench.systems.on_data.adamerging import learn
from mergebench.systems.on_data.answers import answers_of, needs_labels
from mergebench.systems.on_data.regmean_plusplus import grams_of_merged
from mergebench.systems.on_data.settings import Settings
from mergebench.systems.on_data.statistics import Progress, about_model, check_one_stack, measured, write
from mergebench.systems.on_data.texts import Data, read_data


@dataclass(frozen=True, kw_only=True)
class _Written(Settings):
    """The keys of `data:` in a recipe."""

    file: Path = param(help="texts: JSON lines, a JSON list or CSV")


@dataclass(frozen=True)
class _Declared:
    name: str
    params: type
    parameters: Mapping[str, Parameter]


def with_data(merge: Merge, recipe: Recipe) -> Merge:
    """The merge with the texts of its `data:` read and checked; itself if there are none."""
    if not merge.data:
        return merge
    reader, declared = Reader(recipe.places, folders(recipe)), _Declared("data", _Written, parameters_of(_Written))
    read = []
    for number, model in zip(merge.data, merge.models, strict=True):
        entry, loc = recipe.models[number], ("models", number, "data")
        given = {"file": entry.data} if isinstance(entry.data, str) else dict(entry.data or {})
        found = reader.params(declared, given, loc)
        settings = Settings(**{key: value for key, value in vars(found).items() if key != "file"})
        read.append(read_data(found.file, settings, needs_labels(model, str(merge.method.statistics), settings)))
    if merge.method.statistics == "coefficients" and merge.by_tensor:
        what = f"'{merge.method.name}' learns its own factors, its parameters are one value each"
        raise recipe.places.error(("parameters",), what)
    if merge.method.statistics == "coefficients" and merge.method.name != "adamerging":
        raise RecipeError(f"'{merge.method.name}' reads coefficients:", "give each model its statistics: DIR")
    texts = sum(len(one.texts) for one in read)
    return replace(merge, data=tuple(read), notes=(*merge.notes, f"before the merge, models run over {texts:,} texts"))


def prepare(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """The plan with the statistics that its `data:` is to make, made now or read again; itself if it has none.

    progress: called with the texts done, and how many will be: of RegMean++ once a block, of AdaMerging at each step.
    """
    merge = plan.merge
    if not merge.data:
        return plan
    check_target(out, places(plan), overwrite or resume)
    for model in [merge.reference, *merge.models]:
        check_one_stack(model)
    files = [_folder(out) / task / FILE for task in merge.tasks]
    digest = _digest(merge)
    if not all(_made(file) == digest for file in files):
        _make(plan, files, digest, progress)
    kind, name = str(merge.method.statistics), merge.method.name
    found = [read_measured_of(file, model, kind, name) for file, model in zip(files, merge.models, strict=True)]
    ready = replace(plan, merge=replace(merge, statistics=tuple(found), data=()))
    assert ready.on_data is not None
    return ready


def _make(plan: Plan, files: Sequence[Path], digest: str, progress: Progress) -> None:
    merge, data, device = plan.merge, plan.merge.data, plan.device
    kind, total = merge.method.statistics, sum(len(one.texts) for one in data)
    if merge.method.name == "regmean_plusplus":
        total *= int(merge.reference.config.get("num_hidden_layers") or 1)
    elif kind == "coefficients":
        total = merge.params.steps * merge.params.batch * len(data)
    tick = ticking(progress, total)
    if merge.method.name == "regmean_plusplus":
        found, inputs_first = grams_of_merged(plan, data, device, tick)
        for number, file in enumerate(files):
            own = {_own(merge, plan, number, name): value for name, value in found[number].items()}
            first = [_own(merge, plan, number, name) for name in inputs_first]
            write(file, own, _about(merge, number, digest) | {"inputs_first": first})
    elif kind == "coefficients":
        learnt = learn(plan, data, device, tick)
        for number, file in enumerate(files):
            factors = learnt.coefficients[number]
            own = {_own(merge, plan, number, name): torch.tensor(value) for name, value in factors.items()}
            write(file, own, _about(merge, number, digest, entropy=learnt.entropy))
    else:
        for model, one, file in zip(merge.models, data, files, strict=True):
            measured(model, one, str(kind), file, device, tick, digest=digest)


def _own(merge: Merge, plan: Plan, number: int, name: str) -> str:
    """The name that a model's statistics have for a merged tensor."""
    info = plan.alignment.sources[name][number]
    return names_of(merge.models[number]).get(info.place, info.name)


def _about(merge: Merge, number: int, digest: str, **made: Any) -> dict[str, Any]:
    about = merge.data[number].about()
    made = {**versions(), "method": merge.method.name, "digest": digest, **made}
    return {"kind": merge.method.statistics, **about_model(merge.models[number]), **about, "made": made}


def _digest(merge: Merge) -> str:
    """What the statistics depend on."""
    made_of = {
        "method": merge.method.name,
        "models": [identity(model) for model in [merge.reference, *merge.models]],
        "data": [one.about() for one in merge.data],
        "heads": [
            _head(model, one, merge.method.statistics) for model, one in zip(merge.models, merge.data, strict=True)
        ],
        "parameters": [vars(merge.params), {name: vars(one) for name, one in merge.by_tensor.items()}],
        "merged": [merge.include, merge.exclude, merge.seed],
        "mergebench": __version__,
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()


def _head(model: Model, data: Data, kind: str | None) -> str | None:
    """A hash of the head that a model answers by."""
    head = answers_of(model, data.settings).head if kind != "gram" else None
    return None if head is None else sha256_of(head.file)


def _made(file: Path) -> str | None:
    """The digest of statistics that are there."""
    try:
        return str(read_measured(file).about.get("made", {}).get("digest"))
    except MergebenchError:
        return None


def _folder(out: Path) -> Path:
    """Where a merge keeps what it made of its data: beside its result, or in it where it is a mounted volume."""
    if stays(Path(os.path.realpath(out))):
        return out / STAGES / "statistics"
    place = out if out.name not in ("", "..") else Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.statistics")
