"""The statistics of a merge by tensor, from one more sweep over its inputs: `statistics.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from mergebench.checkpoint.documents import read_json
from mergebench.checkpoint.files import Files, write_atomically
from mergebench.engine.answers import decoded, units_of
from mergebench.engine.executors import start_workers
from mergebench.engine.items import chunks_of
from mergebench.engine.job import Merge
from mergebench.engine.plan import plan_merge
from mergebench.engine.profile import Counts
from mergebench.methods import get

FILE = "statistics.json"
MOST = 1 << 25  # elements read; for a larger model, every second, third, ... chunk of each tensor


class Entry(TypedDict):
    """A tensor in `statistics.json`."""

    name: str
    numel: int
    elements: float
    squares: list[float]
    shared: float
    conflicts: float
    merged: float
    kept: list[float]


class Document(TypedDict):
    """The whole of `statistics.json`."""

    method: str
    models: list[str]
    every: int
    replayed: bool
    tensors: list[Entry]


@dataclass(frozen=True)
class Profile:
    """Statistics from one sweep over a merge's task vectors; all counts by tensor, in the order of the files.

    every: one in this many chunks of a tensor was read. replayed: whether `merged` and `kept` are known.
    """

    method: str
    models: tuple[str, ...]
    every: int
    replayed: bool
    numel: Mapping[str, int]
    counts: Mapping[str, Counts]

    def save(self, directory: Path) -> None:
        """Put `statistics.json` in place; one tensor a line."""
        head = {"method": self.method, "models": self.models, "every": self.every, "replayed": self.replayed}
        lines = ",\n".join(
            json.dumps({"name": name, "numel": self.numel[name], **counts._asdict()})
            for name, counts in self.counts.items()
        )
        write_atomically(directory / FILE, f'{json.dumps(head)[:-1]}, "tensors": [\n{lines}\n]}}\n')

    @classmethod
    def load(cls, directory: Path) -> Profile:
        """Read the file that `save` wrote; `OSError` or `ValueError` if there is none."""
        found = read_json(directory / FILE, Document)
        models, tensors = tuple(found["models"]), found["tensors"]
        numel, counts = {}, {}
        for one in tensors:
            fields = {name: one[name] for name in Counts._fields}
            sums = Counts(**fields | {name: tuple(one[name]) for name in ("squares", "kept")})
            if sums.elements <= 0 or min(sums.merged, *sums.squares) < 0 or len(sums.squares) != len(models):
                raise ValueError(f"{one['name']}: its counts are not those of a merge of {len(models)} models")
            if len(sums.kept) != len(models):
                raise ValueError(f"{one['name']}: it has {len(sums.kept)} kept for {len(models)} models")
            numel[one["name"]], counts[one["name"]] = one["numel"], sums
        return cls(found["method"], models, found["every"], found["replayed"], numel, counts)


def profile(merge: Merge, answers: Mapping[str, Any]) -> Profile | None:
    """Sweep over a merge's task vectors once more; None if there is no base.

    answers: the merge's answers to the method's questions (`KeyError` if one is missing). A method on weights or on
    whole matrices is not replayed, because it uses all elements.
    """
    if merge.base is None:
        return None
    replayed = merge.from_base and merge.cut != "tensor"
    method = merge.method
    if not replayed:
        sums = get("task_arithmetic")
        params = sums.make_params({"weight": (1.0,) * len(merge.models)})
        merge = replace(merge, method=sums, params=params, by_tensor={}, lines=None, scope="tensor")
    plan = plan_merge(merge, device="cpu")
    units, every = units_of(plan), math.ceil(plan.elements / MOST)
    known = decoded(plan, dict(answers))
    items = (
        item
        for number, unit in enumerate(units)
        for name in unit.tensors
        for item in list(chunks_of(plan, name, number))[::every]
    )
    with Files() as files:
        for model in [merge.reference, *merge.models]:
            model.settle(files)
        workers = start_workers(plan, files, lambda _: None)
        try:
            results = workers.run("profile", items, units, known, replayed)
        finally:
            workers.close()
    found: dict[str, Counts] = {}
    for tensor, _, counts in sorted((one for part in results for one in part), key=lambda one: one[1]):
        found[tensor] = found[tensor] + counts if tensor in found else counts
    infos = merge.reference.tensors
    order = [name for name in infos if name in found]
    return _without_base(
        Profile(
            method=method.name,
            models=merge.names,
            every=every,
            replayed=replayed,
            numel={name: infos[name].numel for name in order},
            counts={name: found[name] for name in order},
        )
    )


def _without_base(one: Profile) -> Profile:
    """Without models equal to the base, since methods on weights count the base as a model."""
    moved = [k for k in range(len(one.models)) if any(counts.squares[k] for counts in one.counts.values())]

    def taken(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[k] for k in moved)

    counts = {name: old._replace(squares=taken(old.squares), kept=taken(old.kept)) for name, old in one.counts.items()}
    return replace(one, models=taken(one.models), counts=counts)
