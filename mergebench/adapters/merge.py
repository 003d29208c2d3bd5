"""Merge LoRA directories into one, in delta space.

The merge works on the adapters' differences, delta W_i = scale_i B_i A_i, not on their factors: (sum B_i)(sum A_i) has
cross terms that no adapter was trained with. One module is in memory at a time. Only DoRA needs the base, because its
difference depends on it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mergebench import __version__
from mergebench.adapters import cards, combine, peft_directory
from mergebench.adapters.combine import SUMS, Job, OnBase, Part, built_in, is_known, known
from mergebench.adapters.stored import read_stored
from mergebench.checkpoint.files import Files, write_atomically
from mergebench.checkpoint.format import Base
from mergebench.checkpoint.model import Model
from mergebench.checkpoint.reference import locate_delta, reference_of
from mergebench.checkpoint.shards import ShardFiles, create
from mergebench.checkpoint.staging import Staging
from mergebench.checkpoint.target import check_room, check_target
from mergebench.deltas.formats.lora import Adapter, lora, read_adapter, shapes_of
from mergebench.deltas.open import open_model
from mergebench.deltas.peft.directory import CONFIG, WEIGHTS
from mergebench.deltas.peft.names import Names
from mergebench.deltas.peft.orientation import Orientation
from mergebench.deltas.svd import Product
from mergebench.engine.run import Result
from mergebench.errors import ModelError, RecipeError, did_you_mean

# names in PEFT's add_weighted_adapter, which merges the factors themselves in methods without `_svd`
PEFT_NAMES = {f"{name}_svd": name for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")}


def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    base: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Merge LoRAs, directories or `org/name[@revision]`, into the LoRA directory `out`, which appears when complete.

    linear: sum of w_i delta W_i, at the sum of the ranks or `rank`. cat: the same sum by concatenation. svd: the same
    sum at `rank` (default: the largest input rank). ties, dare_linear, dare_ties, pcb, magnitude_prune, knots, tsv_m,
    iso_c, iso_cts: the merge method on each module's differences, then the best approximation by `rank` (default: the
    sum of the ranks). weights: default 1/n for linear, cat and svd, else 1. density, seed: the method's. base: the
    adapters' base model, needed if an adapter is DoRA. A module that an adapter lacks counts as zero. One adapter at
    weight 1 is copied, if the method keeps a single model unchanged. progress: called with the modules done and the
    total.

    Raises `RecipeError` if the settings are invalid, `ModelError` if the adapters do not fit together or are no
    difference of weights, `RunError` if the work fails.
    """
    started = time.perf_counter()
    out = Path(out)
    job = _check(adapters, method, weights, density, rank, base, seed)
    check_target(out, [adapter.directory for adapter in job.adapters], overwrite)
    shapes = _shapes(job.adapters)
    keeps_one = _keeps_one(job)
    ranks = {module: _rank(job, module, shape, keeps_one) for module, shape in shapes.items()}
    embeddings = {name for adapter in job.adapters for name, one in adapter.modules.items() if one.embedding}
    shard = peft_directory.lay_out(shapes, ranks, embeddings)
    check_room(out, sum(a.header.stamp.size for a in job.adapters) if keeps_one else shard.nbytes)
    with Staging(out, "", resume=False) as staging:
        energy: dict[str, Product | None] = dict.fromkeys(shapes)
        if keeps_one:
            peft_directory.copy(job.adapters[0], staging.directory)
        else:
            create(staging.directory / WEIGHTS, shard)
            with closing(ShardFiles(staging.directory, [shard])) as written, Files() as opened:
                for number, (module, shape) in enumerate(shapes.items(), 1):
                    product = combine.merged(opened, job, module, shape, ranks[module])
                    peft_directory.put(written, module, product, module in embeddings)
                    energy[module] = product._replace(a=product.a[:0], b=product.b[:0])
                    progress(number, len(shapes))
            config = peft_directory.merged_config(job.adapters, ranks)
            write_atomically(staging.directory / CONFIG, json.dumps(config, indent=2) + "\n")
        provenance = _provenance(job, base, keeps_one, ranks, energy)
        provenance = staging.finish(provenance, started, overwrite, cards.card(out, provenance))
    return Result(out, provenance)


def _check(
    adapters: Sequence[str | Path],
    method: str,
    weights: Sequence[float] | None,
    density: float | None,
    rank: int | None,
    base: str | None,
    seed: int,
) -> Job:
    method = PEFT_NAMES.get(method, method)
    if method == "dare":
        raise RecipeError("--method: 'dare' alone does not say how what is left is merged", "dare_linear or dare_ties")
    if method == "ema":
        raise RecipeError(
            "--method: 'ema' merges the stored tensors of a sequence", "mergebench.merge_sequence does it"
        )
    if not is_known(method):
        raise RecipeError(f"--method: no method '{method}' for adapters", did_you_mean(method, (*known(), "ema")))
    if not adapters:
        raise RecipeError("no adapter to merge")
    count = len(adapters)
    parameters = {"weight": None} if method in SUMS else built_in(method)[0].parameters
    if weights is not None and "weight" not in parameters:
        takers = [name for name in known() if name in SUMS or "weight" in built_in(name)[0].parameters]
        raise RecipeError(f"--weights: '{method}' takes none", f"methods that do: {', '.join(takers)}")
    if weights is None:
        weights = [1 / count if method in SUMS else 1.0] * count
    if len(weights) != count:
        raise RecipeError(f"--weights: {len(weights)} for {count} adapters", "one number each, such as 0.5,0.5")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError(f"--weights: must be finite, got {','.join(map(str, weights))}")
    _check_density(method, density)
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank: must be at least 1, got {rank}")
    if rank is not None and method == "cat":
        raise RecipeError("--rank: 'cat' has the sum of the ranks", "linear and svd take --rank")
    read = [_read(locate_delta(adapter)) for adapter in adapters]
    model = None if base is None else open_model(base)
    if model is not None and model.adapters:
        raise RecipeError(f"--base: '{base}' has an adapter on top", "name the model that the adapters were trained on")
    parts = [_parts(adapter, model) for adapter in read]
    job = Job(read, parts, method, tuple(map(float, weights)), density, rank, seed)
    if not _keeps_one(job):
        for adapter in read:
            _check_difference(adapter, method, model is not None)
    return job


def _read(directory: Path) -> Adapter:
    if (kind := read_stored(directory).kind) != "LORA":
        raise ModelError(
            f"{directory}: an adapter of type {kind} is no low-rank difference, as LoRA is",
            "--method ema averages the stored tensors of adapters of any type",
        )
    return read_adapter(directory)


def _check_density(method: str, density: float | None) -> None:
    parameter = None if method in SUMS else built_in(method)[0].parameters.get("density")
    if parameter is None:
        if density is not None:
            droppers = [name for name in known() if name not in SUMS and "density" in built_in(name)[0].parameters]
            raise RecipeError(f"--density: '{method}' drops nothing", f"methods that do: {', '.join(droppers)}")
    elif density is not None:
        complaint = parameter.complaint(density)
        if complaint:
            raise RecipeError(f"--density: {complaint}, got {density:g}")
    elif method == "magnitude_prune":
        raise RecipeError("--density: 'magnitude_prune' needs it", "the share of elements kept, such as 0.5")


def _parts(adapter: Adapter, base: Model | None) -> dict[str, Part]:
    """The adapter's modules; with a base, checked against it."""
    if base is None:
        return {module: Part(factors) for module, factors in adapter.modules.items()}
    known = Base(base.reference, base.tensors, base.config)
    read = lora.read(adapter.directory, known)
    names = Names(adapter.directory, base.tensors, shapes_of(adapter))
    orientation, parts = Orientation(known, adapter.transposed), {}
    for module, factors in adapter.modules.items():
        name = names.find(f"{module}.weight")
        on_base = OnBase(base.tensors[name], read.deltas[name]) if factors.magnitude else None
        parts[module] = Part(factors, on_base, orientation.in_out(name) or factors.embedding)
    return parts


def _keeps_one(job: Job) -> bool:
    """Whether the result is a copy of the only adapter."""
    if len(job.adapters) > 1 or job.weights != (1.0,) or job.method == "pcb":
        return False
    if job.method not in SUMS:
        method, _ = built_in(job.method)
        drops = method.parameters["density"].default if "density" in method.parameters else 1
        if "one model" in method.exempt or (job.density or drops) < 1:
            return False
    modules = job.adapters[0].modules.values()
    return job.rank is None or job.rank >= max((factors.rank for factors in modules), default=0)


def _check_difference(adapter: Adapter, method: str, with_base: bool) -> None:
    """Refuse adapters that are no difference of a matrix, or that need a missing base."""
    if adapter.beside is not None:
        raise ModelError(
            f"{adapter.directory}: {adapter.beside}: only factors of linear layers and embeddings merge as an adapter",
            "merge full models: a recipe with models BASE+ADAPTER",
        )
    first = next(iter(adapter.modules.values()))
    if first.bias or adapter.whole:
        what = "a bias of lora_B" if first.bias else f"'{next(iter(adapter.whole))}' saved whole"
        raise ModelError(
            f"{adapter.directory}: {what} is no low-rank difference: it does not merge as an adapter",
            "merge full models: a recipe with models BASE+ADAPTER",
        )
    if first.magnitude and not with_base:
        raise ModelError(
            f"{adapter.directory}: DoRA is no low-rank difference: it depends on the base's weights",
            "give --base BASE, or merge full models: a recipe with models BASE+ADAPTER",
        )
    if first.magnitude and method == "cat":
        raise RecipeError(f"--method: DoRA ({adapter.directory}) has no factors to put side by side", "linear or svd")


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


def _rank(job: Job, module: str, shape: tuple[int, int], keeps_one: bool) -> int:
    together = sum(part.factors.rank for part in job.at(module) if part)
    if job.method == "cat" or keeps_one:
        return together
    most = job.rank
    if most is None and job.method == "svd":
        most = max(factors.rank for adapter in job.adapters for factors in adapter.modules.values())
    if most is None or job.on_factors(module):  # the result has no larger rank
        most = min(most or together, together)
    return min(most, *shape)


def _provenance(
    job: Job, base: str | None, keeps_one: bool, ranks: dict[str, int], energy: dict[str, Product | None]
) -> dict[str, Any]:
    """The provenance: `energy_kept` is the share of the squared norm that the rank keeps."""
    counted = [product for product in energy.values() if product is not None]
    total = sum(product.total for product in counted)
    bases = [adapter.config.get("base_model_name_or_path") for adapter in job.adapters]
    return {
        "mergebench": __version__,
        "command": "adapters merge",
        "method": {"name": job.method, "density": job.density, "rank": job.rank, "seed": job.seed},
        "space": "delta",
        "base": base,
        "copied": keeps_one,
        "adapters": [
            {"adapter": reference_of(adapter.directory), "weight": weight, "base_model": base}
            for adapter, weight, base in zip(job.adapters, job.weights, bases, strict=True)
        ],
        "notes": peft_directory.different_bases(bases),
        "energy_kept": sum(product.kept for product in counted) / total if total else 1.0,
        "modules": {
            module: {"rank": ranks[module], "energy_kept": p.kept / p.total if p and p.total else 1.0}
            for module, p in energy.items()
        },
        "inputs": [
            entry
            for adapter in job.adapters
            for entry in peft_directory.inputs(adapter.directory / name for name in (CONFIG, WEIGHTS))
        ],
    }
