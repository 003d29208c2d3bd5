"""The merge of one point after another: planned anew, but nothing is asked twice, and small models stay in memory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergebench.checkpoint.content import sha256_of
from mergebench.checkpoint.files import Files
from mergebench.checkpoint.side_files import copy_side_files, decisive_files
from mergebench.deltas.open import open_model
from mergebench.editing.apply import write_planned
from mergebench.engine import trace
from mergebench.engine.answers import Known
from mergebench.engine.cluster import assigned_cores
from mergebench.engine.inmemory import InMemory
from mergebench.engine.job import Merge
from mergebench.engine.machine import available_memory
from mergebench.engine.method import Method
from mergebench.engine.plan import Plan, plan_merge
from mergebench.engine.provenance import fingerprint_of
from mergebench.engine.replay import run_at_once
from mergebench.engine.run import run_in_memory, run_plan
from mergebench.engine.statistics import Statistic
from mergebench.errors import MergebenchError
from mergebench.methods import get as get_method
from mergebench.recipe import Recipe
from mergebench.recipe.edited import with_edits
from mergebench.recipe.resolve import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from mergebench.evaluation import LoadableModel

SHARE = 8  # a result of up to one part in so many of the free memory stays there


@dataclass(frozen=True)
class Merged:
    """A merged model in memory, until the next one."""

    reference: str
    side_directory: Path
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.float() if value.is_floating_point() else value for name, value in self.tensors.items()}


class Candidates:
    """The merges of a recipe with other parameters, one after another, in a folder of their own for what must be files;
    then those of a recipe with another method of the same models.

    Where lambda is the last thing that a method multiplies by (which is tried on toy chunks), what it gives at lambda 1
    is kept: another lambda is then a scaled task vector added to the base, bit for bit what the method would give.
    limits: memory and workers, as `plan_merge` takes them.
    """

    def __init__(self, folder: Path, device: str, in_memory: bool | None = None, **limits: Any) -> None:
        self._folder, self._in_memory, self._limits = folder, in_memory, {"device": device, **limits}
        self._begin(None)

    def _begin(self, method: Method | None) -> None:
        """Forget what was kept of the merges of another method."""
        self._method, self._known = method, Known()
        self._target: InMemory | None = None
        self._vector: tuple[Any, InMemory, Plan] | None = None  # the parameters it was made with, but for lambda
        self._before_edits: str | None = None  # what lies in the folder

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it begins anew, in a folder of its own, with the cores that the process has."""
        return _elsewhere, (self._folder, self._in_memory, self._limits)

    def plan(self, recipe: Recipe) -> Plan:
        """The merge of a recipe with its edits; raises what planning them raises."""
        return with_edits(plan_merge(resolve(recipe), **self._limits), recipe)

    def merge(self, plan: Plan, name: str) -> LoadableModel:
        """Merge; the model is good until the next one. Raises `RunError` where the method refuses or gives NaN."""
        if plan.merge.method is not self._method:
            self._begin(plan.merge.method)
        if plan.merge.edits:
            return self._edited(plan, name)
        if not self._stays(plan):
            return open_model(str(run_plan(plan, self._folder / "model", overwrite=True, known=self._known).out))
        if self._target is None:
            self._target = InMemory(plan.shards)
            self._folder.mkdir(parents=True, exist_ok=True)
            copy_side_files(plan.merge.reference, self._folder, None)
        plan = self._scaled(plan) if _ends_with_lambda(plan.merge) else plan
        run_in_memory(plan, self._target, self._known)
        return Merged(name, self._folder, self._target.tensors)

    def _edited(self, plan: Plan, name: str) -> Merged:
        """The merge, which is made anew only if it is another, with a patch for each edit on top: in all bits what its
        edited files would hold."""
        place = self._folder / "model"
        recipe = {key: value for key, value in plan.merge.recipe.items() if key != "edits"}
        merge = replace(plan, merge=replace(plan.merge, edits=(), recipe=recipe))
        made = fingerprint_of(merge)
        if made != self._before_edits:
            self._before_edits = None  # it is overwritten
            run_plan(merge, place, overwrite=True, known=self._known)
            self._before_edits = made
        model = open_model(str(place))
        for number, edit in enumerate(plan.merge.edits):
            patch = self._folder / f"patch-{number}.safetensors"
            if write_planned(edit, model, patch)["rows"]:
                model = open_model(f"{model.reference}+{patch}")
        with Files() as files:
            values = model.values(files)
            tensors = {
                info.name: values.elements(info.name, 0, info.numel).view(info.shape)
                if info.is_float
                else values.whole(info.name)
                for info in model.tensors.values()
            }
        return Merged(name, place, tensors)

    def key(self, plan: Plan) -> str:
        """What tells the merge of a plan, with its config and tokenizer, from all others: for stored results."""
        files = decisive_files(plan.merge.reference.side_directory)
        made_of = [fingerprint_of(plan), *((file.name, sha256_of(file)) for file in files)]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def _stays(self, plan: Plan) -> bool:
        if plan.encoded.tensors:
            return False  # to be read as it is written
        if self._in_memory is None:
            free = available_memory()
            self._in_memory = free is None or plan.bytes_written * SHARE <= free
        return self._in_memory

    def _scaled(self, plan: Plan) -> Plan:
        """The same merge as the base and one task vector times lambda; the vector is made if its parameters are new."""
        merge = plan.merge
        params = replace(merge.params, lambda_=1.0)
        if self._vector is None or self._vector[0] != params:
            vector = replace(merge, params=params, dtype="float32", adds_base=False)
            given = plan_merge(vector, **self._limits)
            target = self._vector[1] if self._vector is not None else InMemory(given.shards)
            self._vector = None  # it is overwritten
            run_in_memory(given, target, self._known)
            self._vector = params, target, given
        _, target, given = self._vector
        sum_of_one = get_method("task_arithmetic")
        one = replace(
            merge,
            method=sum_of_one,
            params=sum_of_one.make_params({"weight": (1.0,), "lambda": merge.params.lambda_}),
            models=(target.task_vector(given.shards, merge.method.name, merge.reference),),
            names=(merge.method.name,),
            lines=None,
        )
        return plan_merge(one, **self._limits)


def _elsewhere(folder: Path, in_memory: bool | None, limits: dict[str, Any]) -> Candidates:
    own = folder / f"{platform.node()}-{os.getpid()}"
    return Candidates(own, in_memory=in_memory, **{**limits, "workers": assigned_cores()})


def _ends_with_lambda(merge: Merge) -> bool:
    """Whether what the method gives is, in all bits, lambda times what it gives at lambda 1: tried on toy tensors."""
    if not merge.onto_base or merge.by_tensor or "lambda" not in merge.method.parameters:
        return False

    def made(shape: tuple[int, ...], lambda_: float) -> Tensor:
        values, context = trace.toy(merge, shape)
        return run_at_once(merge.method, values, replace(merge.params, lambda_=lambda_), context, Statistic.exact)

    try:
        return all(
            torch.equal(made(shape, lambda_), made(shape, 1.0) * lambda_)
            for shape in ((61,), (7, 9))
            for lambda_ in (0.37, -1.9)
        )
    except MergebenchError:  # it refuses the toys
        return False
