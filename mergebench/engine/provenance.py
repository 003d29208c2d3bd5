"""The provenance of a merge: its inputs, what the result depends on, and facts found during the run."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergebench import __version__
from mergebench.checkpoint.content import sample_of, sha256_of
from mergebench.checkpoint.measured import Measured
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.names import module_kind
from mergebench.engine.answers import key_of
from mergebench.engine.lines import alpha_of
from mergebench.engine.plan import Plan
from mergebench.plugins import source_of


def record(
    plan: Plan, fingerprint: str, answers: dict[str, list[dict[str, Any]]], of_all: Any, hash_inputs: bool
) -> dict[str, Any]:
    """The content of `mergebench.json` for a plan that was run with these answers."""
    return {
        "mergebench": __version__,
        "fingerprint": fingerprint,
        "recipe": dict(plan.merge.recipe),
        "folders": list(dict.fromkeys(plan.merge.folders)),
        "notes": list(plan.merge.notes),
        "method": {
            "name": plan.merge.method.name,
            "paper": plan.merge.method.paper,
            "scope": plan.merge.scope,
            **source_of(plan.merge.method.written),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "inputs": inputs(plan, hash_inputs),
        "merged_tensors": len(plan.alignment.merged),
        "copied_tensors": len(plan.copied),
        "answers": answers,
        "kept": _kept(plan, answers),
        **_lines(plan, of_all),
        **({"statistics": [dict(one.about) for one in plan.merge.statistics]} if plan.merge.statistics else {}),
        "sweeps": plan.sweeps,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
    }


def as_text(provenance: dict[str, Any]) -> str:
    """The provenance as indented JSON, with the answers about a tensor in one line: they are most of it."""
    encode = json.JSONEncoder().encode
    answers = ",\n".join(f"  {encode(name)}: {encode(found)}" for name, found in provenance["answers"].items())
    head = json.dumps({key: value for key, value in provenance.items() if key != "answers"}, indent=1)
    return f'{head[:-2]},\n "answers": {{\n{answers}\n }}\n}}\n'


def _kept(plan: Plan, answers: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The share of each model's elements that a trim at its thresholds kept; empty for methods without one."""
    kept, total = [0.0] * len(plan.merge.models), 0
    for unit in (unit for group in plan.groups for unit in group.units if unit.passes):
        for answer in answers.get(key_of(plan, unit), ()):
            if "kept" in answer:
                kept = [sum_ + share * unit.numel for sum_, share in zip(kept, answer["kept"], strict=True)]
                total += unit.numel
    return {name: sum_ / total for name, sum_ in zip(plan.merge.names, kept, strict=True)} if total else {}


def _lines(plan: Plan, of_all: Any) -> dict[str, Any]:
    """The factors of the layers, if they were scaled."""
    lines = plan.merge.lines
    if lines is None:
        return {}
    alpha = alpha_of(of_all, len(plan.merge.models)) if lines.alpha is None else lines.alpha
    return {"lines": {"alpha": alpha, "beta": lines.beta}}


def rounding(plan: Plan, moved: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How far values were moved that are written in eight or four bits, |W - Q(W)| / |W| in the Frobenius norm, by kind
    of module; moved: sums of squares by tensor."""
    if not plan.encoded.tensors:
        return {}
    kinds: dict[str, list[Sequence[float]]] = {}
    for name in plan.encoded.tensors:
        if name in moved:
            kinds.setdefault(module_kind(name), []).append(moved[name])
    error = {}
    for kind, sums in sorted(kinds.items()):
        change, size = (math.fsum(column) for column in zip(*sums, strict=True))
        # six digits do not depend on chunks, whose sums are added in any order
        error[kind] = {"tensors": len(sums), "relative_error": float(f"{math.sqrt(change / (size or 1.0)):.6g}")}
    return {"rounding": {"to": plan.merge.encoding, "by_kind": error}}


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def places(plan: Plan) -> list[Path]:
    """The paths of the models, which must not be written to."""
    return places_of([*plan.merge.models, plan.merge.reference]) + [one.file for one in plan.merge.statistics]


def places_of(models: Iterable[Model]) -> list[Path]:
    """The paths of models, which must not be written to."""
    found = []
    for model in models:
        found += [place for place in (model.directory, *model.adapters) if place is not None]
        found += [header.file for header in model.headers]
    return found


def inputs(plan: Plan, hash_inputs: bool) -> list[dict[str, Any]]:
    """Every input file once: size, time, a hash of the header and of a sample; of everything with `hash_inputs`.

    `RunError` if a file is not the one that was planned with any more.
    """
    return inputs_of([plan.merge.reference, *plan.merge.models], hash_inputs, plan.merge.statistics)


def inputs_of(models: Iterable[Model], hash_inputs: bool, statistics: Iterable[Measured] = ()) -> list[dict[str, Any]]:
    """Every file of models and of their statistics once, as `inputs`."""
    headers = {h.file: h for model in models for h in model.headers} | {one.file: one.header for one in statistics}
    found = []
    for file, header in sorted(headers.items()):
        entry = {
            "file": str(file),
            "size": header.stamp.size,
            "mtime_ns": header.stamp.mtime_ns,
            "header_sha256": header.sha256,
            "sample_sha256": sample_of(header),
        }
        if hash_inputs:
            entry["sha256"] = sha256_of(file)
        header.check()
        found.append(entry)
    return found


def fingerprint_of(plan: Plan) -> str:
    """What the result depends on: recipe, inputs, layout and version; not workers, memory or device."""
    made_of = {
        "recipe": {key: value for key, value in plan.merge.recipe.items() if key != "evaluate"},
        "inputs": inputs(plan, hash_inputs=False),
        "sources": {name: [info.name for info in infos] for name, infos in plan.alignment.sources.items()},
        "deltas": [model.delta_digest for model in [plan.merge.reference, *plan.merge.models]],
        "made": [
            {name: info.made.digest() for name, info in model.tensors.items() if info.made is not None}
            for model in [plan.merge.reference, *plan.merge.models]
        ],
        "shards": {file.file: hashlib.sha256(file.header).hexdigest() for shard in plan.shards for file in shard.files},
        "edits": [edit.digest for edit in plan.merge.edits],
        "mergebench": __version__,
        "method": source_of(plan.merge.method.written).get("sha256"),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()
