"""Merge, edit and measure model checkpoints: exactly, in bounded memory, at the speed of the disk.

import mergebench

recipe = mergebench.load("recipe.yaml")
plan = mergebench.plan(recipe)                  # headers only
result = mergebench.run(plan, "merged/mine")
results = mergebench.evaluate(recipe, result.out)
print(mergebench.report(results))
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless the program sets logging up

# Public names and where they live; each is imported on first use, so that `import mergebench` costs nothing.
_PUBLIC = {
    "auto": "mergebench.api",
    "load": "mergebench.recipe",
    "load_stages": "mergebench.recipe",
    "merge": "mergebench.api",
    "plan": "mergebench.api",
    "plan_fold": "mergebench.api",
    "run": "mergebench.api",
    "evaluate": "mergebench.evaluation.measure",
    "measure": "mergebench.evaluation.measure",
    "search": "mergebench.evaluation.search.search",
    "task_vector": "mergebench.api",
    "plan_task_vector": "mergebench.api",
    "plan_edit": "mergebench.api",
    "plan_patch": "mergebench.api",
    "port": "mergebench.systems.portllm",
    "check_port": "mergebench.systems.portllm",
    "measure_port": "mergebench.systems.portllm",
    "merge_adapters": "mergebench.adapters",
    "merge_sequence": "mergebench.adapters",
    "adapter_drift": "mergebench.adapters",
    "describe_adapter": "mergebench.adapters",
    "extract_adapter": "mergebench.adapters",
    "convert_adapter": "mergebench.adapters",
    "convert_to_file": "mergebench.adapters",
    "truncate_adapter": "mergebench.adapters",
    "compress": "mergebench.systems.pela",
    "expand": "mergebench.systems.pela",
    "fit_probe": "mergebench.editing.probes.fit",
    "read_probe": "mergebench.editing.probes.probe",
    "generate": "mergebench.networks.generation",
    "report": "mergebench.evaluation",
    "compare": "mergebench.evaluation.compare.comparison",
    "merge_method": "mergebench.engine.method",
    "delta_kind": "mergebench.checkpoint.kind",
    "edit": "mergebench.editing.edit",
    "Rows": "mergebench.editing.edit",
    "param": "mergebench.parameters",
    "PerModel": "mergebench.parameters",
    "TaskVectors": "mergebench.engine.method",
    "Weights": "mergebench.engine.method",
    "Passes": "mergebench.engine.method",
    "Tasks": "mergebench.engine.method",
    "Context": "mergebench.engine.context",
    "order_statistics": "mergebench.engine.statistics",
    "gram": "mergebench.engine.statistics",
    "norms": "mergebench.engine.statistics",
    "total": "mergebench.engine.chunks",
    "MergebenchError": "mergebench.errors",
}

if TYPE_CHECKING:
    from mergebench.adapters import (
        adapter_drift,
        convert_adapter,
        convert_to_file,
        describe_adapter,
        extract_adapter,
        merge_adapters,
        merge_sequence,
        truncate_adapter,
    )
    from mergebench.api import auto, merge, plan, plan_edit, plan_fold, plan_patch, plan_task_vector, run, task_vector
    from mergebench.checkpoint.kind import delta_kind
    from mergebench.editing.edit import Rows, edit
    from mergebench.editing.probes.fit import fit_probe
    from mergebench.editing.probes.probe import read_probe
    from mergebench.engine.chunks import total
    from mergebench.engine.context import Context
    from mergebench.engine.method import Passes, Tasks, TaskVectors, Weights, merge_method
    from mergebench.engine.statistics import gram, norms, order_statistics
    from mergebench.errors import MergebenchError
    from mergebench.evaluation import report
    from mergebench.evaluation.compare.comparison import compare
    from mergebench.evaluation.measure import evaluate, measure
    from mergebench.evaluation.search.search import search
    from mergebench.networks.generation import generate
    from mergebench.parameters import PerModel, param
    from mergebench.recipe import load, load_stages
    from mergebench.systems.pela import compress, expand
    from mergebench.systems.portllm import check_port, measure_port, port

__all__ = [
    "Context",
    "MergebenchError",
    "Passes",
    "PerModel",
    "Rows",
    "TaskVectors",
    "Tasks",
    "Weights",
    "__version__",
    "adapter_drift",
    "auto",
    "check_port",
    "compare",
    "compress",
    "convert_adapter",
    "convert_to_file",
    "delta_kind",
    "describe_adapter",
    "edit",
    "evaluate",
    "expand",
    "extract_adapter",
    "fit_probe",
    "generate",
    "gram",
    "load",
    "load_stages",
    "measure",
    "measure_port",
    "merge",
    "merge_adapters",
    "merge_method",
    "merge_sequence",
    "norms",
    "order_statistics",
    "param",
    "plan",
    "plan_edit",
    "plan_fold",
    "plan_patch",
    "plan_task_vector",
    "port",
    "read_probe",
    "report",
    "run",
    "search",
    "task_vector",
    "total",
    "truncate_adapter",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mergebench' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
