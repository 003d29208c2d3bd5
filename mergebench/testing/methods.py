"""Check that a merge method keeps the rules: `check_method(my_method)` in a plugin's tests.

The oracle is the method run on everything in memory at once, with its questions answered by brute force. The streamed
result must equal it bit for bit, for any chunks.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergebench.checkpoint import Model
from mergebench.checkpoint.measured import Measured, read_measured, write_measured
from mergebench.deltas.open import open_model
from mergebench.engine import trace
from mergebench.engine.context import Context, OnData
from mergebench.engine.job import Merge
from mergebench.engine.machine import one_thread
from mergebench.engine.method import Method
from mergebench.engine.noise import TILE
from mergebench.engine.plan import plan_merge
from mergebench.engine.replay import run_at_once
from mergebench.engine.run import run_plan
from mergebench.engine.span import Span
from mergebench.engine.statistics import Norms, OrderStatistics, Statistic
from mergebench.errors import MergebenchError

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
SMALL = {"matrix": (13, 11), "bias": (23,), "scale": ()}
LARGE = {"matrix": (2, TILE + 465), "bias": (300,), "scale": (), "long": (7 * TILE + 5,)}


def statistics_of(method: Method, tensors: Tensors) -> dict[str, Tensor]:
    """Made-up statistics of a model, of the kind that the method reads: equal for equal models."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        generator = torch.Generator().manual_seed(int(tensor.double().abs().sum() * 1e6) % 2**31)
        if method.statistics == "fisher":
            found[name] = torch.randn(shape, generator=generator).square_()
        elif method.statistics == "coefficients":
            found[name] = torch.randn((), generator=generator)
        elif method.statistics == "gram" and method.whole(name, shape):
            inputs = torch.randn(3 * shape[1], shape[1], generator=generator)
            found[name] = inputs.T @ inputs / len(inputs)
    return found


def length_of(statistics: Tensors) -> float:
    """The L2 norm of all statistics of a model."""
    return math.sqrt(sum(float(one.double().square().sum()) for one in statistics.values()))


def _on_data(method: Method, statistics: Sequence[Tensors], sizes: Mapping[str, int]) -> OnData | None:
    """What the method sees of the statistics of these tensors, whole."""
    norms = tuple(length_of(one) for one in statistics)
    if method.statistics is None or any(name not in statistics[0] for name in sizes):
        return None
    if method.statistics == "gram":
        return OnData(torch.stack([one[name] for one in statistics for name in sizes]), norms)
    rows = [torch.cat([one[name].reshape(-1).expand(size) for name, size in sizes.items()]) for one in statistics]
    return OnData(torch.stack(rows), norms)


def in_memory(
    method: Method, base: Tensors, models: Sequence[Tensors], params: Any, scope: str = "", seed: int = 0
) -> dict[str, Tensor]:
    """The method's result on whole tensors (or, at scope model, on all of them as one), float32.

    For a method with a model per task: the shared vector.

    base, models: float tensors by name. params: the method's own dataclass.
    """
    scope = scope or method.scope
    statistics = [statistics_of(method, tensors) for tensors in models]
    units = [list(base)] if scope == "model" else [[name] for name in base]
    lengths: list[Tensor] = []  # if the method asks about all units together, the answers for each unit

    def answer(statistic: Statistic, sizes: Sequence[int], of_all: Tensor | None) -> Any:
        if of_all is not None and isinstance(statistic, Norms):
            return of_all
        found = _brute_force(statistic, sizes)
        if isinstance(statistic, Norms):
            lengths.append(found)
        return found

    def unit(names: Sequence[str], of_all: Tensor | None = None) -> dict[str, Tensor]:
        rows = [torch.cat([tensors[name].float().reshape(-1) for name in names]) for tensors in models]
        origin = torch.cat([base[name].float().reshape(-1) for name in names])
        values = torch.stack(rows)
        if method.takes == "task_vectors":
            values = values - origin
        sizes = [base[name].numel() for name in names]
        spans = tuple(Span(name, 0, size) for name, size in zip(names, sizes, strict=True))
        labels = tuple(f"model{number}" for number in range(len(models)))
        shape = tuple(base[names[0]].shape)
        on_data = _on_data(method, statistics, dict(zip(names, sizes, strict=True)))
        context = Context(values.shape[1], labels, spans, shape, scope, seed, torch.device("cpu"), on_data)
        result = run_at_once(method, values, params, context, partial(answer, sizes=sizes, of_all=of_all))
        result = result + origin if method.takes == "task_vectors" and method.gives == "model" else result
        parts = zip(names, torch.split(result, sizes), strict=True)
        return {name: part.reshape(base[name].shape) for name, part in parts}

    merged = [unit(names) for names in units]
    if lengths:
        merged = [unit(names, Norms.of_all(lengths)) for names in units]
    return {name: value for one in merged for name, value in one.items()}


def run_whole(method: Method, values: Tensor, params: Any, context: Context, sizes: Sequence[int]) -> Tensor:
    """Run a method on a single chunk that holds everything; `sizes` are the sizes of its tensors."""
    return run_at_once(method, values, params, context, partial(_brute_force, sizes=sizes))


def _brute_force(statistic: Statistic, sizes: Sequence[int]) -> Any:
    """Order statistics by sorting; sums over the same tiles as the engine's, so that bits can be compared."""
    if isinstance(statistic, OrderStatistics):
        ordered = np.sort(statistic.keyed(), axis=1)
        picked = [[row[rank] for row, rank in zip(ordered, ranks, strict=True)] for ranks in statistic.ranks]
        return tuple(torch.tensor(np.array(column)).unsqueeze(1) for column in picked)
    tiles = [-(-size // TILE) for size in sizes]
    state, first = statistic.init(sum(sizes), sum(tiles), None, sum(sizes)), 0
    for part, count in zip(torch.split(statistic.values, list(sizes), dim=1), tiles, strict=True):
        piece = copy.copy(statistic)
        piece.values = part
        piece.reduce(state, first)
        first += count
    return statistic.finish(state)


def check_method(method: Method, **values: Any) -> str:
    """Assert that a merge method keeps the rules; `values` are parameters by the recipe's names.

    Raises `AssertionError` with a sentence that says which rule is broken. Returns what was checked, in one line.
    """
    name = method.name
    assert inspect.getdoc(method.function), f"{name}: it has no docstring: say what it computes"
    assert method.paper, f"{name}: it names no source: paper='arXiv:...' or where the formula stands"
    params = _params(method, values)
    with tempfile.TemporaryDirectory() as folder:
        for number, given in enumerate(variants(method)):
            check_cuts(given, params, Path(folder) / str(number)).check_zero()
    without = ", with a base and without" if method.optional_base else ""
    kept = ", what no model changed stays" if method.keeps_base else ""
    return (
        f"{name} keeps the rules: the same bits as in memory for any chunks and 1 to 3 workers{without}, float32, "
        f"inputs left alone{kept}, finite where no model differs from the base"
    )


def check_cuts(
    method: Method, params: Any, place: Path, large: Shapes = LARGE, cuts: Sequence[int] = (TILE, 7 * TILE, 16 * TILE)
) -> Bench:
    """Assert that chunks and workers change nothing; returns the bench of the `large` tensors; `cuts` are their chunk
    sizes."""
    for name, shapes, chunks in (("small", SMALL, (7, TILE)), ("large", large, cuts)):
        if method.statistics == "gram":  # [inputs, inputs] of a wide matrix would fill the memory
            shapes = {key: shape[::-1] for key, shape in shapes.items()}
        base, models = _sample(shapes, method.models or 3)
        bench = Bench(method, params, base, models, place / name)
        if method.keeps_base and name == "small":
            bench.check_kept()
        # sums are taken over whole tiles, so only methods without them can be cut anywhere
        sums = any(isinstance(kind, type) for kind in trace.asked(bench.merge(bench.opened), params))
        bench.check_streaming([max(chunk, TILE) for chunk in chunks] if sums else chunks)
    return bench


def variants(method: Method) -> list[Method]:
    """The method, and if the base is optional also its variant without a base, which gets weights."""
    without = dataclasses.replace(method, takes="weights", keeps_base=False)
    return [method, without] if method.optional_base else [method]


def _params(method: Method, values: Mapping[str, Any]) -> Any:
    count = method.models or 3
    found = {}
    for parameter in method.parameters.values():
        value = values.get(parameter.name, parameter.default)
        assert parameter.name in values or not parameter.required, f"{method.name}: give check_method {parameter.name}="
        each = parameter.per_model and not isinstance(value, tuple)
        found[parameter.name] = (value,) * count if each else value
    return method.make_params(found)


def _sample(shapes: Shapes, count: int) -> tuple[Tensors, list[Tensors]]:
    """A base and models that differ from it in half of the elements, but for a stretch of the long tensor."""
    generator = torch.Generator().manual_seed(len(shapes))

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {key: noise(shape).to(_DTYPES[key]) for key, shape in shapes.items()}
    models: list[Tensors] = []
    for _ in range(count):
        deltas = {key: noise(shape) * (noise(shape) > 0) * 0.01 for key, shape in shapes.items()}
        if "long" in deltas:
            deltas["long"][TILE : 3 * TILE] = 0  # whole chunks
        models.append({key: (base[key].float() + deltas[key]).to(_DTYPES[key]) for key in shapes})
    return base, models


class Bench:
    """Small checkpoints on disk and in memory, and the comparisons made with them."""

    def __init__(self, method: Method, params: Any, base: Tensors, tensors: Sequence[Tensors], place: Path) -> None:
        self.method, self.params, self.place, self.base, self.tensors = method, params, place, base, tensors
        place.mkdir(parents=True)
        self.opened = [self._save(f"model{i}", tensors) for i, tensors in enumerate(self.tensors)]
        self.origin = self._save("base", self.base)

    def _save(self, name: str, tensors: Tensors) -> Model:
        file = self.place / f"{name}.safetensors"
        save_file(dict(tensors), file)
        return open_model(str(file))

    def merge(self, models: Sequence[Model]) -> Merge:
        names = tuple(f"model{number}" for number in range(len(models)))
        statistics = tuple(self._measured(model) for model in models) if self.method.statistics else ()
        scope = self.method.scope
        return Merge(self.method, self.params, self.origin, tuple(models), names, scope=scope, statistics=statistics)

    def _measured(self, model: Model) -> Measured:
        """Made-up statistics of a model beside its file."""
        file = model.headers[0].file.with_suffix(".statistics")
        if not file.exists():
            made = statistics_of(self.method, load_file(model.headers[0].file))
            about: dict[str, Any] = {"kind": self.method.statistics, "model": {}, "data": {}, "norm": length_of(made)}
            write_measured(file, {name: tuple(one.shape) for name, one in made.items()}, made.__getitem__, about)
        return read_measured(file)

    def streamed(self, models: Sequence[Model], chunk: int, workers: int) -> dict[str, Tensor]:
        plan = plan_merge(self.merge(models), chunk=chunk, workers=workers, device="cpu")
        out = self.place / "out"
        run_plan(plan, out, overwrite=True)
        return load_file(out / "model.safetensors")

    def check_streaming(self, chunks: Sequence[int]) -> None:
        name, before = self.method.name, self._hashes()
        with one_thread():  # as in a worker: the number of threads changes the order of sums in a matrix product
            expected = in_memory(self._pure(), self.base, self.tensors, self.params)
        for tensor, value in expected.items():
            assert value.dtype == torch.float32, f"{name}: it gives {value.dtype}, float32 is wanted"
            assert torch.isfinite(value).all(), f"{name}: {tensor} is not finite"
        for chunk in chunks:
            for workers in (1, 2, 3):
                merged = self.streamed(self.opened, chunk, workers)
                for tensor, value in expected.items():
                    same = torch.equal(value.to(self.base[tensor].dtype), merged[tensor])
                    assert same, (
                        f"{name}: {tensor} differs when merged in chunks of {chunk} by {workers} workers: "
                        "the result must not depend on where a chunk ends"
                    )
        assert before == self._hashes(), f"{name}: an input file changed"

    def check_kept(self) -> None:
        """What `keeps_base` says: where no model changed an element, or the whole tensor if it comes whole, zeros."""
        merge, zeros = self.merge(self.opened), {name: torch.zeros(value.shape) for name, value in self.base.items()}
        changes = [{name: one[name].float() - self.base[name].float() for name in self.base} for one in self.tensors]
        changes = [{**one, "matrix": zeros["matrix"]} for one in changes]
        for name, value in in_memory(self.method, zeros, changes, self.params).items():
            still = ~torch.stack([one[name] for one in changes]).any(0)
            assert not value[still].any() or (merge.whole(self.origin.tensors[name]) and not still.all()), (
                f"{self.method.name}: keeps_base: it changes elements of {name} that no model changed"
            )

    def check_zero(self) -> None:
        """Models equal to the base: a finite result, or an error that says so."""
        try:
            merged = self.streamed([self._save(f"zero{i}", self.base) for i in range(len(self.opened))], TILE, 1)
        except MergebenchError:
            return
        for tensor, value in merged.items():
            assert torch.isfinite(value).all(), f"{self.method.name}: {tensor} is not finite where no model differs"

    def _pure(self) -> Method:
        """The method, wrapped to assert that it does not write into its input."""
        method, function = self.method, self.method.function

        def watched(values: Tensor, params: Any, context: Context) -> Any:
            before = values.clone()
            running = function(values, params, context)
            if not inspect.isgenerator(running):
                assert torch.equal(before, values), f"{method.name}: it writes into its input"
                return running
            return _watch(running, before, values, method.name)

        changed: Callable[..., Any] = watched
        return dataclasses.replace(method, function=changed)  # no `copy`: pickling goes by the method's name

    def _hashes(self) -> list[str]:
        files = sorted(self.place.glob("*.safetensors"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _watch(running: Any, before: Tensor, values: Tensor, name: str) -> Any:
    result = yield from running
    assert torch.equal(before, values), f"{name}: it writes into its input"
    return result


_DTYPES = {"matrix": torch.bfloat16, "bias": torch.float32, "scale": torch.float32, "long": torch.float32}
