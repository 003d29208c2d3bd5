"""Merge LoRA directories into one, in delta space and without the base.

What is merged is what the adapters do, delta W_i = scale_i B_i A_i, not their factors: (sum B_i)(sum A_i)
has cross terms that no adapter was trained with. One module is in memory at a time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergebench import __version__, methods
from mergebench.adapters import files
from mergebench.adapters.lowrank import Product, compress, truncate
from mergebench.checkpoint.adapter import CONFIG, PREFIX, WEIGHTS, Adapter, Factors, read_adapter
from mergebench.checkpoint.header import TensorInfo
from mergebench.checkpoint.read import Files, whole
from mergebench.checkpoint.staging import PROVENANCE, Staging, check_room, check_target
from mergebench.checkpoint.write import OutTensor, Shard, ShardFiles, create, write_atomically
from mergebench.engine.context import Context, Span
from mergebench.engine.whole import run_in_chunks
from mergebench.errors import ModelError, RecipeError, RunError, did_you_mean

EXACT = ("linear", "cat", "svd")  # sums: done on the factors
DENSE = ("ties", "dare_linear", "dare_ties", "pcb")  # elementwise: one module's differences written out in memory


@dataclass(frozen=True)
class Merged:
    """A merged adapter on disk, and how it was made."""

    out: Path
    provenance: dict[str, Any]


@dataclass(frozen=True)
class _Job:
    """Adapters opened, settings checked."""

    adapters: list[Adapter]
    method: str
    weights: tuple[float, ...]
    density: float | None
    rank: int | None
    seed: int

    @property
    def keeps_one(self) -> bool:
        """Whether the result is the one adapter itself."""
        if len(self.adapters) > 1 or self.weights != (1.0,) or self.method == "pcb" or (self.density or 1) < 1:
            return False
        return self.rank is None or self.rank >= max(factors.rank for factors in self.adapters[0].modules.values())


def merge_adapters(
    directories: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Merged:
    """Merge LoRA directories into the LoRA directory `out`, which appears when it is complete.

    linear: sum of w_i delta W_i, at the sum of the ranks or `rank`. cat: the same by concatenation. svd: the
    same at `rank` (default: the largest that goes in). ties, dare_linear, dare_ties, pcb: the merge method on
    each module's differences, then the best product of `rank` (default: the sum of the ranks). weights:
    default 1/n for linear, cat and svd, else 1. density, seed: the method's. A module that an adapter does not
    have counts as zero. One adapter at weight 1 is copied.
    """
    started = time.perf_counter()
    out = Path(out)
    job = _check(directories, method, weights, density, rank, seed)
    check_target(out, [adapter.directory for adapter in job.adapters], overwrite)
    for adapter in job.adapters if not job.keeps_one else ():
        _check_low_rank(adapter)
    shapes = _shapes(job.adapters)
    ranks = {module: _rank(job, module, shape) for module, shape in shapes.items()}
    shard = _lay_out(shapes, ranks)
    check_room(out, sum(a.header.size for a in job.adapters) if job.keeps_one else shard.nbytes)
    with Staging(out, "", resume=False) as staging:
        energy: dict[str, Product | None] = {}
        if job.keeps_one:
            files.copy(job.adapters[0], staging.directory)
            energy = dict.fromkeys(shapes)
        else:
            create(staging.directory / WEIGHTS, shard)
            with closing(ShardFiles(staging.directory, [shard])) as written:
                for module, product in _products(job, shapes, ranks):
                    written.write(_key(module, "A"), 0, product.a.contiguous().reshape(-1))
                    written.write(_key(module, "B"), 0, product.b.contiguous().reshape(-1))
                    energy[module] = product._replace(a=torch.empty(0), b=torch.empty(0))
            write_atomically(staging.directory / CONFIG, json.dumps(files.config(job.adapters, ranks), indent=2) + "\n")
        provenance = _provenance(job, ranks, energy) | {"seconds": round(time.perf_counter() - started, 3)}
        write_atomically(staging.directory / "README.md", files.card(out, provenance))
        write_atomically(staging.directory / PROVENANCE, json.dumps(provenance, indent=1) + "\n")
        staging.publish(overwrite, sync=False)
    return Merged(out, provenance)


def _check(
    directories: Sequence[str | Path],
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    seed: int,
) -> _Job:
    if method not in EXACT + DENSE:
        raise RecipeError(f"--method: no method '{method}' for adapters", did_you_mean(method, EXACT + DENSE))
    if not directories:
        raise RecipeError("no adapter to merge")
    count = len(directories)
    if weights is None:
        weights = [1 / count if method in EXACT else 1.0] * count
    if len(weights) != count:
        raise RecipeError(f"--weights: {len(weights)} for {count} adapters", "one number each, such as 0.5,0.5")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"--weights: must be finite, got {','.join(map(str, weights))}")
    if density is not None:
        if method in EXACT:
            raise RecipeError(f"--density: '{method}' drops nothing", f"methods that do: {', '.join(DENSE)}")
        complaint = methods.get(method).parameters["density"].complaint(density)
        if complaint:
            raise RecipeError(f"--density: {complaint}")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank: must be at least 1, got {rank}")
    if rank is not None and method == "cat":
        raise RecipeError("--rank: 'cat' has the sum of the ranks", "linear and svd take --rank")
    adapters = [read_adapter(Path(directory)) for directory in directories]
    return _Job(adapters, method, tuple(map(float, weights)), density, rank, seed)


def _check_low_rank(adapter: Adapter) -> None:
    first = next(iter(adapter.modules.values()))
    what = "DoRA" if first.magnitude else "a bias of lora_B" if first.bias else None
    if what is None and adapter.whole:
        what = f"'{next(iter(adapter.whole))}' saved whole"
    if what is not None:
        raise ModelError(
            f"{adapter.directory}: {what} is no low-rank difference: it does not merge without the base",
            "merge full models: a recipe with models BASE+ADAPTER",
        )


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module that any adapter changes, [out, in]."""
    found: dict[str, tuple[tuple[int, int], Adapter]] = {}
    first = adapters[0]
    for adapter in adapters:
        if adapter.transposed != first.transposed:
            raise ModelError(f"fan_in_fan_out: {adapter.directory} and {first.directory} differ: not one base")
        for module, factors in adapter.modules.items():
            shape, other = found.setdefault(module, (factors.shape, adapter))
            if shape != factors.shape:
                raise ModelError(
                    f"{module}: {adapter.directory} changes {list(factors.shape)}, {other.directory} {list(shape)}",
                    "only adapters of one base merge",
                )
    return {module: shape for module, (shape, _) in found.items()}


def _rank(job: _Job, module: str, shape: tuple[int, int]) -> int:
    together = sum(adapter.modules[module].rank for adapter in job.adapters if module in adapter.modules)
    if job.method == "cat" or job.keeps_one:
        return together
    most = job.rank
    if most is None and job.method == "svd":
        most = max(factors.rank for adapter in job.adapters for factors in adapter.modules.values())
    if most is None or job.method in EXACT:  # a sum has no more than this
        most = min(most or together, together)
    return min(most, *shape)


def _key(module: str, factor: str) -> str:
    return f"{PREFIX}{module}.lora_{factor}.weight"


def _lay_out(shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> Shard:
    tensors = []
    for module, (rows, columns) in shapes.items():
        rank = ranks[module]
        tensors.append(OutTensor(_key(module, "A"), "F32", (rank, columns), 4 * rank * columns))
        tensors.append(OutTensor(_key(module, "B"), "F32", (rows, rank), 4 * rank * rows))
    return Shard(WEIGHTS, tuple(tensors))


def _products(job: _Job, shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> Iterator[tuple[str, Product]]:
    with Files() as opened:
        for module, shape in shapes.items():
            parts = [adapter.modules.get(module) for adapter in job.adapters]
            if job.method in EXACT:
                product = _sum(opened, job, parts, ranks[module])
            else:
                product = truncate(_run(opened, job, parts, module, shape), ranks[module])
            if not (torch.isfinite(product.a).all() and torch.isfinite(product.b).all()):
                raise RunError(f"{module}: the merged factors do not fit into float32", "use smaller weights")
            yield module, product


def _sum(opened: Files, job: _Job, parts: Sequence[Factors | None], rank: int) -> Product:
    left, right = [], []
    for weight, factors in zip(job.weights, parts, strict=True):
        if factors is not None:
            left.append(_read(opened, factors.b) * (weight * factors.scale))  # the sign on one factor only
            right.append(_read(opened, factors.a))
    b, a = torch.cat(left, dim=1), torch.cat(right)
    return Product(b, a, 1.0, 1.0) if job.method == "cat" else compress(b, a, rank)


def _run(opened: Files, job: _Job, parts: Sequence[Factors | None], module: str, shape: tuple[int, int]) -> Tensor:
    """The merge method on one module's differences, as if the module were all there is."""
    rows = torch.zeros(len(parts), *shape)
    for row, factors in zip(rows, parts, strict=True):
        if factors is not None:
            torch.mm(_read(opened, factors.b) * factors.scale, _read(opened, factors.a), out=row)
    method, given = methods.get(job.method), {"weight": job.weights, "density": job.density}
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        value = given.get(name)
        value = parameter.default if value is None else value
        values[name] = (value,) * len(parts) if parameter.per_model and not isinstance(value, tuple) else value
    numel = shape[0] * shape[1]
    names = tuple(adapter.directory.name for adapter in job.adapters)
    span = Span(f"{module}.weight", 0, numel)
    context = Context(numel, names, (span,), shape, "tensor", job.seed, torch.device("cpu"))
    return run_in_chunks(method, rows.reshape(len(parts), numel), method.make_params(values), context).reshape(shape)


def _read(opened: Files, tensor: TensorInfo) -> Tensor:
    values = whole(opened, tensor).float()
    if not torch.isfinite(values).all():
        raise RunError(f"{tensor.file}: '{tensor.name}' holds NaN or infinity", "use another adapter")
    return values


def _provenance(job: _Job, ranks: dict[str, int], energy: dict[str, Product | None]) -> dict[str, Any]:
    """What was made of what: `energy_kept` is the share of the squared norm that the rank leaves."""
    counted = [product for product in energy.values() if product is not None]
    total = sum(product.total for product in counted)
    bases = [adapter.config.get("base_model_name_or_path") for adapter in job.adapters]
    notes = []
    if len(set(bases)) > 1:
        notes.append(f"the adapters name different bases: {', '.join(dict.fromkeys(str(base) for base in bases))}")
    return {
        "mergebench": __version__,
        "command": "adapters merge",
        "method": {"name": job.method, "density": job.density, "rank": job.rank, "seed": job.seed},
        "space": "delta",
        "copied": job.keeps_one,
        "adapters": [
            {"adapter": str(adapter.directory), "weight": weight, "base_model": base}
            for adapter, weight, base in zip(job.adapters, job.weights, bases, strict=True)
        ],
        "notes": notes,
        "energy_kept": sum(product.kept for product in counted) / total if total else 1.0,
        "modules": {
            module: {"rank": ranks[module], "energy_kept": p.kept / p.total if p and p.total else 1.0}
            for module, p in energy.items()
        },
        "inputs": [entry for adapter in job.adapters for entry in files.inputs(adapter)],
    }
